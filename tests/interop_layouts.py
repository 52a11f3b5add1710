"""Foreign layouts with random weights, and a forward of each written from its paper, in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Random tensors: gains about 1, everything else about 0 with a spread that no layer may get wrong unnoticed."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        gain = ("norm" in name and name.endswith("weight")) or ("ln_" in name and name.endswith("weight"))
        spread = 0.05 if len(shape) > 1 else 0.1
        state[name] = torch.randn(shape, generator=g) * spread + float(gain) + 0.3 * float("gamma" in name)
    return state


def _linear(name: str, into: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def dinov2_state(
    *, width=384, depth=12, registers=0, chans=3, side=5, patch=14, gated=0, chunk=False, prefix="", seed=0
) -> State:
    """facebookresearch/dinov2's names; `gated` = hidden width of a SwiGLU in place of the MLP."""
    s: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side**2, width)}
    s |= {"mask_token": (1, width), "register_tokens": (1, registers, width)}
    s |= {"patch_embed.proj.weight": (width, chans, patch, patch), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        b = f"blocks.0.{i}" if chunk else f"blocks.{i}"
        s |= _norm(f"{b}.norm1", width) | _linear(f"{b}.attn.qkv", width, 3 * width)
        s |= _linear(f"{b}.attn.proj", width, width) | {f"{b}.ls1.gamma": (width,), f"{b}.ls2.gamma": (width,)}
        s |= _norm(f"{b}.norm2", width)
        if gated:
            s |= _linear(f"{b}.mlp.w12", width, 2 * gated) | _linear(f"{b}.mlp.w3", gated, width)
        else:
            s |= _linear(f"{b}.mlp.fc1", width, 4 * width) | _linear(f"{b}.mlp.fc2", 4 * width, width)
    s |= _norm("norm", width)
    if not registers:
        del s["register_tokens"]
    return {prefix + name: value for name, value in draw(s, seed).items()}


def dinov3_state(*, width=384, depth=12, chans=3, gated=0, bias=False, seed=0) -> State:
    """facebookresearch/dinov3's names, with the key's bias masked and the periods of base 100."""
    s: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "storage_tokens": (1, 4, width)}
    s |= {"mask_token": (1, width), "patch_embed.proj.weight": (width, chans, 16, 16)}
    s |= {"patch_embed.proj.bias": (width,)}
    for i in range(depth):
        b = f"blocks.{i}"
        s |= _norm(f"{b}.norm1", width) | _linear(f"{b}.attn.qkv", width, 3 * width)
        s |= _linear(f"{b}.attn.proj", width, width) | {f"{b}.ls1.gamma": (width,), f"{b}.ls2.gamma": (width,)}
        s |= _norm(f"{b}.norm2", width)
        if gated:
            for name in ("w1", "w2"):
                s |= _linear(f"{b}.mlp.{name}", width, gated)
            s |= _linear(f"{b}.mlp.w3", gated, width)
        else:
            s |= _linear(f"{b}.mlp.fc1", width, 4 * width) | _linear(f"{b}.mlp.fc2", 4 * width, width)
    state = draw(s | _norm("norm", width), seed)
    for i in range(depth):
        name = f"blocks.{i}.attn.qkv.bias"
        state[f"{name}_mask"] = torch.cat([torch.full((width,), v) for v in (float(bias), 0.0, float(bias))])
    state["rope_embed.periods"] = 100.0 ** (torch.arange(16) / 16)
    return state


