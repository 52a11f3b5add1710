"""Model folders: bit-exact, whole or not at all, strict; every fault names its file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gep import __version__, export, folder_swap

STATE = {
    "half": torch.tensor([1.0, -0.0, float("nan"), float("inf"), 2.0**-24]).half(),
    "brain": torch.randn(3, 2).bfloat16(),
    "single": torch.randn(4, 3).T,  # not contiguous
    "long": torch.tensor([2**62, -1]),
    "scalar": torch.tensor(3.25, dtype=torch.float64),
    "flag": torch.tensor([True, False]),
}


def save(folder: Path, state=None, **config) -> Path:
    return export.save_folder(
        folder,
        kind="gep",
        config={"encoder": {"arch": "nano"}, **config},
        state=state or STATE,
        card="# card\n",
    )


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8 if tensor.ndim else tensor.dtype).numpy().tobytes()


def test_saved_and_loaded_bit_for_bit(tmp_path):
    state = {**STATE, "shared_a": STATE["long"], "shared_b": STATE["long"]}  # safetensors alone refuses these
    folder = save(tmp_path / "deep" / "er" / "export", state, number=0.1)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config, loaded = export.load_folder(folder, "gep")
    assert config == {"encoder": {"arch": "nano"}, "number": 0.1}
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        assert bits(loaded[name]) == bits(value)
    head = json.loads((folder / "config.json").read_text())
    assert (head["format"], head["format_version"], head["kind"]) == ("gep", 1, "gep")
    assert head["gep_version"] == __version__ and (folder / "README.md").read_text() == "# card\n"
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["export"]  # nothing left beside it


def test_an_export_is_replaced_and_foreign_files_are_not(tmp_path):
    save(tmp_path / "e", round=1)
    save(tmp_path / "e", {"w": torch.ones(2)}, round=2)
    config, state = export.load_folder(tmp_path / "e", "gep")
    assert config["round"] == 2 and list(state) == ["w"]
    (tmp_path / "e" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        save(tmp_path / "e", round=3)
    assert (tmp_path / "e" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        save(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "file"]


FULL_DISK = """
import resource, sys, torch
from gep import export
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # as a full disk: the kernel refuses the write
try:
    state = {"w": torch.zeros(100_000)}
    export.save_folder(sys.argv[1], kind="gep", config={"round": 2}, state=state, card="")
except OSError as error:
    print(error)
    sys.exit(7)
"""


def test_a_full_disk_leaves_the_previous_export_whole(tmp_path):
    folder = save(tmp_path / "e", round=1)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(folder)], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert str(folder) in done.stdout and "is unchanged" in done.stdout
    config, state = export.load_folder(folder, "gep")
    assert config["round"] == 1 and state.keys() == STATE.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_failed_move_puts_the_previous_export_back(tmp_path, monkeypatch):
    folder, rename, calls = save(tmp_path / "e", round=1), folder_swap.os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(folder_swap, "_exchange", lambda one, two: False)
    monkeypatch.setattr(folder_swap.os, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "e", round=2)
    assert export.load_folder(folder, "gep")[0]["round"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def edit(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "damage, kind, error, words",
    [
        (lambda f: (f / "config.json").unlink(), "gep", FileNotFoundError, ["config.json"]),
        (lambda f: (f / "model.safetensors").unlink(), "gep", FileNotFoundError, ["model.safetensors"]),
        (
            lambda f: edit(f, format_version=9, gep_version="7.1"),
            "gep",
            ValueError,
            ["9", "1", "7.1", "install"],
        ),
        (lambda f: edit(f, format="other"), "gep", ValueError, ["config.json"]),
        (lambda f: None, "vfm", ValueError, ["'gep'", "'vfm'"]),
        (lambda f: (f / "config.json").write_text("{"), "gep", ValueError, ["config.json", "JSON"]),
        (
            lambda f: truncate(f / "model.safetensors", 40),
            "gep",
            ValueError,
            ["model.safetensors", "damaged"],
        ),
        (
            lambda f: truncate(f / "model.safetensors", -3),
            "gep",
            ValueError,
            ["model.safetensors", "damaged"],
        ),
        (lambda f: truncate(f / "model.safetensors", 0), "gep", ValueError, ["model.safetensors", "damaged"]),
    ],
)
def test_damage_ends_in_one_error_that_names_it(tmp_path, damage, kind, error, words):
    folder = save(tmp_path / "e")
    damage(folder)
    with pytest.raises(error) as caught:
        export.load_folder(folder, kind)
    assert all(word in str(caught.value) for word in [str(folder), *words])


def truncate(path: Path, size: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:size])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export.load_folder(tmp_path / "nowhere", "gep")


def test_strict_loading_names_every_key_and_changes_nothing():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = dict(before)
    del state["0.bias"]
    state["1.weight"] = torch.zeros(1, 4)
    state["extra"] = torch.zeros(1)
    state["0.weight"] = torch.full((3, 2), 9.0)
    with pytest.raises(ValueError) as error:
        export.load_strict(module, state, source="the.file")
    for word in ("the.file", "missing: 0.bias", "unexpected: extra", "1.weight (1, 4)", "(1, 3)"):
        assert word in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    export.load_strict(module, {name: torch.ones_like(value) for name, value in before.items()})
    assert all(bool((value == 1).all()) for value in module.state_dict().values())


def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path):
    for config, word in (({"a": {1, 2}}, "JSON"), ({"a": float("nan")}, "JSON"), ({"kind": "x"}, "kind")):
        with pytest.raises(ValueError, match=word):
            export.save_folder(tmp_path / "e", kind="gep", config=config, state=STATE, card="")
    assert not list(tmp_path.iterdir())
    assert export.plain({"a": float("nan"), "b": {"c": float("inf"), "d": 1.5}, "e": "x"}) == {
        "a": None,
        "b": {"c": None, "d": 1.5},
        "e": "x",
    }


def test_card_has_front_matter_and_tables():
    card = export.model_card(
        title="A model",
        summary="What it is.",
        config={"encoder": {"arch": "nano", "mean": None}},
        data={"train": "a|b"},
        metrics={"zero_shot": 95.123456789},
        usage="x = 1",
    )
    front, body = card.split("---\n", 2)[1:]
    assert front.splitlines() == [
        "license: apache-2.0",
        "library_name: gep",
        "tags:",
        "- event-camera",
        "- neuromorphic-vision",
    ]
    for line in ("# A model", "| encoder.arch | nano |", "| encoder.mean | – |", "| zero_shot | 95.1235 |"):
        assert line in body.splitlines()
    assert "| train | a\\|b |" in body and "```python\nx = 1\n```" in body


def test_a_long_card_is_cut():
    metrics = {"all": {"rmse": 1.0}, "sequences": {f"s{k:04d}": k for k in range(5000)}}
    config = {"classes": [f"class {k}" for k in range(1000)]}
    card = export.model_card(title="A", summary="B", config=config, metrics=metrics)
    assert len(card.splitlines()) < 100 and len(card) < 4000
    assert "| all.rmse | 1 |" in card and "| … | 4,941 more in config.json |" in card and "'class 9'" in card
