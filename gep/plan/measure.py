"""A few real steps of a stage on this machine: random weights, made-up events and images of the config's shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gep.accelerator import set_checkpointing
from gep.data.sequence import LAYOUTS, lay_out
from gep.events.represent import Histogram
from gep.events.types import EventBatch, Events
from gep.models.encoder import EventEncoder
from gep.models.teacher import FrozenVFM, ImageModel
from gep.optim import make_optimizer, param_groups
from gep.plan import need
from gep.plan.cost import parts
from gep.plan.devices import Device
from gep.plan.pace import pace_of
from gep.plan.workload import Stage1Config, Stage2Config, Workload, attention_of, micro_batch
from stage1_align.task import Stage1Task
from stage2_autoregress.task import Stage2Task
from stage2_autoregress.tokens import FrozenTokens

TARGET_S = 1.5
"""A measured step is of as many samples as are predicted to take so long on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurement and prediction of the same steps, on one device."""

    batch: int
    """Samples a step."""
    flops: float
    """Operations of products a step, by torch's counter, which also counts the scores that a causal kernel skips."""
    flops_predicted: float
    """The same, predicted."""
    bytes: float
    """Largest sum of all tensors at a time (CUDA: of the allocator's blocks)."""
    bytes_predicted: float
    """The same, predicted."""
    seconds: float
    """Median time of a step."""
    seconds_predicted: float
    """The same, predicted."""

    @property
    def scale(self) -> float:
        """What predicted times are to be multiplied by on this device."""
        return self.seconds / self.seconds_predicted

    def rows(self) -> list[list[str]]:
        """Rows of a table: quantity, predicted, measured, predicted ÷ measured."""
        return [
            [name, f"{scale * predicted:.3f}", f"{scale * found:.3f}", f"{predicted / found:.3f}"]
            for name, scale, predicted, found in (
                ("GFLOP a step", 1e-9, self.flops_predicted, self.flops),
                ("peak GiB", 2**-30, self.bytes_predicted, self.bytes),
                ("ms a step", 1e3, self.seconds_predicted, self.seconds),
            )
        ]


def measure(work: Workload, device: Device, *, batch: int = 0, steps: int = 3, events: float = 5_000.0) -> Measured:
    """Run some steps of a stage here, and say what was predicted for them.

    Args:
        work: the stage.
        device: this machine's device.
        batch: samples a step; 0 = the config's micro-batch, less where memory or (on a CPU) time forbids.
        steps: timed steps, after one that is not.
        events: events a window where the config does not say.
    """
    work = _one_device(work, batch or _affordable(work, device))
    place = "cuda" if torch.cuda.is_available() else "cpu"
    size, (per_window, _) = work.cfg.train.batch_size, need.events_a_window(work, events)
    run = _Run(work, _synthetic(work, size, int(per_window)), place)
    run.step()
    seconds = statistics.median(run.timed() for _ in range(steps))
    flops, held = run.flops(), run.peak_bytes()
    counted = dataclasses.replace(work, attention="mask") if work.attention == "causal" else work
    return Measured(
        batch=size,
        flops=flops,
        flops_predicted=size * sum(part.flops.total + part.again for part in parts(counted)),
        bytes=held,
        bytes_predicted=need.total(need.device_bytes(work, gpus=1, events=per_window)),
        seconds=seconds,
        seconds_predicted=pace_of(work, device).step_s,
    )


def _one_device(work: Workload, batch: int) -> Workload:
    """The same work without accumulation, and with sequences of one kind, the longest."""
    work = work.with_train(batch_size=batch, accumulate=1, compile=False, ema=0.0)
    work = dataclasses.replace(work, cached=False)
    if not isinstance(work.cfg, Stage2Config):
        return work
    attention = attention_of(work.cfg, work.tokens, work.max_frames)
    images = 0 if work.teacher is None else work.windows if work.images > 1.5 else 1
    return dataclasses.replace(work, images=images, frames=work.max_frames, padded=False, attention=attention)


def _affordable(work: Workload, device: Device) -> int:
    batch = micro_batch(work, 1)

    def fits(size: int) -> bool:
        one = _one_device(work, size)
        held = need.total(need.device_bytes(one, gpus=1))
        seconds = pace_of(one, device).step_s if device.name == "cpu" else 0.0
        return held < 0.5 * device.usable_bytes and seconds < TARGET_S

    while batch > 1 and not fits(batch):
        batch //= 2
    return batch


