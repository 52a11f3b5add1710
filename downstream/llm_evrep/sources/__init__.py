"""Where the images come from that a frozen model reads: of events drawn, reconstructed or generated, or recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from downstream.llm_evrep.sources.plain import DRAWINGS, RGB, Drawn, LLMEvRep
from gep.data.config import DataConfig

_FROM_FILES = {
    "llm_evrep": "folder or Hub id of an export of downstream/llm_evrep/run.py",
    "e2vid": "E2VID_lightweight.pth.tar",
    "e2hqv": "folder of E2HQV's three .pth files",
}


class ImageSource(Protocol):
    """Images of the samples of a batch."""

    name: str
    """What tables and pictures call it."""
    needs_images: bool
    """Whether the batch has to hold the recorded images."""

    def images(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1] of a batch of `gep.data.paired.collate`, on its device, without a graph."""


def build_source(spec: str, *, data: DataConfig, device: torch.device | str = "cpu") -> ImageSource:
    """The image source of a spec.

    Args:
        spec: tencode, histogram, voxel, event_image, rgb, llm_evrep:<export>, e2vid:<file> or e2hqv:<folder>; with
            `<label>=` before it, that is its name instead of the spec.
        data: what the batches are read by.
        device: on which networks compute.
    Raises:
        ValueError: an unknown spec (the known ones are listed), or weights of another network.
        FileNotFoundError: no weights at the place named; the message says what to download.
    """
    label, kind, argument = split_spec(spec)
    source: ImageSource
    if kind in DRAWINGS:
        source = Drawn(kind)
    elif kind == "rgb":
        source = RGB()
    elif kind == "llm_evrep":
        source = LLMEvRep(argument, data=data, device=device)
    elif kind == "e2vid":
        from downstream.llm_evrep.sources.e2vid import E2VIDSource

        source = E2VIDSource(argument, device=device)
    else:
        from downstream.llm_evrep.sources.e2hqv import E2HQVSource

        source = E2HQVSource(argument, device=device)
    source.name = label
    return source


def split_spec(spec: str) -> tuple[str, str, str]:
    """(label, kind, argument) of a source's spec; label = the spec itself where it names none.

    Raises:
        ValueError: an unknown kind, an argument too many, or none where one is needed.
    """
    found = re.fullmatch(r"(?:(?P<label>[^=:/\\]+)=)?(?P<kind>[^:]*)(?::(?P<argument>.*))?", spec, re.DOTALL)
    label, kind, argument = found.group("label", "kind", "argument") if found else (None, spec, None)
    known = [*DRAWINGS, "rgb", *(f"{name}:<{what}>" for name, what in _FROM_FILES.items())]
    if kind not in (*DRAWINGS, "rgb", *_FROM_FILES):
        raise ValueError(f"sources: {spec!r} is not known; choose from {', '.join(known)}")
    if kind in _FROM_FILES and not argument:
        raise ValueError(f"sources: {spec!r} names no weights; write {kind}:<{_FROM_FILES[kind]}>")
    if kind not in _FROM_FILES and argument is not None:
        raise ValueError(f"sources: {spec!r}: {kind} takes nothing after the colon; write {kind}")
    return label or spec, kind, argument or ""
