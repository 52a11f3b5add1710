"""What the page shows of an event encoder: its input, its tokens in colours, what is near, and classes in words."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.dense.streaming import on_sensor
from gep.app import html
from gep.app.images import Images
from gep.app.recording import Recording, Shown
from gep.app.views import View, batch_of
from gep.events.render import pictures
from gep.events.represent import describe
from gep.events.types import Events
from gep.hub import GEPModel

NEAREST = "Nearest images"
"""Title of the view that needs images."""
_BANK, _AT_ONCE = 24, 4  # windows that colours and neighbours are taken from, and how many are encoded at once
_NEAR = 6
_BEYOND = 222  # grey of what the model's canvas did not reach
_CHANNELS = 12
_BARS = 8
_MOST_WORDS = 50


class Bank(NamedTuple):
    """Windows of a recording, evenly spread over its time, encoded."""

    bounds: np.ndarray
    """(K, 2) int64 µs."""
    vectors: Tensor
    """(K, P) what the model compares with images and words."""
    colours: PrincipalColours
    """Of the tokens of all of them."""


@dataclass(frozen=True)
class PrincipalColours:
    """Features as colours by the first three principal components of a reference, the same for all that follow."""

    mean: np.ndarray
    """(D,)."""
    axes: np.ndarray
    """(D, 3)."""
    low: np.ndarray
    """(3,): the 2nd percentile of the reference on each axis."""
    high: np.ndarray
    """(3,): the 98th."""

    @classmethod
    def of(cls, reference: np.ndarray) -> PrincipalColours:
        """Axes and ranges of (N, D) features."""
        reference = reference.astype(np.float64)
        mean = reference.mean(axis=0)
        _, _, components = np.linalg.svd(reference - mean, full_matrices=False)
        axes = np.zeros((3, reference.shape[1]))
        axes[: min(3, len(components))] = components[:3]
        # The sign of a component is arbitrary: fixed, so that two visits show the same colours.
        axes = (axes * np.sign(axes[np.arange(3), np.abs(axes).argmax(axis=1)])[:, None]).T
        low, high = np.percentile((reference - mean) @ axes, [2, 98], axis=0)
        return cls(mean, axes, low, high)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(…, D) features as float (…, 3) in [0, 1]."""
        return np.clip(((features - self.mean) @ self.axes - self.low) / np.maximum(self.high - self.low, 1e-12), 0, 1)


