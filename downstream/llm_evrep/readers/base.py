"""What a frozen model that looks at images has to answer: the interface, and what its readers share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

OnAnswer: TypeAlias = Callable[[int, str], None]
"""Called with (index in the batch, text) as each answer comes."""
NO_WEIGHTS = "has no weights at hand, so token probabilities are unknown: set loss.estimator=score (or none)"
"""What a reader seen only through its answers says of token_log_probs."""
_WHOLE, _EVERY, _SAMPLE = 16 << 20, 1 << 20, 1 << 12  # bytes


class TokenScores(NamedTuple):
    """How probable a text is to a reader that sees an image, token by token."""

    spans: list[tuple[int, int]]
    """Characters [start, end) of the text that each token covers; tokens that cover none are left out."""
    log_probs: Tensor
    """(n,) float32 log p(token | image, prompt, earlier tokens of the text), with a graph to the image."""


@runtime_checkable
class Reader(Protocol):
    """A frozen model that describes images.

    Attributes:
        name: "<kind>:<id>" and the settings that change answers: part of cache keys and reports, never a
            secret.
        has_weights: whether token_log_probs works.
        usage: counts so far: calls, images, tokens, cost (what applies).
    """

    @property
    def name(self) -> str: ...

    @property
    def has_weights(self) -> bool: ...

    @property
    def usage(self) -> dict[str, float]: ...

    def describe(self, images: Tensor, prompt: str, *, on_answer: OnAnswer | None = None) -> list[str]:
        """Answers to one prompt about each image, without gradients, from the image rounded to 8 bits.

        Args:
            images: (B, 3, H, W), uint8 or float in [0, 1].
            prompt: the question.
            on_answer: called with each answer as it comes, so that a crash loses nothing answered.
        """
        ...

    def token_log_probs(self, images: Tensor, texts: Sequence[str], prompt: str) -> list[TokenScores]:
        """Log-probabilities of given answers, differentiable to the pixels, which are not rounded.

        Args:
            images: (B, 3, H, W), uint8 or float in [0, 1].
            texts: B answers, teacher-forced.
            prompt: the question they answer.
        Raises:
            ValueError: the reader has no weights, or a text that it cannot say.
        """
        ...


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) as a reader sees them: uint8 as they are, floats in [0, 1] rounded to 8 bits.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    images = images.detach().float()
    if not torch.isfinite(images).all():
        raise ValueError("images hold NaN or infinite values: a reader cannot be shown them")
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def check_texts(images: Tensor, texts: Sequence[str]) -> None:
    """ValueError unless there is one text an image."""
    if len(images) != len(texts):
        raise ValueError(f"{len(texts)} texts for {len(images)} images: give one a piece")


def fingerprint(files: Iterable[str | os.PathLike[str]]) -> str:
    """Twelve hex digits that tell weights apart, so that answers of other weights are never taken for theirs.

    Files up to 16 MiB count whole; of larger ones the size and 4 KiB of every MiB and of the end: whatever was trained
    on changes a matrix, and few matrices of a file so large are smaller.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(file) for file in files):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE:
                digest.update(stream.read())
                continue
            for start in (*range(0, size - _SAMPLE, _EVERY), size - _SAMPLE):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:12]


def short_path(path: str | os.PathLike[str]) -> str:
    """The last two parts of a path: what a report can say of a folder, wherever it lies."""
    return "/".join(Path(path).expanduser().resolve().parts[-2:])
