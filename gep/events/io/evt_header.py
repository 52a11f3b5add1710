"""The text that begins Prophesee's files: lines of `% key value`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from gep.events.types import EventFormatError

HEADER_BYTES = 1 << 16
_LINE_BYTES = 1024
_MAX_SIDE = 32767

# Cameras whose files name their sensor but not its size: (sensor, how plugin, sensor or generation name it, rows,
# columns).
_SENSORS = (
    ("GenX320", r"genx320|^320(\.|$)", 320, 320),
    ("Gen3", r"gen3|^3(\.|$)", 480, 640),
    ("Gen4, IMX636, IMX646", r"gen4|imx636|imx646|^4(\.|$)", 720, 1280),
)
_NAMING = ("sensor_name", "plugin_name", "sensor_generation", "generation")


@dataclass(frozen=True)
class Header:
    """A file's header."""

    path: Path
    """The file."""
    size: int
    """Bytes of header: where the records begin."""
    fields: dict[str, str] = field(default_factory=dict)
    """key -> value, keys in lower case; of a repeated key the last."""

    def options(self) -> dict[str, str]:
        """`format EVT3;height=720;width=1280` as {"": "EVT3", "height": "720", "width": "1280"}."""
        name, *rest = self.fields.get("format", "").split(";")
        pairs = (part.partition("=") for part in rest)
        return {"": name.strip()} | {key.strip().lower(): value.strip() for key, _, value in pairs}

    def stated_size(self) -> tuple[int, int] | None:
        """(height, width) as the header's numbers have it, or None.

        Raises:
            EventFormatError: the numbers are no size of a sensor, or contradict each other.
        """
        options = self.options()
        width, _, height = self.fields.get("geometry", "").partition("x")
        stated = (
            (width.strip(), height.strip()),
            (options.get("width"), options.get("height")),
            (self.fields.get("width"), self.fields.get("height")),
        )
        sizes = {(width, height) for width, height in stated if width and height}
        if not sizes:
            return None
        if len(sizes) > 1 or not all(side.isdecimal() and 0 < int(side) <= _MAX_SIDE for side in min(sizes)):
            said = " and ".join("x".join(size) for size in sorted(sizes))
            raise EventFormatError(
                f"{self.path}: byte 0: the header states the sensor size {said}; give height and width"
            )
        width, height = sizes.pop()
        return int(height), int(width)

    def sensor_size(self) -> tuple[int, int]:
        """(height, width): the header's numbers, else those of the sensor that it names.

        Raises:
            EventFormatError: there are no numbers, and no known sensor is named.

        Source: the camera plugins of OpenEB (Prophesee), for the names and sizes.
        """
        stated = self.stated_size()
        if stated is not None:
            return stated
        for key in _NAMING:
            for _, pattern, height, width in _SENSORS:
                if re.search(pattern, self.fields.get(key, "").lower()):
                    return height, width
        named = ", ".join(f"{key} = {self.fields[key]}" for key in _NAMING if key in self.fields) or "no sensor"
        raise EventFormatError(
            f"{self.path}: byte 0: the header states no sensor size (it names {named}); give height and width"
        )


def parse_header(path: Path, head: bytes | None = None) -> Header:
    """The header of a Prophesee file; of size 0 where there is none.

    It ends after `% end`, or where a line does not begin with `%` or is no text: the records may begin with any byte.

    Args:
        path: the file.
        head: its first bytes, where they are known.
    """
    if head is None:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
    fields: dict[str, str] = {}
    at = 0
    while head[at : at + 1] == b"%":
        end = head.find(b"\n", at, at + _LINE_BYTES)
        line = head[at + 1 : end].strip() if end >= 0 else b"\0"
        if not all(32 <= byte < 127 or byte == 9 for byte in line):
            break
        at = end + 1
        key, _, value = line.decode("ascii").partition(" ")
        if key.lower() == "end" and not value:
            break
        if key:
            fields[key.lower()] = value.strip()
    return Header(path, at, fields)


def header_text(version: str, name: str, height: int, width: int) -> bytes:
    """The text that begins a `.raw` file.

    Raises:
        ValueError: the sensor is larger than the words' 11-bit coordinates.
    """
    if max(height, width) > 2048:
        raise ValueError(f"{name} holds sensors up to 2048x2048, got {height}x{width}; crop or resize the events")
    lines = (f"evt {version}", f"format {name};height={height};width={width}", f"geometry {width}x{height}", "end")
    return "".join(f"% {line}\n" for line in lines).encode()
