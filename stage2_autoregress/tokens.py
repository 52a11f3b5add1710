"""From a batch of recordings to sequences of frames of tokens, through the frozen encoder and image model."""

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
        teacher: the frozen image model that stage 1 aligned it with.
        represent: the representation the encoder was trained on.
    Raises:
        ValueError: encoder and teacher differ in token size.
    """

    def __init__(self, encoder: EventEncoder, teacher: FrozenVFM, represent: Representation | PerSource):
        if encoder.embed_dim != teacher.embed_dim:
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
        frames = frames_of(self.represent, batch["events"])
        tokens, _ = self.encoder(frames)
        events = _normalise(tokens).unflatten(0, (-1, batch["windows"]))
        if "images" in batch:
            images = self._images(batch["images"], events)
        else:  # event windows alone: nothing reads the image's tokens
            images = torch.zeros_like(events[:, :1])
        modality, source = batch["modality"], batch["source"]
        is_event = modality == EVENT
        pair = batch["pair"].gather(1, source.clamp(max=batch["pair"].shape[1] - 1))
        image_index = torch.where(is_event, pair, source)
        image = _take(images, image_index)
        event_index = torch.where(is_event, source, torch.zeros_like(source))
        sequence = torch.where(is_event[..., None, None], _take(events, event_index), image)
        return TokenSequence(
            frames=sequence,
            modality=modality,
            t_us=batch["frame_t_us"],
            valid=batch["valid"],
            image=image,
            grid=self.grid(batch),
            padded=batch["padded"],
        )

    def _images(self, images: Tensor, events: Tensor) -> Tensor:
        """(B, J, 3, H, W) -> (B, J, N, D) on the events' grid."""
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


def _normalise(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, K, N, D) and (B, F) -> (B, F, N, D)."""
    return tokens[torch.arange(len(tokens), device=tokens.device)[:, None], index]
