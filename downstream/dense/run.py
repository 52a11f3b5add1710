"""A dense run from its configuration to its results: training, the best step, evaluation, export."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from downstream.common import reinitialise, write_json
from downstream.dense.best import Best
from downstream.dense.cached import CachedMaps
from downstream.dense.config import DenseConfig
from downstream.dense.features import DenseFeatures, HistogramFeatures
from downstream.dense.heads import Standardise, build_head
from downstream.dense.model import DenseModel
from downstream.dense.settings import input_settings
from downstream.dense.splits import Splits, open_splits
from downstream.dense.task import DenseTask, Problem
from gep import config, distributed, export
from gep.accelerator import to_device
from gep.checkpoint import prepare_run_dir
from gep.data.bad import BadSample
from gep.data.build import batches_of, roots, take_over
from gep.data.config import DataConfig
from gep.data.listing import Listing
from gep.data.paired import Recordings, collate
from gep.data.sampler import Batch
from gep.engine import TrainConfig, fit, make_accelerator
from gep.evaluate import collect
from gep.events.types import EventFormatError
from gep.hub import GEPModel
from gep.optim import param_groups

_START_SAMPLES, _START_BATCH = 256, 8  # enough to standardise features by


def run_dense(
    cfg: DenseConfig, problem_of: Callable[[Listing], Problem], argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """Trains, takes the best step by the validation set, evaluates it once on validation and test, exports it.

    Args:
        cfg: of the run.
        problem_of: the training set's listing -> what is to be learned.
        argv: what `cfg` was loaded from; None = the command line. It says which data.* the user set.
    Returns:
        What is in results_<mode>.json of the run folder.
    """
    accelerator = make_accelerator(cfg.train, cfg.run)
    idle = cfg.without_effect()
    if idle and accelerator.is_main_process:
        warnings.warn(f"no effect: {', '.join(idle)}", stacklevel=2)
    folder = export.fetch(cfg.model)
    pretrained = GEPModel.from_pretrained(folder)
    given, settings = config.given(argv), pretrained.input_settings
    data = take_over(cfg.data, settings, cfg.model, given=given, free=tuple(settings))
    run_dir = prepare_run_dir(
        cfg.run,
        cfg,
        may_differ=("run", "model", "tta", "test_split", *roots(cfg.data)),
        inputs={"model": folder / export.WEIGHTS},
    )
    splits = open_splits(cfg, data)
    problem = problem_of(splits.train.listing)
    splits.require(problem.target)
    accelerator.print(splits.describe())
    if cfg.mode == "scratch":
        reinitialise(pretrained, cfg.train.seed)
    model = build_model(cfg, data, pretrained, problem, splits.train.listing)
    task = DenseTask(model, problem).to(accelerator.device)
    before = digest(task.model.features)
    best, last = train(cfg, data, task, splits, accelerator, run_dir)
    after = digest(task.model.features)
    if cfg.frozen and before != after:
        raise RuntimeError(
            f"{run_dir}: mode={cfg.mode} changed the features of {cfg.model} (SHA-256 {before} before, {after} after); "
            "its results would be none of a frozen model: please report this with the run's config.yaml"
        )
    results: dict[str, Any] = {
        "mode": cfg.mode,
        "model": {"name": cfg.model, "sha256": hashlib.sha256((folder / export.WEIGHTS).read_bytes()).hexdigest()},
        "head": cfg.head.name,
        "sets": splits.record(),
        "input": dict(task.model.input_settings),
        "steps": cfg.train.steps,
        "best": {"step": best.step, problem.score: best.score, "chosen on": splits.validation.listing.split},
        "tta": cfg.tta,
        "backbone_sha256": {"before": before, "after": after},
        "train": last,
    }
    for name, source in splits.reported.items():
        found = evaluate(task, source, accelerator, cfg.train, tta=cfg.tta, title=name)
        title = f"\n{name}, step {best.step}, test-time augmentation {'on' if cfg.tta else 'off'}: {source.describe()}"
        accelerator.print(f"{title}\n{problem.table(found)}")
        results[name] = {**found, "tta": cfg.tta}
    results = export.plain(results)
    if accelerator.is_main_process:
        numbers = {name: results[name] for name in splits.reported}
        task.model.save_pretrained(run_dir / "export", metrics=numbers, data=results["sets"])
        write_json(run_dir / f"results_{cfg.mode}{'_tta' if cfg.tta else ''}.json", results)
    return results


def build_model(
    cfg: DenseConfig, data: DataConfig, pretrained: GEPModel, problem: Problem, listing: Listing | None = None
) -> DenseModel:
    """Features as the mode says, with parts that are not trained frozen, and a head for what they state."""
    if cfg.mode == "histogram":
        features: DenseFeatures | HistogramFeatures = HistogramFeatures(pretrained, windows=data.windows)
    else:
        features = DenseFeatures(
            pretrained,
            use_backbone=cfg.use_backbone,
            num_levels=cfg.head.num_levels,
            encoder_maps=cfg.head.encoder_maps,
        )
        for part, rate in rates(cfg).items():
            if rate == 0 and getattr(features, part) is not None:
                getattr(features, part).requires_grad_(False)
    distributed.seed_all(cfg.train.seed)  # the same head whatever was drawn before
    return DenseModel(
        features,
        build_head(cfg.head.name, features.channels, problem.num_outputs, width=cfg.head.width),
        kind=problem.name,
        input_settings=input_settings(data, listing),
        task=problem.task,
    )


def rates(cfg: DenseConfig) -> dict[str, float]:
    """The learning rates of encoder and backbone as shares of the head's; 0 = frozen."""
    if cfg.mode == "scratch":
        return {"encoder": 1.0, "backbone": 1.0}
    return {"encoder": 0.0, "backbone": 0.0} if cfg.frozen else {"encoder": cfg.encoder_lr, "backbone": cfg.backbone_lr}


