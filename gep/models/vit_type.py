"""What this package reads of a timm ViT: timm's VisionTransformer and Eva share no class that names these parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor, nn


class ViT(nn.Module):
    """A ViT by the parts that all of them have. For annotations alone: models are cast to it, none is made of it."""

    patch_embed: PatchEmbed
    """Or a stem that offers the same, such as `ConvStem`."""
    blocks: nn.Sequential
    norm: nn.Module
    fc_norm: nn.Module
    norm_pre: nn.Module
    attn_pool: nn.Module | None
    embed_dim: int
    num_prefix_tokens: int
    grad_checkpointing: bool
    pretrained_cfg: dict[str, Any]
    forward_features: Callable[[Tensor], Tensor]
    forward_intermediates: Callable[..., list[Tensor]]
    no_weight_decay: Callable[[], Iterable[str]]
    set_grad_checkpointing: Callable[[bool], None]
    _pos_embed: Callable[[Tensor], Tensor | tuple[Tensor, Tensor | None]]
