"""From what a batch carries as its events to the encoder's input: recorded, simulated here, or some of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from gep.events.represent import Histogram, Representation
from gep.events.stills import StillBatch
from gep.events.types import EventBatch

Part: TypeAlias = EventBatch | StillBatch


@dataclass(frozen=True, eq=False)
class Grouped:
    """A batch whose samples come from several sources: a part a source, put back in order when rasterised."""

    parts: tuple[Part, ...]
    """Each with the windows of its samples, sample by sample; all of one canvas."""
    rows: tuple[torch.Tensor, ...]
    """For each part int64 (n,): the batch's samples that it holds, in its order."""
    sources: tuple[int, ...]
    """For each part the number of its source."""
    windows: int
    """T, windows of each sample."""

    @classmethod
    def of(
        cls, parts: Sequence[Part], rows: Sequence[Sequence[int]], sources: Sequence[int], *, windows: int
    ) -> Grouped:
        """Checked parts.

        Raises:
            ValueError: parts that do not fill every sample once, or a part without T windows for each of its samples.
        """
        for part, own, source in zip(parts, rows, sources, strict=True):
            if len(part) != windows * len(own):
                raise ValueError(
                    f"source {source} has {len(part)} windows for {len(own)} samples, the batch {windows} a sample; "
                    "give all sources of a mix the same number of windows"
                )
        if sorted(row for own in rows for row in own) != list(range(sum(len(own) for own in rows))):
            raise ValueError(f"rows {[list(own) for own in rows]} do not name each sample once")
        sizes = {(part.height, part.width) for part in parts}
        if len(sizes) != 1:
            raise ValueError(f"the sources' canvases differ: {sorted(sizes)}; give them one height and width")
        return cls(tuple(parts), tuple(torch.tensor(own) for own in rows), tuple(sources), windows)

    def __len__(self) -> int:
        """Windows in all, B * T."""
        return sum(len(part) for part in self.parts)

    @property
    def device(self) -> torch.device:
        """The device of all parts."""
        return self.parts[0].device

    @property
    def height(self) -> int:
        """Canvas rows."""
        return self.parts[0].height

    @property
    def width(self) -> int:
        """Canvas columns."""
        return self.parts[0].width

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Grouped:
        """The same batch on another device."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Grouped:
        """The same batch in page-locked memory (DataLoader calls this)."""
        return self._map(lambda value: value.pin_memory())

    def _map(self, function: Callable[[Any], Any]) -> Grouped:
        parts, rows = tuple(map(function, self.parts)), tuple(map(function, self.rows))
        return dataclasses.replace(self, parts=parts, rows=rows)


AnyEvents: TypeAlias = EventBatch | StillBatch | Grouped


@dataclass(frozen=True)
class PerSource:
    """A representation for each source of a mix, with statistics of its own, behind one face."""

    each: tuple[Representation, ...]
    """By source number; the first is taken for events that are no mix (a mix is evaluated on its first source)."""

    def __post_init__(self) -> None:
        if len({(type(one), one.channels) for one in self.each}) != 1:
            raise ValueError(f"the sources' representations differ in kind or channels: {self.each}")

    @property
    def channels(self) -> int:
        """Channels C of the (B, C, H, W) result."""
        return self.each[0].channels

    def of(self, source: int) -> Representation:
        """The representation of a source.

        Raises:
            ValueError: a source that has none.
        """
        if not 0 <= source < len(self.each):
            raise ValueError(f"source {source} has no representation; there are {len(self.each)}, from 0 on")
        return self.each[source]


@torch.compiler.disable  # ragged, and on a CPU numba's
def frames(represent: Representation | PerSource, events: AnyEvents) -> torch.Tensor:
    """Images of all windows of a batch, on the batch's device.

    Stills are simulated here; for a `Histogram` their events are counted without ever being listed.

    Args:
        represent: one for all, or one a source.
        events: B samples of T windows.

    Returns:
        (B * T, C, H, W) float32, sample by sample.
    """
    if isinstance(events, Grouped):
        parts = [frames(_of(represent, source), part) for part, source in zip(events.parts, events.sources)]
        rows = torch.cat([own.to(events.device) for own in events.rows])
        stacked = torch.cat([part.unflatten(0, (-1, events.windows)) for part in parts])
        return torch.empty_like(stacked).index_copy_(0, rows, stacked).flatten(0, 1)
    represent = _of(represent, 0)
    if isinstance(events, StillBatch):
        if type(represent) is Histogram:
            counts = events.counts()
            counts = counts.log1p_() if represent.log1p else counts
            return counts.mul_(represent.scale) if represent.scale != 1 else counts
        return represent(events.events())
    return represent(events)


def _of(represent: Representation | PerSource, source: int) -> Representation:
    return represent.of(source) if isinstance(represent, PerSource) else represent
