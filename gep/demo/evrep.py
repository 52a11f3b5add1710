"""The demo's last part: images of events that frozen readers can read, with and without the semantic loss."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import downstream.llm_evrep.evaluate
import downstream.llm_evrep.run
from downstream.metrics import mean_std
from gep.data.listing import Listing
from gep.data.sampler import Batches
from gep.demo.digits import Digits
from gep.demo.standin import DigitImages, StandInTask, build_model, collate_digits
from gep.engine import TrainConfig, fit, make_accelerator
from gep.optim import OptimConfig

FIDELITY, SEMANTIC = "fidelity only", "fidelity + semantic"
_WEIGHTS = {FIDELITY: 0.0, SEMANTIC: 3.0}


@dataclass(frozen=True)
class EvRepSize:
    """How long each part trains."""

    steps: int
    reader_steps: int
    seeds: int


FULL = EvRepSize(300, 300, 1)
FAST = EvRepSize(10, 20, 1)


@dataclass(frozen=True)
class Found:
    """`results.json`'s tables, and the gallery as PNG."""

    tables: dict[str, Any]
    gallery: bytes


def second_reader(run: Path, digits: Digits, steps: int, seed: int) -> Path:
    """Trains an image model like the stand-in teacher from other weights; returns its export in `run`."""
    settings = TrainConfig(steps=steps, batch_size=64, seed=seed, log_every=10, eval_every=0, save_every=0)
    accelerator = make_accelerator(settings, run)
    model = build_model()
    metrics = fit(
        StandInTask(model),
        Batches.of_run(DigitImages(digits), collate_digits, settings),
        train=settings,
        optim=OptimConfig(lr=2e-3, weight_decay=0.05, warmup_steps=min(50, settings.steps // 4)),
        accelerator=accelerator,
        run_dir=run,
    )
    return model.save(run / "export", metrics=metrics)


@dataclass(frozen=True)
class EvRepDemo:
    """Generators trained on simulated recordings, with and without a frozen reader, read by it and by another one.

    Edges leave an image's level and sign open, so that without a reader some seeds give images that can be read, and
    others their negatives: give `EvRepSize` more seeds to see it.

    Args:
        out: folder of everything.
        data: N-MNIST root of simulated recordings with images, train and test.
        reader: export of the stand-in image model: the reader that the generator is trained with.
        other: export of another one (`second_reader`), which only reads.
        test: listing of the recordings to read, below `test_root`, and how many of them.
        size: how long to train.
        seed: of everything.
        timed: names and times each part.
    """

    out: Path
    data: Path
    reader: Path
    other: Path
    test: Listing
    test_root: Path
    num_test: int
    size: EvRepSize
    seed: int
    timed: Callable[[str], AbstractContextManager[None]]

    def run(self) -> Found:
        """Trains and reads."""
        for name, weight in _WEIGHTS.items():
            with self.timed(f"llm_evrep: {name}"):
                for number in range(self.size.seeds):
                    self._train(name, weight, number)
        with self.timed("llm_evrep: read"):
            trained, second = self._read().values()
        details = {"trained with": self._by_row(trained), "second reader": self._by_row(second)}
        tables = {
            "llm_evrep": {row: found["accuracy"][0] for row, found in details["trained with"].items()},
            "llm_evrep_second_reader": {row: found["accuracy"][0] for row, found in details["second reader"].items()},
            "llm_evrep_details": details,
        }
        return Found(tables, (self.out / "read" / "gallery.png").read_bytes())

    def _by_row(self, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Row of the table -> mean and standard deviation over seeds, and each seed's values."""
        rows: dict[str, list[str]] = {}
        for source in found:
            row = source.rpartition(" ")[0] if source.rpartition(" ")[0] in _WEIGHTS else source
            rows.setdefault(row, []).append(source)
        table: dict[str, dict[str, Any]] = {}
        for row, sources in rows.items():
            values = [found[source]["accuracy"] for source in sources]
            errors = [found[source]["sobel_error"] for source in sources]
            table[row] = {"accuracy": mean_std(values), "each": values}
            table[row]["sobel_error"] = None if None in errors else mean_std(errors)
        return table

    def _train(self, name: str, semantic: float, number: int) -> None:
        downstream.llm_evrep.run.main(
            [
                _yaml("train"),
                f"run={self._run(name, number)}",
                f"data.root={self.data}",
                f"llm.name=tagger:{self.reader}",
                f"loss.semantic={semantic}",
                f"cache={self.out / 'answers'}",
                f"train.seed={self.seed + number}",
                f"train.steps={self.size.steps}",
            ]
        )

    def _read(self) -> dict[str, dict[str, dict[str, Any]]]:
        sources = ["tencode", "histogram"]
        for name in _WEIGHTS:
            runs = [self._run(name, number) for number in range(self.size.seeds)]
            sources += [f"{name} {number + 1}=llm_evrep:{run / 'export'}" for number, run in enumerate(runs)]
        if self.test.image is not None:
            sources.append("rgb")
        with contextlib.redirect_stdout(io.StringIO()):
            return downstream.llm_evrep.evaluate.main(
                [
                    _yaml("read"),
                    f"run={self.out / 'read'}",
                    f"data.root={self.test_root}",
                    f"data.eval_split={self.test.split}",
                    f"llm.name=tagger:{self.reader}",
                    f"readers=['tagger:{self.other}']",
                    f"sources={sources}",
                    f"limit={self.num_test}",
                    f"seed={self.seed}",
                ]
            )

    def _run(self, name: str, number: int) -> Path:
        return self.out / f"{name.replace(' + ', '_and_').replace(' ', '_')}_{number + 1}"


def _yaml(name: str) -> str:
    return str(resources.files("gep.demo").joinpath(f"evrep_{name}.yaml"))
