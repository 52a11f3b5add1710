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
# Words that a negation reaches over; "it is not 3 it is 7" and "not 3 rather 7" say something new.
_BETWEEN = r"(?:\s+(?:think|believe)(?:\s+(?:it|this|that)(?:\s+is|['’]s)?)?|\s+(?!(?:it|is|rather)\b)[^\W\d]+){0,3}"
_NEGATION = re.compile(
    rf"(?:(?:\b(?:not|neither|nor|without|rather than|instead of)|n['’]t){_BETWEEN}|\bno)[\s\"'“”‘’(\[*]*$"
)
_ALTERNATIVE = re.compile(r"^[\s\"'“”‘’)\]*,]*\b(?:or|nor)\b(?:\s+(?:an?|the))?[\s\"'“”‘’(\[*]*$")
_THOUGHT = re.compile(r"^.*</think>|<think>.*$", re.DOTALL)
_TOKEN = re.compile(r"[^\W_]+")
_REACH = 120  # characters before a mention in which a negation is looked for


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
       (but not the "one" of "one of"), and a plural is its singular. Reasoning before "</think>", or behind a
       "<think>" that was cut off, is left out.
    2. A class is mentioned by its whole name, or, where the name holds commas, by one of the parts between them.
    3. Not counted is a mention right behind "no", or behind "not", "neither", "nor", "without", "rather than" or
       "instead of" with up to three words and no comma between ("does not look like a 3"), and what is joined to it by
       "or" or "nor"; nor one behind "cannot", "unable to", "do not know", "none of" and the like in the same clause.
    4. Of overlapping mentions the longest counts; of those that are left, the first in the text. The word "one" counts
       where nothing else is mentioned: it rarely is a name ("this one is a 7").
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
    weak: set[int] = set()  # first words of mentions that are the word "one"
    place = 0
    for clause in _clauses(text):
        tokens = list(_TOKEN.finditer(clause))
        words = [_number(tokens, i) for i in range(len(tokens))]
        refused = _REFUSAL.search(clause)
        denied = -1  # where the last mention ends that does not count
        for i, token in enumerate(tokens):
            if refused and token.start() >= refused.start():
                break
            own = []
            for length in range(min(longest, len(words) - i), 0, -1):
                name = tuple(words[i : i + length])
                label = names.get(name, names.get(_singular(name)))
                if label is not None:
                    own.append((-length, place + i, label))
            if not own:
                continue
            joined = denied >= 0 and _ALTERNATIVE.search(clause[denied : token.start()])
            if joined or _NEGATION.search(clause[max(0, token.start() - _REACH) : token.start()]):
                denied = max(denied, tokens[i - own[0][0] - 1].end())
                continue
            found += own
            if token.group() == "one" and own[0][0] == -1:
                weak.add(place + i)
        place += len(words)
    if any(start not in weak for _, start, _ in found):
        found = [mention for mention in found if mention[1] not in weak]
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
