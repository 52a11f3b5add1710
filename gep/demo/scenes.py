"""The demo's second half: masks and depth of scenes, from both stages and beside two baselines."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

import downstream.depth.run
import downstream.segmentation.run
import stage1_align.run
import stage2_autoregress.run
from downstream.dense.model import DenseModel
from downstream.metrics import mean_std
from gep.data.config import DataConfig
from gep.data.paired import Recordings, collate
from gep.data.registry import list_recordings
from gep.data.sampler import Batches
from gep.data.scene_files import write_scenes
from gep.data.scenes import SceneConfig
from gep.demo.scene_teacher import SCALE, ScenePictures, SceneTeacherTask, build_model, collate_pictures
from gep.demo.textures import scene_textures
from gep.engine import TrainConfig, fit, make_accelerator
from gep.events.represent import EventImage
from gep.models.teacher import FrozenVFM
from gep.optim import OptimConfig

METHODS = ("histogram", "scratch", "stage1", "stage2")
"""Rows of the tables: a head on counted events, the encoder from random weights, and both stages, frozen."""
_RUNS = {"segmentation": downstream.segmentation.run.main, "depth": downstream.depth.run.main}
_EXAMPLES = 6
_EVALUATIONS = {"segmentation": 3, "depth": 10}  # a linear map of depth is best within its first dozens of steps


@dataclass(frozen=True)
class SceneSize:
    """How long each part trains, and on how much."""

    pictures: int
    teacher_steps: int
    scenes: int
    stage1_steps: int
    stage2_steps: int
    labelled: int
    test: int
    probe_steps: dict[str, int]
    scratch_steps: int
    seeds: int


FULL = SceneSize(1200, 1100, 800, 600, 240, 25, 150, {"segmentation": 200, "depth": 200}, 100, 3)
FAST = SceneSize(64, 20, 48, 20, 10, 16, 16, {"segmentation": 20, "depth": 20}, 10, 1)


@dataclass(frozen=True)
class Found:
    """`results.json`'s tables of scenes, and the arrays that the report draws."""

    tables: dict[str, Any]
    pictures: dict[str, Any]


