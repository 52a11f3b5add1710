"""The report's pictures: each function takes arrays and returns PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")

INK, GRID = "#24292f", "#d8dee4"
STAGE1, STAGE2, SCRATCH, PIXELS = "#0969da", "#cf222e", "#8c959f", "#57606a"


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes at 144 dpi."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, facecolor="white", bbox_inches="tight")
    return buffer.getvalue()


def principal_colours(tokens: Mapping[str, np.ndarray], basis: str) -> dict[str, np.ndarray]:
    """Tokens as colours: the first three principal components of `tokens[basis]`, shared by all.

    Args:
        tokens: name -> (K, N, D) float.
        basis: whose components and range (2nd to 98th percentile) are used for every entry.
    Returns:
        name -> (K, N, 3) float in [0, 1].
    """
    reference = tokens[basis].reshape(-1, tokens[basis].shape[-1]).astype(np.float64)
    mean = reference.mean(axis=0)
    _, _, components = np.linalg.svd(reference - mean, full_matrices=False)
    axes = components[:3].T
    # The sign of a component is arbitrary: fix it, so that two runs give the same colours.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(3)])
    low, high = np.percentile((reference - mean) @ axes, [2, 98], axis=0)
    return {
        name: np.clip(((values - mean) @ axes - low) / np.maximum(high - low, 1e-12), 0, 1)
        for name, values in tokens.items()
    }


def token_grid(columns: Sequence[tuple[str, np.ndarray]], row_titles: Sequence[str], title: str = "") -> bytes:
    """A table of pictures: one row a recording, one column a view.

    Args:
        columns: (title, (K, H, W) grey or (K, H, W, 3) colour in [0, 1]) from left to right.
        row_titles: K short texts.
        title: above everything.
    """
    rows = len(row_titles)
    figure = Figure(figsize=(1.35 * len(columns) + 0.6, 1.35 * rows + 0.5))
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns):
        for row in range(rows):
            axis = axes[row, column]
            axis.imshow(pictures[row], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_edgecolor(GRID)
            if row == 0:
                axis.set_title(name, fontsize=8, color=INK)
            if column == 0:
                axis.set_ylabel(row_titles[row], fontsize=8, color=INK, rotation=0, ha="right", va="center")
    if title:
        figure.suptitle(title, fontsize=9, color=INK)
    figure.subplots_adjust(wspace=0.06, hspace=0.06)
    return png(figure)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    colours: Mapping[str, str] | None = None,
    markers: bool = False,
    size: tuple[float, float] = (5.2, 2.9),
) -> bytes:
    """Lines over a common axis.

    Args:
        series: name -> (x, y).
        x_label, y_label: of the axes.
        colours: name -> colour; the default cycle without.
        markers: a dot at every point.
        size: in inches.
    """
    figure = Figure(figsize=size)
    axis = figure.subplots()
    for name, (x, y) in series.items():
        colour = (colours or {}).get(name)
        axis.plot(x, y, label=name, color=colour, lw=1.6, marker="o" if markers else None, ms=4)
    _style(axis, x_label, y_label)
    if len(series) > 1:
        axis.legend(frameon=False, fontsize=8)
    return png(figure)


def shots_figure(table: Mapping[str, Mapping[str, Sequence[float] | None]], colours: Mapping[str, str]) -> bytes:
    """Accuracy over the number of labelled samples a class, with ± one standard deviation.

    Args:
        table: row name -> shots -> [mean, std] in percent, or None where it was not measured.
        colours: row name -> colour.
    """
    figure = Figure(figsize=(5.2, 3.2))
    axis = figure.subplots()
    for name, row in table.items():
        points = [(int(shots), *value) for shots, value in row.items() if value is not None]
        if points:
            x, mean, std = (np.array(column) for column in zip(*points))
            style = "--" if name.endswith("last window") else "-"
            axis.errorbar(x, mean, yerr=std, label=name, color=colours.get(name), lw=1.4, ls=style, marker="o", ms=3.5)
            ticks = [str(int(value)) for value in x]
            axis.set_xscale("log")
            axis.set_xticks(x, ticks)
            axis.minorticks_off()
    _style(axis, "labelled recordings a class", "accuracy, %")
    axis.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)


def retrieval_grid(queries: np.ndarray, answers: np.ndarray, right: np.ndarray, row_titles: Sequence[str]) -> bytes:
    """Events on the left, the images found from them on the right, framed by right or wrong.

    Args:
        queries: (K, H, W, 3) in [0, 1].
        answers: (K, R, H, W) grey in [0, 1], best first.
        right: (K, R) bool, whether it is the recording's own image.
        row_titles: K short texts.
    """
    rows, found = answers.shape[:2]
    figure = Figure(figsize=(1.1 * (found + 1) + 0.6, 1.1 * rows + 0.4))
    axes = figure.subplots(rows, found + 1, squeeze=False)
    for row in range(rows):
        for column in range(found + 1):
            axis = axes[row, column]
            picture = queries[row] if column == 0 else answers[row, column - 1]
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            own = column > 0 and right[row, column - 1]
            for spine in axis.spines.values():
                spine.set_edgecolor("#1a7f37" if own else GRID)
                spine.set_linewidth(2.5 if own else 0.8)
            if row == 0:
                axis.set_title("events" if column == 0 else f"{column}", fontsize=8, color=INK)
        axes[row, 0].set_ylabel(row_titles[row], fontsize=8, rotation=0, ha="right", va="center", color=INK)
    figure.subplots_adjust(wspace=0.08, hspace=0.08)
    return png(figure)


def _style(axis: Axes, x_label: str, y_label: str) -> None:
    axis.set_xlabel(x_label, fontsize=8, color=INK)
    axis.set_ylabel(y_label, fontsize=8, color=INK)
    axis.tick_params(labelsize=8, colors=INK)
    axis.grid(True, color=GRID, lw=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
