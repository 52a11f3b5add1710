"""Stage 1: event tokens learn to say what the frozen image model says of the paired image.

Source: GEP, arXiv 2603.23032 (token regression + contrast); the similarity-structure term after ScaleEvent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gep.data.config import DataConfig
from gep.data.token_cache import check_cacheable
from gep.distributed import gather, gather_with_grad, rank, world_size
from gep.engine import TrainConfig
from gep.events.frames import AnyEvents, PerSource
from gep.events.frames import frames as frames_of
from gep.events.represent import Histogram, Representation, RepresentConfig
from gep.losses import info_nce, regression, siglip, similarity_structure
from gep.models.config import CachedTeacherConfig, EncoderConfig
from gep.models.encoder import EventEncoder
from gep.models.sparse import mean_token
from gep.models.teacher import FrozenVFM
from gep.optim import OptimConfig
from stage1_align.cache import answers


@dataclass(frozen=True, kw_only=True)
class AlignLossConfig:
    """What stage 1 minimises; a weight of 0 turns a term off."""

    regression: float = 1.0
    """weight of the token regression"""
    regression_kind: Literal["mse", "cosine", "mse_cosine", "smooth_l1"] = "smooth_l1"
    """distance between an event token and the teacher's token at the same place"""
    normalise_target: bool = True
    """layer-normalise the teacher's tokens, without scale and shift, before they are a target"""
    activity: float = 0.0
    """0 = all tokens count alike; 1 = a token counts by the share of events in its patch"""
    contrastive: float = 1.0
    """weight of the contrastive term between pooled event and image features"""
    contrastive_kind: Literal["info_nce", "siglip"] = "info_nce"
    """softmax over the batch both ways, or an independent sigmoid for every pair"""
    temperature: float = 0.1
    """temperature that the contrastive term starts from"""
    learn_temperature: bool = True
    """whether the temperature is trained"""
    similarity: float = 0.0
    """weight of the similarity-structure term: token-to-token similarities as the teacher has them"""

    def __post_init__(self) -> None:
        for name in ("regression", "contrastive", "similarity"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name}={getattr(self, name)} is negative; 0 turns the term off")
        if self.regression == self.contrastive == self.similarity == 0:
            raise ValueError("loss: every weight is 0; set loss.regression, loss.contrastive or loss.similarity")
        if not 0 <= self.activity <= 1:
            raise ValueError(f"loss.activity={self.activity} is not in [0, 1]")
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature={self.temperature} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    """Everything that a stage-1 run depends on."""

    run: str = "runs/stage1"
    """folder of this run: config, metrics, checkpoints, export"""
    data: DataConfig = field(default_factory=DataConfig)
    represent: RepresentConfig = field(default_factory=RepresentConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    teacher: CachedTeacherConfig = field(default_factory=CachedTeacherConfig)
    prompt: str = "a photo of a {}"
    """sentence that a class name is put into for zero-shot through an open_clip teacher's text tower"""
    loss: AlignLossConfig = field(default_factory=AlignLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.loss.contrastive and self.train.accumulate > 1 and self.encoder.drop_path > 0:
            raise ValueError(
                f"train.accumulate={self.train.accumulate} caches features that encoder.drop_path="
                f"{self.encoder.drop_path} would draw anew; set one of them off, or loss.contrastive=0"
            )
        if self.teacher.cache:
            check_cacheable(self.data)
        if self.prompt.count("{}") != 1:
            raise ValueError(f"prompt={self.prompt!r} must hold one {{}}, the place of the class name")


class Stage1Task(nn.Module):
    """Encoder, teacher and the alignment objective.

    Args:
        encoder: trained; its `head` maps pooled event features into the teacher's pooled space.
        teacher: frozen, and no part of this module's parameters.
        represent: ragged event batch -> (B·T, C, H, W).
        loss: terms and weights.
        class_vectors: (K, P) unit text vectors of the classes for zero-shot evaluation; None = the teacher's class
            head, where it has one.
    """

    def __init__(
        self,
        encoder: EventEncoder,
        teacher: FrozenVFM,
        represent: Representation | PerSource,
        loss: AlignLossConfig,
        class_vectors: Tensor | None = None,
    ):
        super().__init__()
        self._class_vectors = (class_vectors,)  # in a tuple: no parameter, no buffer, not saved
        self.represent = represent
        self.encoder = encoder
        self.teacher = teacher
        self.loss = loss
        if loss.contrastive:
            start = torch.tensor(math.log(1 / loss.temperature))
            self.log_scale = nn.Parameter(start, requires_grad=loss.learn_temperature)
            if loss.contrastive_kind == "siglip":
                self.bias = nn.Parameter(torch.tensor(-10.0))
        elif encoder.head is not None:
            # Without a gradient of its own it would make DDP wait for one.
            encoder.head.requires_grad_(False)
        if encoder.empty is not None and not loss.regression:
            encoder.empty.requires_grad_(False)

    def no_weight_decay(self) -> set[str]:
        return {"log_scale", "bias"} | {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def forward(
        self, batch: dict[str, Any], context: dict[str, Any] | None = None, index: int = 0
    ) -> dict[str, Tensor]:
        """Losses of one micro-batch.

        Args:
            batch: `events` (B·T windows), `windows` T, `image` uint8 (B, 3, H, W), with `crop_at` where the events are
                crops of its view; or in place of both `teacher_tokens` and `teacher_pooled` of a cache.
            context: what `context` returned for this step; index: place of this micro-batch in it.
        Returns:
            "loss" and the terms it is made of, scalars; of an encoder that leaves patches out, `regression` is that of
            the encoded tokens and `empty`, of the same weight, that of the learned token in the others' place.
        """
        windows = batch["windows"]
        frames = frames_of(self.represent, batch["events"])
        tokens, _ = self.encoder(frames)
        real = self.encoder.real(frames)
        teacher_tokens, teacher_pooled = answers(self.teacher, self.encoder, batch)
        target = teacher_tokens.repeat_interleave(windows, dim=0)
        if self.loss.normalise_target:
            target = layer_normalise(target)
        terms: dict[str, Tensor] = {}
        if self.loss.regression:
            weight = self._activity(batch["events"]) if self.loss.activity else None
            if real is None:
                terms["regression"] = regression(tokens, target, kind=self.loss.regression_kind, weight=weight)
            else:
                terms |= self._regressions(tokens, target, real, weight)
        if self.loss.similarity:
            terms["similarity"] = similarity_structure(tokens, target, real=real)
        weights = {name: self.loss.regression if name == "empty" else getattr(self.loss, name) for name in terms}
        total = sum((weights[name] * value for name, value in terms.items()), torch.zeros((), device=tokens.device))
        if self.loss.contrastive:
            event = self._pool(tokens, windows, real)
            image = F.normalize(teacher_pooled.float(), dim=-1)
            terms["contrastive"], share = self._contrast(event, image, context, index)
            total = total + self.loss.contrastive * share
            terms["temperature"] = (-self.log_scale).exp().detach()
        # What is reported is the whole objective's value; `total` may be scaled so that its gradients add up.
        return {"loss": total, **{name: value.detach() for name, value in terms.items()}}

    @torch.no_grad()
    def context(self, micro_batches: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Features of all micro-batches of all ranks, so that accumulation keeps every negative.

        Called by the engine once a step, before the first micro-batch. Source: the feature cache of
        Gao et al. 2021 (GradCache).
        """
        if not self.loss.contrastive or len(micro_batches) == 1:
            return None
        events, images = [], []
        for batch in micro_batches:
            frames = frames_of(self.represent, batch["events"])
            tokens, _ = self.encoder(frames)
            events.append(gather(self._pool(tokens, batch["windows"], self.encoder.real(frames))))
            images.append(gather(F.normalize(answers(self.teacher, self.encoder, batch)[1].float(), dim=-1)))
        return {"events": events, "images": images}

    def features(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Evaluation's view of a batch, a row a sample: pooled features of both sides and token agreement."""
        windows = batch["windows"]
        frames = frames_of(self.represent, batch["events"])
        tokens, _ = self.encoder(frames)
        real = self.encoder.real(frames)
        teacher_tokens, teacher_pooled = answers(self.teacher, self.encoder, batch)
        target = layer_normalise(teacher_tokens) if self.loss.normalise_target else teacher_tokens
        per_sample = tokens.unflatten(0, (-1, windows)).float()
        cosine = _mean(F.cosine_similarity(per_sample, target[:, None].float(), dim=-1).flatten(0, 1), windows, real)
        mean = _mean(tokens.float(), windows, real)
        rows = {
            "event": F.normalize(self.encoder.embed(mean).float(), dim=-1),
            "image": F.normalize(teacher_pooled.float(), dim=-1),
            "token_cosine": cosine,
            "label": batch["label"],
        }
        vectors = self._class_vectors[0]
        if vectors is None:
            logits = self.teacher.classify(mean)
        else:
            logits = rows["event"] @ vectors.to(rows["event"]).T
        if logits is not None:
            rows["zero_shot"] = logits.argmax(dim=-1)
        return rows

    def _regressions(self, tokens: Tensor, target: Tensor, real: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """The regression of the encoded tokens, and that of the learned token where none was encoded.

        Each is a mean over windows of the mean over a window's own tokens, so that micro-batches with other numbers of
        tokens add up to the whole batch. The second is what trains the learned token, and moves nothing else of the
        ViT but the final norm.
        """
        share = real.float() if weight is None else weight * real
        rest = (~real).float()
        return {
            name: regression(
                tokens,
                target,
                kind=self.loss.regression_kind,
                weight=part / part.sum(dim=1, keepdim=True).clamp_min(1e-12),
                denominator=float(len(tokens)),
            )
            for name, part in (("regression", share), ("empty", rest))
        }

    def _pool(self, tokens: Tensor, windows: int, real: Tensor | None) -> Tensor:
        """(B·T, N, D) tokens -> (B, P) unit features in the teacher's pooled space, one a sample."""
        return F.normalize(self.encoder.embed(_mean(tokens, windows, real)).float(), dim=-1)

    def _contrast(
        self, event: Tensor, image: Tensor, context: dict[str, Any] | None, index: int
    ) -> tuple[Tensor, Tensor]:
        """(value for the log, term of the loss) of the contrastive part."""
        softmax = self.loss.contrastive_kind == "info_nce"
        function = info_nce if softmax else siglip
        extra: dict[str, Any] = {} if softmax else {"bias": self.bias}
        # CLIP's bound: past a scale of 100 the softmax is numerically a hard maximum.
        scale = self.log_scale.clamp(max=math.log(100)).exp()
        if context is None:
            # Sigmoids need no other rank's events: each pair is judged once, where its event is.
            others = {"all_a": gather_with_grad(event)} if softmax else {}
            value = function(event, image, scale, all_b=gather(image), offset=rank() * len(event), **others, **extra)
            return value, value
        own = slice(rank() * len(event), (rank() + 1) * len(event))
        events = [part.clone() for part in context["events"]]
        events[index] = torch.cat([events[index][: own.start], event, events[index][own.stop :]])
        # Every micro-batch of every rank holds the whole objective but only its own features' gradient; the
        # engine takes their mean where the exact gradient is their sum. The scale and bias have the whole
        # gradient each time, so theirs is right as a mean: they are scaled back by the same factor.
        parts = len(context["events"]) * world_size()
        images = torch.cat(context["images"])
        local = function(torch.cat(events), images, scale.detach(), **_detached(extra))
        shared = function(torch.cat(events).detach(), images, scale, **extra)
        value = shared.detach()
        return value, parts * (local - local.detach()) + shared

    def _activity(self, events: AnyEvents) -> Tensor:
        """(B, N) weights: 1 − a + a · (events in the patch ÷ mean over patches), a = loss.activity."""
        counted = frames_of(Histogram(), events).sum(dim=1, keepdim=True)
        counts = F.avg_pool2d(counted, self.encoder.patch_size, ceil_mode=True).flatten(1)
        share = counts / counts.mean(dim=1, keepdim=True).clamp_min(1e-12)
        return 1 - self.loss.activity + self.loss.activity * share


def check_fit(encoder: EventEncoder, teacher: FrozenVFM, cfg: Stage1Config) -> None:
    """Raises ValueError where the encoder's tokens cannot be compared with the teacher's, naming fields and fix."""
    size = (cfg.data.height, cfg.data.width)
    if encoder.embed_dim != teacher.embed_dim:
        raise ValueError(
            f"encoder.preset={cfg.encoder.preset} gives tokens of {encoder.embed_dim} features, teacher.name="
            f"{teacher.spec} of {teacher.embed_dim}; choose a pair of equal width"
        )
    if encoder.grid(*size) != teacher.grid(*size):
        raise ValueError(
            f"data.height={size[0]} data.width={size[1]}: {encoder.grid(*size)} event tokens and {teacher.grid(*size)} "
            "image tokens (rows, columns); choose an encoder and a teacher of equal patch size, or teacher.image_size"
        )


def layer_normalise(tokens: Tensor) -> Tensor:
    """Each token (…, D) to mean 0 and variance 1 over its features, in float32."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def candidates_ahead(queries: Tensor, candidates: Tensor, chunk: int = 1024) -> Tensor:
    """How many wrong candidates are at least as similar as the right one, a query; row i belongs to row i.

    Args:
        queries, candidates: (N, P) float unit vectors.
        chunk: queries at a time: the N × N similarities of a large set do not fit into memory at once.
    Returns:
        (N,) int64; ties, and NaN, count against us.
    """
    counts = []
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ candidates.T
        own = similarity.diagonal(start)[:, None]
        counts.append((~(similarity < own)).sum(dim=1) - 1)
    return torch.cat(counts)


def _mean(values: Tensor, windows: int, real: Tensor | None) -> Tensor:
    """(B·T, N, …) values of tokens -> (B, …), the mean over the windows of each window's mean over its real tokens."""
    if real is None:
        return values.unflatten(0, (-1, windows)).mean(dim=(1, 2))
    if values.ndim == 2:
        return mean_token(values[..., None], real)[..., 0].unflatten(0, (-1, windows)).mean(dim=1)
    return mean_token(values, real).unflatten(0, (-1, windows)).mean(dim=1)


def _detached(values: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.detach() for name, value in values.items()}


def evaluate_alignment(rows: dict[str, Tensor]) -> dict[str, float]:
    """Stage 1's metrics from the rows that `Stage1Task.features` gives over a whole set.

    Returns:
        r1/r5 event → image and image → event (%, ties broken against us), token_cosine in [−1, 1], and
        zero_shot top-1 (%) where the teacher knows classes.
    """
    metrics: dict[str, float] = {}
    for name in ("event_to_image", "image_to_event"):
        query, answer = name.split("_to_")
        ahead = candidates_ahead(rows[query], rows[answer])
        for k in (1, 5):
            metrics[f"{name}_r{k}"] = 100 * (ahead < k).float().mean().item()
    metrics["token_cosine"] = rows["token_cosine"].mean().item()
    if "zero_shot" in rows:
        metrics["zero_shot"] = 100 * (rows["zero_shot"] == rows["label"]).float().mean().item()
    return metrics
