"""Arrays of HDF5 files for listers and targets: opened, read and closed in one call, so that no handle is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def read_h5(path: Path, name: str, index: Any = ()) -> np.ndarray:
    """A data set of the file, or the part of it at `index`.

    Raises:
        ImportError: h5py or the Blosc plugin is not installed.
        FileNotFoundError, ValueError: no such file; no such data set, or a damaged file.
    """
    h5py = _h5py()
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with h5py.File(path, "r") as file:
            if name not in file:
                raise ValueError(f"{path}: holds no {name!r}; its top level has {', '.join(file) or 'nothing'}")
            return np.asarray(file[name][index])
    except OSError as error:
        raise ValueError(f"{path}: {name}: not readable HDF5 ({error}); get the file again") from error


def has_h5(path: Path, name: str) -> bool:
    """Whether the file is there, readable, and holds the data set."""
    try:
        with _h5py().File(path, "r") as file:
            return name in file
    except OSError:
        return False


def _h5py() -> Any:
    try:
        import h5py
        import hdf5plugin  # noqa: F401 - registers Blosc, which DSEC's files need
    except ImportError as error:
        raise ImportError('HDF5 recordings need h5py and hdf5plugin: pip install "gep[io]"') from error
    return h5py
