"""Which values a model's config may hold: type and range, looked at before anything of the model is allocated.

A config.json comes from anywhere. A check is a function of a value and its place; it returns nothing, or raises a
ValueError that names the place, the value and what belongs there.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Check: TypeAlias = Callable[[Any, str], None]
"""(value, its place as in "encoder.in_chans") -> None, or a ValueError."""

_MOST_VALUES, _MOST_DEPTH, _MOST_TEXT = 200_000, 16, 100_000


def refuse(value: Any, place: str, wanted: str) -> None:
    """Raise the ValueError of a value that does not belong where it is."""
    raise ValueError(f"{place} = {reprlib.repr(value)}: give {wanted}")  # reprlib: a bomb is not printed either


def whole(low: int, high: int) -> Check:
    """An integer in [low, high]; true and 1.0 are none."""

    def check(value: Any, place: str) -> None:
        if type(value) is not int or not low <= value <= high:
            refuse(value, place, f"an integer {low} … {high}")

    return check


def real(low: float, high: float) -> Check:
    """A finite number in [low, high]."""

    def check(value: Any, place: str) -> None:
        if type(value) not in (int, float) or not low <= value <= high:  # NaN compares false
            refuse(value, place, f"a number {low:g} … {high:g}")

    return check


def text(most: int = 1000, pattern: str = r"[\s\S]*", wanted: str = "") -> Check:
    """A string of at most `most` characters that `pattern` matches whole."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, str) or len(value) > most or not re.fullmatch(pattern, value):
            refuse(value, place, wanted or f"a text of at most {most} characters")

    return check


def one_of(*choices: str | bool) -> Check:
    """One of the given values, of the same type."""

    def check(value: Any, place: str) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            refuse(value, place, f"one of {', '.join(map(str, choices))}")

    return check


def either(first: Check, second: Check, wanted: str) -> Check:
    """What one of two checks takes."""

    def check(value: Any, place: str) -> None:
        for inner in (first, second):
            try:
                return inner(value, place)
            except ValueError:
                pass
        refuse(value, place, wanted)

    return check


def optional(inner: Check) -> Check:
    """None, or what `inner` takes."""

    def check(value: Any, place: str) -> None:
        if value is not None:
            inner(value, place)

    return check


def listed(inner: Check, low: int, high: int) -> Check:
    """A list of low … high values, each as `inner` takes them."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, list | tuple) or not low <= len(value) <= high:
            refuse(value, place, f"a list of {low if low == high else f'{low} … {high}'} values")
        for number, entry in enumerate(value):
            inner(entry, f"{place}[{number}]")

    return check


def record(fields: Mapping[str, Check], needed: Sequence[str] = (), others: Check | None = None) -> Check:
    """A mapping with the given fields.

    Args:
        fields: what each may hold.
        needed: those that must be there.
        others: what fields of other names may hold; None = there are no others.
    """

    def check(value: Any, place: str) -> None:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            refuse(value, place, "a mapping of names to values")
        if missing := [key for key in needed if key not in value]:
            raise ValueError(f"{place} lacks {', '.join(map(repr, missing))}")
        for key, entry in value.items():
            inner = fields.get(key, others)
            if inner is None:
                raise ValueError(f"{place} has an unknown {key[:60]!r}: it holds {', '.join(fields)}")
            inner(entry, f"{place}.{key[:60]}")

    return check


def variants(kinds: Mapping[str, Check]) -> Check:
    """A mapping whose "name" says which of `kinds` it is."""

    def check(value: Any, place: str) -> None:
        record({}, ("name",), others=lambda *_: None)(value, place)
        one_of(*kinds)(value["name"], f"{place}.name")
        kinds[value["name"]](value, place)

    return check


def plain_json(value: Any, place: str) -> None:
    """A check: JSON of bounded depth and size with finite numbers, for what is only shown or read later."""
    left, waiting = _MOST_VALUES, [(value, 0)]
    while waiting:
        entry, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > _MOST_DEPTH:
            raise ValueError(f"{place} is nested deeper than {_MOST_DEPTH} or holds over {_MOST_VALUES} values")
        if isinstance(entry, Mapping):
            waiting += [(key, depth + 1) for key in entry] + [(inner, depth + 1) for inner in entry.values()]
        elif isinstance(entry, list | tuple):
            waiting += [(inner, depth + 1) for inner in entry]
        elif isinstance(entry, str):
            if len(entry) > _MOST_TEXT:
                refuse(entry, place, f"texts of at most {_MOST_TEXT} characters")
        elif isinstance(entry, int | float):
            if not (math.isfinite(entry) if isinstance(entry, float) else abs(entry) < 2**63):
                refuse(entry, place, "finite numbers that fit 64 bits")
        elif entry is not None:
            refuse(entry, place, "plain JSON values")


_SIDE, _CHANNELS = whole(1, 8192), whole(1, 4096)
_STATISTICS = 4096  # as many as channels

ENCODER: Check = record(
    {
        "arch": text(100, r"nano|vit_[a-z0-9_]+(\.[a-z0-9_]+)?", "'nano' or a timm name vit_*"),
        "in_chans": _CHANNELS,
        "img_size": listed(_SIDE, 2, 2),
        "head_dim": optional(whole(1, 65_536)),
        "head_hidden": whole(0, 65_536),
        "mean": optional(listed(real(-1e6, 1e6), 1, _STATISTICS)),
        "std": optional(listed(real(1e-9, 1e6), 1, _STATISTICS)),
        "drop_path": real(0, 0.999),
        "keep": either(real(1e-6, 1), one_of("active"), "a share in (0, 1], or 'active'"),
        "background": real(-1e9, 1e9),
        "rope_bf16": one_of(True, False),
    }
)
"""Keywords of gep.models.EventEncoder; ViT-g is 40 blocks of 1408 channels, and arch names it."""

BACKBONE: Check = record(
    {
        "token_dim": whole(1, 16_384),
        "width": whole(6, 16_384),
        "depth": whole(1, 256),
        "heads": whole(1, 256),
        "order": one_of("frame", "token"),
        "modalities": whole(1, 16),
        "mlp_ratio": real(0.1, 32),
        "span": optional(whole(1, 1_000_000)),
        "min_us": real(1e-3, 1e15),
        "max_us": real(1e-3, 1e15),
    },
    needed=("token_dim",),
)
"""Keywords of gep.models.Backbone."""

REPRESENTATION: Check = record(
    {
        "name": text(100),
        "params": record(
            {
                "bins": whole(1, 1024),
                "split_polarity": one_of(True, False),
                "tau_us": real(1e-3, 1e15),
                "percentile": real(1e-6, 100),
                "log1p": one_of(True, False),
                "scale": real(-1e9, 1e9),
            }
        ),
    },
    needed=("name", "params"),
)
"""What gep.events.represent.build takes, which also says which names there are and which parameters each has."""

INPUT_FIELDS: Mapping[str, Check] = {
    "height": _SIDE,
    "width": _SIDE,
    "fit": one_of("pad", "resize"),
    "windows": whole(1, 4096),
    "window_us": whole(0, 10**15),
    "num_events": whole(0, 10**15),
}
"""The values of gep.events.prepare.INPUT_KEYS."""

INPUT: Check = record(INPUT_FIELDS, tuple(INPUT_FIELDS), others=plain_json)
"""Input settings, with what a task adds to them."""

CLASSES: Check = listed(text(), 0, 100_000)
"""Names of classes."""

RECORDED: Mapping[str, Check] = {"data": optional(plain_json), "metrics": optional(plain_json)}
"""What every export keeps of its training."""
