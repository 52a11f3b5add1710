"""A recording of any length to one `.npy` of tokens, window by window, whole or not at all."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, get_args

import numpy as np
from tqdm import tqdm

from gep.events.io import EventSource
from gep.events.io.files import replacing
from gep.hub import GEPModel

Output = Literal["tokens", "pooled", "hidden", "next", "image"]
"""Which of a window's outputs are written; see gep.stream.StreamedWindow."""
_DTYPES = ("float32", "float16")
_HEAD = 128  # bytes before the data, a multiple of 64 as NumPy has it; room for any shape
_BIN, _LEAST_S = 0.01, 1e-6  # a bin of latencies is 1 % wide, the first begins at 1 µs


class NpyWriter:
    """A `.npy` array whose number of rows is known only at the end; it is written into the head then.

    Args:
        file: empty, open for writing at any place.
        shape: of a row.
        dtype: of the array.
    """

    def __init__(self, file: BinaryIO, shape: Sequence[int], dtype: np.dtype | str) -> None:
        self.file, self.shape, self.dtype, self.rows = file, tuple(shape), np.dtype(dtype), 0
        file.write(bytes(_HEAD))  # no array yet, should anyone look

    def append(self, row: np.ndarray) -> None:
        """Write one row."""
        assert row.shape == self.shape, f"a row of shape {row.shape} among those of {self.shape}"
        self.file.write(np.ascontiguousarray(row, self.dtype).data)
        self.rows += 1

    def close(self) -> None:
        """Write the head; the file stays open."""
        shape, descr = (self.rows, *self.shape), np.lib.format.dtype_to_descr(self.dtype)
        text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode("latin1")
        head = np.lib.format.magic(1, 0) + (_HEAD - 10).to_bytes(2, "little") + text.ljust(_HEAD - 11) + b"\n"
        assert len(head) == _HEAD
        self.file.seek(0)
        self.file.write(head)


class Latencies:
    """Percentiles of any number of times, to 1 %, in fixed memory: counts over logarithmic bins."""

    def __init__(self) -> None:
        self.counts = np.zeros(3000, np.int64)  # up to 10⁷ s
        self.slowest = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        place = int(math.log(max(seconds, _LEAST_S) / _LEAST_S) / _BIN)
        self.counts[min(place, len(self.counts) - 1)] += 1
        self.slowest = max(self.slowest, seconds)

    def percentile(self, q: float) -> float:
        """Seconds that q percent of the times do not exceed (nearest rank); NaN when there are none."""
        if not (total := self.counts.sum()):
            return math.nan
        place = int(np.searchsorted(self.counts.cumsum(), max(1, math.ceil(q / 100 * total))))
        return min(_LEAST_S * math.exp(_BIN * (place + 0.5)), self.slowest)


class Embedded(NamedTuple):
    """What `embed` wrote."""

    shape: tuple[int, ...]
    """Of the array: windows first."""
    num_bytes: int
    """Of the array's file."""
    times: Path
    """The file of window times."""
    window_us: int
    """Length of a window [µs]."""
    first_s: float
    """Time of the first window, which compiles and loads what the others use [s]."""
    latencies: Latencies
    """Times of the other windows: from their last event at hand to their row in main memory."""

    def __str__(self) -> str:
        shape = " x ".join(f"{side:,}" for side in self.shape)
        times = ", ".join(f"p{q} {1e3 * self.latencies.percentile(q):.2f}" for q in (50, 90, 99))
        rest = f"latency [ms]: {times}, slowest {1e3 * self.latencies.slowest:.2f}; " if self.shape[0] > 1 else ""
        return (
            f"{shape}, {_size(self.num_bytes)}; times in {self.times.name}\n"
            f"{rest}first window {1e3 * self.first_s:.2f} ms; a window lasts {self.window_us / 1e3:g} ms"
        )


def embed(
    model: GEPModel,
    source: EventSource,
    out: Path,
    *,
    what: Output = "tokens",
    span: int | None = None,
    window_us: int = 0,
    dtype: str = "float32",
    progress: bool = True,
) -> Embedded:
    """Write one of a model's outputs for every window of a recording.

    Only one window's outputs, the backbone's cache and a few pieces of the recording are in memory at a time.

    Args:
        model: on the device to use.
        source: the open recording; windows adjoin from its first event to its last.
        out: the `.npy`, (windows, …) of `dtype`; appears when it is complete. Beside it `<name>.times.npy`, (windows,
            2) int64 µs [t0, t1) of each window as the recording counts time.
        what: which output: tokens, pooled, or of the backbone hidden, next, image.
        span, window_us: as `GEPModel.stream`.
        dtype: float32 or float16.
        progress: a bar on a terminal.
    Raises:
        ValueError: no events, another suffix, an output or dtype that there is none of, or too little disk space.
        FileNotFoundError: the folder of `out` does not exist.
    """
    out = Path(out)
    _check(model, out, what, dtype)
    first, last = source.span
    if last <= first:
        raise ValueError(f"{source.path}: holds no events to embed")
    needs = what not in ("tokens", "pooled")
    stream = model.stream(source.height, source.width, span=span, window_us=window_us, t0_us=first, backbone=needs)
    total, took, first_s = -(-(last - first) // stream.window_us), Latencies(), 0.0
    beside = out.with_name(f"{out.stem}.times.npy")
    with replacing(out) as to, replacing(beside) as times_to, open(to, "wb") as file, open(times_to, "wb") as times:
        rows: NpyWriter | None = None
        bounds = NpyWriter(times, (2,), "i8")
        windows = source.windows(stream.window_us)
        for events, (_, end) in tqdm(
            windows, total=total, desc=out.name, unit="window", disable=None if progress else True, leave=False
        ):
            began = time.perf_counter()
            stream.push(events)
            (window,) = stream.advance(end)
            row = getattr(window, what).float().cpu().numpy()
            seconds = time.perf_counter() - began
            if rows is None:
                first_s, rows = seconds, NpyWriter(file, row.shape, dtype)
                _check_space(out, total * row.size * rows.dtype.itemsize)
            else:
                took.add(seconds)
            rows.append(row)
            bounds.append(np.array([window.t0_us, window.t1_us]))
        assert rows is not None  # the span is not empty
        rows.close()
        bounds.close()
        out.unlink(missing_ok=True)  # an earlier array is never seen with these times
    shape = (rows.rows, *rows.shape)
    return Embedded(shape, out.stat().st_size, beside, stream.window_us, first_s, took)


def _check(model: GEPModel, out: Path, what: str, dtype: str) -> None:
    if out.suffix.lower() != ".npy":
        raise ValueError(f"{out}: the array is written as .npy; give a name that ends so")
    if what not in get_args(Output):
        raise ValueError(f"what = {what!r}: choose one of {', '.join(get_args(Output))}")
    if what not in ("tokens", "pooled") and model.backbone is None:
        raise ValueError(f"what = {what!r} is the backbone's, and this export has none: choose tokens or pooled")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype = {dtype!r}: choose one of {', '.join(_DTYPES)}")


def _check_space(out: Path, num_bytes: int) -> None:
    if num_bytes > (free := shutil.disk_usage(out.parent).free):
        raise ValueError(
            f"{out}: needs {_size(num_bytes)}, {_size(free)} are free; choose another disk, float16 or pooled"
        )


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:,} bytes"
