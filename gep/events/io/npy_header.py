"""The head of a `.npy` array, read without trusting the size it claims."""

from __future__ import annotations

import math
from typing import IO

import numpy as np

_MAX_HEAD = 10_000  # bytes; a structured dtype of a few fields takes some hundred


def read_head(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) from the begin of a `.npy`; the file is left at the first byte of data.

    Raises:
        ValueError: no sound head, or an array of Python objects.
    """
    # NumPy reports a damaged head through several exception types (syntax, tokens, short data, ...).
    try:
        version = np.lib.format.read_magic(file)
        # Version 3 differs from 2 by UTF-8 field names only; NumPy's reader for 2 takes Latin-1.
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"version {version} of the .npy format is unknown")
        shape, fortran, dtype = reader(file, max_header_size=_MAX_HEAD)
    except Exception as error:
        raise ValueError(f"damaged head of a .npy array: {error}") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled (allow_pickle=False)")
    if any(side < 0 for side in shape) or dtype.itemsize == 0:
        raise ValueError(f"shape {shape} of {dtype} is none")
    return shape, fortran, dtype


def num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of the array, in integers that do not wrap."""
    return math.prod(shape) * dtype.itemsize
