"""The ViTs that encoders and teachers are made of: timm's, and a small one of our own."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


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
        place = {"device": device, "dtype": dtype}
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


def build_vit(arch: str, in_chans: int, img_size: tuple[int, int], drop_path: float = 0.0) -> nn.Module:
    """A randomly initialised ViT of dynamic input size without a head.

    Raises:
        ValueError: unknown `arch`, or one without a grid of patch tokens.
    """
    if arch == "nano":
        return _nano(in_chans, img_size, drop_path)
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


def plain_vit(vit: nn.Module, name: str) -> nn.Module:
    """Checks that `vit` gives a grid of patch tokens, and drops its pooling head (unused parameters upset
    DDP).

    Raises:
        ValueError: it is not a ViT.
    """
    if not all(hasattr(vit, part) for part in ("blocks", "num_prefix_tokens", "patch_embed")):
        raise ValueError(f"{name} ({type(vit).__name__}) has no patch tokens: choose a vit_* model")
    if getattr(vit, "attn_pool", None) is not None:
        vit.attn_pool = None
    return vit


def vit_tokens(vit: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of a timm ViT after its final norm, split.

    Args:
        x: (B, C, H, W) normalised input.
    Returns:
        prefix (B, P, D): class and register tokens, P may be 0; patches (B, N, D) in raster order.
    """
    return split_tokens(vit, vit.forward_features(x))


def vit_intermediates(vit: nn.Module, x: Tensor, depths: Sequence[int]) -> list[Tensor]:
    """Patch tokens after some of a timm ViT's blocks, each through the final norm.

    Args:
        x: (B, C, H, W) normalised input.
        depths: ascending numbers of blocks passed, 1 … len(vit.blocks).
    Returns:
        A (B, N, D) for each of `depths`, raster order; at the last block what `vit_tokens` gives.
    """
    taken = [depth - 1 for depth in depths]
    states = vit.forward_intermediates(x, indices=taken, output_fmt="NLC", intermediates_only=True, stop_early=True)
    norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
    return [norm(state) for state in states]


def spread_depths(num_layers: int, num: int) -> list[int]:
    """`num` depths spread evenly over 1 … num_layers, the last always num_layers; repeated where num > num_layers."""
    return [max(1, (2 * (i + 1) * num_layers + num) // (2 * num)) for i in range(num)]


def split_tokens(vit: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix and patch tokens of `vit.forward_features`'s result, with the final norm applied."""
    if isinstance(vit.norm, nn.Identity):  # models that pool first keep their final norm here
        features = vit.fc_norm(features)
    return features[:, : vit.num_prefix_tokens], features[:, vit.num_prefix_tokens :]


def vit_grid(vit: nn.Module, height: int, width: int) -> tuple[int, int]:
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
