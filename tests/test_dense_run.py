"""A dense run: what is trained, the best step, exact resuming, features in memory, processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_fixtures import write_boxes, write_exports
from torch import nn

import downstream.dense.run as dense
import downstream.segmentation.run as segmentation
from downstream.dense.best import Best
from downstream.dense.cached import CachedMaps
from downstream.dense.features import DenseFeatures
from downstream.dense.model import DenseModel
from downstream.dense.splits import open_splits
from downstream.dense.task import DenseTask
from downstream.segmentation.task import Segmentation, SegmentationConfig
from gep.data.config import DataConfig
from gep.data.listing import Listing
from gep.data.paired import Recordings, collate
from gep.data.registry import list_recordings
from gep.data.sampler import Batches
from gep.engine import TrainConfig, make_accelerator
from gep.events.transform import Transform
from gep.hub import GEPModel
from tests.workers import toy_run  # noqa: F401 - its folder holds the programs that are started here

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("world")
    write_boxes(folder / "set", frames=12)
    return {"set": folder / "set", **write_exports(folder, drop_path=0.3)}


def arguments(world: dict[str, Path], folder: Path, *more: str, stage: str = "stage2") -> list[str]:
    return [
        f"run={folder}",
        f"model={world[stage]}",
        f"data.root={world['set']}",
        "data.name=ddd17",
        "data.height=52",
        "data.width=70",
        "data.fit=resize",
        "test_split=test",
        "head.num_levels=2",
        "optim.lr=0.01",
        "train.steps=2",
        "train.batch_size=4",
        "train.log_every=1",
        "train.save_every=0",
        "train.progress=false",
        *more,
    ]


def run(world: dict[str, Path], folder: Path, *more: str, stage: str = "stage2") -> dict:
    return segmentation.main(arguments(world, folder, *more, stage=stage))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return DenseModel.from_pretrained(folder / "export").state_dict()


# ---- what is trained --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_probe_leaves_the_features_bitwise_unchanged(world: dict[str, Path], tmp_path: Path, stage: str) -> None:
    found = run(world, tmp_path, "train.ema=0.9", stage=stage)
    hashes = found["backbone_sha256"]
    assert hashes["before"] == hashes["after"] and len(hashes["before"]) == 64
    old, new = GEPModel.from_pretrained(world[stage]).state_dict(), exported(tmp_path)
    parts = [name for name in new if name.startswith("features.")]
    assert all(torch.equal(new[name], old[name.removeprefix("features.")]) for name in parts)
    assert any(name.startswith("features.backbone.") for name in parts) == (stage == "stage2")
    assert new["head.standardise.std"].ne(1).any()


def test_frozen_features_have_no_graph_and_no_stochastic_depth(world: dict[str, Path]) -> None:
    pretrained = GEPModel.from_pretrained(world["stage2"])
    cfg = SegmentationConfig(data=DataConfig(name="ddd17", root=str(world["set"]), height=52, width=70, fit="resize"))
    data = replace(cfg.data, windows=2)
    source = open_splits(cfg, data).train
    problem = Segmentation.of(source.listing)
    task = DenseTask(dense.build_model(cfg, data, pretrained, problem), problem).train()
    batch = collate([source.sample(i, None) for i in range(2)])
    maps = task.maps(batch)
    assert all(level.grad_fn is None and not level.requires_grad for level in maps.levels)
    assert all(torch.equal(a, b) for a, b in zip(maps.levels, task.maps(batch).levels)), "drop_path acted"
    assert task.model.head.training and not task.model.features.encoder.training
    task(batch)["loss"].backward()
    assert {name.split(".")[1] for name, p in task.named_parameters() if p.grad is not None} == {"head"}
    # Fine-tuned, the same encoder does drop paths; a part with rate 0 does not.
    tuned = replace(cfg, mode="finetune", backbone_lr=0.0)
    task = DenseTask(dense.build_model(tuned, data, GEPModel.from_pretrained(world["stage2"]), problem), problem)
    task.train()
    assert task.model.features.encoder.training and not task.model.features.backbone.training
    assert not torch.equal(task.maps(batch).levels[0], task.maps(batch).levels[0])


def test_finetuning_and_scratch_train_what_they_say(world: dict[str, Path], tmp_path: Path) -> None:
    old = GEPModel.from_pretrained(world["stage2"]).state_dict()

    def same(folder: Path, part: str) -> list[bool]:
        new, prefix = exported(folder), f"features.{part}"
        unread = ("encoder.head", "backbone.next_head")
        names = [n for n in new if n.startswith(prefix) and not n.removeprefix("features.").startswith(unread)]
        return [torch.equal(new[name], old[name.removeprefix("features.")]) for name in names]

    found = run(world, tmp_path / "tune", "mode=finetune")
    assert not any(same(tmp_path / "tune", "encoder.vit.blocks")) and not all(same(tmp_path / "tune", "backbone"))
    assert found["backbone_sha256"]["before"] != found["backbone_sha256"]["after"]
    run(world, tmp_path / "part", "mode=finetune", "encoder_lr=0")
    assert all(same(tmp_path / "part", "encoder")) and not all(same(tmp_path / "part", "backbone"))
    first = run(world, tmp_path / "scratch", "mode=scratch", "train.steps=1", "optim.lr=1e-9")
    assert not all(same(tmp_path / "scratch", "encoder.vit.blocks"))
    # From the seed alone, whatever the export's weights are; another seed gives other weights.
    again = run(world, tmp_path / "again", "mode=scratch", "train.steps=1", "optim.lr=1e-9")
    other = run(world, tmp_path / "other", "mode=scratch", "train.steps=1", "optim.lr=1e-9", "train.seed=1")
    digests = [result["backbone_sha256"]["before"] for result in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_rates_by_part_and_layer(world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def keep(task: nn.Module, *_: object, groups: list, **__: object) -> None:
        seen.update({name: group["lr_scale"] for group in groups for name in group["names"]})
        raise InterruptedError

    monkeypatch.setattr(dense, "fit", keep)
    with pytest.raises(InterruptedError):
        run(world, tmp_path / "a", "mode=finetune", "optim.layer_decay=0.5", "encoder_lr=0.1", "backbone_lr=0.3")
    assert seen["model.head.predict.weight"] == 1
    # The encoder has four blocks, the backbone two; the last of them is a layer below what follows it.
    expected = {"encoder.vit.blocks.3.": 0.1 * 0.5, "encoder.vit.blocks.0.": 0.1 * 0.5**4, "backbone.image_head.": 0.3}
    for part, scale in (expected | {"backbone.blocks.1.": 0.3 * 0.5, "backbone.in_proj.": 0.3 * 0.5**3}).items():
        own = [value for name, value in seen.items() if name.startswith(f"model.features.{part}")]
        assert own and own == pytest.approx([scale] * len(own)), part
    seen.clear()
    with pytest.raises(InterruptedError):
        run(world, tmp_path / "b", "mode=scratch", "optim.layer_decay=0.5", "encoder_lr=0.1")
    assert set(seen.values()) == {1.0}
    seen.clear()
    with pytest.raises(InterruptedError):
        run(world, tmp_path / "c", "optim.layer_decay=0.5", "use_backbone=false")
    assert {name.split(".")[1] for name in seen} == {"head"}


# ---- the best step ----------------------------------------------------------------------------------


def test_the_best_step_is_kept_and_reported(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, states = iter([3.0, 7.0, float("nan"), 5.0]), []
    summary = Segmentation.summary

    def scored(self: Segmentation, rows: dict, listing: Listing) -> dict:
        score = next(scores, None)
        return summary(self, rows, listing) | ({} if score is None else {"miou": score})

    offer = Best.offer

    def keep(self: Best, step: int, score: float) -> bool:
        states.append({name: value.clone() for name, value in self.module.state_dict().items()})
        return offer(self, step, score)

    monkeypatch.setattr(Segmentation, "summary", scored)
    monkeypatch.setattr(Best, "offer", keep)
    found = run(world, tmp_path, "train.steps=4", "train.eval_every=1", stage="stage1")
    assert found["best"] == {"step": 2, "miou": 7.0, "chosen on": found["sets"]["validation"]["split"]}
    new = exported(tmp_path)
    assert all(torch.equal(new[f"head.{name}"], value) for name, value in states[1].items())
    assert not torch.equal(new["head.predict.weight"], states[3]["predict.weight"])
    assert [line["eval/miou"] for line in lines(tmp_path) if "eval/miou" in line][:2] == [3.0, 7.0]


def test_best_survives_a_new_object_and_starts_over_with_a_new_run(tmp_path: Path) -> None:
    def values() -> nn.Module:
        module = nn.Linear(1, 1, bias=False)
        return module

    module = values()
    checkpoint = tmp_path / "checkpoints" / "step_000001"
    best = Best(module, tmp_path, higher=False)
    kept = []
    for step, score in enumerate([float("nan"), 0.5, 0.4, float("nan"), 0.4, 0.6], 1):
        module.weight.data.fill_(step)
        kept.append(best.offer(step, score))
        if step == 3:  # as a resumed run does
            checkpoint.mkdir(parents=True)
            (checkpoint / "complete").write_text("{}")
            best = Best(module, tmp_path, higher=False)
            assert (best.step, best.score) == (3, 0.4)
    assert kept == [True, True, True, False, False, False]
    other = values()
    Best(other, tmp_path, higher=False).restore()
    assert other.weight.item() == 3
    (checkpoint / "complete").unlink()
    assert Best(module, tmp_path, higher=False).step == 0 and not (tmp_path / "best").exists()


@pytest.mark.parametrize("mode", ["probe", "finetune"])
def test_resumed_equals_uninterrupted(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    more = (f"mode={mode}", "train.ema=0.5", "train.save_every=3", "train.eval_every=1", "train.steps=5")
    whole = run(world, tmp_path / "whole", *more)
    forward, calls = DenseTask.forward, []

    def cut(self: DenseTask, batch: dict) -> dict:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) == 4:  # after step 2's checkpoint and step 3's best: as if killed
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(DenseTask, "forward", cut)
    with pytest.raises(SystemExit):
        run(world, tmp_path / "cut", *more)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "cut", *more)
    again = run(world, tmp_path / "cut", *more)
    assert again == whole
    for name in ("metrics.jsonl", "export/model.safetensors", "best/model.safetensors", "best/config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    # A finished run is evaluated again without training, with the same numbers; and so are other batches of it.
    assert run(world, tmp_path / "cut", *more) == whole
    with pytest.raises(ValueError, match="optim.lr"):
        run(world, tmp_path / "cut", *more, "optim.lr=0.02")


# ---- features in memory, mirrored input, processes --------------------------------------------------


def test_cached_features_train_as_computed_ones(world: dict[str, Path], tmp_path: Path) -> None:
    plain = run(world, tmp_path / "plain", "train.steps=4")
    cached = run(world, tmp_path / "cached", "train.steps=4", "cache_features=true")
    for one, two in zip(lines(tmp_path / "plain"), lines(tmp_path / "cached"), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4)
    assert plain["test"]["acc"] == pytest.approx(cached["test"]["acc"], abs=0.1)


def test_mirrored_frames_are_mirrored_events(world: dict[str, Path]) -> None:
    features = DenseFeatures(GEPModel.from_pretrained(world["stage1"]), num_levels=1)
    data = DataConfig(name="ddd17", root=str(world["set"]), height=260, width=346, windows=2)
    source = Recordings(list_recordings("ddd17", world["set"], "test"), data, paired=False)
    sample = source.sample(3, None)
    mirror = replace(Transform.identity(260, 346), flip_x=True)
    events, bounds = mirror.apply_events(sample["events"], sample["t_us"])
    frames = features.frames(collate([sample]))
    assert torch.equal(features.frames(collate([sample | {"events": events, "t_us": bounds}])), frames.flip(-1))
    assert frames.abs().sum() > 0


def test_two_evaluations_and_other_batches_agree_exactly(world: dict[str, Path], tmp_path: Path) -> None:
    cfg = SegmentationConfig(data=DataConfig(name="ddd17", root=str(world["set"]), height=52, width=70, fit="resize"))
    data = replace(cfg.data, windows=2)
    source = open_splits(replace(cfg, test_split="test"), data).sets["test"]
    problem = Segmentation.of(source.listing)
    task = DenseTask(dense.build_model(cfg, data, GEPModel.from_pretrained(world["stage2"]), problem), problem)
    nn.init.normal_(task.model.head.predict.weight)
    found = [
        dense.evaluate(task.train(), source, make_accelerator(train, tmp_path), train)
        for train in (TrainConfig(batch_size=size, progress=False) for size in (1, 4, 4))
    ]
    assert found[1] == found[2] and found[0]["miou"] == pytest.approx(found[1]["miou"], abs=0.02)


def test_batches_of_a_cache_are_those_of_the_set(world: dict[str, Path], tmp_path: Path) -> None:
    cfg = SegmentationConfig(data=DataConfig(name="ddd17", root=str(world["set"]), height=52, width=70, fit="resize"))
    data = replace(cfg.data, windows=2)
    source = open_splits(cfg, data).train
    problem = Segmentation.of(source.listing)
    task = DenseTask(dense.build_model(cfg, data, GEPModel.from_pretrained(world["stage2"]), problem), problem).eval()
    train = TrainConfig(batch_size=4, progress=False)
    cached = CachedMaps.of(task, source, make_accelerator(train, tmp_path), batch_size=3)
    stream, other = cached.batches(train)(2), Batches.of_run(source, collate, train)(2)
    for _ in range(3):
        (one,), (two,) = next(stream), next(other)
        assert one["key"] == two["key"] and torch.equal(one["mask"], two["mask"])
        for a, b in zip(task.maps(one).levels, task.maps(two).levels, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    joined = task.maps(cached.join(two))
    assert joined.size == (52, 70) and torch.equal(joined.levels[0], task.maps(one).levels[0])


@pytest.mark.slow
def test_two_processes_give_one_process_its_metrics(world: dict[str, Path], tmp_path: Path) -> None:
    # Stochastic depth is drawn by each rank for itself.
    world = world | write_exports(tmp_path, drop_path=0.0)
    for mode, cache in (("probe", "true"), ("finetune", "false")):
        more = (f"mode={mode}", f"cache_features={cache}", "train.steps=3", "train.eval_every=1")
        one = run(world, tmp_path / f"{mode}{cache}_1", *more)
        launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"]
        folder = tmp_path / f"{mode}{cache}_2"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launcher, "downstream/segmentation/run.py", *arguments(world, folder, *more)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        two = json.loads((folder / f"results_{mode}.json").read_text())
        for name in ("validation", "test"):
            for metric in ("miou", "acc", "macc"):
                assert two[name][metric] == pytest.approx(one[name][metric], abs=0.05), (mode, name, metric)
        assert two["sets"] == one["sets"] and two["best"]["step"] == one["best"]["step"]
        if mode == "probe":
            assert two["backbone_sha256"] == one["backbone_sha256"]
        first, second = (
            [line["loss"] for line in lines(f) if "loss" in line] for f in (tmp_path / f"{mode}{cache}_1", folder)
        )
        assert second == pytest.approx(first, rel=2e-4)