class _Run:
    """A task, its optimiser and one batch on a device."""

    def __init__(self, work: Workload, batch: dict[str, Any], place: str) -> None:
        torch.manual_seed(0)
        self.place, self.precision = place, work.cfg.train.precision
        self.task, self.teacher = _task(work, place)
        self.task.train()
        set_checkpointing(self.task, work.cfg.train.checkpointing)
        self.batch = {name: value.to(place) if hasattr(value, "to") else value for name, value in batch.items()}
        optim = work.cfg.optim
        self.clip = optim.clip_norm
        groups = param_groups(self.task, lr=1e-6, weight_decay=optim.weight_decay)
        self.optimizer = make_optimizer(groups, optim)

    def step(self) -> None:
        """Forward, backward, clip, update."""
        dtype = torch.float16 if self.precision == "fp16" and self.place == "cuda" else torch.bfloat16
        with torch.autocast(self.place, dtype, enabled=self.precision != "no"):
            context = {"context": self.task.context([self.batch])} if hasattr(self.task, "context") else {}
            loss = self.task(self.batch, **context)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.task.parameters(), self.clip or 1e9)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self) -> float:
        """Seconds of a step."""
        self._wait()
        begin = time.perf_counter()
        self.step()
        self._wait()
        return time.perf_counter() - begin

    def flops(self) -> float:
        """Operations of a step; plain attention, whose backward pass does not compute the scores again."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.step()
        return float(counter.get_total_flops())

    def peak_bytes(self) -> float:
        """Bytes of a step at its peak."""
        if self.place == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return float(torch.cuda.max_memory_allocated())
        with PeakBytes(self._held()) as peak:
            self.step()
        return peak.largest

    def _held(self) -> Iterator[Tensor]:
        yield from self.task.parameters()
        tokens = self.task.tokens if isinstance(self.task, Stage2Task) else None
        frozen = tokens.encoder.parameters() if isinstance(tokens, FrozenTokens) else ()
        yield from (*frozen, *self.teacher._model.parameters())
        yield from tree_leaves([state for state in self.optimizer.state.values()])
        for value in self.batch.values():
            yield from vars(value).values() if isinstance(value, EventBatch) else [value]

    def _wait(self) -> None:
        if self.place == "cuda":
            torch.cuda.synchronize()


class PeakBytes(TorchDispatchMode):
    """The largest sum of all tensors' bytes at a time while it is on; what kernels use inside is not seen.

    Args:
        held: values that are there already; what is no tensor is passed over.
    """

    def __init__(self, held: Iterable[Any] = ()) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.largest = 0.0
        self._note(held)

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self._note(tree_leaves(result))
        return result

    def _note(self, values: Iterable[Any]) -> None:
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                weakref.finalize(storage, self._forget, key)
        self.largest = max(self.largest, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def _task(work: Workload, place: str) -> tuple[Stage1Task | Stage2Task, FrozenVFM]:
    cfg = work.cfg
    teacher = _teacher(work, place)
    encoder = EventEncoder(**work.encoder_keywords)
    if isinstance(cfg, Stage1Config):
        task: Stage1Task | Stage2Task = Stage1Task(encoder, teacher, cfg.represent.build(), cfg.loss)
    else:
        tokens = FrozenTokens(encoder.to(place), teacher, _Channels(encoder.in_chans))
        task = Stage2Task(cfg.backbone.build(encoder.embed_dim), tokens, cfg.loss)
    return task.to(place), teacher


def _teacher(work: Workload, place: str) -> FrozenVFM:
    side, kind, name = work.cfg.teacher.image_size, *work.teacher_spec.split(":", 1)
    config = dataclasses.replace(work.cfg.teacher, name=work.teacher_spec, file=None, random=True)
    with contextlib.ExitStack() as stack:
        if kind == "export" and not Path(name or "none").is_dir():
            arch = {"arch": work.encoder_keywords["arch"], "in_chans": 3}
            model = ImageModel({**arch, "img_size": (side, side) if side else work.image_size})
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            config = dataclasses.replace(config, name=f"export:{model.save(Path(folder) / 'export')}")
        return config.build(device=place)


@dataclass(frozen=True)
class _Channels:
    """Stage 2's stand-in for the representation, which an export would name: counts, repeated over the channels."""

    channels: int

    def __call__(self, batch: EventBatch, out: Tensor | None = None) -> Tensor:
        return Histogram()(batch).mean(dim=1, keepdim=True).expand(-1, self.channels, -1, -1).contiguous()


def _synthetic(work: Workload, size: int, events: int) -> dict[str, Any]:
    """A batch as the stage's collate gives it."""
    rng = np.random.default_rng(0)
    (height, width), windows = work.image_size, work.windows
    bounds = np.array([[index * 50_000, (index + 1) * 50_000] for index in range(windows)])
    made = [_events(rng, edges, events, height, width) for _ in range(size) for edges in bounds]
    batch: dict[str, Any] = {
        "key": [str(index) for index in range(size)],
        "events": EventBatch.from_windows(made, np.tile(bounds, (size, 1))),
        "windows": windows,
        "label": torch.zeros(size, dtype=torch.int64),
    }
    images = torch.from_numpy(rng.integers(0, 256, (size, max(1, int(work.images)), 3, height, width), dtype=np.uint8))
    if not isinstance(work.cfg, Stage2Config):
        return {**batch, "image": images[:, 0].contiguous()}
    pair = np.arange(windows) if work.images > 1 else np.zeros(windows, dtype=np.int64)
    drawn = [layout for layout in LAYOUTS if getattr(work.cfg.sequence, layout)]
    laid = [lay_out(layout, bounds, pair, bounds[pair if len(pair) == work.images else [-1], 1]) for layout in drawn]
    frames = max(laid, key=lambda one: len(one["modality"]))
    batch |= {name: torch.from_numpy(np.tile(column, (size, 1))) for name, column in frames.items()}
    batch |= {"pair": torch.from_numpy(np.tile(pair, (size, 1))), "padded": False}
    batch["valid"] = torch.ones_like(batch["modality"], dtype=torch.bool)
    return {**batch, "images": images} if work.images else batch


def _events(rng: np.random.Generator, edges: np.ndarray, count: int, height: int, width: int) -> Events:
    return Events.from_arrays(
        np.sort(rng.integers(edges[0], edges[1], count)),
        rng.integers(0, width, count),
        rng.integers(0, height, count),
        rng.integers(0, 2, count),
        height=height,
        width=width,
    )
