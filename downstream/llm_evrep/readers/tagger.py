"""Tagger: the words of a vocabulary that a frozen image model finds likeliest; tiny, and differentiable."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.llm_evrep.readers.base import OnAnswer, TokenScores, check_texts, fingerprint, short_path, to_uint8
from gep import export
from gep.models import FrozenVFM
from gep.models.teacher import as_float

SEPARATOR = ", "
_KINDS = ("timm:", "open_clip:", "export:")


class Tagger:
    """Says the likeliest words of an image, by a class head or by similarity to a text tower's vectors.

    Words are drawn without replacement from the softmax over the vocabulary (Plackett-Luce): describe()
    says the most probable `words` in order, token_log_probs gives the probability of any such answer. A
    token is a word. The prompt changes nothing.

    Args:
        teacher: with a class head, or a text tower.
        name: what `Tagger.name` starts with.
        vocabulary: what it can say; None = the classes of the class head.
        words: how many it says.
        template: "{}" stands for the word in what the text tower reads.
    Raises:
        ValueError: no vocabulary, or one that does not fit the teacher.

    Source: R. L. Plackett, The analysis of permutations, 1975 (the distribution of an ordered draw).
    """

    has_weights = True

    def __init__(
        self,
        teacher: FrozenVFM,
        *,
        name: str,
        vocabulary: Sequence[str] | None = None,
        words: int = 1,
        template: str = "a photo of a {}",
    ) -> None:
        self.teacher, self.usage = teacher, {"calls": 0.0, "images": 0.0}
        self._text: Tensor | None = None
        if teacher.classes:
            if vocabulary and _said(vocabulary) != _said(teacher.classes):
                raise ValueError(f"llm.vocabulary has no effect on {name}, which says its own classes: leave it out")
            self.vocabulary = _said(teacher.classes)
        elif not teacher.has_text:
            raise ValueError(f"{name} has neither classes nor a text tower: give open_clip:<arch>/<tag> or an export")
        elif not vocabulary:
            raise ValueError(f"{name} needs words to choose from: set llm.vocabulary to a list of them")
        else:
            if "{}" not in template:
                raise ValueError(f"llm.prompt_template {template!r} has no {{}} for the word: e.g. 'a photo of a {{}}'")
            self.vocabulary = _said(vocabulary)
            self._text = teacher.text([template.format(word) for word in self.vocabulary])
            digest = hashlib.sha256("\n".join([template, *self.vocabulary]).encode()).hexdigest()[:12]
            name = f"{name} vocabulary={digest}"
        if len(set(self.vocabulary)) < len(self.vocabulary) or not all(self.vocabulary):
            raise ValueError(f"{name}: words of a vocabulary must differ and not be empty: {self.vocabulary[:20]}")
        if not 1 <= words <= len(self.vocabulary):
            raise ValueError(f"llm.words = {words}: between 1 and the {len(self.vocabulary)} words of the vocabulary")
        self.words = words
        self.name = f"{name} words={words}"
        # Longest first: a word may be the start of another.
        self._longest_first = sorted(enumerate(self.vocabulary), key=lambda pair: -len(pair[1]))

    def logits(self, images: Tensor) -> Tensor:
        """Scores (B, K) of the vocabulary, float32, with a graph to images (B, 3, H, W) of any size."""
        images = as_float(images.to(self.teacher.device))
        size = self.teacher.image_size or self.teacher.native_size
        if size is not None and tuple(images.shape[-2:]) != size:
            images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        pooled = self.teacher.features_with_grad(images)[1]
        head, scale = self.teacher.class_head, self.teacher.logit_scale
        if self._text is None:
            assert head is not None
            return head(pooled.to(self.teacher.dtype)).float()
        assert scale is not None
        return scale * F.normalize(pooled, dim=-1) @ self._text.T

    @torch.no_grad()
    def describe(self, images: Tensor, prompt: str, *, on_answer: OnAnswer | None = None) -> list[str]:
        """See Reader.describe: the top words, joined by ", "; equal scores go by the vocabulary's order."""
        order = self.logits(to_uint8(images)).sort(dim=-1, descending=True, stable=True).indices[:, : self.words]
        texts = [SEPARATOR.join(self.vocabulary[k] for k in row) for row in order.tolist()]
        self.usage["calls"] += 1
        self.usage["images"] += len(texts)
        for index, text in enumerate(texts):
            if on_answer is not None:
                on_answer(index, text)
        return texts

    def token_log_probs(self, images: Tensor, texts: Sequence[str], prompt: str) -> list[TokenScores]:
        """See Reader.token_log_probs: each word given those before it, which cannot be said again.

        Raises:
            ValueError: a text that is not different words of the vocabulary joined by ", ".
        """
        check_texts(images, texts)
        said = [self._parse(text) for text in texts]
        scores, total = self.logits(images), []
        device = scores.device
        for step in range(max((len(words) for words in said), default=0)):
            words = [sentence[step][0] if step < len(sentence) else -1 for sentence in said]
            column = torch.tensor(words, device=device)[:, None]
            total.append(scores.log_softmax(-1).gather(1, column.clamp(min=0)))
            now = torch.arange(scores.shape[1], device=device) == column  # nothing where a text has ended
            if step + 1 < scores.shape[1]:
                scores = scores.masked_fill(now, float("-inf"))
        return [
            TokenScores([span for _, span in sentence], torch.cat([column[b] for column in total[: len(sentence)]]))
            for b, sentence in enumerate(said)
        ]

    def _parse(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """(word's index, its characters) in order; words may themselves hold the separator."""
        words: list[tuple[int, tuple[int, int]]] = []
        at = 0
        while True:
            index = next((k for k, word in self._longest_first if _says(text, word, at)), None)
            if index is None:
                raise ValueError(
                    f"text {text!r}: {self.name} says words of its vocabulary joined by {SEPARATOR!r}, and "
                    f"{text[at : at + 40]!r} starts with none; describe the images with the same reader, and leave "
                    "loss.soft_text=description"
                )
            word = self.vocabulary[index]
            if index in [said for said, _ in words]:
                raise ValueError(f"text {text!r} says {word!r} twice: {self.name} cannot")
            words.append((index, (at, at + len(word))))
            if at + len(word) == len(text):
                return words
            at += len(word) + len(SEPARATOR)


def build(
    name: str,
    *,
    device: torch.device | str = "cpu",
    vocabulary: Sequence[str] | None = None,
    words: int = 1,
    template: str = "a photo of a {}",
    file: str = "",
) -> Tagger:
    """A tagger by "<teacher spec>" or the folder of an exported image model.

    Args:
        name: "open_clip:<arch>/<tag>", "export:<folder>" or a folder.
        file: local weights of an open_clip model instead of a download; the rest as Tagger.
    Raises:
        FileNotFoundError: the weights are nowhere.
        ValueError: see Tagger and FrozenVFM.from_spec.
    """
    spec = name if name.startswith(_KINDS) else f"export:{name}"
    kind, _, rest = spec.partition(":")
    try:
        teacher = FrozenVFM.from_spec(spec, file=file or None, device=device)
    except FileNotFoundError as error:
        cause = str(error).split(" Two ways on:")[0]
        raise FileNotFoundError(
            f"reader tagger:{name}: {cause}; pass llm.name=tagger:<folder of an exported image model>, or "
            "llm.file=<local weights> with llm.name=tagger:open_clip:<arch>"
        ) from error
    if kind == "export":  # an export that was trained anew, or calls its classes otherwise, is another reader
        folder = export.fetch(rest)  # of the Hub: what was downloaded for the teacher
        label = f"tagger:{short_path(rest)}@{fingerprint(folder / name for name in (export.CONFIG, export.WEIGHTS))}"
    else:
        label = f"tagger:{spec}" + (f"@{fingerprint([Path(file).expanduser()])}" if file else "")
    return Tagger(teacher, name=label, vocabulary=vocabulary, words=words, template=template)


def _said(names: Sequence[str]) -> list[str]:
    return [" ".join(str(name).replace("_", " ").split()) for name in names]


def _says(text: str, word: str, at: int) -> bool:
    end = at + len(word)
    return text.startswith(word, at) and (end == len(text) or text.startswith(SEPARATOR, end))