def clip_state(*, width=256, depth=10, patch=16, side=4, joint=32, text=True, prefix="visual.", seed=0) -> State:
    """open_clip's names of an image ViT, and a stub of its text tower."""
    s: dict[str, tuple[int, ...]] = {"class_embedding": (width,), "positional_embedding": (1 + side**2, width)}
    s |= {"proj": (width, joint), "conv1.weight": (width, 3, patch, patch)}
    s |= _norm("ln_pre", width) | _norm("ln_post", width)
    for i in range(depth):
        b = f"transformer.resblocks.{i}"
        s |= _norm(f"{b}.ln_1", width) | _norm(f"{b}.ln_2", width) | _linear(f"{b}.attn.out_proj", width, width)
        s |= {f"{b}.attn.in_proj_weight": (3 * width, width), f"{b}.attn.in_proj_bias": (3 * width,)}
        s |= _linear(f"{b}.mlp.c_fc", width, 4 * width) | _linear(f"{b}.mlp.c_proj", 4 * width, width)
    state = {prefix + name: value for name, value in draw(s, seed).items()}
    if text:
        state |= draw({"positional_embedding": (77, 8), "token_embedding.weight": (50, 8), "logit_scale": ()}, seed + 1)
        state |= draw({"transformer.resblocks.0.ln_1.weight": (8,), "text_projection": (8, joint)}, seed + 2)
        state |= draw({"ln_final.weight": (8,), "ln_final.bias": (8,)}, seed + 3)
    return state


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, d) softmax attention -> (B, N, H d)."""
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _heads(x: Tensor, dim: int = 64) -> Tensor:
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def _norm_of(s: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def _linear_of(s: State, name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def _patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Patches cut out by hand and multiplied with the kernel: (B, h w, D)."""
    p = weight.shape[-1]
    b, c, height, width = x.shape
    cut = x.reshape(b, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    out = cut @ weight.flatten(1).T
    return out if bias is None else out + bias


def dinov2_forward(state: State, x: Tensor, *, head_dim: int = 64) -> Tensor:
    """(B, 1 + N, D) class and patch tokens after the norm of facebookresearch/dinov2's ViT."""
    s = {name: value.double() for name, value in state.items()}
    x = x.double()
    h, w = x.shape[-2] // s["patch_embed.proj.weight"].shape[-1], x.shape[-1] // s["patch_embed.proj.weight"].shape[-1]
    registers = "register_tokens" in s
    side = math.isqrt(s["pos_embed"].shape[1] - 1)
    cls, grid = s["pos_embed"][:, :1], s["pos_embed"][:, 1:]
    if (h, w) != (side, side):
        image = grid.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if registers:
            image = F.interpolate(image, size=(h, w), mode="bicubic", antialias=True)
        else:
            image = F.interpolate(image, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        grid = image.permute(0, 2, 3, 1).reshape(1, h * w, -1).double()
    tokens = _patches(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"])
    tokens = torch.cat([s["cls_token"].expand(len(x), -1, -1), tokens], 1) + torch.cat([cls, grid], 1)
    if registers:
        tokens = torch.cat([tokens[:, :1], s["register_tokens"].expand(len(x), -1, -1), tokens[:, 1:]], 1)
    depth = sum(name.endswith("ls1.gamma") for name in s)
    for i in range(depth):
        b = f"blocks.{i}" if f"blocks.{i}.norm1.weight" in s else f"blocks.0.{i}"
        q, k, v = _linear_of(s, f"{b}.attn.qkv", _norm_of(s, f"{b}.norm1", tokens, 1e-6)).chunk(3, -1)
        out = _linear_of(s, f"{b}.attn.proj", _attend(*(_heads(y, head_dim) for y in (q, k, v))))
        tokens = tokens + s[f"{b}.ls1.gamma"] * out
        y = _norm_of(s, f"{b}.norm2", tokens, 1e-6)
        if f"{b}.mlp.w12.weight" in s:
            gate, value = _linear_of(s, f"{b}.mlp.w12", y).chunk(2, -1)
            out = _linear_of(s, f"{b}.mlp.w3", F.silu(gate) * value)
        else:
            out = _linear_of(s, f"{b}.mlp.fc2", F.gelu(_linear_of(s, f"{b}.mlp.fc1", y)))
        tokens = tokens + s[f"{b}.ls2.gamma"] * out
    tokens = _norm_of(s, "norm", tokens, 1e-6)
    skip = s["register_tokens"].shape[1] if registers else 0
    return torch.cat([tokens[:, :1], tokens[:, 1 + skip :]], 1)


def dinov3_forward(state: State, x: Tensor) -> Tensor:
    """(B, 1 + N, D) class and patch tokens after the norm of facebookresearch/dinov3's ViT."""
    s = {name: value.double() for name, value in state.items()}
    x = x.double()
    h, w = x.shape[-2] // 16, x.shape[-1] // 16
    tokens = _patches(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"])
    first = torch.cat([s["cls_token"], s["storage_tokens"]], 1).expand(len(x), -1, -1)
    tokens = torch.cat([first, tokens], 1)
    # Centres of the patches in [-1, 1], an angle a period for the row and one for the column, halves rotated.
    rows = (torch.arange(h).double() + 0.5) / h * 2 - 1
    columns = (torch.arange(w).double() + 0.5) / w * 2 - 1
    at = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    angles = (2 * math.pi * at[:, :, None] / s["rope_embed.periods"]).flatten(1).repeat(1, 2)

    def turn(y: Tensor) -> Tensor:
        patch = y[:, :, 5:]
        one, two = patch.chunk(2, -1)
        turned = patch * angles.cos() + torch.cat([-two, one], -1) * angles.sin()
        return torch.cat([y[:, :, :5], turned], 2)

    for i in range(sum(name.endswith("ls1.gamma") for name in s)):
        b = f"blocks.{i}"
        qkv = _norm_of(s, f"{b}.norm1", tokens, 1e-5) @ s[f"{b}.attn.qkv.weight"].T
        qkv = qkv + s[f"{b}.attn.qkv.bias"] * s[f"{b}.attn.qkv.bias_mask"]
        q, k, v = (_heads(y) for y in qkv.chunk(3, -1))
        tokens = tokens + s[f"{b}.ls1.gamma"] * _linear_of(s, f"{b}.attn.proj", _attend(turn(q), turn(k), v))
        y = _norm_of(s, f"{b}.norm2", tokens, 1e-5)
        if f"{b}.mlp.w1.weight" in s:
            y = F.silu(_linear_of(s, f"{b}.mlp.w1", y)) * _linear_of(s, f"{b}.mlp.w2", y)
            out = _linear_of(s, f"{b}.mlp.w3", y)
        else:
            out = _linear_of(s, f"{b}.mlp.fc2", F.gelu(_linear_of(s, f"{b}.mlp.fc1", y)))
        tokens = tokens + s[f"{b}.ls2.gamma"] * out
    tokens = _norm_of(s, "norm", tokens, 1e-5)
    return torch.cat([tokens[:, :1], tokens[:, 5:]], 1)


def clip_forward(state: State, x: Tensor, *, quick: bool = False, prefix: str = "visual.") -> Tensor:
    """(B, 1 + N, D) tokens after ln_post of open_clip's image ViT at its own size."""
    s = {name.removeprefix(prefix): value.double() for name, value in state.items() if name.startswith(prefix)}
    tokens = _patches(x.double(), s["conv1.weight"], None)
    cls = s["class_embedding"].expand(len(x), 1, -1)
    tokens = _norm_of(s, "ln_pre", torch.cat([cls, tokens], 1) + s["positional_embedding"], 1e-5)
    for i in range(sum(name.endswith("attn.in_proj_bias") for name in s)):
        b = f"transformer.resblocks.{i}"
        y = _norm_of(s, f"{b}.ln_1", tokens, 1e-5)
        q, k, v = (y @ s[f"{b}.attn.in_proj_weight"].T + s[f"{b}.attn.in_proj_bias"]).chunk(3, -1)
        tokens = tokens + _linear_of(s, f"{b}.attn.out_proj", _attend(_heads(q), _heads(k), _heads(v)))
        y = _linear_of(s, f"{b}.mlp.c_fc", _norm_of(s, f"{b}.ln_2", tokens, 1e-5))
        y = y * torch.sigmoid(1.702 * y) if quick else F.gelu(y)
        tokens = tokens + _linear_of(s, f"{b}.mlp.c_proj", y)
    return _norm_of(s, "ln_post", tokens, 1e-5)
