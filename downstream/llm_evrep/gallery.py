"""What readers said of each source's images, side by side: report.html in one file, and gallery.png."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from downstream.dense.pictures import INK, font, shortened, text_width
from downstream.llm_evrep.prompts import parse_answer, said

Table = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Reader -> source -> accuracy, low, high [%], refused, jaccard, sobel_error, num, gain, gain_low, gain_high."""
_LONG = 120  # characters; what is longer folds
_ROWS = 8  # of gallery.png, which is looked at whole
_GREEN, _RED, _GREY = (26, 127, 55), (207, 34, 46), (87, 96, 106)
_STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #57606a; --page: #fff; --card: #f6f8fa; --line: #d8dee4;
        --right: #1a7f37; --wrong: #cf222e; --bar: #b6d4fe; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --page: #0d1117; --card: #161b22; --line: #30363d;
          --right: #4ac26b; --wrong: #ff7b72; --bar: #1f4b8f; } }
body { font: 15px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--page);
       max-width: 72rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; overflow-wrap: anywhere; }
.note { color: var(--soft); } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6.5rem; }
td.bar { min-width: 6rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem; margin: 1rem 0; }
section h3 { font-size: 1rem; margin: 0 0 .6rem; } h3 small { color: var(--soft); font-weight: 400; }
.grid { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; width: 9rem; }
img { box-sizing: border-box; width: 100%; display: block; border: 1px solid var(--line); }
img.small { image-rendering: pixelated; }
figcaption { font-weight: 600; font-size: .85rem; margin: .2rem 0; overflow-wrap: anywhere; }
.said { margin: .15rem 0; font-size: .9rem; overflow-wrap: anywhere; }
.right { color: var(--right); } .wrong { color: var(--wrong); } details, summary { display: inline; }
summary { cursor: pointer; } summary u { color: var(--soft); } details[open] u { display: none; }
pre { overflow-x: auto; font-size: .8rem; }
"""


def write(
    folder: Path, rows: Sequence[Mapping[str, Any]], table: Table | str, *, classes: Sequence[str] | None = None
) -> Path:
    """Writes report.html and gallery.png.

    Args:
        folder: of both; it is made.
        rows: one a sample: key, truth (class), images {source: (3, H, W) float in [0, 1] or uint8}, answers
            {reader: {source: text}}; right {reader: {source: bool}} where it is known already.
        table: the results, or lines of text.
        classes: that an answer may name, for rows without `right`; None = the rows' truths.
    Returns:
        Path of report.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(str(row["truth"]) for row in rows)) if classes is None else list(classes)
    judged = [{**row, "right": row.get("right") or _judged(row, names)} for row in rows]
    path = folder / "report.html"
    path.write_text(_page(judged, table), encoding="utf-8")
    draw(judged[:_ROWS], {} if isinstance(table, str) else table).save(folder / "gallery.png")
    return path


def _judged(row: Mapping[str, Any], classes: Sequence[str]) -> dict[str, dict[str, bool]]:
    truth = said(str(row["truth"]))

    def right(text: str) -> bool:
        label = parse_answer(text, classes)
        return label >= 0 and said(classes[label]) == truth

    return {reader: {source: right(text) for source, text in texts.items()} for reader, texts in row["answers"].items()}


def _uint8(image: Any) -> np.ndarray:
    """uint8 (H, W, 3) of a (3, H, W) float in [0, 1] or uint8."""
    array = torch.as_tensor(image).detach().cpu()
    if array.is_floating_point():
        array = (255 * array.float().clamp(0, 1)).round().to(torch.uint8)
    return array.permute(1, 2, 0).contiguous().numpy()


# ---- the page ------------------------------------------------------------------------------------------------


