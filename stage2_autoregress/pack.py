"""Tokens once: every window and image of a stage-2 run is encoded and written into shards, which its runs then read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from gep import config, distributed
from gep.accelerator import to_device
from gep.data.bad import BadSample
from gep.data.build import represent_of, take_over
from gep.data.images import StillImages
from gep.data.paired import Recordings
from gep.data.sampler import Batch, SampleSource
from gep.data.sequence import SequenceConfig, Sequences, collate_sequences
from gep.data.token_store import DTYPES, Shard, TokenPart, TokenPlan, finish, prepare, write_shard
from gep.engine import make_accelerator
from gep.events.types import EventFormatError
from gep.hub import GEPModel
from stage2_autoregress.inputs import named, sources_of, uses_images
from stage2_autoregress.packed import key_of, lists_of, warn_idle
from stage2_autoregress.task import Stage2Config
from stage2_autoregress.tokens import FrozenTokens

Rows = tuple[Shard, range]
"""Samples of a shard that are encoded at once, by their index in the part."""


@dataclass(frozen=True, kw_only=True)
class PackConfig(Stage2Config):
    """The settings of the stage-2 runs that are to read the tokens, and where these go."""

    pack: str
    """folder for the tokens, seen by all processes; one that an ended command left unfinished is gone on with"""
    pack_dtype: Literal["bf16", "fp32"] = "bf16"
    """numbers of the tokens: bf16 takes half the room of fp32, which rounds nothing"""
    shard_mb: int = 256
    """size of a file, and the most that an ended command loses [MB]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_mb < 1:
            raise ValueError(f"shard_mb={self.shard_mb} must be at least 1")


def main(argv: Sequence[str] | None = None) -> Path:
    """Packs the tokens of a stage-2 config; returns the folder."""
    cfg = config.load(PackConfig, argv)
    accelerator = make_accelerator(cfg.train, cfg.run)
    model = GEPModel.from_pretrained(cfg.model).to(accelerator.device)
    sequence = ("windows", "window_us", "num_events")
    data = take_over(cfg.data, model.input_settings, cfg.model, given=config.given(argv), free=sequence)
    train_set, eval_set = sources_of(cfg, data)
    paired = uses_images(cfg)
    teacher = cfg.teacher.build(encoder_preset=model.preset, device=accelerator.device) if paired else None
    frozen = FrozenTokens(model.encoder, teacher, represent_of(model.represent, data))
    warn_idle(data)

    train = named(data, train_set)
    sources: list[tuple[Literal["train", "eval"], str, Recordings | StillImages]]
    sources = [("train", name, source) for name, source in train.items()] + [("eval", next(iter(train)), eval_set)]
    parts, inputs = [], []
    for number, (split, name, source) in enumerate(sources):
        clip = data.sources()[name].clip
        images = (data.windows if clip else 1) if uses_images(cfg) else 0
        parts.append(TokenPart(split, name, source.describe(), len(source), images, clip))
        # Each source is packed by itself; the representation knows those of a mix by their number.
        origin = number if data.mix and split == "train" else None
        inputs.append(_Input(Sequences(source, SequenceConfig()), source.listing.keys, origin))
    plan = TokenPlan(
        key=key_of(data, model, cfg.teacher if paired else None) | lists_of(train, eval_set),
        parts=tuple(parts),
        windows=data.windows,
        grid=model.encoder.grid(data.height, data.width),
        dim=model.encoder.embed_dim,
        sparse=model.encoder.is_sparse,
        dtype=cfg.pack_dtype,
        shard_bytes=cfg.shard_mb * 1_000_000,
    )
    folder = Path(cfg.pack).expanduser()
    missing = _agreed(folder, plan)
    own = missing[distributed.rank() :: distributed.world_size()]
    _pack(cfg, folder, plan, own, inputs, frozen, accelerator)
    # No rank waits for another: the last one to finish finds all shards there.
    if finish(folder, plan):
        print(f"{folder}: complete; train with tokens={folder}")
    return folder


def _agreed(folder: Path, plan: TokenPlan) -> list[Shard]:
    """Announces the size; the missing shards, on every rank."""
    missing, problem = [], None
    try:
        if distributed.is_main():
            shards = plan.shards()
            samples = sum(part.num_samples for part in plan.parts)
            frames = sum(part.num_samples * (plan.windows + part.num_images) for part in plan.parts)
            print(
                f"{samples:,} samples, {frames:,} frames of {plan.num_tokens} tokens × {plan.dim} in {plan.dtype}: "
                f"{plan.bytes_of(shards) / 1e9:.3g} GB in {len(shards):,} shards of {folder}"
            )
            missing = prepare(folder, plan)
            if len(missing) < len(shards):
                print(
                    f"{len(shards) - len(missing):,} shards are there, {plan.bytes_of(missing) / 1e9:.3g} GB to write"
                )
    except (ValueError, OSError) as error:
        problem = error
    # All ranks stop together.
    missing, problem = distributed.gather_objects((missing, problem))[0]
    if problem is not None:
        raise problem
    return missing


