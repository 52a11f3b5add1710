"""The two shapes in which events travel: one recording or window, and a ragged batch of windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

_DTYPES = {"t": np.int64, "x": np.uint16, "y": np.uint16, "p": np.uint8}
_MAX_SIDE = 32767  # a batch keeps coordinates as int16, the widest dtype every torch op and numba agree on


class EventFormatError(ValueError):
    """A file or an array does not hold the events it should; names source, place and fault."""


@dataclass(frozen=True, eq=False)
class Events:
    """Events of one sensor, in time order; the arrays are never written to by gep.

    The constructor only stores; `validate` (or `from_arrays`) checks, once, where events enter the program.
    """

    t: np.ndarray
    """(N,) int64 µs, ascending (equal times are allowed)."""
    x: np.ndarray
    """(N,) uint16 column in [0, width)."""
    y: np.ndarray
    """(N,) uint16 row in [0, height)."""
    p: np.ndarray
    """(N,) uint8 polarity: 0 = OFF, 1 = ON."""
    height: int
    """Sensor rows."""
    width: int
    """Sensor columns."""

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: slice) -> Events:
        """The events of a slice, as views on the same memory.

        Raises:
            TypeError: index is not a forward slice (anything else could break the time order).
        """
        if not isinstance(index, slice) or (index.step is not None and index.step < 1):
            raise TypeError(f"Events are indexed by forward slices only, got {index!r}")
        return Events(self.t[index], self.x[index], self.y[index], self.p[index], self.height, self.width)

    @property
    def duration_us(self) -> int:
        """Last time minus first time in µs; 0 when there are fewer than two events."""
        return int(self.t[-1]) - int(self.t[0]) if len(self.t) else 0

    def validate(self, source: str = "events") -> Events:
        """Checks dtypes, lengths, sensor bounds, polarity and time order.

        Args:
            source: name that a message starts with, normally the file.

        Returns:
            self, so that it can be chained.

        Raises:
            EventFormatError: naming the source, the first offending index and the fault.
        """
        if not 0 < self.height <= _MAX_SIDE or not 0 < self.width <= _MAX_SIDE:
            raise EventFormatError(f"{source}: sensor size {self.height}x{self.width} is not in 1..{_MAX_SIDE}")
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
                what = f"{getattr(array, 'dtype', type(array))} {getattr(array, 'shape', '')}"
                raise EventFormatError(
                    f"{source}: {name} must be a 1-D {np.dtype(dtype)} array, got {what}; Events.from_arrays converts"
                )
            if len(array) != len(self.t):
                raise EventFormatError(f"{source}: {name} has {len(array)} entries where t has {len(self.t)}")
        if len(self.t) == 0:
            return self
        # The maxima first: they are vectorised, and the index is only searched for when there is a fault.
        for name, limit, what in (
            ("x", self.width, f"outside the sensor's {self.width} columns"),
            ("y", self.height, f"outside the sensor's {self.height} rows"),
            ("p", 2, "not a polarity (0 or 1)"),
        ):
            array = getattr(self, name)
            if array.max() >= limit:
                index = int(np.argmax(array >= limit))
                raise EventFormatError(f"{source}: event {index}: {name} = {array[index]} is {what}")
        later = self.t[1:] < self.t[:-1]
        if later.any():
            index = int(np.argmax(later)) + 1
            raise EventFormatError(
                f"{source}: event {index}: t = {self.t[index]} µs is before "
                f"the previous event's {self.t[index - 1]} µs; sort the events by time"
            )
        return self

    @classmethod
    def from_arrays(
        cls,
        t: np.ndarray,
        x: np.ndarray,
        y: np.ndarray,
        p: np.ndarray,
        *,
        height: int,
        width: int,
        source: str = "events",
    ) -> Events:
        """Events from arrays of any integer-valued dtype; nothing given is written to.

        Args:
            t: (N,) times in µs, whole numbers, ascending.
            x: (N,) columns.
            y: (N,) rows.
            p: (N,) polarity as bool, {0, 1} or {-1, 1} (-1 becomes 0).
            height: sensor rows.
            width: sensor columns.
            source: name that a message starts with.

        Returns:
            Validated events; arrays that already have the right dtype are kept, not copied.

        Raises:
            EventFormatError: a value does not fit its dtype, or `validate` finds a fault.
        """
        p = np.asarray(p)
        if p.dtype.kind in "if" and p.size and p.min() < 0:
            wrong = (p != 1) & (p != -1)
            if wrong.any():
                index = int(np.argmax(wrong))
                raise EventFormatError(f"{source}: event {index}: p = {p[index]} where polarities are {{-1, 1}}")
            p = p > 0
        given = {"t": t, "x": x, "y": y, "p": p}
        cast = {name: _cast(name, array, _DTYPES[name], source) for name, array in given.items()}
        return cls(**cast, height=int(height), width=int(width)).validate(source)

    @classmethod
    def empty(cls, height: int, width: int) -> Events:
        """No events on a sensor of the given size."""
        return cls(**{name: np.empty(0, dtype) for name, dtype in _DTYPES.items()}, height=height, width=width)


def _cast(name: str, array: np.ndarray, dtype: type, source: str) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype == dtype:
        return array
    if array.dtype.kind not in "biuf":
        raise EventFormatError(f"{source}: {name} holds {array.dtype}, not numbers")
    if array.dtype.kind == "b" or array.size == 0:
        return array.astype(dtype)
    info = np.iinfo(dtype)
    # In float64 the upper limit of int64 rounds up to 2**63, hence the strict side there.
    high = array < 2.0**63 if array.dtype.kind == "f" and dtype is np.int64 else array <= info.max
    good = (array >= info.min) & high
    if array.dtype.kind == "f":
        good &= array == np.floor(array)
    if not good.all():
        index = int(np.argmin(good))
        raise EventFormatError(
            f"{source}: event {index}: {name} = {array[index]} is no whole number in {info.min}..{info.max}"
        )
    return array.astype(dtype)


@dataclass(frozen=True, eq=False)
class EventBatch:
    """B windows of one sensor size, concatenated: what workers send and representations take.

    Every event lies inside its window's bounds [t0, t1); `from_windows` and `validate` make sure of it.
    """

    t: torch.Tensor
    """(N,) int64 µs, absolute, ascending inside each window."""
    x: torch.Tensor
    """(N,) int16 column, or float32 rectified column (voxel grid only)."""
    y: torch.Tensor
    """(N,) int16 row, or float32 rectified row (voxel grid only)."""
    p: torch.Tensor
    """(N,) uint8 polarity: 0 = OFF, 1 = ON."""
    offsets: torch.Tensor
    """(B + 1,) int64: window b is the slice offsets[b]:offsets[b + 1]."""
    t0: torch.Tensor
    """(B,) int64 µs, begin of each window, inclusive."""
    t1: torch.Tensor
    """(B,) int64 µs, end of each window, exclusive."""
    height: int
    """Sensor rows."""
    width: int
    """Sensor columns."""
    checked: bool = False
    """Whether the values are known to lie in bounds; kernels check a batch without this mark first."""

    def __len__(self) -> int:
        return len(self.t0)

    @property
    def device(self) -> torch.device:
        """The device all tensors are on."""
        return self.t.device

    @property
    def num_events(self) -> int:
        """Events in all windows together."""
        return len(self.t)

    @property
    def rectified(self) -> bool:
        """Whether the coordinates are float (sub-pixel)."""
        return self.x.is_floating_point()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EventBatch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> EventBatch:
        """The same batch in page-locked memory (DataLoader calls this)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def with_coordinates(self, x: torch.Tensor, y: torch.Tensor) -> EventBatch:
        """The same events at other (N,) coordinates, such as float32 rectified ones; unchecked until used."""
        return dataclasses.replace(self, x=x, y=y, checked=False)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> EventBatch:
        moved = {name: function(getattr(self, name)) for name in ("t", "x", "y", "p", "offsets", "t0", "t1")}
        return EventBatch(**moved, height=self.height, width=self.width, checked=self.checked)

    def validate(self, source: str = "batch") -> EventBatch:
        """Checks dtypes, lengths, sensor bounds, polarity and the windows' first and last times.

        The order inside a window is not checked again: that is done where events are read.

        Returns:
            The same batch, marked as checked.

        Raises:
            EventFormatError: naming the source, the window and the fault.
        """
        num, size = len(self.t), len(self.t0)
        coordinates = (torch.float32, torch.int16)
        expected = {"t": num, "x": num, "y": num, "p": num, "offsets": size + 1, "t0": size, "t1": size}
        dtypes = {"x": coordinates, "y": coordinates, "p": (torch.uint8,)}
        for name, length in expected.items():
            tensor, allowed = getattr(self, name), dtypes.get(name, (torch.int64,))
            if tensor.shape != (length,) or tensor.dtype not in allowed or tensor.device != self.device:
                raise EventFormatError(
                    f"{source}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                    f"expected {allowed[0]} ({length},) on {self.device}"
                )
        if self.x.dtype != self.y.dtype:
            raise EventFormatError(f"{source}: x is {self.x.dtype} and y is {self.y.dtype}; give both alike")
        # A few numbers a window: NumPy's calls take a tenth of the time of torch's.
        offsets, t0, t1 = (tensor.cpu().numpy() for tensor in (self.offsets, self.t0, self.t1))
        if offsets[0] != 0 or offsets[-1] != num or (offsets[1:] < offsets[:-1]).any():
            raise EventFormatError(f"{source}: offsets must ascend from 0 to the {num} events")
        if (t1 < t0).any():
            index = int(np.argmax(t1 < t0))
            raise EventFormatError(f"{source}: window {index}: t1 is before t0")
        if num == 0:
            return dataclasses.replace(self, checked=True)
        if self.rectified:
            if not bool(torch.isfinite(self.x).all() & torch.isfinite(self.y).all()):
                raise EventFormatError(f"{source}: rectified coordinates must be finite")
        else:
            for name, limit in (("x", self.width), ("y", self.height)):
                if _largest(getattr(self, name)) >= limit:
                    low, high = (int(v) for v in torch.aminmax(getattr(self, name)))
                    raise EventFormatError(f"{source}: {name} spans {low}..{high}, the sensor 0..{limit - 1}")
        if _largest(self.p) > 1:
            raise EventFormatError(f"{source}: p holds {_largest(self.p)}; polarities are 0 and 1")
        full = np.flatnonzero(offsets[1:] > offsets[:-1])
        ends = np.stack([offsets[full], offsets[full + 1] - 1])
        if self.device.type == "cpu":
            first, last = self.t.numpy()[ends]
        else:
            first, last = self.t[torch.from_numpy(ends).to(self.device)].cpu().numpy()
        wrong = (first < t0[full]) | (last >= t1[full])
        if wrong.any():
            index = int(full[np.argmax(wrong)])
            raise EventFormatError(
                f"{source}: window {index}: its events lie outside its bounds [{t0[index]}, {t1[index]}) µs"
            )
        return dataclasses.replace(self, checked=True)

    @classmethod
    def from_windows(
        cls, windows: Sequence[Events], bounds: np.ndarray | None = None, *, copy: bool = True
    ) -> EventBatch:
        """A checked batch (CPU) from windows of one sensor size.

        Args:
            windows: B >= 1 windows in time order; their arrays are copied.
            bounds: (B, 2) int64 µs [t0, t1) of each window; None takes the first time and the last + 1,
                and (0, 1) for an empty window.
            copy: False has the batch of a single window share its arrays; then neither may be written to.

        Raises:
            ValueError: no windows, differing sensor sizes, or bounds of another shape.
            EventFormatError: an event outside the sensor or its window's bounds.
        """
        if len(windows) == 0:
            raise ValueError("a batch needs at least one window")
        height, width = windows[0].height, windows[0].width
        for index, window in enumerate(windows):
            if (window.height, window.width) != (height, width):
                raise ValueError(
                    f"window {index} is {window.height}x{window.width}, window 0 {height}x{width}; "
                    "crop or resize them to one size"
                )
        if bounds is None:
            bounds = np.array([(w.t[0], w.t[-1] + 1) if len(w) else (0, 1) for w in windows], np.int64)
        bounds = np.asarray(bounds)
        if bounds.shape != (len(windows), 2) or bounds.dtype.kind not in "iu":
            raise ValueError(
                f"bounds must be integer µs of shape ({len(windows)}, 2), got {bounds.dtype} {bounds.shape}"
            )
        offsets = np.zeros(len(windows) + 1, np.int64)
        np.cumsum([len(window) for window in windows], out=offsets[1:])

        def join(name: str) -> torch.Tensor:
            array = getattr(windows[0], name)
            # Copied even if there is but one: a batch may be written to, windows may be views on a recording kept open.
            if copy or len(windows) > 1 or not (array.flags.c_contiguous and array.flags.writeable):
                array = np.concatenate([getattr(window, name) for window in windows])
            return torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)

        edges = torch.from_numpy(np.array(bounds.T, dtype=np.int64, order="C"))
        return cls(
            t=join("t"),
            x=join("x"),
            y=join("y"),
            p=join("p"),
            offsets=torch.from_numpy(offsets),
            t0=edges[0],
            t1=edges[1],
            height=height,
            width=width,
        ).validate("windows")


def _largest(values: torch.Tensor) -> int:
    """Largest of int16 or uint8 values, those below 0 counted as beyond 32,767."""
    if values.device.type == "cpu":  # NumPy's is vectorised where torch's is not
        return int(values.numpy().view(np.uint16 if values.dtype == torch.int16 else np.uint8).max())
    low, high = (int(value) for value in torch.aminmax(values))
    return high if low >= 0 else 1 << 16
