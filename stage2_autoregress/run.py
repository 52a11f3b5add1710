"""Stage 2 from the command line.

accelerate launch stage2_autoregress/run.py configs/stage2/nmnist.yaml model=runs/nmnist/stage1/export data.root=DIR
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gep import config
from gep.checkpoint import prepare_run_dir
from gep.data.build import batches_of, build, represent_of, roots, take_over
from gep.data.image_stream import StillStream
from gep.data.sequence import Sequences, collate_sequences
from gep.engine import fit, make_accelerator
from gep.evaluate import collect
from gep.export import WEIGHTS
from gep.hub import GEPModel
from stage2_autoregress.task import Stage2Config, Stage2Task, evaluate_prediction
from stage2_autoregress.tokens import FrozenTokens


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains a backbone on the tokens of a stage-1 export and exports both; returns the final metrics."""
    cfg = config.load(Stage2Config, argv)
    accelerator = make_accelerator(cfg.train, cfg.run)
    model = GEPModel.from_pretrained(cfg.model).to(accelerator.device)
    sequence = ("windows", "window_us", "num_events")
    data = take_over(cfg.data, model.input_settings, cfg.model, given=config.given(argv), free=sequence)
    train_set, eval_set = build(data, paired=cfg.sequence.uses_images or cfg.loss.image > 0)
    accelerator.print(f"train on {train_set.describe()}\nevaluate on {eval_set.describe()}")
    if isinstance(train_set, StillStream):
        raise ValueError("data.images.streaming=true: stage 2 addresses its samples by number; unset streaming")
    teacher = cfg.teacher.build(encoder_preset=model.preset, device=accelerator.device)
    run_dir = prepare_run_dir(
        cfg.run,
        cfg,
        may_differ=("run", "model", *roots(cfg.data)),
        inputs={"model": f"{cfg.model}/{WEIGHTS}", "teacher.name": f"{teacher.spec.removeprefix('export:')}/{WEIGHTS}"},
    )
    backbone = cfg.backbone.build(model.encoder.embed_dim)
    task = Stage2Task(backbone, FrozenTokens(model.encoder, teacher, represent_of(model.represent, data)), cfg.loss)

    def evaluate(_: nn.Module, step: int) -> dict[str, float]:
        rows = collect(
            task.evaluate,
            Sequences(eval_set, cfg.sequence),
            collate=collate_sequences,
            batch_size=max(1, cfg.train.batch_size // accelerator.num_processes),
            accelerator=accelerator,
        )
        return evaluate_prediction(rows)

    metrics = fit(
        task,
        batches_of(Sequences(train_set, cfg.sequence), collate_sequences, cfg.train, data),
        train=cfg.train,
        optim=cfg.optim,
        accelerator=accelerator,
        run_dir=run_dir,
        evaluate=evaluate,
    )
    if accelerator.is_main_process:
        model.backbone = backbone
        if not data.mix:
            model.input_settings.update({key: getattr(data, key) for key in model.input_settings})
        model.save_pretrained(run_dir / "export", metrics=metrics, data={"train": train_set.describe()})
    accelerator.print({name: round(value, 4) for name, value in metrics.items()})
    return metrics


if __name__ == "__main__":
    config.run_cli(main)
