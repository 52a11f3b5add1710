"""docs/OWN_CAMERA.md: its commands run as typed, on tiny folders with nano models."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import downstream.recognition.run as recognition
import stage1_align.run as stage1
import stage2_autoregress.run as stage2
from gep import cli, config
from gep.data.config import DataConfig
from gep.events.io import write_arrow
from gep.events.represent import Histogram
from gep.hub import GEPModel
from gep.models import Backbone, EventEncoder
from gep.models.teacher import ImageModel
from stage1_align.task import Stage1Config
from stage2_autoregress.task import Stage2Config
from tests.layouts import random_events, save, write_text
from tests.test_docs_commands import commands_of

ROOT = Path(__file__).resolve().parent.parent
MAIN = {"stage1_align/run.py": stage1.main, "stage2_autoregress/run.py": stage2.main}
QUICK = ["train.steps=2", "train.batch_size=4", "train.num_workers=0", "train.save_every=0", "train.eval_every=0"]
SMALL = ["encoder.preset=nano", "data.height=36", "data.width=36"]


def write_own(
    root: Path, *, recordings: int, pictures: int, size: tuple[int, int], images: bool = True, depth: bool = False
) -> None:
    """Recordings in folders of their own, a picture (and a depth map) every 50 ms."""
    rng = np.random.default_rng(1)
    for number in range(recordings):
        home = root / f"walk_{number:02d}"
        home.mkdir(parents=True)
        times = 1_000_000 + 50_000 * np.arange(pictures)
        events = random_events(number, 200 * pictures, 50_000 * pictures, *size, start=950_000)
        write_arrow(home / "events.arrow", events)
        for name, wanted in (("images", images), ("depth", depth)):
            for place in range(pictures if wanted else 0):
                if name == "images":
                    save(home / name / f"{place:06d}.png", rng.integers(0, 255, (*size, 3), dtype=np.uint8))
                else:
                    (home / name).mkdir(exist_ok=True)
                    np.save(home / name / f"{place:06d}.npy", rng.uniform(1, 6, size).astype(np.float32))
        if images:
            write_text(home / "images" / "timestamps.txt", times.tolist())


def write_classes(root: Path) -> None:
    """Two classes of five recordings: one with many events, one with few."""
    for number in range(10):
        name, count = (("many", 3000), ("few", 300))[number % 2]
        (root / name).mkdir(parents=True, exist_ok=True)
        write_arrow(root / name / f"{number}.arrow", random_events(number, count, 300_000, 34, 34))


def test_the_shortest_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From an exported encoder and a folder a class to a table, and to the model in another process."""
    write_classes(tmp_path / "CLASSES")
    torch.manual_seed(0)
    encoder = EventEncoder("nano", in_chans=2, img_size=(36, 36))
    model = GEPModel.from_parts(encoder, Histogram(), DataConfig())
    model.backbone = Backbone(96, 32, 1, 2)
    model.save_pretrained(tmp_path / "runs" / "demo" / "stage2" / "export")
    write_arrow(tmp_path / "recording.arrow", random_events(11, 3000, 700_000, 34, 34))
    monkeypatch.chdir(tmp_path)
    section = section_of("The shortest path")
    for command in commands_of(ROOT / "docs" / "OWN_CAMERA.md"):
        if command.text not in section.replace("\\\n    ", ""):
            continue
        program, *words = shlex.split(command.text.replace("recording.raw", "recording.arrow"))
        if program == "accelerate":
            recognition.main([absolute(word) for word in words[2:]] + [*QUICK, "train.progress=false"])
        elif words[0] != "export" or importlib.util.find_spec("onnx"):
            cli.main(words)
    printed = capsys.readouterr().out
    assert "data.name=folder" in printed and "few (5), many (5)" in printed
    assert {"few", "many"} <= set(printed[printed.index("whole") - 60 :].split())
    block = section.split("```python\n")[1].split("```")[0].replace("recording.raw", "recording.arrow")
    done = subprocess.run([sys.executable, "-c", block], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0 and done.stdout.split()[0] in ("few", "many"), done.stderr[-2000:]


def section_of(title: str) -> str:
    """A part of the page, heading left out."""
    return (ROOT / "docs" / "OWN_CAMERA.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]


def absolute(word: str) -> str:
    """A config's place, seen from anywhere."""
    return str(ROOT / word) if word.startswith("configs/") else word


@pytest.mark.slow
def test_the_pages_commands_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    write_own(tmp_path / "DIR", recordings=5, pictures=8, size=(36, 36))
    write_own(tmp_path / "EVENTS", recordings=8, pictures=8, size=(36, 36), images=False)
    (tmp_path / "PHOTOS").mkdir()
    for number in range(12):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "PHOTOS" / f"{number}.png")
    torch.manual_seed(0)
    ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}).save(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in commands_of(ROOT / "docs" / "OWN_CAMERA.md"):
        program, *words = shlex.split(command.text)
        if program != "accelerate" or words[1] not in MAIN:
            continue
        script, *arguments = words[1:]
        arguments = [absolute(item) for item in arguments]
        first = script == "stage1_align/run.py"
        arguments += [*QUICK, "train.progress=false", "teacher.name=export:teacher", *(SMALL if first else [])]
        arguments += [] if first else ["backbone.preset=nano", "data.min_events=1"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metrics = MAIN[script](arguments)
        assert metrics["step"] == 2, command.text
        run = config.load(Stage1Config if first else Stage2Config, arguments).run
        exported = json.loads((tmp_path / run / "export" / "config.json").read_text())
        assert (exported["backbone"] is None) == first
        ran.append(run)
    assert [Path(run).name for run in ran] == ["stage1", "stage1_images", "stage1_both", "stage2", "stage2_events"]
    model = GEPModel.from_pretrained(tmp_path / "runs" / "own" / "stage2" / "export")
    events = random_events(0, 2000, 300_000, 36, 36)
    assert model.predict(events).image.shape == (1, 4, 36, 96)
