"""Recognition's configuration, its fine-tuning task, and the probes on frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.common import Feature, Pool, window_features
from downstream.heads import LinearProbe, fit_linear_probe
from downstream.metrics import mean_std, top_k_accuracy
from downstream.recognition.model import feature_dim
from gep.data.config import DataConfig
from gep.data.fewshot import draw_shots
from gep.engine import TrainConfig
from gep.hub import GEPModel
from gep.models.config import TeacherConfig
from gep.models.teacher import FrozenVFM
from gep.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Linear classifiers on frozen features."""

    c: float = 1.0
    """inverse strength of the penalty, as in scikit-learn's LogisticRegression; features are standardised"""
    shots: list[int] = field(default_factory=lambda: [1, 2, 5, 20, 50])
    """labelled samples a class in the k-shot mode"""
    draws: int = 5
    """repetitions with other samples, for mean ± standard deviation"""
    seed: int = 0
    """of the draws"""

    def __post_init__(self) -> None:
        if self.c <= 0:
            raise ValueError(f"probe.c={self.c} must be above 0")
        if self.draws < 1 or not self.shots or min(self.shots) < 1:
            raise ValueError(f"probe.draws={self.draws} and probe.shots={self.shots} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RecognitionConfig:
    """Everything that a recognition run depends on."""

    run: str = "runs/recognition"
    """folder of this run: config, metrics, results, checkpoints, export"""
    model: str = "runs/stage2/export"
    """exported model (a folder or a Hub id); its input is taken over, but for the data.* that are set here"""
    mode: Literal["probe", "kshot", "zero_shot", "finetune", "scratch"] = "probe"
    """linear probe, k-shot probe, zero-shot, fine-tuning, or the same architecture from random weights"""
    feature: Literal["all", "last"] = "last"
    """what the classifier reads: the mean over all windows, or the last window"""
    pool: Literal["mean", "mean_std", "mean_max"] = "mean"
    """a window's feature: its mean token, or that with the tokens' standard deviation or maximum (small objects)"""
    use_backbone: bool = True
    """false = the encoder alone, also where the model has a backbone"""
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    prompt: str = "a photo of a {}"
    """sentence around a class name for zero-shot through the text tower of an open_clip teacher.name"""
    shots: int = 0
    """fine-tune with so many labelled samples a class; 0 = all"""
    draw: int = 0
    """which draw of those samples"""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    encoder_lr: float = 0.1
    """the encoder's learning rate as a share of optim.lr; 0 freezes it"""
    backbone_lr: float = 0.3
    """the backbone's learning rate as a share of optim.lr; 0 freezes it"""
    label_smoothing: float = 0.1
    """of the fine-tuning cross-entropy"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name in ("encoder_lr", "backbone_lr", "label_smoothing", "shots", "draw"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative")
        if self.data.mix:
            raise ValueError("data.mix: one label would mean several things; recognition reads a single data set")
        if self.mode == "scratch" and self.encoder_lr == 0:
            raise ValueError("encoder_lr=0 would leave random weights untrained in mode=scratch; use encoder_lr=1")


class FinetuneTask(nn.Module):
    """A model with a linear classifier, trained together.

    Args:
        model: encoder, and backbone where there is one.
        num_classes: C.
        feature, use_backbone, pool: what the classifier reads.
        label_smoothing: of the cross-entropy.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        model: GEPModel,
        num_classes: int,
        *,
        feature: Feature,
        use_backbone: bool = True,
        pool: Pool = "mean",
        label_smoothing: float = 0.1,
    ):
        super().__init__()
        self.represent = model.represent
        self.encoder = model.encoder
        self.backbone = model.backbone if use_backbone else None
        # The classifier does not read them; without a gradient they would make DDP wait for one.
        if self.encoder.head is not None:
            self.encoder.head.requires_grad_(False)
        if self.encoder.empty is not None and self.backbone is None:
            self.encoder.empty.requires_grad_(False)
        if self.backbone is not None:
            self.backbone.next_head.requires_grad_(False)
        self.feature: Feature = feature
        self.pool: Pool = pool
        self.label_smoothing = label_smoothing
        dim = feature_dim(model, pool, use_backbone=use_backbone)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.head = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """(B, C) of a batch."""
        features = window_features(self, batch, pool=self.pool).pooled(self.feature)
        return self.head((features - self.mean) / self.scale)

    @torch.no_grad()
    def start_from(self, features: Tensor, labels: Tensor | None, c: float = 1.0) -> None:
        """Fixes the head's standardisation and, with labels, starts it as the linear probe on these features.

        Pooled tokens of an untrained ViT differ between samples in a small part of their length alone; unstandardised,
        training from scratch spends its first hundreds of steps on that. Starting from the probe keeps fine-tuning
        from distorting good features. Source: Kumar et al. 2022 (LP-FT).

        Args:
            features: (N, D) frozen features of the training samples; labels: (N,) or None for a zero head.
            c: see `fit_linear_probe`.
        """
        if labels is None:
            mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        else:
            probe = fit_linear_probe(features, labels, self.head.out_features, c=c)
            mean, scale = probe.mean, probe.scale
            self.head.weight.copy_(probe.weight)
            self.head.bias.copy_(probe.bias)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def classifier(self) -> dict[str, Tensor]:
        """`weight` (K, D) and `bias` (K,) on the pooled features: head and standardisation in one."""
        return LinearProbe(self.mean, self.scale, self.head.weight.detach(), self.head.bias.detach()).folded()

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"loss", "accuracy"} of a batch with `label`."""
        logits = self.logits(batch)
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(dim=-1) == batch["label"]).float().mean()
        return {"loss": loss, "accuracy": accuracy.detach()}


def probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, config: ProbeConfig
) -> tuple[LinearProbe, dict[str, float]]:
    """Linear probe on all labelled features.

    Args:
        train, test: (features (N, D), labels (N,)).
    Returns:
        The probe, and its top1 and top5 in percent.
    """
    fitted = fit_linear_probe(*train, num_classes, c=config.c)
    logits = fitted(test[0])
    return fitted, {"top1": top_k_accuracy(logits, test[1]), "top5": top_k_accuracy(logits, test[1], k=5)}


def kshot(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor] | None, num_classes: int, config: ProbeConfig
) -> dict[str, list[float] | None]:
    """k-shot probes: k labelled samples a class, several draws.

    Args:
        train: (features (N, D), labels (N,)) to draw from.
        test: to evaluate on; None = in each draw, whatever was not drawn.
    Returns:
        str(k) -> [mean, standard deviation] of top-1 in percent; None where a class has too few samples for k.
    """
    features, labels = train
    smallest = int(np.bincount(labels.numpy())[np.unique(labels.numpy())].min())
    table: dict[str, list[float] | None] = {}
    for shots in config.shots:
        if smallest < shots + (test is None):
            table[str(shots)] = None
            continue
        accuracies = []
        for draw in range(config.draws):
            chosen, rest = draw_shots(labels.numpy(), shots, seed=config.seed, draw=draw, leave=int(test is None))
            fitted = fit_linear_probe(features[chosen], labels[chosen], num_classes, c=config.c)
            on = (features[rest], labels[rest]) if test is None else test
            accuracies.append(top_k_accuracy(fitted(on[0]), on[1]))
        table[str(shots)] = mean_std(accuracies)
    return table


def zero_shot(
    model: GEPModel,
    image: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    *,
    teacher: FrozenVFM | None = None,
    prompt: str = "a photo of a {}",
) -> float:
    """Top-1 (%) without a labelled recording.

    Args:
        model: with class vectors of its own, or aligned with `teacher`.
        image: (N, D) mean tokens in the image model's space.
        labels: (N,) indices into `classes`.
        classes: of the data set.
        teacher: an open_clip model, whose text tower then makes the class vectors.
        prompt: the sentence around a class name.
    Raises:
        ValueError: neither the model nor the teacher knows classes, or the model's are not the data set's.
    """
    if teacher is not None:
        vectors = teacher.text([prompt.format(name.replace("_", " ")) for name in classes])
        event = F.normalize(model.encoder.embed(image.to(model.device)), dim=-1)
        return top_k_accuracy((event @ vectors.to(event).T).cpu(), labels)
    if model.classes is None:
        raise ValueError(
            "mode=zero_shot: the model has no class vectors, as its teacher knew no classes; name the open_clip model "
            "that it was aligned with, teacher.name=open_clip:<arch>/<tag>"
        )
    if list(model.classes) != list(classes):
        raise ValueError(
            f"mode=zero_shot: the model's classes ({', '.join(model.classes[:3])}, …) are not the data set's "
            f"({', '.join(list(classes)[:3])}, …); use mode=kshot or mode=probe"
        )
    logits = model.classify(image)
    assert logits is not None  # it has classes
    return top_k_accuracy(logits.cpu(), labels)
