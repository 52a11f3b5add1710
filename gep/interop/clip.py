"""The image tower in a checkpoint of open_clip (or of OpenAI's CLIP, as a state dict)."""

from __future__ import annotations

import re

from gep.interop.names import grid_of, shapes, square
from gep.interop.table import Conversion
from gep.interop.timm_names import resampled

ANCHOR = "conv1.weight"
TRUNK = "trunk."
_SIZES = {
    (256, 10, 16): ("xsmall_patch16_clip", ()),
    (512, 12, 32): ("medium_patch32_clip", ()),
    (512, 12, 16): ("medium_patch16_clip", ()),
    (640, 12, 32): ("betwixt_patch32_clip", ()),
    (768, 12, 32): ("base_patch32_clip", ("quickgelu",)),
    (768, 12, 16): ("base_patch16_clip", ("quickgelu",)),
    (1024, 24, 14): ("large_patch14_clip", ("quickgelu",)),
    (1280, 32, 14): ("huge_patch14_clip", ("quickgelu",)),
    (1408, 40, 14): ("giant_patch14_clip", ()),
    (1664, 48, 14): ("gigantic_patch14_clip", ("quickgelu",)),
}
"""timm's names by width, depth and patch, and whether there is one with QuickGELU."""
_OF_TEXT = ("text.", "transformer.", "token_embedding.", "ln_final.")
_TEXT = ("positional_embedding", "text_projection", "logit_scale", "logit_bias", "attn_mask")
_WHOLE = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
    "ln_post.weight": "norm.weight",
    "ln_post.bias": "norm.bias",
}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_PARTS = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def convert(weights: Conversion, size: tuple[int, int] | None, quick_gelu: bool) -> tuple[str, tuple[int, int]]:
    """Rename open_clip's own image ViT to timm's names; the projection to the joint space stays behind.

    Args:
        weights: tensors by the tower's names, without "visual."; consumed.
        size: (H, W) [px] of the input; None = that of the positions in the file.
        quick_gelu: the model was trained with QuickGELU (OpenAI's, and tags that say so): the file does not tell.
    Returns:
        timm's name of the architecture, and the size.
    Raises:
        ValueError: a tower that timm has no ViT for.
    Source: Radford et al. 2021 (arXiv 2103.00020); names as in open_clip.
    """
    state = weights.rest
    width, depth, patch, _ = shapes(state, ANCHOR, r"transformer\.resblocks\.(\d+)\.")
    name, variants = _SIZES.get((width, depth, patch), ("", ()))
    if not name or (quick_gelu and not variants):
        quick = " with QuickGELU" if quick_gelu else ""
        raise ValueError(f"timm has no CLIP ViT{quick} {width} wide with {depth} blocks and patch {patch}")
    side = square(state["positional_embedding"].shape[0] - 1, "positional_embedding")
    size = size or (side * patch, side * patch)
    positions, how = resampled(state["positional_embedding"][None].float(), side, grid_of(size, patch), 1)
    for source in list(state):
        match = _BLOCK.fullmatch(source)
        if source in _WHOLE:
            value = {"positional_embedding": positions, "class_embedding": state[source].reshape(1, 1, -1)}.get(source)
            weights.move(source, _WHOLE[source], value, how if source == "positional_embedding" else "")
        elif match:
            part = next((old for old in _PARTS if match.group(2).startswith(old)), None)
            if part is not None:
                rest = match.group(2)[len(part) :]
                weights.move(source, f"blocks.{match.group(1)}.{_PARTS[part]}{rest}")
    if "proj" in state:
        weights.ignore("proj", "to the joint space, from the class token")
    return f"vit_{name}{'_quickgelu' if quick_gelu else ''}_224", size


def ignore_text(weights: Conversion) -> None:
    """Take the text tower's tensors for nothing."""
    weights.ignore_under(_OF_TEXT, "of the text tower")
    for name in _TEXT:
        if name in weights.rest:
            weights.ignore(name, "of the text tower" if "logit" not in name else "of the loss")
