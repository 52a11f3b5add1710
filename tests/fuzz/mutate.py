"""Mutations of a recording; the number of an input decides all of it."""

from __future__ import annotations

import numpy as np

from tests.fuzz.seeds import Seed

_HEAD = 512
_MAX_BYTES = 1 << 16
_RARE_SUFFIX = 0.04


def _place(rng: np.random.Generator, data: bytearray) -> int:
    """A position: often in the header, sometimes in the last bytes, where indices and tables live."""
    if not data:
        return 0
    kind = rng.integers(4)
    low, high = (0, min(_HEAD, len(data))) if kind == 0 else (0, len(data))
    if kind == 1:
        low = max(0, len(data) - _HEAD)
    return int(rng.integers(low, high))


def _flip(rng: np.random.Generator, data: bytearray, other: bytes) -> None:
    for _ in range(rng.choice([1, 1, 2, 8, 40])):
        if data:
            data[_place(rng, data)] ^= 1 << int(rng.integers(8))


def _set(rng: np.random.Generator, data: bytearray, other: bytes) -> None:
    for _ in range(rng.choice([1, 1, 3, 16])):
        if data:
            data[_place(rng, data)] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.integers(256)]))


def _truncate(rng: np.random.Generator, data: bytearray, other: bytes) -> None:
    del data[_place(rng, data) :]


def _extend(rng: np.random.Generator, data: bytearray, other: bytes) -> None:
    num = int(rng.choice([1, 3, 7, 8, 64, 1000]))
    data += rng.bytes(num) if rng.integers(2) else bytes(num)


def _delete(rng: np.random.Generator, data: bytearray, other: bytes) -> None:
    at = _place(rng, data)
    del data[at : at + int(rng.choice([1, 2, 4, 8, 16, 100]))]


def _duplicate(rng: np.random.Generator, data: bytearray, other: bytes) -> None:
    at, num = _place(rng, data), int(rng.choice([1, 4, 8, 50, 400]))
    to = _place(rng, data)
    data[to:to] = data[at : at + num]


def _splice(rng: np.random.Generator, data: bytearray, other: bytes) -> None:
    at, begin = _place(rng, data), int(rng.integers(len(other) + 1))
    piece = other[begin : begin + int(rng.choice([8, 64, 2000]))]
    data[at : at + (len(piece) if rng.integers(2) else 0)] = piece


def _zeros(rng: np.random.Generator, data: bytearray, other: bytes) -> None:
    at, num = _place(rng, data), int(rng.choice([2, 8, 32, 300]))
    data[at : at + num] = bytes([int(rng.choice([0, 0, 0xFF]))]) * len(data[at : at + num])


def _length(rng: np.random.Generator, data: bytearray, other: bytes) -> None:
    """A false number where a length or an offset may be."""
    width = int(rng.choice([1, 2, 4, 8]))
    top = 1 << 8 * width
    near = len(data) + int(rng.integers(-9, 9))
    values = [0, 1, top - 1, top // 2, top // 2 - 1, top // 256, near, near // 8, 1 << 30, int(rng.integers(1 << 16))]
    number = int(values[rng.integers(len(values))]) % top
    at = _place(rng, data)
    if rng.integers(4):
        at -= at % width
    data[at : at + width] = number.to_bytes(width, "little" if rng.integers(3) else "big")


_MUTATIONS = (_flip, _flip, _set, _set, _truncate, _extend, _delete, _duplicate, _splice, _zeros, _length, _length)


def mutated(seeds: list[Seed], start: int, number: int) -> Seed:
    """Input `number` of the run that begins with the seed `start`."""
    rng = np.random.default_rng((start, number))
    chosen, other = seeds[number % len(seeds)], seeds[int(rng.integers(len(seeds)))]
    files = {name: bytearray(content) for name, content in chosen.files.items()}
    foreign = next(iter(other.files.values()))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
        name = list(files)[int(rng.integers(len(files)))]
        _MUTATIONS[int(rng.integers(len(_MUTATIONS)))](rng, files[name], foreign)
        del files[name][_MAX_BYTES:]
    target = chosen.target
    if len(files) == 1 and rng.random() < _RARE_SUFFIX:  # the name of one format, the content of another
        files = {"named" + next(iter(other.files)): files[target]}
        target = next(iter(files))
    return Seed(chosen.name, {name: bytes(content) for name, content in files.items()}, target)
