"""Faults other than a kill of the whole run: each check does the damage, and asserts what the user sees and keeps."""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
from safetensors.torch import load_file

from gep import checkpoint
from tests.faults import forks, jobs
from tests.faults.kills import contents
from tests.workers import toy_run

_LIMIT = 8_000  # bytes of a file; what these jobs write in words is smaller, what they write in numbers larger
_WRITERS = {
    "stage 1": jobs.train,
    "export": jobs.export_again,
    "shards": jobs.shard,
    "teacher cache": jobs.cache_tokens,
    "data.cache_dir": jobs.cache_recordings,
    "token packing": jobs.pack_tokens,
}
Check = Callable[[Path, Path], None]
"""(world, an empty folder) -> None; AssertionError where something is not as it should be."""


def _end(job: Callable[[], object], folder: Path, code: int, *words: str) -> str:
    """Runs a job that has to end with this exit status, having said these words; what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    log.unlink(missing_ok=True)
    status, _ = forks.run(job, folder, log)
    return _said(log, status, code, *words)


def _said(log: Path, status: int, code: int, *words: str) -> str:
    text = log.read_text(errors="replace")
    assert status == code, f"exit status {status}, not {code}: {text[-1500:]}"
    for word in words:
        assert word in text, f"{word!r} was not said: {text[-1500:]}"
    assert code != 2 or "Traceback" not in text, text[-3000:]
    return text


def _same(folder: Path, whole: Path) -> None:
    one, two = contents(folder), contents(whole)
    differing = sorted(name for name in {*one, *two} if one.get(name) != two.get(name))
    assert not differing, f"{', '.join(differing[:5])} differ from those of an undisturbed run"


def _full_disk(write: Callable[[Path], object], world: Path, folder: Path) -> None:
    def on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT, resource.RLIM_INFINITY))
        write(world)

    if write is jobs.export_again:
        (folder / "cut").mkdir()
        _end(lambda: jobs.model(1).save_pretrained("out"), folder / "cut", 0)
        (folder / "cut" / "made").touch()
    before = contents(folder / "cut") if (folder / "cut").exists() else {}
    _end(on_a_full_disk, folder / "cut", 2, "error: ", "large")
    after = contents(folder / "cut")
    assert all(after.get(name) == content for name, content in before.items()), "what was there has changed"
    _end(partial(write, world), folder / "cut", 0)
    _end(partial(write, world), folder / "whole", 0)
    _same(folder / "cut", folder / "whole")


def _read_only(write: Callable[[Path], object], world: Path, folder: Path) -> None:
    def without_rights() -> None:
        # Root may write anywhere: give its capabilities up, as an ordinary user has none.
        head, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(head, none) == 0
        write(world)

    closed = folder / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    _end(without_rights, closed, 2, "error: ", "Permission denied")
    closed.chmod(0o755)
    assert not list(closed.iterdir())


def _damaged(damage: str, world: Path, folder: Path) -> None:
    """The newest of three checkpoints is damaged: the run goes on from the one before, and says so."""
    whole, cut = folder / "whole", folder / "cut"
    keep = partial(jobs.train, world, "train.keep_checkpoints=0")
    _end(keep, whole, 0)
    shutil.copytree(whole, cut)
    newest = checkpoint.find(cut / "run")[0]
    largest = max((path for path in newest.iterdir()), key=lambda path: path.stat().st_size)
    if damage == "truncated":
        os.truncate(largest, largest.stat().st_size // 2)
    elif damage == "missing file":
        (newest / "random_states_0.pkl").unlink()
    elif damage == "flipped bit":
        content = bytearray(largest.read_bytes())
        content[random.Random(1).randrange(len(content) // 2, len(content))] ^= 16
        largest.write_bytes(content)
    else:
        (newest / "complete").write_text("")
    _end(keep, cut, 0, f"{newest.name} cannot be loaded", "taking the one before", "resuming after step 4")
    _same(cut, whole)


def _worker_killed(world: Path, folder: Path) -> None:
    job = partial(jobs.train, world, "train.num_workers=2", "train.steps=4000", "train.save_every=1")
    cut, log = folder / "cut", folder / "cut.log"
    cut.mkdir()
    started = forks.start(job, cut, log)
    _await(lambda: len(checkpoint.find(cut / "run")) > 0, started)
    begun = time.monotonic()
    psutil.Process(started.process).children()[0].kill()
    status = started.wait(60)
    assert time.monotonic() - begun < 30, "it took long to notice"
    assert status not in (0, -9) and "worker" in log.read_text(), log.read_text()[-1500:]
    assert checkpoint.find(cut / "run"), "the checkpoints are gone"


def _rank_killed(world: Path, folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
    job = partial(toy_run.main, ["run_dir=run", "delay=0.02", "train.steps=5000", "train.save_every=5"])
    ranks = [
        forks.start(job, folder, folder / f"rank{rank}.log", RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(2)
    ]
    _await(lambda: len(checkpoint.find(folder / "run")) > 0, ranks[0])
    os.kill(ranks[1].process, signal.SIGKILL)
    assert ranks[1].wait() == -9
    begun = time.monotonic()
    status = ranks[0].wait(90)
    assert status not in (0, -9) and time.monotonic() - begun < 60, ranks[0].text()[-1500:]
    assert checkpoint.find(folder / "run"), "the checkpoints are gone"


def _one_folder(world: Path, folder: Path) -> None:
    """A second run is refused, and the first one does not notice."""
    first = partial(toy_run.main, ["run_dir=run", "delay=0.02", "train.steps=60", "train.save_every=5"])
    second = partial(toy_run.main, ["run_dir=run", "train.steps=60", "train.save_every=7", "delay=0.0"])
    cut = folder / "cut"
    cut.mkdir()
    started = forks.start(first, cut, folder / "first.log")
    _await(lambda: (cut / "run" / "config.yaml").exists(), started)
    before = (cut / "run" / "config.yaml").read_bytes()
    log = folder / "second.log"
    status, _ = forks.run(second, cut, log)
    _said(log, status, 2, "another run is working there", str(started.process))
    assert (cut / "run" / "config.yaml").read_bytes() == before
    assert started.wait() == 0, started.text()[-1500:]
    _end(first, folder / "whole", 0)
    _same(cut, folder / "whole")


def _clock_back(world: Path, folder: Path) -> None:
    """Checkpoints and logs from the future, and a clock that runs backwards: the newest is still the last step's."""
    more = ["run_dir=run", "train.steps=12", "train.save_every=2", "train.keep_checkpoints=0", "train.log_every=1"]
    _end(partial(toy_run.main, more), folder / "whole", 0)
    cut, log = folder / "cut", folder / "cut.log"
    cut.mkdir()
    status, _ = forks.run(partial(toy_run.main, more), cut, log, forks.Kill(change=1, within="step_000010"))
    assert status == -9
    for number, path in enumerate(sorted((cut / "run").rglob("*"), reverse=True)):
        os.utime(path, (time.time() + 1e6 * (number + 1),) * 2)

    def backwards() -> None:
        now = iter(range(2_000_000_000, 0, -1000))
        time.time = lambda: float(next(now))
        toy_run.main(more)

    text = _end(backwards, cut, 0, "resuming after step 8")
    assert "-" not in "".join(line.split(",")[-1] for line in text.splitlines() if line.endswith("left")), text
    _same(cut, folder / "whole")
    rates = [json.loads(line) for line in (cut / "run" / "speed.jsonl").read_text().splitlines()]
    assert all(rate["seconds"] >= 0 and rate["samples_per_s"] > 0 for rate in rates)


