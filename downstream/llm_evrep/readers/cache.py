"""Answers kept on disk: whatever a reader has once been asked and paid for is not asked again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from downstream.llm_evrep.readers.base import OnAnswer, Reader, TokenScores, to_uint8


def answer_key(reader_name: str, prompt: str, image: Tensor) -> str:
    """The key of an answer: sha256 over the reader's name, the prompt, and the image's size and pixels.

    Args:
        reader_name: Reader.name, settings included.
        prompt: the question.
        image: (3, H, W) uint8.
    Returns:
        64 hex digits.
    """
    assert image.dtype == torch.uint8 and image.ndim == 3, "keys are of images as the reader sees them: (3, H, W) uint8"
    digest = hashlib.sha256()
    # Lengths first: no two different triples give the same bytes.
    for part in (reader_name.encode(), prompt.encode(), str(tuple(image.shape)).encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    digest.update(image.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Answers:
    """Answers by key in a folder of append-only JSON lines, one file a rank; every rank reads all of them.

    An answer is on disk before `put` returns, unless it says otherwise. A line that a crash tore is dropped, and its
    answer asked again.

    Args:
        folder: made where missing; holds answers-<rank>.jsonl.
        rank: whose file new answers go to. Two running processes must not have the same.
    """

    def __init__(self, folder: str | os.PathLike[str], *, rank: int = 0) -> None:
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"answers {self.folder} is a file: give a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / f"answers-{rank}.jsonl"
        self._texts: dict[str, str] = {}
        self._lock = threading.Lock()
        _drop_torn_tail(self.file)
        self.refresh()

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, key: str) -> str | None:
        """The answer, None where there is none yet."""
        return self._texts.get(key)

    def put(self, key: str, text: str, *, durable: bool = True, **meta: str | float) -> None:
        """Write an answer to disk, then know it.

        Args:
            key: of `answer_key`.
            text: the answer.
            durable: wait until the disk has it (about 10 ms), so that not even a power cut loses it; without, the
                answer survives the process alone.
            meta: JSON values kept beside it for whoever reads the file.
        """
        line = json.dumps({"key": key, "text": text, **meta}) + "\n"
        with self._lock:  # answers of an endpoint come from several threads
            with self.file.open("ab") as stream:
                stream.write(line.encode())
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
            self._texts[key] = text

    def refresh(self) -> None:
        """Read what other ranks have written since."""
        for file in sorted(self.folder.glob("answers-*.jsonl")):
            *lines, _torn = file.read_bytes().split(b"\n")  # what follows the last newline is not a line yet
            bad = []
            for number, line in enumerate(lines, start=1):
                try:
                    answer = json.loads(line)
                    key, text = answer["key"], answer["text"]
                except (ValueError, KeyError, TypeError):
                    bad.append(number)
                    continue
                self._texts[key] = text
            if bad:
                warnings.warn(f"{file}: lines {bad} are no answers; what they held is asked again", stacklevel=2)


class CachedReader:
    """A reader that asks another one only what `answers` does not hold, and equal images of a batch once.

    Attributes:
        reader: the one that is asked.
        hits, misses: images answered without and with it, so far.
    """

    def __init__(self, reader: Reader, answers: Answers) -> None:
        self.reader, self.answers = reader, answers
        self.name, self.has_weights = reader.name, reader.has_weights
        self.hits = self.misses = 0

    @property
    def usage(self) -> dict[str, float]:
        """Of the reader that is asked."""
        return self.reader.usage

    def describe(self, images: Tensor, prompt: str, *, on_answer: OnAnswer | None = None) -> list[str]:
        """See Reader.describe."""
        images = to_uint8(images)
        keys = [answer_key(self.name, prompt, image) for image in images.cpu()]
        places: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            places.setdefault(key, []).append(index)
        known = {key: text for key in places if (text := self.answers.get(key)) is not None}
        missing = [key for key in places if key not in known]
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)

        def tell(key: str, text: str) -> None:
            for index in places[key]:
                if on_answer is not None:
                    on_answer(index, text)

        def keep(index: int, text: str) -> None:
            # What local weights say costs less than the disk's word for it, thousands of times.
            self.answers.put(missing[index], text, durable=not self.has_weights, reader=self.name)
            known[missing[index]] = text
            tell(missing[index], text)

        for key, text in tuple(known.items()):
            tell(key, text)
        if missing:
            first = torch.tensor([places[key][0] for key in missing], device=images.device)
            # Autocast is the trainer's; the cache knows a reader by its own precision.
            with torch.autocast(images.device.type, enabled=False):
                texts = self.reader.describe(images[first], prompt, on_answer=keep)
            for index, text in enumerate(texts):
                if missing[index] not in known:  # a reader that does not call on_answer
                    keep(index, text)
        return [known[key] for key in keys]

    def token_log_probs(self, images: Tensor, texts: Sequence[str], prompt: str) -> list[TokenScores]:
        """See Reader.token_log_probs; probabilities are not cached."""
        return self.reader.token_log_probs(images, texts, prompt)


def _drop_torn_tail(file: Path) -> None:
    if not file.is_file() or not (size := file.stat().st_size):
        return
    with file.open("rb+") as stream:
        whole = stream.read().rfind(b"\n") + 1
        if whole < size:
            stream.truncate(whole)
