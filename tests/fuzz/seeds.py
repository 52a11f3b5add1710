"""Small sound recordings of every format, the beginnings of all mutations."""

from __future__ import annotations

import io
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gep.events import io as readers
from gep.events.types import Events
from tests.fuzz import handmade

_REAL_BYTES = 6000


@dataclass(frozen=True)
class Seed:
    """A recording as its files' bytes."""

    name: str
    files: dict[str, bytes]
    target: str
    """The file to open; "" for the folder."""


def events(num: int, height: int, width: int, seed: int = 0, t0: int = 0, step: int = 40) -> Events:
    """Random events."""
    rng = np.random.default_rng(seed)
    t = t0 + np.cumsum(rng.integers(0, step, num))
    x, y, p = (rng.integers(0, limit, num) for limit in (width, height, 2))
    return Events.from_arrays(t, x, y, p, height=height, width=width)


def collect(match: str = "") -> list[Seed]:
    """The seeds whose name contains `match`, the same in every process; those of real files only where they are."""
    found = [*_written(), *_handmade(), *_hdf5(), *_real()]
    return sorted((seed for seed in found if match in seed.name), key=lambda seed: seed.name)


def _written() -> list[Seed]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for form in readers.FORMATS:
            if form.write is None:
                continue
            suffix = form.suffixes[0]
            # A long recording too, so that blocks, indices and overflow records are there.
            for kind, num, step in (("short", 40, 40), ("long", 700, 9000)):
                path = Path(folder) / f"seed{suffix}"
                form.write(path, events(num, 34, 34, seed=num, step=step))
                found.append(Seed(f"{form.name}-{kind}", {path.name: path.read_bytes()}, path.name))
                path.unlink()
    return found


def _handmade() -> list[Seed]:
    small = events(60, 12, 16, seed=1, t0=1000)
    square = events(60, 128, 128, seed=2, t0=5)
    late = events(60, 128, 128, seed=3, t0=(1 << 31) - 1000)
    davis = events(60, 260, 346, seed=4)
    sparse = events(40, 30, 32, seed=5, step=900)
    exposures = np.arange(40) % 3 == 0
    jaer, named = handmade.aedat2, "eu.seebetter.ini.chips.davis.DAVIS346mini"
    single = {
        "aedat4-lz4": ("a.aedat4", handmade.packets4(small)),
        "aedat4-zstd": ("a.aedat4", handmade.packets4(small, codec="zstd")),
        "aedat4-plain": ("a.aedat4", handmade.packets4(small, codec=None)),
        "aedat4-cut": ("a.aedat4", handmade.packets4(small, codec=None, index=None)),
        "aedat2-dvs128": ("a.aedat", jaer(square)),
        "aedat2-bare": ("a.aedat", jaer(square, chip=None, end=False)),
        "aedat2-davis346": ("a.aedat", jaer(davis, chip=named)),
        "aedat3": ("a.aedat", handmade.aedat3(square)),
        "aedat3-overflow": ("a.aedat", handmade.aedat3(late)),
        "es-dvs": ("a.es", handmade.es(sparse)),
        "es-atis": ("a.es", handmade.es(sparse, exposures)),
        "est-npy": ("a.npy", _npy(small)),
        "nimagenet-npz": ("a.npz", _npz(small, structured=True)),
        "nimagenet-old-npz": ("a.npz", _npz(small, structured=False)),
    }
    found = [Seed(name, {file: content}, file) for name, (file, content) in single.items()]
    recording = handmade.ddd17(events(50, 260, 346, seed=6), ns=3)
    return [*found, Seed("ddd17", recording, ""), Seed("ddd17-file", recording, "events.dat.t")]


def _npy(made: Events) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.stack([made.x, made.y, made.t / 1e6, 2.0 * made.p - 1], axis=1))
    return buffer.getvalue()


def _npz(made: Events, structured: bool) -> bytes:
    buffer = io.BytesIO()
    if structured:
        rows = np.zeros(len(made), [("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "?")])
        for name in "xytp":
            rows[name] = getattr(made, name)
        np.savez_compressed(buffer, event_data=rows)
    else:
        np.savez(buffer, x_pos=made.x, y_pos=made.y, timestamp=made.t, polarity=made.p)
    return buffer.getvalue()


def _hdf5() -> list[Seed]:
    if not any(suffix in (".h5", ".hdf5") for form in readers.FORMATS for suffix in form.suffixes):
        return []
    import h5py
    import hdf5plugin

    made = events(60, 30, 40, seed=7, t0=2000, step=90)
    blosc = dict(hdf5plugin.Blosc(cname="zstd", clevel=1))
    signed = np.stack([made.x, made.y, made.t / 1e6, 2.0 * made.p - 1], axis=1)
    starts = np.searchsorted(made.t, 1000 * np.arange(made.t[-1] // 1000 + 2))
    columns = {"x": made.x, "y": made.y, "p": made.p, "t": made.t.astype(np.uint32)}
    layouts = {
        "dsec": ({f"events/{k}": v for k, v in columns.items()}, {"ms_to_idx": starts, "t_offset": 10_000_000}, "h5"),
        "mvsec": ({"davis/left/events": signed}, {}, "hdf5"),
        "m3ed": ({f"prophesee/left/{k}": v for k, v in columns.items()}, {"prophesee/left/ms_map_idx": starts}, "h5"),
        "v2e": ({"events": np.stack([made.t, made.x, made.y, made.p], axis=1).astype(np.uint32)}, {}, "h5"),
    }
    found = []
    for name, (chunked, plain, suffix) in layouts.items():
        for packed, options in (("", {}), ("-blosc", {"chunks": True, **blosc})):
            buffer = io.BytesIO()
            with h5py.File(buffer, "w") as file:
                for key, value in chunked.items():
                    file.create_dataset(key, data=value, **options)
                for key, value in plain.items():
                    file[key] = value
            found.append(Seed(f"{name}{packed}", {f"a.{suffix}": buffer.getvalue()}, f"a.{suffix}"))
    return found


def _real() -> list[Seed]:
    """The beginnings of real files whose records stand alone."""
    given = os.environ.get("GEP_TEST_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "data"
    found = []
    for name in ("evt2.raw", "evt3.raw", "ncars.dat", "nmnist.bin", "ncaltech101.bin", "poker.es"):
        path = folder / "recordings" / name
        if path.is_file() and any(name.endswith(form.suffixes) for form in readers.FORMATS):
            with open(path, "rb") as file:
                found.append(Seed(f"real-{name}", {name: file.read(_REAL_BYTES)}, name))
    return found
