"""Event encoder: a ViT with any number of input channels, and how it starts from an image model's weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from gep.models.sparse import Kept, check_keep, choose, fill, mean_token, patch_activity, real_map
from gep.models.vit import (
    build_vit,
    check_kept,
    final_norm,
    round_periods,
    spread_depths,
    vit_grid,
    vit_intermediates,
    vit_kept_tokens,
    vit_tokens,
)
from gep.models.vit_type import ViT

_FIRST_CONVS = ("patch_embed.proj.weight", "patch_embed.conv1.weight")


@dataclass(frozen=True)
class InitReport:
    """What `EventEncoder.init_from` took over; `str()` is a paragraph for the log."""

    copied: tuple[str, ...]
    """Parameters copied bit for bit."""
    adapted: tuple[tuple[str, str], ...]
    """Parameters changed on the way, and how."""
    left: tuple[str, ...]
    """Parameters of the encoder that kept their random start."""
    unused: tuple[str, ...]
    """Tensors of the teacher that have no place in the encoder."""
    reason: str = ""
    """Why nothing could be copied at all."""

    def __str__(self) -> str:
        if self.reason:
            return f"Encoder starts at random: {self.reason}."
        adapted = "; ".join(f"{name} ({how})" for name, how in self.adapted) or "none"
        return (
            f"Encoder starts from the teacher: {len(self.copied)} tensors copied, {len(self.adapted)} "
            f"adapted: "
            f"{adapted}; left at random: {', '.join(self.left) or 'none'}; "
            f"unused of the teacher: {', '.join(self.unused) or 'none'}."
        )


class HasVisual(Protocol):
    """The part of FrozenVFM that an encoder starts from."""

    @property
    def visual(self) -> ViT | None:
        """timm ViT."""

    visual_reason: str
    """Why it is None."""


class EventEncoder(nn.Module):
    """ViT from represented events (or an image) to patch tokens in the teacher's space.

    With `keep` below 1 only the most active patches are encoded: their pixels are embedded, the blocks run on the
    short sequence (with all class and register tokens), and its tokens are put back. Every place that was left out
    gets one learned token, `empty`, which passes the final norm as all tokens do; at inner depths too, so that maps
    are complete everywhere. `real` tells which tokens were encoded, and `pooled` is the mean of those alone.

    Args:
        arch: "nano" (96 wide, 4 layers, convolutional stem, patch 6) or a timm ViT name.
        in_chans: channels C of the representation.
        img_size: (H, W) that the position embeddings are made for; other multiples of the patch work too.
        head_dim: width P of the space `embed` maps into, normally the teacher's pooled width; None = no head.
        head_hidden: hidden width of that head, 0 = one linear layer.
        mean, std: per-channel normalisation of the input, applied first; None = none.
        drop_path: stochastic depth rate of the last block in training.
        keep: share of the patches that is encoded, in (0, 1], the most active first; "active" = all with events;
            1 = dense.
        background: what the representation gives a pixel without events; activity is the distance from it.
        rope_bf16: rotary periods rounded to bfloat16, as DINOv3's releases hold them.
    Raises:
        ValueError: values that do not fit together, or a ViT that cannot leave patches out.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        arch: str = "nano",
        in_chans: int = 2,
        img_size: Sequence[int] = (36, 36),
        head_dim: int | None = None,
        head_hidden: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        drop_path: float = 0.0,
        keep: float | str = 1.0,
        background: float = 0.0,
        rope_bf16: bool = False,
    ) -> None:
        super().__init__()
        img_size = (int(img_size[0]), int(img_size[1]))
        mean = None if mean is None else [float(m) for m in mean]
        std = None if std is None else [float(s) for s in std]
        for key, value in (("mean", mean), ("std", std)):
            if value is not None and len(value) != in_chans:
                raise ValueError(f"{key} has {len(value)} values for in_chans = {in_chans}: give one a channel")
        self.config: dict[str, Any] = {
            "arch": arch,
            "in_chans": in_chans,
            "img_size": list(img_size),
            "head_dim": head_dim,
            "head_hidden": head_hidden,
            "mean": mean,
            "std": std,
            "drop_path": drop_path,
            "keep": check_keep(keep),
            "background": float(background),
            "rope_bf16": rope_bf16,
        }
        self.keep: float | str = self.config["keep"]
        self.background: float = self.config["background"]
        self.vit = build_vit(arch, in_chans, img_size, drop_path)
        if rope_bf16:
            round_periods(self.vit, arch)
        self.in_chans = in_chans
        self.embed_dim: int = self.vit.embed_dim
        self.patch_size: tuple[int, int] = tuple(self.vit.patch_embed.patch_size)
        self.num_layers = len(self.vit.blocks)
        self.num_prefix: int = self.vit.num_prefix_tokens
        self.grid(*img_size)
        for key, value, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            tensor = torch.tensor([default] * in_chans if value is None else value)[:, None, None]
            self.register_buffer(f"_{key}", tensor, persistent=False)
        self._normalise = mean is not None or std is not None
        self.head = _head(self.embed_dim, head_dim, head_hidden)
        self.empty: nn.Parameter | None = None
        if self.is_sparse:
            check_kept(self.vit, arch)
            self.empty = nn.Parameter(nn.init.trunc_normal_(torch.empty(self.embed_dim), std=0.02))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            x: (B, C, H, W) float, H and W multiples of the patch.
        Returns:
            tokens: (B, N, D) after the final norm, raster order, without class and register tokens.
            pooled: (B, D) mean of the tokens that `real` calls real.
        """
        if self.is_sparse:
            kept = self._kept(x)
            (tokens,) = self._filled(x, kept, [self.num_layers])
            return tokens, mean_token(tokens, real_map(kept, tokens.shape[1]))
        _, tokens = vit_tokens(self.vit, self._normalised(x))
        return tokens, tokens.mean(1)

    @property
    def is_sparse(self) -> bool:
        """Whether some patches are left out."""
        return self.keep != 1.0

    def real(self, x: Tensor) -> Tensor | None:
        """Which tokens of `forward(x)` are encoded patches, and not the learned token of those left out.

        It follows from the input alone, at a small part of the cost of encoding it.

        Args:
            x: (B, C, H, W) as `forward` takes it.
        Returns:
            (B, N) bool with at least one True a row; None = all are, and no mask is needed.
        """
        return real_map(self._kept(x), math.prod(self.grid(*x.shape[-2:]))) if self.is_sparse else None

    def _kept(self, x: Tensor) -> Kept:
        self.grid(*x.shape[-2:])
        return choose(patch_activity(x, self.patch_size, self.background), self.keep, self.num_prefix)

    def _filled(self, x: Tensor, kept: Kept, depths: Sequence[int]) -> list[Tensor]:
        """(B, N, D) whole maps at some depths."""
        states = vit_kept_tokens(self.vit, self._normalised(x), kept.index, kept.real, depths)
        empty = final_norm(self.vit)(self.empty)
        num = math.prod(self.grid(*x.shape[-2:]))
        return [fill(state, kept, empty, num) for state in states]

    def intermediates(self, x: Tensor, num: int) -> list[Tensor]:
        """Patch tokens at several depths, spread evenly over the blocks, each through the final norm.

        Args:
            x: (B, C, H, W) float, H and W multiples of the patch.
            num: how many depths, 1 … num_layers.
        Returns:
            `num` tensors (B, N, D), shallow to deep; the last is what `forward` gives.
        Raises:
            ValueError: more depths than blocks, or none.
        """
        if not 1 <= num <= self.num_layers:
            raise ValueError(f"{num} depths of an encoder with {self.num_layers} blocks: give 1 … {self.num_layers}")
        depths = spread_depths(self.num_layers, num)
        if self.is_sparse:
            return self._filled(x, self._kept(x), depths)
        return vit_intermediates(self.vit, self._normalised(x), depths)

    def embed(self, x: Tensor) -> Tensor:
        """The vector that is compared with the teacher's pooled one.

        Args:
            x: (B, C, H, W) input, (B, N, D) tokens, all of them real, or (B, D) pooled tokens.
        Returns:
            (B, P), not normalised; P = D without a head.
        """
        if x.ndim == 4:
            x = self(x)[1]
        elif x.ndim == 3:
            x = x.mean(1)
        return x if self.head is None else self.head(x)

    def _normalised(self, x: Tensor) -> Tensor:
        return (x - self._mean) / self._std if self._normalise else x

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (h, w) of an input of `height` x `width` pixels; ValueError where the patch does not fit."""
        return vit_grid(self.vit, height, width)

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer decay: 0 = stem, 1 … num_layers = blocks, then norm and head."""
        if name.startswith("vit.blocks."):
            return int(name.split(".")[2]) + 1
        stem = ("patch_embed.", "pos_embed", "cls_token", "reg_token", "norm_pre.", "rope.")
        return 0 if name.removeprefix("vit.").startswith(stem) else self.num_layers + 1

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay besides the one-dimensional ones."""
        names = {f"vit.{name}" for name in self.vit.no_weight_decay()}
        return names & {name for name, _ in self.named_parameters()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in the ViT's blocks."""
        self.vit.set_grad_checkpointing(enable)

    def init_from_teacher(self, teacher: HasVisual) -> InitReport:
        """`init_from` the image tower of a FrozenVFM; where it has none, the report says why."""
        if teacher.visual is None:
            return InitReport((), (), tuple(self.vit.state_dict()), (), teacher.visual_reason)
        return self.init_from(teacher.visual)

    @torch.no_grad()
    def init_from(self, teacher: ViT | EventEncoder) -> InitReport:
        """Copy every parameter of an image ViT that fits; adapt the first convolution and the positions.

        Args:
            teacher: a timm ViT (`FrozenVFM.visual`), or another EventEncoder.
        Returns:
            What was copied, adapted and left.
        """
        teacher = teacher.vit if isinstance(teacher, EventEncoder) else teacher
        source, target = teacher.state_dict(), self.vit.state_dict()
        copied, adapted, left = [], [], []
        for name, into in target.items():
            value = source.get(name)
            if value is None:
                left.append(name)
                continue
            value, how = self._fit(name, value, into, teacher)
            if value is None:
                left.append(name)
                continue
            into.copy_(value)
            if how:
                adapted.append((name, how))
            else:
                copied.append(name)
        unused = tuple(name for name in source if name not in target)
        return InitReport(tuple(copied), tuple(adapted), tuple(left), unused)

    def _fit(self, name: str, value: Tensor, into: Tensor, teacher: ViT) -> tuple[Tensor | None, str]:
        """`value` made to fit `into`, and how ("" = as it was); None where it cannot."""
        if name == "pos_embed" and value.shape[-1] == into.shape[-1]:
            old, new = tuple(teacher.patch_embed.grid_size), tuple(self.vit.patch_embed.grid_size)
            prefix = into.shape[1] - new[0] * new[1]
            if old != new and value.shape[1] - old[0] * old[1] == prefix:
                value = resample_abs_pos_embed(value, new, old, num_prefix_tokens=prefix)
                return value, f"resampled from {old[0]}x{old[1]} to {new[0]}x{new[1]}"
        if value.shape == into.shape:
            return value, ""
        if name in _FIRST_CONVS and value.shape[0] == into.shape[0] and value.shape[2:] == into.shape[2:]:
            given, own = value.shape[1], into.shape[1]
            # An input that is the same in all channels keeps its response, whatever their number.
            value = value.mean(1, keepdim=True).expand_as(into) * (given / own)
            return value, f"mean over {given} channels, scaled by {given}/{own} for {own}"
        return None, ""


def _head(dim: int, out: int | None, hidden: int) -> nn.Module | None:
    if out is None:
        return None
    if not hidden:
        return nn.Linear(dim, out)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out))
