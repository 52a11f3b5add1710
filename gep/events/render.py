"""Events as pictures for people: a strip of windows, or a video."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from gep.events.io.files import replacing
from gep.events.io.source import EventSource
from gep.events.represent_functions import check_percentile, event_image
from gep.events.slicing import into_windows
from gep.events.types import EventBatch, Events

_SMALLEST = 160  # px: a 34-pixel sensor would be a dot on a screen
_CODECS = ("vp09", "avc1", "mp4v")  # browsers play the first two; which there are depends on OpenCV's build
_GIF_PIXELS = 1 << 29  # Pillow keeps all frames of a GIF in memory, a byte a pixel


def strip(events: Events, *, windows: int = 6, percentile: float = 99.0) -> Image.Image:
    """Equal windows of a recording side by side: ON red, OFF blue, on white.

    Args:
        events: N events.
        windows: pictures, from left to right.
        percentile: of the counts, that full colour stands for.
    Returns:
        RGB picture; small sensors are magnified by a whole number.
    """
    parts = into_windows(events, windows)
    drawn = pictures(EventBatch.from_windows(parts.events, parts.bounds), percentile)
    gap = np.full((events.height * _zoom(events), 4, 3), 255, np.uint8)
    row = [piece for picture in drawn for piece in (magnified(picture, _zoom(events)), gap)]
    return Image.fromarray(np.concatenate(row[:-1], axis=1))


def video(
    source: EventSource,
    out: str | Path,
    *,
    fps: float = 30.0,
    slowdown: float = 1.0,
    window_us: int = 0,
    percentile: float = 99.0,
    t0: int | None = None,
    t1: int | None = None,
    codec: str = "",
    progress: bool = True,
) -> int:
    """A recording as MP4 or GIF, read window by window, however long it is.

    Frame k shows the events of the `window_us` before t0 + (k + 1) · 10⁶ / (fps · slowdown).

    Args:
        source: the open recording.
        out: .mp4 or .gif; replaced only once the video is complete.
        fps: frames a second; for a GIF the nearest that lasts whole hundredths of a second.
        slowdown: seconds of video a second of recording (10 = ten times slower).
        window_us: how long an event is seen; 0 = until the next frame.
        percentile: of a frame's counts, that full colour stands for.
        t0: begin in µs, as the file counts time; None = the first event.
        t1: end in µs; None = the last event.
        codec: of an MP4: vp09 or avc1 (browsers play them; slow to encode) or mp4v (a hundred times faster, for other
            players); empty = the first of them that OpenCV has.
        progress: whether to show a bar.

    Returns:
        Number of frames.

    Raises:
        ValueError: settings out of range, an empty recording, another suffix, or a GIF that is too large.
        ImportError: MP4 without OpenCV.
    """
    out = Path(out)
    check_film(out, fps=fps, codec=codec)
    if not 0 < slowdown < 1e9:
        raise ValueError(f"slowdown={slowdown} must be positive")
    if window_us < 0:
        raise ValueError(f"window_us={window_us} is negative")
    check_percentile(percentile)
    begin, end = source.span
    begin, end = begin if t0 is None else t0, end if t1 is None else t1
    if out.suffix.lower() == ".gif":
        # A GIF counts in hundredths of a second, and players slow down anything below two of them.
        fps = 100 / max(2, round(100 / fps))
    step = 1e6 / (fps * slowdown)
    count = int(np.ceil((end - begin) / step - 1e-9))
    if count < 1:
        raise ValueError(f"{source.path}: no events between {begin} and {end} µs to show")
    check_film(out, fps=fps, frames=count, pixels=source.height * source.width * _zoom(source) ** 2)

    def frames() -> Iterator[np.ndarray]:
        for number in tqdm(range(count), desc=out.name, unit="frame", disable=not progress, leave=False):
            stop = begin + round((number + 1) * step)
            start = stop - window_us if window_us else begin + round(number * step)
            stop = max(stop, start + 1)  # frames closer than a µs
            batch = EventBatch.from_windows([source.by_time(start, stop)], np.array([[start, stop]]))
            yield magnified(pictures(batch, percentile)[0], _zoom(source))

    write_film(out, frames(), fps, codec=codec)
    return count


def check_film(out: Path, *, fps: float, codec: str = "", frames: int = 0, pixels: int = 0) -> None:
    """Refuses what `write_film` cannot write, before anything is computed for it.

    Args:
        out: the file.
        fps: frames a second.
        codec: as `write_film`.
        frames, pixels: number of frames, and pixels of each.

    Raises:
        ValueError: another suffix, a setting out of range, or a GIF that is too large for memory.
    """
    if out.suffix.lower() not in _WRITERS:
        raise ValueError(f"{out}: a video is written as {' or '.join(_WRITERS)}, chosen by the suffix")
    if not 0 < fps < 1e9:
        raise ValueError(f"fps={fps} must be positive")
    if codec and codec not in _CODECS:
        raise ValueError(f"codec={codec!r} is not known; choose one of {', '.join(_CODECS)}")
    if out.suffix.lower() == ".gif" and frames * pixels > _GIF_PIXELS:
        raise ValueError(f"{out}: {frames:,} frames are too large a GIF; choose .mp4, fewer frames a second, or a part")


def write_film(
    out: Path, frames: Iterator[np.ndarray], fps: float, *, codec: str = "", palette: np.ndarray | None = None
) -> None:
    """Frames as MP4 or GIF, replacing `out` only once the film is complete.

    Args:
        out: .mp4 or .gif.
        frames: uint8 (H, W, 3), at least one, all of one size; only an MP4 is written without holding them all.
        fps: frames a second; a GIF takes the nearest that lasts whole hundredths of a second.
        codec: of an MP4, one of vp09, avc1 and mp4v; empty = the first of them that OpenCV has.
        palette: uint8 (K, 3), K <= 256, the colours of a GIF; None = those of event pictures, ON red and OFF blue.

    Raises:
        ValueError: OpenCV lacks the codec.
        ImportError: MP4 without OpenCV.
    """
    with replacing(out) as temporary:
        _WRITERS[out.suffix.lower()](temporary, frames, fps, (codec,) if codec else _CODECS, palette)


def _two_inks(frame: np.ndarray) -> Image.Image:
    """An event picture with its palette; exact, as it has two inks: ON takes away green and blue, OFF red and green."""
    on, off = 255 - frame[..., 2], 255 - frame[..., 0]
    picture = Image.fromarray(np.where(off > 0, 128 + off // 2, on // 2).astype(np.uint8))
    ramp = 255 - 2 * np.arange(128)
    ramps = {"on": (np.full(128, 255), ramp, ramp), "off": (ramp, ramp, np.full(128, 255))}
    colours = np.concatenate([np.stack(ramps[name], axis=1) for name in ("on", "off")]).astype(np.uint8)
    picture.putpalette(colours.tobytes())
    return picture


class _Nearest:
    """Pictures in the nearest of given colours; Pillow's own search takes white for a colour near it."""

    def __init__(self, palette: np.ndarray):
        self._palette = np.ascontiguousarray(palette, np.uint8)
        self._index = np.full(1 << 24, -1, np.int16)  # of every colour that was met

    def __call__(self, frame: np.ndarray) -> Image.Image:
        code = frame.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        for colour in np.unique(code[self._index[code] < 0]).tolist():
            rgb = np.array([colour >> 16, (colour >> 8) & 255, colour & 255])
            self._index[colour] = np.square(self._palette - rgb).sum(axis=1).argmin()
        picture = Image.fromarray(self._index[code].astype(np.uint8))
        picture.putpalette(self._palette.tobytes())
        return picture


