"""Bytes that a stage needs: on a device while it trains, and on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gep.plan import memory
from gep.plan.cost import MODALITIES, trained_parameters
from gep.plan.towers import Tower
from gep.plan.workload import Stage1Config, Stage2Config, Workload, micro_batch

EVENT_BYTES = 13
"""An event in memory and in gep's own files: int64 time, two int16 coordinates, a polarity."""


def device_bytes(work: Workload, *, gpus: int, sharded: bool = False, events: float = 0.0) -> dict[str, float]:
    """Bytes a device holds at the peak of a step, by kind.

    Args:
        work: the stage.
        gpus: devices that share a batch.
        sharded: FSDP in place of DDP.
        events: events a window.
    """
    train = work.cfg.train
    mixed = train.precision != "no"
    trained = trained_parameters(work)
    frozen = (work.teacher.parameters if work.teacher else 0) + (work.encoder.parameters if work.backbone else 0)
    frozen = 0 if work.cached else frozen
    blocks = (work.backbone or work.encoder).blocks
    state = memory.state_bytes(
        trained,
        frozen,
        mixed=mixed,
        ema=bool(train.ema),
        shards=gpus if sharded else 1,
        largest_block=max((block.weights for block in blocks), default=0),
    )
    sample = _first if work.stage == 1 else _second
    held = sample(work, micro_batch(work, gpus), mixed, events)
    return {**{kind: size for kind, size in state.items() if size}, **held}


def disk_bytes(work: Workload) -> dict[str, float]:
    """Bytes on disk: a checkpoint, all that are kept at a time, the export; and of tokens, a million samples of them.

    The image model's of each image (stage 1's teacher.cache), or all frames' of a sequence (stage 2's packed tokens).
    """
    train, trained = work.cfg.train, trained_parameters(work)
    one = memory.FP32 * (3 + bool(train.ema)) * trained
    saves = 1 + (math.ceil(train.steps / train.save_every) - 1 if train.save_every else 0)
    kept = min(saves, train.keep_checkpoints + 1 if train.keep_checkpoints else saves)
    export = memory.FP32 * (trained + (work.encoder.parameters if work.backbone else 0))
    found = {"checkpoint": one, "checkpoints": kept * one, "export": export}
    if work.stage == 1:
        return {**found, "teacher tokens, 1 M images": 1e6 * token_bytes(work)}
    return {**found, "packed tokens, 1 M sequences": 1e6 * token_bytes(work)}


def token_bytes(work: Workload) -> float:
    """Bytes of a sample's frozen tokens on disk: bf16, or what teacher.cache_dtype says."""
    frame = work.tokens * work.encoder.width
    if not isinstance(work.cfg, Stage1Config):
        return 2 * frame * (work.windows + work.images)
    pooled = work.teacher.pooled if work.teacher else 0
    return (4 if work.cfg.teacher.cache_dtype == "fp32" else 2) * (frame + pooled)


def sample_bytes(work: Workload, events: float) -> dict[str, float]:
    """Bytes of a sample as it comes from the loader: events and decoded images, or the tokens in their place."""
    height, width = work.image_size
    if work.cached:
        read = {"tokens": token_bytes(work)}
        return {"events": EVENT_BYTES * events * work.windows, **read} if work.stage == 1 else read
    return {"events": EVENT_BYTES * events * work.windows, "images": 3.0 * height * width * work.images}


def events_a_window(work: Workload, assumed: float) -> tuple[float, bool]:
    """(events a window, whether that is assumed): a config that cuts by count says it, one that cuts by time not."""
    sources = work.cfg.data.sources()
    weights = {name: work.cfg.data.mix[name].weight if work.cfg.data.mix else 1.0 for name in sources}
    # num_events are cut out of a recording first, then shared by its windows.
    own = {name: source.num_events / source.windows or assumed for name, source in sources.items()}
    known = all(source.num_events for source in sources.values())
    return sum(weights[name] * own[name] for name in sources) / sum(weights.values()), not known


def total(held: Mapping[str, float]) -> float:
    """Sum over the kinds."""
    return sum(held.values())


def _first(work: Workload, batch: int, mixed: bool, events: float) -> dict[str, float]:
    cfg, encoder, teacher = work.cfg, work.encoder, work.teacher
    assert isinstance(cfg, Stage1Config) and teacher is not None
    windows = batch * work.windows
    kept = memory.tower_bytes(encoder, mixed=mixed, checkpointing=cfg.train.checkpointing)
    if cfg.loss.regression:
        kept += memory.loss_bytes(cfg.loss.regression_kind, work.tokens, encoder.width)
    if cfg.loss.similarity:
        kept += memory.similarity_bytes(work.tokens, encoder.width)
    target = memory.FP32 * work.tokens * encoder.width
    targets = batch * target * (1 + (work.windows > 1) * work.windows + cfg.loss.normalise_target * work.windows)
    at_work = max(
        windows * memory.working_bytes(encoder, mixed=mixed, trained=True),
        0 if work.cached else batch * memory.working_bytes(teacher, mixed=mixed, trained=False),
    )
    return {
        "activations": windows * kept + targets,
        "at work": at_work,
        "input": _inputs(work, batch, events) + (windows * memory.FP32 * encoder.in_elements if mixed else 0),
    }


def _second(work: Workload, batch: int, mixed: bool, events: float) -> dict[str, float]:
    cfg, encoder, backbone = work.cfg, work.encoder, work.backbone
    assert isinstance(cfg, Stage2Config) and backbone is not None
    heads = bool(cfg.loss.next or cfg.loss.contrastive) + bool(cfg.loss.image)
    kept = memory.backbone_bytes(
        backbone, encoder.width, MODALITIES, mixed=mixed, heads=heads, checkpointing=cfg.train.checkpointing
    )
    masked = work.attention == "mask" and work.max_frames > 1
    masks = memory.mask_bytes(backbone, mixed=mixed) * (batch if work.padded else 1) if masked else 0
    frame = memory.FP32 * work.tokens * encoder.width
    # Event and image tokens, the sequence laid out of them, each frame's image, and the shifted targets.
    tokens = batch * frame * (work.windows + math.ceil(work.images) + 3 * work.max_frames)
    before = 0.0
    if not work.cached:
        before = max(
            batch * work.windows * memory.working_bytes(encoder, mixed=mixed, trained=False),
            _image_work(work.teacher, batch * math.ceil(work.images), mixed),
        )
    after = batch * (kept + memory.working_bytes(backbone, mixed=mixed, trained=True)) + masks
    return {
        "activations": batch * kept + masks + tokens,
        "at work": max(before, after) - batch * kept - masks,
        "input": _inputs(work, batch, events)
        + (0 if work.cached else batch * work.windows * memory.FP32 * encoder.in_elements),
    }


def _image_work(teacher: Tower | None, images: int, mixed: bool) -> float:
    if teacher is None:
        return 0.0
    return images * (memory.working_bytes(teacher, mixed=mixed, trained=False) + memory.FP32 * teacher.in_elements)


def _inputs(work: Workload, batch: int, events: float) -> float:
    return batch * sum(sample_bytes(work, events).values())
