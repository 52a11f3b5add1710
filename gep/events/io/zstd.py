"""zstd's own decoder for compiled code: many small frames are unpacked by one context and without Python between them.

Bindings for Python set up a context for every frame, which takes as long as unpacking one of a few kB, or copy frames
together. The C library is there anyway: hdf5plugin's Blosc filter brings it, most systems have it.

Source: zstd's "zstd.h", "Decompression context"; these functions are part of its stable interface.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_local = threading.local()


class _Context:
    """What zstd keeps between frames; for one thread."""

    def __init__(self, library: ctypes.CDLL):
        self.address = library.ZSTD_createDCtx() or 0
        weakref.finalize(self, library.ZSTD_freeDCtx, self.address)


def decoder() -> tuple[int, int] | None:
    """(address of ZSTD_decompressDCtx, address of this thread's context), for `decompress`; None without a library."""
    library = _library()
    if library is None:
        return None
    if not hasattr(_local, "context"):
        _local.context = _Context(library)
    address = _local.context.address
    function = ctypes.cast(library.ZSTD_decompressDCtx, ctypes.c_void_p).value
    return (function, address) if function and address else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("hdf5plugin")
    folders = (found.submodule_search_locations if found else None) or ()
    names = [str(path) for folder in folders for path in sorted(Path(folder, "plugins").glob("libh5blosc.*"))]
    for name in (*names, "libzstd.so.1", "libzstd.1.dylib"):
        try:
            library = ctypes.CDLL(name)
            library.ZSTD_createDCtx.restype, library.ZSTD_createDCtx.argtypes = ctypes.c_void_p, ()
            library.ZSTD_freeDCtx.restype, library.ZSTD_freeDCtx.argtypes = ctypes.c_size_t, (ctypes.c_void_p,)
            _ = library.ZSTD_decompressDCtx
        except (OSError, AttributeError):
            continue
        return library
    return None


def _decompress(typing: Any, function: Any, context: Any, out: Any, room: Any, frame: Any, size: Any) -> Any:
    def generate(compiler: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = ir.IntType(64)
        kind = ir.FunctionType(whole, [whole] * 5)
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int64(*[types.int64] * 6), generate


decompress: Callable[..., int] = intrinsic(_decompress)
"""Bytes unpacked from a frame of `size` bytes into `room` bytes, both by address; -1 … -200 for damage."""
