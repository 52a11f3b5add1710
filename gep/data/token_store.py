"""Tokens kept on disk as safetensors shards of whole samples: what a folder holds, writing a shard, mapping one.

A shard is there once it is complete, and `index.json` once all of them are. `plan.json` says from the start what the
folder is for: what the tokens were made from (`key`), and how they are cut into shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PLAN, INDEX = "plan.json", "index.json"
FORMAT = "gep-tokens-1"
DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class TokenPart:
    """The samples of one source of one split."""

    split: Literal["train", "eval"]
    source: str
    """Name of the source, as in a mix."""
    describe: str
    """One line for people."""
    num_samples: int
    num_images: int
    """J, images of each sample: 0 without, 1 of a still, as many as windows of a clip."""
    clip: bool
    """Whether each window ends at an image of its own."""


@dataclass(frozen=True)
class Shard:
    """Samples `start` … `stop` − 1 of a part, one file."""

    part: int
    start: int
    stop: int
    name: str


@dataclass(frozen=True)
class TokenPlan:
    """What a folder of tokens holds; fixed before anything is written, and the same whoever writes it."""

    key: Mapping[str, str]
    """What the tokens were made from, name -> value: model, teacher, lists of samples, data settings."""
    parts: tuple[TokenPart, ...]
    windows: int
    """T event windows of each sample."""
    grid: tuple[int, int]
    """Rows and columns of the N tokens of a frame."""
    dim: int
    """D features of a token."""
    sparse: bool
    """Whether shards also say which tokens were encoded, bool (S, T, N)."""
    dtype: Literal["bf16", "fp32"]
    shard_bytes: int
    """About the size of a shard; a sample is never cut."""

    @property
    def num_tokens(self) -> int:
        """N tokens of a frame."""
        return self.grid[0] * self.grid[1]

    def sample_bytes(self, part: int) -> int:
        """What one sample takes on disk, but for its name."""
        frames = self.windows + self.parts[part].num_images
        tokens = frames * self.num_tokens * self.dim * DTYPES[self.dtype].itemsize
        return tokens + self.sparse * self.windows * self.num_tokens + 16 * self.windows + 17

    def per_shard(self, part: int) -> int:
        """Samples of every shard of a part but its last."""
        return max(1, self.shard_bytes // self.sample_bytes(part))

    def shards(self) -> list[Shard]:
        """All of them, part by part."""
        found = []
        for number, part in enumerate(self.parts):
            step = self.per_shard(number)
            for count, start in enumerate(range(0, part.num_samples, step)):
                name = f"{part.split}-{number:02d}-{count:06d}.safetensors"
                found.append(Shard(number, start, min(start + step, part.num_samples), name))
        return found

    def bytes_of(self, shards: Sequence[Shard]) -> int:
        """What some of the shards take on disk."""
        return sum((shard.stop - shard.start) * self.sample_bytes(shard.part) for shard in shards)

    @property
    def hash(self) -> str:
        """Stands in every shard: those of another plan are not taken for this one's."""
        return hashlib.sha256(json.dumps(_flat(self.to_json()), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """JSON values, from which `from_json` makes an equal plan."""
        return {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TokenPlan:
        """A plan as it was written.

        Raises:
            ValueError: another format.
        """
        if values.get("format") != FORMAT:
            raise ValueError(f"its format is {values.get('format')!r}, this version of gep reads {FORMAT!r}")
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        parts = tuple(TokenPart(**part) for part in fields["parts"])
        return cls(**{**fields, "parts": parts, "grid": tuple(fields["grid"])})


def prepare(folder: Path, plan: TokenPlan) -> list[Shard]:
    """Makes the folder, or takes up one of the same plan; the shards that are not there yet.

    Raises:
        ValueError: the folder holds tokens of another plan, or the disk is too small for what is missing.
    """
    if (folder / PLAN).exists():
        there, now = _flat(_load(folder / PLAN)), _flat(plan.to_json())
        if lines := differences(there, now):
            raise ValueError(
                f"{folder} holds tokens of something else:\n" + "\n".join(lines) + "\nChoose another folder for pack, "
                "give the old settings to go on with this one, or remove it to write it anew"
            )
    missing = [shard for shard in plan.shards() if not is_done(folder, plan, shard)]
    needed = plan.bytes_of(missing)
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.is_dir())).free
    if needed > free:
        raise ValueError(
            f"{folder}: the tokens take {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free there; free some, "
            "choose another folder for pack, or fewer samples"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / PLAN, plan.to_json())
    return missing


def is_done(folder: Path, plan: TokenPlan, shard: Shard) -> bool:
    """Whether a shard is there.

    Raises:
        ValueError: the file is damaged, or of another plan.
    """
    path = folder / shard.name
    if not path.exists():
        return False
    found = _opened(path).metadata().get("plan")
    if found != plan.hash:
        raise ValueError(f"{path}: of the plan {found}, {folder / PLAN} is {plan.hash}; remove the shard")
    return True


def write_shard(
    folder: Path, plan: TokenPlan, shard: Shard, tensors: Mapping[str, Tensor], keys: Sequence[str]
) -> None:
    """Writes a shard, whole or not at all.

    Args:
        folder, plan, shard: where and which; S samples.
        tensors: `tokens` (S, T + J, N, D) in the plan's dtype, event windows first; `t_us` int64 (S, T, 2); `label`
            int64 (S,); `bad` uint8 (S,), 1 where the sample could not be read; `real` bool (S, T, N) if sparse.
        keys: the samples' names.
    Raises:
        OSError: it cannot be written (full disk, permission).
    """
    names = [key.encode() for key in keys]
    ends = torch.from_numpy(np.cumsum([len(name) for name in names]).astype(np.int64))
    blob = torch.frombuffer(bytearray(b"".join(names) or b"-"), dtype=torch.uint8)
    # Always the same name: what a killed run left is overwritten when its shard is written again.
    path, temporary = folder / shard.name, folder / f".{shard.name}.tmp"
    try:
        save_file({**tensors, "key": blob, "key_end": ends}, temporary, metadata={"plan": plan.hash})
        _sync(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: not written ({error}); the shards before it are: run the same command again") from error


def finish(folder: Path, plan: TokenPlan) -> bool:
    """Writes the index if all shards are there; several ranks may do so."""
    shards = plan.shards()
    if not all((folder / shard.name).exists() for shard in shards):
        return False
    sizes = {shard.name: (folder / shard.name).stat().st_size for shard in shards}
    _replace(folder / INDEX, {**plan.to_json(), "bytes": sizes})
    return True


class MappedShard:
    """The arrays of a shard, mapped: nothing is read before it is asked for, and no file stays open."""

    def __init__(self, path: Path, plan: TokenPlan):
        with _opened(path) as file:
            if file.metadata().get("plan") != plan.hash:
                raise ValueError(f"{path}: of the plan {file.metadata().get('plan')}, the index's is {plan.hash}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        # NumPy has no bfloat16; its two bytes travel as an integer.
        stored = torch.int16 if plan.dtype == "bf16" else torch.float32
        self.tokens: np.ndarray = tensors.pop("tokens").view(stored).numpy()
        self.t_us, self.label, self.bad = (tensors[name].numpy() for name in ("t_us", "label", "bad"))
        self.real = tensors["real"].numpy() if plan.sparse else None
        self._names, self._ends = tensors["key"].numpy(), tensors["key_end"].numpy()

    def key(self, row: int) -> str:
        """A sample's name."""
        begin = int(self._ends[row - 1]) if row else 0
        return self._names[begin : int(self._ends[row])].tobytes().decode()


class TokenStore:
    """A complete folder of tokens; pickles without its maps.

    Raises:
        FileNotFoundError: no index there, or a shard is missing.
        ValueError: a damaged index, or a shard that is not of the size it was written with.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder).expanduser()
        index = self.folder / INDEX
        if not index.is_file():
            begun = " (it was begun: run the same command again to finish it)" if (self.folder / PLAN).exists() else ""
            raise FileNotFoundError(
                f"{index}: no such file{begun}; give the folder that stage2_autoregress/tokens.py wrote, or tokens= "
                "(empty) for tokens on the fly"
            )
        values = _load(index)
        try:
            self.plan = TokenPlan.from_json(values)
            sizes = dict(values["bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{index}: not an index of tokens ({error}); write them again") from error
        for name, size in sizes.items():
            found = (self.folder / name).stat().st_size if (self.folder / name).exists() else -1
            if found != size:
                kind, fault = (FileNotFoundError, "missing") if found < 0 else (ValueError, f"{found:,} bytes")
                raise kind(f"{self.folder / name}: {fault}, the index says {size:,} bytes; copy it again, or pack anew")
        self._names: list[list[str]] = [[] for _ in self.plan.parts]
        for shard in self.plan.shards():
            self._names[shard.part].append(shard.name)
        self._open: dict[tuple[int, int], MappedShard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def shard(self, part: int, number: int) -> MappedShard:
        """A part's shard; mapped once."""
        found = self._open.get((part, number))
        if found is None:
            found = self._open[part, number] = MappedShard(self.folder / self._names[part][number], self.plan)
        return found

    def check(self, key: Mapping[str, str]) -> None:
        """Raises ValueError, naming both, where the tokens were made from something else than `key` says."""
        # A run may do without the data set's list, or the teacher.
        there = {name: value for name, value in self.plan.key.items() if name in key or name.startswith("data.")}
        if lines := differences(there, key):
            raise ValueError(
                f"tokens={self.folder} were made from something else:\n" + "\n".join(lines) + "\nGive this run the "
                "same settings, pack its tokens into another folder, or set tokens= (empty) for tokens on the fly"
            )


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each value that differs, naming both."""
    names = sorted({*there, *now})
    both = [(name, there.get(name, "(absent)"), now.get(name, "(absent)")) for name in names]
    return [f"  {name}: {old} there, {new} now" for name, old, new in both if old != new]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    parts = {f"{p['split']} {p['source']}.{k}": v for p in values["parts"] for k, v in p.items() if k != "describe"}
    return {**{k: v for k, v in values.items() if k not in ("key", "parts")}, **values["key"], **parts}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); remove it and write it again") from error


def _load(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); write the tokens again") from error


def _replace(path: Path, values: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
