"""Probes and metrics against hand-made cases and independent references; frozen means bitwise unchanged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import downstream.recognition.run as recognition
from downstream.heads import fit_linear_probe
from downstream.metrics import mean_std, per_class_accuracy, top_k_accuracy
from downstream.recognition.model import GEPClassifier
from downstream.recognition.predict import recognise
from downstream.recognition.task import ProbeConfig, kshot
from gep import cli
from gep.data.config import DataConfig
from gep.data.registry import list_recordings
from gep.events.io import open_events
from gep.events.io.bin import write_bin
from gep.events.io.source import InMemory
from gep.events.represent import Histogram
from gep.events.types import Events
from gep.hub import GEPModel
from gep.models.backbone import Backbone
from gep.models.encoder import EventEncoder
from gep.models.teacher import FrozenVFM, ImageModel
from tests import layouts


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
    assert new.classes is None
    # The classifier beside it holds the same model, and gives the accuracy that the run reports.
    model = GEPClassifier.from_pretrained(tmp_path / "run" / "finetune" / "classifier")
    assert model.classes == list("0123456789") and model.metrics["eval/top1"] == found["eval/top1"]
    assert all(torch.equal(value, model.state_dict()[f"model.{name}"]) for name, value in new.state_dict().items())
    assert accuracy_of(model, world[0]) == pytest.approx(found["eval/top1"])
    scratch = recognition.main(arguments(world, tmp_path / "scratch", "mode=scratch", *common[1:]))
    assert scratch["mode"] == "scratch"


def accuracy_of(model: GEPClassifier, root: Path) -> float:
    """Top-1 [%] on the held-out recordings, each recognised as a file of its own."""
    _, held = list_recordings("nmnist", root, "train").hold_out(0.4)
    right = [int(recognise(model, held.source(i)).whole[0].argmax()) == int(held.labels[i]) for i in range(len(held))]
    return 100 * float(np.mean(right))


@pytest.mark.parametrize("more", [(), ("use_backbone=false", "feature=all", "pool=mean_std")])
def test_a_probe_is_kept_with_its_model(world: tuple[Path, Path], tmp_path: Path, more: tuple[str, ...]) -> None:
    found = recognition.main(arguments(world, tmp_path, "mode=probe", *more))
    model = GEPClassifier.from_pretrained(tmp_path / "probe" / "classifier")
    assert (model.model.backbone is None) == bool(more) and model.head.in_features == (192 if more else 128)
    assert accuracy_of(model, world[0]) == pytest.approx(found["top1"]) and found["top1"] > 90
    assert "list" in model.data["test"]


def test_a_split_that_leaves_a_class_out_is_warned_of(tmp_path: Path) -> None:
    layouts.write_folder(tmp_path, ("box/0.bin", "box/1.bin", "mug/2.bin"))
    listing = list_recordings("folder", tmp_path, "train")
    data = DataConfig(name="folder", root=str(tmp_path), holdout=0.3)
    with pytest.warns(UserWarning) as caught:
        recognition.warn_of_missing(listing.subset([0, 1], "kept"), listing.subset([2], "held"), data)
    texts = [str(warning.message) for warning in caught]
    assert texts[0].startswith("data.holdout=0.3 leaves nothing to learn from of 1 of 2 classes (mug)")
    assert texts[1].startswith("data.holdout=0.3 leaves nothing to test on of 1 of 2 classes (box)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recognition.warn_of_missing(listing.subset([0, 2], "kept"), listing.subset([1, 2], "held"), data)
    layouts.write_folder(tmp_path / "flat", ("a.bin", "b.bin"))
    bare = list_recordings("folder", tmp_path / "flat", "train")
    with pytest.raises(ValueError, match="have no class to be recognised.*label_from=file"):
        recognition.warn_of_missing(bare, bare, data)


def classifier(**changes: object) -> GEPClassifier:
    """With random weights; windows of 10 ms, two a sample, unless told otherwise."""
    torch.manual_seed(3)
    settings = {"height": 36, "width": 36, "fit": "pad", "windows": 2, "window_us": 10_000, "num_events": 0}
    sample_us = changes.pop("sample_us", 0)
    encoder = EventEncoder("nano", in_chans=2, img_size=(36, 36))
    model = GEPModel.from_parts(encoder, Histogram(), SimpleNamespace(**(settings | changes)))
    return GEPClassifier(model, ["left", "right", "up"], feature="all", sample_us=sample_us).eval()


def test_a_recording_is_recognised_sample_by_sample(tmp_path: Path) -> None:
    """Against the model's own answer for each part alone."""
    events = layouts.random_events(0, 3000, 70_000, 34, 34, start=5_000)
    source, first = InMemory(tmp_path, events), int(events.t[0])

    def part(begin: int, end: int) -> Events:
        return events[int(np.searchsorted(events.t, begin)) : int(np.searchsorted(events.t, end))]

    model = classifier()
    found = recognise(model, source)
    parts = []
    for k in range(3):  # 70 ms hold three samples of 20 ms
        begin = first + 20_000 * k
        bounds = np.array([[begin, begin + 10_000], [begin + 10_000, begin + 20_000]])
        parts.append(model.predict(part(begin, begin + 20_000), bounds))
    assert torch.allclose(found.whole, torch.stack([each.whole for each in parts]).mean(0))
    assert torch.allclose(found.windows, torch.cat([each.windows for each in parts], 1))
    assert (found.t_us[0] - first).tolist() == [[10_000 * k, 10_000 * (k + 1)] for k in range(6)]
    assert torch.allclose(found.whole.sum(), torch.tensor(1.0))
    # By number of events, by parts of the recording, whole.
    counted = recognise(classifier(window_us=0, num_events=1000), source)
    alone = classifier(window_us=0, num_events=1000).predict([events[k : k + 1000] for k in (0, 1000, 2000)])
    assert torch.allclose(counted.whole[0], alone.whole.mean(0), atol=1e-6) and counted.windows.shape == (1, 6, 3)
    cut = recognise(classifier(window_us=0, sample_us=30_000), source)
    assert (cut.t_us[0, :, 0] - first).tolist() == [0, 15_000, 30_000, 45_000]
    assert recognise(classifier(window_us=0), source).windows.shape == (1, 2, 3)
    short = InMemory(tmp_path, part(first, first + 8_000))
    assert recognise(model, short).windows.shape == (1, 2, 3)
    with pytest.raises(ValueError, match="holds no events"):
        recognise(model, InMemory(tmp_path, events[:0]))


