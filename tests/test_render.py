"""Strips and videos: colours, times, frames, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gep.events.io.source import InMemory
from gep.events.render import strip, video
from gep.events.types import Events


def source() -> InMemory:
    """A second: 8 × 8 pixels ON at every ms, their row moving down by 10 each 100 ms; from the half on, OFF."""
    step = np.arange(1000)
    t, row = np.repeat(step * 1000, 64), np.repeat(step // 100 * 10, 64)
    inner = np.tile(np.arange(64), 1000)
    late = t >= 500_000
    events = Events.from_arrays(t, np.where(late, 100, 0) + inner % 8, row + inner // 8, ~late, height=120, width=160)
    return InMemory(Path("made"), events)


def test_strip() -> None:
    picture = np.asarray(strip(source().events, windows=2))
    assert picture.shape == (120, 2 * 160 + 4, 3)
    assert picture[42, 3].tolist() == [255, 0, 0] and picture[52, 164 + 103].tolist() == [0, 0, 255]
    assert picture[52, 103].tolist() == [255, 255, 255] and picture[42, 164].tolist() == [255, 255, 255]


def test_gif_frames_are_the_windows(tmp_path: Path) -> None:
    out = tmp_path / "a.gif"
    assert video(source(), out, fps=10, progress=False) == 10
    with Image.open(out) as picture:
        assert picture.n_frames == 10 and picture.size == (160, 120) and picture.info["duration"] == 100
        frames = []
        for number in range(10):
            picture.seek(number)
            frames.append(np.asarray(picture.convert("RGB")))
    for number, frame in enumerate(frames):
        ink = np.flatnonzero((frame.min(axis=-1) < 250).any(axis=1))
        assert ink.tolist() == list(range(10 * number, 10 * number + 8))
        column, colour = (3, [255, 1, 1]) if number < 5 else (103, [1, 1, 255])
        assert frame[10 * number + 4, column].tolist() == colour, number
        assert frame[115, 80].tolist() == [255, 255, 255]
    assert list(tmp_path.iterdir()) == [out]  # no temporary file is left


def test_slow_and_partial_videos(tmp_path: Path) -> None:
    # 10 frames a second, 4 times slower: 25 ms a frame, and so 20 frames of the first half.
    assert video(source(), tmp_path / "a.gif", fps=10, slowdown=4, t1=500_000, progress=False) == 20
    seen = []

    class Watched(InMemory):
        def by_time(self, t0: int, t1: int) -> Events:
            seen.append((t0, t1))
            return super().by_time(t0, t1)

    video(
        Watched(Path("made"), source().events),
        tmp_path / "b.gif",
        fps=10,
        window_us=250_000,
        t0=0,
        t1=300_000,
        progress=False,
    )
    assert seen == [(-150_000, 100_000), (-50_000, 200_000), (50_000, 300_000)]  # longer than a frame: they overlap


@pytest.mark.parametrize("codec", ["", "mp4v"])
def test_mp4(tmp_path: Path, codec: str) -> None:
    cv2 = pytest.importorskip("cv2", reason="the video extra is not installed")
    events = source().events
    odd = Events(events.t, events.x, events.y, events.p, 121, 161)  # codecs want even sides
    assert video(InMemory(Path("made"), odd), tmp_path / "a.mp4", fps=20, codec=codec, progress=False) == 20
    reader = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert reader.get(cv2.CAP_PROP_FPS) == 20
    frames = []
    while (read := reader.read())[0]:
        frames.append(read[1][..., ::-1].astype(int))
    assert len(frames) == 20 and frames[0].shape == (122, 162, 3)

    # Lossy, and colour at half the resolution: ON is redder than it is green, OFF bluer than red, where and when seen.
    def red(frame: np.ndarray, row: int, column: int) -> int:
        return int(frame[row, column, 0] - frame[row, column, 2])

    assert red(frames[4], 23, 3) > 150 and red(frames[15], 73, 103) < -150
    assert abs(red(frames[15], 23, 3)) < 30 and abs(red(frames[4], 73, 103)) < 30
    assert frames[4][100:, 20:].min() > 235


def test_mp4_without_opencv_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"gep\[video\]"):
        video(source(), tmp_path / "a.mp4", progress=False)
    assert not list(tmp_path.iterdir())


def test_refusals(tmp_path: Path) -> None:
    for settings, message in (
        ({"out": "a.avi"}, r"\.mp4 or \.gif"),
        ({"out": "a.gif", "fps": 0}, "fps=0"),
        ({"out": "a.gif", "slowdown": -1}, "slowdown=-1"),
        ({"out": "a.gif", "window_us": -1}, "window_us=-1"),
        ({"out": "a.gif", "percentile": 0}, "percentile"),
        ({"out": "a.mp4", "codec": "divx"}, "codec='divx'.*vp09"),
        ({"out": "a.gif", "t0": 5_000_000}, "no events between"),
        ({"out": "a.gif", "fps": 50, "slowdown": 10_000}, "too large a GIF"),
    ):
        settings = dict(settings)
        with pytest.raises(ValueError, match=message):
            video(source(), tmp_path / settings.pop("out"), progress=False, **settings)
    assert not list(tmp_path.iterdir())
