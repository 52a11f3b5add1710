"""Image models of timm: download, or strict load of a local file."""

import difflib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gep.export import load_strict
from gep.models.vit import plain_vit
from gep.models.vit_type import ViT

T = TypeVar("T")


def build(name: str, *, file: Path | None, size: tuple[int, int] | None, pretrained: bool) -> ViT:
    """A timm ViT without its heads, of dynamic input size.

    Args:
        name: timm's model name, with or without a weights tag.
        file: local weights; None = download when `pretrained`.
        size: (H, W) that the position embeddings are resampled for once; None = the model's own size.
        pretrained: False = random weights.
    Raises:
        ValueError: unknown name, no ViT, or weights of another model.
        FileNotFoundError: the weights cannot be downloaded.
    """
    arch = name.split(".")[0]
    if arch not in timm.list_models():
        near = difflib.get_close_matches(arch, timm.list_models("vit_*"), n=5)
        raise ValueError(f"timm has no model {arch!r}: near names are {', '.join(near) or 'none; use a vit_*'}")
    if not any(arch in timm.list_models(module=module) for module in ("vision_transformer", "eva")):
        raise ValueError(f"timm:{name} has no patch tokens: choose a vit_* model")
    known = timm.list_pretrained(arch)
    if name not in known and (name != arch or (pretrained and file is None and not known)):
        raise ValueError(f"timm has no weights {name!r}: choose one of {', '.join(known) or 'none'}")
    options: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True, "img_size": size}
    if file is not None:
        vit = timm.create_model(name, pretrained=False, **options)
        _load_file(vit, file, f"timm:{name}")
    elif pretrained:
        vit = download(f"timm:{name}", lambda: timm.create_model(name, pretrained=True, **options))
    else:
        vit = timm.create_model(name, pretrained=False, **options)
    return plain_vit(vit, f"timm:{name}")


def download(spec: str, fetch: Callable[[], T]) -> T:
    """Run `fetch`, and turn whatever its libraries raise into one error that says how to go on.

    Raises:
        FileNotFoundError: naming the model, the cause and the two ways on.
    """
    try:
        return fetch()
    except Exception as error:  # httpx, huggingface_hub, urllib and torch.hub share no base class
        cause = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"the weights of {spec} could not be downloaded ({type(error).__name__}: {cause}). Two ways on: "
            "teacher.file=<local .safetensors or .pth of this model>, or teacher.name=export:<folder of a "
            "model exported by gep>"
        ) from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch file; no code in it is run.

    Raises:
        ValueError: it cannot be read as either.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"teacher.file {file} cannot be read as weights ({cause}): download it again") from error


def _load_file(vit: nn.Module, file: Path, spec: str) -> None:
    # timm's own filter renames the tensors of the original releases and resamples the positions.
    state = sys.modules[type(vit).__module__].checkpoint_filter_fn(read_weights(file), vit)
    own = vit.state_dict()
    heads = ("head.", "head_dist.", "attn_pool.", "fc_norm.")
    kept = {name: value for name, value in state.items() if name in own or not name.startswith(heads)}
    load_strict(vit, kept, source=f"teacher.file {file} for {spec}")
