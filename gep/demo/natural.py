"""`gep natural`: from natural images to recordings of real objects, without a real event in training.

A stand-in image model learns the labels of an image set. Stage 1 aligns an encoder with it on events simulated from
that set and from photographs, the camera moving at random. Probes read recordings of objects that neither has seen.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import downstream.recognition.run as recognition
import stage1_align.run
from downstream.common import Pool, extract, pixel_features, write_json
from downstream.metrics import mean_std
from downstream.recognition.task import ProbeConfig, kshot
from gep import config
from gep.data.build import build
from gep.data.config import DataConfig
from gep.data.image_list import list_images
from gep.data.options import ListingOptions
from gep.data.paired import Recordings, collate
from gep.data.registry import list_recordings
from gep.data.view import View, decode
from gep.demo.pictures import train_classifier
from gep.engine import TrainConfig, make_accelerator
from gep.evaluate import collect
from gep.events.represent import Histogram
from gep.hub import GEPModel
from gep.models.teacher import FrozenVFM
from stage1_align.task import Stage1Config

SHOTS = [5, 20, 50]
CANVAS = 72  # px: an object that fills a third of the view is then as large as the pictures that stage 1 saw
WINDOWS, WINDOW_US = 2, 125_000
TRAIN, TEST = "0-60%", "70-100%"
POOL: Pool = "mean_std"
_GRIDS = ((4, 4), (8, 8), (16, 16), (36, 36), (72, 72))


@dataclass(frozen=True)
class Size:
    """How long each step trains."""

    teacher_steps: int
    stage1_steps: int
    scratch_steps: int
    scratch_draws: int


FULL = Size(3000, 800, 40, 3)
FAST = Size(40, 20, 4, 1)


@dataclass
class Natural:
    """One run.

    Args:
        cifar10: labelled images: anything that data.images.path takes, with the splits train and test.
        photos: further pictures, whose labels are not used.
        objects: recordings of objects (data set `folder`): folders of classes, or where there are none, one recording
            a class.
        frames: recordings with pictures, to look the pictures up by their events; None = leave that out.
        out: folder of the results.
        size: how long to train.
        seed: of everything.
    """

    cifar10: Path
    photos: Path
    objects: Path
    frames: Path | None = None
    out: Path = Path("runs/natural")
    size: Size = FULL
    seed: int = 0
    options: list[str] = field(default_factory=list)
    """further stage-1 settings, dotted key=value"""

    def run(self) -> dict[str, Any]:
        """Runs every step; returns what is written to results.json.

        Raises:
            FileNotFoundError, ValueError: an input is missing or of another layout; before anything is trained.
        """
        self._look()
        torch.manual_seed(self.seed)
        teacher = self.out / "teacher" / "export"
        top1 = train_classifier(str(self.cifar10), teacher, steps=self.size.teacher_steps, seed=self.seed)
        stage1 = stage1_align.run.main(self._stage1(teacher))
        export = self.out / "stage1" / "export"
        results: dict[str, Any] = {
            "teacher": {"top1": top1},
            "stage1": {name.removeprefix("eval/"): value for name, value in stage1.items() if name.startswith("eval/")},
            "objects": self._objects(export),
        }
        if self.frames is not None:
            results["frames"] = self._frames(export, teacher)
        write_json(self.out / "results.json", results)
        return results

    def _look(self) -> None:
        """Lists every input once, so that a mistyped path does not wait for the end of training to be found."""
        for split in ("train", "test"):
            if not list_images(str(self.cifar10), split, (CANVAS, CANVAS)).classes:
                raise ValueError(f"--cifar10 {self.cifar10}: its pictures of {split} have no labels")
        build(config.load(Stage1Config, self._stage1(self.out / "teacher" / "export")).data, paired=True)
        for split in (TRAIN, TEST):
            try:
                listing = list_recordings("folder", self.objects, split, DataConfig(**self._samples()))
            except (ValueError, OSError) as error:
                raise type(error)(f"--objects: {error}") from error
            if len(listing.classes) < 2:
                raise ValueError(f"--objects {self.objects}: of {len(listing.classes)} class(es); give at least 2")
        if self.frames is not None:
            try:
                framed = list_recordings("folder", self.frames, "all")
            except (ValueError, OSError) as error:
                raise type(error)(f"--frames: {error}") from error
            if framed.image is None:
                raise ValueError(f"--frames {self.frames}: its recordings have no pictures (images/ beside the events)")

    def _stage1(self, teacher: Path) -> list[str]:
        """Stage 1's command line."""
        return [
            str(resources.files("gep.demo").joinpath("natural.yaml")),
            f"data.mix.cifar10.images.path={self.cifar10}",
            f"data.mix.photos.images.path={self.photos}",
            f"teacher.name=export:{teacher}",
            f"run={self.out / 'stage1'}",
            f"train.steps={self.size.stage1_steps}",
            f"train.seed={self.seed}",
            *self.options,
        ]

    def _samples(self) -> dict[str, Any]:
        """Which samples of the objects' recordings there are, as settings of data."""
        # Folders of classes where there are such; a stray file beside them changes nothing.
        by_folder = list_recordings("folder", self.objects, "all", ListingOptions(label_from="folder")).classes
        label_from = "folder" if by_folder else "file"
        return {"name": "folder", "root": str(self.objects), "label_from": label_from, "sample_us": 250_000}

    def _data(self, model: GEPModel) -> DataConfig:
        """Windows of the length that stage 1 trained on, and which of them to learn from and to test on."""
        frame = {"height": CANVAS, "width": CANVAS, "windows": WINDOWS, "window_us": WINDOW_US}
        return DataConfig(
            **{**model.input_settings, **frame}, **self._samples(), train_split=TRAIN, eval_split=TEST, cache=True
        )

    def _objects(self, export: Path) -> dict[str, Any]:
        """k-shot probes of stage 1, of counted pixels, and of the same encoder trained on the k windows alone."""
        model = GEPModel.from_pretrained(export)
        data = self._data(model)
        train, test = build(data, paired=False)
        assert isinstance(train, Recordings) and isinstance(test, Recordings)
        accelerator = make_accelerator(TrainConfig(seed=self.seed, batch_size=64), self.out)
        settings, classes = ProbeConfig(shots=SHOTS, seed=self.seed), len(test.listing.classes)
        table: dict[str, Any] = {"train": train.describe(), "test": test.describe()}

        def probe(features: Any) -> dict[str, list[float] | None]:
            return kshot(features(train), features(test), classes, settings)

        def pixels(cells: tuple[int, int]) -> Any:
            def features(source: Recordings) -> tuple[torch.Tensor, torch.Tensor]:
                # The whole 250 ms at once, and the logarithm after counting: the strongest of the variants tried.
                whole = dataclasses.replace(source.config, windows=1, window_us=0)
                area = CANVAS * CANVAS // (cells[0] * cells[1])
                rows = collect(
                    lambda batch: {
                        "pixels": (area * pixel_features(batch, cells, Histogram())).log1p(),
                        "label": batch["label"],
                    },
                    Recordings(source.listing, whole, paired=False),
                    collate=collate,
                    batch_size=64,
                    accelerator=accelerator,
                )
                return rows["pixels"], rows["label"]

            return features

        def encoded(source: Recordings) -> tuple[torch.Tensor, torch.Tensor]:
            features, labels = extract(model, source, accelerator, batch_size=64, pool=POOL)
            return features.pooled("all"), labels

        table["stage1"] = probe(encoded)
        for cells in _GRIDS:
            table[f"pixels {cells[0]}x{cells[1]}"] = probe(pixels(cells))
        smallest = int(np.bincount(train.listing.labels, minlength=classes).min())
        table["scratch"] = {
            str(shots): self._scratch(export, data, shots, classes) if shots <= smallest else None for shots in SHOTS
        }
        return table

    def _scratch(self, export: Path, data: DataConfig, shots: int, classes: int) -> list[float]:
        """[mean, standard deviation] of top-1 (%) over draws."""
        names = ("name", "root", "train_split", "eval_split", "label_from", "sample_us", "cache",
                 "height", "width", "windows", "window_us")  # fmt: skip
        accuracies = []
        for draw in range(self.size.scratch_draws):
            found = recognition.main(
                [
                    f"run={self.out / 'scratch' / f'{shots}_{draw}'}",
                    f"model={export}",
                    "mode=scratch",
                    "feature=all",
                    f"pool={POOL}",
                    f"shots={shots}",
                    f"draw={draw}",
                    *(f"data.{name}={getattr(data, name)}" for name in names),
                    "optim.lr=2e-3",
                    "optim.weight_decay=0.05",
                    "optim.warmup_steps=10",
                    f"train.steps={self.size.scratch_steps * (10 + shots) // 20}",
                    f"train.batch_size={min(30, shots * classes)}",
                    f"train.seed={self.seed + draw}",
                    "train.save_every=0",
                    "train.progress=false",
                ]
            )
            accuracies.append(float(found["eval/top1"]))
        return mean_std(accuracies)

    def _frames(self, export: Path, teacher: Path) -> dict[str, float]:
        """Each framed recording's own picture among all pictures there, by its events alone (%)."""
        assert self.frames is not None
        model, vfm = GEPModel.from_pretrained(export), FrozenVFM.from_spec(f"export:{teacher}")
        listing = list_recordings("folder", self.frames, "all")
        # The exposures are shorter than stage 1's windows: one window each.
        frame = {"height": CANVAS, "width": round(CANVAS * 4 / 3), "windows": 1, "window_us": 0}
        data = dataclasses.replace(DataConfig(), **{**model.input_settings, **frame}, name="folder")
        recordings = Recordings(listing, data, paired=True)
        batch = collate([recordings.sample(index, None) for index in range(len(recordings))])
        with torch.no_grad():
            tokens, _ = model.encoder(model.represent(batch["events"]))
        tokens = tokens.unflatten(0, (len(recordings), -1)).mean(dim=1)
        pictures, _ = vfm.features(_grey(batch["image"]))
        others = self._other_pictures(listing, data)
        if len(others):
            pictures = torch.cat([pictures, vfm.features(_grey(torch.from_numpy(others)))[0]])
        found: dict[str, float] = {"recordings": len(recordings), "pictures": len(pictures)}
        pictures = F.layer_norm(pictures, pictures.shape[-1:])
        for name, (events, images) in {
            "mean": (tokens.mean(dim=1), pictures.mean(dim=1)),
            "tokens": (tokens.flatten(1), pictures.flatten(1)),
        }.items():
            # What all views of one camera share tells nothing apart; a single query has nothing to share it with.
            mean = events.mean(dim=0) if len(events) > 2 else 0.0
            events, images = F.normalize(events - mean, dim=-1), F.normalize(images - images.mean(dim=0), dim=-1)
            similarity = events @ images.T
            ahead = (similarity >= similarity.diagonal()[:, None]).sum(dim=1) - 1
            found |= {f"{name}_r{k}": 100 * (ahead < k).float().mean().item() for k in (1, 5)}
        return found

    def _other_pictures(self, listing: Any, data: DataConfig) -> np.ndarray:
        """uint8 (M, 3, H, W): the pictures beside those that have events, as distractors."""
        assert self.frames is not None
        used = {path.name for path in getattr(listing.image, "paths", ())}
        views = []
        for path in sorted(self.frames.rglob("images/*.png")):
            if path.name not in used:
                views.append(View((data.height, data.width)).apply(decode(path.read_bytes(), str(path))))
        return np.stack(views) if views else np.empty((0, 3, data.height, data.width), np.uint8)


def table(results: dict[str, Any]) -> str:
    """The objects' accuracies as a Markdown table."""
    rows = ["| windows a class | " + " | ".join(str(k) for k in SHOTS) + " |", "|---|" + "---|" * len(SHOTS)]
    for name, values in results["objects"].items():
        if isinstance(values, dict):
            cells = ["–" if values[str(k)] is None else "{:.1f} ± {:.1f}".format(*values[str(k)]) for k in SHOTS]
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _grey(images: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    return (images.float() * weights).sum(dim=1, keepdim=True).expand(-1, 3, -1, -1).round().byte()
