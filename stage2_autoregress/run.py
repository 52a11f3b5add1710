"""Stage 2 from the command line.

accelerate launch stage2_autoregress/run.py configs/stage2/nmnist.yaml model=runs/nmnist/stage1/export data.root=DIR
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from gep import config
from gep.checkpoint import prepare_run_dir
from gep.data.build import batches_of, roots, take_over
from gep.data.token_store import INDEX
from gep.engine import fit, make_accelerator
from gep.evaluate import collect
from gep.export import WEIGHTS
from gep.hub import GEPModel
from stage2_autoregress.inputs import inputs_of
from stage2_autoregress.task import Stage2Config, Stage2Task, evaluate_prediction


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains a backbone on the tokens of a stage-1 export and exports both; returns the final metrics."""
    cfg = config.load(Stage2Config, argv)
    accelerator = make_accelerator(cfg.train, cfg.run)
    model = GEPModel.from_pretrained(cfg.model).to(accelerator.device)
    sequence = ("windows", "window_us", "num_events")
    data = take_over(cfg.data, model.input_settings, cfg.model, given=config.given(argv), free=sequence)
    teacher = cfg.teacher.build(encoder_preset=model.preset, device=accelerator.device)
    sets = inputs_of(cfg, data, model, teacher)
    accelerator.print(f"train on {sets.describe[0]}\nevaluate on {sets.describe[1]}")
    inputs = {"model": f"{cfg.model}/{WEIGHTS}", "teacher.name": f"{teacher.spec.removeprefix('export:')}/{WEIGHTS}"}
    if cfg.tokens:
        inputs["tokens"] = f"{cfg.tokens}/{INDEX}"
        del teacher  # was needed to know it; its memory is free from here on
    run_dir = prepare_run_dir(cfg.run, cfg, may_differ=("run", "model", *roots(cfg.data)), inputs=inputs)
    backbone = cfg.backbone.build(model.encoder.embed_dim)
    task = Stage2Task(backbone, sets.tokens, cfg.loss)

    def evaluate(_: nn.Module, step: int) -> dict[str, float]:
        rows = collect(
            task.evaluate,
            sets.held,
            collate=sets.collate,
            batch_size=max(1, cfg.train.batch_size // accelerator.num_processes),
            accelerator=accelerator,
        )
        return evaluate_prediction(rows)

    # Tokens are read in place: a thread ahead does what worker processes would.
    train, threads = cfg.train, cfg.train.threads or int(cfg.train.num_workers > 0)
    reading = dataclasses.replace(train, num_workers=0, threads=threads) if cfg.tokens else train
    metrics = fit(
        task,
        batches_of(sets.train, sets.collate, reading, data),
        train=train,
        optim=cfg.optim,
        accelerator=accelerator,
        run_dir=run_dir,
        evaluate=evaluate,
    )
    if accelerator.is_main_process:
        model.backbone = backbone
        if not data.mix:
            model.input_settings.update({key: getattr(data, key) for key in model.input_settings})
        model.save_pretrained(run_dir / "export", metrics=metrics, data={"train": sets.describe[0]})
    accelerator.print({name: round(value, 4) for name, value in metrics.items()})
    return metrics


if __name__ == "__main__":
    config.run_cli(main)
