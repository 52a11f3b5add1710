"""Classes named in words: prompts and templates in the way of open_clip, and the text tower that reads them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeAlias

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from gep.models.encoder import EventEncoder
from gep.models.teacher import FrozenVFM

Templates: TypeAlias = str | Sequence[str | Callable[[str], str]] | None
"""Sentences around a class name: "openai" (80), "simple" (7), format strings ("a photo of a {}"), functions; None = the
words are the prompts themselves."""
_NAMED = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
_AT_ONCE = 512  # prompts


def text_tower(spec: str | None, encoder: EventEncoder, file: str | os.PathLike[str] | None = None) -> FrozenVFM:
    """The image-text model that an encoder was aligned with.

    Args:
        spec: of the export's teacher, "open_clip:<arch>/<tag>".
        encoder: its `embed` is what is compared with the words.
        file: local weights instead of a download.
    Raises:
        ValueError: no teacher on record, one without a text tower, or of another width.
        FileNotFoundError: weights that can neither be found nor downloaded.
    """
    if not spec or not spec.startswith("open_clip:"):
        known = f"was aligned with {spec}, which has no text tower" if spec else "does not say what it was aligned with"
        raise ValueError(
            f"words need an encoder aligned with an open_clip model, and this export {known}: give class vectors "
            "(gep.models.words.class_vectors of a FrozenVFM)"
        )
    teacher = FrozenVFM.from_spec(spec, file=file)
    width = encoder.config["head_dim"] or encoder.embed_dim
    if width != teacher.pooled_dim:
        raise ValueError(
            f"the encoder's vectors have {width} features, those of {spec} {teacher.pooled_dim}: it was aligned with "
            "another model"
        )
    return teacher


@torch.no_grad()
def class_vectors(teacher: FrozenVFM, words: Sequence[str], templates: Templates = None) -> Tensor:
    """Unit vectors of classes: those of a class's prompts, averaged and brought to length 1 again.

    Args:
        teacher: with a text tower.
        words: K prompts, or with templates K class names.
        templates: each is filled in with every name.
    Returns:
        (K, P) float32.
    Raises:
        ValueError: no words, an unknown name of templates, or a format string without {}.
    Source: Radford et al. 2021 (arXiv 2103.00020), Sec. 3.1.4, as open_clip.build_zero_shot_classifier.
    """
    if isinstance(words, str) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"words={words!r}: give a list of strings, one a class")
    prompts = _prompts(list(words), templates)
    vectors = torch.cat([teacher.text(prompts[i : i + _AT_ONCE]) for i in range(0, len(prompts), _AT_ONCE)])
    return F.normalize(vectors.unflatten(0, (len(words), -1)).mean(dim=1), dim=-1)


def _prompts(words: list[str], templates: Templates) -> list[str]:
    if templates is None:
        return words
    if isinstance(templates, str):
        if templates not in _NAMED:
            raise ValueError(f"templates={templates!r}: choose one of {', '.join(_NAMED)}, or give a list of sentences")
        templates = _NAMED[templates]
    if not templates or any(isinstance(one, str) and "{" not in one for one in templates):
        raise ValueError(
            f"templates={list(templates)}: give sentences with a {{}} for the class, such as 'a photo of a {{}}'"
        )
    return [one.format(word) if isinstance(one, str) else one(word) for word in words for one in templates]
