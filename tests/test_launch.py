"""The stages through their own command lines, on a tiny N-MNIST of simulated recordings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import stage1_align.run as stage1
import stage2_autoregress.run as stage2
from gep.config import ConfigError
from gep.demo.digits import Digits
from gep.demo.recordings import simulate_digits
from gep.guards import NonFiniteError
from gep.hub import GEPModel
from gep.models.teacher import ImageModel

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 recordings of random strokes with their images, and a random teacher in `teacher/`."""
    rng = np.random.default_rng(0)
    images = np.zeros((40, 28, 28), np.uint8)
    for image in images:
        x, y = rng.integers(6, 18, 2)
        image[y : y + rng.integers(4, 10), x : x + rng.integers(2, 8)] = 255
    labels = np.arange(40) % 10
    folder = tmp_path_factory.mktemp("world") / "nmnist"
    simulate_digits(Digits(images, labels, np.arange(40) // 10), folder, split="train", copies=1, seed=0)
    torch.manual_seed(0)
    model = ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}, list("0123456789"))
    model.save(folder.parent / "teacher")
    return folder


def arguments(root: Path, run: Path, stage: str = "stage1", *more: str) -> list[str]:
    return [
        str(ROOT / "configs" / stage / "nmnist.yaml"),
        f"run={run}",
        f"data.root={root}",
        "data.holdout=0.2",
        f"teacher.name=export:{root.parent / 'teacher'}",
        "train.steps=6",
        "train.batch_size=8",
        "train.log_every=1",
        "train.progress=false",
        *more,
    ]


def launch(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def losses(run: Path) -> list[float]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_both_stages_train_export_and_resume(root: Path, tmp_path: Path) -> None:
    first = stage1.main(arguments(root, tmp_path / "one"))
    assert {"eval/event_to_image_r1", "eval/image_to_event_r5", "eval/token_cosine", "eval/zero_shot"} <= set(first)
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0]
    second = stage2.main(arguments(root, tmp_path / "two", "stage2", f"model={tmp_path / 'one' / 'export'}"))
    assert {"eval/loss", "eval/copy_previous", "eval/mean_token", "eval/predicted_image_r1"} <= set(second)
    exported = GEPModel.from_pretrained(tmp_path / "two" / "export")
    encoder = GEPModel.from_pretrained(tmp_path / "one" / "export").encoder
    # Stage 2 leaves the encoder as stage 1 exported it, bit for bit.
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, exported.encoder.state_dict()[name]), name
    # A finished run is not trained again, and gives the same numbers.
    assert stage1.main(arguments(root, tmp_path / "one")) == first
    with pytest.raises(ValueError, match="optim.lr"):
        stage1.main(arguments(root, tmp_path / "one", "stage1", "optim.lr=1e-5"))


def test_two_processes_give_one_process_its_losses(root: Path, tmp_path: Path) -> None:
    """The real objective, contrastive term included, at the same global batch."""
    stage1.main(arguments(root, tmp_path / "one", "stage1", "train.steps=4"))
    done = launch(
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"),
        *("stage1_align/run.py", *arguments(root, tmp_path / "two", "stage1", "train.steps=4")),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
    both = [json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1]) for run in ("one", "two")]
    assert both[1]["eval/token_cosine"] == pytest.approx(both[0]["eval/token_cosine"], abs=1e-4)


def test_killed_and_resumed_equals_uninterrupted(root: Path, tmp_path: Path) -> None:
    more = ("train.steps=12", "train.save_every=2", "optim.warmup_steps=2")
    command = [sys.executable, "stage1_align/run.py"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = launch(*command, *arguments(root, tmp_path / "whole", "stage1", *more))
    assert done.returncode == 0, done.stderr[-2000:]
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, *arguments(root, killed, "stage1", *more)],
        cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not metrics.exists() or len(metrics.read_text().splitlines()) < 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(metrics.read_text().splitlines()) < 12, "the run ended before it could be killed"
    done = launch(*command, *arguments(root, killed, "stage1", *more))
    assert done.returncode == 0 and "resuming after step" in done.stderr, done.stderr[-2000:]
    assert metrics.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_users_mistake_is_one_line_and_exit_code_2(root: Path, tmp_path: Path) -> None:
    done = launch(sys.executable, "stage1_align/run.py", *arguments(root, tmp_path / "x", "stage1", "optim.learning=1"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: unknown key optim.learning in the command line" in done.stderr
    shown = launch(sys.executable, "stage2_autoregress/run.py", "--help")
    assert shown.returncode == 0 and "loss.image" in shown.stdout and "predicted from every event frame" in shown.stdout


@pytest.mark.parametrize(
    "override, error, message",
    [
        ("train.steps=many", ConfigError, "train.steps"),
        ("data.root=/nowhere/at/all", FileNotFoundError, "/nowhere/at/all"),
        ("data.windows=0", ConfigError, "data.windows=0 must be at least 1"),
        ("data.num_events=5", ConfigError, "set one of them to 0"),
        ("train.batch_size=512", ValueError, "more than the"),
        ("teacher.name=export:/nowhere/teacher", FileNotFoundError, "/nowhere/teacher"),
        ("teacher.name=resnet50", ValueError, "timm:<name>"),
        ("represent.name=voxels", ConfigError, "represent.name"),
        ("data.height=37", ValueError, "37"),
    ],
)
def test_mistakes_are_named(root: Path, tmp_path: Path, override: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        stage1.main(arguments(root, tmp_path / "run", "stage1", override))


def test_non_finite_loss_stops_before_the_weights_change(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = stage1.Stage1Task.forward

    def broken(self, batch, context=None, index=0):
        values = features(self, batch, context, index)
        self.calls = getattr(self, "calls", 0) + 1
        return {**values, "loss": values["loss"] * float("nan")} if self.calls == 4 else values

    monkeypatch.setattr(stage1.Stage1Task, "forward", broken)
    with pytest.raises(NonFiniteError, match=r"loss at step 4.*Train/"):
        stage1.main(arguments(root, tmp_path / "run", "stage1", "train.save_every=2"))
    assert len(losses(tmp_path / "run")) == 3
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step_000002"]
