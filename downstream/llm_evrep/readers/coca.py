"""Captions by open_clip's own CoCa: an image encoder, and a text decoder that reads its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from downstream.llm_evrep.readers import pixels
from downstream.llm_evrep.readers.base import OnAnswer, TokenScores, check_texts, fingerprint, to_uint8
from gep.models.teacher import as_float

if TYPE_CHECKING:
    from open_clip.coca_model import CoCa

_PRECISION = {"": "fp32", "float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}


class CoCaReader:
    """Greedy captions of a CoCa, and the probability of any text as its caption.

    A CoCa is a captioner: it answers no questions, so the prompt changes nothing. The caption ends with the
    model's end token or after max_new_tokens. open_clip's own `generate` needs transformers; the loop here
    needs nothing more.

    Args:
        model: open_clip.coca_model.CoCa; frozen here.
        tokenizer: open_clip's SimpleTokenizer.
        name: what `CoCaReader.name` starts with.
        max_new_tokens: most tokens of a caption; never more than the model's context holds.
        batch_size: images captioned at a time.

    Source: J. Yu et al., CoCa: Contrastive Captioners are Image-Text Foundation Models, 2022 (arXiv 2205.01917).
    """

    has_weights = True

    def __init__(
        self, model: CoCa, tokenizer: Any, *, name: str, max_new_tokens: int = 64, batch_size: int = 16
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval().requires_grad_(False), tokenizer, batch_size
        self.usage = {"calls": 0.0, "images": 0.0, "tokens": 0.0}
        self.max_new_tokens = max(1, min(max_new_tokens, model.context_length - 1))
        self.name = f"{name} max_new_tokens={self.max_new_tokens}"
        self._settings = dict(model.visual.preprocess_cfg)
        self._size: tuple[int, int] = (int(self._settings["size"][0]), int(self._settings["size"][1]))
        mode = self._settings["resize_mode"]
        if mode not in ("shortest", "squash") or (mode == "shortest" and self._size[0] != self._size[1]):
            raise ValueError(f"{name}: images of {self._size} by {mode!r} resizing are not known: choose another model")
        # What is not text: padding, a second start, and what the tokenizer has no word for.
        vocab = model.text_decoder.text_projection.shape[1]
        self._unsayable = torch.arange(vocab) >= tokenizer.vocab_size
        self._unsayable[[model.pad_id, tokenizer.sot_token_id]] = True

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.logit_scale.device

    def pixel_values(self, images: Tensor) -> Tensor:
        """What the model takes of images (B, 3, H, W), with a graph to them: resized, cropped, normalised."""
        cfg, images = self._settings, as_float(images.to(self.device))
        mode = "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic"
        if cfg["resize_mode"] == "squash":
            images = pixels.resize(images, self._size, mode)
        else:
            images = pixels.resize(
                images, pixels.shortest_edge(images.shape[-2], images.shape[-1], self._size[0]), mode
            )
            images = pixels.center_crop(images, self._size)
        return pixels.normalise(images, cfg["mean"], cfg["std"])

    @torch.no_grad()
    def describe(self, images: Tensor, prompt: str, *, on_answer: OnAnswer | None = None) -> list[str]:
        """See Reader.describe."""
        texts: list[str] = []
        for part in to_uint8(images).split(self.batch_size):
            for ids in self._greedy(part):
                texts.append(" ".join(self.tokenizer.decode(ids).split()))
                self.usage["tokens"] += len(ids)
                if on_answer is not None:
                    on_answer(len(texts) - 1, texts[-1])
            self.usage["calls"] += 1
            self.usage["images"] += len(part)
        return texts

    def token_log_probs(self, images: Tensor, texts: Sequence[str], prompt: str) -> list[TokenScores]:
        """See Reader.token_log_probs: of the model's full softmax, teacher-forced; the end token is left out.

        Raises:
            ValueError: a text longer than the model's context.
        """
        check_texts(images, texts)
        tokens = [tokenize(self.tokenizer, text) for text in texts]
        most = self.model.context_length - 1
        for text, (ids, _) in zip(texts, tokens):
            if len(ids) > most:
                raise ValueError(f"text of {len(ids)} tokens, {self.name} reads {most}: {text[:80]!r}")
        length = max((len(ids) for ids, _ in tokens), default=0)
        padded = torch.full((len(tokens), length + 1), self.model.pad_id)
        padded[:, 0] = self.tokenizer.sot_token_id
        for row, (ids, _) in zip(padded, tokens):
            row[1 : 1 + len(ids)] = torch.tensor(ids, dtype=row.dtype)
        padded = padded.to(self.device)
        logits = self._logits(self._see(images), padded)[:, :-1]
        scores = logits.float().log_softmax(-1).gather(-1, padded[:, 1:, None])[..., 0]
        return [TokenScores(spans, row[: len(spans)]) for row, (_, spans) in zip(scores, tokens)]

    def _see(self, images: Tensor) -> dict[str, Tensor]:
        seen = self.model(self.pixel_values(images).to(self.model.logit_scale.dtype))
        return {"image_latent": seen["image_features"], "image_embs": seen["image_embs"]}

    def _logits(self, seen: dict[str, Tensor], ids: Tensor) -> Tensor:
        """(B, L, V) for what follows each of ids (B, L); padding on the right changes none before it."""
        return self.model(None, ids, output_labels=False, **seen)["logits"]

    def _greedy(self, images: Tensor) -> list[list[int]]:
        seen, end = self._see(images), self.tokenizer.eot_token_id
        ids = torch.full((len(images), 1), self.tokenizer.sot_token_id, device=self.device)
        unsayable, ended = self._unsayable.to(self.device), torch.zeros(len(images), dtype=torch.bool)
        for _ in range(self.max_new_tokens):
            logits = self._logits(seen, ids)[:, -1].masked_fill(unsayable, float("-inf"))
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
            ended |= (ids[:, -1] == end).cpu()
            if ended.all():
                break
        rows = ids[:, 1:].tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text by open_clip's tokenizer, and the characters [start, end) that each covers.

    No token crosses white space, so each word is taken by itself; one that the tokenizer rewrites to another
    length (HTML entities, broken Unicode) is covered whole by each of its tokens.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    at = 0
    for word in text.split():
        start = text.index(word, at)
        at = start + len(word)
        tokens = tokenizer.encode(word)
        sizes = [len(_bytes(tokenizer, token)) for token in tokens]
        # Character that each byte of the lower-case word belongs to.
        owner = [k for k, char in enumerate(word) for _ in char.lower().encode()]
        end = 0
        for token, size in zip(tokens, sizes):
            begin, end = end, end + size
            alike = sum(sizes) == len(owner) and size
            spans.append((start + owner[begin], start + owner[end - 1] + 1) if alike else (start, at))
            ids.append(token)
    return ids, spans


def build(
    name: str,
    *,
    device: torch.device | str = "cpu",
    file: str = "",
    max_new_tokens: int = 64,
    dtype: str = "",
    batch_size: int = 16,
) -> CoCaReader:
    """A reader by "coca_<arch>" or "coca_<arch>/<tag>".

    Args:
        name: architecture and weights tag of open_clip; the tag may be left out with `file`.
        file: local weights (.safetensors, or .pt read with weights_only) instead of a download.
        dtype: of the weights: float32 (the default), bfloat16 or float16; the rest as CoCaReader.
    Raises:
        ValueError: an unknown architecture, tag or dtype, or weights of another model.
        FileNotFoundError: the weights are nowhere.
    """
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    spec = f"open_clip:{name}"
    arch, _, tag = name.partition("/")
    known = [model for model in open_clip.list_models() if model.lower().startswith("coca")]
    if arch not in known:
        raise ValueError(f"{spec}: the captioners of open_clip are {', '.join(known)}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if (tag or not file) and tag not in tags:
        names = " or ".join(f"{arch}/{known}" for known in tags)
        raise ValueError(f"{spec}: {arch} has no weights {tag!r}: choose {names or 'local ones by llm.file'}")
    if file and not Path(file).expanduser().is_file():
        raise FileNotFoundError(f"llm.file={file} does not exist: give a local weights file of {arch}")
    if dtype not in _PRECISION:
        raise ValueError(f"llm.dtype={dtype!r}: choose one of {', '.join(filter(None, _PRECISION))}")
    if "hf_model_name" in open_clip.get_model_config(arch)["text_cfg"]:
        raise ValueError(f"{spec} has a tokenizer of another library: choose a coca_ViT-*")
    create = partial(open_clip.create_model, arch, precision=_PRECISION[dtype], device=torch.device(device))
    label = f"{spec} dtype={dtype}" if dtype else spec
    if file:
        model = create(pretrained=None, pretrained_text=False)
        _load_file(model, Path(file).expanduser(), spec)
        label += f" @{fingerprint([Path(file).expanduser()])}"
    else:
        model = _download(spec, partial(create, pretrained=tag))
    return CoCaReader(
        model,
        SimpleTokenizer(context_length=model.context_length),
        name=label,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )


def _load_file(model: nn.Module, file: Path, spec: str) -> None:
    from open_clip.factory import load_checkpoint

    try:
        load_checkpoint(model, str(file), strict=True, weights_only=True)
    except Exception as error:  # a damaged file and other weights end in many types
        cause = " ".join(str(error).split())[:500]
        raise ValueError(f"llm.file={file} does not hold the weights of {spec}: {cause}") from error


def _download(spec: str, create: partial) -> nn.Module:
    try:
        return create()
    except Exception as error:  # httpx, huggingface_hub and urllib share no base class
        cause = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"the weights of {spec} could not be downloaded ({type(error).__name__}: {cause}): pass "
            "llm.file=<local .safetensors or .pt of this model>"
        ) from error


def _bytes(tokenizer: Any, token: int) -> bytes:
    piece = tokenizer.decoder[token].removesuffix("</w>")
    return bytes(tokenizer.byte_decoder[char] for char in piece)