class EncoderViews:
    """Views of one encoder, with or without a backbone.

    Args:
        model: on the device to use.
        images: that windows are compared with; None = other windows of the recording.
    """

    def __init__(self, model: GEPModel, images: Images | None = None):
        self.model, self.images = model, images
        self._banks: WeakKeyDictionary[Recording, dict[int, Bank]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def views(self) -> list[View]:
        """Those that this model can fill."""
        near = View("Similar windows", self.similar) if self.images is None else View(NEAREST, self.nearest)
        found = [View("Tokens", self.tokens), View("Input", self.input), near]
        found = [view._replace(draw=_unless_empty(view.draw)) for view in found]
        if self.model.classes is not None:
            found.append(View("Zero-shot", self.classes))
        if (self.model.teacher or "").startswith("open_clip:"):
            found.append(View("Words", self.words, asks="Prompts, separated by commas"))
        return found

    def tokens(self, shown: Shown) -> str:
        """Tokens in three colours; of a recording, like features have like colours in all windows."""
        bank = self._bank(shown)
        frames, edges = self.model.frames(shown.events, np.array([[shown.t0, shown.t1]]))
        found = self.model.predict_frames(frames, edges[..., 1], backbone=False)
        rows, columns = self.model.encoder.grid(*frames.shape[-2:])
        drawn = bank.colours(found.tokens[0, 0].cpu().numpy()).reshape(rows, columns, 3)
        maps = torch.from_numpy(drawn.astype(np.float32)).permute(2, 0, 1)[None]
        maps = F.interpolate(maps, frames.shape[-2:], mode="nearest")[0]
        sensor = (shown.recording.events.height, shown.recording.events.width)
        seen = on_sensor(maps, sensor, self.model.input_settings["fit"])
        picture = (255 * seen).nan_to_num(_BEYOND).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        beyond = " Grey: beyond what the model reads." if seen.isnan().any() else ""
        caption = f"{rows} × {columns} tokens, principal components of {len(bank.bounds)} windows as red, green, blue."
        return html.figure(html.picture(picture, "Tokens of the window in colours"), caption + beyond)

    def input(self, shown: Shown) -> str:
        """The channels that the encoder reads."""
        frames, _ = self.model.frames(shown.events, np.array([[shown.t0, shown.t1]]))
        values, named = frames[0, 0].cpu().numpy(), describe(self.model.represent)
        settings = ", ".join(f"{key} {value}" for key, value in named["params"].items())
        caption = f"{named['name']}{f' ({settings})' if settings else ''}, {len(values)} channels."
        drawn = [
            (html.picture(signed(channel), f"Channel {number}"), f"{channel.min():.3g} to {channel.max():.3g}")
            for number, channel in enumerate(values[:_CHANNELS], start=1)
        ]
        more = f" The first {_CHANNELS} are shown." if len(values) > _CHANNELS else ""
        return html.figure(html.tiles(drawn, 2 if len(drawn) <= 4 else 4), caption + more)

    def similar(self, shown: Shown) -> str:
        """Windows of the same recording whose features are nearest to this one's."""
        bank = self._bank(shown)
        cosines = _centred(self._vector(shown)[None], bank.vectors) @ _centred(bank.vectors, bank.vectors).T
        begin = shown.recording.span[0]
        drawn = []
        for place in cosines[0].argsort(descending=True).tolist():
            t0, t1 = bank.bounds[place].tolist()
            if t0 < shown.t1 and shown.t0 < t1:
                continue
            picture = pictures(batch_of(Shown(shown.recording, t0, t1)))[0]
            at = f"{(t0 - begin) / 1e6:.3f} s"
            drawn.append((html.picture(picture, f"Events at {at}"), f"{at}, cosine {cosines[0, place]:.2f}"))
        if not drawn:
            return html.notice("Nothing to compare with", "This recording has one window of this length: choose less.")
        caption = f"Nearest of {len(bank.bounds)} windows of this recording, their mean removed."
        return html.figure(html.tiles(drawn[:_NEAR], 3), caption)

    def nearest(self, shown: Shown) -> str:
        """Pictures of the folder whose features are nearest to this window's."""
        assert self.images is not None
        bank, images = self._bank(shown), self.images
        cosines = _centred(self._vector(shown)[None], bank.vectors) @ _centred(images.vectors, images.vectors).T
        best = cosines[0].argsort(descending=True)[:_NEAR].tolist()
        drawn = [
            (
                html.picture(images.thumbnails[place], images.names[place], smooth=True),
                f"{images.names[place]}, {cosines[0, place]:.2f}",
            )
            for place in best
        ]
        caption = f"Nearest of {len(images.names):,} images by cosine, means removed; read by {images.teacher}."
        return html.figure(html.tiles(drawn, 3), caption)

    def classes(self, shown: Shown) -> str:
        """The teacher's own classes."""
        bounds = shown.past(self.model.input_settings["windows"])
        found = self.model.predict(_within(shown, bounds), bounds)
        logits = self.model.classify(found.pooled.mean(1) if found.image is None else found.image[:, -1].mean(1))
        assert logits is not None and self.model.classes is not None
        shares = logits[0].softmax(dim=-1)
        best = shares.argsort(descending=True)[:_BARS].tolist()
        rows = [(self.model.classes[i], float(shares[i]), f"{100 * shares[i]:.0f} %") for i in best]
        return html.figure(html.bars(rows), f"Classes of the image model, {_windows(bounds)}; no label was trained on.")

    def words(self, shown: Shown) -> str:
        """The prompts that were typed, by cosine."""
        prompts = [word.strip() for word in shown.words.split(",") if word.strip()]
        if len(prompts) > _MOST_WORDS:
            return html.notice("Words", f"{len(prompts)} prompts; give at most {_MOST_WORDS}.")
        if not prompts:
            return html.notice("Words", "Type some above, such as: a photo of a car, a photo of a person.")
        vectors = self.model.word_vectors(prompts)
        bounds = shown.past(self.model.input_settings["windows"])
        found = self.model.encode(_within(shown, bounds), bounds)
        with torch.no_grad():
            embedded = F.normalize(self.model.encoder.embed(found.pooled.mean(1)), dim=-1)
        cosines = (embedded @ vectors.to(embedded).T)[0].cpu()
        low, high = float(cosines.min()), float(cosines.max())
        rows = [
            (prompts[i], 0.1 + 0.9 * (float(cosines[i]) - low) / max(high - low, 1e-9), f"{cosines[i]:.3f}")
            for i in cosines.argsort(descending=True).tolist()
        ]
        caption = f"Cosines with the words by {self.model.teacher}, {_windows(bounds)}; bars from least to most."
        return html.figure(html.bars(rows), caption)

    def _vector(self, shown: Shown) -> Tensor:
        """(P,) of a window."""
        pooled = self.model.encode(shown.events, np.array([[shown.t0, shown.t1]])).pooled[0, 0]
        with torch.no_grad():
            return self.model.encoder.embed(pooled[None])[0].float().cpu()

    def _bank(self, shown: Shown) -> Bank:
        with self._lock:  # two visitors at once: the second waits instead of computing the same
            banks = self._banks.setdefault(shown.recording, {})
            if shown.window_us not in banks:
                banks[shown.window_us] = self._encoded(shown)
            return banks[shown.window_us]

    def _encoded(self, shown: Shown) -> Bank:
        recording, length = shown.recording, shown.window_us
        count = recording.count(length)
        chosen = np.unique(np.linspace(0, count - 1, min(count, _BANK)).round().astype(int))
        bounds = np.array([recording.bounds(int(index), length) for index in chosen], np.int64)
        full = np.array([len(recording.between(t0, t1)) > 0 for t0, t1 in bounds.tolist()])
        bounds = bounds[full] if full.any() else bounds[:1]
        parts, vectors = [], []
        for start in range(0, len(bounds), _AT_ONCE):
            edges = bounds[start : start + _AT_ONCE]
            windows = [recording.between(t0, t1) for t0, t1 in edges.tolist()]
            frames, ends = self.model.frames(windows, edges[:, None])
            found = self.model.predict_frames(frames, ends[..., 1], backbone=False)
            parts.append(found.tokens.flatten(0, 2).float().cpu().numpy())
            with torch.no_grad():
                vectors.append(self.model.encoder.embed(found.pooled[:, 0]).float().cpu())
        return Bank(bounds, torch.cat(vectors), PrincipalColours.of(_thinned(np.concatenate(parts))))


def signed(values: np.ndarray) -> np.ndarray:
    """(H, W) float as uint8 (H, W, 3): white at 0, red above, blue below; full colour at the 99.5th percentile."""
    sizes = np.abs(values[values != 0])
    top = float(np.percentile(sizes, 99.5)) if len(sizes) else 1.0
    share = np.clip(values / top, -1, 1)
    rest = 1 - np.abs(share)
    drawn = np.stack([np.where(share < 0, rest, 1), rest, np.where(share > 0, rest, 1)], axis=-1)
    return (255 * drawn).round().astype(np.uint8)


def _unless_empty(draw: Callable[[Shown], str]) -> Callable[[Shown], str]:
    """Tokens of no events say nothing of the scene."""

    def drawn(shown: Shown) -> str:
        if not len(shown.events):
            return html.notice("No events in this window", "Choose another, or longer windows.")
        return draw(shown)

    return drawn


def _within(shown: Shown, bounds: np.ndarray) -> Events:
    return shown.recording.between(int(bounds[0, 0]), int(bounds[-1, 1]))


def _windows(bounds: np.ndarray) -> str:
    return "this window" if len(bounds) == 1 else f"the last {len(bounds)} windows"


def _thinned(tokens: np.ndarray, most: int = 20_000) -> np.ndarray:
    return tokens[:: -(-len(tokens) // most)]


def _centred(vectors: Tensor, reference: Tensor) -> Tensor:
    """Unit vectors; what all of the reference share tells nothing apart, and goes where there are enough to tell."""
    mean = reference.mean(dim=0) if len(reference) > 2 else torch.zeros_like(reference[0])
    return F.normalize(vectors - mean, dim=-1)
