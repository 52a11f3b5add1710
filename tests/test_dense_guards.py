"""What a dense run refuses: another model on resume, changed features, maps beyond memory; and what is never lost."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_fixtures import write_boxes, write_exports

import downstream.dense.cached as caching
import downstream.dense.run as dense
import downstream.segmentation.run as segmentation
from downstream.dense.cached import CachedMaps
from downstream.dense.output import replacing_folder
from downstream.dense.splits import open_splits
from downstream.dense.task import DenseTask
from downstream.segmentation.task import Segmentation, SegmentationConfig
from gep import export
from gep.data.config import DataConfig
from gep.engine import TrainConfig, make_accelerator
from gep.hub import GEPModel


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("world")
    write_boxes(folder / "set", frames=12)
    return {"set": folder / "set", **write_exports(folder)}


def run(world: dict[str, Path], folder: Path, model: str | Path, *more: str) -> dict:
    small = ("data.height=52", "data.width=70", "data.fit=resize", "data.name=ddd17", "head.num_levels=1")
    train = ("train.steps=1", "train.batch_size=4", "train.progress=false")
    return segmentation.main([f"run={folder}", f"model={model}", f"data.root={world['set']}", *small, *train, *more])


def other(folder: Path) -> None:
    """Puts other weights into an export."""
    model = GEPModel.from_pretrained(folder)
    with torch.no_grad():
        next(model.encoder.parameters()).mul_(1.1)
    model.save_pretrained(folder)


@pytest.mark.parametrize("place", ["home", "hub"])
def test_another_model_under_the_same_name_is_refused_on_resume(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = tmp_path / "models" / "one"
    shutil.copytree(world["stage1"], folder)
    monkeypatch.setenv("HOME", str(tmp_path / "models"))
    name = "~/one" if place == "home" else "someone/one"
    if place == "hub":
        monkeypatch.setattr(export, "fetch", lambda name, **_: folder)
    found = run(world, tmp_path / "run", name)
    assert found["model"]["name"] == name and len(found["model"]["sha256"]) == 64
    kept = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert kept == {"model": found["model"]["sha256"]}
    assert run(world, tmp_path / "run", name) == found
    other(folder)
    with pytest.raises(ValueError, match="begun with other weights"):
        run(world, tmp_path / "run", name)
    assert run(world, tmp_path / "new", name)["model"]["sha256"] != found["model"]["sha256"]


def test_changed_features_of_a_probe_are_an_error_that_names_the_run(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter(["a", "b"])
    monkeypatch.setattr(dense, "digest", lambda _: next(digests))
    with pytest.raises(RuntimeError, match=rf"{tmp_path / 'run'}: mode=probe changed the features of .*stage1"):
        run(world, tmp_path / "run", world["stage1"])


def test_fields_without_effect_warn(world: dict[str, Path], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no effect: encoder_lr=0.0 \(mode=scratch\)"):
        run(world, tmp_path / "run", world["stage1"], "mode=scratch", "encoder_lr=0")


def test_maps_that_do_not_fit_are_refused_before_they_are_computed(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = SegmentationConfig(data=DataConfig(name="ddd17", root=str(world["set"]), height=52, width=70, fit="resize"))
    data = replace(cfg.data, windows=1)
    source = open_splits(cfg, data).train
    problem = Segmentation.of(source.listing)
    task = DenseTask(dense.build_model(cfg, data, GEPModel.from_pretrained(world["stage1"]), problem), problem).eval()
    accelerator = make_accelerator(TrainConfig(batch_size=2, progress=False), tmp_path)
    levels = [(level.shape[1:], level.dtype) for level in task.maps(caching.collate([source.sample(0, None)])).levels]
    needed = sum(shape.numel() * 4 for shape, _ in levels) + 52 * 70
    frames, maps = [], task.maps
    monkeypatch.setattr(task, "maps", lambda batch: (frames.append(len(batch["key"])), maps(batch))[1])
    monkeypatch.setattr(caching, "memory", lambda: int(needed * 100 / caching.RAM_SHARE) + 1)
    cached = CachedMaps.of(task, source, accelerator, batch_size=2, total=100)
    assert sum(tensor.numel() * tensor.element_size() for tensor in (*cached.levels, cached.targets)) == needed * len(
        source
    )
    frames.clear()
    with pytest.raises(ValueError, match="101 samples.*more than 60%.*cache_features=false"):
        CachedMaps.of(task, source, accelerator, batch_size=2, total=101)
    assert frames == [2] and caching.memory() > 0


def test_a_failing_rename_leaves_the_old_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with replacing_folder(out) as folder:
        (folder / "000000.png").write_text("old")
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no space"), replacing_folder(out) as folder:
        (folder / "000000.png").write_text("new")
    assert (out / "000000.png").read_text() == "old" and list(tmp_path.iterdir()) == [out]
