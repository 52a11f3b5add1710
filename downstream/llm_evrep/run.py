"""LLM-EvRep from the command line: a generator whose images a frozen model reads as it reads the RGB frames.

accelerate launch downstream/llm_evrep/run.py configs/downstream/llm_evrep/nmnist.yaml data.root=DIR \
    llm.name=tagger:runs/demo/teacher/export
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from downstream.dense.settings import input_settings
from downstream.llm_evrep.class_names import class_names
from downstream.llm_evrep.config import FREE_OF_READER, EvRepConfig
from downstream.llm_evrep.descriptions import describe_frames
from downstream.llm_evrep.generator import build_generator
from downstream.llm_evrep.gep_init import gep_generator
from downstream.llm_evrep.model import EvRep, Generator
from downstream.llm_evrep.readers import Answers, CachedReader, Reader
from downstream.llm_evrep.task import EvRepTask, build_semantic, judge, summarise
from gep import config, distributed, export
from gep.checkpoint import has_progress, prepare_run_dir
from gep.data.build import batches_of, build, represent_of, roots, take_over
from gep.data.config import DataConfig
from gep.data.image_stream import StillStream
from gep.data.paired import collate
from gep.data.sampler import Batch
from gep.engine import fit, make_accelerator
from gep.evaluate import collect
from gep.events.frames import PerSource
from gep.events.represent import Representation
from gep.hub import GEPModel
from gep.logs import shown
from gep.optim import param_groups

_BASELINE_LR = 10.0  # a linear model has the rewards to follow as they change


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains a generator and exports it; returns the final metrics."""
    cfg = config.load(EvRepConfig, argv)
    accelerator = make_accelerator(cfg.train, cfg.run)
    generator, represent, data = build_input(cfg, config.given(argv))
    train_set, eval_set = build(data, paired=True)
    accelerator.print(f"train on {train_set.describe()}\nevaluate on {eval_set.describe()}")
    reader = cached = None
    if cfg.llm.name:
        names = class_names(eval_set.listing.classes, cfg.class_names) if cfg.llm.chooses_classes else ()
        reader = cfg.llm.build(device=accelerator.device, classes=names)
    estimator = cfg.loss.resolve(None if reader is None else reader.has_weights)
    run_dir = prepare_run_dir(
        cfg.run,
        cfg,
        may_differ=("run", "cache", "llm.device", "generator.model", *FREE_OF_READER, *roots(data)),
        inputs=weights_of(cfg),
    )
    keep_reader(run_dir, "" if reader is None else reader.name)
    descriptions: dict[str, str] = {}
    if reader is not None:
        cached = CachedReader(reader, Answers(cfg.cache or run_dir / "answers", rank=accelerator.process_index))
        if estimator != "none":
            assert not isinstance(train_set, StillStream)  # the config refuses it
            workers = cfg.train.num_workers or cfg.train.threads
            show = cfg.train.progress
            descriptions = describe_frames(train_set, cached, cfg.llm.prompt, num_workers=workers, progress=show)
    # Answers of local weights cost less than keeping them; of others none may be asked twice.
    asked: Reader | None = reader if reader is None or reader.has_weights else cached
    semantic = build_semantic(estimator, cfg.loss, asked, cfg.llm.prompt, seed=cfg.train.seed)
    first = next(iter(data.sources().values()))
    model = EvRep(
        represent,
        generator,
        input_settings=input_settings(first, eval_set.listing),
        reader="" if reader is None else reader.name,
    )
    task = EvRepTask(model, cfg.loss, semantic, descriptions)
    accelerator.register_for_checkpointing(task.progress)

    def rows(batch: Batch) -> dict[str, Tensor]:
        images = task.model(batch)
        if asked is None or cached is None:
            return judge(images, batch["image"], [], [])
        with torch.autocast(images.device.type, enabled=False):  # a reader has a precision of its own
            answers = asked.describe(images, cfg.llm.prompt)
        return judge(images, batch["image"], answers, cached.describe(batch["image"], cfg.llm.prompt))

    count = min(len(eval_set), cfg.eval_samples or len(eval_set))

    def evaluate(_: nn.Module, step: int) -> dict[str, float]:
        found = collect(
            rows,
            eval_set,
            collate=collate,
            batch_size=max(1, cfg.train.batch_size // (accelerator.num_processes * cfg.train.accumulate)),
            accelerator=accelerator,
            indices=(np.arange(count) * len(eval_set) // count).tolist(),
        )
        return summarise(found)

    metrics = fit(
        task,
        batches_of(train_set, collate, cfg.train, data),
        train=cfg.train,
        optim=cfg.optim,
        accelerator=accelerator,
        run_dir=run_dir,
        groups=param_groups(
            task,
            lr=cfg.optim.lr,
            weight_decay=cfg.optim.weight_decay,
            layer_decay=cfg.optim.layer_decay,
            scales={"semantic.baseline": _BASELINE_LR} if estimator == "score" else None,
        ),
        evaluate=evaluate,
    )
    if estimator == "score":
        metrics["score_shown"] = float(task.progress.shown)
    if accelerator.is_main_process:
        about: dict[str, Any] = {
            "train": train_set.describe(),
            "evaluate": eval_set.describe(),
            "prompt": cfg.llm.prompt,
        }
        about["loss"] = {**asdict(cfg.loss), "estimator": estimator}
        model.save_pretrained(Path(run_dir) / "export", metrics=metrics, data=about)
    accelerator.print(shown(metrics))
    return metrics


def build_input(cfg: EvRepConfig, given: set[str]) -> tuple[Generator, Representation | PerSource, DataConfig]:
    """Generator, representation and data config; of init=gep the encoder's input is taken over where none is given."""
    if cfg.generator.init == "random":
        represent = represent_of(cfg.represent.build(), cfg.data)
        in_chans = cfg.data.windows * represent.channels
        return build_generator(cfg.generator.preset, in_chans=in_chans), represent, cfg.data
    if any(name.startswith("represent.") for name in given):
        warnings.warn(
            f"no effect with generator.init=gep: represent.*, as {cfg.generator.model} has its own", stacklevel=2
        )
    folder = export.fetch(cfg.generator.model)
    settings = GEPModel.from_pretrained(folder).input_settings
    data = take_over(cfg.data, settings, cfg.generator.model, given=given, free=tuple(settings))
    generator, own = gep_generator(
        folder, preset=cfg.generator.preset, windows=data.windows, freeze=cfg.generator.freeze_encoder
    )
    return generator, represent_of(own, data), data


def weights_of(cfg: EvRepConfig) -> dict[str, Path]:
    """Files that the run starts from and whose content a resumed run must find unchanged."""
    files = {}
    if cfg.llm.name.startswith("tagger:"):
        name = cfg.llm.name.removeprefix("tagger:").removeprefix("export:")
        files["llm.name"] = Path(name).expanduser() / export.WEIGHTS
    if cfg.llm.file:
        files["llm.file"] = Path(cfg.llm.file).expanduser()
    if cfg.generator.init == "gep":
        files["generator.model"] = export.fetch(cfg.generator.model) / export.WEIGHTS
    return files


def keep_reader(run_dir: Path, name: str) -> None:
    """Note which reader a run is trained with, or check that it is still the one that it was begun with.

    Raises:
        ValueError: another one: weights behind the same llm.name may change.
    """
    note, problem = run_dir / "reader.txt", ""
    if distributed.is_main():
        before = note.read_text(encoding="utf-8").strip() if note.is_file() and has_progress(run_dir) else name
        if before != name:
            problem = (
                f"{run_dir} was begun with the reader {before!r}, and llm.name now means {name!r}: going on would mix "
                "the two. Put the old weights back, choose another run folder, or move this one away"
            )
        else:
            note.write_text(name + "\n", encoding="utf-8")
    problem = distributed.gather_objects(problem)[0]
    if problem:
        raise ValueError(problem)


if __name__ == "__main__":
    config.run_cli(main)