def test_predict_prints_and_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier()
    model.save_pretrained(tmp_path / "m")
    write_bin(tmp_path / "a.bin", layouts.random_events(0, 3000, 70_000, 34, 34))
    with open_events(tmp_path / "a.bin") as source:
        found = recognise(model, source)
    cli.main(["predict", str(tmp_path / "m"), str(tmp_path / "a.bin"), "-o", str(tmp_path / "a.json")])
    lines = capsys.readouterr().out.splitlines()
    best = int(found.whole[0].argmax())
    assert lines[0].split()[0] == lines[1].split()[-1] == model.classes[best]
    assert lines[1].split()[1] == f"{100 * found.whole[0, best]:.1f}" and len(lines) == 2 + 6 + 1
    assert lines[2].startswith("0.000 to 0.010 s")
    assert lines[2].split()[-1] == model.classes[int(found.windows[0, 0].argmax())]
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["whole"] == pytest.approx(found.whole[0].tolist()) and len(written["windows"]) == 6
    assert written["windows"][1]["t_us"] == found.t_us[0, 1].tolist()
    for more, message in (
        (["-o", str(tmp_path / "a.gif")], "written as .json"),
        (["--npz", "--fps", "3"], "--fps, --npz has no effect"),
        (["clip=true"], "clip=true has no effect"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["predict", str(tmp_path / "m"), str(tmp_path / "a.bin"), *more])
        assert message in str(end.value) + capsys.readouterr().err
    model.model.save_pretrained(tmp_path / "encoder")
    with pytest.raises(SystemExit) as end:
        cli.main(["predict", str(tmp_path / "encoder"), str(tmp_path / "a.bin")])
    assert "kind 'gep'" in str(end.value) + capsys.readouterr().err


def test_a_hostile_classifier_is_refused(tmp_path: Path) -> None:
    config = classifier().config
    for wrong, message in (
        ({"feature": "both"}, "feature = 'both'"),
        ({"classes": []}, "classes"),
        ({"sample_us": -1}, "sample_us = -1"),
        ({"model": {**config["model"], "encoder": {"arch": "nano", "in_chans": 10**9}}}, "in_chans"),
        ({"model": {**config["model"], "classes": ["a"]}}, "unknown 'classes'"),
    ):
        with pytest.raises(ValueError, match=message):
            GEPClassifier.from_config({**config, **wrong})


def test_messages(world: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no export at"):
        recognition.main([f"run={tmp_path / 'x'}", "model=nowhere/to/be", f"data.root={world[0]}"])
    with pytest.raises(ValueError, match="too few for 50 shots and 1"):
        recognition.main(arguments(world, tmp_path / "y", "mode=finetune", "shots=50"))
