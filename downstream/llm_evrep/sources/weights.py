"""Weights that a user downloaded for another's network: read without running code, fitted with no key left over."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 40  # of a table of differences; a file of another network differs in every key


def read_checkpoint(file: str | os.PathLike[str], *, model: str, get: str) -> Any:
    """What a checkpoint file holds, tensors on the CPU; only tensors and plain containers are unpickled.

    Args:
        file: written by torch.save, in the new or the old (before torch 1.6) format.
        model: whose weights it should hold, for the messages.
        get: what to download and where, for the message of a missing file.
    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of torch.save, or one that holds objects of other classes.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{model}: no weights at {path}. {get}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found:
            raise ValueError(f"{path} is damaged or no file of torch.save: download it again. {get}") from error
        raise ValueError(
            f"{path} holds objects beside tensors ({found[1]}), which could run code and are not read. If you trust "
            "where it comes from, write its tensors out once, with the code that made it at hand, and give the new "
            "file: c = torch.load(FILE, map_location='cpu', weights_only=False); "
            "torch.save({k: c[k] for k in ('arch', 'model', 'state_dict')}, NEW), or torch.save(c.state_dict(), NEW) "
            "where c is a module"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no file of torch.save ({error}): download it again. {get}") from error


def check_state(state: object, file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a state dict.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        kind = type(state).__name__
        raise ValueError(f"{file}: a state dict (names and tensors) was looked for, and a {kind} of other things found")
    return {str(name): value for name, value in state.items()}


def fit_state(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Puts every tensor of a state dict into a module.

    Args:
        module: gets the tensors, in its own dtype and on its own device.
        state: by the module's names.
        source: the file, for the message.
    Raises:
        ValueError: with a table of the tensors that are missing, not known or of another shape; the module is then
            unchanged.
    """
    own = module.state_dict()
    rows = [("missing", name, f"{tuple(value.shape)}") for name, value in own.items() if name not in state]
    rows += [("unexpected", name, f"{tuple(value.shape)}") for name, value in state.items() if name not in own]
    rows += [
        ("other shape", name, f"{tuple(state[name].shape)} where the network has {tuple(value.shape)}")
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if rows:
        kinds = ("missing", "unexpected", "other shape")
        counts = ", ".join(f"{sum(row[0] == kind for row in rows)} {kind}" for kind in kinds)
        shown = "\n".join(f"  {kind:<11}  {name}  {shape}" for kind, name, shape in rows[:_ROWS])
        more = f"\n  … and {len(rows) - _ROWS} more" if len(rows) > _ROWS else ""
        raise ValueError(
            f"{source} does not fit {type(module).__name__} ({len(own)} tensors: {counts}); is it the published file?\n"
            f"{shown}{more}"
        )
    module.load_state_dict(dict(state), strict=True)
