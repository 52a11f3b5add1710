"""What `gep info` prints: about a recording, the root of a data set, a folder of shards, or an exported model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gep.data.listing import Listing
from gep.data.registry import DATASETS, list_recordings, recognise
from gep.events.io import EventSource, find_format, open_events

_SHOWN = 12  # class names a line


def describe_path(path: str | Path, *, height: int | None = None, width: int | None = None) -> str:
    """A few lines for people about whatever lies at a path.

    Args:
        path: a recording, the root of a data set, a folder of shards, or an exported model.
        height: sensor rows, for a recording that does not say.
        width: sensor columns, likewise.

    Raises:
        FileNotFoundError: nothing does.
        ValueError, EventFormatError: it is damaged, or nothing that gep knows.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    if path.is_file():
        return describe_recording(path, height=height, width=width)
    if (path / "config.json").is_file() and (
        (path / "model.safetensors").exists() or not (path / "index.json").exists()
    ):
        return _describe_export(path)
    if (path / "events.dat.t").is_file():
        return describe_recording(path, height=height, width=width)
    return _describe_root(path)


def describe_recording(path: Path, *, height: int | None = None, width: int | None = None) -> str:
    """Format, sensor, counts, time and rates of a recording; read in chunks, however long it is."""
    with open_events(path, height=height, width=width) as source:
        return "\n".join([f"{path}: {find_format(path).name}", *(f"  {line}" for line in facts(source))])


def facts(source: EventSource) -> list[str]:
    """Lines about what an open recording holds."""
    count = on = 0
    first, last = 0, 0
    peak = _Peak()
    for events in source.chunks():
        if len(events) == 0:
            continue
        first = int(events.t[0]) if count == 0 else first
        last = int(events.t[-1])
        count += len(events)
        on += int(np.count_nonzero(events.p))
        peak.add((events.t - first) // 1000)
    lines = [f"sensor      {source.height} × {source.width} (height × width)", f"events      {count:,}"]
    if count == 0:
        return lines
    seconds = (last - first) / 1e6
    lines += [
        f"ON, OFF     {on:,} ({100 * on / count:.1f} %), {count - on:,} ({100 * (count - on) / count:.1f} %)",
        f"time        {first:,} to {last:,} µs ({seconds:.6f} s)",
    ]
    if seconds:
        rate = count / seconds
        lines.append(
            f"rate        {_rate(rate)} events/s (ON {_rate(on / seconds)}, OFF {_rate((count - on) / seconds)}), "
            f"{rate / (source.height * source.width):.3g} a pixel and second"
        )
    lines.append(f"peak        {peak.most():,} events in one ms")
    return lines


class _Peak:
    """The fullest millisecond of a stream; a millisecond may begin in one chunk and end in the next."""

    def __init__(self) -> None:
        self._open, self._count, self._most = -1, 0, 0

    def add(self, milliseconds: np.ndarray) -> None:
        numbers, counts = np.unique(milliseconds, return_counts=True)
        if int(numbers[0]) == self._open:
            counts[0] += self._count
        self._most = max(self._most, self._count, int(counts.max()))
        self._open, self._count = int(numbers[-1]), int(counts[-1])

    def most(self) -> int:
        return max(self._most, self._count)


def _rate(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _describe_export(path: Path) -> str:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: not JSON ({error}); is this an export folder?") from error
    return f"{path}: an exported model\n{json.dumps(config, indent=2, ensure_ascii=False)}"


def _describe_root(path: Path) -> str:
    lines, faults = [], []
    for name in recognise(path):
        found = []
        for split in DATASETS[name].splits:
            try:
                found.append(list_recordings(name, path, split))
            except FileNotFoundError as error:
                faults.append(f"{name} {split}: {error}".strip())
            except ValueError as error:
                # A split that is there but unsound is worth more than silence.
                lines.append(f"  {name} {split}: {error}")
        if name == "folder" and len({listing.hash for listing in found}) == 1:
            found = found[-1:]  # without splits of its own, train is all
        if name == "folder" and found and not found[0].classes:
            lines.append("  no class folders (data.label_from=file takes the recordings' names as classes)")
        if found:
            lines = [f"{path}: data.name={name}", *(line for one in found for line in _listing_lines(one)), *lines]
    if not any("data.name=" in line for line in lines):
        cause = "\n  ".join([line.strip() for line in lines] or faults)
        raise ValueError(f"{path}: no recording, data set, shards or exported model that gep knows\n  {cause}")
    return "\n".join(lines)


def _listing_lines(listing: Listing) -> list[str]:
    lines = [f"  {listing.describe()}"]
    if listing.sensor is not None:
        lines.append(f"    sensor {listing.sensor[0]} × {listing.sensor[1]} (height × width)")
    if listing.spans is not None and len(listing.spans):
        lengths = listing.spans[:, 1] - listing.spans[:, 0]
        files = len(set(listing.files)) or "several"
        lines.append(f"    samples of {np.median(lengths) / 1000:g} ms (median), of {files} recordings")
    if listing.classes:
        counts = np.bincount(listing.labels[listing.labels >= 0], minlength=len(listing.classes))
        shown = [
            f"{name} ({count:,})" if counts.any() else name for name, count in zip(listing.classes[:_SHOWN], counts)
        ]
        lines.append(f"    classes {', '.join(shown)}{' …' if len(listing.classes) > _SHOWN else ''}")
    return lines