def _not_finite(where: str, world: Path, folder: Path) -> None:
    more = ["run_dir=run", "train.steps=20", "train.save_every=2", "train.log_every=1"]

    def poisoned() -> None:
        if where == "data":
            toy_run.main([*more, "nan_step=8"])
            return
        make, passes = toy_run.Regression, 0

        def poison(gradient):
            nonlocal passes
            passes += 1
            return gradient * (float("nan") if passes == 8 else 1.0)

        def with_a_hook(*given):
            task = make(*given)
            task.net[0].weight.register_hook(poison)
            return task

        toy_run.Regression = with_a_hook
        toy_run.main(more)

    what = "loss" if where == "data" else "gradient norm"
    _end(poisoned, folder / "cut", 2, f"non-finite {what} at step 8", "s7_0")
    found = checkpoint.find(folder / "cut" / "run")
    assert found[0].name == "step_000006"
    for one in found:
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(one / "model.safetensors").values())
    steps = [json.loads(line)["step"] for line in (folder / "cut/run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 8))


def _await(condition: Callable[[], bool], job: forks.Job) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, job.text()[-1500:]
        assert os.waitpid(job.process, os.WNOHANG)[0] == 0, job.text()[-1500:]
        time.sleep(0.01)


CHECKS: dict[str, Check] = {
    **{f"disk full: {name}": partial(_full_disk, job) for name, job in _WRITERS.items()},
    **{f"read-only: {name}": partial(_read_only, job) for name, job in _WRITERS.items()},
    **{
        f"checkpoint: {kind}": partial(_damaged, kind)
        for kind in ("truncated", "missing file", "flipped bit", "empty marker")
    },
    "data worker killed": _worker_killed,
    "rank killed": _rank_killed,
    "two runs, one folder": _one_folder,
    "clock set back": _clock_back,
    "NaN in data": partial(_not_finite, "data"),
    "NaN in gradients": partial(_not_finite, "gradients"),
}