@dataclass(frozen=True)
class _Input:
    """What a part of the plan is made from."""

    samples: SampleSource
    keys: Sequence[str]
    origin: int | None
    """The source's number in a mix."""


class _Batches(Dataset):
    """(shard, rows) -> (the rows that can be read, their batch, why the others cannot)."""

    def __init__(self, inputs: Sequence[_Input], requests: Sequence[Rows]):
        self.inputs, self.requests = inputs, requests

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, number: int) -> tuple[list[int], Batch | None, dict[int, str]]:
        shard, rows = self.requests[number]
        part, samples, bad = self.inputs[shard.part], {}, {}
        for row in rows:
            try:
                sample = part.samples.sample(row, None)
            except (BadSample, EventFormatError) as error:
                bad[row] = str(error)
            else:
                samples[row] = sample if part.origin is None else {**sample, "origin": part.origin}
        return list(samples), collate_sequences(list(samples.values())) if samples else None, bad


def _pack(
    cfg: PackConfig,
    folder: Path,
    plan: TokenPlan,
    shards: Sequence[Shard],
    inputs: Sequence[_Input],
    frozen: FrozenTokens,
    accelerator: Accelerator,
) -> None:
    """Encodes and writes this rank's shards, one after the other."""
    size = max(1, cfg.train.batch_size // (accelerator.num_processes * cfg.train.accumulate))
    requests = [
        (shard, range(start, min(start + size, shard.stop)))
        for shard in shards
        for start in range(shard.start, shard.stop, size)
    ]
    loader = DataLoader(
        _Batches(inputs, requests),
        batch_size=None,
        num_workers=cfg.train.num_workers,
        worker_init_fn=distributed.ignore_signals,
        multiprocessing_context="spawn" if cfg.train.num_workers and torch.cuda.is_available() else None,
    )
    batches, bad = iter(loader), [0] * len(plan.parts)
    total = sum(shard.stop - shard.start for shard in shards)
    with tqdm(total=total, desc="tokens", disable=not (cfg.train.progress and distributed.is_main())) as bar:
        for shard in shards:
            tensors = _empty(plan, shard)
            for _ in range(shard.start, shard.stop, size):
                rows, batch, unread = next(batches)
                for row, reason in unread.items():
                    bad[shard.part] += 1
                    _count(plan.parts[shard.part], bad[shard.part], reason, cfg.data.max_bad_fraction)
                    tensors["bad"][row - shard.start] = 1
                if batch is not None:
                    _encode(frozen, batch, [row - shard.start for row in rows], tensors, accelerator)
                bar.update(len(rows) + len(unread))
            write_shard(folder, plan, shard, tensors, inputs[shard.part].keys[shard.start : shard.stop])


def _count(part: TokenPart, bad: int, reason: str, max_bad: float) -> None:
    """Names an unreadable training sample, which runs replace as they do on the fly; too many are an error."""
    # As when training: in a small set one fault does not stop a run. Evaluation leaves none out.
    if part.split == "eval" or bad > max_bad * max(part.num_samples, 1000):
        raise ValueError(
            f"{bad} of {part.num_samples} samples of {part.split} {part.source} cannot be read, more than "
            f"{'evaluation' if part.split == 'eval' else f'data.max_bad_fraction={max_bad:g}'} allows: {reason}"
        )
    warnings.warn(f"unreadable sample {bad}: {reason}", stacklevel=2)


def _encode(
    frozen: FrozenTokens, batch: Batch, rows: list[int], tensors: dict[str, Tensor], accelerator: Accelerator
) -> None:
    with accelerator.autocast():  # as in training
        events, images, real = frozen.encode(to_device(batch, accelerator.device))
    tokens = events if images is None else torch.cat([events, images], dim=1)
    tensors["tokens"][rows] = tokens.to(tensors["tokens"].dtype).cpu()
    tensors["t_us"][rows], tensors["label"][rows] = batch["t_us"].cpu(), batch["label"].cpu()
    if real is not None:
        tensors["real"][rows] = real.cpu()


def _empty(plan: TokenPlan, shard: Shard) -> dict[str, Tensor]:
    count, frames = shard.stop - shard.start, plan.windows + plan.parts[shard.part].num_images
    tensors = {
        "tokens": torch.zeros(count, frames, plan.num_tokens, plan.dim, dtype=DTYPES[plan.dtype]),
        "t_us": torch.zeros(count, plan.windows, 2, dtype=torch.int64),
        "label": torch.full((count,), -1),
        "bad": torch.zeros(count, dtype=torch.uint8),
    }
    if plan.sparse:
        tensors["real"] = torch.zeros(count, plan.windows, plan.num_tokens, dtype=torch.bool)
    return tensors
