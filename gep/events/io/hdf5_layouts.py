"""How the published data sets arrange events inside an HDF5 file; a layout is told by the names in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gep.events.types import EventFormatError

if TYPE_CHECKING:
    import h5py

_BLOSC = (32001, 32026)
_FILTERS = {32001: "Blosc", 32026: "Blosc2", 32015: "Zstandard", 32004: "LZ4", 32008: "bitshuffle", 32000: "LZF"}


@dataclass(frozen=True)
class Layout:
    """One arrangement of events in an HDF5 file."""

    name: str
    """Data set or tool it comes from."""
    columns: dict[str, tuple[str, int | None]]
    """t, x, y, p -> (dataset, column of it; None where the dataset is the column)."""
    unit: str
    """Unit of t."""
    sensor: tuple[int, int]
    """Sensor (rows, columns) where the file does not say."""
    index: str | None = None
    """Dataset whose entry m is the number of the first event with t >= m ms, t as stored."""
    offset: str | None = None
    """Dataset with the µs to add to every t."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the datasets that hold events, t's first."""
        return tuple(dict.fromkeys(self.columns[name][0] for name in "txyp"))


def _split(folder: str) -> dict[str, tuple[str, int | None]]:
    return {name: (f"{folder}/{name}", None) for name in "txyp"}


def find_layout(file: h5py.File, path: Path, camera: str) -> Layout:
    """The layout of an open file.

    Args:
        file: h5py.File.
        path: what messages call it.
        camera: "left" or "right", for layouts that hold both.

    Raises:
        EventFormatError: none of the layouts; says what was looked for and what is there.

    Source: DSEC (Gehrig et al. 2021), M3ED (Chaney et al. 2023), MVSEC (Zhu et al. 2018), v2e (Hu et al. 2021): their
        format descriptions and loaders.
    """
    layouts = (
        Layout("DSEC", _split("events"), "us", (480, 640), "ms_to_idx", "t_offset"),
        Layout("M3ED", _split(f"prophesee/{camera}"), "us", (720, 1280), f"prophesee/{camera}/ms_map_idx"),
        Layout("MVSEC", {n: (f"davis/{camera}/events", "xytp".index(n)) for n in "txyp"}, "s", (260, 346)),
        Layout("v2e", {n: ("events", "txyp".index(n)) for n in "txyp"}, "us", (260, 346)),
    )
    for layout in layouts:
        if all(_is_dataset(file, name) for name in layout.datasets):
            _check(file, path, layout)
            return layout
    wanted = "; ".join(f"{layout.name}: {', '.join(layout.datasets)}" for layout in layouts)
    there: list[str] = []
    file.visit(lambda name: there.append(name) if len(there) < 12 else None)
    raise EventFormatError(
        f"{path}: byte 0: an HDF5 file of no known event layout; looked for {wanted}; "
        f"it holds {', '.join(there) or 'nothing'}"
    )


def sensor_size(file: h5py.File, layout: Layout) -> tuple[int, int]:
    """(rows, columns): from attributes height and width of the file, M3ED's calib/resolution, else the layout's."""
    if "height" in file.attrs and "width" in file.attrs:
        return int(file.attrs["height"]), int(file.attrs["width"])
    resolution = f"{layout.columns['t'][0].rpartition('/')[0]}/calib/resolution"
    found = file[resolution] if layout.name == "M3ED" and _is_dataset(file, resolution) else None
    if found is not None and found.shape == (2,) and _is_own(file, found):
        width, height = (int(side) for side in found[:])
        return height, width
    return layout.sensor


def _is_dataset(file: h5py.File, name: str) -> bool:
    return name in file and hasattr(file[name], "shape")


def _is_own(file: h5py.File, data: h5py.Dataset) -> bool:
    """Whether the values lie in this very file: one that somebody sent may name any other of this machine."""
    return data.file.filename == file.filename and not data.external and not data.is_virtual


def _check(file: h5py.File, path: Path, layout: Layout) -> None:
    """Refuses shapes and dtypes other than the layout's, filters that are missing, and sizes no file can hold."""
    length = None
    for name in (*layout.datasets, *([layout.index] if layout.index and _is_dataset(file, layout.index) else [])):
        if not _is_own(file, file[name]):
            raise EventFormatError(
                f"{path}: byte 0: dataset '{name}' lies in another file, which is not read: copy its values to this one"
            )
    for name in layout.datasets:
        data = file[name]
        table = layout.columns["t"][1] is not None
        if data.dtype.kind not in "iufb" or data.shape[1:] != ((4,) if table else ()) or data.ndim == 0:
            raise EventFormatError(
                f"{path}: byte 0: dataset '{name}' is {data.dtype} {data.shape}, expected numbers of shape "
                f"{'(N, 4)' if table else '(N,)'} ({layout.name})"
            )
        length = len(data) if length is None else length
        if len(data) != length:
            raise EventFormatError(
                f"{path}: byte 0: dataset '{name}' has {len(data):,} entries where '{layout.datasets[0]}' has "
                f"{length:,}"
            )
        _check_filters(data, path, name)
        if not data.chunks and data.id.get_storage_size() < data.nbytes:  # partial reads would end in zeros
            raise EventFormatError(
                f"{path}: byte {data.id.get_offset() or 0}: dataset '{name}' has {data.id.get_storage_size():,} of "
                f"{data.nbytes:,} bytes"
            )
        size = path.stat().st_size
        # No filter reaches such a ratio on events; a damaged shape easily claims it.
        if data.nbytes > 20_000 * size or (data.chunks and data.dtype.itemsize * _product(data.chunks) > 1 << 28):
            raise EventFormatError(
                f"{path}: byte 0: dataset '{name}' claims shape {data.shape} in chunks {data.chunks}, "
                f"which a file of {size:,} bytes cannot hold"
            )
    if not length:
        raise EventFormatError(f"{path}: byte 0: dataset '{layout.datasets[0]}' holds no events")
    if layout.index and _is_dataset(file, layout.index):
        _check_filters(file[layout.index], path, layout.index)


def _check_filters(data: h5py.Dataset, path: Path, name: str) -> None:
    import h5py

    pipeline = data.id.get_create_plist()
    for number in range(pipeline.get_nfilters()):
        code, _, settings, _ = pipeline.get_filter(number)
        # The Blosc filters look at four settings at least, there or not.
        if code in _BLOSC and len(settings) < 4:
            raise EventFormatError(f"{path}: byte 0: the settings of {_FILTERS[code]} in dataset '{name}' are damaged")
        if not h5py.h5z.filter_avail(code):
            if code not in _FILTERS:
                raise EventFormatError(f"{path}: byte 0: dataset '{name}' is packed by the unknown filter {code}")
            label = _FILTERS[code]
            raise ImportError(
                f"{path}: dataset '{name}' is compressed with filter {code} ({label}), which h5py lacks; "
                'hdf5plugin brings it: pip install "gep[io]"'
            )


def _product(sides: tuple[int, ...]) -> int:
    total = 1
    for side in sides:
        total *= int(side)
    return total
