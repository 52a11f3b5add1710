"""What the counts need to know of a model: its layers' sizes, read off a module built without memory (meta device)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from gep.models.backbone import Backbone
from gep.models.encoder import EventEncoder
from gep.models.layers import Block
from gep.models.sparse import ACTIVE
from gep.models.teacher import FrozenVFM
from gep.models.vit_type import ViT

ACTIVE_SHARE = 0.5
"""Assumed share of a window's patches that hold events, for an encoder that reads those alone."""


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution of the stem at one input size."""

    macs: int
    """Multiply-accumulates an image."""
    out_elements: int
    """Elements of its output an image."""
    normed: bool
    """Whether a norm and an activation follow (a stem of several convolutions)."""


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """A pre-norm transformer block."""

    width: int
    """Features of a token on the residual stream."""
    attention: int
    """Features of all heads together."""
    heads: int
    """Attention heads."""
    weights: int
    """Entries of all its matrices: multiply-accumulates a token."""
    hidden: int
    """Features inside the feed-forward part, after the gate where there is one."""
    gated: bool = False
    """Whether the feed-forward part has a gate (SwiGLU)."""
    scaled: bool = False
    """Whether each branch has a learned gain a feature (LayerScale)."""
    rotary: bool = False
    """Whether queries and keys are turned by their position."""
    rms: bool = False
    """Whether the norms, those of queries and keys too, are this project's RMSNorm."""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A ViT, or the backbone: everything that runs on tokens."""

    name: str
    """For the tables."""
    convs: tuple[Conv, ...]
    """The stem, in order."""
    in_elements: int
    """Elements of an input image."""
    blocks: tuple[BlockShape, ...]
    """In order."""
    length: int
    """Tokens of an image, prefix included."""
    patches: int
    """Tokens of an image without class and register tokens."""
    width: int
    """Features D of a token."""
    pooled: int
    """Features P of the pooled vector that is compared with the other side's."""
    head_weights: int
    """Entries of the matrices that run once an image, on the pooled token."""
    parameters: int
    """All parameters."""
    unused: int = 0
    """Parameters that no forward pass of pretraining reads (a text tower)."""


def encoder_tower(encoder: EventEncoder, height: int, width: int) -> Tower:
    """The event encoder at an input size."""
    head = 0 if encoder.head is None else _matrices(encoder.head)
    pooled = encoder.config["head_dim"] or encoder.embed_dim
    return _vit(encoder.vit, "encoder", encoder, height, width, pooled=pooled, head=head)


