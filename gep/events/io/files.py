"""Writing a file so that it is complete or not there at all; reading one in slices without a memory map."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_LEAST = 1 << 12  # bytes read at a time


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends well and is removed when not.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first")
    # The suffix stays last: some writers add their own to any other name.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class FileBytes:
    """A file's bytes by slices, each read when asked for.

    For files of which one piece is wanted once: taking a map down stops every thread of the process for a moment, and
    a fresh one costs a page fault every few pages. Slices are read-only and stay valid when the file is closed.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: Path):
        self._file = -1
        self._file = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._file).st_size
        # Most formats are looked at from both ends first.
        self._ends = (self._read(0, _LEAST), self._read(max(self._size - _LEAST, 0), self._size))
        self._kept = self._ends[0]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> memoryview:
        begin, end, _ = part.indices(self._size)
        for first, kept in (self._kept, *self._ends):
            if first <= begin and end <= first + len(kept):
                return kept[begin - first : max(end, begin) - first]
        self.load(begin, end)
        return self[begin:end]

    def load(self, begin: int, end: int) -> None:
        """Reads [begin, end) at once; slices inside it need no further reading."""
        self._kept = self._read(begin, max(end, begin + _LEAST))

    def _read(self, begin: int, end: int) -> tuple[int, memoryview]:
        begin = begin // 8 * 8  # what is a multiple of 8 in the file is one in memory
        buffer, got = np.empty(max(min(end, self._size) - begin, 0), np.uint8), 0
        while got < len(buffer):
            more = os.preadv(self._file, [buffer[got:].data], begin + got)
            if more == 0:  # it was cut off since it was opened
                self._size = begin + got
                break
            got += more
        return begin, buffer[:got].data.toreadonly()

    # Bound early: when the interpreter ends, the module may be gone first.
    def close(self, _close: Callable[[int], None] = os.close) -> None:
        """Gives the file up; slices that were read stay."""
        if self._file >= 0:
            _close(self._file)
            self._file = -1

    __del__ = close
