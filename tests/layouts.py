"""Tiny data sets, each in its exact published layout, for the tests of listers, stages and commands.

Every writer takes the root and returns what it wrote where a test compares with it. Nothing of gep writes the files
(only `.bin` recordings, whose writer has tests of its own), so that a fault cannot hide on both sides.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image

from gep.events.io.bin import write_bin
from gep.events.types import Events

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def random_events(seed: int, count: int, duration: int, height: int, width: int, start: int = 0) -> Events:
    """Events at random places and times in [start, start + duration)."""
    rng = np.random.default_rng(seed)
    t = start + np.sort(rng.integers(0, duration, count))
    place = rng.integers(0, width, count), rng.integers(0, height, count)
    return Events.from_arrays(t, *place, rng.integers(0, 2, count), height=height, width=width)


def save(path: Path, picture: np.ndarray) -> Path:
    """An array as an image file; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **({"quality": 100} if path.suffix.lower() in (".jpg", ".jpeg") else {}))
    return path


def write_text(path: Path, lines: list[object]) -> Path:
    """One item a line; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


# ---- recognition ------------------------------------------------------------------------------------


def write_nmnist(
    root: Path, split: str = "Train", digits: tuple[int, ...] = (7, 1, 7, 1, 1, 7), count: int = 400
) -> None:
    """N-MNIST with the digits' images; image n holds the value n at (3, 5)."""
    for number, digit in enumerate(digits, start=1):
        folder = root / split / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        write_bin(folder / f"{number:05d}.bin", random_events(number, count, 300_000, 34, 34))
    images = np.zeros((len(digits), 28, 28), np.uint8)
    images[np.arange(len(digits)), 3, 5] = np.arange(1, len(digits) + 1)
    name = "train_images.npz" if split == "Train" else "test_images.npz"
    np.savez(root / name, index=np.arange(1, len(digits) + 1), label=np.array(digits), image=images)


def write_ncaltech101(
    root: Path, classes: tuple[str, ...] = ("chair", "ant", "BACKGROUND_Google"), each: int = 2
) -> None:
    """The original release."""
    for place, name in enumerate(classes):
        folder = root / "Caltech101" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, each + 1):
            write_bin(folder / f"image_{number:04d}.bin", random_events(10 * place + number, 500, 300_000, 180, 240))


def write_caltech101(
    root: Path, classes: tuple[str, ...] = ("chair", "ant", "BACKGROUND_Google"), each: int = 2
) -> None:
    """Caltech-101's pictures: number n of class k has 90 + n rows, 60 columns and the red value 40 k + 10 n."""
    for place, name in enumerate(classes):
        for number in range(1, each + 1):
            photo = np.zeros((90 + number, 60, 3), np.uint8)
            photo[..., 0] = 40 * place + 10 * number
            save(root / "101_ObjectCategories" / name / f"image_{number:04d}.jpg", photo)


def write_ncaltech101_est(root: Path, classes: tuple[str, ...] = ("chair", "ant"), each: int = 2) -> None:
    """EST's re-release."""
    for split in ("training", "validation", "testing"):
        for place, name in enumerate(classes):
            for number in range(each):
                events = random_events(10 * place + number, 300, 300_000, 180, 240)
                rows = np.stack([events.x, events.y, events.t / 1e6, events.p * 2.0 - 1], axis=1).astype(np.float32)
                path = root / split / name / f"{name}_{number}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, rows)


def write_nimagenet(
    root: Path,
    synsets: tuple[str, ...] = ("n02", "n01"),
    folder: str = "extracted_val",
    each: int = 1,
    *,
    images: bool = True,
    count: int = 5,
) -> None:
    """N-ImageNet, with ImageNet's files beside it; the picture of synset k has the blue value 30 + 10 k."""
    dtype = [("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "?")]
    for place, synset in enumerate(synsets):
        for number in range(each):
            events = random_events(100 * place + number, count, 50_000, 480, 640)
            rows = np.zeros(count, dtype=dtype)
            rows["x"], rows["y"], rows["t"], rows["p"] = events.x, events.y, events.t, events.p
            path = root / folder / synset / f"{synset}_{number}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, event_data=rows)
            if images:
                split = "train" if "train" in folder else "val"
                photo = np.broadcast_to(np.array([10, 20, 30 + 10 * place], np.uint8), (40, 50, 3))
                save(root / f"imagenet_{split}" / synset / f"{synset}_{number}.JPEG", np.ascontiguousarray(photo))


def write_dat(path: Path, events: Events) -> None:
    """Prophesee DAT, version 2, event type 0x0c."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = b"% Data file containing CD events.\n% Version 2\n% Date 2018-01-01 00:00:00\n"
    word = events.x.astype("<u4") | events.y.astype("<u4") << 14 | events.p.astype("<u4") << 28
    records = np.stack([events.t.astype("<u4"), word], axis=1).astype("<u4")
    path.write_bytes(header + bytes([0x0C, 8]) + records.tobytes())


def write_ncars(root: Path, each: int = 2) -> None:
    """N-Cars."""
    for split in ("train", "test"):
        for place, name in enumerate(("cars", "background")):
            for number in range(each):
                path = root / f"n-cars_{split}" / name / f"obj_{number:06d}_td.dat"
                write_dat(path, random_events(10 * place + number, 200, 100_000, 100, 120))


def write_aedat31(path: Path, events: Events) -> None:
    """AEDAT 3.1 with one packet of polarity events."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = (
        b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#Start-Time: 2017-01-01 00:00:00\r\n#!END-HEADER\r\n"
    )
    count = len(events)
    packet = struct.pack("<hhiiiiii", 1, 1, 8, 4, 0, count, count, count)
    word = 1 | events.p.astype("<u4") << 1 | events.y.astype("<u4") << 2 | events.x.astype("<u4") << 17
    path.write_bytes(header + packet + np.stack([word, events.t.astype("<u4")], axis=1).astype("<u4").tobytes())


def write_cifar10dvs(root: Path, each: int = 10, count: int = 100) -> None:
    """CIFAR10-DVS."""
    for place, name in enumerate(CIFAR10):
        for number in range(each):
            path = root / name / f"cifar10_{name}_{number}.aedat"
            write_aedat31(path, random_events(100 * place + number, count, 200_000, 128, 128))


# ---- a user's own -----------------------------------------------------------------------------------


def write_folder(
    root: Path, recordings: tuple[str, ...], *, duration: int = 1_000_000, count: int = 1000
) -> dict[str, Events]:
    """N-MNIST-like `.bin` recordings at the given paths, e.g. "cat/a.bin" or "b.bin"."""
    written = {}
    for place, name in enumerate(recordings):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        written[name] = random_events(place, count, duration, 34, 34)
        write_bin(path, written[name])
    return written
