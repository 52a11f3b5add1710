"""Stage 2 from the command line.

accelerate launch stage2_autoregress/run.py configs/stage2/nmnist.yaml model=runs/nmnist/stage1/export data.root=DIR
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from gep import config, distributed, export
from gep.checkpoint import prepare_run_dir
from gep.data.build import batches_of, roots, take_over
from gep.data.token_store import INDEX
from gep.engine import fit, make_accelerator
from gep.evaluate import collect
from gep.hub import GEPModel
from gep.logs import shown
from stage2_autoregress.inputs import inputs_of, uses_images
from stage2_autoregress.packed import weights_of
from stage2_autoregress.task import Stage2Config, Stage2Task, evaluate_prediction


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains a backbone on the tokens of a stage-1 export and exports both; returns the final metrics."""
    cfg = config.load(Stage2Config, argv)
    accelerator = make_accelerator(cfg.train, cfg.run)
    folder = export.fetch(cfg.model)
    model = GEPModel.from_pretrained(folder).to(accelerator.device)
    sequence = ("windows", "window_us", "num_events")
    data = take_over(cfg.data, model.input_settings, cfg.model, given=config.given(argv), free=sequence)
    sets = inputs_of(cfg, data, model)
    accelerator.print(f"train on {sets.describe[0]}\nevaluate on {sets.describe[1]}")
    inputs = {"model": folder / export.WEIGHTS}
    if uses_images(cfg) and (weights := weights_of(cfg.teacher, model.preset)) is not None:
        inputs["teacher.name"] = weights
    if cfg.tokens:
        inputs["tokens"] = Path(cfg.tokens).expanduser() / INDEX
    run_dir = prepare_run_dir(cfg.run, cfg, may_differ=("run", "model", *roots(cfg.data)), inputs=inputs)
    distributed.seed_all(cfg.train.seed)  # the same backbone whether an image model was built before or not
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
    accelerator.print(shown(metrics))
    return metrics


if __name__ == "__main__":
    config.run_cli(main)
