"""Work in a second process, beside the one that asks for it: small models use two cores badly, one each well."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Beside:
    """A process that does what it is given, one thing after the other, each with half of the cores.

    On a machine with a GPU or a single core it is not started: what is given runs at once, in this process.

    Args:
        log: file that takes what the other process prints.
    """

    def __init__(self, log: Path):
        self._log = log
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pool: ProcessPoolExecutor | None = None

    @property
    def log(self) -> Path | None:
        """Where the other process prints; None while there is none."""
        return self._log if self._pool is not None else None

    @contextmanager
    def started(self) -> Iterator[Beside]:
        """Gives half of the cores away while the context is open."""
        if self._cores < 2 or torch.cuda.is_available():
            yield self
            return
        before, share = torch.get_num_threads(), self._cores // 2
        # spawn: a fork would inherit threads' locks.
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_settle, initargs=(str(self._log), share, os.getpid())
        )
        torch.set_num_threads(self._cores - share)
        try:
            yield self
        except BaseException:
            # What was given last may take minutes yet; nobody waits for it now.
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            torch.set_num_threads(before)

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Starts `function(*args)`, which the other process must be able to unpickle, as its result this one."""
        if self._pool is not None:
            return self._pool.submit(function, *args)
        done: Future[T] = Future()
        done.set_result(function(*args))
        return done

    def result(self, future: Future[T]) -> T:
        """What it returned, or its error.

        Raises:
            RuntimeError: the process ended, with the end of what it printed.
        """
        try:
            return future.result()
        except BrokenProcessPool:
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:]) if self._log.exists() else ""
            raise RuntimeError(f"the demo's second process was ended; the last lines of {self._log}:\n{last}") from None


def _settle(log: str, threads: int, parent: int) -> None:
    """Makes this process one that prints into `log`, takes its share of cores, and ends when its parent has."""
    stream = open(log, "a", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    torch.set_num_threads(threads)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
