"""The handle on an HDF5 file: one a process, opened when first used, shared by threads, gone for good once closed."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from gep.events.io.hdf5_file import open_file

if TYPE_CHECKING:
    import h5py

_opening = threading.Lock()  # one for all files: a handle is pickled, and HDF5 does one thing at a time anyway


def _after_fork() -> None:
    global _opening
    _opening = threading.Lock()  # the thread that held the parent's may not be in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Handle:
    """An open HDF5 file; in a process that got it by fork or as a pickle it is opened anew."""

    def __init__(self, path: Path, recover: bool):
        """Opens nothing yet; arguments are those of `open_file`."""
        self.path, self.closed, self._recover = path, False, recover
        self._file: h5py.File | None = None
        self._process = 0
        self._datasets: dict[str, h5py.Dataset | None] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None, "_process": 0, "_datasets": {}}

    def file(self) -> h5py.File:
        """This process's h5py.File.

        Raises:
            ValueError: `close` was called.
            ImportError, EventFormatError: as `open_file`.
        """
        file = self._file
        if file is None or self._process != os.getpid():
            with _opening:  # several threads may come at once, such as those that read ahead
                if not self.closed and (self._file is None or self._process != os.getpid()):
                    self._datasets, self._file = {}, open_file(self.path, self._recover)
                    self._process = os.getpid()
                file = self._file
        self.check()
        return file

    def dataset(self, name: str) -> h5py.Dataset:
        """A dataset that the layout has."""
        found = self.find(name)
        assert found is not None, name
        return found

    def find(self, name: str) -> h5py.Dataset | None:
        """A dataset, looked up once a process; None where there is none of that name."""
        file, known = self.file(), self._datasets
        if name not in known:
            found = file[name] if name in file else None
            known[name] = found if hasattr(found, "shape") else None
        return known[name]

    def check(self) -> None:
        """Raises ValueError after `close`."""
        if self.closed:
            raise ValueError(f"{self.path}: read after close(); open it again")

    def close(self) -> None:
        """Gives the file up, for whoever shares the handle in this process."""
        self.closed = True
        with _opening:
            if self._file is not None and self._process == os.getpid():
                self._file.close()
            self._file, self._datasets = None, {}
