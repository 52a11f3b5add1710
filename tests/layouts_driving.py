"""Tiny driving data sets, each in its exact published layout; see layouts.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from layouts import random_events, save, write_text

from gep.events.types import Events

DSEC_SENSOR, DAVIS = (480, 640), (260, 346)
DSEC_T0 = 49_599_300_523  # µs: t_offset of a sequence
DSEC_PICTURE = (216, 288)
UNIX_S = 1_506_119_776.0


# ---- DSEC -------------------------------------------------------------------------------------------


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """Float64 rotation by angles [rad] about the axes, in the order x, y, z."""
    cx, sx, cy, sy, cz, sz = np.cos(x), np.sin(x), np.cos(y), np.sin(y), np.cos(z), np.sin(z)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


CALIBRATION = {
    "camRect0": (550.0, 552.0, 320.5, 238.0),
    "camRect1": (250.0, 251.0, 143.0, 108.5),
    "R_rect0": rotation(0.01, -0.02, 0.005),
    "R_rect1": rotation(-0.015, 0.008, 0.002),
    "T_10": rotation(0.02, 0.03, -0.01),
    "focal": 550.0,
    "baseline": 0.6,
}


def write_calibration(path: Path) -> None:
    """DSEC's cam_to_cam.yaml, the parts of it that belong to the left cameras."""
    import yaml

    moved = np.eye(4)
    moved[:3, :3], moved[:3, 3] = CALIBRATION["T_10"], (0.05, 0.001, -0.002)
    focal, baseline = CALIBRATION["focal"], CALIBRATION["baseline"]
    values = {
        "intrinsics": {
            name: {"camera_matrix": list(CALIBRATION[name]), "resolution": size[::-1]}
            for name, size in (("camRect0", list(DSEC_SENSOR)), ("camRect1", list(DSEC_PICTURE)))
        },
        "extrinsics": {
            "T_10": moved.tolist(),
            "R_rect0": CALIBRATION["R_rect0"].tolist(),
            "R_rect1": CALIBRATION["R_rect1"].tolist(),
        },
        "disparity_to_depth": {
            "cams_03": [[1, 0, 0, -320.5], [0, 1, 0, -238.0], [0, 0, 0, focal], [0, 0, 1 / baseline, 0]]
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))


def write_dsec_events(folder: Path, events: Events, *, shift: tuple[float, float] = (2.0, -3.0)) -> None:
    """events.h5 (Blosc, times relative to t_offset) and rectify_map.h5 that moves every pixel by `shift` (x, y)."""
    import h5py
    import hdf5plugin

    folder.mkdir(parents=True, exist_ok=True)
    relative = events.t - DSEC_T0
    last_ms = int(relative[-1]) // 1000 + 1
    with h5py.File(folder / "events.h5", "w") as file:
        for name, values in (
            ("x", events.x),
            ("y", events.y),
            ("p", events.p),
            ("t", relative.astype(np.uint32)),
        ):
            file.create_dataset(f"events/{name}", data=values, chunks=True, **hdf5plugin.Blosc(cname="zstd"))
        file["ms_to_idx"] = np.searchsorted(relative, 1000 * np.arange(last_ms + 1)).astype(np.uint64)
        file["t_offset"] = np.int64(DSEC_T0)
    height, width = DSEC_SENSOR
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
    with h5py.File(folder / "rectify_map.h5", "w") as file:
        file.create_dataset("rectify_map", data=grid + np.float32(shift), chunks=True, **hdf5plugin.Blosc())


def dsec_picture(number: int) -> np.ndarray:
    """A picture whose value says where a pixel is: red = column / 2, green = row, blue = the picture's number."""
    height, width = DSEC_PICTURE
    picture = np.empty((height, width, 3), np.uint8)
    picture[..., 0] = np.arange(width) // 2
    picture[..., 1] = np.arange(height)[:, None]
    picture[..., 2] = number
    return picture


def write_dsec(
    root: Path,
    names: tuple[str, ...] = ("zurich_city_00_a",),
    *,
    pictures: int = 5,
    disparity: bool = True,
    count: int = 4000,
) -> dict[str, Events]:
    """DSEC, one folder a sequence: pictures every 50 ms from 60 ms on, disparity maps at every second of them."""
    written = {}
    for place, name in enumerate(names):
        home = root / name
        written[name] = random_events(place, count, 60_000 + 50_000 * pictures, *DSEC_SENSOR, start=DSEC_T0)
        write_dsec_events(home / "events" / "left", written[name])
        write_calibration(home / "calibration" / "cam_to_cam.yaml")
        stamps = [DSEC_T0 + 60_000 + 50_000 * number for number in range(pictures)]
        write_text(home / "images" / "timestamps.txt", stamps)
        for number in range(pictures):
            save(home / "images" / "left" / "rectified" / f"{number:06d}.png", dsec_picture(number))
        if disparity:
            write_text(home / "disparity" / "timestamps.txt", stamps[::2])
            for number in range(0, pictures, 2):
                values = np.zeros(DSEC_SENSOR, np.uint16)
                values[100, 200:300] = 256 * np.arange(1, 101) + number
                save(home / "disparity" / "event" / f"{number:06d}.png", values)
    return written


