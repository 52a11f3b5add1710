"""A plan: what a run needs and how long it takes on so many devices, and what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gep.plan import need, towers
from gep.plan.cost import Part, parts
from gep.plan.devices import Device
from gep.plan.pace import Pace, pace_of
from gep.plan.workload import Stage1Config, Workload, micro_batch

EVENTS = 30_000
"""Events a window where the config cuts by time and no number is given."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Where a run is to take place."""

    device: Device
    """Each of the devices."""
    gpus: int = 1
    """How many."""
    sharded: bool = False
    """FSDP in place of DDP."""
    mfu: float = 0.0
    """Share of the peak in place of the three rates; 0 = by the rates."""
    scale: float = 1.0
    """Measured ÷ predicted time, from a calibration."""
    events: float = EVENTS
    """Events a window where the config does not say."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A change of the run, and what it leads to."""

    change: str
    """As it is typed."""
    bytes: float
    """Needed on a device."""
    fits: bool
    """Whether that fits."""
    step_s: float
    """Time of a step."""
    samples_per_s: float
    """Over all devices."""
    note: str = ""
    """What else changes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `gep plan` says; bytes, seconds."""

    stage: int
    """1 or 2."""
    device: Device
    """Each of the devices."""
    gpus: int
    """How many."""
    sharding: str
    """ddp or fsdp."""
    train: dict[str, Any]
    """Steps, batch, micro-batch, precision, compile."""
    shapes: dict[str, Any]
    """Tokens, windows, images, frames of a sample."""
    parts: list[Part]
    """Parameters and operations a sample."""
    memory: dict[str, float]
    """Bytes on a device by kind."""
    usable_bytes: float
    """Bytes a device has for it."""
    fits: bool
    """Whether the first is below the second."""
    largest_micro_batch: int
    """Samples a device could work on at a time; 0 = not one."""
    pace: Pace
    """Time of a step."""
    samples: int
    """Samples that the run sees."""
    data: dict[str, float]
    """Rates that loading has to keep up with, over all devices."""
    disk: dict[str, float]
    """Bytes on disk by kind."""
    options: list[Option]
    """Changes that would make it fit, or faster."""
    notes: list[str]
    """Assumptions of this plan."""


def plan(work: Workload, setup: Setup) -> Plan:
    """The plan of a workload.

    Raises:
        ValueError: the batch does not divide over devices and micro-batches.
    """
    train, device = work.cfg.train, setup.device
    events, assumed = need.events_a_window(work, setup.events)
    held, pace = _held(work, setup), _pace(work, setup)
    usable = device.usable_bytes
    per_sample = need.sample_bytes(work, events)
    rate = pace.samples_per_s
    return Plan(
        stage=work.stage,
        device=device,
        gpus=setup.gpus,
        sharding="fsdp" if setup.sharded else "ddp",
        train={
            "steps": train.steps,
            "batch_size": train.batch_size,
            "micro_batch": micro_batch(work, setup.gpus),
            "accumulate": train.accumulate,
            "precision": train.precision,
            "compile": train.compile,
            "checkpointing": train.checkpointing,
        },
        shapes=_shapes(work),
        parts=parts(work, gpus=setup.gpus),
        memory=held,
        usable_bytes=usable,
        fits=need.total(held) <= usable,
        largest_micro_batch=_largest_micro_batch(work, setup),
        pace=pace,
        samples=train.steps * train.batch_size,
        data={
            "bytes_per_sample": sum(per_sample.values()),
            "bytes_per_s": rate * sum(per_sample.values()),
            "events_per_s": rate * events * work.windows,
            "images_per_s": rate * work.images,
        },
        disk=need.disk_bytes(work),
        options=list(_options(work, setup)),
        notes=_notes(work, setup, assumed),
    )


def _shapes(work: Workload) -> dict[str, Any]:
    found: dict[str, Any] = {"windows": work.windows, "images": work.images, "tokens_a_window": work.tokens}
    if work.backbone is not None:
        found |= {"frames": work.frames, "max_frames": work.max_frames, "tokens_a_sequence": work.backbone.length}
    return found


def _held(work: Workload, setup: Setup) -> dict[str, float]:
    events, _ = need.events_a_window(work, setup.events)
    return need.device_bytes(work, gpus=setup.gpus, sharded=setup.sharded, events=events)


def _pace(work: Workload, setup: Setup) -> Pace:
    return pace_of(
        work,
        setup.device,
        gpus=setup.gpus,
        sharded=setup.sharded,
        mfu=setup.mfu,
        scale=setup.scale,
    )


