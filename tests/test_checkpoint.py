"""Run folders: what may change between starts, full disks, damaged checkpoints."""

import dataclasses
import errno
import json
import shutil
from dataclasses import dataclass, field, replace

import pytest
import torch
from accelerate import Accelerator

from gep import checkpoint
from gep.checkpoint import CheckpointError, prepare_run_dir
from gep.engine import TrainConfig, fit, make_accelerator
from gep.optim import OptimConfig
from tests.workers.toy_run import Regression, ToyConfig, make_batches

TRAIN = TrainConfig(steps=12, batch_size=8, log_every=3, save_every=4, keep_checkpoints=2, progress=False)


@dataclass(frozen=True, kw_only=True)
class Config:
    run_dir: str = "r"
    root: str = "data"
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


def run(folder, train=TRAIN, optim=None, task=None, **keywords):
    optim = optim or OptimConfig(lr=1e-2)
    accelerator = make_accelerator(train, folder)
    task = task or Regression()
    batches = make_batches(ToyConfig(run_dir="", train=train), 0, 1)
    return fit(task, batches, train=train, optim=optim, accelerator=accelerator, run_dir=folder, **keywords)


def steps_of(folder):
    return [int(p.name[5:]) for p in checkpoint.find(folder)]


def test_run_dir_of_another_configuration_is_refused(tmp_path):
    cfg = Config()
    prepare_run_dir(tmp_path, cfg)
    prepare_run_dir(tmp_path, replace(cfg, root="elsewhere"))  # nothing was trained yet: nothing to protect
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError) as caught:
        prepare_run_dir(tmp_path, Config(root="third", optim=OptimConfig(lr=5.0)))
    message = str(caught.value)
    assert "root: elsewhere there, third now" in message and "optim.lr: 0.001 there, 5.0 now" in message
    assert "Choose another run folder" in message and "move or delete" in message and "train." not in message

    same = Config(
        root="elsewhere",
        run_dir="moved",
        train=TrainConfig(num_workers=2, save_every=7, log_every=1, progress=False, keep_checkpoints=9),
    )
    prepare_run_dir(tmp_path, same)
    assert "num_workers: 2" in (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"train\.steps: 1000 there, 5 now"):
        prepare_run_dir(tmp_path, replace(same, train=TrainConfig(steps=5)))
    prepare_run_dir(tmp_path, replace(same, root="x"), may_differ=("root",))
    with pytest.raises(ValueError, match=r"already holds a run and train\.resume is never"):
        prepare_run_dir(tmp_path, replace(same, train=TrainConfig(resume="never")))
    assert (tmp_path / "commit.txt").read_text().strip()


def test_checkpoints_are_complete_pruned_and_hold_the_run(tmp_path):
    last = run(tmp_path)
    assert steps_of(tmp_path) == [12, 8]
    trainer = json.loads((checkpoint.find(tmp_path)[0] / "trainer.json").read_text())
    assert trainer["step"] == 12 and trainer["world_size"] == 1 and trainer["last"] == last
    assert trainer["metrics_bytes"] == (tmp_path / "metrics.jsonl").stat().st_size
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.01 there, 0\.5 now"):
        run(tmp_path, optim=OptimConfig(lr=0.5))
    with pytest.raises(ValueError, match="resume is never"):
        run(tmp_path, train=replace(TRAIN, resume="never"))


@pytest.mark.parametrize("damage", ["truncate", "garbage", "flip", "marker", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage, capsys):
    run(tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    newest = checkpoint.find(tmp_path)[0]
    weights = newest / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "garbage":
        weights.write_bytes(b"x" * weights.stat().st_size)
    elif damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "marker":
        (newest / "complete").unlink()
    else:
        (newest / "optimizer.bin").unlink()
    run(tmp_path)
    printed = capsys.readouterr().err
    assert "step_000012" in printed and "taking the one before" in printed and "resuming after step 8" in printed
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert steps_of(tmp_path) == [12, 8]


def test_all_damaged_is_an_error_and_another_model_too(tmp_path):
    run(tmp_path)
    with pytest.raises(CheckpointError, match=r"none of the 2 .*net\.0"):
        task = Regression()
        task.net[0] = torch.nn.Linear(8, 16, bias=False)
        run(tmp_path, task=task)
    for folder in checkpoint.find(tmp_path):
        (folder / "trainer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"move the run folder away"):
        run(tmp_path)


@pytest.mark.parametrize("how", ["oserror", "torch"])
def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch, how):
    real = Accelerator.save_state
    saved_steps = []

    def fills_up(self, folder, **keywords):
        saved_steps.append(folder)
        if len(saved_steps) < 2:
            return real(self, folder, **keywords)
        with open(f"{folder}/model.safetensors", "wb") as file:
            file.write(b"half")
        if how == "oserror":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", fills_up)
        with pytest.raises(CheckpointError, match=r"could not save .*step_000008.* MB are free.*resume") as caught:
            run(tmp_path)
    assert ("No space left" if how == "oserror" else "file write failed") in str(caught.value)
    assert steps_of(tmp_path) == [4]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000004"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2

    run(tmp_path)  # with space again, it goes on
    whole = tmp_path / "whole"
    run(whole)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_stale_partial_checkpoint_is_replaced(tmp_path):
    run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step_000012")
    stale = tmp_path / "checkpoints" / "step_000012"
    stale.mkdir()
    (stale / "junk").write_text("x")
    run(tmp_path)
    assert steps_of(tmp_path) == [12, 8] and not (stale / "junk").exists()


def test_a_run_is_not_continued_from_other_weights(tmp_path):
    weights, moved = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    weights.write_bytes(b"first")
    run = prepare_run_dir(tmp_path / "run", _Plain(), inputs={"model": weights})
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    weights.rename(moved)
    prepare_run_dir(run, _Plain(), inputs={"model": moved})  # moved, but the same
    moved.write_bytes(b"second")
    with pytest.raises(ValueError, match="other weights than those that model names now"):
        prepare_run_dir(run, _Plain(), inputs={"model": moved})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plain:
    size: int = 1
