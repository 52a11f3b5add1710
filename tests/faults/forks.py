"""Jobs as forks of a process that has imported everything: a run costs its own time only, and can be killed anywhere.

The process that forks must have one thread, so that no lock is held by a thread that the fork does not have.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gep import config

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Kill:
    """When a job gets its SIGKILL."""

    change: int = 0
    """just before its n-th change of a file or folder, counted from 1; 0 = at no change"""
    within: str = ""
    """only changes of paths that contain this"""
    delay_s: float = 0.0
    """so long after that change, or after the start where there is none [s]"""


@dataclass
class Job:
    """A running fork."""

    process: int
    log: Path
    news: int
    """Read end of a pipe: one byte a change while counting, or one at the change that the kill waits for."""
    begun: float = field(default_factory=time.monotonic)

    def wait(self, timeout: float = 300.0) -> int:
        """Exit status as subprocess gives it; −9 for a kill.

        Raises:
            TimeoutError: it hangs; it is then killed.
        """
        while time.monotonic() < self.begun + timeout:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                os.close(self.news)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.news)
        raise TimeoutError(f"no end after {timeout:.0f} s: {self.text()[-1500:]}")

    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")


def start(job: Callable[[], object], folder: Path, log: Path, kill: Kill | None = None, **environment: str) -> Job:
    """Runs `job` in a fork, in `folder`; a user's error ends it with code 2, as on the command line."""
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        os.close(writing)
        return Job(process, log, reading)
    code = 70
    try:
        os.close(reading)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(environment)
        os.chdir(folder)
        sys.addaudithook(_hook(os.getpid(), kill or Kill(), writing))
        config.run_cli(job)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: Callable[[], object], folder: Path, log: Path, kill: Kill | None = None) -> tuple[int, int]:
    """Runs a job to its end or its kill: (exit status, changes counted; meaningful without a kill)."""
    started, changes = start(job, folder, log, kill), 0
    if kill is not None and kill.delay_s:
        if kill.change:
            select.select([started.news], [], [], 60.0)
        time.sleep(kill.delay_s)
        try:
            os.kill(started.process, signal.SIGKILL)
        except ProcessLookupError:  # not reached: it is a zombie until it is waited for
            pass
    elif kill is None:
        while read := os.read(started.news, 1 << 16):
            changes += len(read)
    return started.wait(), changes


def count(job: Callable[[], object], folder: Path, log: Path, within: str) -> tuple[int, int, float]:
    """Runs a job undisturbed: exit status, changes of paths that contain `within`, and seconds."""
    begun = time.monotonic()
    started, changes = start(job, folder, log, Kill(within=within)), 0
    while read := os.read(started.news, 1 << 16):
        changes += len(read)
    return started.wait(), changes, time.monotonic() - begun


def _hook(process: int, kill: Kill, news: int) -> Callable[[str, tuple], None]:
    """An audit hook that counts changes of files and acts at the one that it was told."""
    seen = 0

    def hook(event: str, given: tuple) -> None:
        nonlocal seen
        if event not in _CHANGES and not (event == "open" and (given[2] or 0) & _WRITES):
            return
        # A descriptor in place of a path was opened before, which counted.
        path = "" if isinstance(given[0], int) else os.fsdecode(given[0])
        if os.getpid() != process or not path or kill.within not in path or path.startswith(("/dev/null", "/proc/")):
            return
        seen += 1
        if kill.change == 0:
            os.write(news, b".")
        elif seen == kill.change and kill.delay_s == 0:
            os.kill(process, signal.SIGKILL)
        elif seen == kill.change:
            os.write(news, b".")

    return hook
