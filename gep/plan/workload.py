"""From a stage's config to what one of its steps works on: towers, and how often each runs a sample."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from gep import config
from gep.data.config import DataConfig
from gep.models.backbone import SLICED
from gep.models.presets import PRESETS, preset
from gep.models.sparse import ACTIVE
from gep.plan import towers
from gep.plan.towers import Tower
from stage1_align.task import Stage1Config
from stage2_autoregress.task import Stage2Config

StageConfig: TypeAlias = Stage1Config | Stage2Config
_FRAMES = {"image_last": (1, 1), "image_first": (1, 1), "interleave": (2, 0), "events": (1, 0)}
"""Frames of a layout: (a window, besides)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One sample of a stage, in passes through its towers."""

    stage: Literal[1, 2]
    """Which stage."""
    cfg: StageConfig
    """Its config."""
    encoder: Tower
    """Event encoder: trained in stage 1, frozen in stage 2."""
    encoder_keywords: dict[str, Any]
    """Of EventEncoder, to build it for a measurement."""
    teacher: Tower | None
    """Image model; None where nothing reads its tokens."""
    teacher_spec: str
    """Its spec."""
    image_size: tuple[int, int]
    """(H, W) of the images as they are loaded [px]."""
    windows: int
    """Event windows a sample."""
    images: float
    """Images a sample, the mean over batches."""
    backbone: Tower | None = None
    """Stage 2's transformer, over the longest sequence."""
    frames: float = 0.0
    """Frames a sequence, the mean over batches, padding included."""
    max_frames: int = 0
    """Frames of the longest sequence."""
    attention: Literal["mask", "causal", "frames"] = "mask"
    """How stage 2 attends: under a mask, in the causal kernel, or frame by frame."""
    cached: bool = False
    """Whether the frozen models' tokens come from disk: teacher.cache, or packed tokens."""
    padded: bool = False
    """Whether sequences of one batch differ in length, so that each has a mask of its own."""

    @property
    def tokens(self) -> int:
        """Tokens N of a window or an image."""
        return self.encoder.patches

    @property
    def assumed_active(self) -> bool:
        """Whether the share of patches that are encoded depends on the data, and is assumed."""
        return self.encoder_keywords.get("keep") == ACTIVE

    def keys(self, length: float) -> float | None:
        """Tokens that a token of a sequence of `length` attends to in stage 2, the mean; None = under a mask, all."""
        ahead = {"causal": 1, "frames": self.tokens}.get(self.attention)
        return None if ahead is None else (length + ahead) / 2

    def with_train(self, **changes: Any) -> Workload:
        """The same with other values of `train`."""
        train = dataclasses.replace(self.cfg.train, **changes)
        return dataclasses.replace(self, cfg=dataclasses.replace(self.cfg, train=train))


def stage_of(argv: Sequence[str]) -> Literal[1, 2]:
    """The stage that YAML files and dotted options belong to, told by the fields that they set.

    Raises:
        ValueError: they set no field that only one of the stages has.
    """
    given = {name.split(".")[0] for name in config.given(argv)}
    groups = {stage: {field.name for field in dataclasses.fields(schema)} for stage, schema in _SCHEMAS.items()}
    first, second = given & (groups[1] - groups[2]), given & (groups[2] - groups[1])
    if bool(first) == bool(second):
        both = f"{sorted(first)} are of stage 1, {sorted(second)} of stage 2" if first else "no field tells the stage"
        raise ValueError(f"{' '.join(argv)}: {both}; say --stage 1 or --stage 2")
    return 1 if first else 2


_SCHEMAS: dict[Literal[1, 2], type] = {1: Stage1Config, 2: Stage2Config}


