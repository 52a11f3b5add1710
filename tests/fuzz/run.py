"""The run: workers of their own, so that a crash or a hang is caught and has a number."""

from __future__ import annotations

import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.fuzz.check import outcome
from tests.fuzz.mutate import mutated
from tests.fuzz.seeds import Seed, collect

_ROOT = Path(__file__).resolve().parents[2]
_CPU_SECONDS = 2.0  # of one input; CPU time, since other processes may share the cores
_SILENT_SECONDS = 30.0  # after this the worker hangs
_START_SECONDS = 300.0  # imports and compilation
_GROWTH = 150 << 20  # bytes of a worker's memory from its 200th input on
_PEAK = 600 << 20  # bytes that a single input may add
_ADDRESS = 12 << 30  # address space above what the imports take; a wild allocation becomes a MemoryError
_WARM = 200


@dataclass
class Report:
    """What a run found."""

    outcomes: Counter = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        """Inputs that came to an end."""
        return sum(self.outcomes.values())


def place(seed: Seed, folder: Path) -> Path:
    """Writes a recording; returns what to open."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in seed.files.items():
        (folder / name).write_bytes(content)
    return folder / seed.target if seed.target else folder


def one(start: int, number: int, keep: Path | None = None, match: str = "") -> tuple[str, str]:
    """Runs one input in this process; its files stay in `keep`."""
    with tempfile.TemporaryDirectory() as folder:
        return outcome(place(mutated(collect(match), start, number), keep or Path(folder) / "input"))


def worker(start: int, first: int, stop: int, stride: int, plant: str = "", match: str = "") -> None:
    """Prints a JSON line before and after each input first, first + stride, … < stop.

    `plant` makes the third input abort, hang, or hold on to memory, so that the watch can be tested.
    """
    seeds = collect(match)
    process = psutil.Process()
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base) as root:
        for number, seed in enumerate(seeds):  # compiles, imports, and shows that the seeds themselves are sound
            kind, text = outcome(place(seed, Path(root) / f"seed{number}"))
            if kind != "events":
                print(json.dumps({"seed": seed.name, "text": text}), flush=True)
                return
        limit = process.memory_info().vms + _ADDRESS
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        settled, hoard = None, []
        for count, number in enumerate(range(first, stop, stride)):
            print(json.dumps({"begin": number}), flush=True)
            if plant and count == 2:
                {"abort": os.abort, "hang": lambda: time.sleep(1e6), "leak": lambda: None}[plant]()
            if plant == "leak":
                hoard.append(bytearray(os.urandom(1 << 20)))
            seed = mutated(seeds, start, number)
            # A folder each: a reader that keeps files open must not see the next input.
            path = place(seed, Path(root) / str(number))
            before, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            kind, text = outcome(path)
            used = time.process_time() - before
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
            for name in seed.files:
                (Path(root) / str(number) / name).unlink()
            (Path(root) / str(number)).rmdir()
            if kind != "FAILURE" and used > _CPU_SECONDS:
                kind, text = "FAILURE", f"took {used:.1f} s"
            if kind != "FAILURE" and grown > _PEAK:
                kind, text = "FAILURE", f"took {grown >> 20} MiB of memory"
            if count >= _WARM:
                now = process.memory_info().rss
                settled = now if settled is None else settled
                if now - settled > _GROWTH:
                    kind, text, settled = (
                        "FAILURE",
                        f"memory grew by {now - settled >> 20} MiB since input {_WARM}",
                        now,
                    )
            print(json.dumps({"end": number, "name": seed.name, "kind": kind, "text": text}), flush=True)


class _Worker:
    """A worker process and the input it is at."""

    def __init__(self, start: int, first: int, stop: int, stride: int, plant: str, match: str):
        command = [sys.executable, "-m", "tests.fuzz", "--worker", f"{first},{stop},{stride}", "--seed", str(start)]
        command += ["--match", match] if match else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.plan = start, stop, stride, match
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [*command, *(["--plant", plant] if plant else [])],
            cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        os.set_blocking(self.process.stdout.fileno(), False)
        self.at, self.heard, self.rest = None, time.monotonic(), b""

    def lines(self) -> list[dict]:
        self.rest += self.process.stdout.read() or b""
        *full, self.rest = self.rest.split(b"\n")
        if full:
            self.heard = time.monotonic()
        return [json.loads(line) for line in full]

    def tail(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-1500:].decode(errors="replace")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def fuzz(
    inputs: int, *, seed: int = 0, workers: int = 2, plant: str = "", silent: float = _SILENT_SECONDS, match: str = ""
) -> Report:
    """Runs inputs 0, …, inputs − 1 of a seed over worker processes.

    Args:
        inputs: how many.
        seed: decides all mutations.
        workers: processes.
        plant: a fault for the first worker to have, for testing.
        silent: seconds without a word after which a worker counts as hanging.
        match: only recordings whose name contains this.

    Returns:
        The outcomes by format and kind, and the failures by the input's number (-1: a seed is not read).
    """
    report, begin = Report(), time.monotonic()
    running = [_Worker(seed, first, inputs, workers, plant if first == 0 else "", match) for first in range(workers)]
    try:
        while running:
            with selectors.DefaultSelector() as selector:
                for one_worker in running:
                    selector.register(one_worker.process.stdout, selectors.EVENT_READ)
                selector.select(timeout=1.0)
            running = [after for before in running if (after := _step(before, report, silent)) is not None]
    finally:
        for one_worker in running:
            one_worker.end()
    report.seconds = time.monotonic() - begin
    return report


def _step(one_worker: _Worker, report: Report, silent: float) -> _Worker | None:
    """Takes a worker's news; returns it, a successor behind a crash or hang, or None when all is done."""
    ended = one_worker.process.poll() is not None
    for line in one_worker.lines():
        if "seed" in line:
            report.failures[-1] = f"the sound recording {line['seed']} is not read: {line['text']}"
        elif "begin" in line:
            one_worker.at = line["begin"]
        else:
            one_worker.at = None
            report.outcomes[line["name"], line["kind"]] += 1
            if line["kind"] == "FAILURE":
                report.failures[line["end"]] = f"{line['name']}: {line['text']}"
    patience = silent if one_worker.at is not None else _START_SECONDS
    hangs = time.monotonic() - one_worker.heard > patience
    if not ended and not hangs:
        return one_worker
    one_worker.end()
    start, stop, stride, match = one_worker.plan
    if one_worker.at is not None:
        how = f"no answer in {patience:.0f} s" if hangs else f"the process died ({one_worker.process.returncode})"
        report.failures[one_worker.at] = f"{how}\n{one_worker.tail()}"
        after = one_worker.at + stride
        return _Worker(start, after, stop, stride, "", match) if after < stop else None
    if -1 not in report.failures and (one_worker.process.returncode != 0 or hangs):
        report.failures[-1] = f"a worker did not start or end well\n{one_worker.tail()}"
    return None
