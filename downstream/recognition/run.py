"""Recognition from the command line.

accelerate launch downstream/recognition/run.py configs/downstream/recognition/nmnist.yaml \
    model=runs/nmnist/stage2/export data.root=DIR mode=kshot
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from downstream.common import WindowFeatures, extract, reinitialise, write_json
from downstream.metrics import per_class_accuracy, top_k_accuracy
from downstream.recognition.model import GEPClassifier
from downstream.recognition.task import (
    FinetuneTask,
    RecognitionConfig,
    kshot,
    probe,
    zero_shot,
)
from gep import config, export
from gep.checkpoint import prepare_run_dir
from gep.data.build import batches_of, build, roots, take_over
from gep.data.config import DataConfig
from gep.data.fewshot import draw_shots
from gep.data.images import StillImages
from gep.data.listing import Listing
from gep.data.paired import Recordings, collate
from gep.engine import fit, make_accelerator
from gep.evaluate import collect, evenly
from gep.hub import GEPModel
from gep.optim import param_groups

_START_SAMPLES = 4096  # enough to standardise features and to start the head from


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs one mode; writes results_<mode>_<feature>.json into the run folder and returns what is in it."""
    cfg = config.load(RecognitionConfig, argv)
    accelerator = make_accelerator(cfg.train, cfg.run)
    folder = export.fetch(cfg.model)
    model = GEPModel.from_pretrained(folder).to(accelerator.device)
    data = take_over(
        cfg.data, model.input_settings, cfg.model, given=config.given(argv), free=tuple(model.input_settings)
    )
    model.input_settings.update({key: getattr(data, key) for key in model.input_settings})
    if data.images.streaming:
        raise ValueError("data.images.streaming=true: recognition addresses its samples by number; unset streaming")
    if cfg.mode in ("finetune", "scratch"):
        results = finetune(cfg, model, folder, data, accelerator)
    else:
        results = probe_frozen(cfg, model, data, accelerator)
    if accelerator.is_main_process:
        write_json(Path(cfg.run) / f"results_{cfg.mode}_{cfg.feature}.json", results)
    accelerator.print(json.dumps(results, indent=2))
    return results


def _sets(data: DataConfig) -> tuple[Recordings | StillImages, Recordings | StillImages]:
    train_set, test_set = build(data, paired=False)
    assert isinstance(train_set, Recordings | StillImages)  # streams and mixes have been refused
    return train_set, test_set


