"""Every YAML in the project loads into the dataclass of its program, and stays short."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from downstream.depth.task import DepthConfig
from downstream.llm_evrep.config import EvRepConfig
from downstream.llm_evrep.evaluate import EvaluateConfig
from downstream.recognition.task import RecognitionConfig
from downstream.segmentation.task import SegmentationConfig
from gep import config
from stage1_align.task import Stage1Config
from stage2_autoregress.task import Stage2Config

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = {
    "configs/stage1": Stage1Config,
    "configs/stage2": Stage2Config,
    "configs/downstream/recognition": RecognitionConfig,
    "configs/downstream/segmentation": SegmentationConfig,
    "configs/downstream/depth": DepthConfig,
    "configs/downstream/llm_evrep/evaluate": EvaluateConfig,
    "configs/downstream/llm_evrep": EvRepConfig,
    "gep/demo/evrep_read": EvaluateConfig,
    "gep/demo/evrep_train": EvRepConfig,
    "gep/demo/stage1.yaml": Stage1Config,
    "gep/demo/stage2.yaml": Stage2Config,
    "gep/demo/natural.yaml": Stage1Config,
    "gep/demo/scenes_stage1.yaml": Stage1Config,
    "gep/demo/scenes_stage2.yaml": Stage2Config,
    "gep/demo/scenes_probe.yaml": SegmentationConfig,
}
FILES = sorted(path for folder in ("configs", "gep/demo") for path in (ROOT / folder).rglob("*.yaml"))


def schema_of(path: Path) -> type | None:
    name = path.relative_to(ROOT).as_posix()
    return next((schema for prefix, schema in SCHEMAS.items() if name.startswith(prefix)), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_yaml_loads(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
    schema = schema_of(path)
    if schema is None:
        assert path.parent.name == "accelerate", f"{path} belongs to no program"
        assert yaml.safe_load(path.read_text())["compute_environment"] == "LOCAL_MACHINE"
    else:
        assert isinstance(config.load(schema, [str(path)]), schema)


@pytest.mark.parametrize("schema", sorted(set(SCHEMAS.values()), key=lambda s: s.__name__))
def test_every_field_says_what_it_means(schema: type) -> None:
    missing = [name for name, _, _, meaning in config._walk(schema, None, "") if not meaning]
    assert not missing


def test_lists_the_field_and_the_fix() -> None:
    with pytest.raises(config.ConfigError, match=r"loss.*every weight is 0"):
        config.load(Stage1Config, ["loss.regression=0", "loss.contrastive=0"])
    with pytest.raises(config.ConfigError, match=r"optm.*optim"):
        config.load(Stage1Config, ["optm.lr=1"])
    with pytest.raises(config.ConfigError, match=r"nothing is left to predict"):
        config.load(Stage2Config, ["sequence.image_first=1", "sequence.image_last=0"])
    with pytest.raises(config.ConfigError, match=r"train\.accumulate=2 would shrink the negatives"):
        config.load(Stage2Config, ["loss.contrastive=1", "train.accumulate=2"])


def test_the_launchers_find_the_demos_teacher() -> None:
    """README's order is demo, then the stages: their YAML names the folder that the demo exports its teacher to."""
    demo = (ROOT / "gep/demo/pipeline.py").read_text()
    assert (
        'model.save(self.out / "teacher" / "export"' in demo
        and 'Path("runs/demo")' in (ROOT / "gep/cli.py").read_text()
    )
    for stage, schema in (("stage1", Stage1Config), ("stage2", Stage2Config)):
        loaded = config.load(schema, [str(ROOT / "configs" / stage / "nmnist.yaml")])
        assert loaded.teacher.name == "export:runs/demo/teacher/export"
