"""README's ten lines run as printed, on an export and a recording made here."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gep.data.config import DataConfig
from gep.events.io.bin import write_bin
from gep.events.represent import Histogram
from gep.events.types import Events
from gep.hub import GEPModel
from gep.models.backbone import Backbone
from gep.models.encoder import EventEncoder
from gep.models.teacher import FrozenVFM, ImageModel

ROOT = Path(__file__).resolve().parent.parent


def test_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"runs this block -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = block.group(1)
    assert len(code.strip().splitlines()) <= 12
    torch.manual_seed(0)
    teacher = ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}, list("0123456789"))
    frozen = FrozenVFM.from_spec(f"export:{teacher.save(tmp_path / 'teacher')}")
    encoder = EventEncoder("nano", in_chans=2, img_size=(36, 36), head_dim=96)
    model = GEPModel.from_parts(encoder, Histogram(), DataConfig(), teacher=frozen)
    model.backbone = Backbone(96, 32, 1, 2)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("runs/demo/stage2/export")
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(0, 300_000, 900))
    events = Events.from_arrays(t, *rng.integers(0, 34, (2, 900)), rng.integers(0, 2, 900), height=34, width=34)
    write_bin("recording.bin", events)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    ends = [int(t[0]) + 50_000 * k for k in range(1, 7)]
    assert lines[0] == f"torch.Size([1, 6, 36, 96]) {ends}"
    assert lines[1] == "torch.Size([1, 6, 36, 96])" and lines[2] in "0123456789"


def test_commands_name_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for name in re.findall(
        r"(?:configs|stage1_align|stage2_autoregress|downstream|docs)/[\w/]+\.(?:yaml|py|md|png)", text
    ):
        assert (ROOT / name).exists(), f"README names {name}"
    for target in re.findall(r"make (\w+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
