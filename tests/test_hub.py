"""GEPModel: the same bits after loading, the same input as in training, strict errors."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from gep import export
from gep.events import augment
from gep.events.represent import Histogram
from gep.events.slicing import cut_windows
from gep.events.types import EventBatch, Events
from gep.hub import GEPModel
from gep.models import Backbone, EventEncoder, FrozenVFM, ImageModel


def recording(seed: int = 0, count: int = 4000, size: int = 34, start: int = 1_700_000_000_000_000) -> Events:
    g = np.random.default_rng(seed)
    t = start + np.sort(g.integers(0, 310_000, count))
    x, y, p = g.integers(0, size, count), g.integers(0, size, count), g.integers(0, 2, count)
    return Events.from_arrays(t, x, y, p, height=size, width=size)


def settings(**changes) -> SimpleNamespace:
    default = {"height": 36, "width": 36, "fit": "pad", "windows": 6, "window_us": 50_000, "num_events": 0}
    return SimpleNamespace(**{**default, **changes})


def make(backbone: bool = True, teacher: FrozenVFM | None = None, **changes) -> GEPModel:
    torch.manual_seed(0)
    encoder = EventEncoder("nano", 2, (36, 36), head_dim=96)
    stack = Backbone(96, width=48, depth=2, heads=2) if backbone else None
    represent = Histogram(log1p=True, scale=0.5)
    return GEPModel.from_parts(encoder, represent, settings(**changes), backbone=stack, teacher=teacher).eval()


def stand_in(folder) -> FrozenVFM:
    torch.manual_seed(1)
    keywords = {"arch": "nano", "in_chans": 3, "img_size": [36, 36], "mean": [0.1] * 3, "std": [0.3] * 3}
    ImageModel(keywords, ["zero", "one", "two"]).save(folder)
    return FrozenVFM.from_spec(f"export:{folder}")


@pytest.mark.parametrize("backbone", [False, True])
def test_loaded_it_gives_the_same_bits(tmp_path, backbone):
    model = make(backbone, stand_in(tmp_path / "teacher"))
    events = [recording(0), recording(1)]
    model.save_pretrained(tmp_path / "m", metrics={"r1": 97.5, "bad": float("nan")}, data={"train": "set"})
    again = GEPModel.from_pretrained(tmp_path / "m")
    for got, want in zip(again.encode(events), model.encode(events)):
        assert torch.equal(got, want)
    for got, want in zip(again.predict(events), model.predict(events)):
        assert (got is None and want is None and not backbone) or torch.equal(got, want)
    assert torch.equal(again.zero_shot(events), model.zero_shot(events))
    assert again.classes == ["zero", "one", "two"] and again.metrics == {"r1": 97.5, "bad": None}
    assert again.config == model.config and not again.training
    assert again.preset == "nano" and again.input_settings == vars(settings())
    assert str(tmp_path) not in (tmp_path / "m" / "config.json").read_text()  # no path of this machine
    again.save_pretrained(tmp_path / "m2")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "m2" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    fresh = GEPModel.from_config(model.config)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_a_backbone_put_in_later_is_saved_too(tmp_path):
    model = make(backbone=False)
    model.save_pretrained(tmp_path / "one")
    model = GEPModel.from_pretrained(tmp_path / "one")
    torch.manual_seed(3)
    model.backbone = Backbone(96, width=48, depth=1, heads=2)
    model.save_pretrained(tmp_path / "two")
    again = GEPModel.from_pretrained(tmp_path / "two")
    assert torch.equal(again.predict(recording()).image, model.predict(recording()).image)


def test_a_recording_becomes_the_frames_of_the_training_pipeline():
    model, events = make(), recording()
    windows = cut_windows(events, 6, 50_000)
    fitted, bounds = augment.fit((34, 34), (36, 36), "pad").apply_events(windows.events, windows.bounds)
    batch = EventBatch.from_windows(fitted, bounds)
    frames, edges = model.frames(events)
    assert torch.equal(frames[0], model.represent(batch)) and np.array_equal(edges[0].numpy(), bounds)
    # By hand: log(1 + count) / 2 of the first window, one pixel from the border.
    first = events[: int(np.searchsorted(events.t, events.t[0] + 50_000))]
    counts = np.zeros((2, 36, 36))
    np.add.at(counts, (first.p, first.y.astype(int) + 1, first.x.astype(int) + 1), 1)
    np.testing.assert_allclose(frames[0, 0].numpy(), np.log1p(counts) * 0.5, atol=1e-6)
    # A batch of windows, given bounds, and the recording itself are the same input.
    encoded = model.encode(events)
    for other in (
        model.encode(batch),
        model.encode(events, bounds=bounds),
        model.encode([events], bounds[None]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(encoded, other))
    assert encoded.tokens.shape == (1, 6, 36, 96) and torch.equal(encoded.t_us[0], torch.from_numpy(bounds[:, 1]))
    torch.testing.assert_close(encoded.pooled, encoded.tokens.mean(2))


def test_windows_sizes_and_counts_follow_the_settings():
    events = recording(size=72)
    model = make(fit="resize", window_us=0, windows=3, num_events=1000)
    frames, edges = model.frames([events, events[:0]])
    assert frames.shape == (2, 3, 2, 36, 36) and frames[1].abs().sum() == 0
    middle = events[1500:2500]
    assert edges[0, 0, 0] == middle.t[0] and edges[0, -1, 1] == middle.t[-1] + 1
    counts = torch.expm1(frames[0] / 0.5).sum((1, 2, 3))
    assert counts.sum().item() == pytest.approx(1000, abs=0.1)
    assert model.frames(events, windows=5)[0].shape[1] == 5
    assert make().encode([recording(0), recording(1)], bounds=np.array([[0, 10]])).tokens.shape[:2] == (2, 1)


def test_forward_is_causal_and_needs_to_know_when_windows_end():
    model = make()
    frames, edges = model.frames(recording())
    with torch.no_grad():
        whole = model(frames, edges[..., 1])
        part = model(frames[:, :4], edges[:, :4, 1])
        torch.testing.assert_close(whole.image[:, :4], part.image, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(frames).hidden, whole.hidden)  # 50 ms windows in a row: the same clock
        with pytest.raises(ValueError, match="t_us"):
            make(window_us=0)(frames)
    assert whole.hidden.shape == (1, 6, 36, 48) and whole.next.shape == whole.image.shape == (1, 6, 36, 96)
    assert torch.equal(whole.tokens, model.encode(recording()).tokens)


def test_encode_leaves_modes_alone():
    model = make().train()
    model.encoder.eval()
    out = model.encode(recording())
    assert model.training and model.backbone.training and not model.encoder.training
    assert not out.tokens.requires_grad


def test_zero_shot_by_class_head_and_by_vectors(tmp_path):
    teacher = stand_in(tmp_path / "teacher")
    events = [recording(0), recording(1)]
    plain = make(backbone=False, teacher=teacher)
    out = plain.predict(events)
    torch.testing.assert_close(plain.zero_shot(events), teacher.classify(out.pooled.mean(1)))
    full = make(teacher=teacher)
    image = full.predict(events).image[:, -1].mean(1)
    torch.testing.assert_close(full.zero_shot(events), teacher.classify(image))
    vectors = torch.nn.functional.normalize(torch.randn(4, 96), dim=-1)
    unit = torch.nn.functional.normalize(full.encoder.embed(out.pooled.mean(1)), dim=-1)
    torch.testing.assert_close(full.zero_shot(events, vectors), unit @ vectors.T)
    with pytest.raises(ValueError, match="class vectors"):
        make().zero_shot(events)
    assert not any("class_head" in name for name, p in full.named_parameters() if p.requires_grad)


def test_push_to_hub_sends_the_same_folder(tmp_path, monkeypatch):
    sent = {}

    def upload(self, *, folder_path, **keywords):
        for path in folder_path.iterdir():
            sent[path.name] = path.read_bytes()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model = make()
    model.save_pretrained(tmp_path / "events", metrics={"r1": 97.5})
    model.push_to_hub("someone/events")
    for name in ("config.json", "model.safetensors"):
        assert sent[name] == (tmp_path / "events" / name).read_bytes()
    card = ModelCard(sent["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.library_name == "gep" and "event-camera" in card.data.tags
    assert "| r1 | 97.5 |" in card.text and 'GEPModel.from_pretrained("someone/events")' in card.text


def test_from_the_hub_and_without_it(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "m")
    asked = {}

    def snapshot(name, **keywords):
        asked.update(name=name, **keywords)
        if name == "someone/gone":
            raise OSError("no route to host")
        return str(tmp_path / "m")

    monkeypatch.setattr(export, "snapshot_download", snapshot)
    model = GEPModel.from_pretrained("someone/events", revision="v2")
    assert asked["name"] == "someone/events" and asked["revision"] == "v2"
    assert sorted(asked["allow_patterns"]) == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(model.encode(recording()).tokens, make().encode(recording()).tokens)
    with pytest.raises(FileNotFoundError, match=r"someone/gone.*no route to host"):
        GEPModel.from_pretrained("someone/gone")
    for name in (str(tmp_path / "nothing"), "runs/stage1/export", "./export"):
        with pytest.raises(FileNotFoundError, match="no export at"):
            GEPModel.from_pretrained(name)
    with pytest.warns(UserWarning, match="revision"):
        GEPModel.from_pretrained(tmp_path / "m", revision="v2")


def test_errors_name_the_fault(tmp_path):
    model = make()
    with pytest.raises(ValueError, match="channels"):
        GEPModel.from_config({**model.config, "representation": {"name": "tencode", "params": {}}})
    with pytest.raises(ValueError, match="window_us"):
        GEPModel.from_config({**model.config, "input": {"height": 36}})
    with pytest.raises(ValueError, match="at least one"):
        model.encode([])
    with pytest.raises(ValueError, match="B x 4"):
        model.encode(EventBatch.from_windows([recording(size=36)] * 6), windows=4)
    with pytest.raises(ValueError, match="without `windows`"):
        model.encode(recording(), bounds=np.array([[0, 1]]), windows=2)
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "surprise": 1}))
    with pytest.raises(ValueError, match="surprise"):
        GEPModel.from_pretrained(tmp_path / "m")
    config["backbone"]["depth"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unexpected: backbone\.blocks\.1"):
        GEPModel.from_pretrained(tmp_path / "m")
