"""Hostile settings end in one error and run nothing; secrets in settings do not reach the run folder.

Nor does a recording that somebody sent reach other files of the machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pytest

from gep import config
from gep.app.recording import read_recording
from gep.checkpoint import prepare_run_dir
from gep.config import ConfigError
from gep.engine import TrainConfig
from gep.events.io import read_events
from gep.events.types import EventFormatError
from gep.mask import masked

TOKEN = "hf_" + "aB3" * 11
ADDRESS = f"https://someone:pa55word@host.example/a/x-000.tar?X-Amz-Signature={'f' * 64}&t=1"
YAML = {
    "object": "train: !!python/object/apply:os.system ['touch {touched}']",
    "name": "train: !!python/name:os.system",
    "bomb": "a: &a [x, x, x, x, x, x, x, x]\n"
    + "\n".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]" for p, n in zip("abcdefgh", "bcdefghi")),
    "deep": "run: " + "[" * 3000,
    "deep keys": "{a: " * 2000,
    "not a number": "train: {steps: .nan}",
    "infinite": "train: {steps: .inf}",
    "huge": "train: {steps: 1.0e+400}",
    "word": "train: {steps: [1, 2]}",
    "negative": "train: {batch_size: -1}",
    "resolver": "run: ${eval:1}",
    "bytes": "run: !!binary aGVsbG8=",
    "bad text": "run: \x00",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    run: str = "r"
    """folder"""
    root: str = ""
    """data"""
    others: list[str] = field(default_factory=list)
    """more"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """steps"""


@pytest.mark.parametrize("name", YAML)
def test_hostile_yaml_is_one_error(name: str, tmp_path: Path) -> None:
    path, touched = tmp_path / "bad.yaml", tmp_path / "touched"
    path.write_text(YAML[name].replace("{touched}", str(touched)), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        config.load(Config, [str(path)])
    assert not touched.exists() and len(str(caught.value)) < 4000


def test_settings_are_kept_without_their_secrets(tmp_path: Path) -> None:
    cfg = Config(
        run=str(tmp_path / "run"), root=ADDRESS, others=[f"pipe:curl -H {TOKEN}", "s3://bucket/{000..009}.tar"]
    )
    run = prepare_run_dir(cfg.run, cfg)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    prepare_run_dir(cfg.run, cfg)  # known again, though what was kept is not the same
    written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file()).decode()
    assert not any(secret in written for secret in (TOKEN, "pa55word", "someone", "ffff"))
    kept = config.load(Config, [str(run / "config.yaml")])
    assert kept.root == "https://***@host.example/a/x-000.tar?***"
    assert kept.others == ["pipe:curl -H ***", "s3://bucket/{000..009}.tar"]
    with pytest.raises(ValueError, match="root: ") as caught:
        prepare_run_dir(cfg.run, Config(root=ADDRESS.replace("host", "other"), others=cfg.others))
    assert "pa55word" not in str(caught.value) and "ffff" not in str(caught.value)


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_commands_headers_are_masked(quote: str) -> None:
    command = "pipe:curl -s -H 'Authorization: {}' --header='X-Api-Key:{}' https://h/a | cat".replace("'", quote)
    assert masked(command.format("Bearer abc.def", "k y")) == command.format("***", " ***")


@pytest.mark.parametrize("option", ["-u ", "--user ", "--user="])
def test_a_commands_passwords_are_masked(option: str) -> None:
    assert masked(f"pipe:curl -s {option}me:pass/word x.tar") == f"pipe:curl -s {option}*** x.tar"


def test_plain_settings_are_kept_as_they_are() -> None:
    plain = {
        "a": ["runs/hf_small", "hf://datasets/user/set@main/x.tar", "user@host"],
        "b": {"c": 1, "d": None},
        "?": "x?y",
    }
    assert masked(plain) == plain


@pytest.mark.parametrize("column", ["x", "ms_to_idx"])
@pytest.mark.parametrize("way", ["storage", "link", "group link", "view"])
def test_a_recording_reads_no_other_file(way: str, column: str, tmp_path: Path) -> None:
    secret, other = tmp_path / "secret.txt", tmp_path / "other.h5"
    secret.write_bytes(b"pa55word" * 2)
    with h5py.File(other, "w") as file:
        file[f"events/{column}"] = file["y"] = np.arange(8, dtype="u2")
    place = column if column == "ms_to_idx" else f"events/{column}"
    with h5py.File(tmp_path / "sent.h5", "w") as file:
        file.attrs["height"], file.attrs["width"] = 48, 32_767
        for name, dtype in (("t", "u4"), ("x", "u2"), ("y", "u2"), ("p", "u1")):
            file[f"events/{name}"] = np.zeros(8, dtype)
        if column == "x":
            del file["events/x"]
        if way == "storage":
            file.create_dataset(place, (8,), "u2", external=[(str(secret), 0, 16)])
        elif way == "view":
            layout = h5py.VirtualLayout((8,), "u2")
            layout[:] = h5py.VirtualSource(str(other), "y", shape=(8,))
            file.create_virtual_dataset(place, layout)
        elif way == "link":
            file[place] = h5py.ExternalLink(str(other), "y")
        else:
            file["elsewhere"] = h5py.ExternalLink(str(other), "events")
            file[place] = h5py.SoftLink(f"/elsewhere/{column}")
    with pytest.raises(EventFormatError, match=f"'{place}' lies in another file"):
        read_events(tmp_path / "sent.h5")


def test_the_page_draws_no_sensor_that_memory_has_no_room_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("".join(f"{t},1,2,1\n" for t in range(1000, 9000, 1000)))
    assert len(read_recording(tmp_path / "a.csv", height=4096, width=4096).events) == 8
    with pytest.raises(EventFormatError, match="a.csv: a sensor of 32767 × 513 pixels is not drawn"):
        read_recording(tmp_path / "a.csv", height=513, width=32_767)
