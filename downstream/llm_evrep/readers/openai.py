"""Reader behind any endpoint that speaks OpenAI's chat completions: GPT-4o, vLLM, Ollama and others."""

from __future__ import annotations

import base64
import io
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NoReturn

from PIL import Image
from torch import Tensor

from downstream.llm_evrep.readers.base import NO_WEIGHTS, OnAnswer, to_uint8
from downstream.llm_evrep.readers.endpoint import KEY, Endpoint, Refused

DEFAULT_URL = "https://api.openai.com/v1"
_FILTERED = ("content_filter", "content_policy_violation")


class OpenAIReader:
    """A language model seen only through its answers.

    The key comes from the environment (OPENAI_API_KEY; none is sent where it is not set, as local servers want
    none). It is part of no attribute, message or file. Answers are kept under the model's name: another server with a
    model of the same name is taken for the same reader, unless the name says "<model>@<url>".

    Args:
        model: name at the endpoint, or "<model>@http(s)://…" with the endpoint's address.
        base_url: of the endpoint, up to what stands before /chat/completions; empty = OPENAI_BASE_URL, else OpenAI's.
        max_new_tokens: most tokens of an answer.
        seed: sent along; with temperature 0 as repeatable as the server makes it.
        detail: OpenAI's resolution of images (low, high, auto); empty leaves it to the server.
        concurrency: requests in flight at a time, on each rank.
        requests_per_minute: most requests that begin in a minute, retries too, over all ranks; 0 = no limit.
        price_in, price_out: USD per million tokens read and written, for the count of cost.
        timeout_s, tries, backoff_s: see `Endpoint`.
    Raises:
        ValueError: a setting out of range, or no key for OpenAI's own endpoint.

    Source: OpenAI API reference, chat completions (https://platform.openai.com/docs/api-reference/chat).
    """

    has_weights = False

    def __init__(
        self,
        model: str,
        *,
        base_url: str = "",
        max_new_tokens: int = 64,
        seed: int = 0,
        detail: str = "",
        concurrency: int = 4,
        requests_per_minute: float = 0.0,
        price_in: float = 0.0,
        price_out: float = 0.0,
        timeout_s: float = 120.0,
        tries: int = 6,
        backoff_s: float = 1.0,
    ) -> None:
        named, _, own_url = re.sub(r"@(?=https?://)", "\n", model, count=1).partition("\n")
        if not named:
            raise ValueError("llm.name=openai: names no model; write openai:<model>, as the endpoint calls it")
        if concurrency < 1 or max_new_tokens < 1:
            raise ValueError(
                f"llm.concurrency={concurrency} and llm.max_new_tokens={max_new_tokens} must be at least 1"
            )
        if price_in < 0 or price_out < 0:
            raise ValueError(f"llm.price_in={price_in} and llm.price_out={price_out}: a price is not negative")
        url = (own_url or base_url or os.environ.get("OPENAI_BASE_URL", "") or DEFAULT_URL).rstrip("/")
        self.endpoint = Endpoint(
            url,
            "/chat/completions",
            requests_per_minute=requests_per_minute,
            timeout_s=timeout_s,
            tries=tries,
            backoff_s=backoff_s,
        )
        if url == DEFAULT_URL and not os.environ.get(KEY, "").strip():
            raise ValueError(f"{KEY} is not set: export the key of {DEFAULT_URL}, or set llm.base_url")
        self.model, self.max_new_tokens, self.seed, self.detail = named, max_new_tokens, seed, detail
        self.concurrency, self.price_in, self.price_out = concurrency, price_in, price_out
        self.name = f"openai:{model.rstrip('/')} temperature=0 seed={seed} max_new_tokens={max_new_tokens}"
        self.name += f" detail={detail}" if detail else ""
        self._options: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0, "seed": seed}
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("calls", "images", "tokens_in", "tokens_out", "refused", "cost"), 0.0)

    def __repr__(self) -> str:
        return f"OpenAIReader({self.name!r})"

    @property
    def usage(self) -> dict[str, float]:
        """Counts so far: answers, images, tokens as the server counts them, empty answers, cost [USD], retries."""
        with self._lock:
            return {**self._counts, "retries": float(self.endpoint.retries)}

    def describe(self, images: Tensor, prompt: str, *, on_answer: OnAnswer | None = None) -> list[str]:
        """See Reader.describe. An answer that the model or its filter withholds is an empty one.

        Raises:
            ValueError, ConnectionError: see `Endpoint.post`; what was answered till then went to on_answer.
        """
        pixels = to_uint8(images).cpu().permute(0, 2, 3, 1).contiguous().numpy()
        answers = [""] * len(pixels)
        stop, told = threading.Event(), threading.Lock()

        def ask(index: int) -> None:
            if stop.is_set():
                return
            text = self._ask(_data_url(pixels[index]), prompt, stop)
            with told:
                answers[index] = text
                if on_answer is not None:
                    on_answer(index, text)

        with ThreadPoolExecutor(self.concurrency, "reader") as pool:
            futures = [pool.submit(ask, index) for index in range(len(pixels))]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                stop.set()  # requests in flight still end, and their answers are kept
                raise
        return answers

    def token_log_probs(self, images: Tensor, texts: Sequence[str], prompt: str) -> NoReturn:
        """Not known of a model behind an endpoint.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.name} {NO_WEIGHTS}")

    def _ask(self, image: str, prompt: str, stop: threading.Event) -> str:
        picture: dict[str, str] = {"url": image, **({"detail": self.detail} if self.detail else {})}
        content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": picture}]
        while True:
            options = self._options
            payload = {"model": self.model, "messages": [{"role": "user", "content": content}], **options}
            try:
                text, usage = self.endpoint.post(payload, _answer, stop)
                break
            except Refused as refused:
                if refused.reply.status == 400 and refused.reply.error.get("code") in _FILTERED:
                    text, usage = "", {}
                    break
                param = str(refused.reply.error.get("param"))
                if not str(refused.reply.error.get("code")).startswith("unsupported") or param not in options:
                    raise
                with self._lock:
                    self._options = _without(self._options, param)
        tokens = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
        with self._lock:
            cost = (tokens[0] * self.price_in + tokens[1] * self.price_out) / 1e6
            news = {"calls": 1, "images": 1, "tokens_in": tokens[0], "tokens_out": tokens[1], "cost": cost}
            for name, value in {**news, "refused": not text.strip()}.items():
                self._counts[name] += value
        return text


def _answer(reply: Any) -> tuple[str, dict[str, Any]]:
    """The text and the usage of a chat completion; another form raises LookupError, TypeError or AttributeError."""
    content = reply["choices"][0]["message"].get("content")
    if isinstance(content, list):  # parts, as some servers send them
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError
    usage = reply.get("usage")
    text = (content or "").encode("utf-8", "replace").decode()  # half characters can be sent as JSON, but not saved
    return text, usage if isinstance(usage, dict) else {}


def _without(options: dict[str, Any], param: str) -> dict[str, Any]:
    """Options less one that the model says it does not take, as reasoning models do."""
    fitting = {name: value for name, value in options.items() if name != param}
    if param == "max_tokens" and param in options:
        fitting["max_completion_tokens"] = options[param]
    return fitting


def _count(tokens: Any) -> float:
    return float(tokens) if isinstance(tokens, int | float) and tokens > 0 else 0.0


def _data_url(pixels: Any) -> str:
    """uint8 (H, W, 3) as a PNG in a data: URL."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
