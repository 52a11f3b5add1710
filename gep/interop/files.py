"""Tensors of a foreign checkpoint, without running anything that is in it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_NESTED = ("state_dict", "model", "model_state_dict", "module", "model_ema", "ema", "teacher", "network")


def read_tensors(file: str | os.PathLike[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors of a checkpoint by their names in it.

    Args:
        file: .safetensors, or what torch.save wrote, read with weights_only=True. A state dict inside another dict is
            found by its usual names ("model", "state_dict", "teacher", …).
    Returns:
        Tensors on the CPU, and the names of what lay beside the state dict (optimizer, epoch, …).
    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read as either, or holds no tensors.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: give a .safetensors or .pth file")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as weights ({cause}): give a .safetensors file, or a .pth of tensors alone "
            "(objects and TorchScript archives are not unpickled; save its state dict where you trust it)"
        ) from error
    beside: list[str] = []
    while isinstance(loaded, Mapping) and not any(isinstance(value, Tensor) for value in loaded.values()):
        inner = next((name for name in _NESTED if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        beside += [str(name) for name in loaded if name != inner]
        loaded = loaded[inner]
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        held = ", ".join(map(str, list(loaded)[:6])) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise ValueError(f"{path} holds no state dict ({held}): a dict of tensors is needed, alone or under 'model'")
    beside += [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}, tuple(beside)


def _unpickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
