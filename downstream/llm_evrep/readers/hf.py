"""Any image-text-to-text model of transformers as a reader: LLaVA and its kin."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from downstream.llm_evrep.readers import hf_pixels
from downstream.llm_evrep.readers.base import NO_WEIGHTS, OnAnswer, TokenScores, check_texts, to_uint8

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reply(NamedTuple):
    """A question with its answer, as the model reads them."""

    text: str
    """both, one image token standing for the image"""
    tokens: list[int]
    """of the answer"""
    spans: list[tuple[int, int]]
    """characters of the answer that each of them covers; empty where there are none"""


class HFReader:
    """Greedy answers of a frozen image-text-to-text model, and the probability of any answer.

    The question goes through the processor's chat template, or, where it has none, follows the image token; a
    prompt that holds the image token itself is taken as it is. describe() sees what the processor makes of
    the image; token_log_probs computes the same pixel values differentiably, checks them against the
    processor's once a size, and freezes the weights.

    Args:
        model: AutoModelForImageTextToText; frozen here.
        processor: its AutoProcessor, with a fast tokenizer for token_log_probs.
        name: what `HFReader.name` starts with.
        max_new_tokens: longest answer.
        batch_size: images described at a time.

    Source: transformers, "Image-text-to-text" and "Chat templates" (https://huggingface.co/docs/transformers).
    """

    has_weights = True

    def __init__(
        self, model: PreTrainedModel, processor: Any, *, name: str, max_new_tokens: int = 64, batch_size: int = 16
    ) -> None:
        self.model, self.processor, self.tokenizer = model.eval().requires_grad_(False), processor, processor.tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.name = f"{name} max_new_tokens={max_new_tokens}"
        self.usage = {"calls": 0.0, "images": 0.0, "tokens": 0.0}
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # What a model's own settings say of sampling has no effect on greedy answers, and warns.
        settings = model.generation_config
        settings.do_sample, settings.temperature, settings.top_p, settings.top_k = False, None, None, None
        self._checked: set[tuple[int, int]] = set()
        forward = inspect.signature(model.forward).parameters
        self._can_keep = "logits_to_keep" in forward

    @torch.no_grad()
    def describe(self, images: Tensor, prompt: str, *, on_answer: OnAnswer | None = None) -> list[str]:
        """See Reader.describe."""
        question, texts = self.question(prompt), []
        for part in to_uint8(images).split(self.batch_size):
            inputs = self._inputs(part, [question] * len(part), side="left")
            ids = inputs["input_ids"]
            out = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            # Decoder-only models repeat the question; encoder-decoders, and some given embeddings, do not.
            length = ids.shape[1]
            new = out[:, length:] if out.shape[1] >= length and torch.equal(out[:, :length], ids) else out
            for text in self.tokenizer.batch_decode(new, skip_special_tokens=True):
                texts.append(text.strip())
                if on_answer is not None:
                    on_answer(len(texts) - 1, texts[-1])
            self.usage["calls"] += 1
            self.usage["images"] += len(part)
            self.usage["tokens"] += int((new != self.tokenizer.pad_token_id).sum())
        return texts

    def token_log_probs(self, images: Tensor, texts: Sequence[str], prompt: str) -> list[TokenScores]:
        """See Reader.token_log_probs: one teacher-forced pass over the question and each answer.

        Raises:
            ValueError: a model whose pixel values or tokens cannot be reproduced here; loss.estimator=score
                works with it.
        """
        check_texts(images, texts)
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise self._refuse("it is an encoder-decoder")
        answers = [self._reply(self.question(prompt), text) for text in texts]
        inputs = self._inputs(to_uint8(images), [answer.text for answer in answers], side="right")
        if "pixel_values" not in inputs:
            raise self._refuse(f"its processor gives {sorted(inputs)}, and no pixel_values")
        inputs["pixel_values"] = self._pixel_values(images, inputs["pixel_values"])
        ids, ends = inputs["input_ids"], inputs["attention_mask"].sum(1).tolist()
        for row, end, answer in zip(ids, ends, answers):
            if row[end - len(answer.tokens) : end].tolist() != answer.tokens:
                raise self._refuse("its processor cuts the answer into other tokens than its tokenizer")
        # Logits of the question are not needed, and there may be hundreds of them.
        first = min((end - len(answer.tokens) for end, answer in zip(ends, answers)), default=1) - 1
        keep = {"logits_to_keep": ids.shape[1] - first} if self._can_keep else {}
        logits = self.model(**inputs, **keep, use_cache=False).logits
        logits = logits[:, -(ids.shape[1] - first) :]
        scores = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, first + 1 :, None])[..., 0]
        found = []
        for row, end, answer in zip(scores, ends, answers):
            own = row[end - len(answer.tokens) - first - 1 : end - first - 1]
            said = [k for k, (start, stop) in enumerate(answer.spans) if stop > start]
            found.append(TokenScores([answer.spans[k] for k in said], own[said]))
        return found

    def question(self, prompt: str) -> str:
        """The text that the model reads before its answer, one image token standing for the image."""
        token = self._image_token()
        if token and token in prompt:
            return prompt
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            messages = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return f"{token}\n{prompt}\n" if token else prompt

    def _reply(self, question: str, text: str) -> Reply:
        if not getattr(self.tokenizer, "is_fast", False):
            raise self._refuse("its tokenizer does not say which characters a token covers (it is no fast one)")
        if (token := self._image_token()) and token in text:
            raise ValueError(f"text {text!r} holds the image token {token}: {self.name} cannot have said it")
        # Where the question does not end a word, the model begins its answer with a space.
        special = any(question.endswith(token) for token in self.tokenizer.all_special_tokens)
        before = question if special or not question or question[-1].isspace() else f"{question} "
        whole, start = before + text, len(before)
        encoded = self.tokenizer(
            whole, add_special_tokens=self._adds_special(whole), return_offsets_mapping=True, verbose=False
        )
        offsets = encoded["offset_mapping"]
        first = next((k for k, (a, b) in enumerate(offsets) if b > start and b > a), len(offsets))
        spans = [_trim(text, a - start, b - start) for a, b in offsets[first:]]
        return Reply(whole, encoded["input_ids"][first:], spans)

    def _inputs(self, images: Tensor, texts: list[str], *, side: str) -> dict[str, Any]:
        """The processor's inputs of uint8 images and texts, where the model is and in its dtype."""
        return {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in self._processed(images, texts, side=side).items()
            if isinstance(value, Tensor)
        }

    def _processed(self, images: Tensor, texts: list[str], *, side: str) -> Any:
        pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images.cpu()]
        return self.processor(
            images=[[picture] for picture in pictures],
            text=texts,
            add_special_tokens=self._adds_special(texts[0]),
            padding=True,
            padding_side=side,
            return_tensors="pt",
        )

    def _pixel_values(self, images: Tensor, own: Tensor) -> Tensor:
        processor, size = self.processor.image_processor, (images.shape[-2], images.shape[-1])
        try:
            if size not in self._checked:
                shown = to_uint8(images[:1]).cpu()
                hf_pixels.check(
                    shown, processor, self._processed(shown, [self.question("")], side="right")["pixel_values"]
                )
                self._checked.add(size)
            return hf_pixels.pixel_values(images.to(own.device), processor).to(own.dtype)
        except hf_pixels.Unknown as error:
            raise self._refuse(f"what its image processor does cannot be done differentiably ({error})") from error

    def _adds_special(self, text: str) -> bool:
        """Whether the tokenizer has to add its start token: a chat template may have written it."""
        start = self.tokenizer.bos_token
        return not (start and text.startswith(start))

    def _image_token(self) -> str:
        token = getattr(self.processor, "image_token", None) or getattr(self.tokenizer, "image_token", None)
        return "" if token is None else str(token)

    def _refuse(self, why: str) -> ValueError:
        return ValueError(f"{self.name}: {why}, so this model is as one that {NO_WEIGHTS}")


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """The span inside the text, without the white space that a word's first token begins with."""
    start, end = max(start, 0), max(end, 0)
    return max(start, end - len(text[start:end].lstrip())) if text[start:end].strip() else start, end
