"""A foreign checkpoint as a GEPModel: layout, architecture, channels, and what its input is to be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from torch import Tensor

from gep.events.represent import EventImage, Representation, build, describe
from gep.export import load_strict
from gep.hub import GEPModel
from gep.interop import clip, dinov2, dinov3, names, timm_names
from gep.interop.files import read_tensors
from gep.interop.table import Conversion, table
from gep.models.vit import build_vit

Layout = Literal["dinov2", "dinov3", "gep", "timm", "open_clip"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
_GEP_SIZE = (224, 224)
_INPUT = {"fit": "resize", "windows": 1, "window_us": 0, "num_events": 0}


@dataclass(frozen=True)
class Imported:
    """A model from a foreign file, and the account of how it came about."""

    model: GEPModel
    """The encoder alone, in evaluation mode."""
    table: str
    """Every tensor of the file and what became of it, as text."""
    notes: tuple[str, ...]
    """What the file does not say and was assumed."""


def import_encoder(
    file: str | os.PathLike[str],
    layout: Layout,
    *,
    arch: str = "",
    prefix: str | None = None,
    quick_gelu: bool = False,
    size: tuple[int, int] | None = None,
    representation: str = "",
    params: Mapping[str, Any] | None = None,
    input: Mapping[str, Any] | None = None,
    normalise: Literal["auto", "none"] = "auto",
    allow_leftover: bool = False,
) -> Imported:
    """Encoder weights of another release.

    Args:
        file: .safetensors, or a .pth that is read with weights_only=True.
        layout: whose names the tensors have; "gep" = the official release, a DINOv2 ViT under "event_encoder.".
        arch: timm's name, needed for timm's layout (and open_clip's timm towers) alone.
        prefix: what the encoder's names begin with; None = looked for.
        quick_gelu: open_clip: the tower was trained with QuickGELU.
        size: (H, W) [px] of the input, which the positions are resampled for once; None = 224x224 for DINOv3 and GEP,
            for the others what the file's positions are for.
        representation: how events become the input; empty = event_image for 3 channels, histogram for 2, else a voxel
            grid of so many bins.
        params: of the representation.
        input: of INPUT_KEYS all but height and width; others as one window of the whole recording, resized.
        normalise: "auto" = an image model's own mean and std, where the input has 3 channels in [0, 1].
        allow_leftover: True = tensors that no rule knows are left out instead of being an error.
    Raises:
        FileNotFoundError, ValueError: no such file, another layout, tensors left over or missing.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    if (arch and layout in ("dinov2", "dinov3", "gep")) or (quick_gelu and layout != "open_clip"):
        what = f"arch={arch!r}" if arch else "quick_gelu"
        raise ValueError(f"{what} has no effect on layout {layout!r}: leave it out")
    state, beside = read_tensors(file)
    try:
        weights, arch, size, rounded = _converted(state, layout, arch, prefix, quick_gelu, size)
        channels = weights.tensors[names.PATCH].shape[1]
        represent = build(representation or _representation(channels), _params(representation, params, channels))
        _fit_channels(weights, represent.channels)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    report = table(weights.rows, beside)
    if weights.left_over and not allow_leftover:
        raise ValueError(
            f"{report}\n{file} holds tensors that layout {layout} does not know: {', '.join(weights.left_over)}. Is it "
            "another layout? --allow-leftover leaves them out"
        )
    mean, std, note = _normalisation(arch, layout, represent, normalise)
    height, width = size
    encoder = {"arch": arch, "in_chans": represent.channels, "img_size": list(size), "mean": mean, "std": std}
    model = GEPModel(
        encoder={**encoder, "rope_bf16": rounded},
        representation=describe(represent),
        input={"height": height, "width": width, **_INPUT, **(input or {})},
        data={"imported": {"file": Path(file).name, "layout": layout}},
    )
    load_strict(model.encoder.vit, weights.tensors, source=str(file))
    notes = [note] if representation else [f"representation {describe(represent)}: assumed, as the file has none", note]
    return Imported(model.eval(), report, tuple(notes))


def _converted(
    state: dict[str, Tensor],
    layout: Layout,
    arch: str,
    prefix: str | None,
    quick_gelu: bool,
    size: tuple[int, int] | None,
) -> tuple[Conversion, str, tuple[int, int], bool]:
    rounded = False
    if all(name.startswith("module.") for name in state):  # of DistributedDataParallel
        state = {name.removeprefix("module."): value for name, value in state.items()}
    native = layout == "open_clip" and any(name.endswith(clip.ANCHOR) for name in state)
    prefer = {"gep": ("event_encoder.",), "dinov2": ("backbone.",), "dinov3": ("backbone.",)}.get(layout, ())
    start = names.find_prefix(state, clip.ANCHOR if native else names.PATCH, prefix, prefer)
    weights, others = names.under_prefix(state, start)
    if native and arch:
        raise ValueError(f"arch={arch!r} has no effect on a tower of open_clip's own: leave it out")
    if native:
        arch, size = clip.convert(weights, size, quick_gelu)
    elif layout == "dinov3":
        arch, size, rounded = dinov3.convert(weights, size)
    elif layout in ("dinov2", "gep"):
        arch, size = dinov2.convert(weights, size or (_GEP_SIZE if layout == "gep" else None))
    else:
        if not arch:
            raise ValueError("the file does not tell timm's name of its architecture: give --arch vit_…")
        with torch.device("meta"):
            own = set(build_vit(arch, 3, (224, 224)).state_dict())
        size = timm_names.convert(weights, size, own)
    # From here on by the file's own names: what is left of the encoder's, and what lay beside it.
    weights.rows = [replace(row, source=start + row.source) for row in weights.rows]
    weights.rest = {**{start + name: value for name, value in weights.rest.items()}, **others}
    if layout == "open_clip" and start.startswith("visual."):
        clip.ignore_text(weights)
        weights.ignore_under(("visual.head.",), "to the joint space")
    elif layout in ("dinov2", "dinov3"):
        weights.ignore_under(dinov2.HEADS, "pretraining only")
    weights.finish()
    return weights, arch, size, rounded


def _representation(channels: int) -> str:
    return {2: "histogram", 3: "event_image"}.get(channels, "voxel_grid")


def _params(name: str, params: Mapping[str, Any] | None, channels: int) -> dict[str, Any]:
    if name and params is not None:
        return dict(params)
    if params:
        raise ValueError(f"parameters {sorted(params)} of no representation: name it too")
    return {"bins": channels} if not name and _representation(channels) == "voxel_grid" else {}


def _fit_channels(weights: Conversion, channels: int) -> None:
    kernel = weights.tensors[names.PATCH]
    if (own := kernel.shape[1]) != channels:
        # An input that is the same in all channels keeps its response, whatever their number.
        kernel = kernel.mean(1, keepdim=True).expand(-1, channels, -1, -1) * (own / channels)
        weights.change(names.PATCH, kernel, f"mean over {own} channels, scaled by {own}/{channels} for {channels}")


def _normalisation(
    arch: str, layout: Layout, represent: Representation, normalise: str
) -> tuple[list[float] | None, list[float] | None, str]:
    if normalise not in ("auto", "none"):
        raise ValueError(f"normalise {normalise!r}: choose one of auto, none")
    if normalise == "none" or layout == "gep" or not isinstance(represent, EventImage):
        return None, None, "input not normalised"
    if (known := timm.get_pretrained_cfg(arch)) is None:
        return None, None, "input not normalised: timm has no mean and std of this architecture"
    return (
        list(known.mean),
        list(known.std),
        f"input normalised as the image model's: mean {known.mean}, std {known.std}",
    )
