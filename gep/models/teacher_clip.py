"""Image-text models of open_clip: joint-space embeddings, text tower, and a timm copy of the image tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import open_clip
from open_clip.factory import load_checkpoint
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer
from timm.layers import LayerNorm
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from gep.export import load_strict
from gep.models.teacher_timm import download
from gep.models.vit import split_tokens
from gep.models.vit_type import ViT


def build(name: str, *, file: Path | None, size: tuple[int, int] | None, pretrained: bool) -> dict[str, Any]:
    """The parts of a FrozenVFM for "<arch>/<tag>".

    Args:
        name: open_clip architecture and weights tag; the tag may be left out with `file` or without
            `pretrained`.
        file: local weights of the whole model.
        size: (H, W) the model is built for; None = its own.
        pretrained: False = random weights.
    Raises:
        ValueError: unknown architecture or tag, or weights of another model.
        FileNotFoundError: the weights cannot be downloaded.
    """
    spec = f"open_clip:{name}"
    arch, _, tag = name.partition("/")
    if arch not in open_clip.list_models():
        raise ValueError(f"{spec}: open_clip has no architecture {arch!r}; see open_clip.list_models()")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if (tag or (pretrained and file is None)) and tag not in tags:
        raise ValueError(f"{spec}: {arch} has no weights {tag!r}: choose one of {', '.join(tags) or 'none'}")
    known = (open_clip.get_pretrained_cfg(arch, tag) if tag else None) or {}
    # Some tags were trained with another activation than the architecture's file says (OpenAI's QuickGELU).
    quick = bool(known.get("quick_gelu"))
    create = partial(open_clip.create_model, arch, force_quick_gelu=quick, force_image_size=size)
    if file is None and pretrained:
        model = download(spec, lambda: create(pretrained=tag))
    else:
        model = create(pretrained=None, pretrained_text=False)
        if file is not None:
            _load_file(model, file, spec)
    return _parts(spec, arch, model, known)


def _load_file(model: nn.Module, file: Path, spec: str) -> None:
    try:
        load_checkpoint(model, str(file), strict=True, weights_only=True)
    except Exception as error:  # a damaged file and other weights end in many types
        cause = " ".join(str(error).split())[:500]
        raise ValueError(f"teacher.file {file} does not hold the weights of {spec}: {cause}") from error


def _parts(spec: str, arch: str, model: open_clip.CLIP, known: dict[str, Any]) -> dict[str, Any]:
    tower = model.visual
    visual: Callable[[], ViT] | None = None
    reason = ""
    if isinstance(tower, VisionTransformer):
        tower.output_tokens = True
        forward, patch, width = (
            partial(_native_forward, tower),
            tower.patch_size,
            tower.ln_post.normalized_shape[0],
        )
        if tower.attn_pool is None and tower.pool_type == "tok" and isinstance(tower.ln_pre, nn.LayerNorm):
            visual = partial(timm_copy, tower)
        else:
            reason = "its pooling or norms have no counterpart in timm's ViT"
    elif isinstance(tower, TimmModel) and hasattr(tower.trunk, "num_prefix_tokens"):
        forward, patch, width = (
            partial(_trunk_forward, tower),
            tower.trunk.patch_embed.patch_size,
            tower.trunk.embed_dim,
        )
        visual = partial(_trunk, tower)
    else:
        raise ValueError(f"{spec} has no ViT image tower: choose a ViT-* architecture")
    return {
        "model": model,
        "forward": forward,
        "visual": visual,
        "visual_reason": reason,
        "embed_dim": width,
        "pooled_dim": open_clip.get_model_config(arch)["embed_dim"],
        "mean": known.get("mean") or tower.preprocess_cfg["mean"],
        "std": known.get("std") or tower.preprocess_cfg["std"],
        "native_size": (int(tower.image_size[0]), int(tower.image_size[1])),
        "grid": partial(_grid, spec, tuple(tower.image_size), patch),
        "text": partial(_text, arch, model),
        "logit_scale": float(model.logit_scale.detach().exp()),
    }


def timm_copy(tower: VisionTransformer) -> ViT:
    """A timm ViT with the weights and the tokens of open_clip's image tower, to start an encoder from."""
    block = tower.transformer.resblocks[0]
    width = block.ln_1.normalized_shape[0]
    vit = timm_vit.VisionTransformer(
        img_size=tower.image_size,
        patch_size=tower.patch_size[0],
        num_classes=0,
        embed_dim=width,
        depth=len(tower.transformer.resblocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.c_fc.out_features / width,
        pre_norm=True,
        norm_layer=partial(LayerNorm, eps=tower.ln_post.eps),
        act_layer="quick_gelu" if isinstance(block.mlp.gelu, QuickGELU) else "gelu",
        dynamic_img_size=True,
    )
    state = {f"visual.{name}": value for name, value in tower.state_dict().items()}
    state = timm_vit.checkpoint_filter_fn(state, vit)
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    load_strict(vit, state, source="open_clip's image tower")
    return cast(ViT, vit.requires_grad_(False).eval())


def _trunk(tower: TimmModel) -> ViT:
    return tower.trunk


def _native_forward(tower: VisionTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    pooled, tokens = tower(x)
    return (tower.ln_post(tokens) if tower.final_ln_after_pool else tokens), pooled


def _trunk_forward(tower: TimmModel, x: Tensor) -> tuple[Tensor, Tensor]:
    features = tower.trunk.forward_features(x)
    return split_tokens(tower.trunk, features)[1], tower.head(tower.trunk.forward_head(features))


def _grid(spec: str, size: tuple[int, int], patch: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    if (height, width) != size:
        raise ValueError(
            f"{spec} takes {size[0]}x{size[1]} images, got {height}x{width}: set teacher.image_size to have "
            f"them "
            "resized"
        )
    return height // patch[0], width // patch[1]


def _text(arch: str, model: open_clip.CLIP, prompts: Sequence[str]) -> Tensor:
    tokenizer = download(f"{arch}'s tokenizer", lambda: open_clip.get_tokenizer(arch))
    return model.encode_text(tokenizer(list(prompts)).to(model.logit_scale.device))
