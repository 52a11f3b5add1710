"""The ViTs that encoders and teachers are made of: timm's, and a small one of our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, PatchEmbed, apply_keep_indices_nlc
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gep.models.vit_type import ViT


class ConvStem(nn.Module):
    """Patch embedding of total stride 6: 3x3 convolutions of strides 1, 3, 2, layer norm and GELU between.

    Takes the arguments of timm's PatchEmbed that its VisionTransformer passes. `img_size` only fixes the
    grid the position embeddings are made for.

    Layer norm over the channels of each pixel: batch norm would make the loss depend on how a batch is
    spread over processes.

    Source: Xiao et al. 2021, "Early Convolutions Help Transformers See Better".
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        strict_img_size: bool = False,
        output_fmt: str = "NHWC",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert patch_size == 6 and output_fmt == "NHWC" and not dynamic_img_pad and not strict_img_size
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = (patch_size, patch_size)
        self.img_size = img_size
        self.grid_size = self.dynamic_feat_size(img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.conv1 = nn.Conv2d(in_chans, embed_dim // 4, 3, padding=1, **place)
        self.norm1 = LayerNorm2d(embed_dim // 4, **place)
        self.conv2 = nn.Conv2d(embed_dim // 4, embed_dim, 3, stride=3, **place)
        self.norm2 = LayerNorm2d(embed_dim, **place)
        self.conv3 = nn.Conv2d(embed_dim, embed_dim, 3, stride=2, padding=1, bias=bias, **place)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels a token spans; part of timm's PatchEmbed interface."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid (h, w) of an (H, W) input; part of timm's PatchEmbed interface."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), H and W multiples of 6 -> (B, H / 6, W / 6, embed_dim)."""
        # The first layers hold most of the pixels: channels last makes their norms a third cheaper on a CPU.
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.gelu(self.norm1(self.conv1(x)))
        x = F.gelu(self.norm2(self.conv2(x)))
        return self.conv3(x).permute(0, 2, 3, 1)


def _nano(in_chans: int, img_size: tuple[int, int], drop_path: float) -> VisionTransformer:
    vit = VisionTransformer(
        img_size=img_size,
        patch_size=6,
        in_chans=in_chans,
        num_classes=0,
        global_pool="",
        embed_dim=96,
        depth=4,
        num_heads=4,
        class_token=False,
        dynamic_img_size=True,
        drop_path_rate=drop_path,
        embed_layer=ConvStem,
    )
    # Without gain and offset the tokens are layer-normed already, so that a teacher's class head, which
    # reads their mean, fits the mean of the layer-normed tokens that stage 1 regresses.
    vit.norm = nn.LayerNorm(96, eps=1e-6, elementwise_affine=False)
    return vit


def build_vit(arch: str, in_chans: int, img_size: tuple[int, int], drop_path: float = 0.0) -> ViT:
    """A randomly initialised ViT of dynamic input size without a head.

    Raises:
        ValueError: unknown `arch`, or one without a grid of patch tokens.
    """
    if arch == "nano":
        return cast(ViT, _nano(in_chans, img_size, drop_path))
    if not arch.startswith("vit_") or arch.split(".")[0] not in timm.list_models("vit_*"):
        near = timm.list_models(f"*{arch.split('.')[0].split('_')[-1]}*", module="vision_transformer")[:8]
        raise ValueError(
            f"unknown encoder arch {arch!r}: use 'nano', or a timm name vit_* such as "
            f"{', '.join(near or ['vit_small_patch14_reg4_dinov2', 'vit_base_patch16_clip_224'])}"
        )
    try:
        vit = timm.create_model(
            arch,
            pretrained=False,
            num_classes=0,
            in_chans=in_chans,
            img_size=img_size,
            dynamic_img_size=True,
            drop_path_rate=drop_path,
        )
    except TypeError as error:
        raise ValueError(
            f"encoder arch {arch!r} does not take a dynamic image size ({error}): choose a plain vit_*"
        ) from error
    return plain_vit(vit, arch)


def plain_vit(model: nn.Module, name: str) -> ViT:
    """Checks that a model gives a grid of patch tokens, and drops its pooling head (unused parameters upset
    DDP).

    Raises:
        ValueError: it is not a ViT.
    """
    if not all(hasattr(model, part) for part in ("blocks", "num_prefix_tokens", "patch_embed")):
        raise ValueError(f"{name} ({type(model).__name__}) has no patch tokens: choose a vit_* model")
    vit = cast(ViT, model)
    if getattr(vit, "attn_pool", None) is not None:
        vit.attn_pool = None
    return vit


class _RoundedRope(RotaryEmbeddingDinoV3):
    """timm's, with periods that went through bfloat16 once; a class, as a cast of the module computes them anew."""

    def _compute_periods(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        return super()._compute_periods().bfloat16().to(device=device, dtype=dtype)


def round_periods(vit: nn.Module, name: str) -> None:
    """Makes a DINOv3 ViT turn its queries and keys by periods rounded to bfloat16, as its releases hold them.

    Raises:
        ValueError: another ViT.
    """
    rope = getattr(vit, "rope", None)
    if type(rope) is not RotaryEmbeddingDinoV3:
        raise ValueError(f"rope_bf16 has no meaning for encoder arch {name!r}, which is no DINOv3: leave it out")
    rope.__class__ = _RoundedRope
    rope.register_buffer("periods", rope._compute_periods(device=rope.get_buffer("periods").device), persistent=False)
    if rope.feat_shape is not None:
        rope._cache_embed(rope.feat_shape)


def vit_tokens(vit: ViT, x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of a timm ViT after its final norm, split.

    Args:
        x: (B, C, H, W) normalised input.
    Returns:
        prefix (B, P, D): class and register tokens, P may be 0; patches (B, N, D) in raster order.
    """
    return split_tokens(vit, vit.forward_features(x))


def vit_intermediates(vit: ViT, x: Tensor, depths: Sequence[int]) -> list[Tensor]:
    """Patch tokens after some of a timm ViT's blocks, each through the final norm.

    Args:
        x: (B, C, H, W) normalised input.
        depths: ascending numbers of blocks passed, 1 … len(vit.blocks).
    Returns:
        A (B, N, D) for each of `depths`, raster order; at the last block what `vit_tokens` gives.
    """
    taken = [depth - 1 for depth in depths]
    states = vit.forward_intermediates(x, indices=taken, output_fmt="NLC", intermediates_only=True, stop_early=True)
    norm = final_norm(vit)
    return [norm(state) for state in states]


def vit_kept_tokens(vit: ViT, x: Tensor, index: Tensor, real: Tensor | None, depths: Sequence[int]) -> list[Tensor]:
    """Patch tokens after some of a timm ViT's blocks, which see the prefix tokens and some of the patches alone.

    Args:
        x: (B, C, H, W) normalised input.
        index: (B, K) int64 places of those patches in raster order; class and register tokens are kept beside them.
        real: (B, K) bool, False = padding that no token attends to; None = no padding.
        depths: ascending numbers of blocks passed, 1 … len(vit.blocks).
    Returns:
        A (B, K, D) for each of `depths`, through the final norm.
    """
    prefix = vit.num_prefix_tokens
    # The ViT itself adds prefix and positions, to a grid that is empty.
    rows, columns = vit_grid(vit, *x.shape[-2:])
    placed = vit._pos_embed(x.new_zeros(1, rows, columns, vit.embed_dim))
    place, rope = placed if isinstance(placed, tuple) else (placed, None)
    patches = _kept_patches(vit.patch_embed, x, index) + F.embedding(index, place[0, prefix:])
    x = vit.norm_pre(torch.cat([place[:, :prefix].expand(len(x), -1, -1), patches], dim=1))

    given: dict[str, Any] = {}
    if real is not None:
        given["attn_mask"] = F.pad(real, (prefix, 0), value=True)[:, None, None]
    mixed = rope is not None and getattr(vit, "rope_mixed", False)
    if rope is not None:
        rope = apply_keep_indices_nlc(x, rope, index)
        rope = rope.transpose(0, 1) if mixed else rope.unsqueeze(1)  # a depth each, or one for all heads
    states = []
    for i, block in enumerate(vit.blocks[: depths[-1]]):
        if rope is not None:
            given["rope"] = rope[i] if mixed else rope
        x = checkpoint(block, x, use_reentrant=False, **given) if vit.grad_checkpointing else block(x, **given)
        if i + 1 in depths:
            states.append(x[:, prefix:])
    norm = final_norm(vit)
    return [norm(state) for state in states]


def check_kept(vit: nn.Module, name: str) -> None:
    """Raises ValueError where `vit_kept_tokens` does not know how the ViT adds its positions."""
    if not isinstance(vit, VisionTransformer | Eva):
        raise ValueError(
            f"encoder arch {name!r} ({type(vit).__name__}) cannot leave patches out: set encoder.keep=1, or choose "
            "nano or a plain vit_*"
        )


def _kept_patches(embed: PatchEmbed, x: Tensor, index: Tensor) -> Tensor:
    """(B, K, D) embedded patches; where patches do not overlap the others are not even embedded."""
    if type(embed) is not PatchEmbed:
        every = embed(x).flatten(1, 2)
        return every.gather(1, index[..., None].expand(-1, -1, every.shape[-1]))
    rows, columns = embed.patch_size
    cells = x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, ph, pw)
    row, column = index // cells.shape[2], index % cells.shape[2]
    pixels = cells[torch.arange(len(x), device=x.device)[:, None], row, column].flatten(2)
    return embed.norm(F.linear(pixels, embed.proj.weight.flatten(1), embed.proj.bias))


def final_norm(vit: ViT) -> nn.Module:
    """The norm that all of a ViT's tokens pass last; models that pool first keep it elsewhere."""
    return vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm


def spread_depths(num_layers: int, num: int) -> list[int]:
    """`num` depths spread evenly over 1 … num_layers, the last always num_layers; repeated where num > num_layers."""
    return [max(1, (2 * (i + 1) * num_layers + num) // (2 * num)) for i in range(num)]


def split_tokens(vit: ViT, features: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix and patch tokens of `vit.forward_features`'s result, with the final norm applied."""
    if isinstance(vit.norm, nn.Identity):  # models that pool first keep their final norm here
        features = vit.fc_norm(features)
    return features[:, : vit.num_prefix_tokens], features[:, vit.num_prefix_tokens :]


def vit_grid(vit: ViT, height: int, width: int) -> tuple[int, int]:
    """Tokens (h, w) that an input of `height` x `width` gives.

    Raises:
        ValueError: a side is not a multiple of the patch.
    """
    ph, pw = vit.patch_embed.patch_size
    if height % ph or width % pw or not height or not width:
        up = -(-height // ph) * ph, -(-width // pw) * pw
        raise ValueError(
            f"size {height}x{width} is not a multiple of the {ph}x{pw} patch: pad or resize it to {up[0]}x{up[1]}"
        )
    return height // ph, width // pw
