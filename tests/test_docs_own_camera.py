"""docs/OWN_CAMERA.md: its training commands run as typed, on a tiny folder with nano models."""

from __future__ import annotations

import json
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stage1_align.run as stage1
import stage2_autoregress.run as stage2
from gep.events.io import write_arrow
from gep.hub import GEPModel
from gep.models.teacher import ImageModel
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
        if program != "accelerate":
            continue
        script, *arguments = words[1:]
        arguments = [str(ROOT / item) if item.startswith("configs/") else item for item in arguments]
        first = script == "stage1_align/run.py"
        arguments += [*QUICK, "train.progress=false", "teacher.name=export:teacher", *(SMALL if first else [])]
        arguments += [] if first else ["backbone.preset=nano", "data.min_events=1"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metrics = MAIN[script](arguments)
        assert metrics["step"] == 2, command.text
        run = next(item.removeprefix("run=") for item in arguments if item.startswith("run="))
        config = json.loads((tmp_path / run / "export" / "config.json").read_text())
        assert (config["backbone"] is None) == first
        ran.append(run)
    assert [Path(run).name for run in ran] == ["stage1", "stage1_images", "stage1_both", "stage2", "stage2_events"]
    model = GEPModel.from_pretrained(tmp_path / "runs" / "own" / "stage2" / "export")
    events = random_events(0, 2000, 300_000, 36, 36)
    assert model.predict(events).image.shape == (1, 4, 36, 96)