def read(argv: Sequence[str], *, gpus: int = 1, stage: int | None = None, stage1: Sequence[str] = ()) -> Workload:
    """The workload of YAML files and dotted key=value options.

    Args:
        argv: of the stage's run.py.
        gpus: training processes that share a batch.
        stage: 1 or 2; None = told by the fields.
        stage1: stage 2: the same for its stage 1, where its export does not exist yet; empty = the YAML file of that
            name in the folder stage1 beside this one's, if that file's run is the one that `model` names.
    Raises:
        ValueError: a config error, sizes that do not fit together, or a stage 1 that is not found.
    """
    stage = stage or stage_of(argv)
    if stage == 1:
        found = _first(config.load(Stage1Config, argv))
        micro_batch(found, gpus)
        return found
    cfg = config.load(Stage2Config, argv)
    encoder, size, name = _stage1_encoder(cfg, argv, stage1)
    return _second(cfg, encoder, size, name, gpus)


def micro_batch(work: Workload, gpus: int) -> int:
    """Samples a device works on at a time.

    Raises:
        ValueError: the batch does not divide over devices and micro-batches.
    """
    return _micro_batch(work.cfg.train.batch_size, work.cfg.train.accumulate, gpus)


def _micro_batch(batch_size: int, accumulate: int, gpus: int) -> int:
    if batch_size % (gpus * accumulate):
        raise ValueError(
            f"train.batch_size {batch_size} does not divide over {gpus} devices x {accumulate} micro-batches; "
            f"give a multiple of {gpus * accumulate}, or another --gpus"
        )
    return batch_size // (gpus * accumulate)


def _first(cfg: Stage1Config) -> Workload:
    size = (cfg.data.height, cfg.data.width)
    spec = cfg.teacher.name or preset(cfg.encoder.preset).teacher or "export:"
    arch = cfg.encoder.arch or preset(cfg.encoder.preset).arch
    keywords: dict[str, Any] = {
        "arch": arch,
        "in_chans": cfg.represent.build().channels,
        "img_size": size,
        "head_hidden": cfg.encoder.head_hidden,
        "keep": cfg.encoder.keep,
    }
    teacher = _teacher(cfg.teacher, spec, size, keywords)
    keywords["head_dim"] = teacher.pooled
    encoder = towers.encoder_tower(towers.meta_encoder(keywords), *size)
    _check_tokens(encoder, teacher, spec)
    return Workload(
        stage=1,
        cfg=cfg,
        encoder=towers.kept_tower(encoder, cfg.encoder.keep),
        encoder_keywords=keywords,
        teacher=teacher,
        teacher_spec=spec,
        image_size=size,
        windows=cfg.data.pick or cfg.data.windows,
        images=1,
        cached=bool(cfg.teacher.cache),
    )


def _second(
    cfg: Stage2Config, keywords: dict[str, Any], size: tuple[int, int], name: str | None, gpus: int
) -> Workload:
    encoder = towers.encoder_tower(towers.meta_encoder(keywords), *size)
    spec = cfg.teacher.name or (preset(name).teacher if name else None) or "export:"
    windows = cfg.data.pick or cfg.data.windows
    uses_images = cfg.sequence.uses_images or cfg.loss.image > 0
    micro = _micro_batch(cfg.train.batch_size, cfg.train.accumulate, gpus)
    teacher = _teacher(cfg.teacher, spec, size, keywords) if uses_images else None
    if teacher is not None:
        _check_tokens(encoder, teacher, spec)
    odds = {layout: getattr(cfg.sequence, layout) for layout in _FRAMES}
    lengths: dict[int, float] = {}
    for layout, odd in odds.items():
        length = _FRAMES[layout][0] * windows + _FRAMES[layout][1]
        lengths |= {length: lengths.get(length, 0.0) + odd} if odd else {}
    longest = max(lengths)
    backbone = towers.backbone_tower(_meta_backbone(cfg, encoder.width), longest * encoder.patches)
    return Workload(
        stage=2,
        cfg=cfg,
        encoder=towers.kept_tower(encoder, keywords.get("keep", 1.0)),
        encoder_keywords=keywords,
        teacher=teacher,
        teacher_spec=spec,
        image_size=size,
        windows=windows,
        images=_mean_of_longest(_image_counts(cfg.data, windows), micro) if uses_images else 0,
        backbone=backbone,
        frames=_mean_of_longest(lengths, micro),
        max_frames=longest,
        attention="mask" if len(lengths) > 1 else attention_of(cfg, encoder.patches, longest),
        cached=bool(cfg.tokens),
        padded=len(lengths) > 1,
    )