def _largest_micro_batch(work: Workload, setup: Setup) -> int:
    """Largest number of samples a device can hold at a time, by bisection."""

    def fits(batch: int) -> bool:
        return need.total(_held(work.with_train(batch_size=batch * setup.gpus, accumulate=1), setup)) <= usable

    usable, low, high = setup.device.usable_bytes, 0, 1
    while fits(high) and high < 2**16:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _options(work: Workload, setup: Setup) -> Iterator[Option]:
    train, fits = work.cfg.train, need.total(_held(work, setup)) <= setup.device.usable_bytes
    micro = micro_batch(work, setup.gpus)
    if train.precision == "no":
        yield _option("train.precision=bf16", work.with_train(precision="bf16"), setup)
    if not train.compile and setup.device.name != "cpu":
        yield _option("train.compile=true", work.with_train(compile=True), setup, note="speed alone is predicted")
    if not fits and not train.checkpointing:
        checked = work.with_train(checkpointing=True)
        yield _option("train.checkpointing=true", checked, setup, note="the same numbers; blocks run forward twice")
    if not fits and (refusal := _refuses_accumulation(work)):
        yield Option(change=f"train.accumulate: {refusal}", bytes=0, fits=False, step_s=0, samples_per_s=0)
    elif not fits:
        yield from _accumulated(work, setup, micro)
    if not fits and setup.gpus > 1 and not setup.sharded:
        sharded = dataclasses.replace(setup, sharded=True)
        yield _option("--config_file configs/accelerate/fsdp.yaml", work, sharded, note="here: --sharding fsdp")
    if not work.cached:
        change = "teacher.cache=FOLDER" if work.stage == 1 else "tokens=FOLDER"
        note = f"{need.token_bytes(work) / 1e6:.3g} MB a sample on disk"
        yield _option(change, dataclasses.replace(work, cached=True), setup, note=note)
    if work.stage == 1 and not fits and (work.cfg.data.pick or work.cfg.data.windows) > 1:
        fewer = dataclasses.replace(work, windows=1)
        yield _option("data.pick=1", fewer, setup, note="one window a sample: another batch for the same windows")


def _accumulated(work: Workload, setup: Setup, micro: int) -> Iterator[Option]:
    """The least accumulation that fits, or the most there is."""
    accumulate = work.cfg.train.accumulate
    chosen = None
    for factor in range(2, micro + 1):
        if micro % factor:
            continue
        chosen = _option(
            f"train.accumulate={accumulate * factor}",
            work.with_train(accumulate=accumulate * factor),
            setup,
            note="the same objective" + ("; each step runs forward twice" if _is_contrastive(work) else ""),
        )
        if chosen.fits:
            break
    if chosen is not None:
        yield chosen


def _refuses_accumulation(work: Workload) -> str:
    """Why the config would refuse it; empty where it would not."""
    try:
        work.with_train(accumulate=2 * work.cfg.train.accumulate, batch_size=4 * work.cfg.train.batch_size)
    except ValueError as error:
        return str(error)
    return ""


def _is_contrastive(work: Workload) -> bool:
    return isinstance(work.cfg, Stage1Config) and work.cfg.loss.contrastive > 0


def _option(change: str, work: Workload, setup: Setup, *, note: str = "") -> Option:
    held, pace = need.total(_held(work, setup)), _pace(work, setup)
    fits = held <= setup.device.usable_bytes
    return Option(change=change, bytes=held, fits=fits, step_s=pace.step_s, samples_per_s=pace.samples_per_s, note=note)


def _notes(work: Workload, setup: Setup, assumed_events: bool) -> list[str]:
    notes = []
    if setup.mfu:
        notes.append(f"MFU {setup.mfu} as given; frozen passes and passes done twice run at it too")
    elif setup.scale == 1:
        notes.append("not calibrated: shares of the peak and of the bandwidth are assumed (docs/PLAN.md)")
    else:
        notes.append(f"calibrated: predicted times x {setup.scale:.3g}, as measured on this machine")
    if assumed_events:
        notes.append(f"{setup.events:,.0f} events a window are assumed (--events): the config cuts by time")
    if work.assumed_active:
        notes.append(
            f"encoder.keep=active: {towers.ACTIVE_SHARE:.0%} of the patches are assumed to hold events; "
            "encoder.keep=1 gives the bound"
        )
    if work.cached:
        notes.append("the frozen models' tokens come from disk; making them once is not counted")
    if work.teacher_spec == "export:":
        notes.append("teacher.name is empty: an image model of the encoder's own architecture is assumed")
    return notes
