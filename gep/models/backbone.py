"""Decoder-only transformer over frames of tokens: what stage 2 trains, and what streams over a recording."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gep.models.layers import Block, RMSNorm, Rotary, Sight

EVENT, IMAGE = 0, 1
"""Indices of the two modalities."""
SLICED = 64
"""Frames of so many tokens attend slice by slice; smaller ones under a mask, as calls then cost more than they save."""


class BackboneOutput(NamedTuple):
    """What the backbone says of every token; N tokens a frame in raster order."""

    hidden: Tensor
    """(B, F, N, width) after the final norm."""
    next: Tensor
    """(B, F, N, token_dim) prediction of token n of the next frame, or of the next token, as `order` says."""
    image: Tensor
    """(B, F, N, token_dim) prediction of the paired image's token at the same position."""


class NextTargets(NamedTuple):
    """What `BackboneOutput.next` is to be compared with."""

    tokens: Tensor
    """(B, F, N, token_dim); zeros where there is no next token."""
    mask: Tensor
    """(B, F, N) bool, True where the token and its successor both exist and are valid."""
    modality: Tensor | None
    """(B, F) int64 modality of the next frame (the last frame's: its own), to pass as `next_modality`."""


@dataclass
class KVCache:
    """Keys, values and validity of the frames seen so far; `Backbone.forward` appends to it in place."""

    span: int | None = None
    """A frame sees at most this many frames, itself included, and no more are kept; None = the backbone's span.
    Outputs are those of a whole sequence run by a backbone of the smaller of the two spans."""
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Per block: keys and values (B, heads, frames * N, head_dim), rotated."""
    valid: Tensor | None = None
    """(B, frames) bool."""
    origin_us: Tensor | None = None
    """(B,) int64 time that the rotary angles count from [us]."""
    padded: bool = False
    """Whether a frame of it may be invalid, known without asking the device."""

    @property
    def num_frames(self) -> int:
        """Frames held, at most one less than the smaller span."""
        return 0 if self.valid is None else self.valid.shape[1]


class Backbone(nn.Module):
    """Causal transformer over frames of event and image tokens.

    Tokens are layer-normed (no gain), projected, given a modality embedding, run through pre-norm blocks
    (RMSNorm, QK-norm, SwiGLU, rotary row/column/time) and read by two linear heads. The `next` head has
    one linear map a
    modality, chosen by the modality of the frame to be predicted: what comes next is known from the
    schedule of the sequence, not from its content, so that `hidden` stays independent of it.

    Args:
        token_dim: channels D of the tokens, the encoder's and the teacher's.
        width, depth, heads: size of the transformer.
        order: "frame": full attention inside a frame, causal across frames; "token": raster order,
            strictly causal.
        modalities: number of kinds of frames.
        mlp_ratio: feed-forward width over `width`, before the gate's 2/3.
        span: a frame sees at most this many frames, itself included; None = all.
        min_us, max_us: time scales of the rotary embedding [us].
    Source: GEP, arXiv 2603.23032 (interleaved sequence, regression of the next continuous token).
    """

    def __init__(
        self,
        token_dim: int,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        order: Literal["frame", "token"] = "frame",
        modalities: int = 2,
        mlp_ratio: float = 4.0,
        span: int | None = None,
        min_us: float = 1_000.0,
        max_us: float = 10_000_000.0,
    ) -> None:
        super().__init__()
        if order not in ("frame", "token"):
            raise ValueError(f"order = {order!r}: choose one of 'frame', 'token'")
        if span is not None and span < 1:
            raise ValueError(f"span = {span}: give a number of frames >= 1, or null for all")
        self.config: dict[str, Any] = {
            "token_dim": token_dim,
            "width": width,
            "depth": depth,
            "heads": heads,
            "order": order,
            "modalities": modalities,
            "mlp_ratio": mlp_ratio,
            "span": span,
            "min_us": min_us,
            "max_us": max_us,
        }
        self.token_dim, self.width, self.num_layers = token_dim, width, depth
        self.order, self.modalities, self.span = order, modalities, span
        self.grad_checkpointing = False
        self.rotary = Rotary(width // heads, min_us, max_us)
        self.in_proj = nn.Linear(token_dim, width)
        self.modality = nn.Embedding(modalities, width)
        hidden = round(mlp_ratio * width * 2 / 3 / 8) * 8
        self.blocks = nn.ModuleList([Block(width, heads, hidden) for _ in range(depth)])
        self.norm = RMSNorm(width)
        self.next_head = nn.Linear(width, modalities * token_dim)
        self.image_head = nn.Linear(width, token_dim)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Layer-normed tokens have unit variance: keep it, or the modality embedding and the norms drown them.
        nn.init.normal_(self.in_proj.weight, std=self.token_dim**-0.5)
        for block in (module for module in self.modules() if isinstance(module, Block)):
            for out in (block.attention.out, block.feed_forward.down):
                nn.init.trunc_normal_(out.weight, std=0.02 * (2 * len(self.blocks)) ** -0.5)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay besides the one-dimensional ones."""
        return {"modality.weight"}

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer decay: 0 = input, 1 … depth = blocks, depth + 1 = norm and heads."""
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return 0 if name.startswith(("in_proj.", "modality.")) else self.num_layers + 1

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in the blocks, wherever there is no cache."""
        self.grad_checkpointing = enable

    def forward(
        self,
        frames: Tensor,
        modality: Tensor,
        t_us: Tensor,
        grid: tuple[int, int],
        valid: Tensor | None = None,
        cache: KVCache | None = None,
        next_modality: Tensor | None = None,
    ) -> BackboneOutput:
        """Run over F frames, after those in the cache if there is one.

        Args:
            frames: (B, F, N, token_dim) float tokens.
            modality: (B, F) int64, EVENT or IMAGE.
            t_us: (B, F) int64, a frame's time (the end of an event window, the exposure of an image) [us];
                the same clock in every call with one cache.
            grid: (h, w) with h * w = N.
            valid: (B, F) bool, False = padding that no other frame may see and whose outputs mean nothing;
                None = all valid.
            cache: earlier frames; extended in place. Whole sequence or frame by frame give the same outputs.
            next_modality: (B, F) int64 modality of each frame's successor; None = the frame's own.
        Returns:
            BackboneOutput for the F given frames.
        Raises:
            ValueError: shapes or the grid do not fit together.
        """
        return self._run(frames, modality, t_us, grid, valid, cache, next_modality)[0]

    def intermediates(
        self,
        frames: Tensor,
        modality: Tensor,
        t_us: Tensor,
        grid: tuple[int, int],
        depths: Sequence[int],
        cache: KVCache | None = None,
    ) -> tuple[BackboneOutput, list[Tensor]]:
        """`forward`, and the tokens after some of the blocks.

        Args:
            frames, modality, t_us, grid, cache: as `forward`.
            depths: numbers of blocks passed, 1 … num_layers, in any order.
        Returns:
            What `forward` gives, and for each of `depths` (B, F, N, width) through the final norm: at num_layers
            that is `hidden`.
        Raises:
            ValueError: as `forward`, or a depth that the backbone does not have.
        """
        if wrong := [depth for depth in depths if not 1 <= depth <= self.num_layers]:
            raise ValueError(f"depths {wrong} of a backbone with {self.num_layers} blocks: give 1 … {self.num_layers}")
        output, states = self._run(frames, modality, t_us, grid, None, cache, None, frozenset(depths))
        states[self.num_layers] = output.hidden
        return output, [states[depth] for depth in depths]

    def _run(
        self,
        frames: Tensor,
        modality: Tensor,
        t_us: Tensor,
        grid: tuple[int, int],
        valid: Tensor | None,
        cache: KVCache | None,
        next_modality: Tensor | None,
        depths: Container[int] = (),
    ) -> tuple[BackboneOutput, dict[int, Tensor]]:
        batch, num, count, dim = frames.shape
        if grid[0] * grid[1] != count:
            raise ValueError(f"grid {grid} has {grid[0] * grid[1]} cells, the frames have {count} tokens")
        if dim != self.token_dim:
            raise ValueError(f"frames have {dim} channels, the backbone takes token_dim = {self.token_dim}")
        if t_us.is_floating_point():
            raise ValueError("t_us must be an integer tensor of µs: float32 cannot hold absolute times")
        past, span = (0, self.span) if cache is None else (cache.num_frames, self.span_of(cache))
        cos, sin = self.rotary.angles(grid, self._elapsed(t_us, valid, cache))
        sight = self._sight(num, past, count, valid, cache, frames.device)

        tokens = F.layer_norm(frames, (dim,))
        x = self.in_proj(tokens) + self.modality(modality)[:, :, None]
        x = x.reshape(batch, num * count, self.width)
        states: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and cache is None:
                x, _ = checkpoint(block, x, cos, sin, sight, use_reentrant=False)
            else:
                x, kept = block(x, cos, sin, sight, cache.layers[i] if cache is not None and past else None)
            if cache is not None:
                drop = 0 if span is None else max(0, past + num - span + 1) * count
                cache.layers[i : i + 1] = [(kept[0][:, :, drop:], kept[1][:, :, drop:])]
            if i + 1 in depths and i + 1 < self.num_layers:
                states[i + 1] = self.norm(x).view(batch, num, count, self.width)
        if cache is not None:
            self._remember(cache, valid, batch, num, frames.device)
        hidden = self.norm(x).view(batch, num, count, self.width)
        following = modality if next_modality is None else next_modality
        return BackboneOutput(hidden, self._next(hidden, modality, following), self.image_head(hidden)), states

    def span_of(self, cache: KVCache) -> int | None:
        """Frames that a frame sees with this cache, itself included; None = all before it."""
        spans = [span for span in (self.span, cache.span) if span is not None]
        return min(spans, default=None)

    def next_targets(self, tokens: Tensor, valid: Tensor | None = None, modality: Tensor | None = None) -> NextTargets:
        """The tokens that `next` predicts, shifted by a frame or by a token as `order` says.

        Args:
            tokens: (B, F, N, D) target tokens, whatever normalisation the loss wants.
            valid: (B, F) bool or None.
            modality: (B, F) int64 or None.
        """
        ok = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if valid is None else valid
        follows = torch.cat([ok[:, 1:] & ok[:, :-1], torch.zeros_like(ok[:, :1])], dim=1)
        if self.order == "frame":
            target = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
            mask = follows[..., None].expand(tokens.shape[:3])
        else:
            flat = tokens.flatten(1, 2)
            target = torch.cat([flat[:, 1:], torch.zeros_like(flat[:, :1])], dim=1).view_as(tokens)
            inside = ok[..., None].expand(*tokens.shape[:2], tokens.shape[2] - 1)
            mask = torch.cat([inside, follows[..., None]], dim=2)
        target = target.masked_fill(~mask[..., None], 0.0)
        after = None if modality is None else torch.cat([modality[:, 1:], modality[:, -1:]], dim=1)
        return NextTargets(target, mask, after)

    def _next(self, hidden: Tensor, modality: Tensor, following: Tensor) -> Tensor:
        every = self.next_head(hidden).unflatten(-1, (self.modalities, self.token_dim))
        index = following[:, :, None].expand(hidden.shape[:3])
        if self.order == "token":  # inside a frame the next token is of the frame's own modality
            index = torch.cat([modality[:, :, None].expand_as(index)[:, :, :-1], index[:, :, -1:]], dim=2)
        index = index[..., None, None].expand(*index.shape, 1, self.token_dim)
        return every.gather(3, index).squeeze(3)

    def _elapsed(self, t_us: Tensor, valid: Tensor | None, cache: KVCache | None) -> Tensor:
        """Time since the first valid frame of each sequence, (B, F) int64; padding gets 0."""
        origin = cache.origin_us if cache is not None else None
        if origin is None:
            first = torch.zeros_like(t_us[:, :1]) if valid is None else valid.int().argmax(1, keepdim=True)
            origin = t_us.gather(1, first)[:, 0]
            if cache is not None:
                cache.origin_us = origin
        elapsed = t_us - origin[:, None]
        return elapsed if valid is None else elapsed.masked_fill(~valid, 0)

    def _sight(
        self,
        num: int,
        past: int,
        count: int,
        valid: Tensor | None,
        cache: KVCache | None,
        device: torch.device,
    ) -> Sight:
        """What tokens see: by a kernel that needs no mask where there is one, else by a mask."""
        span = self.span if cache is None else self.span_of(cache)
        limited = span is not None and past + num > span
        padded = valid is not None or (cache is not None and cache.padded)
        whole = not limited and not padded
        if whole and not past and self.order == "token":
            return Sight(is_causal=True)
        if whole and num == 1 and self.order == "frame":
            return Sight()
        if whole and not past and self.order == "frame" and (count >= SLICED or not use_fused_attn()):
            return Sight(frame=count)
        query = torch.arange(past, past + num, device=device)[:, None]
        key = torch.arange(past + num, device=device)[None]
        seen = (key <= query)[None]
        if span is not None:
            seen = seen & (key > query - span)
        if padded:
            ok = torch.ones(1, num, dtype=torch.bool, device=device) if valid is None else valid
            if cache is not None and cache.valid is not None and past:
                before = cache.valid
                ok = torch.cat([before, ok.expand(before.shape[0], num)], dim=1)
            seen = (seen & ok[:, None]) | (key == query)  # a padded frame sees itself: no row may be empty
        mask = seen.repeat_interleave(count, 1).repeat_interleave(count, 2)
        if self.order == "token":
            row = torch.arange(past * count, (past + num) * count, device=device)[:, None]
            mask = mask & (torch.arange((past + num) * count, device=device) <= row)
        return Sight(mask[:, None])

    def _remember(self, cache: KVCache, valid: Tensor | None, batch: int, num: int, device: torch.device) -> None:
        cache.padded = cache.padded or valid is not None
        new = torch.ones(batch, num, dtype=torch.bool, device=device) if valid is None else valid
        seen = new if cache.valid is None else torch.cat([cache.valid, new], dim=1)
        span = self.span_of(cache)
        cache.valid = seen if span is None else seen[:, max(0, seen.shape[1] - (span - 1)) :]