def attention_of(cfg: Stage2Config, tokens: int, frames: int) -> Literal["mask", "causal", "frames"]:
    """How stage 2 attends over sequences of one length, without padding."""
    if cfg.backbone.span and cfg.backbone.span < frames:
        return "mask"
    if cfg.backbone.order == "token":
        return "causal"
    return "frames" if tokens >= SLICED else "mask"


def _meta_backbone(cfg: Stage2Config, token_dim: int) -> Any:
    with torch.device("meta"):
        return cfg.backbone.build(token_dim)


def _teacher(cfg: Any, spec: str, size: tuple[int, int], encoder: dict[str, Any]) -> Tower:
    seen = (cfg.image_size, cfg.image_size) if cfg.image_size else size
    stand_in = {"arch": encoder["arch"], "in_chans": 3, "img_size": seen}
    return towers.teacher_tower(spec, *seen, fallback=towers.meta_encoder(stand_in))


def _check_tokens(encoder: Tower, teacher: Tower, spec: str) -> None:
    if (encoder.width, encoder.patches) != (teacher.width, teacher.patches):
        raise ValueError(
            f"the encoder gives {encoder.patches} tokens of {encoder.width} features, teacher.name={spec} "
            f"{teacher.patches} of {teacher.width}; choose a pair of equal patch and width, or teacher.image_size"
        )


def _image_counts(data: DataConfig, windows: int) -> dict[int, float]:
    """Images of a sequence -> weight of the sources that give so many: a clip one a window, a still one in all."""
    counts: dict[int, float] = {}
    for name, source in data.sources().items():
        weight = data.mix[name].weight if data.mix else 1.0
        number = windows if source.clip else 1
        counts[number] = counts.get(number, 0.0) + weight
    return counts


def _mean_of_longest(odds: dict[int, float], draws: int) -> float:
    """Expected largest of so many draws: a batch is padded to its longest sample."""
    total, below, mean = sum(odds.values()), 0.0, 0.0
    for value in sorted(odds):
        up_to = below + odds[value] / total
        mean += value * (up_to**draws - below**draws)
        below = up_to
    return mean


def _stage1_encoder(
    cfg: Stage2Config, argv: Sequence[str], stage1: Sequence[str]
) -> tuple[dict[str, Any], tuple[int, int], str | None]:
    """(keywords of the encoder, (H, W), preset) of the stage 1 that a stage 2 starts from."""
    export = Path(cfg.model) / "config.json"
    if not stage1 and export.is_file():
        stored = json.loads(export.read_text(encoding="utf-8"))
        keywords, size = stored["encoder"], (stored["input"]["height"], stored["input"]["width"])
        name = next((name for name, known in PRESETS.items() if known.arch == keywords["arch"]), None)
        return keywords, size, name
    if not stage1:
        files = [Path(item) for item in argv if "=" not in item]
        beside = [file.parent.parent / "stage1" / file.name for file in files]
        stage1 = [str(file) for file in beside if file.is_file()][:1]
        if stage1 and Path(config.load(Stage1Config, stage1).run) / "export" != Path(cfg.model):
            stage1 = []
    if not stage1:
        raise ValueError(
            f"model={cfg.model} does not exist, and no stage-1 config beside makes it; name one with --stage1 FILE.yaml"
        )
    first = _first(config.load(Stage1Config, list(stage1)))
    assert isinstance(first.cfg, Stage1Config)
    return first.encoder_keywords, first.image_size, first.cfg.encoder.preset
