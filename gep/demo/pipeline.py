"""`gep demo`: images → stand-in teacher → simulated events → stage 1 → stage 2 → probes → export → report."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch

import stage1_align.run
import stage2_autoregress.run
from downstream.common import write_json
from gep.data.listing import Listing
from gep.data.registry import list_recordings
from gep.data.sampler import Batches
from gep.demo import evaluation, report
from gep.demo.beside import Beside
from gep.demo.digits import Digits, training_digits
from gep.demo.evrep import FAST as FAST_EVREP
from gep.demo.evrep import FULL as FULL_EVREP
from gep.demo.evrep import EvRepDemo, EvRepSize, second_reader
from gep.demo.recordings import simulate_digits
from gep.demo.scenes import FAST as FAST_SCENES
from gep.demo.scenes import FULL as FULL_SCENES
from gep.demo.scenes import Found, SceneDemo, SceneSize, draw_data
from gep.demo.standin import DigitImages, StandInTask, build_model, collate_digits
from gep.demo.timing import Stopwatch
from gep.engine import TrainConfig, fit, make_accelerator
from gep.evaluate import collect, evenly
from gep.optim import OptimConfig


@dataclass(frozen=True)
class Size:
    """How long each step of the demo trains, and on how much it is tested."""

    teacher_steps: int
    copies: int
    stage1_steps: int
    stage2_steps: int
    scratch_steps: int
    scratch_draws: int
    num_test: int
    scenes: SceneSize
    evrep: EvRepSize


FULL = Size(1100, 2, 600, 360, 30, 2, 800, FULL_SCENES, FULL_EVREP)
FAST = Size(200, 1, 120, 50, 8, 2, 300, FAST_SCENES, FAST_EVREP)


_PARTS = ("teacher", "data", "stage1", "stage2", "scratch", "scenes", "llm_evrep")
_MARKER = ".gep-demo"
_HELD_OUT = 240  # simulated recordings of unseen digits on which both stages report their own metrics


@dataclass
class Demo:
    """One run of the demo.

    Args:
        out: folder of all results; earlier results of the demo in it are replaced.
        nmnist: root of real N-MNIST recordings to evaluate on; None = simulated ones of reserved digits.
        size: how long to train.
        seed: of everything.
    """

    out: Path
    nmnist: Path | None = None
    size: Size = FULL
    seed: int = 0
    _timed: Stopwatch = field(default_factory=Stopwatch, init=False)

    def run(self) -> dict[str, Any]:
        """Runs every step; returns what is written to results.json."""
        torch.manual_seed(self.seed)
        recordings = [] if self.nmnist is None else real_recordings(self.nmnist)
        train, reserved = training_digits(recordings)
        self._clear()
        with Beside(self.out / "beside.log").started() as beside:
            if beside.log is not None:
                print(f"scenes and what needs no teacher run in a second process: {beside.log}", flush=True)
            return self._run(recordings, train, reserved, beside)

    def _run(self, recordings: list[Listing], train: Digits, reserved: Digits, beside: Beside) -> dict[str, Any]:
        """Two rows of steps: digits here, scenes beside them."""
        start = time.perf_counter()
        data, teacher = self.out / "data", self.out / "teacher" / "export"
        unseen = reserved.subset(evenly(len(reserved), _HELD_OUT if recordings else self.size.num_test))
        early = beside.submit(_prepare, self.out, train, unseen, self.size, self.seed)
        with self._timed("teacher"):
            self._teacher(train, reserved)
        late = beside.submit(_scenes, self.out / "scenes", teacher, self.size.scenes, self.seed)
        prepared = beside.result(early)
        common = [f"data.root={data}", f"teacher.name=export:{teacher}", f"train.seed={self.seed}"]
        with self._timed("stage1"):
            stage1 = stage1_align.run.main(
                [
                    _config("stage1"),
                    *common,
                    f"run={self.out / 'stage1'}",
                    f"train.steps={self.size.stage1_steps}",
                ]
            )
        with self._timed("stage2"):
            stage2 = stage2_autoregress.run.main(
                [
                    _config("stage2"),
                    *common,
                    f"run={self.out / 'stage2'}",
                    f"model={self.out / 'stage1' / 'export'}",
                    f"train.steps={self.size.stage2_steps}",
                ]
            )
        listing = recordings[0] if recordings else list_recordings("nmnist", data, "test")
        found = evaluation.evaluate(
            listing.subset(evenly(len(listing), self.size.num_test), listing.split),
            folder=self.out,
            size=self.size,
            seed=self.seed,
            timed=self._timed,
        )
        evrep = EvRepDemo(
            self.out / "llm_evrep",
            data,
            teacher,
            self.out / "llm_evrep" / "reader" / "export",
            listing,
            self.nmnist if recordings and self.nmnist is not None else data,
            self.size.num_test,
            self.size.evrep,
            self.seed,
            self._timed,
        ).run()
        with self._timed("waiting for scenes"):
            scenes, trained = beside.result(late)
        results = {
            "recognition": {
                "source": "real recordings" if recordings else "simulated recordings",
                **found.table,
            },
            "stage1": {
                "r1": stage1["eval/event_to_image_r1"],
                "r5": stage1["eval/event_to_image_r5"],
                "token_cosine": stage1["eval/token_cosine"],
            },
            "stage2": {
                name: stage2[f"eval/{name}"] for name in ("loss", "copy_previous", "mean_token", "predicted_image_r1")
            },
            **evrep.tables,
            **scenes.tables,
            "seconds": {**self._timed.seconds, **prepared, **trained},
        }
        write_json(self.out / "results.json", results)
        with self._timed("report"):
            report.write(
                self.out,
                results,
                found.pictures,
                scenes.pictures,
                evrep.gallery,
                teacher_accuracy=self._teacher_accuracy,
            )
        results["seconds"] |= {"report": self._timed.seconds["report"], "whole": round(time.perf_counter() - start, 1)}
        write_json(self.out / "results.json", results)
        return results

    def _clear(self) -> None:
        """Removes what an earlier demo left in the folder, and nothing that another program made.

        Raises:
            FileExistsError: the folder holds such names, and no demo made it.
            ValueError: the recordings to evaluate on lie inside it.
        """
        marker = self.out / _MARKER
        present = [name for name in _PARTS if (self.out / name).exists()]
        if self.nmnist is not None and self.out.resolve() in self.nmnist.resolve().parents:
            raise ValueError(
                f"--nmnist {self.nmnist} lies inside --out {self.out}, which the demo clears; move one away"
            )
        if present and not marker.exists():
            raise FileExistsError(
                f"--out {self.out} holds {', '.join(present)}, which no demo made; give another folder"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        marker.touch()
        for name in present:
            shutil.rmtree(self.out / name)

    def _teacher(self, train: Digits, reserved: Digits) -> None:
        """Trains and exports the stand-in image model."""
        settings = TrainConfig(steps=self.size.teacher_steps, batch_size=64, seed=self.seed, log_every=10, save_every=0)
        accelerator = make_accelerator(settings, self.out / "teacher")
        model = build_model()
        task = StandInTask(model)

        def evaluate(_: torch.nn.Module, step: int) -> dict[str, float]:
            rows = collect(
                lambda batch: {"right": (task.logits(batch).argmax(dim=1) == batch["label"]).float()},
                DigitImages(reserved),
                collate=collate_digits,
                batch_size=100,
                accelerator=accelerator,
            )
            return {"accuracy_on_unseen_digits": 100 * rows["right"].mean().item()}

        metrics = fit(
            task,
            Batches.of_run(DigitImages(train), collate_digits, settings),
            train=settings,
            optim=OptimConfig(lr=2e-3, weight_decay=0.05, warmup_steps=50),
            accelerator=accelerator,
            run_dir=self.out / "teacher",
            evaluate=evaluate,
        )
        self._teacher_accuracy = metrics["eval/accuracy_on_unseen_digits"]
        model.save(self.out / "teacher" / "export", metrics=metrics)


def _prepare(out: Path, train: Digits, unseen: Digits, size: Size, seed: int) -> dict[str, float]:
    """What needs no teacher: recordings of digits, the scenes, the second reader; returns the seconds of each."""
    watch = Stopwatch()
    with watch("simulate"):
        simulate_digits(train, out / "data", split="train", copies=size.copies, seed=seed)
        simulate_digits(unseen, out / "data", split="test", copies=1, seed=seed + 1)
    with watch("scenes"):
        draw_data(out / "scenes", size.scenes, seed)
    with watch("llm_evrep: second reader"):
        second_reader(out / "llm_evrep" / "reader", train, size.evrep.reader_steps, seed + 1)
    return watch.seconds


def _scenes(out: Path, teacher: Path, size: SceneSize, seed: int) -> tuple[Found, dict[str, float]]:
    watch = Stopwatch()
    return SceneDemo(out, teacher, size, seed, watch).run(), watch.seconds


def real_recordings(root: Path) -> list[Listing]:
    """The N-MNIST recordings below `root` to evaluate on: the training split's where there is one, else the test's.

    Raises:
        FileNotFoundError: no such folder, or neither split in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"NMNIST={root}: no such folder; it should hold Train/<digit>/*.bin")
    for split in ("train", "test"):
        if (root / split.capitalize()).is_dir() or (root / split).is_dir():
            return [list_recordings("nmnist", root, split)]
    raise FileNotFoundError(f"NMNIST={root}: neither Train/ nor Test/ in it; it should hold Train/<digit>/*.bin")


def _config(stage: str) -> str:
    return str(resources.files("gep.demo").joinpath(f"{stage}.yaml"))
