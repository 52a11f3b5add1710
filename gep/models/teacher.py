"""The frozen image model whose space everything is aligned to: timm, open_clip, or an exported stand-in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gep import export
from gep.export_schema import CLASSES, ENCODER, RECORDED, record
from gep.models import teacher_clip, teacher_timm
from gep.models.encoder import EventEncoder
from gep.models.vit import vit_grid, vit_tokens
from gep.models.vit_type import ViT
from gep.pretrained import Pretrained

KIND = "vfm"
"""`kind` of the folder that `ImageModel.save` writes."""


class ImageModel(Pretrained):
    """Image ViT, with a class head on the mean of its tokens if it has classes: what a stand-in teacher is trained as.

    Args:
        encoder: keywords of EventEncoder; in_chans = 3, with the images' mean and std.
        classes: names, in label order; none = tokens alone.
    """

    export_kind = KIND
    config_schema = record({"encoder": ENCODER, "classes": CLASSES, **RECORDED}, needed=("encoder", "classes"))

    def __init__(self, encoder: dict[str, Any], classes: Sequence[str] = ()) -> None:
        super().__init__()
        self.encoder = EventEncoder(**encoder)
        if self.encoder.in_chans != 3:
            raise ValueError(f"encoder in_chans = {self.encoder.in_chans}: an image model takes 3 channels")
        self.classes = [str(name) for name in classes]
        self.class_head = nn.Linear(self.encoder.embed_dim, len(self.classes)) if self.classes else None

    def forward(self, image: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W), uint8 or float in [0, 1]."""
        assert self.class_head is not None, "this image model has no classes"
        return self.class_head(self.encoder(as_float(image))[1])

    @classmethod
    def _build(cls, config: Mapping[str, Any]) -> ImageModel:
        return cls(config["encoder"], config["classes"])

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to rebuild the model, as JSON."""
        return {"encoder": dict(self.encoder.config), "classes": self.classes}

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        metrics: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Path:
        """Export for `FrozenVFM.from_spec("export:<folder>")`; data and metrics go into the card alone."""
        card = export.model_card(
            title="Stand-in image model",
            summary="A small image classifier that stands in for a vision foundation model as the frozen teacher.",
            config=self.config,
            data=data,
            metrics=metrics,
            usage=(
                "from gep.models import FrozenVFM\n\n"
                f'teacher = FrozenVFM.from_spec("export:{name or Path(folder).name}")  # a folder or a Hub id'
            ),
        )
        return export.save_folder(folder, kind=KIND, config=self.config, state=self.state_dict(), card=card)

    save = save_pretrained  # the name by which the demo knows it


class FrozenVFM:
    """A frozen image model: images in, tokens and a pooled vector out.

    It is deliberately no nn.Module: assigned to one, it appears in neither its parameters() nor its
    state_dict(), and neither accelerate nor DDP touches it. Move it with `to`. Build it with `from_spec`.

    Attributes:
        spec: what it was built from.
        embed_dim, pooled_dim: channels of the tokens and of the pooled vector.
        class_head: the module behind `classify`, None without one.
        classes: names that `classify` gives logits for.
        logit_scale: what a text model multiplies cosines by; None without a text tower.
        native_size: (H, W) of the images it was trained on, where it says so (export, open_clip).
        visual_reason: why `visual` is None, where it is.
    """

    def __init__(
        self,
        spec: str,
        model: nn.Module,
        forward: Callable[[Tensor], tuple[Tensor, Tensor]],
        *,
        visual: Callable[[], ViT] | None,
        visual_reason: str,
        embed_dim: int,
        pooled_dim: int,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: tuple[int, int] | None = None,
        native_size: tuple[int, int] | None = None,
        grid: Callable[[int, int], tuple[int, int]],
        class_head: nn.Module | None = None,
        classes: Sequence[str] | None = None,
        text: Callable[[Sequence[str]], Tensor] | None = None,
        logit_scale: float | None = None,
        text_reason: str = "",
    ) -> None:
        self.spec, self.embed_dim, self.pooled_dim = spec, embed_dim, pooled_dim
        self._visual, self.visual_reason = visual, visual_reason
        self.image_size, self.native_size, self.logit_scale = image_size, native_size, logit_scale
        self.classes = None if classes is None else list(classes)
        self._model, self._forward, self._grid = model, forward, grid
        self.class_head, self._text, self._text_reason = class_head, text, text_reason
        self._mean, self._std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
        for module in self._parts():
            module.eval().requires_grad_(False)

    @classmethod
    def from_spec(
        cls,
        spec: str,
        *,
        file: str | os.PathLike[str] | None = None,
        image_size: int | Sequence[int] | None = None,
        pool: Literal["mean", "cls"] = "mean",
        pretrained: bool = True,
        device: torch.device | str = "cpu",
    ) -> FrozenVFM:
        """Build a frozen image model.

        Args:
            spec: "timm:<name>", "open_clip:<arch>/<tag>" or "export:<folder>".
            file: local weights (.safetensors, or .pth read with weights_only) instead of a download.
            image_size: side or (H, W) that images are resized to, multiples of the patch; None = taken as
                they are.
            pool: timm and export: `pooled` is the mean of the tokens, or the class token.
            pretrained: False = random weights, for tests only.
            device: where it runs.
        Raises:
            ValueError: a malformed spec, an unknown name, an option that the kind does not have.
            FileNotFoundError: weights that can neither be found nor downloaded.
        """
        kind, _, name = spec.partition(":")
        builders = {"timm": _from_timm, "open_clip": _from_open_clip, "export": _from_export}
        if kind not in builders or not name:
            raise ValueError(f"teacher {spec!r}: give timm:<name>, open_clip:<arch>/<tag> or export:<folder>")
        if pool not in ("mean", "cls"):
            raise ValueError(f"teacher pool {pool!r}: choose one of mean, cls")
        if file is not None and not Path(file).expanduser().is_file():
            raise FileNotFoundError(f"teacher.file {file} does not exist: give a local weights file of {spec}")
        if isinstance(image_size, int):
            image_size = (image_size, image_size)
        size = None if image_size is None else (int(image_size[0]), int(image_size[1]))
        parts = builders[kind](name, None if file is None else Path(file).expanduser(), size, pool, pretrained)
        teacher = cls(spec, image_size=size, **parts)
        if size is not None:
            teacher.grid(*size)
        return teacher.to(device)

    @torch.no_grad()
    def features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and pooled vector of images.

        Args:
            image: (B, 3, H, W), uint8 or float in [0, 1], on any device.
        Returns:
            tokens: (B, N, embed_dim) float32 after the final norm, raster order, without class and
                register tokens.
            pooled: (B, pooled_dim) float32, not normalised; open_clip: the joint-space image embedding.
        """
        return self.features_with_grad(image)

    def features_with_grad(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """`features` with a graph to the pixels; the weights stay frozen."""
        image = as_float(image.to(self.device))
        if self.image_size is not None and tuple(image.shape[-2:]) != self.image_size:
            image = F.interpolate(image, self.image_size, mode="bicubic", align_corners=False, antialias=True).clamp(
                0, 1
            )
        self.grid(*image.shape[-2:])  # a wrong size ends here, in words
        tokens, pooled = self._forward(((image - self._mean) / self._std).to(self.dtype))
        return tokens.float(), pooled.float()

    @torch.no_grad()
    def classify(self, pooled: Tensor) -> Tensor | None:
        """Class logits (B, K) of pooled vectors (B, pooled_dim); None without a class head."""
        if self.class_head is None:
            return None
        return self.class_head(pooled.to(self.device, self.dtype)).float()

    @property
    def has_text(self) -> bool:
        """Whether `text` works: the model has a text tower."""
        return self._text is not None

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (K, pooled_dim) of prompts; ValueError for a model without a text tower."""
        if self._text is None:
            raise ValueError(f"teacher {self.spec} has no text tower ({self._text_reason}): use open_clip:<arch>/<tag>")
        return F.normalize(self._text(list(prompts)).float(), dim=-1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (h, w) for images of that size; of `image_size` where images are resized."""
        return self._grid(*(self.image_size or (height, width)))

    @property
    def visual(self) -> ViT | None:
        """The timm ViT that an encoder can start from (see `EventEncoder.init_from`), or None."""
        return None if self._visual is None else self._visual()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self._model.parameters()).dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FrozenVFM:
        """Move and cast the weights, in place."""
        for module in self._parts():
            module.to(device=device, dtype=dtype)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def _parts(self) -> list[nn.Module]:
        return [self._model] if self.class_head is None else [self._model, self.class_head]


