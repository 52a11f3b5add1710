"""DenseModel: exact cropping, the same bits after loading, strict errors, and who takes a gradient."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from downstream.dense.features import DenseFeatures, HistogramFeatures
from downstream.dense.heads import build_head
from downstream.dense.model import DenseModel
from gep.events.represent import Histogram
from gep.events.types import EventBatch, Events
from gep.hub import GEPModel
from gep.models import Backbone, EventEncoder

INPUT = {"height": 34, "width": 41, "fit": "pad", "windows": 3, "window_us": 50_000, "num_events": 0, "rectify": "no"}


def make(kind: str = "dense", head: str = "linear", **choices) -> DenseModel:
    torch.manual_seed(0)
    settings = {"height": 36, "width": 36, "fit": "pad", "windows": 3, "window_us": 50_000, "num_events": 0}
    encoder = EventEncoder("nano", 2, (36, 36), head_dim=96)
    backbone = Backbone(96, width=48, depth=2, heads=2)
    whole = GEPModel.from_parts(encoder, Histogram(), SimpleNamespace(**settings), backbone=backbone)
    features = HistogramFeatures(whole, windows=3) if kind == "histogram" else DenseFeatures(whole, **choices)
    built = build_head(head, features.channels, 3, width=32)
    task = {"classes": ["road", "car", "sky"], "palette": [[0, 0, 0], [1, 2, 3], [4, 5, 6]]}
    return DenseModel(features, built, kind="segmentation", input_settings=INPUT, task=task).eval()


def windows(height: int = 34, width: int = 41) -> tuple[torch.Tensor, torch.Tensor]:
    frames = torch.rand(2, 3, 2, height, width, generator=torch.Generator().manual_seed(1))
    return frames, torch.arange(1, 4).expand(2, 3) * 50_000


@pytest.mark.parametrize("head", ["linear", "upernet", "dpt"])
@pytest.mark.parametrize("kind", ["dense", "histogram"])
def test_a_canvas_of_any_size_is_the_padded_one_cropped(kind, head):
    model, (frames, ends) = make(kind, head), windows()
    output = model.predict_frames(frames, ends)
    whole = model.predict_frames(F.pad(frames, (0, 1, 0, 2)), ends)
    assert output.shape == (2, 3, 34, 41) and output.dtype == torch.float32 and whole.shape == (2, 3, 36, 42)
    assert torch.equal(output, whole[..., :34, :41])


def test_outputs_are_the_heads_brought_to_pixels_bilinearly():
    model, (frames, ends) = make(), windows()
    coarse = model.head(model.features(frames, ends).levels).detach().double().numpy()
    output = model.predict_frames(frames, ends).detach().numpy()
    for row, column in ((0, 0), (3, 10), (33, 40), (17, 22)):
        # Pixel centres: token i covers pixels 6 i … 6 i + 5.
        y, x = (np.clip((at + 0.5) / 6 - 0.5, 0, n - 1) for at, n in ((row, 6), (column, 7)))
        top, left = int(y), int(x)
        low, right = min(top + 1, 5), min(left + 1, 6)
        above = coarse[..., top, left] * (1 - x + left) + coarse[..., top, right] * (x - left)
        below = coarse[..., low, left] * (1 - x + left) + coarse[..., low, right] * (x - left)
        want = above * (1 - y + top) + below * (y - top)
        np.testing.assert_allclose(output[..., row, column], want, atol=1e-5)


def test_a_batch_and_levels_computed_before_give_the_same():
    model, g = make(), np.random.default_rng(0)
    parts, bounds = [], np.array([[i * 1000, (i + 1) * 1000] for i in (0, 1, 2)] * 2)
    for start, end in bounds:
        t = np.sort(g.integers(start, end, 300))
        x, y, p = g.integers(0, 41, 300), g.integers(0, 34, 300), g.integers(0, 2, 300)
        parts.append(Events.from_arrays(t, x, y, p, height=34, width=41))
    t_us = torch.from_numpy(bounds).unflatten(0, (2, 3))
    batch = {"events": EventBatch.from_windows(parts, bounds), "windows": 3, "t_us": t_us}
    output = model(batch)
    frames = Histogram()(batch["events"]).unflatten(0, (2, 3))
    assert torch.equal(output, model.predict_frames(frames, t_us[..., 1]))
    assert torch.equal(output, model.from_levels(model.features(frames, t_us[..., 1])))
    assert not torch.equal(output, model.predict_frames(frames, t_us[..., 1] * 1000))  # the ends are read


@pytest.mark.parametrize(
    "kind, head, choices",
    [
        ("dense", "linear", {"num_levels": 1}),
        ("dense", "upernet", {}),
        ("dense", "dpt", {"use_backbone": False, "num_levels": 2}),
        ("histogram", "linear", {}),
    ],
)
def test_loaded_it_gives_the_same_bits(tmp_path, kind, head, choices):
    model, (frames, ends) = make(kind, head, **choices), windows()
    model.head.standardise.fit([model.features(frames, ends).levels])
    model.save_pretrained(tmp_path / "m", metrics={"miou": 61.25, "bad": float("nan")}, data={"train": "scenes"})
    again = DenseModel.from_pretrained(tmp_path / "m")
    assert torch.equal(again.predict_frames(frames, ends), model.predict_frames(frames, ends))
    assert again.config == model.config and not again.training and again.kind == "segmentation"
    assert again.input_settings == INPUT and again.task == model.task and again.features.config == model.features.config
    assert again.metrics == {"miou": 61.25, "bad": None} and again.data == {"train": "scenes"}
    assert "61.25" in (tmp_path / "m" / "README.md").read_text()
    again.save_pretrained(tmp_path / "m2")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "m2" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_what_does_not_fit_is_named(tmp_path):
    make().save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    state = load_file(weights)
    lacking = {key: value for key, value in state.items() if key != "head.standardise.std"}
    lacking["head.more"] = torch.zeros(1)
    lacking["head.predict.bias"] = torch.zeros(4)
    save_file(lacking, weights)
    with pytest.raises(ValueError, match="head.standardise.std") as error:
        DenseModel.from_pretrained(tmp_path / "m")
    for part in ("missing: head.standardise.std", "unexpected: head.more", "head.predict.bias (4,)", str(tmp_path)):
        assert part in str(error.value)
    save_file(state, weights)
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    del settings["features"]["encoder"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="config.json does not describe a DenseModel .*'encoder'"):
        DenseModel.from_pretrained(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="no export at"):
        DenseModel.from_pretrained(tmp_path / "nowhere")


def test_a_pretrained_model_is_no_dense_one(tmp_path):
    model = make()
    part = model.features
    settings = SimpleNamespace(**{**INPUT, "height": 36, "width": 36})
    GEPModel.from_parts(part.encoder, part.represent, settings).save_pretrained(tmp_path / "gep")
    with pytest.raises(ValueError, match="kind 'gep', 'dense' was asked for"):
        DenseModel.from_pretrained(tmp_path / "gep")
    with pytest.raises(ValueError, match="kind='flow' is no dense task: choose one of segmentation, depth"):
        DenseModel(part, model.head, kind="flow", input_settings=INPUT, task={})
    model.save_pretrained(tmp_path / "m")
    with pytest.warns(UserWarning, match="revision = 'v1' has no effect"):
        DenseModel.from_pretrained(tmp_path / "m", revision="v1")


@pytest.mark.parametrize("frozen", [True, False])
def test_the_gradient_reaches_what_is_not_frozen(frozen):
    model, (frames, ends) = make(head="upernet"), windows()
    if frozen:
        model.features.requires_grad_(False)
    before = {name: value.clone() for name, value in model.features.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train().predict_frames(frames, ends).square().mean().backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.head.parameters())
    for name, parameter in model.features.named_parameters():
        unread = name.startswith(("encoder.head.", "backbone.next_head."))
        assert (parameter.grad is None) == (frozen or unread), name
    same = [torch.equal(value, before[name]) for name, value in model.features.state_dict().items()]
    assert all(same) if frozen else not all(same)


@pytest.mark.parametrize("head", ["linear", "upernet", "dpt"])
def test_autocast_keeps_float32_outputs_near_full_precision(head):
    model, (frames, ends) = make(head=head), windows()
    full = model.predict_frames(frames, ends)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.predict_frames(frames, ends)
    assert half.dtype == torch.float32 and half.shape == full.shape
    assert F.cosine_similarity(full.flatten(1), half.flatten(1)).min() > 0.95
