"""Probes and metrics against hand-made cases and independent references; frozen means bitwise unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import downstream.recognition.run as recognition
from downstream.heads import fit_linear_probe
from downstream.metrics import mean_std, per_class_accuracy, top_k_accuracy
from downstream.recognition.task import ProbeConfig, kshot
from gep import export
from gep.data.config import DataConfig
from gep.events.io.bin import write_bin
from gep.events.represent import Histogram
from gep.events.types import Events
from gep.hub import GEPModel
from gep.models.backbone import Backbone
from gep.models.encoder import EventEncoder
from gep.models.teacher import FrozenVFM, ImageModel


def test_top_k_by_hand() -> None:
    logits = torch.tensor([[3.0, 2, 1], [1, 1, 0], [0, 1, 2], [5, 4, 6]])
    labels = torch.tensor([0, 0, 0, 1])
    # The tie of the second row counts against its label.
    assert top_k_accuracy(logits, labels) == 25 and top_k_accuracy(logits, labels, k=2) == 50
    assert top_k_accuracy(logits, labels, k=5) == 100
    assert np.isnan(top_k_accuracy(logits[:0], labels[:0]))


def test_mean_std_and_classes() -> None:
    assert mean_std([1.0, 3.0]) == [2.0, pytest.approx(2**0.5)] and mean_std([4.0]) == [4.0, 0.0]
    found = per_class_accuracy(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 3)
    assert found[:2] == [100, 50] and np.isnan(found[2])


def test_probe_is_the_regularised_optimum() -> None:
    """At the optimum the gradient of Σ cross-entropy + ‖W‖² / (2 C) vanishes; written out in NumPy."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)) * [1, 10, 0.1, 1, 3] + 7, rng.integers(0, 3, 60)
    probe = fit_linear_probe(torch.tensor(x), torch.tensor(y), 3, c=0.5)
    z = (x - probe.mean.numpy()) / probe.scale.numpy()
    logits = z @ probe.weight.numpy().T + probe.bias.numpy()
    assert np.allclose(probe(torch.tensor(x)).numpy(), logits)
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    residual = (share - np.eye(3)[y]) / len(x)
    assert np.abs(residual.T @ z + probe.weight.numpy() / (0.5 * len(x))).max() < 1e-5
    assert np.abs(residual.sum(0)).max() < 1e-5
    again = fit_linear_probe(torch.tensor(x), torch.tensor(y), 3, c=0.5)
    assert torch.equal(again.weight, probe.weight)


def test_probe_with_more_features_than_samples_is_the_same_optimum() -> None:
    rng = np.random.default_rng(1)
    x, y = torch.tensor(rng.normal(size=(12, 40))), torch.tensor(rng.integers(0, 3, 12))
    probe = fit_linear_probe(x, y, 3, c=2.0)
    z = ((x - probe.mean) / probe.scale).numpy()
    logits = z @ probe.weight.numpy().T + probe.bias.numpy()
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    residual = (share - np.eye(3)[y.numpy()]) / 12
    # All 40 components of the gradient vanish, not only those in the span that was searched.
    assert np.abs(residual.T @ z + probe.weight.numpy() / (2.0 * 12)).max() < 1e-5


def test_probe_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="labels span 0..3"):
        fit_linear_probe(torch.zeros(2, 4), torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match="needs samples"):
        fit_linear_probe(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 3)


