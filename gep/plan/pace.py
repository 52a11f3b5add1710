"""Seconds that a step takes on a device, from its operations, its memory traffic and its kernels.

A model of three rates, not a table of MFU: what share of its peak a device reaches falls out of the model's width. All
constants are assumptions until `gep plan --measure` has calibrated them; `mfu=` replaces them by one number.
"""

from __future__ import annotations

from dataclasses import dataclass

from gep.plan import memory
from gep.plan.cost import MODALITIES, caches_features, parts, trained_parameters
from gep.plan.devices import MATMUL_SHARE, TRAFFIC_SHARE, Device
from gep.plan.workload import Workload

FORWARD_PASSES, TRAIN_PASSES, COMPILED_PASSES = 2.0, 5.0, 3.0
"""How often the bytes that autograd would keep cross the memory bus: forward alone; trained; trained and fused."""
LAUNCH_S = 5e-6
"""Host time of a kernel on a GPU [s]."""
_KERNELS, _OWN_KERNELS, _COMPILED_SHARE = 20, 40, 0.4
_OPTIMISER_BYTES = 40
"""fp32 weight, gradient and moments read and written, the norm's clipping included, a parameter."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Time of an optimiser step on each device, and what it comes to."""

    products_s: float
    """Matrix products, convolutions, attention."""
    traffic_s: float
    """Everything between them, and reading the weights."""
    launch_s: float
    """Host time of the kernels, which runs beside the two above; the longer of both counts."""
    optimiser_s: float
    """Clipping and AdamW."""
    exchange_s: float
    """Gradients (FSDP: weights too) between devices, as far as the backward pass does not hide it."""
    step_s: float
    """All of it."""
    mfu: float
    """Operations that the model needs ÷ what the device could do in that time at its peak."""
    samples_per_s: float
    """Over all devices."""
    hours: float
    """Of the run's steps, without evaluation, saving and waiting for data."""


def pace_of(
    work: Workload,
    device: Device,
    *,
    gpus: int = 1,
    sharded: bool = False,
    mfu: float = 0.0,
    scale: float = 1.0,
) -> Pace:
    """Predicted time of a step.

    Args:
        work: the stage.
        device: its rates.
        gpus: devices that share a batch.
        sharded: FSDP in place of DDP.
        mfu: share of the peak, in place of the three rates; 0 = by the rates.
        scale: measured ÷ predicted time of the same steps, from a calibration.
    """
    train = work.cfg.train
    found = parts(work, gpus=gpus)
    samples = train.batch_size / gpus
    needed = samples * sum(part.flops.total for part in found)
    done = needed + samples * sum(part.again for part in found)
    peak = device.peak(train.precision)
    trained = trained_parameters(work)
    bandwidth = TRAFFIC_SHARE * 1e9 * device.bandwidth_gbs
    own = trained / (gpus if sharded else 1)
    optimiser = (_OPTIMISER_BYTES + 12 * bool(train.ema)) * own / bandwidth
    products = done / (peak * (mfu or MATMUL_SHARE))
    traffic = launch = 0.0
    if not mfu:
        frozen = sum(part.frozen for part in found)
        weights = train.accumulate * (12.0 * trained + 8.0 * frozen)
        traffic = (samples * _traffic(work) + weights) / bandwidth
        launch = 0.0 if device.name == "cpu" else LAUNCH_S * train.accumulate * _kernels(work)
    busy = max(products + traffic, launch)
    exchange = max(0.0, _exchanged(trained, gpus, sharded, train) / (1e9 * device.link_gbs) - busy / 2)
    step = scale * (busy + optimiser + exchange)
    return Pace(
        products_s=scale * products,
        traffic_s=scale * traffic,
        launch_s=scale * launch,
        optimiser_s=scale * optimiser,
        exchange_s=scale * exchange,
        step_s=step,
        mfu=needed / (peak * step),
        samples_per_s=train.batch_size / step,
        hours=train.steps * step / 3600,
    )


def _traffic(work: Workload) -> float:
    """Bytes a sample moves between the products."""
    train = work.cfg.train
    mixed = train.precision != "no"
    trained = (COMPILED_PASSES if train.compile else TRAIN_PASSES) + (FORWARD_PASSES if train.checkpointing else 0.0)
    images = 0.0
    if work.teacher is not None and not work.cached:
        images = FORWARD_PASSES * work.images * memory.tower_bytes(work.teacher, mixed=mixed)
    encoder = work.windows * memory.tower_bytes(work.encoder, mixed=mixed)
    if work.backbone is None:
        twice = FORWARD_PASSES if caches_features(work) else 0.0
        return (trained + twice) * encoder + (2 if twice else 1) * images
    sequence = memory.backbone_bytes(work.backbone, work.encoder.width, MODALITIES, mixed=mixed, heads=2)
    frozen = 0.0 if work.cached else FORWARD_PASSES * encoder
    return frozen + images + trained * sequence * work.frames / work.max_frames


def _kernels(work: Workload) -> float:
    """Kernels of a micro-batch; a backward pass has twice those of the forward."""
    train = work.cfg.train
    share = _COMPILED_SHARE if train.compile else 1.0
    teacher = 0 if work.teacher is None or work.cached else _KERNELS * len(work.teacher.blocks)
    encoder = _KERNELS * len(work.encoder.blocks)
    if work.backbone is None:
        passes = 3 + train.checkpointing + (twice := caches_features(work))
        return share * passes * encoder + (1 + twice) * teacher
    frozen = 0 if work.cached else encoder + teacher
    return frozen + share * (3 + train.checkpointing) * _OWN_KERNELS * len(work.backbone.blocks)


def _exchanged(trained: int, gpus: int, sharded: bool, train: object) -> float:
    """Bytes each device sends a step: a ring's gradients, or FSDP's weights twice a micro-batch and gradients once."""
    ring = (gpus - 1) / gpus
    if not sharded:
        return 2 * ring * memory.FP32 * trained
    size = memory.FP32 if getattr(train, "precision", "no") == "no" else 2
    return ring * trained * getattr(train, "accumulate", 1) * (2 * size + memory.FP32)
