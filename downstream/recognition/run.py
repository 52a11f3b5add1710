"""Recognition from the command line.

accelerate launch downstream/recognition/run.py configs/downstream/recognition/nmnist.yaml \
    model=runs/nmnist/stage2/export data.root=DIR mode=kshot
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from downstream.common import extract
from downstream.metrics import per_class_accuracy, top_k_accuracy
from downstream.recognition.task import (
    FinetuneTask,
    RecognitionConfig,
    kshot,
    probe,
    reinitialise,
    zero_shot,
)
from gep import config
from gep.checkpoint import prepare_run_dir
from gep.data.fewshot import draw_shots
from gep.data.labelled import list_recordings
from gep.data.paired import DataConfig, Recordings, build, collate
from gep.data.sampler import Batches
from gep.engine import fit, make_accelerator
from gep.evaluate import collect
from gep.hub import GEPModel
from gep.optim import param_groups

_START_SAMPLES = 4096  # enough to standardise features and to start the head from


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs one mode; writes results.json into the run folder and returns what is in it."""
    cfg = config.load(RecognitionConfig, argv)
    accelerator = make_accelerator(cfg.train, cfg.run)
    model = GEPModel.from_pretrained(cfg.model).to(accelerator.device)
    data = dataclasses.replace(cfg.data, **model.input_settings)
    run_dir = prepare_run_dir(cfg.run, cfg, may_differ=("run", "data.root", "model"))
    if cfg.mode in ("finetune", "scratch"):
        results = finetune(cfg, model, data, accelerator, run_dir)
    else:
        results = probe_frozen(cfg, model, data, accelerator)
    if accelerator.is_main_process:
        (run_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    accelerator.print(json.dumps(results, indent=2))
    return results


def probe_frozen(cfg: RecognitionConfig, model: GEPModel, data: DataConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Zero-shot, linear probe or k-shot probes on features of the frozen model."""
    listing = list_recordings(data.name, data.root, data.train_split)
    if cfg.mode == "kshot" and not data.eval_split:
        # Every draw tests on what it did not take: nothing needs to be held out beforehand.
        train_set, test_set = Recordings(listing, data, paired=False), None
    else:
        train_set, test_set = build(data, paired=False)
    accelerator.print(
        "\n".join(
            f"{part} on {source.listing.describe()}"
            for part, source in (("learn", train_set), ("test", test_set))
            if source is not None
        )
    )
    share = max(1, cfg.train.batch_size // accelerator.num_processes)
    pools = []
    for source in (train_set, test_set):
        if source is None or (source is train_set and cfg.mode == "zero_shot"):
            pools.append(None)
            continue
        features, labels = extract(
            model, source, accelerator, batch_size=share, use_backbone=cfg.use_backbone, title="features"
        )
        pools.append((features, labels))
    learn, test = (None if pool is None else (pool[0].pooled(cfg.feature), pool[1]) for pool in pools)
    classes = len(listing.classes)
    results: dict[str, Any] = {
        "mode": cfg.mode,
        "feature": cfg.feature,
        "list": (test_set or train_set).listing.hash,
    }
    if cfg.mode == "zero_shot":
        features, labels = pools[1]
        results["top1"] = zero_shot(model, features.image.mean(dim=1), labels)
        results["num_test"] = len(labels)
    elif cfg.mode == "probe":
        results |= probe(learn, test, classes, cfg.probe)
        results["num_test"] = len(test[1])
    else:
        results["top1"] = kshot(learn, test, classes, cfg.probe)
        results["num_test"] = len((test or learn)[1])
    return results


def finetune(
    cfg: RecognitionConfig, model: GEPModel, data: DataConfig, accelerator: Accelerator, run_dir: Path
) -> dict[str, Any]:
    """Trains all parts, each at its own rate (or from scratch), and tests in fixed windows."""
    if cfg.mode == "scratch":
        reinitialise(model, cfg.train.seed)
    train_set, test_set = build(data, paired=False)
    if cfg.shots:
        chosen, _ = draw_shots(train_set.listing.labels, cfg.shots, seed=cfg.probe.seed, draw=cfg.draw)
        listing = train_set.listing.subset(chosen, f"{train_set.listing.split}[{cfg.shots} shots, draw {cfg.draw}]")
        train_set = Recordings(listing, data, paired=False)
    accelerator.print(f"learn on {train_set.listing.describe()}\ntest on {test_set.listing.describe()}")
    task = FinetuneTask(
        model,
        len(test_set.listing.classes),
        feature=cfg.feature,
        use_backbone=cfg.use_backbone,
        label_smoothing=cfg.label_smoothing,
    )
    scratch = cfg.mode == "scratch"
    start = train_set.listing.subset(_evenly(len(train_set), _START_SAMPLES), "start of the head")
    features, labels = extract(
        model,
        Recordings(start, data, paired=False),
        accelerator,
        batch_size=max(1, cfg.train.batch_size // accelerator.num_processes),
        use_backbone=cfg.use_backbone,
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
        Batches.of_run(train_set, collate, cfg.train),
        train=cfg.train,
        optim=cfg.optim,
        accelerator=accelerator,
        run_dir=run_dir,
        groups=groups,
        evaluate=evaluate,
    )
    if accelerator.is_main_process:
        described = {"train": train_set.listing.describe(), "test": test_set.listing.describe()}
        model.save_pretrained(run_dir / "export", metrics=metrics, data=described)
    return {"mode": cfg.mode, "list": test_set.listing.hash, "num_test": len(test_set), **metrics}


def _evenly(count: int, most: int) -> np.ndarray:
    kept = min(count, most)
    return np.arange(kept) * count // kept


if __name__ == "__main__":
    config.run_cli(main)