def test_kshot_skips_what_it_cannot_draw() -> None:
    labels = torch.arange(30) % 3
    features = torch.nn.functional.one_hot(labels, 3).float() + 0.01 * torch.randn(30, 3)
    table = kshot((features, labels), None, 3, ProbeConfig(shots=[1, 5, 10], draws=2))
    assert table["1"] == [100.0, 0.0] and table["5"] == [100.0, 0.0] and table["10"] is None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(N-MNIST root of two digits that differ in number and polarity of events, exported random model)."""
    root = tmp_path_factory.mktemp("nmnist")
    rng = np.random.default_rng(1)
    for number in range(1, 25):
        digit = number % 2
        folder = root / "Train" / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        count = 300 + 1500 * digit
        t = np.sort(rng.integers(0, 300_000, count))
        x, y = rng.integers(2, 32, (2, count))
        events = Events.from_arrays(t, x, y, rng.random(count) < 0.1 + 0.8 * digit, height=34, width=34)
        write_bin(folder / f"{number:05d}.bin", events)
    torch.manual_seed(0)
    teacher = ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}, list("0123456789"))
    frozen = FrozenVFM.from_spec(f"export:{teacher.save(root / 'teacher')}")
    encoder = EventEncoder("nano", in_chans=2, img_size=(36, 36), head_dim=96)
    model = GEPModel.from_parts(encoder, Histogram(log1p=True), DataConfig(), teacher=frozen)
    model.backbone = Backbone(96, 32, 1, 2)
    return root, model.save_pretrained(root / "export")


def arguments(world: tuple[Path, Path], run: Path, *more: str) -> list[str]:
    root, export = world
    return [
        f"run={run}",
        f"model={export}",
        f"data.root={root}",
        "data.holdout=0.4",
        "train.progress=false",
        *more,
    ]


def test_modes_end_with_their_results(world: tuple[Path, Path], tmp_path: Path) -> None:
    found = recognition.main(arguments(world, tmp_path / "kshot", "mode=kshot", "probe.shots=[1,5]", "probe.draws=2"))
    # Of 24 recordings those held out are drawn from and tested on: too few of a class for 5 shots.
    assert found["top1"]["1"][0] > 50 and found["top1"]["5"] is None and found["num_test"] < 15
    assert json.loads((tmp_path / "kshot" / "results_kshot_last.json").read_text()) == found
    first = recognition.main(arguments(world, tmp_path / "a", "mode=probe"))
    second = recognition.main(arguments(world, tmp_path / "b", "mode=probe", "train.batch_size=8"))
    # Same weights, other batches: the same accuracy, exactly.
    assert first["top1"] == second["top1"] > 90 and first["list"] == second["list"]
    zero = recognition.main(arguments(world, tmp_path / "zero", "mode=zero_shot"))
    assert 0 <= zero["top1"] <= 100


def test_probing_leaves_the_export_bitwise_unchanged(world: tuple[Path, Path], tmp_path: Path) -> None:
    before = (world[1] / "model.safetensors").read_bytes()
    recognition.main(arguments(world, tmp_path / "run", "mode=probe"))
    assert (world[1] / "model.safetensors").read_bytes() == before


def test_finetuning_trains_what_it_says(world: tuple[Path, Path], tmp_path: Path) -> None:
    common = ("mode=finetune", "train.steps=3", "train.batch_size=8", "shots=4", "optim.lr=1e-3")
    found = recognition.main(arguments(world, tmp_path / "run", *common, "encoder_lr=0"))
    assert {"eval/top1", "eval/top5", "eval/mean_class"} <= set(found)
    old, new = (GEPModel.from_pretrained(path) for path in (world[1], tmp_path / "run" / "finetune" / "export"))
    same = {name: torch.equal(value, old.state_dict()[name]) for name, value in new.state_dict().items()}
    assert all(value for name, value in same.items() if name.startswith("encoder."))
    assert not same["backbone.blocks.0.attention.qkv.weight"]
    # The classifier beside it gives the task's own logits from the exported model's features.
    settings, state = export.load_folder(tmp_path / "run" / "finetune" / "classifier", "classifier")
    assert settings["classes"] == list("0123456789") and state["weight"].shape == (10, 96 + 32)
    assert new.classes is None
    scratch = recognition.main(arguments(world, tmp_path / "scratch", "mode=scratch", *common[1:]))
    assert scratch["mode"] == "scratch"


def test_messages(world: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no export at"):
        recognition.main([f"run={tmp_path / 'x'}", "model=nowhere/to/be", f"data.root={world[0]}"])
    with pytest.raises(ValueError, match="too few for 50 shots and 1"):
        recognition.main(arguments(world, tmp_path / "y", "mode=finetune", "shots=50"))
