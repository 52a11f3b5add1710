"""Stage 1 from the command line.

accelerate launch stage1_align/run.py configs/stage1/nmnist.yaml data.root=DIR optim.lr=3e-4
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from gep import config
from gep.checkpoint import prepare_run_dir
from gep.data.build import batches_of, build, represent_of, roots
from gep.data.paired import collate
from gep.engine import fit, make_accelerator
from gep.evaluate import collect
from gep.events.frames import PerSource
from gep.export import WEIGHTS
from gep.hub import GEPModel
from gep.logs import shown
from gep.models.sparse import background_of
from stage1_align.cache import attach_cache, check_crops
from stage1_align.task import Stage1Config, Stage1Task, check_fit, evaluate_alignment


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Aligns an encoder with its teacher and exports it; returns the final metrics."""
    cfg = config.load(Stage1Config, argv)
    accelerator = make_accelerator(cfg.train, cfg.run)
    train_set, eval_set = build(cfg.data, paired=True, crops=True)
    represent = represent_of(cfg.represent.build(), cfg.data)
    teacher = cfg.teacher.build(encoder_preset=cfg.encoder.preset, device=accelerator.device)
    encoder = cfg.encoder.build(
        in_chans=represent.channels,
        size=(cfg.data.height, cfg.data.width),
        head_dim=teacher.pooled_dim,
        background=background_of(represent.of(0) if isinstance(represent, PerSource) else represent),
    )
    check_fit(encoder, teacher, cfg)
    check_crops(encoder, cfg)
    accelerator.print(f"train on {train_set.describe()}\nevaluate on {eval_set.describe()}")
    if cfg.encoder.init == "teacher":
        accelerator.print(encoder.init_from_teacher(teacher))
    run_dir = prepare_run_dir(
        cfg.run,
        cfg,
        may_differ=("run", "teacher.cache", *roots(cfg.data)),
        inputs={"teacher.name": f"{teacher.spec.removeprefix('export:')}/{WEIGHTS}"},
    )
    vectors = None
    if teacher.classes is not None and tuple(teacher.classes) != eval_set.listing.classes:
        accelerator.print(f"no zero-shot accuracy: the teacher's classes are not those of {eval_set.listing.name}")
        teacher.classes = teacher.class_head = None
    if teacher.has_text and eval_set.listing.classes:
        vectors = teacher.text([cfg.prompt.format(name.replace("_", " ")) for name in eval_set.listing.classes])
    if cfg.teacher.cache:
        attach_cache(cfg, teacher, accelerator, train_set, eval_set)
    task = Stage1Task(encoder, teacher, represent, cfg.loss, vectors)

    def evaluate(_: nn.Module, step: int) -> dict[str, float]:
        rows = collect(
            task.features,
            eval_set,
            collate=collate,
            batch_size=cfg.train.batch_size // accelerator.num_processes,
            accelerator=accelerator,
        )
        return evaluate_alignment(rows)

    metrics = fit(
        task,
        batches_of(train_set, collate, cfg.train, cfg.data),
        train=cfg.train,
        optim=cfg.optim,
        accelerator=accelerator,
        run_dir=run_dir,
        evaluate=evaluate,
    )
    if accelerator.is_main_process:
        # Of a mix the first source's input, on which it was evaluated.
        first = next(iter(cfg.data.sources().values()))
        own = represent.of(0) if isinstance(represent, PerSource) else represent
        model = GEPModel.from_parts(encoder, own, first, teacher=teacher)
        model.save_pretrained(Path(run_dir) / "export", metrics=metrics, data={"train": train_set.describe()})
    accelerator.print(shown(metrics))
    return metrics


if __name__ == "__main__":
    config.run_cli(main)
