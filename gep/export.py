"""Model folder: config.json, model.safetensors and README.md, written whole or not at all, read strictly."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gep import __version__, folder_swap
from gep.card import model_card as model_card

FORMAT, FORMAT_VERSION = "gep", 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_OURS = {CONFIG, WEIGHTS, CARD, ".gitattributes"}
_RESERVED = ("format", "format_version", "kind", "gep_version")
_MOST_BYTES = 16 * 2**20  # of config.json; 100 000 names of classes are a tenth of it
_FLOATS, _WHOLES = ("F64", "F32", "F16", "BF16"), ("I64", "I32", "I16", "I8", "U8", "BOOL")


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
        temporary = folder_swap.beside(folder)
        _write(temporary / CONFIG, text)
        _write(temporary / CARD, card)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        _sync(temporary / WEIGHTS)
        folder_swap.swap(temporary, folder)
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
    return read_config(folder, kind), read_weights(folder)


def read_config(folder: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The first half of `load_folder`: the config, none of whose values has been looked at."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no export at {folder}: give a folder written by gep (with {CONFIG}, {WEIGHTS})")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: it is not a gep export, or an incomplete copy of one")
    if (size := (folder / CONFIG).stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{folder / CONFIG} has {size} bytes, no config has over {_MOST_BYTES}: export again")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} is not valid JSON ({error}): export the model again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f'{folder / CONFIG} is not of a gep export (no "format": "{FORMAT}")')
    if (version := config.get("format_version")) != FORMAT_VERSION:
        writer = config.get("gep_version", "unknown")
        raise ValueError(
            f"{folder} is of format version {version}, this gep {__version__} reads version {FORMAT_VERSION}: "
            f"install the gep that wrote it ({writer}), or export the model again with this one"
        )
    if config.get("kind") != kind:
        raise ValueError(f"{folder} holds a model of kind {config.get('kind')!r}, {kind!r} was asked for")
    return {key: value for key, value in config.items() if key not in _RESERVED}


def kind_of(folder: str | os.PathLike[str]) -> str:
    """What a folder says that it holds; ValueError where it is none of gep's."""
    path = Path(folder) / CONFIG
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not of a gep export ({error}): give a folder written by gep") from error


def read_weights(folder: str | os.PathLike[str], own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The second half of `load_folder`: the tensors.

    Args:
        folder: as in load_folder.
        own: what the model has, on any device, also meta; the file's header has to fit it before a tensor is read.
    Raises:
        ValueError: the file is damaged, or does not fit.
    """
    path = Path(folder).expanduser() / WEIGHTS
    try:
        if own is not None:
            check_header(path, own)
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy or export it again") from error


def check_header(path: Path, own: Mapping[str, Tensor]) -> None:
    """ValueError where the header of a safetensors file does not state exactly the tensors of `own`."""
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    _refuse_misfit(own, {name: shape for name, (shape, _) in found.items()}, str(path), "the model of its config")
    for name, (_, kind) in found.items():
        if kind not in (_FLOATS if own[name].is_floating_point() else _WHOLES):
            raise ValueError(f"{path}: {name} is of type {kind}, the model has {own[name].dtype}: export again")


def load_strict(module: nn.Module, state: Mapping[str, Tensor], *, source: str = "state") -> None:
    """Load every tensor or raise; nothing is dropped, guessed or cast silently.

    Args:
        module: gets the tensors, converted to its own device and dtype.
        state: tensors by name.
        source: the file, for the message.
    Raises:
        ValueError: naming what is missing, unexpected or of another shape; the module is then unchanged.
    """
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _refuse_misfit(module.state_dict(), found, source, type(module).__name__)
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
        name: a folder, "user/model" or "user/model@revision" (a branch, tag or commit).
        revision: the same said apart; it and the rest as huggingface_hub.snapshot_download.
    Returns:
        The folder; of a download, the cached one of that commit, its files compared with the hashes that the Hub
        states for them.
    Raises:
        FileNotFoundError: it can only be a path and is no folder, or cannot be downloaded.
        ValueError: two revisions, or a downloaded file has not the content that the Hub states.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            warnings.warn(f"revision = {revision!r} has no effect on the folder {folder}", stacklevel=3)
        return folder
    asked, (name, at, pinned) = str(name), str(name).partition("@")
    if at and (not pinned or revision not in (None, pinned)):
        fault = f"revision={revision!r} is another one" if pinned else "no branch, tag or commit after the @"
        raise ValueError(f"{asked}: {fault}; give one")
    revision, parts = pinned or revision, Path(name).parts
    # What can only be a path, or starts in a folder that exists, was not meant for the Hub.
    if len(parts) != 2 or name.startswith((".", "/", "~")) or Path(parts[0]).is_dir():
        raise FileNotFoundError(
            f"no export at {asked}: give a folder written by save_pretrained, or user/model, or user/model@revision"
        )
    try:
        downloaded = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, WEIGHTS, CARD],
        )
    except Exception as error:  # httpx, huggingface_hub and OS errors share no base class
        raise FileNotFoundError(
            f"{name} is no folder here, and could not be fetched from the Hugging Face Hub ({reason(error, token)}): "
            "check the name, or give the folder of an export"
        ) from None  # its own message may repeat the token
    for file in (CONFIG, WEIGHTS):
        _check_hash(Path(downloaded) / file, name)
    return Path(downloaded)


def reason(error: BaseException, token: str | bool | None = None) -> str:
    """Why the Hub did not answer, in one line of at most 300 characters without tokens, passwords and signed queries.

    Args:
        error: any; where the Hub answered, its own words are taken, else those of the first cause.
        token: as huggingface_hub takes it.
    """
    while getattr(error, "response", None) is None and error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(f"{type(error).__name__}: {error}".split())
    if token := token if isinstance(token, str) else get_token():
        words = words.replace(token, "***")
    words = re.sub(r"\bhf_\w{4,}|(?i:\bbearer\s+\S+)", "***", words)
    return re.sub(r"(\w+://)[^/@\s]*@", r"\1***@", re.sub(r"(\w+://[^\s?]*)\?\S+", r"\1", words))[:300]


def _check_hash(path: Path, name: str) -> None:
    """ValueError where a file of the Hub's cache is not what it is named after: its sha256, or git's or plain sha1."""
    # One step, not resolve(): further on, blobs may have names of another hash.
    stated = Path(os.readlink(path)).name if path.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", stated):
        size = path.stat().st_size
        hashes = [hashlib.sha256()] if len(stated) == 64 else [hashlib.sha1(b"blob %d\0" % size), hashlib.sha1()]
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                for digest in hashes:
                    digest.update(chunk)
        if stated not in [digest.hexdigest() for digest in hashes]:
            raise ValueError(
                f"{path.name} of {name} is damaged: {path} has not the content that the Hub states; "
                "get it again with force_download=True"
            )


def _refuse_misfit(own: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]], source: str, what: str) -> None:
    faults = {
        "missing": [name for name in own if name not in found],
        "unexpected": [name for name in found if name not in own],
        "of another shape": [
            f"{name} {found[name]} where the model has {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in found and found[name] != tuple(tensor.shape)
        ],
    }
    if any(faults.values()):
        parts = [f"{fault}: {_first(names)}" for fault, names in faults.items() if names]
        raise ValueError(f"{source} does not fit {what}: {'; '.join(parts)}")


def _first(names: list[str], most: int = 20) -> str:
    return ", ".join(name[:200] for name in names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "")


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


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