def draw_data(out: Path, size: SceneSize, seed: int) -> None:
    """Writes the scenes that `SceneDemo` learns from: <out>/unlabelled and <out>/labelled."""
    textures = scene_textures(seed)
    counts = {"train": size.scenes, "val": max(16, size.scenes // 20)}
    write_scenes(out / "unlabelled", counts, textures, config=SceneConfig(), seed=seed)
    # As many labels for each seed, drawn from three times as many scenes.
    counts = {"train": 3 * size.labelled, "val": size.labelled, "test": size.test}
    write_scenes(out / "labelled", counts, textures, config=SceneConfig(), seed=seed + 1)


@dataclass(frozen=True)
class SceneDemo:
    """Stand-in teacher → stage 1 → stage 2 → probes on masks and depth of scenes.

    Args:
        out: folder of everything; `draw_data` has written the scenes there.
        digits_teacher: export of the stand-in that knows digits, which the scenes' one starts from.
        size: how long to train.
        seed: of everything.
        timed: names and times each part.
    """

    out: Path
    digits_teacher: Path
    size: SceneSize
    seed: int
    timed: Callable[[str], AbstractContextManager[None]]

    def run(self) -> Found:
        """Trains and measures; the classes, methods and numbers are in `Found`."""
        textures = scene_textures(self.seed)
        config = SceneConfig()
        with self.timed("scenes: teacher"):
            pictures = ScenePictures.draw(self.size.pictures, textures["train"], config, self.seed)
            teacher = self._teacher(pictures, len(textures["train"].things) + 1)
        common = [f"data.root={self.out / 'unlabelled'}", f"teacher.name=export:{teacher}", f"train.seed={self.seed}"]
        with self.timed("scenes: stage 1"):
            steps = f"train.steps={self.size.stage1_steps}"
            stage1_align.run.main([_yaml("stage1"), *common, f"run={self.out / 'stage1'}", steps])
        with self.timed("scenes: stage 2"):
            steps, model = f"train.steps={self.size.stage2_steps}", f"model={self.out / 'stage1' / 'export'}"
            stage2_autoregress.run.main([_yaml("stage2"), *common, f"run={self.out / 'stage2'}", model, steps])
        tables: dict[str, Any] = {}
        for task in _RUNS:
            with self.timed(f"scenes: {task}"):
                tables[task] = {method: self._measure(task, method) for method in METHODS}
        with self.timed("scenes: pictures"):
            drawn = self._pictures()
        counts = {"labelled": self.size.labelled, "test": self.size.test, "seeds": self.size.seeds}
        return Found({**tables, "scenes": {**counts, "window_ms": config.window_us / 1000}}, drawn)

    def _teacher(self, pictures: ScenePictures, num_classes: int) -> Path:
        run = self.out / "teacher"
        settings = TrainConfig(
            steps=self.size.teacher_steps, batch_size=32, seed=self.seed, log_every=10, eval_every=0, save_every=0
        )
        model = build_model(pictures.image.shape[1:])
        model.encoder.init_from_teacher(FrozenVFM.from_spec(f"export:{self.digits_teacher}"))
        metrics = fit(
            SceneTeacherTask(model, num_classes),
            Batches.of_run(pictures, collate_pictures, settings),
            train=settings,
            optim=OptimConfig(lr=3e-3, weight_decay=0.05, warmup_steps=min(50, settings.steps // 4)),
            accelerator=make_accelerator(settings, run),
            run_dir=run,
        )
        return model.save(run / "export", metrics=metrics)

    def _measure(self, task: str, method: str) -> dict[str, list[float]]:
        """Mean and standard deviation over seeds: other labelled scenes, another start of what is trained."""
        rows = [self._once(task, method, seed)["test"] for seed in range(self.size.seeds)]
        if task == "segmentation":
            found = {name: [row[name] for row in rows] for name in ("miou", "acc")}
        else:
            found = {name: [row[name] for row in rows] for name in ("abs_rel", "rmse", "delta1")}
        return {name: mean_std(values) for name, values in found.items()}

    def _once(self, task: str, method: str, seed: int) -> dict[str, Any]:
        """One run of the task's own program."""
        stage = "stage2" if method == "stage2" else "stage1"
        mode = method if method in ("histogram", "scratch") else "probe"
        steps = self.size.scratch_steps if method == "scratch" else self.size.probe_steps[task]
        options = [
            _yaml("probe"),
            f"run={self._run(task, method, seed)}",
            f"model={self.out / stage / 'export'}",
            f"data.root={self.out / 'labelled'}",
            f"mode={mode}",
            f"cache_features={str(method != 'scratch').lower()}",
            "fraction=0.3333",
            f"fraction_seed={seed}",
            f"train.seed={self.seed + seed}",
            f"train.steps={steps}",
            f"train.eval_every={max(1, steps // _EVALUATIONS[task])}",
        ]
        if method != "histogram":
            # The states of stage 2's backbone hold the window's tokens too: a narrower map for 25 labelled scenes.
            options += ["head.num_levels=1", "head.encoder_maps=false"]
        if task == "depth":
            # A patch's linear map draws no edges: the gradient term would only flatten it.
            options += [f"scale.max_m={SCALE.max_m}", f"scale.alpha={SCALE.alpha}", "cutoffs_m=[30]", "gradient=0"]
            if mode != "scratch":  # one number a token is far from its optimum at the other rate
                options.append("optim.lr=5e-3")
        with contextlib.redirect_stdout(io.StringIO()):
            return _RUNS[task](options)

    def _run(self, task: str, method: str, seed: int) -> Path:
        return self.out / task / f"{method}_{seed}"

    @torch.no_grad()
    def _pictures(self) -> dict[str, Any]:
        """Arrays of a few test scenes: picture, events, truth, and what every method makes of them (first seed)."""
        scene = SceneConfig()
        config = DataConfig(
            name="scenes",
            height=scene.height,
            width=scene.width,
            windows=scene.windows,
            window_us=scene.window_us,
        )
        listing = list_recordings("scenes", self.out / "labelled", "test")
        source = Recordings(listing, config, paired=True, targets=True)
        chosen = np.linspace(0, len(source) - 1, _EXAMPLES).astype(int)
        batch = collate([source.sample(int(index), None) for index in chosen])
        windows = batch["windows"]
        seen = EventImage(percentile=99.0)(batch["events"]).unflatten(0, (-1, windows))[:, -1]
        found: dict[str, Any] = {
            "image": batch["image"][:, 0].numpy() / 255,
            "events": seen.permute(0, 2, 3, 1).numpy(),
            "true_mask": batch["mask"].numpy(),
            "true_depth": batch["depth"].numpy(),
            "classes": listing.classes,
        }
        for task in _RUNS:
            maps = {}
            for method in METHODS:
                model = DenseModel.from_pretrained(self._run(task, method, 0) / "export")
                output = model(batch)
                maps[method] = (
                    output.argmax(dim=1) if task == "segmentation" else SCALE.to_metres(output[:, 0].sigmoid())
                ).numpy()
            found[task] = maps
        return found


def _yaml(name: str) -> str:
    return str(resources.files("gep.demo").joinpath(f"scenes_{name}.yaml"))
