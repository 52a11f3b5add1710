"""From a batch to sequences of frames of tokens: through the frozen encoder and image model, or packed before.

Packing them, once for all epochs and runs:
accelerate launch stage2_autoregress/tokens.py configs/stage2/nmnist.yaml model=RUN/export data.root=DIR pack=DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gep.data.sequence import EVENT
from gep.events.frames import PerSource
from gep.events.frames import frames as frames_of
from gep.events.represent import Representation
from gep.models.encoder import EventEncoder
from gep.models.teacher import FrozenVFM


@dataclass(frozen=True)
class TokenSequence:
    """B sequences of F frames of N tokens; frames past a sequence's end are marked in `valid`."""

    frames: Tensor
    """(B, F, N, D) float32, layer-normalised tokens"""
    modality: Tensor
    """(B, F) int64: 0 event, 1 image"""
    t_us: Tensor
    """(B, F) int64 µs"""
    valid: Tensor
    """(B, F) bool"""
    image: Tensor
    """(B, F, N, D) float32: tokens of the image that belongs to each frame (itself, for an image frame)"""
    grid: tuple[int, int]
    """rows and columns of the N tokens"""
    padded: bool
    """whether any frame of the batch is not valid; known without asking the device"""
    real: Tensor | None = None
    """(B, F, N) bool: False = the learned token that stands where the encoder left a patch out; None = all are real"""

    @property
    def blind(self) -> Tensor:
        """(B, F) bool: the valid event frames that no image comes before, from which its tokens are to be predicted."""
        return blind_frames(self.modality, self.valid)


def blind_frames(modality: Tensor, valid: Tensor) -> Tensor:
    """(B, F) modality and validity -> bool (B, F): event frames with nothing but events up to them."""
    return (modality == EVENT) & valid & ((modality != EVENT).cumsum(dim=1) == 0)


class FrozenTokens:
    """Tokens on the fly. Not a module: nothing in it trains, is saved, or is wrapped for several ranks.

    Args:
        encoder: the exported stage-1 encoder; put into evaluation mode here.
        teacher: the frozen image model that stage 1 aligned it with; None = for batches without images.
        represent: the representation the encoder was trained on.
    Raises:
        ValueError: encoder and teacher differ in token size.
    """

    def __init__(self, encoder: EventEncoder, teacher: FrozenVFM | None, represent: Representation | PerSource):
        if teacher is not None and encoder.embed_dim != teacher.embed_dim:
            raise ValueError(
                f"model: its tokens have {encoder.embed_dim} features and those of teacher.name have "
                f"{teacher.embed_dim}; name the teacher that stage 1 was aligned with"
            )
        self.encoder = encoder.eval().requires_grad_(False)
        self.teacher = teacher
        self.represent = represent

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> TokenSequence:
        """Encodes every window and image once and puts them in each sequence's order.

        Args:
            batch: as `collate_sequences` gives it.
        Raises:
            ValueError: the event and image grids differ.
        """
        return _arranged(batch, *self.encode(batch), self.grid(batch))

    @torch.no_grad()
    def encode(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Layer-normalised tokens of a batch's windows (B, T, N, D) and images (B, J, N, D), both float32, and which of
        the windows' tokens are real (B, T, N); None where there are no images, or all tokens are real."""
        represented = frames_of(self.represent, batch["events"])
        tokens, _ = self.encoder(represented)
        events = _normalise(tokens).unflatten(0, (-1, batch["windows"]))
        images = self._images(batch["images"], events) if "images" in batch else None
        return events, images, self._real(represented, batch)

    @torch.no_grad()
    def real(self, batch: dict[str, Any]) -> Tensor | None:
        """`TokenSequence.real` of a batch, without encoding it."""
        if not self.encoder.is_sparse:
            return None
        return _real_frames(batch, self._real(frames_of(self.represent, batch["events"]), batch))

    def _real(self, represented: Tensor, batch: dict[str, Any]) -> Tensor | None:
        real = self.encoder.real(represented)
        return None if real is None else real.unflatten(0, (-1, batch["windows"]))

    def _images(self, images: Tensor, events: Tensor) -> Tensor:
        """(B, J, 3, H, W) -> (B, J, N, D) on the events' grid."""
        assert self.teacher is not None, "images, and no model to look at them"
        tokens, _ = self.teacher.features(images.flatten(0, 1))
        if events.shape[2] != tokens.shape[1]:
            raise ValueError(
                f"data: an event window has {events.shape[2]} tokens and an image {tokens.shape[1]}; "
                "choose data.height and data.width so that both grids agree"
            )
        return _normalise(tokens).unflatten(0, (len(events), -1))

    def grid(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Rows and columns of the tokens of each frame of a batch."""
        return self.encoder.grid(batch["events"].height, batch["events"].width)


class PackedTokens:
    """Tokens that were packed into shards: a batch brings them along.

    Args:
        grid: rows and columns of the tokens of each frame.
    """

    def __init__(self, grid: tuple[int, int]):
        self._grid = grid

    def __call__(self, batch: dict[str, Any]) -> TokenSequence:
        """Puts a batch's tokens in each sequence's order; the batch is as `collate_tokens` gives it."""
        return _arranged(batch, batch["events"], batch.get("images"), batch.get("real"), self._grid)

    def real(self, batch: dict[str, Any]) -> Tensor | None:
        """`TokenSequence.real` of a batch."""
        return _real_frames(batch, batch.get("real"))

    def grid(self, batch: dict[str, Any]) -> tuple[int, int]:
        """Rows and columns of the tokens of each frame of a batch."""
        return self._grid


def _arranged(
    batch: dict[str, Any], events: Tensor, images: Tensor | None, real: Tensor | None, grid: tuple[int, int]
) -> TokenSequence:
    """The sequences of a batch of tokens: events (B, T, N, D), images (B, J, N, D), real (B, T, N)."""
    if images is None:  # event windows alone: nothing reads the image's tokens
        images = torch.zeros_like(events[:, :1])
    modality, source = batch["modality"], batch["source"]
    is_event = modality == EVENT
    pair = batch["pair"].gather(1, source.clamp(max=batch["pair"].shape[1] - 1))
    image = _take(images, torch.where(is_event, pair, source))
    frames = torch.where(is_event[..., None, None], _take(events, _event_index(batch)), image)
    return TokenSequence(
        frames=frames.float(),
        modality=modality,
        t_us=batch["frame_t_us"],
        valid=batch["valid"],
        image=image.float(),
        grid=grid,
        padded=batch["padded"],
        real=_real_frames(batch, real),
    )


def _real_frames(batch: dict[str, Any], real: Tensor | None) -> Tensor | None:
    """(B, T, N) of the windows -> (B, F, N) of the frames; an image's tokens are all real."""
    if real is None:
        return None
    return _take(real, _event_index(batch)) | (batch["modality"] != EVENT)[..., None]


def _event_index(batch: dict[str, Any]) -> Tensor:
    """(B, F): each event frame's window; 0 for images."""
    return torch.where(batch["modality"] == EVENT, batch["source"], torch.zeros_like(batch["source"]))


def _normalise(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, K, N, …) and (B, F) -> (B, F, N, …)."""
    return tokens[torch.arange(len(tokens), device=tokens.device)[:, None], index]


if __name__ == "__main__":
    from gep.config import run_cli
    from stage2_autoregress.pack import main

    run_cli(main)
