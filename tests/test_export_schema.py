"""Configs and weights from anywhere: one clear error before memory is used, and what is legitimate passes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from downstream.dense.model import DenseModel
from downstream.llm_evrep.model import EvRep
from gep import export
from gep.events import represent
from gep.events.prepare import INPUT_KEYS
from gep.export_schema import BACKBONE, ENCODER, INPUT_FIELDS, REPRESENTATION, plain_json
from gep.hub import GEPModel
from gep.models import Backbone, EventEncoder, FrozenVFM, ImageModel
from gep.pretrained import Pretrained
from tests.hub_models import MODELS

HUGE = 10**9
DEEP: Any = []
for _ in range(100):
    DEEP = [DEEP]


def whole() -> dict[str, Any]:
    """A config of every part that a GEPModel may have."""
    model = MODELS["gep"]()
    model.backbone = Backbone(96, width=48, depth=2, heads=2)
    return copy.deepcopy(model.config) | {"classes": ["a", "b"], "teacher": "timm:x"}


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *way, last = path.split(".")
    into = config
    for key in way:
        into = into[int(key) if isinstance(into, list) else key]
    into[int(last) if isinstance(into, list) else last] = value
    return config


GEP_FAULTS = [
    ("encoder.in_chans", HUGE),
    ("encoder.in_chans", -2),
    ("encoder.in_chans", "2"),
    ("encoder.in_chans", 2.0),
    ("encoder.in_chans", True),
    ("encoder.in_chans", None),
    ("encoder.embed_dim", HUGE),
    ("encoder.arch", "resnet18"),
    ("encoder.arch", "hf-hub:someone/evil"),
    ("encoder.arch", "vit_x/../../y"),
    ("encoder.arch", "vit_" + "a" * 10_000),
    ("encoder.arch", ["nano"]),
    ("encoder.img_size", [36]),
    ("encoder.img_size", [HUGE, HUGE]),
    ("encoder.img_size", [36] * 100_000),
    ("encoder.img_size.0", float("nan")),
    ("encoder.mean", [float("inf"), 0.0]),
    ("encoder.std", [0.0, 1.0]),
    ("encoder.head_dim", HUGE),
    ("encoder.head_hidden", -1),
    ("encoder.drop_path", float("nan")),
    ("encoder.drop_path", 2),
    ("encoder.keep", "all"),
    ("backbone.token_dim", HUGE),
    ("backbone.width", HUGE),
    ("backbone.depth", HUGE),
    ("backbone.depth", -1),
    ("backbone.depth", "12"),
    ("backbone.heads", 0),
    ("backbone.order", "frames"),
    ("backbone.mlp_ratio", float("inf")),
    ("backbone.span", 0),
    ("backbone.min_us", 0),
    ("backbone.surprise", 1),
    ("backbone", []),
    ("backbone", DEEP),
    ("representation.name", "pickle"),
    ("representation.name", {"name": "histogram"}),
    ("representation.params", {"bins": HUGE}),
    ("representation.params", {"bins": 5}),
    ("representation.params", None),
    ("input.height", 0),
    ("input.height", HUGE),
    ("input.width", "36"),
    ("input.fit", "stretch"),
    ("input.windows", HUGE),
    ("input.window_us", -1),
    ("input.window_us", 50_000.5),
    ("input.more", 1),
    ("classes", "zero"),
    ("classes", [1, 2]),
    ("classes", ["x" * 10_000]),
    ("teacher", 7),
    ("teacher", "export:/etc"),
    ("teacher", "open_clip:hf-hub:someone/evil"),
    ("data", {"deep": DEEP}),
    ("metrics", {"r1": float("nan")}),
    ("metrics", {"r1": 2**70}),
    ("data", [0] * 300_000),
]


@pytest.mark.parametrize("path, value", GEP_FAULTS, ids=lambda value: repr(value)[:40])
def test_a_hostile_value_is_named_and_costs_no_memory(path: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(whole(), path, value)
    monkeypatch.setattr(GEPModel, "__init__", in_meta_alone(GEPModel.__init__))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            GEPModel.from_config(config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    part = path.replace("img_size.0", "img_size[0]").split(".")[-1]
    assert part in str(error.value) or "representation" in path, str(error.value)
    assert len(str(error.value)) < 400 and peak < 64 * 2**20


@pytest.mark.parametrize(
    "kind, path, value, word",
    [
        ("dense", "head.out", HUGE, "head.out"),
        ("dense", "head.name", "__class__", "linear, upernet, dpt"),
        ("dense", "features.name", "exec", "dense, histogram"),
        ("dense", "features.windows", HUGE, "features.windows"),
        ("dense", "features.patch_size", [6, HUGE], r"patch_size\[1\]"),
        ("dense", "task_kind", "flow", "segmentation, depth"),
        ("dense", "task", {"classes": DEEP}, "nested deeper"),
        ("dense", "input.height", -36, "input.height"),
        ("evrep", "generator.widths", [8, HUGE, 48], r"widths\[1\]"),
        ("evrep", "generator.depths", [1, HUGE, 1], r"depths\[1\]"),
        ("evrep", "generator.name", "vae", "unet, gep"),
        ("evrep", "generator.in_chans", 4, "in_chans"),
        ("evrep", "generator.decoder_depth", "1", "decoder_depth"),
        ("evrep", "reader", ["x"], "reader"),
        ("image", "encoder.in_chans", 2, "in_chans"),
        ("image", "encoder.img_size", "36", "img_size"),
        ("image", "classes", None, "classes"),
    ],
)
def test_every_head_and_generator_checks_its_config(kind: str, path: str, value: Any, word: str) -> None:
    model: Pretrained = MODELS[kind]()
    assert isinstance(type(model).from_config(model.config), type(model))
    with pytest.raises(ValueError, match=word):
        type(model).from_config(changed(model.config, path, value))


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_missing_is_named(kind: str) -> None:
    model: Pretrained = MODELS[kind]()
    for key in set(model.config) - {"backbone", "classes", "teacher", "data", "metrics"}:
        with pytest.raises(ValueError, match=f"config lacks '{key}'"):
            type(model).from_config({name: value for name, value in model.config.items() if name != key})
    for nothing in (None, [], "gep", 3):
        with pytest.raises(ValueError, match="config = "):
            type(model).from_config(nothing)


def test_values_in_range_that_add_up_to_too_much_are_refused() -> None:
    grown = whole()
    grown["backbone"] |= {"width": 16_384, "depth": 256, "heads": 256}
    with pytest.raises(ValueError, match="parameters, at most"):
        GEPModel.from_config(grown)


def test_the_largest_vits_are_within_bounds() -> None:
    config = whole() | {"classes": None}
    config["encoder"] |= {"arch": "vit_giant_patch14_reg4_dinov2", "img_size": [518, 518], "head_dim": 1536}
    config["input"] |= {"height": 518, "width": 518}
    config["backbone"] |= {"token_dim": 1536, "width": 1536, "depth": 40, "heads": 24}
    model = GEPModel.skeleton(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert model.encoder.num_layers == 40 and 2e9 < count < 3e9
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_a_skeleton_has_the_shapes_and_draws_no_random_number() -> None:
    for make in MODELS.values():
        model: Pretrained = make()
        before = torch.get_rng_state()
        skeleton = type(model).skeleton(model.config).state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        assert {name: (t.shape, t.dtype) for name, t in skeleton.items()} == {
            name: (t.shape, t.dtype) for name, t in model.state_dict().items()
        }


def test_every_argument_has_its_check() -> None:
    def fields(check: Callable[..., None]) -> set[str]:
        return set(inspect.getclosurevars(check).nonlocals["fields"])

    for kind, check in ((EventEncoder, ENCODER), (Backbone, BACKBONE)):
        assert fields(check) == set(inspect.signature(kind).parameters), kind
    params = inspect.getclosurevars(REPRESENTATION).nonlocals["fields"]["params"]
    of_all = {field.name for kind in represent.REPRESENTATIONS.values() for field in dataclasses.fields(kind)}
    assert fields(params) == of_all and set(INPUT_FIELDS) == set(INPUT_KEYS)


def test_plain_json_takes_what_exports_hold() -> None:
    plain_json({"a": [1, 2.5, None, True, "x", (1, 2)], "b": {"c": {"d": [[[1]]]}}}, "data")
    for bad in ({1, 2}, b"x", object(), {"a": {"b": torch.zeros(1)}}):
        with pytest.raises(ValueError, match="data = .*plain JSON"):
            plain_json(bad, "data")


def rewrite(folder: Path, text: Callable[[str], str]) -> None:
    path = folder / "config.json"
    path.write_text(text(path.read_text()))


@pytest.mark.parametrize(
    "text, word",
    [
        (lambda s: s.replace("36", "NaN", 1), "NaN is no JSON"),
        (lambda s: s.replace("36", "-Infinity", 1), "Infinity is no JSON"),
        (lambda s: s.replace("36", "1e999", 1), "img_size"),
        (lambda s: s.replace("36", "9" * 3000, 1), "img_size"),
        (lambda s: s.replace("36", "9" * 10_000, 1), "JSON"),
        (lambda s: '{"a":' * 50_000, "not valid JSON"),
        (lambda s: s.replace('"data": {}', '"data": ' + "[" * 500 + "]" * 500), "nested deeper"),
        (lambda s: s + " " * 17 * 2**20, "no config has over"),
        (lambda s: "[]", "not of a gep export"),
        (lambda s: s.replace('"gep"', '"dense"').replace('"format": "dense"', '"format": "gep"'), "was asked for"),
    ],
)
def test_a_hostile_config_file_is_one_error(tmp_path: Path, text: Callable[[str], str], word: str) -> None:
    folder = MODELS["gep"]().save_pretrained(tmp_path / "m")
    rewrite(folder, text)
    with pytest.raises(ValueError, match=word) as error:
        GEPModel.from_pretrained(folder)
    assert str(folder / "config.json") in str(error.value) or "was asked for" in word
    assert len(str(error.value)) < 500


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("unpickled",))


def header(path: Path, shape: list[int], end: int) -> None:
    """16 bytes of a safetensors file whose header states what it likes."""
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


@pytest.mark.parametrize(
    "write, word",
    [
        (lambda path: path.write_bytes(pickle.dumps(Bomb())), "damaged"),
        (lambda path: torch.save({"a": Bomb()}, path), "damaged"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2**62) + b"{}"), "damaged"),
        (lambda path: header(path, [2**31, 2**31], 16), "damaged"),
        (lambda path: header(path, [4], 2**50), "damaged"),
        (lambda path: header(path, [4], 16), "unexpected: a"),
        (lambda path: save_file({f"t{i}": torch.zeros(1) for i in range(5000)}, path), r"5000 in all"),
    ],
)
def test_hostile_weights_are_one_error(tmp_path: Path, write: Callable[[Path], Any], word: str) -> None:
    folder = MODELS["gep"]().save_pretrained(tmp_path / "m")
    write(folder / "model.safetensors")
    with pytest.raises(ValueError, match=word) as error:
        GEPModel.from_pretrained(folder)
    assert str(folder / "model.safetensors") in str(error.value) and len(str(error.value)) < 6000


def test_weights_are_compared_with_the_config_before_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = MODELS["gep"]().save_pretrained(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    monkeypatch.setattr(export, "load_file", lambda _: pytest.fail("tensors were read"))
    monkeypatch.setattr(GEPModel, "__init__", in_meta_alone(GEPModel.__init__))
    for changed_to, word in (
        (weights[name].repeat(2, *[1] * (weights[name].ndim - 1)), "of another shape"),
        (weights[name].to(torch.int32), "is of type I32"),
        (weights[name].to(torch.complex64), "is of type C64"),
    ):
        save_file(weights | {name: changed_to}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=word):
            GEPModel.from_pretrained(folder)


def in_meta_alone(init: Callable[..., None]) -> Callable[..., None]:
    def checked(self: GEPModel, **config: Any) -> None:
        assert torch.empty(1).is_meta, "memory was allocated"
        init(self, **config)

    return checked


def test_half_precision_weights_still_load(tmp_path: Path) -> None:
    model = MODELS["gep"]()
    folder = model.save_pretrained(tmp_path / "m")
    half = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    again = GEPModel.from_pretrained(folder)
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in again.state_dict().items())


def test_every_kind_reads_only_its_own_folders(tmp_path: Path) -> None:
    for kind, make in MODELS.items():
        folder = make().save_pretrained(tmp_path / kind)
        for reader in (GEPModel, DenseModel, EvRep, ImageModel):
            if reader is not type(make()):
                with pytest.raises(ValueError, match="was asked for"):
                    reader.from_pretrained(folder)
    with pytest.raises(ValueError, match="was asked for"):
        FrozenVFM.from_spec(f"export:{tmp_path / 'gep'}")