def train(
    cfg: DenseConfig, data: DataConfig, task: DenseTask, splits: Splits, accelerator: Accelerator, run_dir: Path
) -> tuple[Best, dict[str, float]]:
    """Trains what is not frozen and puts the best step's weights into the task.

    Returns:
        The best step, and the last logged values.
    """
    cached: dict[str, CachedMaps] = {}
    if cfg.cache_features:
        share, title = _share(cfg.train, accelerator), "maps" if cfg.train.progress else None
        total = len(splits.train) + len(splits.validation)
        for name in ("train", "validation"):
            source = splits.sets[name]
            cached[name] = CachedMaps.of(task, source, accelerator, batch_size=share, total=total, title=title)
    standardise(task.model, _first_maps(task, splits.train, cached.get("train"), accelerator))
    best = Best(task.model.head if cfg.frozen else task.model, run_dir, higher=task.problem.higher)

    def validate(_: nn.Module, step: int) -> dict[str, float]:
        found = evaluate(task, splits.validation, accelerator, cfg.train, cached=cached.get("validation"))
        best.offer(step, found[task.problem.score])
        return {name: value for name, value in found.items() if isinstance(value, float | int)}

    features = task.model.features
    scales = {
        f"model.features.{part}": rate
        for part, rate in rates(cfg).items()
        if rate and getattr(features, part) is not None
    }
    groups = param_groups(
        task,
        lr=cfg.optim.lr,
        weight_decay=cfg.optim.weight_decay,
        layer_decay=1.0 if cfg.mode == "scratch" else cfg.optim.layer_decay,
        scales=scales,
    )
    batches = cached["train"].batches(cfg.train) if cached else batches_of(splits.train, collate, cfg.train, data)
    last = fit(
        task,
        batches,
        train=cfg.train,
        optim=cfg.optim,
        accelerator=accelerator,
        run_dir=run_dir,
        groups=groups,
        evaluate=validate,
    )
    best.restore()
    task.eval()
    return best, {name: value for name, value in last.items() if not name.startswith("eval/")}


def evaluate(
    task: DenseTask,
    source: Recordings,
    accelerator: Accelerator,
    settings: TrainConfig,
    *,
    tta: bool = False,
    cached: CachedMaps | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """The problem's summary of a whole set: each sample once, in fixed windows, over any number of ranks.

    Args:
        task: in evaluation mode or not, it is left in evaluation mode.
        source: with targets.
        accelerator: decides device, ranks and precision.
        settings: batch size and progress.
        tta: with the mirrored input too.
        cached: the maps of that set.
        title: of a progress bar.
    """
    task.eval()

    def rows(batch: Batch) -> dict[str, Tensor]:
        output = task.predict(batch if cached is None else cached.join(batch), tta=tta)
        return task.problem.rows(output, batch)

    found = collect(
        rows,
        source,
        collate=collate,
        batch_size=_share(settings, accelerator),
        accelerator=accelerator,
        title=title if settings.progress else None,
    )
    return task.problem.summary(found, source.listing)


def standardise(model: DenseModel, maps: Iterator[list[Tensor]]) -> None:
    """Fits the head's standardisation to maps of training samples."""
    found = [module for module in model.head.modules() if isinstance(module, Standardise)]
    assert len(found) == 1, f"{type(model.head).__name__} has {len(found)} standardisations"
    found[0].fit(maps)


def digest(features: nn.Module) -> str | None:
    """SHA-256 over names and bytes of all tensors of the features; None where there are none."""
    state = features.state_dict()
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest() if state else None


@torch.no_grad()
def _first_maps(
    task: DenseTask, source: Recordings, cached: CachedMaps | None, accelerator: Accelerator
) -> Iterator[list[Tensor]]:
    """Maps of training samples spread evenly over the set, unaugmented; every rank computes all of them alike."""
    if cached is not None:
        yield from (to_device(levels, accelerator.device) for levels in cached.parts(_START_BATCH))
        return
    task.eval()
    count = min(len(source), _START_SAMPLES)
    chosen = np.arange(count) * len(source) // count
    for start in range(0, count, _START_BATCH):
        samples = []
        for index in chosen[start : start + _START_BATCH]:
            with suppress(BadSample, EventFormatError):  # training counts and replaces them
                samples.append(source.sample(int(index), None))
        if samples:
            with accelerator.autocast():
                yield task.maps(to_device(collate(samples), accelerator.device)).levels


def _share(settings: TrainConfig, accelerator: Accelerator) -> int:
    """Samples of an evaluation batch on each rank: as many as of a training batch."""
    return max(1, settings.batch_size // (accelerator.num_processes * settings.accumulate))
