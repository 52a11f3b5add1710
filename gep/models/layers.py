"""Transformer parts of the backbone: RMSNorm, SwiGLU, rotary position over (row, column, time), attention."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Division by the root mean square of the last dimension, computed in float32, with a learned gain.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) of any float dtype -> the same shape and dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class SwiGLU(nn.Module):
    """Gated feed-forward layer, down(silu(gate(x)) * up(x)).

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Rotary:
    """Rotary position whose angles come from a token's row, its column and the real time of its frame.

    A head's channel pairs are shared out among the three axes. Row and column turn by geometric
    frequencies from 1 rad a token down; time turns by frequencies from 1 rad per `min_us` to 1 rad per
    `max_us`. Attention then sees only differences, so that neither an absolute clock nor the start of a
    recording matters.

    Args:
        head_dim: channels of one attention head, even and >= 6.
        min_us, max_us: shortest and longest time scale told apart [us].
        base: ratio of the largest to the smallest spatial frequency.
    Source: Su et al. 2021, "RoFormer"; the split over axes follows common practice in vision and video.
    """

    def __init__(
        self, head_dim: int, min_us: float = 1_000.0, max_us: float = 10_000_000.0, base: float = 100.0
    ) -> None:
        if head_dim % 2 or head_dim < 6:
            raise ValueError(
                f"width / heads = {head_dim} cannot be split over row, column and time: it must be even and >= 6"
            )
        if not 0 < min_us < max_us:
            raise ValueError(f"time scales min_us = {min_us}, max_us = {max_us}: 0 < min_us < max_us is needed")
        self.num_space = head_dim // 6
        self.num_time = head_dim // 2 - 2 * self.num_space
        self.min_us, self.max_us, self.base = min_us, max_us, base

    def angles(self, grid: tuple[int, int], elapsed_us: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for every token of a sequence of frames.

        Args:
            grid: (h, w) tokens of one frame, raster order.
            elapsed_us: (B, F) int64, time since a per-sample origin [us]; the caller subtracts in int64.
        Returns:
            cos, sin: (B, 1, F * h * w, head_dim / 2) float32, computed in float64.
        """
        device, (batch, frames), (h, w) = elapsed_us.device, elapsed_us.shape, grid
        # Computed where they are used: a float64 buffer would not survive module.to(bfloat16).
        ramp = torch.arange(self.num_space, dtype=torch.float64, device=device) / self.num_space
        spatial = self.base**-ramp
        ramp = torch.linspace(0, 1, self.num_time, dtype=torch.float64, device=device)
        temporal = (self.min_us / self.max_us) ** ramp / self.min_us
        row = torch.arange(h, dtype=torch.float64, device=device)[:, None] * spatial
        col = torch.arange(w, dtype=torch.float64, device=device)[:, None] * spatial
        time = elapsed_us.double()[..., None] * temporal
        shape = (batch, frames, h, w, -1)
        angle = torch.cat(
            [
                row[None, None, :, None].expand(shape),
                col[None, None, None].expand(shape),
                time[:, :, None, None].expand(shape),
            ],
            dim=-1,
        ).reshape(batch, 1, frames * h * w, -1)
        return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each channel pair (i, i + d/2) of `x` by its angle.

    Args:
        x: (B, heads, L, d) float.
        cos, sin: (B or 1, 1, L, d / 2) float32.
    Returns:
        (B, heads, L, d) float32.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Sight(NamedTuple):
    """Which tokens each token attends to; all of them unless one of the three says less."""

    mask: Tensor | None = None
    """bool, broadcast to (B, heads, L, S + L), True = may be attended to."""
    is_causal: bool = False
    """Token i sees tokens <= i; only without earlier keys."""
    frame: int = 0
    """Tokens of a frame, which sees itself and all frames before it; only without earlier keys. 0 = no frames."""


EVERYTHING = Sight()
"""No limit."""


def attend(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """Scaled dot-product attention of (B, heads, L, d) queries.

    Frames are attended to one call a frame, over keys of its exact length: no mask is made, and what lies ahead costs
    nothing (ViT-S tokens, 8 frames on a CPU: 0.6 x the time under a mask).
    """
    if not sight.frame:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask, is_causal=sight.is_causal)
    slices = [
        _attend(q[:, :, end - sight.frame : end], k[:, :, :end], v[:, :, :end])
        for end in range(sight.frame, q.shape[2] + 1, sight.frame)
    ]
    return torch.cat(slices, dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if use_fused_attn():
        return F.scaled_dot_product_attention(q, k, v)
    # As timm's encoders then do: see gep.cpu.
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys, rotary position and an optional
    key/value cache.

    Source: Henry et al. 2020, "Query-Key Normalization for Transformers".
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width = {dim} is not a multiple of heads = {heads}: change one of them")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = RMSNorm(dim // heads)
        self.k_norm = RMSNorm(dim // heads)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        sight: Sight = EVERYTHING,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attend from the L given tokens to the S cached ones and to themselves.

        Args:
            x: (B, L, dim).
            cos, sin: (B or 1, 1, L, head_dim / 2) of the given tokens.
            sight: what they see.
            past: keys and values (B, heads, S, head_dim) of earlier tokens, already rotated.
        Returns:
            (B, L, dim), and the keys and values of all S + L tokens.
        """
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype)
        if past is not None:
            assert not sight.is_causal and not sight.frame, "a cache needs an explicit mask"
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = attend(q, k, v, sight)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1)), (k, v)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim)
        self.attention = Attention(dim, heads)
        self.feed_forward_norm = RMSNorm(dim)
        self.feed_forward = SwiGLU(dim, hidden)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        sight: Sight = EVERYTHING,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As Attention.forward."""
        y, kept = self.attention(self.attention_norm(x), cos, sin, sight, past)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), kept
