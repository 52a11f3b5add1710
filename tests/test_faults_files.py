"""What the mends of `make faults` rest on: checkpoints' checksums, pruning, the run's lock, folders put in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

from gep import checkpoint_files, folder_swap, run_lock
from gep.checkpoint import find, prepare_run_dir
from gep.checkpoint_files import CheckpointError, check, mark_complete, prune, write_whole
from gep.engine import TrainConfig, fit, make_accelerator
from gep.optim import OptimConfig

HELD = """
import sys
from pathlib import Path
from gep import run_lock
try:
    run_lock.claim(Path(sys.argv[1]))
except ValueError as error:
    print(error)
else:
    print("free")
"""


@dataclass(frozen=True)
class SimpleConfig:
    train: TrainConfig


def made(run: Path, *steps: int) -> list[Path]:
    folders = [run / "checkpoints" / f"step_{step:06d}" for step in steps]
    for folder in folders:
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "weights").write_bytes(bytes(range(256)) * 9)
        mark_complete(folder)
    return folders


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    (folder,) = made(tmp_path, 3)
    check(folder)
    weights = folder / "sub" / "weights"
    whole = weights.read_bytes()
    for place in (0, 1000, len(whole) - 1):
        weights.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="sub/weights is damaged: its CRC-32"):
            check(folder)
        check(folder, content=False)  # ranks other than the main one leave the reading to it


def test_a_marker_without_checksums_still_counts(tmp_path: Path) -> None:
    (folder,) = made(tmp_path, 3)
    (folder / "complete").write_text(json.dumps({"sub/weights": 2304}))
    check(folder)
    (folder / "complete").write_text(json.dumps({"sub/weights": 2303}))
    with pytest.raises(CheckpointError, match="has 2304 bytes, not 2303"):
        check(folder)


@pytest.mark.parametrize("keep, left", [(1, [5]), (2, [4, 5]), (0, [2, 4, 5])])
def test_checkpoints_that_could_not_be_loaded_do_not_displace_sound_ones(
    tmp_path: Path, keep: int, left: list[int]
) -> None:
    # The run fell back to 4, since 8 is damaged, and saved 5 when it was asked to stop.
    made(tmp_path, 2, 4, 8, 5)
    prune(tmp_path, 5, keep)
    assert names(tmp_path) == [f"step_{step:06d}" for step in left]
    assert find(tmp_path)[0].name == "step_000005"


def test_a_small_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "inputs.json"
    write_whole(path, "{}")

    def dies(*_: object) -> None:
        raise OSError("no more")

    monkeypatch.setattr(checkpoint_files.os, "replace", dies)
    with pytest.raises(OSError, match="no more"):
        write_whole(path, '{"a": "much longer"}')
    assert path.read_text() == "{}"


def test_a_run_folder_has_one_process_until_it_is_let_go(tmp_path: Path) -> None:
    def other() -> str:
        done = subprocess.run([sys.executable, "-c", HELD, str(tmp_path)], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    run_lock.claim(tmp_path)
    run_lock.claim(tmp_path / ".." / tmp_path.name)  # this process has it already
    told = other()
    assert f"process {os.getpid()} on" in told and "choose another run folder" in told
    run_lock.release(tmp_path)
    run_lock.release(tmp_path)
    assert other() == "free"
    run_lock.claim(tmp_path)  # the other one has ended
    run_lock.release(tmp_path)


def test_a_run_that_is_refused_lets_go_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    train, optim = TrainConfig(steps=1, resume="never", progress=False), OptimConfig()
    accelerator = make_accelerator(train, tmp_path)
    for refused in (
        lambda: prepare_run_dir(tmp_path, SimpleConfig(train=train)),
        lambda: fit(nn.Linear(2, 2), iter, train=train, optim=optim, accelerator=accelerator, run_dir=tmp_path),
    ):
        with pytest.raises(ValueError, match="already holds a run"):
            refused()
        assert tmp_path.resolve() not in run_lock._held


def filled(folder: Path, word: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a").write_text(word)
    return folder


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_anothers_place(tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr(folder_swap, "_exchange", lambda one, two: False)
    folder = tmp_path / "export"
    for word in ("one", "two"):
        new = filled(folder_swap.beside(folder), word)
        folder_swap.swap(new, folder)
        assert (folder / "a").read_text() == word
    assert [path.name for path in tmp_path.iterdir() if path != new] == ["export"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the call")
def test_the_exchange_is_one_step(tmp_path: Path) -> None:
    one, two = filled(tmp_path / "one", "1"), filled(tmp_path / "two", "2")
    assert folder_swap._exchange(one, two)
    assert (one / "a").read_text() == "2" and (two / "a").read_text() == "1"
    assert not folder_swap._exchange(one, tmp_path / "three")


def test_what_a_killed_export_left_is_put_right(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host, here = os.uname().nodename, tmp_path
    old = filled(here / f".ex[1].old-{host}-{ended.pid}-x", "the old one")
    new = filled(here / f".ex[1].new-{host}-{ended.pid}-x", "half")
    alive = filled(here / f".ex[1].new-{host}-{os.getpid()}-x", "another export on its way")
    elsewhere = filled(here / ".ex[1].new-else-1-x", "of another machine")
    made = folder_swap.beside(here / "ex[1]")
    assert (here / "ex[1]" / "a").read_text() == "the old one"
    assert not old.exists() and not new.exists() and alive.exists() and elsewhere.exists() and made.is_dir()
