"""The shipped configs of LLM-EvRep: what belongs together agrees, and N-Caltech101's trains on its layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import write_caltech101, write_ncaltech101

import downstream.llm_evrep.run as evrep
from downstream.llm_evrep.config import EvRepConfig, ReaderConfig
from downstream.llm_evrep.evaluate import EvaluateConfig
from gep import config
from gep.events.prepare import INPUT_KEYS

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "downstream" / "llm_evrep"


@pytest.mark.parametrize("name", ["nmnist", "nimagenet", "ncaltech101"])
def test_images_are_read_as_their_generator_was_trained(name: str) -> None:
    train = config.load(EvRepConfig, [str(CONFIGS / f"{name}.yaml")]).data
    read = config.load(EvaluateConfig, [str(CONFIGS / "evaluate" / f"{name}.yaml"), "llm.name=hf:x"]).data
    for field in (*INPUT_KEYS, "name"):
        assert getattr(train, field) == getattr(read, field), field


def test_classes_are_words_once_by_the_names_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict = {}
    monkeypatch.setattr("downstream.llm_evrep.readers.build_reader", lambda name, **more: given.update(more))
    ReaderConfig(name="tagger:open_clip:ViT-B-32/openai").build(classes=["missile", "sea_lion", "missile"])
    assert given["vocabulary"] == ["missile", "sea lion"]
    cfg = config.load(EvRepConfig, [str(CONFIGS / "nimagenet.yaml")])
    assert cfg.class_names == "imagenet", "a text tower knows no synsets"
    assert not cfg.llm.chooses_classes and ReaderConfig(name="tagger:open_clip:x").chooses_classes
    assert not ReaderConfig(name="tagger:open_clip:x", vocabulary=["a"]).chooses_classes


def test_ncaltech101_trains_with_the_pictures_beside_it(tmp_path: Path) -> None:
    write_ncaltech101(tmp_path / "set", each=5)
    write_caltech101(tmp_path / "set", each=5)
    small = ("generator.preset=nano", "data.height=24", "data.width=32", "train.num_workers=0", "train.precision=no")
    reader = ("llm.name=", "loss.estimator=none", "llm.dtype=")
    run = (f"run={tmp_path / 'run'}", f"data.root={tmp_path / 'set'}", "train.steps=1", "train.batch_size=4")
    found = evrep.main([str(CONFIGS / "ncaltech101.yaml"), *run, *small, *reader, "train.progress=false"])
    assert found["eval/sobel_error"] > 0
