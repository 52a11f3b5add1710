"""What the tests of dense tasks share: tiny random exports, and driving recordings whose events show the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from layouts import save
from layouts_driving import DAVIS

from gep.data.config import DataConfig
from gep.events.represent import Histogram
from gep.hub import GEPModel
from gep.models.backbone import Backbone
from gep.models.encoder import EventEncoder


def write_exports(folder: Path, drop_path: float = 0.0) -> dict[str, Path]:
    """Random exports: "stage1" without and "stage2" with a backbone."""
    torch.manual_seed(0)
    encoder = EventEncoder("nano", in_chans=2, img_size=(36, 36), head_dim=8, drop_path=drop_path)
    model = GEPModel.from_parts(encoder, Histogram(log1p=True), DataConfig(windows=1, window_us=50_000))
    exports = {"stage1": model.save_pretrained(folder / "stage1")}
    model.backbone = Backbone(96, 32, 2, 2)
    exports["stage2"] = model.save_pretrained(folder / "stage2")
    return exports


def write_boxes(root: Path, dirs: tuple[int, ...] = (0, 3, 1), frames: int = 16) -> None:
    """DDD17's layout: in the 50 ms before a labelled frame, events fill a box, which its mask calls a vehicle (5)."""
    for place in dirs:
        rng = np.random.default_rng(place)
        home = root / f"dir{place}"
        (home / "index").mkdir(parents=True)
        stamps = 40_000 * np.arange(2, frames + 2)
        rows = []
        for number in range(2, frames + 1, 2):
            end = int(stamps[number - 1])
            top, left = int(rng.integers(0, 100)), int(rng.integers(0, 226))
            mask = np.zeros((200, 346), np.uint8)
            mask[top : top + 100, left : left + 120] = 5
            save(home / "segmentation_masks" / f"segmentation_{number:08d}.png", mask)
            y, x = rng.integers(top, top + 100, 9000), rng.integers(left, left + 120, 9000)
            rows.append(np.stack([rng.integers(end - 49_000, end - 1000, 9000), x, y, rng.integers(0, 2, 9000)]))
        t, x, y, p = np.concatenate(rows, axis=1)[:, np.argsort(np.concatenate([part[0] for part in rows]))]
        (t * 1000).astype("<i8").tofile(home / "events.dat.t")
        np.stack([x, y, p], axis=1).astype("<i2").tofile(home / "events.dat.xyp")
        last = np.searchsorted(t, stamps)
        np.save(home / "index" / "index_50ms.npy", np.stack([stamps * 1000, last, last], axis=1))
    assert DAVIS == (260, 346)