def as_float(image: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [0, 1]; floats pass; ValueError for anything but (B, 3, H, W)."""
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(image.shape)}")
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def _vit_forward(vit: ViT, pool: str, spec: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    if pool == "cls" and getattr(vit, "cls_token", None) is None:
        raise ValueError(f"teacher {spec} has no class token: set teacher.pool=mean")

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        prefix, tokens = vit_tokens(vit, x)
        return tokens, tokens.mean(1) if pool == "mean" else prefix[:, 0]

    return forward


def _from_timm(
    name: str, file: Path | None, size: tuple[int, int] | None, pool: str, pretrained: bool
) -> dict[str, Any]:
    vit = teacher_timm.build(name, file=file, size=size, pretrained=pretrained)
    return {
        "model": vit,
        "forward": _vit_forward(vit, pool, f"timm:{name}"),
        "visual": lambda: vit,
        "visual_reason": "",
        "embed_dim": vit.embed_dim,
        "pooled_dim": vit.embed_dim,
        "mean": vit.pretrained_cfg["mean"],
        "std": vit.pretrained_cfg["std"],
        "grid": lambda height, width: vit_grid(vit, height, width),
        "text_reason": "it was trained on images alone",
    }


def _from_open_clip(
    name: str, file: Path | None, size: tuple[int, int] | None, pool: str, pretrained: bool
) -> dict[str, Any]:
    if pool != "mean":
        raise ValueError("teacher pool = cls has no meaning for open_clip: pooled is its joint-space embedding")
    return teacher_clip.build(name, file=file, size=size, pretrained=pretrained)


def _from_export(
    name: str, file: Path | None, size: tuple[int, int] | None, pool: str, pretrained: bool
) -> dict[str, Any]:
    if file is not None:
        raise ValueError("teacher.file has no meaning for export:<folder>: the folder holds the weights")
    model = ImageModel.from_pretrained(name)
    if not pretrained:
        model = ImageModel.from_config(model.config)
    encoder = model.encoder
    mean, std = encoder.config["mean"] or [0.0] * 3, encoder.config["std"] or [1.0] * 3
    return {
        "model": encoder,
        "forward": _vit_forward(encoder.vit, pool, f"export:{name}"),
        "visual": lambda: encoder.vit,
        "visual_reason": "",
        "embed_dim": encoder.embed_dim,
        "pooled_dim": encoder.embed_dim,
        "mean": mean,
        "std": std,
        "native_size": (int(encoder.config["img_size"][0]), int(encoder.config["img_size"][1])),
        "grid": encoder.grid,
        "class_head": model.class_head,
        "classes": model.classes or None,
        "text_reason": "it has a class head instead",
    }
