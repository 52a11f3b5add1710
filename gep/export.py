"""Model folder: config.json, model.safetensors and README.md, written whole or not at all, read strictly."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gep import __version__

FORMAT, FORMAT_VERSION = "gep", 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_OURS = {CONFIG, WEIGHTS, CARD, ".gitattributes"}
_RESERVED = ("format", "format_version", "kind", "gep_version")


def save_folder(
    folder: str | os.PathLike[str],
    *,
    kind: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    card: str,
) -> Path:
    """Write a model folder beside its place and move it in; an earlier export stays whole until then.

    Args:
        folder: place of the export; its parents are made. An export that is there is replaced.
        kind: what the folder holds, asked for again when loading ("gep" or "vfm").
        config: JSON values, everything needed to rebuild the module.
        state: tensors by name, of any device and dtype.
        card: text of README.md.
    Returns:
        The folder.
    Raises:
        FileExistsError: the folder holds files that are not an export's.
        OSError: it cannot be written (full disk, permission); what was there is unchanged.
        ValueError: config is not JSON or uses a reserved key.
    """
    folder = Path(folder).expanduser().resolve()
    if clash := [key for key in _RESERVED if key in config]:
        raise ValueError(f"{folder}: config keys {clash} are written by save_folder itself: rename them")
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "kind": kind, "gep_version": __version__}
    try:
        text = json.dumps({**head, **config}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: config is not plain JSON: {error}") from error
    _refuse_foreign(folder)
    # Copies: safetensors refuses tensors that share memory or are not contiguous.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
        temporary.chmod(0o755)  # mkdtemp's 0700 would follow the export to where others read it
        _write(temporary / CONFIG, text)
        _write(temporary / CARD, card)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        _sync(temporary / WEIGHTS)
        _swap(temporary, folder)
    except (OSError, SafetensorError) as error:
        kept = " The export that was there is unchanged." if folder.exists() else ""
        raise OSError(
            f"could not write the export {folder}: {error}.{kept} Free some space or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_folder(folder: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a model folder.

    Args:
        folder: written by save_folder.
        kind: what it has to hold.
    Returns:
        config without the four keys that save_folder adds, and the tensors on the CPU, bit for bit as saved.
    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: it is damaged, of another format version or of another kind.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no export at {folder}: give a folder written by gep (with {CONFIG}, {WEIGHTS})")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: it is not a gep export, or an incomplete copy of one")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not valid JSON ({error}): export the model again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f'{folder / CONFIG} is not of a gep export (no "format": "{FORMAT}")')
    if (version := config.get("format_version")) != FORMAT_VERSION:
        writer = config.get("gep_version", "unknown")
        raise ValueError(
            f"{folder} is of format version {version}, this gep {__version__} reads version "
            f"{FORMAT_VERSION}: "
            f"install the gep that wrote it ({writer}), or export the model again with this one"
        )
    if config.get("kind") != kind:
        raise ValueError(f"{folder} holds a model of kind {config.get('kind')!r}, {kind!r} was asked for")
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}): copy or export it again") from error
    return {key: value for key, value in config.items() if key not in _RESERVED}, state


def load_strict(module: nn.Module, state: Mapping[str, Tensor], *, source: str = "state") -> None:
    """Load every tensor or raise; nothing is dropped, guessed or cast silently.

    Args:
        module: gets the tensors, converted to its own device and dtype.
        state: tensors by name.
        source: the file, for the message.
    Raises:
        ValueError: naming what is missing, unexpected or of another shape; the module is then unchanged.
    """
    own = module.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)} where the model has {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": shapes,
    }
    if any(faults.values()):
        parts = [f"{what}: {', '.join(names)}" for what, names in faults.items() if names]
        raise ValueError(f"{source} does not fit {type(module).__name__}: {'; '.join(parts)}")
    module.load_state_dict(dict(state), strict=True)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy for JSON, which has no word for NaN: None there, so that a failed metric costs no export."""
    copy: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = plain(value)
        elif isinstance(value, float) and not math.isfinite(value):
            value = None
        copy[str(key)] = value
    return copy


def fetch(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder of an exported model: as it is named, or downloaded from the Hugging Face Hub.

    Args:
        name: a folder, or "user/model"; the rest as huggingface_hub.snapshot_download.
    Raises:
        FileNotFoundError: it can only be a path and is no folder, or cannot be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            warnings.warn(f"revision = {revision!r} has no effect on the folder {folder}", stacklevel=3)
        return folder
    name, parts = str(name), Path(name).parts
    # What can only be a path, or starts in a folder that exists, was not meant for the Hub.
    if len(parts) != 2 or name.startswith((".", "/", "~")) or Path(parts[0]).is_dir():
        raise FileNotFoundError(f"no export at {name}: give a folder written by save_pretrained, or user/model")
    try:
        downloaded = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, WEIGHTS, CARD],
        )
    except Exception as error:  # httpx, huggingface_hub and OS errors share no base class
        cause = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"{name} is no folder here, and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {cause}): check the name, or give the folder of an export"
        ) from error
    return Path(downloaded)


def model_card(
    *,
    title: str,
    summary: str,
    config: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    usage: str = "",
    license: str = "apache-2.0",
    tags: tuple[str, ...] = ("event-camera", "neuromorphic-vision"),
) -> str:
    """README.md of a model folder: YAML front matter for the Hub, then config, data, metrics and usage.

    Args:
        title, summary: heading and first paragraph.
        config, data, metrics: shown as tables; nested mappings become dotted keys.
        usage: Python code, shown in a block.
        license, tags: for the front matter.
    """
    front = ["---", f"license: {license}", "library_name: gep", "tags:", *(f"- {tag}" for tag in tags), "---"]
    lines = [*front, "", f"# {title}", "", summary.strip(), ""]
    if usage:
        lines += ["## Usage", "", "```python", usage.strip(), "```", ""]
    for heading, values in (("Metrics", metrics), ("Data", data), ("Configuration", config)):
        if values:
            rows = [f"| {key} | {_cell(value)} |" for key, value in _flat(values)]
            lines += [f"## {heading}", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "–" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        rows += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return rows


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:  # on disk before the rename that makes it count
        os.fsync(file.fileno())


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: choose another folder for the export")
    if foreign := sorted({path.name for path in folder.glob("*")} - _OURS):
        raise FileExistsError(
            f"{folder} holds {', '.join(foreign[:5])}, which an export would replace: choose another folder"
        )


def _swap(new: Path, folder: Path) -> None:
    """Move `new` to `folder`; whatever was there goes away only after that."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    os.rename(folder, old)  # onto the empty folder just made
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
