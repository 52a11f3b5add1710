"""What a reader is asked to choose from, and which class its free-form answer names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

TEMPLATE = (
    "Which one of these does the image show: {classes}? Answer with one of them, word for word, and nothing else."
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER = {word: str(value) for value, word in enumerate(DIGITS)}
_CLAUSE = re.compile(r"[.!?;\n]+(?=\s|$)|\b(?:but|however|although|though)\b")
_REFUSAL = re.compile(
    r"\b(?:can\s?not|can['’]?t|couldn['’]?t|could not|unable to|impossible to|not (?:able|possible) to|don['’]?t know"
    r"|do not know|none of)\b"
)
_NEGATION = re.compile(r"(?:\b(?:not|neither|nor)|n['’]t)(?:\s+(?:an?|the))?\W*$")
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)
_TOKEN = re.compile(r"[^\W_]+")


def classification_prompt(classes: Sequence[str], *, seed: int, template: str = TEMPLATE) -> str:
    """The question, with the candidates in an order drawn by the seed.

    Args:
        classes: names; underscores are written as spaces, and of several equal names one.
        seed: of the permutation; the same for every image, so that a reader is asked one question.
        template: "{classes}" stands for the candidates, joined by ", " ("; " where a name holds a comma).
    Raises:
        ValueError: no classes, or a template without "{classes}".
    """
    if not classes:
        raise ValueError("no classes to choose from: the data set has none; give class_names")
    if "{classes}" not in template:
        raise ValueError(f"template={template!r} has no place for the candidates: write {{classes}} where they go")
    names = list(dict.fromkeys(said(name) for name in classes))
    order = np.random.default_rng(seed).permutation(len(names))
    between = "; " if any("," in name for name in names) else ", "
    return template.replace("{classes}", between.join(names[i] for i in order))


def said(name: str) -> str:
    """A class as it is said to people: underscores are spaces."""
    return " ".join(name.replace("_", " ").split())


def parse_answer(text: str, classes: Sequence[str]) -> int:
    """The class that a free-form answer names, -1 where it names none or refuses.

    1. Compared are words: NFKC, lower case, underscores and punctuation as spaces; "zero" to "ten" are 0 to 10
       (but not the "one" of "one of"), and a plural is its singular. Reasoning before "</think>" is left out.
    2. A class is mentioned by its whole name, or, where the name holds commas, by one of the parts between them.
    3. Not counted is a mention behind "not (a)", "neither" or "nor", and one behind "cannot", "unable to", "do not
       know", "none of" and the like in the same clause.
    4. Of overlapping mentions the longest counts; of those that are left, the first in the text.
    5. Of classes with equal names the first in the list is meant; a name as it is written wins over one that is equal
       to it in the singular only.

    Args:
        text: the answer.
        classes: names in label order.
    Returns:
        Index into classes, or -1.
    """
    names, longest = _names(tuple(classes))
    text = unicodedata.normalize("NFKC", _THOUGHT.sub("", text)).lower().replace("_", " ")
    found: list[tuple[int, int, int]] = []  # (-words, first word, class)
    place = 0
    for clause in _clauses(text):
        tokens = list(_TOKEN.finditer(clause))
        words = [_number(tokens, i) for i in range(len(tokens))]
        refused = _REFUSAL.search(clause)
        for i in range(len(words)):
            if (refused and tokens[i].start() >= refused.start()) or _NEGATION.search(clause, 0, tokens[i].start()):
                continue
            for length in range(min(longest, len(words) - i), 0, -1):
                own = tuple(words[i : i + length])
                label = names.get(own, names.get(_singular(own)))
                if label is not None:
                    found.append((-length, place + i, label))
        place += len(words)
    kept: list[tuple[int, int, int]] = []
    for length, start, label in sorted(found):
        if all(start >= other - more or start - length <= other for more, other, _ in kept):
            kept.append((length, start, label))
    return min(kept, key=lambda mention: mention[1])[2] if kept else -1


@lru_cache(maxsize=8)
def _names(classes: tuple[str, ...]) -> tuple[dict[tuple[str, ...], int], int]:
    """Words of each name -> label, and the most words of a name."""
    exact: dict[tuple[str, ...], int] = {}
    loose: dict[tuple[str, ...], int] = {}
    # Whole names first: "crane" is the class of that name before it is a part of another's.
    parts = [(name, label) for label, name in enumerate(classes)]
    parts += [(part, label) for name, label in parts if "," in name for part in name.split(",")]
    for name, label in parts:
        plain = unicodedata.normalize("NFKC", name).lower().replace("_", " ")
        words = tuple(_NUMBER.get(word, word) for word in _TOKEN.findall(plain))
        if words:
            exact.setdefault(words, label)
            loose.setdefault(_singular(words), label)
    return loose | exact, max(map(len, exact), default=0)


def _clauses(text: str) -> list[str]:
    """Pieces of a text in which a refusal reaches to the end."""
    return _CLAUSE.split(text)


def _number(tokens: Sequence[re.Match[str]], i: int) -> str:
    word = tokens[i].group()
    if word == "one" and i + 1 < len(tokens) and tokens[i + 1].group() == "of":
        return word
    return _NUMBER.get(word, word)


def _singular(words: tuple[str, ...]) -> tuple[str, ...]:
    """Words with the ending of a plural off the last one: "faces" and "face", "berries" and "berry" are equal."""
    last = words[-1]
    if len(last) > 4 and last.endswith("ies"):
        last = last[:-3] + "y"
    elif len(last) > 4 and last.endswith(("ches", "shes", "xes", "sses")):
        last = last[:-2]
    elif len(last) > 3 and last.endswith("s") and not last.endswith(("ss", "us", "is")):
        last = last[:-1]
    return (*words[:-1], last if last == words[-1] else _NUMBER.get(last, last))