def write_dsec_semantic(
    root: Path, names: tuple[str, ...] = ("zurich_city_00_a",), maps: int = 10
) -> dict[str, Events]:
    """DSEC with label maps of all its pictures; map k has the class k % 11 in row k, and 255 in row 439."""
    written = write_dsec(root, names, pictures=maps, disparity=False)
    for name in names:
        folder = root / name / "semantic"
        write_text(folder / "timestamps.txt", [DSEC_T0 + 60_000 + 50_000 * number for number in range(maps)])
        for number in range(maps):
            values = np.zeros((440, 640), np.uint8)
            values[number] = number % 11
            values[439] = 255
            save(folder / "left" / "11classes" / f"{number:06d}.png", values)
    return written


# ---- DDD17, MVSEC, EventScape -----------------------------------------------------------------------


def write_ddd17(root: Path, dirs: tuple[int, ...] = (0, 1), frames: int = 6, count: int = 3000) -> dict[int, Events]:
    """DDD17 segmentation: masks of the frames 2, 4, 6, …; frame k was taken at 40 ms · (k + 1)."""
    written = {}
    for place in dirs:
        home = root / f"dir{place}"
        (home / "index").mkdir(parents=True)
        events = written[place] = random_events(place, count, 40_000 * (frames + 2), *DAVIS)
        (events.t * 1000 + 7).astype("<i8").tofile(home / "events.dat.t")
        np.stack([events.x, events.y, events.p], axis=1).astype("<i2").tofile(home / "events.dat.xyp")
        t = 40_000_000 * np.arange(2, frames + 2)
        last = np.searchsorted(events.t * 1000 + 7, t)
        for interval in (10, 50, 250):
            first = np.searchsorted(events.t * 1000 + 7, t - interval * 1_000_000)
            np.save(home / "index" / f"index_{interval}ms.npy", np.stack([t, last, first], axis=1))
        for number in range(1, frames + 1):
            save(home / "imgs" / f"img_{number:08d}.png", np.full(DAVIS, 10 * number, np.uint8))
            if number % 2 == 0:
                mask = np.full((200, 346), number % 6, np.uint8)
                save(home / "segmentation_masks" / f"segmentation_{number:08d}.png", mask)
    return written


def mvsec_maps() -> tuple[np.ndarray, np.ndarray]:
    """x and y (260, 346) of where the calibration moves a raw pixel: a little larger, turned and shifted."""
    y, x = np.meshgrid(np.arange(DAVIS[0], dtype=float), np.arange(DAVIS[1], dtype=float), indexing="ij")
    return 1.02 * x + 0.01 * y - 4.0, -0.012 * x + 1.03 * y + 2.0


def write_mvsec(
    root: Path, names: tuple[str, ...] = ("outdoor_day2",), frames: int = 5, count: int = 3000
) -> dict[str, Events]:
    """MVSEC: depth at 20 Hz, frames 10 ms after each; depth k holds 3 + k m, NaN in row 0 and 0 in row 1."""
    import h5py

    written = {}
    root.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names):
        start = round(UNIX_S * 1e6)
        events = written[name] = random_events(place, count, 50_000 * frames, *DAVIS, start=start)
        seconds = np.stack([events.x, events.y, events.t / 1e6, events.p * 2.0 - 1], axis=1)
        stamps = UNIX_S + 0.05 * np.arange(frames)
        pictures = np.stack([np.full(DAVIS, 10 * k, np.uint8) for k in range(frames)])
        pictures[:, :, :] += (np.arange(DAVIS[1]) // 4).astype(np.uint8)
        with h5py.File(root / f"{name}_data.hdf5", "w") as file:
            file.create_dataset("davis/left/events", data=seconds, compression="gzip")
            file["davis/left/image_raw"] = pictures
            file["davis/left/image_raw_ts"] = stamps + 0.01
            file["davis/left/image_raw_event_inds"] = np.searchsorted(events.t / 1e6, stamps + 0.01)
        depth = np.stack([np.full(DAVIS, 3.0 + k, np.float32) for k in range(frames)])
        depth[:, 0], depth[:, 1] = np.nan, 0
        with h5py.File(root / f"{name}_gt.hdf5", "w") as file:
            for kind in ("rect", "raw"):
                file[f"davis/left/depth_image_{kind}"] = depth + (0 if kind == "rect" else 100)
                file[f"davis/left/depth_image_{kind}_ts"] = stamps
        scene = name.rstrip("0123456789")
        for axis, table in zip("xy", mvsec_maps()):
            np.savetxt(root / f"{scene}_left_{axis}_map.txt", table, fmt="%.9f")
    return written


def write_eventscape(
    root: Path, split: str = "Town05_val", sequences: int = 1, files: int = 3, count: int = 500
) -> None:
    """EventScape: each file of events with a picture and a depth map of k + 1 m; times are in ns."""
    for place in range(sequences):
        home = root / split / f"sequence_{place}"
        stamps = [f"{number} {0.04 * (number + 1):.6f}" for number in range(files)]
        write_text(home / "events" / "data" / "timestamps.txt", stamps)
        for number in range(files):
            stem = f"05_{place:03d}_{number:04d}"
            events = random_events(number, count, 40_000, 256, 512, start=40_000 * number)
            path = home / "events" / "data" / f"{stem}_events.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, x=events.x, y=events.y, t=events.t * 1000, p=events.p)
            save(home / "rgb" / "data" / f"{stem}_image.png", np.full((256, 512, 3), 20 * number, np.uint8))
            depth = np.full((256, 512), number + 1, np.float32)
            depth[0] = np.inf
            (home / "depth" / "data").mkdir(parents=True, exist_ok=True)
            np.save(home / "depth" / "data" / f"{stem}_depth.npy", depth)
