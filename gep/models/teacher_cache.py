"""What a frozen image model's answers depend on, so that answers kept on disk are told apart."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from gep.models.teacher import FrozenVFM


def fingerprint(teacher: FrozenVFM) -> dict[str, Any]:
    """All that `teacher.features` depends on besides the picture and the arithmetic.

    Args:
        teacher: any; an exported one is known by its weights and settings, wherever its folder lies.
    Returns:
        JSON values: spec, image_size, dtype, and the first 16 hex digits of a SHA-256 over names, types, shapes and
        bytes of all weights and the normalisation.
    """
    digest = hashlib.sha256()
    state = {**teacher._model.state_dict(), "/mean": teacher._mean, "/std": teacher._std}
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    kind, _, _ = teacher.spec.partition(":")
    return {
        "spec": kind if kind == "export" else teacher.spec,
        "config": getattr(teacher._model, "config", None) if kind == "export" else None,
        "image_size": None if teacher.image_size is None else list(teacher.image_size),
        "dtype": str(teacher.dtype),
        "weights": digest.hexdigest()[:16],
    }
