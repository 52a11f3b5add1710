"""What one sample costs a stage: parameters and operations, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from gep.plan import count
from gep.plan.count import Flops
from gep.plan.towers import Tower
from gep.plan.workload import Stage1Config, Stage2Config, Workload

MODALITIES = 2


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a stage."""

    name: str
    """For the tables."""
    trained: int
    """Trained parameters."""
    frozen: int
    """Frozen parameters."""
    flops: Flops
    """A sample, of the passes that training needs."""
    again: float = 0.0
    """Further operations a sample: forward passes that are done twice."""
    passes: float = 0.0
    """How often a sample runs through it (windows, images, sequences)."""


def parts(work: Workload, *, gpus: int = 1) -> list[Part]:
    """The parts of a stage, in data order.

    Args:
        work: the stage.
        gpus: devices that share a batch.
    """
    return _first(work, gpus) if work.stage == 1 else _second(work)


def caches_features(work: Workload) -> bool:
    """Whether each step runs everything forward once more, so that accumulation keeps every negative."""
    cfg = work.cfg
    return isinstance(cfg, Stage1Config) and cfg.loss.contrastive > 0 and cfg.train.accumulate > 1


def trained_parameters(work: Workload) -> int:
    """Parameters of the module that a stage trains, and that its checkpoints hold."""
    return work.encoder.parameters if work.backbone is None else work.backbone.parameters


def _first(work: Workload, gpus: int) -> list[Part]:
    cfg, encoder, teacher = work.cfg, work.encoder, work.teacher
    assert isinstance(cfg, Stage1Config) and teacher is not None
    twice = caches_features(work)
    student = count.tower_flops(encoder).times(work.windows)
    if cfg.loss.contrastive:
        student += count.linear(encoder.head_weights, 1)
    again = student.forward if twice else 0.0
    if cfg.train.checkpointing:
        again += count.blocks_again(encoder) * work.windows
    image = _frozen(teacher)
    loss = Flops()
    if cfg.loss.contrastive:
        # With cached features each micro-batch holds all rows of all, and the term is computed twice.
        repeats = 2 * cfg.train.accumulate * gpus if twice else 1
        softmax = cfg.loss.contrastive_kind == "info_nce"
        loss += count.contrast_flops(cfg.train.batch_size, teacher.pooled, softmax=softmax).times(repeats)
    if cfg.loss.similarity:
        loss += count.similarity_flops(work.tokens, encoder.width).times(work.windows)
    found = [
        Part(
            name="event encoder",
            trained=encoder.parameters,
            frozen=0,
            flops=student,
            again=again,
            passes=work.windows,
        )
    ]
    if not work.cached:
        again = image.forward if twice else 0.0
        found.append(Part(name="image model", trained=0, frozen=teacher.parameters, flops=image, again=again, passes=1))
    return [*found, Part(name="losses", trained=0, frozen=0, flops=loss, passes=1)]


def _second(work: Workload) -> list[Part]:
    cfg, backbone = work.cfg, work.backbone
    assert isinstance(cfg, Stage2Config) and backbone is not None
    share = work.frames / work.max_frames
    mean = _of_length(backbone, round(backbone.length * share))
    keys = work.keys(mean.length)
    flops = count.backbone_flops(
        mean,
        work.encoder.width,
        MODALITIES,
        keys=keys,
        next_head=bool(cfg.loss.next or cfg.loss.contrastive),
        image_head=bool(cfg.loss.image),
    )
    again = count.blocks_again(mean, keys=keys) if cfg.train.checkpointing else 0.0
    trained = Part(name="backbone", trained=backbone.parameters, frozen=0, flops=flops, again=again, passes=1)
    if work.cached:
        return [trained]
    found = [
        Part(
            name="event encoder",
            trained=0,
            frozen=work.encoder.parameters,
            flops=count.tower_flops(work.encoder).frozen.times(work.windows),
            passes=work.windows,
        )
    ]
    if work.teacher is not None:
        flops_image = _frozen(work.teacher).times(work.images)
        frozen = work.teacher.parameters
        found.append(Part(name="image model", trained=0, frozen=frozen, flops=flops_image, passes=work.images))
    return [*found, trained]


def _frozen(teacher: Tower) -> Flops:
    return Flops(count.tower_flops(teacher).forward + 2 * teacher.head_weights)


def _of_length(tower: Tower, length: int) -> Tower:
    return Tower(**{**{name: getattr(tower, name) for name in tower.__dataclass_fields__}, "length": length})
