"""Stage 2: a causal transformer learns what comes next in sequences of event and image tokens.

Source: GEP, arXiv 2603.23032 (next continuous token, targets detached). The image's tokens predicted from every
event frame is our own second term (docs/LOG.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gep.data.config import DataConfig
from gep.data.sequence import SequenceConfig
from gep.distributed import gather, gather_with_grad, rank, sum_over_ranks, world_size
from gep.engine import TrainConfig
from gep.losses import Regression, info_nce, regression
from gep.models.backbone import EVENT, Backbone
from gep.models.config import BackboneConfig, TeacherConfig
from gep.optim import OptimConfig
from stage2_autoregress.tokens import FrozenTokens, PackedTokens, TokenSequence, blind_frames


@dataclass(frozen=True, kw_only=True)
class NextLossConfig:
    """What stage 2 minimises; a weight of 0 turns a term off."""

    next: float = 0.5
    """weight of the regression to the next frame's (or next) token"""
    image: float = 1.0
    """weight of the image's tokens predicted from every event frame"""
    kind: Literal["mse", "cosine", "mse_cosine", "smooth_l1"] = "smooth_l1"
    """distance of both regressions"""
    contrastive: float = 0.0
    """weight of telling the true next frame from those of the rest of the batch"""
    temperature: float = 0.1
    """temperature of the contrastive term"""

    def __post_init__(self) -> None:
        for name in ("next", "image", "contrastive"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name}={getattr(self, name)} is negative; 0 turns the term off")
        if self.next == self.image == self.contrastive == 0:
            raise ValueError("loss: every weight is 0; set loss.next, loss.image or loss.contrastive")
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature={self.temperature} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Stage2Config:
    """Everything that a stage-2 run depends on."""

    run: str = "runs/stage2"
    """folder of this run: config, metrics, checkpoints, export"""
    model: str = "runs/stage1/export"
    """stage 1's export (a folder or a Hub id)"""
    tokens: str = ""
    """folder of tokens that stage2_autoregress/tokens.py packed; empty = encoded on the fly, every epoch anew"""
    data: DataConfig = field(default_factory=DataConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    loss: NextLossConfig = field(default_factory=NextLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.loss.contrastive and self.train.accumulate > 1:
            raise ValueError(
                f"train.accumulate={self.train.accumulate} would shrink the negatives of loss.contrastive="
                f"{self.loss.contrastive}; set one of them off (train.accumulate=1 or loss.contrastive=0)"
            )
        if self.loss.image and self.sequence.image_first == sum(self.sequence.odds):
            raise ValueError(
                f"loss.image={self.loss.image}: with sequence.image_first alone every window has seen its image, and "
                "nothing is left to predict; give odds to another layout, or set loss.image=0"
            )
        if self.sequence.image_first and any(source.clip for source in self.data.sources().values()):
            raise ValueError(
                f"sequence.image_first={self.sequence.image_first}: a clip has no image of the time before its first "
                "window; set it to 0, or data.clip=false"
            )
        if self.loss.contrastive and (self.sequence.is_mixed or self.backbone.order == "token"):
            raise ValueError(
                f"loss.contrastive={self.loss.contrastive} compares whole next frames of one modality: give odds to "
                "one layout of `sequence` alone, and backbone.order=frame; or set loss.contrastive=0"
            )


class Stage2Task(nn.Module):
    """The backbone and its objective; tokens come from the frozen encoder and image model, now or when packed.

    Args:
        backbone: trained.
        tokens: batch -> sequences of tokens; frozen and no part of this module's parameters.
        loss: terms and weights.
    """

    def __init__(self, backbone: Backbone, tokens: FrozenTokens | PackedTokens, loss: NextLossConfig):
        super().__init__()
        self.backbone = backbone
        self.tokens = tokens
        self.loss = loss
        # A head without a gradient would make DDP wait for one.
        if not (loss.next or loss.contrastive):
            backbone.next_head.requires_grad_(False)
        if not loss.image:
            backbone.image_head.requires_grad_(False)

    def forward(self, batch: dict[str, Any], context: Tensor | None = None, index: int = 0) -> dict[str, Tensor]:
        """Losses of one micro-batch.

        Args:
            batch: as `collate_sequences` gives it.
            context: mean numbers of valid tokens, from `context`; index is not needed.
        Returns:
            "loss" and the terms it is made of, scalars.
        """
        sequence = self.tokens(batch)
        output, target, mask = self.predict(sequence)
        # Divided by the mean count over all micro-batches and ranks, not by this one's own: the mean that the
        # engine takes over them is then the sum over all tokens ÷ the number of all tokens.
        counts = _counts(sequence, mask) if context is None else context
        terms: dict[str, Tensor] = {}
        if self.loss.next:
            terms["next"] = _mean(self.loss.kind, output.next, target, mask, counts[0])
        if self.loss.image:
            where = sequence.blind[..., None].expand(mask.shape)
            terms["image"] = _mean(self.loss.kind, output.image, sequence.image, where, counts[1])
        if self.loss.contrastive:
            terms["contrastive"] = self._contrast(output.next, target, mask)
        weighted = [getattr(self.loss, name) * value for name, value in terms.items()]
        return {
            "loss": torch.stack(weighted).sum(),
            **{name: value.detach() for name, value in terms.items()},
        }

    @torch.no_grad()
    def context(self, micro_batches: list[dict[str, Any]]) -> Tensor:
        """Mean numbers of valid tokens a micro-batch, over all micro-batches and ranks: (2,) next, image."""
        counts = torch.zeros(2, device=micro_batches[0]["valid"].device)
        for batch in micro_batches:
            valid = batch["valid"]
            events = blind_frames(batch["modality"], valid).sum()
            follows = (valid[:, 1:] & valid[:, :-1]).sum()
            real = self.tokens.real(batch)
            if real is not None:
                follows = self._real_next(real, valid).sum() / real.shape[2]
            elif self.backbone.order == "token":
                num = math.prod(self.tokens.grid(batch))
                follows = (valid.sum() * (num - 1) + follows) / num
            counts += torch.stack([follows, events]).float()
        counts = sum_over_ranks(counts) / (world_size() * len(micro_batches))
        return counts

    def predict(self, sequence: TokenSequence) -> tuple[Any, Tensor, Tensor]:
        """(backbone output, next tokens (B, F, N, D), bool mask (B, F, N)) of a batch of sequences.

        The mask leaves out targets that are no encoded patch; the learned token in their place is there to be read.
        """
        following = self.backbone.next_targets(sequence.frames, sequence.valid, sequence.modality)
        output = self.backbone(
            sequence.frames,
            sequence.modality,
            sequence.t_us,
            sequence.grid,
            # With every frame real the attention needs no mask of its own.
            valid=sequence.valid if sequence.padded else None,
            next_modality=following.modality,
        )
        if sequence.real is None:
            return output, following.tokens, following.mask
        return output, following.tokens, self._real_next(sequence.real, sequence.valid)

    def _real_next(self, real: Tensor, valid: Tensor) -> Tensor:
        """(B, F, N) bool: a next token exists and is a real one."""
        return self.backbone.next_targets(real[..., None].float(), valid).tokens[..., 0] > 0

    def _contrast(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """InfoNCE between predicted and true next frames (mean tokens) over batch and ranks.

        Only the last real transition of each sequence takes part, so that all candidates are of one modality
        and every rank gives equally many. Of the true frame the real tokens count; which those are the prediction
        cannot know, so that all of its tokens do.
        """
        last = mask.any(dim=2).int().cumsum(dim=1).argmax(dim=1)
        rows = torch.arange(len(last), device=last.device)
        event = F.normalize(prediction[rows, last].float().mean(dim=1), dim=-1)
        seen = mask[rows, last][..., None]
        truth = F.normalize(target[rows, last].float().masked_fill(~seen, 0.0).mean(dim=1), dim=-1)
        scale = torch.full((), 1 / self.loss.temperature, device=event.device)
        return info_nce(
            event,
            truth,
            scale,
            all_a=gather_with_grad(event),
            all_b=gather(truth),
            offset=rank() * len(event),
        )

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Evaluation's view of a batch, a row a sequence.

        Returns:
            Sums and counts over tokens, per modality of the predicted frame, of the squared error of the prediction
            (`error`, (B, 2)), of the copy of the previous frame (`copied`), and of the target itself, from which the
            mean token's error follows (`square` (B, 2), `total` (B, 2, D)); `count` (B, 2); and unit vectors (B, N·D)
            of the image's tokens, predicted from all event windows and nothing else, and true.
        """
        sequence = self.tokens(batch)
        output, target, mask = self.predict(sequence)
        target, prediction = target.float(), output.next.float()
        previous = sequence.frames if self.backbone.order == "frame" else _previous_frame(sequence.frames)
        kind = torch.cat([sequence.modality[:, 1:], sequence.modality[:, -1:]], dim=1)
        if self.backbone.order == "token":
            # Inside a frame the next token is of this frame; only the last token looks across.
            kinds = sequence.modality[..., None].repeat(1, 1, target.shape[2])
            kinds[..., -1] = kind
        else:
            kinds = kind[..., None].expand(target.shape[:3])
        rows: dict[str, list[Tensor]] = {name: [] for name in ("error", "copied", "square", "count", "total")}
        for modality in (0, 1):
            chosen = (mask & (kinds == modality)).float()
            rows["error"].append(((prediction - target).square().mean(-1) * chosen).sum((1, 2)))
            rows["copied"].append(((previous - target).square().mean(-1) * chosen).sum((1, 2)))
            rows["square"].append((target.square().mean(-1) * chosen).sum((1, 2)))
            rows["count"].append(chosen.sum((1, 2)))
            rows["total"].append((target * chosen[..., None]).sum((1, 2)))
        found = {name: torch.stack(values, dim=1) for name, values in rows.items()}
        if "images" in batch:
            predicted, true = self._from_events(sequence)
            found["predicted_image"] = F.normalize(predicted.flatten(1), dim=-1)
            found["true_image"] = F.normalize(true.flatten(1), dim=-1)
        return found

    def _from_events(self, sequence: TokenSequence) -> tuple[Tensor, Tensor]:
        """Predicted and true image tokens (B, N, D) after the last event window, with no image in the context."""
        # Evaluation has one layout, so that the event frames stand at the same places in all sequences.
        events = ((sequence.modality == EVENT) & sequence.valid)[0].nonzero()[:, 0]
        frames = sequence.frames[:, events]
        output = self.backbone(frames, sequence.modality[:, events], sequence.t_us[:, events], sequence.grid)
        return output.image[:, -1].float(), sequence.image[:, events[-1]]


def evaluate_prediction(rows: dict[str, Tensor]) -> dict[str, float]:
    """Stage 2's metrics from the rows that `Stage2Task.evaluate` gives over a whole set.

    Returns:
        Mean squared error a feature of the next token, `loss`, beside two trivial predictors, `copy_previous` (the
        previous frame's token at the same place) and `mean_token` (the mean of this set's own targets of that
        modality), over all tokens and per modality (`event_…`, `image_…`); and R@1 (%) of the true image's tokens
        by those predicted after the last event window.
    """
    sums = {name: rows[name].double().sum(dim=0) for name in ("error", "copied", "square", "count", "total")}
    dim = sums["total"].shape[-1]
    mean = sums["total"] / sums["count"].clamp_min(1)[:, None]
    spread = sums["square"] - sums["count"] * mean.square().sum(-1) / dim
    parts = {"loss": sums["error"], "copy_previous": sums["copied"], "mean_token": spread}
    metrics = {}
    for name, values in parts.items():
        metrics[name] = (values.sum() / sums["count"].sum().clamp_min(1)).item()
        for index, modality in enumerate(("event", "image")):
            if sums["count"][index] > 0:
                metrics[f"{modality}_{name}"] = (values[index] / sums["count"][index]).item()
    if "predicted_image" in rows:
        similarity = rows["predicted_image"] @ rows["true_image"].T
        ahead = (~(similarity < similarity.diagonal()[:, None])).sum(dim=1) - 1
        metrics["predicted_image_r1"] = 100 * (ahead < 1).float().mean().item()
    assert all(math.isfinite(value) for value in metrics.values())
    return metrics


def _counts(sequence: TokenSequence, mask: Tensor) -> Tensor:
    tokens = mask.shape[2]
    return torch.stack([mask.sum() / tokens, sequence.blind.sum().float()])


def _mean(kind: Regression, prediction: Tensor, target: Tensor, mask: Tensor, frames: Tensor) -> Tensor:
    """Σ over valid tokens ÷ (frames · N); 0 where there are none."""
    denominator = (frames * mask.shape[2]).clamp_min(1e-6)
    return regression(prediction, target, kind=kind, weight=mask.float(), denominator=denominator)


def _previous_frame(frames: Tensor) -> Tensor:
    """For raster order: for each token, the one a frame before its successor (in the first frame: itself)."""
    flat, num = frames.flatten(1, 2), frames.shape[2]
    earlier = torch.cat([flat[:, : num - 1], flat[:, : flat.shape[1] - num + 1]], dim=1)
    return earlier.view_as(frames)
