"""Readers: frozen models that say what they see in an image, by one spec."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Literal

import torch

from downstream.llm_evrep.readers.base import OnAnswer, Reader, TokenScores, to_uint8
from downstream.llm_evrep.readers.cache import Answers, CachedReader, answer_key

__all__ = ["Answers", "CachedReader", "OnAnswer", "Reader", "TokenScores", "answer_key", "build_reader", "to_uint8"]

_KINDS = {
    "hf": "hf:<Hub id or folder>",
    "openai": "openai:<model>",
    "open_clip": "open_clip:coca_*[/tag]",
    "tagger": "tagger:<teacher spec or export folder>",
}
_ONLY_FOR = {
    "vocabulary": ("tagger",),
    "words": ("tagger",),
    "prompt_template": ("tagger",),
    "max_new_tokens": ("hf", "open_clip", "openai"),
    "file": ("tagger", "open_clip"),
    "quantise": ("hf",),
    "dtype": ("hf", "open_clip"),
    "batch_size": ("hf", "open_clip"),
    "base_url": ("openai",),
    "concurrency": ("openai",),
    "requests_per_minute": ("openai",),
    "price_in": ("openai",),
    "price_out": ("openai",),
}


def build_reader(
    spec: str,
    *,
    device: torch.device | str = "cpu",
    vocabulary: Sequence[str] | None = None,
    words: int = 1,
    prompt_template: str = "a photo of a {}",
    max_new_tokens: int = 64,
    quantise: Literal["", "8bit", "4bit"] = "",
    dtype: str = "",
    file: str = "",
    batch_size: int = 16,
    base_url: str = "",
    concurrency: int = 4,
    requests_per_minute: float = 0.0,
    price_in: float = 0.0,
    price_out: float = 0.0,
) -> Reader:
    """Build a reader; what a kind has no use for is left aside, with a warning where it was asked for.

    Args:
        spec: "hf:<Hub id or folder>", "openai:<model>", "open_clip:coca_*[/tag]" or "tagger:<teacher spec
            or export folder>".
        device: where its weights are.
        vocabulary: tagger: words to choose from; None = the classes of its class head.
        words: tagger: how many it says.
        prompt_template: tagger with a text tower: "{}" stands for the word.
        max_new_tokens: longest answer of the others.
        quantise: hf: weights in 8 or 4 bits, by bitsandbytes.
        dtype: hf, open_clip: of the weights, e.g. "bfloat16"; "" = as saved, or float32.
        file: tagger, open_clip: local weights instead of a download.
        batch_size: hf, open_clip: images described at a time.
        base_url, concurrency, requests_per_minute, price_in, price_out: openai: see OpenAIReader.
    Raises:
        ValueError: an unknown kind, or settings that the kind refuses.
        FileNotFoundError: weights that are nowhere to be found.
    """
    given = dict(locals())
    kind, _, name = spec.partition(":")
    if kind not in _KINDS or not name:
        raise ValueError(f"reader {spec!r}: give one of {', '.join(_KINDS.values())}")
    for setting, kinds in _ONLY_FOR.items():
        usual = inspect.signature(build_reader).parameters[setting].default
        if (given[setting] or usual) != usual and kind not in kinds:
            warnings.warn(f"llm.{setting} has no effect on {spec}: leave it out", stacklevel=2)
    if kind == "tagger":
        from downstream.llm_evrep.readers import tagger

        return tagger.build(
            name, device=device, vocabulary=vocabulary, words=words, template=prompt_template, file=file
        )
    if kind == "open_clip":
        from downstream.llm_evrep.readers import coca

        return coca.build(
            name, device=device, file=file, max_new_tokens=max_new_tokens, dtype=dtype, batch_size=batch_size
        )
    if kind == "hf":
        from downstream.llm_evrep.readers import hf_load

        return hf_load.build(
            name,
            device=device,
            max_new_tokens=max_new_tokens,
            quantise=quantise,
            dtype=dtype,
            batch_size=batch_size,
        )
    from downstream.llm_evrep.readers.openai import OpenAIReader

    return OpenAIReader(
        name,
        base_url=base_url,
        max_new_tokens=max_new_tokens,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        price_in=price_in,
        price_out=price_out,
    )
