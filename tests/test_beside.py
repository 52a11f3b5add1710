"""The demo's second process: results and errors come back, its death is told with what it printed last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gep.demo.beside import Beside


def told(value: int) -> tuple[int, int, int]:
    print(f"told {value}")
    return value, os.getpid(), torch.get_num_threads()


def refused() -> None:
    raise ValueError("no such digit")


def killed() -> None:
    print("the last words", flush=True)
    os._exit(3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="beside a GPU there is no second process")
def test_two_processes_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    threads = torch.get_num_threads()
    with Beside(tmp_path / "log").started() as beside:
        assert torch.get_num_threads() == 2
        first, second = beside.submit(told, 5), beside.submit(refused)
        value, process, others = beside.result(first)
        assert value == 5 and process != os.getpid() and others == 1
        with pytest.raises(ValueError, match="no such digit"):
            beside.result(second)
        assert "told 5" in (tmp_path / "log").read_text()
        with pytest.raises(RuntimeError, match="the last words"):
            beside.result(beside.submit(killed))
    assert torch.get_num_threads() == threads


def test_one_core_does_one_thing_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with Beside(tmp_path / "log").started() as beside:
        assert beside.log is None and beside.result(beside.submit(told, 7))[:2] == (7, os.getpid())
