"""Everything that a training of LLM-EvRep depends on, as it stands in YAML."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

import torch

from downstream.llm_evrep.prompts import said
from gep.data.config import DataConfig
from gep.engine import TrainConfig
from gep.events.represent import RepresentConfig
from gep.optim import OptimConfig

if TYPE_CHECKING:
    from downstream.llm_evrep.readers.base import Reader

Estimator = Literal["soft", "score", "none"]


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The network from represented events to an image."""

    preset: Literal["nano", "small"] = "nano"
    """size of the U-Net, and of init=gep's decoder: nano for images of 36-48 px, small = the paper's scale"""
    init: Literal["random", "gep"] = "random"
    """a U-Net from random weights, or a light decoder on an exported GEP encoder in place of its encoder"""
    model: str = ""
    """init=gep: the exported model (a folder or a Hub id); its representation and input are taken over"""
    freeze_encoder: bool = False
    """init=gep: train the decoder alone"""

    def __post_init__(self) -> None:
        if self.init == "gep" and not self.model:
            raise ValueError("generator.init=gep needs generator.model: the folder or Hub id of an exported GEP model")
        if self.init == "random" and (self.model or self.freeze_encoder):
            raise ValueError(
                f"generator.model={self.model} and generator.freeze_encoder={self.freeze_encoder} have no effect with "
                "generator.init=random; set generator.init=gep, or leave them out"
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """L = semantic · (1 − Jaccard of the words) + fidelity · (MSE of the Sobel maps)."""

    semantic: float = 1.0
    """weight λ of the semantic consistency"""
    fidelity: float = 1.0
    """weight γ of the structural fidelity"""
    estimator: Literal["auto", "soft", "score", "none"] = "auto"
    """gradient of the semantic term: token probabilities, REINFORCE, or no such term; auto = soft for open weights"""
    semantic_start: int = 0
    """optimiser steps before the semantic term begins: the first images are unreadable"""
    semantic_warmup: int = 0
    """optimiser steps over which its weight then grows linearly to λ"""
    fidelity_warmup: int = 0
    """optimiser steps over which γ grows linearly: edges leave an image's sign open and keep the first that they get"""
    soft_text: Literal["description", "words"] = "description"
    """soft: teacher-force the RGB frame's whole description, or its words alone, joined by commas"""
    soft_form: Literal["linear", "log"] = "linear"
    """soft: minimise 1 − J as the paper, or −log J: the same optimum, with a gradient where J is near 0"""
    soft_views: float = 0.0
    """soft: show the reader each image at a contrast and a brightness drawn from 1 ± this and 0 ± this; 0 = as it is"""
    score_samples: int = 4
    """score: perturbations an image and step"""
    score_sigma: float = 0.05
    """score: standard deviation of the perturbation, images being in [0, 1]"""
    score_budget: int = 100_000
    """score: most perturbed images that the reader is shown in a run, over all processes; 0 = no limit"""

    def __post_init__(self) -> None:
        for name in ("semantic", "fidelity", "semantic_start", "semantic_warmup", "fidelity_warmup", "score_budget"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name}={getattr(self, name)} is negative; give a value >= 0")
        if not 0 <= self.soft_views < 1:
            raise ValueError(f"loss.soft_views={self.soft_views} is not in [0, 1); 0.5 is a wide range already")
        if self.score_samples < 1:
            raise ValueError(f"loss.score_samples={self.score_samples} must be at least 1")
        if not self.score_sigma > 0:
            raise ValueError(f"loss.score_sigma={self.score_sigma} must be above 0")
        if not self.fidelity:
            if not self.semantic or self.estimator == "none":
                raise ValueError(
                    "loss.fidelity=0 and no semantic term: nothing is left to learn; set loss.fidelity, or "
                    "loss.semantic with an estimator"
                )
            if self.semantic_start:
                raise ValueError(
                    f"loss.fidelity=0: the first loss.semantic_start={self.semantic_start} steps would learn nothing; "
                    "set one of them"
                )
        if self.estimator == "score":
            self._only_soft("set loss.estimator=soft (or auto)")

    def resolve(self, has_weights: bool | None) -> Estimator:
        """The estimator to use with a reader.

        Args:
            has_weights: whether the reader gives token probabilities; None = there is no reader.
        Raises:
            ValueError: the term needs a reader, or one with weights.
        """
        if self.estimator == "none" or not self.semantic:
            return "none"
        if has_weights is None:
            raise ValueError(
                f"loss.estimator={self.estimator} needs a reader: set llm.name (tagger:<teacher>, "
                "open_clip:coca_<arch>/<tag>, hf:<id> or openai:<model>), or loss.estimator=none"
            )
        estimator = self.estimator if self.estimator != "auto" else "soft" if has_weights else "score"
        if estimator == "soft" and not has_weights:
            raise ValueError("loss.estimator=soft needs a reader with weights; set loss.estimator=score (or auto)")
        if estimator == "score":
            self._only_soft("take a reader with weights")
        elif idle := self._given("score_"):
            warnings.warn(f"{', '.join(idle)} has no effect with loss.estimator=soft: leave it out", stacklevel=2)
        return estimator

    def _given(self, start: str) -> list[str]:
        """The settings of one estimator that are not as they usually are."""
        found = (f for f in fields(self) if f.name.startswith(start) and getattr(self, f.name) != f.default)
        return [f"loss.{f.name}={getattr(self, f.name)}" for f in found]

    def _only_soft(self, fix: str) -> None:
        if idle := self._given("soft_"):
            raise ValueError(
                f"{', '.join(idle)} has no effect with loss.estimator=score, which asks about perturbed images and "
                f"takes the Jaccard index of the answers; leave it out, or {fix}"
            )

    def fidelity_weight(self, step: int) -> float:
        """γ at an optimiser step 0, 1, …: (step + 1) / fidelity_warmup of it, then whole."""
        return self.fidelity * min(1.0, (step + 1) / max(1, self.fidelity_warmup))

    def semantic_weight(self, step: int) -> float:
        """λ at an optimiser step 0, 1, …: 0 before semantic_start, then (s + 1) / semantic_warmup of it, then whole."""
        since = step - self.semantic_start
        if since < 0:
            return 0.0
        return self.semantic * min(1.0, (since + 1) / max(1, self.semantic_warmup))


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """The frozen multimodal model that reads images."""

    name: str = ""
    """tagger:<teacher>, open_clip:coca_<arch>/<tag>, hf:<id or folder> or openai:<model>; empty = no reader"""
    prompt: str = "Describe the image in one short sentence."
    """what it is asked about an image"""
    words: int = 1
    """tagger: words it says of an image"""
    vocabulary: list[str] = field(default_factory=list)
    """tagger with a text tower: the words it chooses from; empty = the names of the data set's classes"""
    prompt_template: str = "a photo of a {}"
    """tagger with a text tower: what the tower reads of a word, whose place is {}"""
    batch_size: int = 16
    """hf, open_clip: images described at a time"""
    max_new_tokens: int = 64
    """longest answer [tokens]"""
    quantise: Literal["", "8bit", "4bit"] = ""
    """hf: weights in 8 or 4 bits (needs bitsandbytes); empty = as they are"""
    dtype: str = ""
    """hf, open_clip: float32, bfloat16 or float16; empty = the reader's own default"""
    file: str = ""
    """local weights of an open_clip model instead of a download"""
    base_url: str = ""
    """openai: address of the server, http://localhost:8000/v1; empty = the vendor's"""
    concurrency: int = 4
    """openai: requests under way at a time"""
    requests_per_minute: float = 0.0
    """openai: most requests begun in a minute; 0 = no limit"""
    price_in: float = 0.0
    """openai: price of a million tokens read, for the cost count"""
    price_out: float = 0.0
    """openai: price of a million tokens written"""
    device: str = ""
    """where a local reader runs; empty = where the training does"""

    def __post_init__(self) -> None:
        for name in ("words", "batch_size", "max_new_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"llm.{name}={getattr(self, name)} must be at least 1")
        for name in ("requests_per_minute", "price_in", "price_out"):
            if getattr(self, name) < 0:
                raise ValueError(f"llm.{name}={getattr(self, name)} is negative; give a value >= 0")

    @property
    def chooses_classes(self) -> bool:
        """Whether the reader says names of the data set's classes for want of a vocabulary of its own."""
        return self.name.startswith("tagger:open_clip:") and not self.vocabulary

    def build(self, *, device: torch.device | str = "cpu", classes: Sequence[str] = ()) -> Reader:
        """The reader.

        Args:
            device: where it runs unless the config says so.
            classes: of the data set: the vocabulary of a tagger with a text tower that has none of its own.
        Raises:
            ValueError: no name, an unknown kind, or an option that the kind refuses.
            FileNotFoundError: its weights are nowhere.
        """
        from downstream.llm_evrep.readers import build_reader

        if not self.name:
            raise ValueError("llm.name is empty: name a reader, e.g. llm.name=tagger:runs/demo/teacher/export")
        vocabulary = list(self.vocabulary)
        if self.chooses_classes:
            # ImageNet calls two classes by one name: it is one word.
            vocabulary = list(dict.fromkeys(said(name) for name in classes))
        return build_reader(
            self.name,
            device=self.device or str(device),
            vocabulary=vocabulary or None,
            words=self.words,
            prompt_template=self.prompt_template,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            quantise=self.quantise,
            dtype=self.dtype,
            file=self.file,
            base_url=self.base_url,
            concurrency=self.concurrency,
            requests_per_minute=self.requests_per_minute,
            price_in=self.price_in,
            price_out=self.price_out,
        )


FREE_OF_READER = (
    "llm.batch_size",
    "llm.concurrency",
    "llm.requests_per_minute",
    "llm.price_in",
    "llm.price_out",
    "llm.base_url",
)
"""Fields of the reader that change how it is asked, not what it answers: a resumed run may have others."""


@dataclass(frozen=True, kw_only=True)
class EvRepConfig:
    """Everything that a training of LLM-EvRep depends on."""

    run: str = "runs/llm_evrep"
    """folder of this run: config, metrics, answers, checkpoints, export"""
    data: DataConfig = field(default_factory=lambda: DataConfig(windows=1, window_us=0))
    represent: RepresentConfig = field(default_factory=lambda: RepresentConfig(name="tencode"))
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    llm: ReaderConfig = field(default_factory=ReaderConfig)
    class_names: str = ""
    """tagger that says classes: their names: empty = the data set's, imagenet = English, or a file with a line each"""
    cache: str = ""
    """folder of the reader's answers, which other runs may share; empty = answers/ in the run's folder"""
    eval_samples: int = 1000
    """held-out samples that an evaluation reads, spread evenly over them; 0 = all"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.eval_samples < 0:
            raise ValueError(f"eval_samples={self.eval_samples} is negative; 0 = all held-out samples")
        if self.data.pick:
            raise ValueError(
                f"data.pick={self.data.pick}: the generator sees all windows of a sample side by side; set data.pick=0 "
                "and lower data.windows instead"
            )
        clips = [source for source in (self.data, *self.data.mix.values()) if source.clip]
        if clips:
            raise ValueError("data.clip=true gives an image a window, and one is wanted for a sample; unset it")
        streams = [s for s in (self.data, *self.data.mix.values()) if s.name == "images" and s.images.streaming]
        if streams:
            raise ValueError(
                "data.images.streaming=true: the frames are described once before training, and a stream's rows have "
                "no names; read it without streaming, or pack it into shards"
            )
