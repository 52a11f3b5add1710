"""What a run says about itself: JSONL files, running means, a progress bar, and checks on trackers' names."""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gep import distributed

# Name in the config -> package to import; all are accelerate's own trackers.
TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse tracker names that do not exist or are not installed.

    Raises:
        ValueError: names the valid trackers, or the pip extra to install.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"trackers: unknown tracker {name!r}; there are {', '.join(TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise ValueError(
                f"trackers: {name} is not installed; pip install {TRACKERS[name]} "
                "(or the extra: pip install 'gep[trackers]')"
            )


class JsonlWriter:
    """Appends one JSON object per line, flushed at once; does nothing on ranks other than the main one.

    Args:
        path: the file; its folder exists.
        keep: number of bytes of an existing file to keep, as recorded in a checkpoint; the rest is cut off.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 0) -> None:
        self.path = Path(path)
        self.offset = keep
        if distributed.is_main():
            self.path.touch()
            if self.path.stat().st_size < keep:
                raise ValueError(
                    f"{self.path} has {self.path.stat().st_size} bytes, but had {keep} when the checkpoint "
                    "was made; put the file back, or choose another run folder"
                )
            os.truncate(self.path, keep)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line; one that does not fit on the disk is taken back whole: the file stays readable."""
        line = json.dumps({k: _jsonable(v) for k, v in values.items()}).encode() + b"\n"
        if distributed.is_main():
            try:
                with open(self.path, "ab") as file:
                    file.write(line)
            except OSError as error:
                os.truncate(self.path, self.offset)
                raise OSError(error.errno, f"could not write to {self.path}: {error.strerror}; free space") from error
        self.offset += len(line)


class Meters:
    """Means of logged scalars, summed where they live (float64) and read only when asked for."""

    def __init__(self) -> None:
        # One vector of sums per set of names: a step then costs one stack and one add, whatever it reports.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one observation of each value; no host sync.

        Raises:
            ValueError: a value is not a scalar.
        """
        device = next((v.device for v in values.values() if isinstance(v, Tensor)), torch.device("cpu"))
        row = []
        for name, value in values.items():
            value = torch.as_tensor(value, device=device).detach()
            if value.numel() != 1:
                raise ValueError(f"logged value {name!r} has shape {tuple(value.shape)}; return scalars")
            row.append(value.reshape(()).float())
        names = tuple(values)
        # MPS has no float64.
        stacked = torch.stack(row).to(torch.float32 if device.type == "mps" else torch.float64)
        self._sums[names] = self._sums[names].to(device) + stacked if names in self._sums else stacked
        self._counts[names] = self._counts.get(names, 0) + 1

    def means_and_reset(self) -> dict[str, float]:
        """Mean of each value over all ranks' observations, on every rank; then start afresh. Syncs once."""
        totals: dict[str, list[float]] = {}
        for rank_state in distributed.gather_objects(self.state_dict()):
            for entry in rank_state:
                for name, total in zip(entry["names"], entry["sums"], strict=True):
                    pair = totals.setdefault(name, [0.0, 0.0])
                    pair[0] += total
                    pair[1] += entry["count"]
        self._sums, self._counts = {}, {}
        return {name: total / count for name, (total, count) in totals.items()}

    def state_dict(self) -> list[dict[str, Any]]:
        """This rank's partial sums as JSON values; floats survive the round trip exactly."""
        sums = (
            torch.cat([s.double() if s.device.type != "mps" else s for s in self._sums.values()]).tolist()
            if self._sums
            else []
        )
        entries, start = [], 0
        for names, count in self._counts.items():
            entries.append({"names": list(names), "sums": sums[start : start + len(names)], "count": count})
            start += len(names)
        return entries

    def load_state_dict(self, entries: list[dict[str, Any]]) -> None:
        """Take up partial sums written by `state_dict`."""
        self._sums = {tuple(e["names"]): torch.tensor(e["sums"], dtype=torch.float64) for e in entries}
        self._counts = {tuple(e["names"]): e["count"] for e in entries}


class Clock:
    """Wall-clock time of a run between two log lines: how fast, and how much of it was waiting for data."""

    def __init__(self) -> None:
        self._began = self._lap = time.perf_counter()
        self._waited = self._paused = 0.0
        self._steps = 0
        self._all_waited = self._all_spent = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is counted as waiting for data; one call a step."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._steps += 1

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Time spent here (evaluating, saving) does not count as training."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def lap(self, step: int, batch_size: int) -> dict[str, float]:
        """Since the last call: samples/s, share of time waiting for data. Also seconds since the start."""
        now = time.perf_counter()
        spent = max(now - self._lap - self._paused, 1e-9)
        rates = {
            "step": step,
            "samples_per_s": round(self._steps * batch_size / spent, 3),
            "data_wait": round(self._waited / spent, 4),
            "seconds": round(now - self._began, 3),
        }
        self._all_waited, self._all_spent = self._all_waited + self._waited, self._all_spent + spent
        self._lap, self._waited, self._paused, self._steps = now, 0.0, 0.0, 0
        return rates

    @property
    def data_wait(self) -> float:
        """Share of the time of all laps that was waiting for data."""
        return self._all_waited / max(self._all_spent, 1e-9)


class Progress:
    """A bar on a terminal, a line every tenth of the run elsewhere, nothing on other ranks or when switched
    off.

    Args:
        total: steps of the run.
        start: steps already done.
        enabled: False prints nothing.
    """

    def __init__(self, total: int, *, start: int = 0, enabled: bool = True) -> None:
        self.total, self.step, self._first = total, start, start
        self._note = ""
        self._began = time.perf_counter()
        enabled = enabled and distributed.is_main()
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)
        self._lines = enabled and self._bar is None

    def note(self, loss: float, samples_per_s: float) -> None:
        """Set the numbers shown beside the step."""
        rate = f"{samples_per_s:.0f}" if samples_per_s >= 100 else f"{samples_per_s:.3g}"
        self._note = f"loss {loss:.4g}, {rate} samples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)

    def advance(self) -> None:
        """One step is done."""
        self.step += 1
        if self._bar is not None:
            self._bar.update()
        elif self._lines and self.step * 10 // self.total > (self.step - 1) * 10 // self.total:
            elapsed = time.perf_counter() - self._began
            left = elapsed / (self.step - self._first) * (self.total - self.step)
            share = 100 * self.step // self.total
            parts = [f"step {self.step}/{self.total} ({share}%)", self._note, f"{_clock(left)} left"]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics for people: four decimals, but three significant digits at least; 2e-05 is not 0.0."""
    return {name: round(v, 4) if abs(v) >= 0.1 or v != v else float(f"{v:.3g}") for name, v in metrics.items()}


def _clock(seconds: float) -> str:
    return tqdm.format_interval(seconds)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.item()
    # JSON has no NaN; null keeps the line readable by strict parsers.
    return None if isinstance(value, float) and not math.isfinite(value) else value