def kept_tower(tower: Tower, keep: float | str) -> Tower:
    """The tower over the most active patches alone; one that embeds patches one by one embeds no others."""
    share = ACTIVE_SHARE if keep == ACTIVE else float(keep)
    count = math.ceil(share * tower.patches - 1e-9)
    if count == tower.patches:
        return tower
    length = tower.length - tower.patches + count
    if len(tower.convs) > 1:
        return dataclasses.replace(tower, length=length)
    conv = dataclasses.replace(tower.convs[0], macs=tower.convs[0].macs * count // tower.patches)
    return dataclasses.replace(tower, length=length, convs=(conv,))


def teacher_tower(spec: str, height: int, width: int, *, fallback: EventEncoder | None = None) -> Tower:
    """The frozen image model of a spec at an image size, without its weights.

    Args:
        spec: as FrozenVFM.from_spec takes it.
        height, width: of the images it sees.
        fallback: of an export whose folder is not there (yet): a stand-in of this encoder's architecture.
    Raises:
        ValueError: unknown name, or images that its patches do not fit.
        FileNotFoundError: an export that is not there, without a fallback.
    """
    kind, _, name = spec.partition(":")
    if kind == "open_clip":
        return _open_clip(spec, name.partition("/")[0], height, width)
    if kind == "export" and fallback is not None and not Path(name).is_dir():
        return _vit(fallback.vit, "teacher", fallback.vit, height, width, pooled=fallback.embed_dim)
    if kind == "export":
        model = FrozenVFM.from_spec(spec, pretrained=False)
    else:
        with torch.device("meta"):
            model = FrozenVFM.from_spec(spec, pretrained=False, device="meta")
    model.grid(height, width)
    assert model.visual is not None  # open_clip has its own way
    return _vit(model.visual, "teacher", model.visual, height, width, pooled=model.pooled_dim)


def backbone_tower(backbone: Backbone, tokens: int) -> Tower:
    """The transformer of stage 2 over sequences of `tokens` tokens; its projections are counted in `count`."""
    return Tower(
        name="backbone",
        convs=(),
        in_elements=0,
        blocks=tuple(_own_block(block) for block in backbone.modules() if isinstance(block, Block)),
        length=tokens,
        patches=tokens,
        width=backbone.width,
        pooled=0,
        head_weights=0,
        parameters=_size(backbone),
    )


def meta_encoder(keywords: dict[str, Any]) -> EventEncoder:
    """An EventEncoder that holds no weights."""
    with torch.device("meta"):
        return EventEncoder(**keywords)


def _vit(vit: ViT, name: str, whole: nn.Module, height: int, width: int, *, pooled: int, head: int = 0) -> Tower:
    convs = tuple(_convs(vit.patch_embed, height, width))
    rows, columns = vit.patch_embed.patch_size
    if height % rows or width % columns:
        raise ValueError(f"{name}: {height}x{width} is not a multiple of its {rows}x{columns} patch")
    patches = (height // rows) * (width // columns)
    blocks = tuple(_block(block, vit.embed_dim) for block in vit.blocks)
    return Tower(
        name=name,
        convs=convs,
        in_elements=_first_conv(vit.patch_embed).in_channels * height * width,
        blocks=blocks,
        length=vit.num_prefix_tokens + patches,
        patches=patches,
        width=vit.embed_dim,
        pooled=pooled,
        head_weights=head,
        parameters=_size(whole),
    )


def _open_clip(spec: str, arch: str, height: int, width: int) -> Tower:
    if arch not in open_clip.list_models():
        raise ValueError(f"{spec}: open_clip has no architecture {arch!r}; see open_clip.list_models()")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that no weights were loaded
    try:
        with torch.device("meta"):
            model = open_clip.create_model(
                arch, pretrained=None, pretrained_text=False, device="meta", force_image_size=(height, width)
            )
    finally:
        logging.disable(before)
    tower, whole = model.visual, _size(model)
    if hasattr(tower, "trunk") and hasattr(tower.trunk, "num_prefix_tokens"):
        shape = _vit(tower.trunk, "teacher", model, height, width, pooled=0)
        head = _matrices(tower.head)
        return _replace(shape, pooled=model_width(arch), head=head, unused=whole - _size(tower))
    if not hasattr(tower, "transformer") or not hasattr(tower, "conv1"):
        raise ValueError(f"{spec} has no ViT image tower: choose a ViT-* architecture")
    rows, columns = tower.patch_size
    patches = (height // rows) * (width // columns)
    features = tower.conv1.out_channels
    return Tower(
        name="teacher",
        convs=tuple(_convs(tower.conv1, height, width)),
        in_elements=3 * height * width,
        blocks=tuple(_block(block, features) for block in tower.transformer.resblocks),
        length=1 + patches,
        patches=patches,
        width=features,
        pooled=model_width(arch),
        head_weights=0 if tower.proj is None else tower.proj.numel(),
        parameters=whole,
        unused=whole - _size(tower),
    )


def model_width(arch: str) -> int:
    """Features of open_clip's joint space."""
    return open_clip.get_model_config(arch)["embed_dim"]


def _replace(tower: Tower, *, pooled: int, head: int, unused: int) -> Tower:
    values = {name: getattr(tower, name) for name in tower.__dataclass_fields__}
    return Tower(**{**values, "pooled": pooled, "head_weights": head, "unused": unused})


def _convs(stem: nn.Module, height: int, width: int) -> Iterator[Conv]:
    found = [module for module in stem.modules() if isinstance(module, nn.Conv2d)]
    for conv in found:
        height, width = (
            (size + 2 * int(conv.padding[axis]) - conv.kernel_size[axis]) // conv.stride[axis] + 1
            for axis, size in enumerate((height, width))
        )
        outputs = conv.out_channels * height * width
        macs = outputs * conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
        yield Conv(macs=macs, out_elements=outputs, normed=conv is not found[-1])


def _first_conv(stem: nn.Module) -> nn.Conv2d:
    return next(module for module in stem.modules() if isinstance(module, nn.Conv2d))


def _block(block: nn.Module, width: int) -> BlockShape:
    """A block of timm's ViT or EVA, or of open_clip's own tower."""
    if not hasattr(block, "attn") or not hasattr(block, "mlp"):
        return _parallel_block(block, width)
    attention: Any = block.attn
    heads: int = attention.num_heads
    inner = getattr(attention, "attn_dim", None) or getattr(attention, "head_dim", width // heads) * heads
    mlp = [m for m in block.get_submodule("mlp").modules() if isinstance(m, nn.Linear)]
    hidden = mlp[-1].in_features
    return BlockShape(
        width=width,
        attention=inner,
        heads=heads,
        weights=_matrices(block),
        hidden=hidden,
        gated=sum(m.out_features for m in mlp[:-1]) == 2 * hidden,
        scaled=_has_scale(block),
        rotary=type(block).__name__.startswith("Eva"),
    )


def _parallel_block(block: nn.Module, width: int) -> BlockShape:
    """Any other block: products exactly, attention as full width a branch; what autograd keeps is then a guess."""
    branches: list[Any] = [module for module in block.modules() if hasattr(module, "num_heads")]
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return BlockShape(
        width=width,
        attention=width * len(branches),
        heads=sum(int(module.num_heads) for module in branches),
        weights=_matrices(block),
        hidden=max(module.in_features for module in linears),
        scaled=_has_scale(block),
    )


def _own_block(block: Block) -> BlockShape:
    width, hidden = block.attention.out.out_features, block.feed_forward.down.in_features
    return BlockShape(
        width=width,
        attention=block.attention.out.in_features,
        heads=block.attention.heads,
        weights=_matrices(block),
        hidden=hidden,
        gated=True,
        rotary=True,
        rms=True,
    )


def _has_scale(block: nn.Module) -> bool:
    names = {name.rsplit(".", 1)[-1] for name, _ in block.named_parameters()}
    return bool(names & {"gamma", "gamma_1", "gamma_2"})


def _matrices(module: nn.Module) -> int:
    """Entries of its linear maps, those inside torch's MultiheadAttention included."""
    count = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
    packed = (m.in_proj_weight for m in module.modules() if isinstance(m, nn.MultiheadAttention))
    return count + sum(weight.numel() for weight in packed if weight is not None)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
