"""How well frozen models recognise what images of events show, source by source and reader by reader.

accelerate launch downstream/llm_evrep/evaluate.py configs/downstream/llm_evrep/evaluate/nmnist.yaml data.root=DIR \
    llm.name=openai:gpt-4o "sources=[tencode, histogram, llm_evrep:runs/llm_evrep/nmnist/export, rgb]"

Every answer is on disk before it counts: the same command after a crash asks for the missing ones alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from downstream.common import write_json
from downstream.llm_evrep.class_names import class_names, first_of_name
from downstream.llm_evrep.config import ReaderConfig
from downstream.llm_evrep.fidelity import sobel_magnitude
from downstream.llm_evrep.prompts import TEMPLATE, classification_prompt
from downstream.llm_evrep.readers import Answers, CachedReader, Reader, to_uint8
from downstream.llm_evrep.recognition import Row, summarise, table
from downstream.llm_evrep.sources import ImageSource, build_source
from gep import config, distributed
from gep.accelerator import to_device
from gep.checkpoint import prepare_run_dir
from gep.data.build import roots
from gep.data.config import DataConfig
from gep.data.paired import Recordings, collate
from gep.data.registry import list_recordings
from gep.engine import TrainConfig, make_accelerator
from gep.evaluate import evenly

Results: TypeAlias = dict[str, dict[str, dict[str, Any]]]
"""Reader -> source -> what `summarise` says of it."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is shown to which readers, and what they are asked."""

    run: str = "runs/llm_evrep/evaluate"
    """folder of this run: config, answers, results.json, samples.jsonl, report"""
    data: DataConfig = field(default_factory=lambda: DataConfig(windows=1, window_us=0))
    sources: list[str] = field(default_factory=lambda: ["tencode", "histogram", "rgb"])
    """tencode, histogram, voxel, event_image, rgb, llm_evrep:EXPORT, e2vid:FILE, e2hqv:FOLDER; LABEL=… names one"""
    llm: ReaderConfig = field(default_factory=ReaderConfig)
    readers: list[str] = field(default_factory=list)
    """further readers by name, with llm's settings but for llm.file (openai:MODEL@URL has an address of its own)"""
    class_names: str = ""
    """what classes are called: empty = as in the data set, imagenet = synsets in English, or a file with a line each"""
    template: str = TEMPLATE
    """the question; {classes} stands for the candidates"""
    seed: int = 0
    """of the candidates' order and of the bootstrap"""
    describe: bool = True
    """ask llm.prompt too, for the Jaccard index with the RGB frame's description; false = of the answers' words"""
    limit: int = 0
    """samples, spread evenly over the split; 0 = all"""
    batch_size: int = 32
    """samples at a time on each process"""
    baseline: str = "tencode"
    """source that the others' gain is measured against; no gain where it is none of the sources"""
    draws: int = 2000
    """bootstrap resamples"""
    level: float = 0.95
    """of the intervals"""
    gallery: int = 12
    """samples shown in the report; 0 = no report"""
    cache: str = ""
    """folder of the answers, which several runs may share one after the other; empty = answers/ in the run"""
    progress: bool = True
    """show progress on stderr"""

    def __post_init__(self) -> None:
        for name in ("limit", "gallery", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; 0 is the least")
        for name in ("batch_size", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.level < 1:
            raise ValueError(f"level={self.level} is not in (0, 1); 0.95 means 95 %")
        if not self.sources:
            raise ValueError("sources is empty: name what is to be read, e.g. sources=[tencode, rgb]")
        for name, values in (("sources", self.sources), ("readers", [self.llm.name, *self.readers])):
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"{name}: {twice[0]} is named twice")
        if self.data.mix or self.data.clip:
            raise ValueError("data.mix and data.clip: one set is evaluated at a time, an image a sample; unset them")


def main(argv: Sequence[str] | None = None) -> Results:
    """Asks all readers about all sources; writes results.json and returns what is in it."""
    cfg = config.load(EvaluateConfig, argv)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = make_accelerator(TrainConfig(batch_size=processes, seed=cfg.seed), cfg.run)
    run_dir = prepare_run_dir(cfg.run, cfg, may_differ=roots(cfg.data))
    test = open_test(cfg.data)
    names = class_names(test.listing.classes, cfg.class_names)
    question = classification_prompt(names, seed=cfg.seed, template=cfg.template)
    sources = [build_source(spec, data=cfg.data, device=accelerator.device) for spec in cfg.sources]
    _check(sources, test)
    answers = Answers(cfg.cache or run_dir / "answers", rank=accelerator.process_index)
    readers = {
        spec: CachedReader(build(cfg.llm, spec, device=accelerator.device, classes=names), answers)
        for spec in (cfg.llm.name, *cfg.readers)
    }
    indices = evenly(len(test), cfg.limit)
    accelerator.print(f"{test.describe()}; {len(indices)} of {len(test)} samples\n{question}")
    rows = ask(cfg, test, indices, sources, readers, question, accelerator)
    results = {
        reader: summarise(
            rows,
            reader,
            [source.name for source in sources],
            names=names,
            labels=first_of_name(names),
            baseline=cfg.baseline,
            draws=cfg.draws,
            level=cfg.level,
            seed=cfg.seed,
        )
        for reader in readers
    }
    accelerator.print(table(results))
    for spec, reader in readers.items():
        used = distributed.gather_objects((reader.hits, dict(reader.usage)))
        total = {name: sum(counts.get(name, 0.0) for _, counts in used) for name in used[0][1]}
        accelerator.print(f"{spec}: {sum(hits for hits, _ in used)} answers known before; this time {_said(total)}")
    if accelerator.is_main_process:
        with open(run_dir / "samples.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        if cfg.gallery:
            write_gallery(run_dir, cfg, test, rows, sources, names, results, accelerator)
        write_json(run_dir / "results.json", results)
    distributed.barrier()
    return results


def build(settings: ReaderConfig, spec: str, *, device: torch.device, classes: Sequence[str]) -> Reader:
    """The reader of a spec; one that is not `settings.name` has no weights file of its own, as that is the other's."""
    if spec == settings.name:
        return settings.build(device=device, classes=classes)
    with warnings.catch_warnings():  # what the first reader needs, another kind may have no use for
        warnings.filterwarnings("ignore", r"llm\..* has no effect")
        return dataclasses.replace(settings, name=spec, file="").build(device=device, classes=classes)


def open_test(data: DataConfig) -> Recordings:
    """The set to evaluate on: data.eval_split, else what data.holdout keeps apart; with images where there are such.

    Raises:
        FileNotFoundError, ValueError: see `list_recordings`; a set without samples or labels.
    """
    listing = list_recordings(data.name, data.root, data.eval_split or data.train_split, data)
    if not data.eval_split:
        listing = listing.hold_out(data.holdout)[1]
    if len(listing) == 0 or not listing.classes or (listing.labels < 0).any():
        raise ValueError(f"data: {listing.describe()}: recognition needs samples, each with its class")
    return Recordings(listing, data, paired=listing.image is not None)


def ask(
    cfg: EvaluateConfig,
    test: Recordings,
    indices: np.ndarray,
    sources: Sequence[ImageSource],
    readers: Mapping[str, CachedReader],
    question: str,
    accelerator: Accelerator,
) -> list[Row]:
    """What every reader says of every source of every sample; each sample on one rank.

    Returns:
        A row a sample, in the order of `indices`, on all ranks.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    width = cfg.batch_size * ranks
    rows: list[Row] = []
    starts = range(0, len(indices), width)
    for start in tqdm(starts, desc="ask", disable=not (cfg.progress and accelerator.is_main_process), mininterval=1):
        mine = indices[start : start + width][rank::ranks]
        own = _ask_batch(cfg, test, mine, sources, readers, question, accelerator) if len(mine) else []
        # Every batch, so that no rank waits for the others' requests longer than a process group lets it.
        rows += [row for part in distributed.gather_objects(own) for row in part]
    place = {test.listing.keys[index]: position for position, index in enumerate(indices.tolist())}
    return sorted(rows, key=lambda row: place[row.key])


def _ask_batch(
    cfg: EvaluateConfig,
    test: Recordings,
    indices: np.ndarray,
    sources: Sequence[ImageSource],
    readers: Mapping[str, CachedReader],
    question: str,
    accelerator: Accelerator,
) -> list[Row]:
    batch = to_device(collate([test.sample(int(index), None) for index in indices]), accelerator.device)
    rows = [Row(key, int(label)) for key, label in zip(batch["key"], batch["label"])]
    with _repeatable(accelerator.device):
        images = {source.name: to_uint8(source.images(batch)) for source in sources}
    frames: Tensor | None = batch.get("image")
    if frames is not None:
        edges = sobel_magnitude(frames.float() / 255)
        for name, own in images.items():
            errors = (sobel_magnitude(own.float() / 255) - edges).square().mean(dim=(1, 2, 3))
            for row, error in zip(rows, errors.tolist()):
                row.sobel[name] = error
    for spec, reader in readers.items():
        for row in rows:
            row.answers[spec], row.descriptions[spec] = {}, {}
        for name, own in images.items():
            for row, text in zip(rows, reader.describe(own, question)):
                row.answers[spec][name] = text
        if frames is None:
            continue
        prompt = cfg.llm.prompt if cfg.describe else question
        for row, text in zip(rows, reader.describe(frames, prompt)):
            row.frame[spec] = text
        for name, own in images.items():
            for row, text in zip(rows, reader.describe(own, prompt)):
                row.descriptions[spec][name] = text
    return rows


def write_gallery(
    run_dir: Path,
    cfg: EvaluateConfig,
    test: Recordings,
    rows: Sequence[Row],
    sources: Sequence[ImageSource],
    names: Sequence[str],
    results: Results,
    accelerator: Accelerator,
) -> None:
    """The report with some of the samples, spread evenly over those that were asked."""
    from downstream.llm_evrep import gallery

    chosen = [rows[i] for i in evenly(len(rows), min(cfg.gallery, len(rows)))]
    index = {key: i for i, key in enumerate(test.listing.keys)}
    entries = []
    for row in chosen:
        batch = to_device(collate([test.sample(index[row.key], None)]), accelerator.device)
        images = {source.name: source.images(batch)[0].cpu() for source in sources}
        entries.append({"key": row.key, "truth": names[row.label], "images": images, "answers": row.answers})
    gallery.write(run_dir, entries, results, classes=names)


def _check(sources: Sequence[ImageSource], test: Recordings) -> None:
    labels = [source.name for source in sources]
    twice = [name for name in labels if labels.count(name) > 1]
    if twice:
        raise ValueError(f"sources: two are called {twice[0]}; name one of them otherwise, LABEL={twice[0]}")
    needy = [source.name for source in sources if source.needs_images]
    if needy and not test.paired:
        raise ValueError(
            f"sources: {needy[0]} needs images beside the recordings, and {test.listing.name} {test.listing.split} has "
            f"none; leave it out of sources, or put the images where the set's layout has them"
        )


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Sums on a GPU in one order: an image that differs in its last bit would be another one to the cache."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def _said(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" if name == "cost" else f"{name} {value:g}" for name, value in counts.items())


if __name__ == "__main__":
    config.run_cli(main)