def probe_frozen(cfg: RecognitionConfig, model: GEPModel, data: DataConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Zero-shot, linear probe or k-shot probes on features of the frozen model.

    Without data.eval_split, k-shot draws from and tests on the held-out part alone: the rest of the training split is
    what the two stages may have been pretrained on.
    """
    train_set, test_set = _sets(data)
    share = max(1, cfg.train.batch_size // accelerator.num_processes)

    def features_of(source: Recordings | StillImages, title: str) -> tuple[WindowFeatures, Tensor]:
        accelerator.print(f"{title} {source.listing.describe()}")
        return extract(
            model, source, accelerator, batch_size=share, use_backbone=cfg.use_backbone, pool=cfg.pool, title=title
        )

    features, labels = features_of(test_set, "test on")
    test = (features.pooled(cfg.feature), labels)
    classes = test_set.listing.classes
    results: dict[str, Any] = {"mode": cfg.mode, "feature": cfg.feature, "list": test_set.listing.hash}
    results["num_test"] = len(labels)
    if cfg.mode == "zero_shot":
        teacher = cfg.teacher.build(device=accelerator.device) if cfg.teacher.name else None
        image = features.in_image_space() if teacher is None else features.encoder.mean(dim=1)
        results["top1"] = zero_shot(model, image, labels, classes, teacher=teacher, prompt=cfg.prompt)
        return results
    if cfg.mode == "kshot" and not data.eval_split:
        results["top1"] = kshot(test, None, len(classes), cfg.probe)
        return results
    warn_of_missing(train_set.listing, test_set.listing, data)
    features, labels = features_of(train_set, "learn from")
    learn = (features.pooled(cfg.feature), labels)
    if cfg.mode == "probe":
        fitted, numbers = probe(learn, test, len(classes), cfg.probe)
        if accelerator.is_main_process:
            described = {"train": train_set.listing.describe(), "test": test_set.listing.describe()}
            save_classifier(cfg, model, data, classes, fitted.folded(), numbers, described)
        return results | numbers
    results["top1"] = kshot(learn, test, len(classes), cfg.probe)
    return results


def finetune(
    cfg: RecognitionConfig, model: GEPModel, folder: Path, data: DataConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """Trains all parts of the model (of `folder`), each at its own rate or from scratch, and tests in fixed windows."""
    run_dir = prepare_run_dir(
        Path(cfg.run) / cfg.mode,
        cfg,
        may_differ=("run", "model", *roots(cfg.data)),
        inputs={"model": folder / export.WEIGHTS},
    )
    if cfg.mode == "scratch":
        reinitialise(model, cfg.train.seed)
    train_set, test_set = _sets(data)
    warn_of_missing(train_set.listing, test_set.listing, data)
    if cfg.shots:
        chosen, _ = draw_shots(train_set.listing.labels, cfg.shots, seed=cfg.probe.seed, draw=cfg.draw)
        train_set = train_set.subset(chosen, f"{train_set.listing.split}[{cfg.shots} shots, draw {cfg.draw}]")
    accelerator.print(f"learn on {train_set.listing.describe()}\ntest on {test_set.listing.describe()}")
    task = FinetuneTask(
        model,
        len(test_set.listing.classes),
        feature=cfg.feature,
        use_backbone=cfg.use_backbone,
        pool=cfg.pool,
        label_smoothing=cfg.label_smoothing,
    )
    scratch = cfg.mode == "scratch"
    start = train_set.subset(evenly(len(train_set), _START_SAMPLES), "start of the head")
    features, labels = extract(
        model,
        start,
        accelerator,
        batch_size=max(1, cfg.train.batch_size // accelerator.num_processes),
        use_backbone=cfg.use_backbone,
        pool=cfg.pool,
    )
    task.to(accelerator.device).start_from(features.pooled(cfg.feature), None if scratch else labels, cfg.probe.c)
    rates = {"encoder": 1.0 if scratch else cfg.encoder_lr}
    if task.backbone is not None:
        rates["backbone"] = 1.0 if scratch else cfg.backbone_lr
    for part, rate in rates.items():
        if rate == 0:
            getattr(task, part).requires_grad_(False)
    groups = param_groups(
        task,
        lr=cfg.optim.lr,
        weight_decay=cfg.optim.weight_decay,
        layer_decay=1.0 if scratch else cfg.optim.layer_decay,
        scales={part: rate for part, rate in rates.items() if rate},
    )

    def evaluate(_: nn.Module, step: int) -> dict[str, float]:
        rows = collect(
            lambda batch: {"logits": task.logits(batch).float(), "label": batch["label"]},
            test_set,
            collate=collate,
            batch_size=max(1, cfg.train.batch_size // accelerator.num_processes),
            accelerator=accelerator,
        )
        top = {f"top{k}": top_k_accuracy(rows["logits"], rows["label"], k=k) for k in (1, 5)}
        classes = per_class_accuracy(rows["logits"].argmax(dim=1), rows["label"], len(test_set.listing.classes))
        return {**top, "mean_class": float(np.nanmean(classes))}

    metrics = fit(
        task,
        batches_of(train_set, collate, cfg.train, data),
        train=cfg.train,
        optim=cfg.optim,
        accelerator=accelerator,
        run_dir=run_dir,
        groups=groups,
        evaluate=evaluate,
    )
    if accelerator.is_main_process:
        described = {"train": train_set.listing.describe(), "test": test_set.listing.describe()}
        # The teacher's class vectors read a space that fine-tuning has left.
        model.class_head = model.classes = None
        model.save_pretrained(run_dir / "export", metrics=metrics, data=described)
        save_classifier(cfg, model, data, test_set.listing.classes, task.classifier(), metrics, described)
    return {"mode": cfg.mode, "list": test_set.listing.hash, "num_test": len(test_set), **metrics}


def warn_of_missing(train: Listing, test: Listing, data: DataConfig) -> None:
    """Warns where a set of few recordings was split so that one side lacks a class that the other one has.

    Raises:
        ValueError: samples without a class.
    """
    if min(train.labels.min(), test.labels.min()) < 0:
        raise ValueError(
            f"data.name={train.name}: samples of {train.split} or {test.split} have no class to be recognised; put "
            "recordings into a folder a class, or set data.label_from=file"
        )
    seen, tested = (set(np.unique(listing.labels).tolist()) for listing in (train, test))
    fix = f"data.eval_split={data.eval_split}" if data.eval_split else f"data.holdout={data.holdout:g}"
    for lacking, doing in ((tested - seen, "learn from"), (seen - tested, "test on")):
        if lacking:
            names = ", ".join(train.classes[label] for label in sorted(lacking)[:5])
            warnings.warn(
                f"{fix} leaves nothing to {doing} of {len(lacking)} of {len(seen | tested)} classes ({names}): hold "
                "another share out, record more, sort the recordings into train/ and test/ yourself, or split each by "
                "time: data.train_split=0-80% data.eval_split=80-100% with data.sample_us",
                stacklevel=2,
            )


def save_classifier(
    cfg: RecognitionConfig,
    model: GEPModel,
    data: DataConfig,
    classes: Sequence[str],
    state: Mapping[str, Tensor],
    metrics: Mapping[str, Any],
    described: Mapping[str, str],
) -> None:
    """Writes the model with its classifier (weight, bias on pooled features) as one folder, <run>/<mode>/classifier."""
    model.class_head = model.classes = None  # of the teacher
    model.backbone = model.backbone if cfg.use_backbone else None
    whole = GEPClassifier(model, classes, feature=cfg.feature, pool=cfg.pool, sample_us=data.sample_us)
    whole.head.load_state_dict(state)
    whole.save_pretrained(Path(cfg.run) / cfg.mode / "classifier", metrics=metrics, data=described)


if __name__ == "__main__":
    config.run_cli(main)
