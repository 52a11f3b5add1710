"""The layout of facebookresearch/dinov3's ViTs: rotary positions, storage tokens, masked key biases."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from gep.interop.names import PATCH, grid_of, shapes
from gep.interop.table import Conversion

_SIZES = {
    (192, 12, False): "tiny",
    (384, 12, False): "small",
    (384, 12, True): "small_plus",
    (768, 12, False): "base",
    (1024, 24, False): "large",
    (1280, 32, True): "huge_plus",
    (4096, 40, True): "7b",
}
_ONLY_BIASED, _NEVER_BIASED = ("tiny",), ("7b",)
_HEAD_DIM = {"tiny": 64, "7b": 128}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_PARTS = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.w1", "mlp.w2", "mlp.w3")
_KNOWN = {f"{part}.{kind}" for part in _PARTS for kind in ("weight", "bias")} | {"ls1.gamma", "ls2.gamma"}
_KNOWN.add("attn.qkv.weight")
_RENAMED = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"} | {
    f"mlp.{old}.{kind}": f"mlp.{new}.{kind}"
    for old, new in (("w1", "fc1_g"), ("w2", "fc1_x"), ("w3", "fc2"))
    for kind in ("weight", "bias")
}
ROPE_BASE = 100.0
SIZE = (224, 224)
"""Input of the released models [px]; their positions fit any other."""


def convert(weights: Conversion, size: tuple[int, int] | None) -> tuple[str, tuple[int, int], bool]:
    """Rename a DINOv3 ViT to timm's names.

    Args:
        weights: tensors by DINOv3's names; consumed.
        size: (H, W) [px] of the input; None = 224x224.
    Returns:
        timm's name of the architecture, the size, and whether the file's rotary periods are rounded to bfloat16.
    Raises:
        ValueError: no released size, other rotary periods than of base 100, or a bias on keys.
    Source: Siméoni et al. 2025 (arXiv 2508.10104); names as in facebookresearch/dinov3.
    """
    state = weights.rest
    width, depth, patch, _ = shapes(state)
    gated = "blocks.0.mlp.w1.weight" in state
    registers = state["storage_tokens"].shape[1] if "storage_tokens" in state else 0
    if (width, depth, gated) not in _SIZES or patch != 16 or registers != 4:
        known = ", ".join(f"{name} ({w} wide, {d} blocks)" for (w, d, _), name in _SIZES.items())
        raise ValueError(
            f"the file's ViT is {width} wide with {depth} blocks, patch {patch}, {registers} storage tokens and "
            f"{'gated' if gated else 'plain'} MLPs; known are {known}, with patch 16 and 4 storage tokens"
        )
    name = _SIZES[width, depth, gated]
    grid_of(size or SIZE, patch)
    biases = {int(match.group(1)): _bias(state, int(match.group(1))) for match in _biases(state)}
    biased = name in _ONLY_BIASED or any(bool(bias.any()) for bias in biases.values())
    if biased and name in _NEVER_BIASED:
        raise ValueError(f"the file's qkv.bias is not zero, and timm's ViT of this size ({name}) has none")
    for number, bias in biases.items():
        _move_bias(weights, number, bias, biased)
    rounded = "rope_embed.periods" in state and _rounded_periods(weights, _HEAD_DIM.get(name, 64))
    for source, target in (("cls_token", "cls_token"), ("storage_tokens", "reg_token"), (PATCH, PATCH)):
        if source in state:
            weights.move(source, target)
    for source in ("patch_embed.proj.bias", "norm.weight", "norm.bias"):
        if source in state:
            weights.move(source, source)
    for source in list(state):
        match = _BLOCK.fullmatch(source)
        if match and match.group(2) in _KNOWN:
            weights.move(source, f"blocks.{match.group(1)}.{_RENAMED.get(match.group(2), match.group(2))}")
    if "mask_token" in state:
        weights.ignore("mask_token", "pretraining only")
    weights.ignore_under(("local_cls_norm.", "dino_head.", "ibot_head."), "pretraining only")
    return f"vit_{name}_patch16_dinov3{'_qkvb' if biased else ''}", size or SIZE, rounded


def _biases(state: dict[str, Tensor]) -> list[re.Match[str]]:
    return [match for name in state if (match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.bias", name))]


def _bias(state: dict[str, Tensor], number: int) -> Tensor:
    """(3 D,) what the attention adds: the bias times its mask, where there is one."""
    bias = state[f"blocks.{number}.attn.qkv.bias"].float()
    mask = state.get(f"blocks.{number}.attn.qkv.bias_mask")
    bias = bias if mask is None else bias * mask.float()
    if not bool(bias.isfinite().all()):
        raise ValueError(f"blocks.{number}.attn.qkv.bias times its bias_mask is not finite: the file is damaged")
    if bool(bias.chunk(3)[1].any()):
        # A key's bias is turned with the key, so it does not cancel in the softmax; timm's ViT has none.
        raise ValueError(f"blocks.{number}.attn.qkv.bias is not zero on the keys, which no released model has")
    return bias


def _move_bias(weights: Conversion, number: int, bias: Tensor, biased: bool) -> None:
    name = f"blocks.{number}.attn.qkv.bias"
    if biased:
        query, _, value = bias.chunk(3)
        weights.tensors[f"blocks.{number}.attn.q_bias"] = query.clone()
        weights.tensors[f"blocks.{number}.attn.v_bias"] = value.clone()
        weights.move(name, "", how="split into q_bias and v_bias; zero on the keys")
    else:
        weights.ignore(name, "zero")
    if f"{name}_mask" in weights.rest:
        weights.ignore(f"{name}_mask", "multiplied into the bias")


def _rounded_periods(weights: Conversion, head_dim: int) -> bool:
    """Whether the periods are those of base 100 rounded to bfloat16, and not themselves."""
    periods = weights.rest["rope_embed.periods"].float()
    exponents = 2 * torch.arange(head_dim // 4) / (head_dim // 2)
    exact = ROPE_BASE**exponents
    for rounded, expected in ((False, exact), (True, exact.bfloat16().float())):
        if periods.shape == expected.shape and bool(((periods / expected - 1).abs() < 1e-5).all()):
            how = "rounded to bfloat16" if rounded else "in float32"
            weights.ignore("rope_embed.periods", f"computed from base {ROPE_BASE:g}, {how}")
            return rounded
    raise ValueError(
        f"rope_embed.periods are not those of base {ROPE_BASE:g} and heads of {head_dim}, in float32 or bfloat16 (a "
        f"checkpoint saved in float16 has lost them: take the release's own): {periods.tolist()[:4]} …"
    )
