"""docs/SCALE.md: two nodes, tried as two launches over loopback, train like one process."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import stage1_align.run as stage1
from tests import workers
from tests.test_docs_commands import commands_of
from tests.test_launch import arguments, losses, root

ROOT = Path(__file__).resolve().parent.parent
__all__ = ["root"]  # a fixture


def nodes() -> list[list[str]]:
    """The page's two commands over loopback, up to the program's own arguments."""
    found = [shlex.split(each.text) for each in commands_of(ROOT / "docs" / "SCALE.md") if "127.0.0.1" in each.text]
    return [words[: words.index("stage1_align/run.py") + 1] for words in found]


@pytest.mark.slow
def test_two_nodes_over_loopback_give_one_process_its_losses(root: Path, tmp_path: Path) -> None:
    stage1.main(arguments(root, tmp_path / "one", "stage1", "train.steps=4"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    commands = nodes()
    assert [words[words.index("--machine_rank") + 1] for words in commands] == ["0", "1"]
    processes = []
    environment = workers.environment(CUDA_VISIBLE_DEVICES="")
    del environment["ACCELERATE_USE_CPU"]  # as a user types it
    for words in commands:
        words[words.index("--main_process_port") + 1] = port
        command = [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
        command += arguments(root, tmp_path / "two", "stage1", "train.steps=4")
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    printed = workers.finish(processes, timeout=240)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-2000:] for text in printed)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
    # Both nodes were of one group: a checkpoint holds the meters of two ranks, and says so.
    (checkpoint,) = (tmp_path / "two" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "trainer.json").read_text())["world_size"] == 2
    assert {path.name for path in checkpoint.glob("meters_*.json")} == {"meters_0.json", "meters_1.json"}
