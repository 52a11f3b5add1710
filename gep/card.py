"""Model card: the README.md of a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST_ROWS, _MOST_TEXT = 60, 300  # a card is read by people; config.json has the rest


def model_card(
    *,
    title: str,
    summary: str,
    config: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    usage: str = "",
    license: str = "apache-2.0",
    tags: tuple[str, ...] = ("event-camera", "neuromorphic-vision"),
) -> str:
    """README.md of a model folder: YAML front matter for the Hub, then config, data, metrics and usage.

    Args:
        title, summary: heading and first paragraph.
        config, data, metrics: shown as tables; nested mappings become dotted keys, long tables and texts are cut.
        usage: Python code, shown in a block.
        license, tags: for the front matter.
    """
    front = ["---", f"license: {license}", "library_name: gep", "tags:", *(f"- {tag}" for tag in tags), "---"]
    lines = [*front, "", f"# {title}", "", summary.strip(), ""]
    if usage:
        lines += ["## Usage", "", "```python", usage.strip(), "```", ""]
    for heading, values in (("Metrics", metrics), ("Data", data), ("Configuration", config)):
        if values:
            rows = [f"| {key} | {_cell(value)} |" for key, value in _flat(values)]
            left = len(rows) - _MOST_ROWS
            rows = [*rows[:_MOST_ROWS], f"| … | {left:,} more in config.json |"] if left > 0 else rows
            lines += [f"## {heading}", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "–" if value is None else str(value)
    text = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} …"
    return text.replace("|", "\\|").replace("\n", " ")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        rows += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return rows
