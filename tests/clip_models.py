"""A tiny open_clip model with random weights, and an event encoder that says it was aligned with it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from torch import nn

from gep.events.represent import Histogram
from gep.hub import GEPModel
from gep.models import EventEncoder, FrozenVFM

ARCH = "gep-words"
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tiny_clip(folder: Path) -> tuple[Path, Any]:
    """Writes a checkpoint into a folder.

    Returns:
        Its file, and the model.
    """
    (folder / f"{ARCH}.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(ARCH).eval()
    nn.init.normal_(model.text_projection)
    torch.save(model.state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt", model


def aligned(file: Path, folder: Path, head_dim: int = 24, windows: int = 2) -> GEPModel:
    """An encoder whose export names the tiny model, as it is loaded from that export.

    Args:
        file: of `tiny_clip`.
        folder: for the export.
        head_dim: width of what is compared with the words; 24 is the tiny model's.
        windows: that the encoder reads, each of 50 ms.
    """
    torch.manual_seed(1)
    encoder = EventEncoder("nano", 2, (36, 36), head_dim=head_dim)
    settings = {"height": 36, "width": 36, "fit": "pad", "windows": windows, "window_us": 50_000, "num_events": 0}
    teacher = FrozenVFM.from_spec(f"open_clip:{ARCH}", file=file)
    GEPModel.from_parts(encoder, Histogram(), SimpleNamespace(**settings), teacher=teacher).save_pretrained(folder)
    return GEPModel.from_pretrained(folder)
