"""The published settings run as they are typed, on tiny data sets in the published layouts and a random teacher."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

import downstream.recognition.run as recognition
import stage1_align.run as stage1
import stage2_autoregress.run as stage2
from gep import config
from gep.data.build import build
from gep.data.paired import collate
from gep.data.sampler import Batches
from stage1_align.task import Stage1Config
from tests.layouts import write_cifar10dvs, write_ncaltech101_est, write_ncars, write_nimagenet
from tests.layouts_driving import write_dsec, write_eventscape

# A ViT-S of two tokens a side: the settings are the published ones, the picture is small.
SMALL = ["data.height=28", "data.width=28", "teacher.random=true", "train.precision=no"]
QUICK = ["train.num_workers=0", "train.save_every=0", "train.progress=false", "train.eval_every=0"]


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("published")
    for number, name in enumerate(("n01", "n02")):
        write_nimagenet(base / "nimagenet", (name,), "extracted_train", each=8, count=300 + number)
    write_nimagenet(base / "nimagenet", ("n01", "n02"), "extracted_val", each=2, count=300)
    write_dsec(base / "dsec", ("zurich_city_00_a", "zurich_city_01_a", "zurich_city_04_a"), pictures=6)
    write_eventscape(base / "eventscape", "Town01-03_train", sequences=3, files=3)
    write_ncars(base / "ncars", each=6)
    write_cifar10dvs(base / "cifar10dvs", each=5)
    write_ncaltech101_est(base / "ncaltech101", each=6)
    return {name: base / name for name in ("nimagenet", "dsec", "eventscape", "ncars", "cifar10dvs", "ncaltech101")}


@pytest.fixture(scope="module")
def pretrained(roots, tmp_path_factory) -> Path:
    """Stage 1, then stage 2, of gep_small: the whole chain of the README."""
    run = tmp_path_factory.mktemp("gep_small")
    mix = [f"data.mix.{name}.root={roots[name]}" for name in ("nimagenet", "dsec", "eventscape")]
    mix += ["data.mix.nimagenet.holdout=0.4"]
    first = [
        "configs/stage1/gep_small.yaml",
        *mix,
        *SMALL,
        *QUICK,
        f"run={run}/stage1",
        "train.steps=2",
        "train.batch_size=4",
    ]
    metrics = stage1.main(first)
    assert metrics["step"] == 2 and 0 <= metrics["eval/event_to_image_r1"] <= 100
    data = [item for item in SMALL if not item.startswith("data.")]
    second = ["configs/stage2/gep_small.yaml", *mix, *data, *QUICK, f"run={run}/stage2", f"model={run}/stage1/export"]
    metrics = stage2.main([*second, "backbone.depth=2", "train.steps=2", "train.batch_size=4"])
    assert metrics["step"] == 2 and metrics["eval/loss"] > 0
    return run / "stage2" / "export"


def test_a_batch_of_the_mix_holds_any_of_its_sources_in_any_order(roots):
    mix = [f"data.mix.{name}.root={roots[name]}" for name in ("nimagenet", "dsec", "eventscape")]
    cfg = config.load(Stage1Config, ["configs/stage1/gep_small.yaml", *mix, "data.mix.nimagenet.holdout=0.4", *SMALL])
    source, _ = build(cfg.data, paired=True)
    first = set()
    for batch in itertools.islice(Batches(source, collate=collate, batch_size=4)(0), 40):
        first.add(batch[0]["key"][0].split("/")[0])
        assert set(batch[0]) == {"key", "events", "windows", "t_us", "label", "image"}
    assert first == {"nimagenet", "dsec", "eventscape"}


def test_both_stages_export_what_the_settings_say(pretrained):
    exported = json.loads((pretrained / "config.json").read_text())
    assert exported["encoder"]["arch"] == "vit_small_patch14_reg4_dinov2" and exported["encoder"]["in_chans"] == 3
    assert exported["representation"] == {"name": "event_image", "params": {"percentile": 99.0}}
    assert exported["input"]["num_events"] == 30000 and exported["input"]["fit"] == "resize"
    assert exported["backbone"]["width"] == 384 and exported["backbone"]["order"] == "token"
    assert "70.0% nimagenet" in exported["data"]["train"] and "10.0% eventscape" in exported["data"]["train"]


@pytest.mark.parametrize("name", ["nimagenet", "ncaltech101", "ncars", "cifar10dvs"])
def test_recognition(name, roots, pretrained, tmp_path):
    settings = [f"configs/downstream/recognition/{name}.yaml", f"model={pretrained}", f"data.root={roots[name]}"]
    found = recognition.main(
        [*settings, *QUICK, f"run={tmp_path}", "train.steps=2", "train.batch_size=4", "train.precision=no"]
    )
    assert found["mode"] == "finetune" and 0 <= found["eval/top1"] <= 100


@pytest.mark.slow
def test_the_base_settings(roots, tmp_path):
    mix = [f"data.mix.{name}.root={roots[name]}" for name in ("nimagenet", "dsec", "eventscape")]
    mix.append("data.mix.nimagenet.holdout=0.4")
    small = [*SMALL, *QUICK, "train.steps=1", "train.batch_size=2"]
    stage1.main(["configs/stage1/gep_base.yaml", *mix, *small, f"run={tmp_path}/stage1"])
    stage2.main(["configs/stage2/gep_base.yaml", *mix, *[s for s in small if not s.startswith("data.")],
                 f"run={tmp_path}/stage2", f"model={tmp_path}/stage1/export"])  # fmt: skip
    exported = json.loads((tmp_path / "stage2" / "export" / "config.json").read_text())
    assert exported["encoder"]["arch"] == "vit_base_patch14_reg4_dinov2"
