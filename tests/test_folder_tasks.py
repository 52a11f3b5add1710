"""The configs for one's own masks and depth maps, from a plain folder to an export that names its classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dense_fixtures import write_exports
from layouts import random_events, save, write_text

import downstream.depth.run as depth
import downstream.segmentation.run as segmentation
from downstream.dense.model import DenseModel
from gep import cli
from gep.events.io import write_arrow

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "downstream"
QUICK = [
    "data.height=36",
    "data.width=48",
    "head.width=16",
    "train.steps=1",
    "train.batch_size=2",
    "train.eval_every=1",
]
QUICK += ["train.num_workers=0", "train.progress=false", "data.windows=2", "data.holdout=0.4"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three recordings of 36 x 48 pixels, a mask of three classes and a depth map every 50 ms; and exports."""
    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for number in range(3):
        home = root / "DIR" / f"walk_{number}"
        (home / "depth").mkdir(parents=True)
        write_arrow(home / "events.arrow", random_events(number, 2000, 300_000, 36, 48))
        write_text(home / "masks" / "timestamps.txt", [50_000 * (k + 1) for k in range(6)])
        for k in range(6):
            mask = rng.choice([0, 1, 2, 255], (36, 48)).astype(np.uint8)
            save(home / "masks" / f"{k:06d}.png", mask)
            np.save(home / "depth" / f"{k:06d}.npy", rng.uniform(1, 15, (36, 48)).astype(np.float32))
    write_text(root / "DIR" / "classes.txt", ["road", "mud #010203", "car"])
    write_exports(root)
    return root


def test_masks(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "segmentation" / "folder.yaml")
    found = segmentation.main(
        [config, f"run={tmp_path}", f"model={own / 'stage1'}", f"data.root={own / 'DIR'}", *QUICK]
    )
    assert set(found["validation"]["iou"]) == {"road", "mud", "car"}
    model = DenseModel.from_pretrained(tmp_path / "export")
    assert model.task["classes"] == ["road", "mud", "car"] and model.task["palette"][1] == [1, 2, 3]
    capsys.readouterr()
    command = ["predict", str(tmp_path / "export"), str(own / "DIR"), "--data", "folder", "--split", "all"]
    cli.main([*command, "-o", str(tmp_path / "pictures")])
    assert '"miou"' in capsys.readouterr().out and len(list((tmp_path / "pictures").glob("*.png"))) >= 12
    # Without names nothing is learned, and the message says where to write them.
    (own / "DIR" / "classes.txt").rename(own / "away.txt")
    try:
        with pytest.raises(ValueError, match=r"names no classes.*ROOT/classes\.txt"):
            segmentation.main(
                [config, f"run={tmp_path / 'b'}", f"model={own / 'stage1'}", f"data.root={own / 'DIR'}", *QUICK]
            )
    finally:
        (own / "away.txt").rename(own / "DIR" / "classes.txt")


def test_depth(own: Path, tmp_path: Path) -> None:
    config = str(CONFIGS / "depth" / "folder.yaml")
    found = depth.main([config, f"run={tmp_path}", f"model={own / 'stage2'}", f"data.root={own / 'DIR'}", *QUICK])
    assert found["input"]["windows"] == 2 and np.isfinite(found["best"]["step"])
    assert DenseModel.from_pretrained(tmp_path / "export").kind == "depth"
