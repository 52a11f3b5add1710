"""Shards worked on by several processes: stopped by Ctrl-C after the sample at hand, ended with the main process."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any

from gep.distributed import ignore_signals

Job = Callable[[int, Callable[[], object]], None]
"""(shard, tick) -> None; calls tick after each sample, and stops where that raises."""

_job: Job
_stop: Any
_count: Any


class _Stopped(Exception):
    pass


def run(job: Job, shards: list[int], workers: int, advance: Callable[[int], object]) -> None:
    """Does every shard's job.

    Args:
        job: pickles; whatever it raises ends the others too and is raised here.
        shards: their numbers.
        workers: processes; 1 works in this one.
        advance: told how many samples are done since the last call.
    """
    if workers <= 1 or len(shards) <= 1:
        for shard in shards:
            job(shard, lambda: advance(1))
        return
    context = multiprocessing.get_context("spawn")  # a fork would take half of torch's and Arrow's threads along
    stop, count, seen = context.Event(), context.Value("q", 0), 0
    with ProcessPoolExecutor(
        min(workers, len(shards)), mp_context=context, initializer=_start, initargs=(job, stop, count)
    ) as pool:
        try:
            pending = {pool.submit(_one, shard) for shard in shards}
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                now = count.value
                advance(now - seen)
                seen = now
                for future in finished:
                    future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start(job: Job, stop: Any, count: Any) -> None:
    global _job, _stop, _count
    ignore_signals(0)  # Ctrl-C reaches the whole group; the main process says when to stop
    _job, _stop, _count = job, stop, count
    # A killed main process must not leave workers behind that wait for it for ever.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _one(shard: int) -> None:
    _job(shard, _tick)


def _tick() -> None:
    if _stop.is_set():
        raise _Stopped
    with _count.get_lock():
        _count.value += 1
