"""Pieces of the page as HTML: pictures, cards, bars, legends; style.css says how they look, in light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image


def picture(values: np.ndarray, alt: str, *, smooth: bool = False) -> str:
    """A picture that fills its place, pixels as squares.

    Args:
        values: uint8 (H, W, 3).
        alt: what it shows, in words.
        smooth: for photographs.
    """
    height, width = values.shape[:2]
    kind = "photo" if smooth else "pixels"
    return f'<img class="{kind}" src="{data_uri(values)}" width="{width}" height="{height}" alt="{escape(alt, True)}">'


def data_uri(values: np.ndarray) -> str:
    """uint8 (H, W, 3) as the address of a PNG that holds it: no file, no request."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", compress_level=3)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(body: str, caption: str = "") -> str:
    """Something drawn, with a line of text below it."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="gep-figure">{body}{below}</figure>'


def notice(title: str, text: str, *, error: bool = False) -> str:
    """A card instead of a picture: nothing to show yet, or what went wrong and how to mend it."""
    kind, role = ("gep-notice gep-error", "alert") if error else ("gep-notice", "status")
    return f'<div class="{kind}" role="{role}"><strong>{escape(title)}</strong><p>{escape(text)}</p></div>'


def facts(pairs: Sequence[tuple[str, str]], note: str = "") -> str:
    """Names and values in a line that wraps."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    below = f'<p class="gep-note">{escape(note)}</p>' if note else ""
    return f'<dl class="gep-facts">{cells}</dl>{below}'


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Names with bars.

    Args:
        rows: (name, share in [0, 1] of the full width, what is written at its end).
    """
    drawn = "".join(
        f'<div class="gep-bar"><span>{escape(name)}</span>'
        f'<i aria-hidden="true"><b style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></b></i>'
        f"<em>{escape(text)}</em></div>"
        for name, share, text in rows
    )
    return f'<div class="gep-bars">{drawn}</div>'


def legend(rows: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Names with their colours.

    Args:
        rows: (name, (red, green, blue) 0 … 255).
    """
    keys = "".join(
        f'<li><i style="background:rgb({",".join(str(int(v)) for v in colour)})"></i>{escape(name)}</li>'
        for name, colour in rows
    )
    return f'<ul class="gep-legend">{keys}</ul>'


def ramp(colours: np.ndarray, ticks: Sequence[tuple[float, str]]) -> str:
    """A bar of colours with marks below it.

    Args:
        colours: uint8 (K, 3), from left to right.
        ticks: (place in [0, 1], text), those that would overlap an earlier one left out.
    """
    stops = ",".join(f"rgb({','.join(map(str, colour))})" for colour in np.asarray(colours).tolist())
    placed: list[tuple[float, str]] = []
    for place, text in ticks:
        if all(abs(place - other) > 0.14 for other, _ in placed):
            placed.append((place, text))
    edge = {0.0: "left", 1.0: "right"}
    marks = "".join(
        f'<span class="{edge.get(place, "middle")}" style="left:{100 * place:.1f}%">{escape(text)}</span>'
        for place, text in placed
    )
    bar = f'<i aria-hidden="true" style="background:linear-gradient(90deg,{stops})"></i>'
    return f'<div class="gep-ramp">{bar}<div>{marks}</div></div>'


def tiles(each: Sequence[tuple[str, str]], columns: int) -> str:
    """Pictures beside each other.

    Args:
        each: (picture, caption).
        columns: of them in a row, where there is room.
    """
    drawn = "".join(f"<figure>{body}<figcaption>{escape(caption)}</figcaption></figure>" for body, caption in each)
    return f'<div class="gep-tiles" style="--columns:{columns}">{drawn}</div>'


def number(value: float) -> str:
    """Three digits with k, M or G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