def _write_gif(
    path: Path, frames: Iterator[np.ndarray], fps: float, codecs: Sequence[str], palette: np.ndarray | None
) -> None:
    indexed = _two_inks if palette is None else _Nearest(palette)
    first = indexed(next(frames))
    # A GIF counts in hundredths of a second, and players slow down anything below two of them.
    duration = max(20, round(100 / fps) * 10)
    first.save(
        path,
        save_all=True,
        append_images=(indexed(frame) for frame in frames),
        duration=duration,
        loop=0,
        optimize=False,
    )


def _write_mp4(
    path: Path, frames: Iterator[np.ndarray], fps: float, codecs: Sequence[str], palette: np.ndarray | None
) -> None:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            'MP4 needs OpenCV: pip install "gep[video]" (opencv-python-headless); or write a .gif'
        ) from error
    writer: Any = None
    try:
        for frame in frames:
            # Video codecs halve the resolution of colour, and so want even sides.
            frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), constant_values=255)
            if writer is None:
                writer = _open_mp4(cv2, path, fps, (frame.shape[1], frame.shape[0]), codecs)
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
    finally:
        if writer is not None:
            writer.release()
    if not path.exists() or path.stat().st_size == 0:
        raise ValueError(f"{path}: OpenCV wrote no video; choose .gif")


def _open_mp4(cv2: Any, path: Path, fps: float, size: tuple[int, int], codecs: Sequence[str]) -> Any:
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # codecs that a build lacks are tried, not faults
    try:
        for codec in codecs:
            writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), fps, size)
            if writer.isOpened():
                return writer
            writer.release()
    finally:
        cv2.utils.logging.setLogLevel(level)
    raise ValueError(f"{path}: this OpenCV has no encoder among {', '.join(codecs)}; choose another or .gif")


_WRITERS: dict[str, Callable[[Path, Iterator[np.ndarray], float, Sequence[str], np.ndarray | None], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
}


def pictures(batch: EventBatch, percentile: float = 99.0) -> np.ndarray:
    """Windows as pictures for people: ON red, OFF blue, on white.

    Args:
        batch: B windows, on the CPU.
        percentile: of a window's counts, that full colour stands for.
    Returns:
        uint8 (B, H, W, 3).
    """
    drawn = event_image(batch, percentile=percentile).numpy()
    return (255 * drawn).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _zoom(sensor: Events | EventSource) -> int:
    return max(1, -(-_SMALLEST // max(sensor.height, sensor.width)))


def magnified(picture: np.ndarray, zoom: int) -> np.ndarray:
    """A picture (H, W, …) whose pixels have become squares of `zoom` pixels."""
    return picture.repeat(zoom, 0).repeat(zoom, 1)