def _page(rows: Sequence[Mapping[str, Any]], table: Table | str) -> str:
    readers = list(dict.fromkeys(reader for row in rows for reader in row["answers"]))
    parts = ["<h1>What frozen models read in events</h1>"]
    if isinstance(table, str):
        parts.append(f"<pre>{html.escape(table)}</pre>")
    else:
        parts += [part for reader, found in table.items() for part in _reader_table(reader, found)]
    if rows:
        parts.append("<h2>Images and answers</h2>")
        legend = '<span class="right">✓</span> the right class, <span class="wrong">✗</span> another or none.'
        if len(readers) > 1:
            legend += "".join(f"<br>{_letter(i)}: {html.escape(reader)}" for i, reader in enumerate(readers))
        parts.append(f'<p class="note">{legend}</p>')
        parts += [_card(row, readers) for row in rows]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>LLM-EvRep</title><style>{_STYLE}</style></head><body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _reader_table(reader: str, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    gains = any(row.get("gain") is not None for row in found.values())
    head = ["source", "accuracy, %", "interval", *(["gain, points"] if gains else [])]
    head += ["no class named", "Jaccard", "Sobel error", "samples"]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for source, row in found.items():
        share = min(max(float(row["accuracy"]), 0.0), 100.0)
        cells = [f"<td>{html.escape(source)}</td>"]
        paint = f"background-image: linear-gradient(to right, var(--bar) {share:.1f}%, transparent {share:.1f}%)"
        cells.append(f'<td class="bar" style="{paint}">{row["accuracy"]:.1f}</td>')
        texts = [_span(row, "low", "high")]
        if gains:
            texts.append("" if row.get("gain") is None else f"{row['gain']:+.1f} {_span(row, 'gain_low', 'gain_high')}")
        texts += [_number(row.get("refused"), 0), _number(row.get("jaccard"), 3), _number(row.get("sobel_error"), 4)]
        texts.append(_number(row.get("num"), 0))
        lines.append("<tr>" + "".join([*cells, *(f"<td>{text}</td>" for text in texts)]) + "</tr>")
    title = f"<h2>Read by {html.escape(reader)}</h2>"
    return [title, '<div class="wide"><table>' + "".join(lines) + "</table></div>"]


def _span(row: Mapping[str, Any], low: str, high: str) -> str:
    if row.get(low) is None or row.get(high) is None:
        return ""
    return f"[{row[low]:.1f}, {row[high]:.1f}]"


def _number(value: Any, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else str(number + 1)


def _card(row: Mapping[str, Any], readers: Sequence[str]) -> str:
    figures = []
    for source, image in row["images"].items():
        pixels = _uint8(image)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, format="PNG")
        small = ' class="small"' if pixels.shape[1] < 128 else ""
        name = html.escape(source)
        address = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        lines = [f'<figure><img{small} alt="{name}" src="{address}"><figcaption>{name}</figcaption>']
        for number, reader in enumerate(readers):
            if source in row["answers"].get(reader, {}):
                before = f"{_letter(number)} " if len(readers) > 1 else ""
                lines.append(_answer(row["answers"][reader][source], bool(row["right"][reader][source]), before))
        figures.append("".join(lines) + "</figure>")
    title = f"<h3>{html.escape(str(row['truth']))} <small>{html.escape(str(row['key']))}</small></h3>"
    return f'<section>{title}<div class="grid">{"".join(figures)}</div></section>'


def _answer(text: str, right: bool, before: str) -> str:
    mark = '<b class="right" title="right">✓</b>' if right else '<b class="wrong" title="wrong">✗</b>'
    text = " ".join(text.split()) or "(nothing)"
    shown = html.escape(text)
    if len(text) > _LONG:
        cut = max(text.rfind(" ", 0, _LONG), _LONG // 2)
        head, rest = html.escape(text[:cut]), html.escape(text[cut:])
        shown = f"<details><summary>{head} <u>more</u></summary>{rest}</details>"
    return f'<div class="said">{before}{mark} {shown}</div>'


# ---- the picture ---------------------------------------------------------------------------------------------


def draw(rows: Sequence[Mapping[str, Any]], table: Table, *, side: int = 150) -> Image.Image:
    """Samples below each other and sources beside each other, with accuracies above and the readers' words below.

    Args:
        rows: as `write` has them, with `right`.
        table: accuracies; empty = none are shown.
        side: width of an image [px]; smaller ones are magnified by a whole number, larger ones shrunk.
    """
    sources = list(dict.fromkeys(source for row in rows for source in row["images"]))
    readers = list(dict.fromkeys([*table, *(reader for row in rows for reader in row["answers"])]))
    gap, size = 14, 13
    line = round(1.45 * size)
    panels = [{source: _panel(image, side) for source, image in row["images"].items()} for row in rows]
    lettered = len(readers) > 1
    top = gap + (len(readers) * line + gap // 2 if lettered else 0)
    head = line * (1 + len(table))
    heights = [max((p.height for p in row.values()), default=0) + line * (1 + len(readers)) + gap for row in panels]
    width = gap + max(1, len(sources)) * (side + gap)
    page = Image.new("RGB", (width, top + head + gap + sum(heights)), (255, 255, 255))
    pen = ImageDraw.Draw(page)

    def put(x: int, y: int, text: str, room: int, colour: tuple[int, int, int] = INK) -> None:
        pen.text((x, y + line // 2), shortened(text, size, room), colour, font(size), anchor="lm")

    for number, reader in enumerate(readers if lettered else ()):
        put(gap, gap + number * line, f"{_letter(number)}: {reader}", width - 2 * gap, _GREY)
    left = {source: gap + number * (side + gap) for number, source in enumerate(sources)}
    for source, x in left.items():
        put(x, top, source, side)
        for number, (reader, found) in enumerate(table.items()):
            if source in found:
                before = f"{_letter(readers.index(reader))} " if lettered else ""
                text = f"{before}{found[source]['accuracy']:.1f}% {_span(found[source], 'low', 'high')}"
                put(x, top + (1 + number) * line, text, side, _GREY)
    y = top + head + gap // 2
    for row, shown, height in zip(rows, panels, heights):
        pen.line((gap, y, width - gap, y), fill=(216, 222, 228))
        truth = str(row["truth"])
        put(gap, y, truth, width - 2 * gap)
        aside = gap + text_width(truth, size) + size
        put(aside, y, str(row["key"]), max(0, width - gap - aside), _GREY)
        below = y + line + max((panel.height for panel in shown.values()), default=0)
        for source, panel in shown.items():
            page.paste(panel, (left[source] + (side - panel.width) // 2, y + line))
            for number, reader in enumerate(readers):
                text = row["answers"].get(reader, {}).get(source)
                if text is not None:
                    right = bool(row["right"][reader][source])
                    place = (left[source], below + number * line)
                    _mark(pen, place, line, right)
                    before = f"{_letter(number)} " if lettered else ""
                    words = before + (" ".join(text.split())[:_LONG] or "(nothing)")
                    put(place[0] + line, place[1], words, side - line, _GREEN if right else _RED)
        y += height
    return page


def _panel(image: Any, side: int) -> Image.Image:
    picture = Image.fromarray(_uint8(image))
    if picture.width <= side:
        zoom = side // picture.width
        return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    return picture.resize((side, max(1, round(picture.height * side / picture.width))), Image.Resampling.LANCZOS)


def _mark(pen: ImageDraw.ImageDraw, place: tuple[int, int], line: int, right: bool) -> None:
    """A tick or a cross, drawn: Pillow's own font has neither."""
    x, y, unit = place[0] + 2, place[1] + 4, line - 9
    if right:
        pen.line([(x, y + unit * 0.55), (x + unit * 0.4, y + unit), (x + unit, y)], fill=_GREEN, width=2)
    else:
        pen.line([(x, y), (x + unit, y + unit)], fill=_RED, width=2)
        pen.line([(x, y + unit), (x + unit, y)], fill=_RED, width=2)
