"""The report's pictures of maps: a row a sample; events, truth and what each method makes of them in columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from downstream.dense.pictures import NONE, DepthLegend, metres_text
from downstream.segmentation.palette import IGNORE, colourise, palette
from gep.demo.figures import GRID, INK, png


def segmentation_grid(
    events: np.ndarray,
    truth: np.ndarray,
    methods: Mapping[str, np.ndarray],
    classes: Sequence[str],
    row_titles: Sequence[str],
    *,
    images: np.ndarray | None = None,
    colours: np.ndarray | None = None,
    title: str = "",
) -> bytes:
    """Label maps side by side, with the classes' colours below.

    Args:
        events: (K, H, W, 3) pictures, uint8 or in [0, 1].
        truth: (K, H, W) class ids; any that is no class = no label.
        methods: column title -> (K, H, W) class ids.
        classes: C names.
        row_titles: K short texts.
        images: (K, H, W) grey or (K, H, W, 3), uint8 or in [0, 1]; None = no such column.
        colours: uint8 (C, 3); None = those of the names.
        title: above everything.
    Returns:
        PNG.
    """
    colours = palette(classes) if colours is None else np.asarray(colours)
    maps = {"ground truth": truth, **methods}
    columns = _seen(events, images) | {
        name: np.stack([colourise(np.asarray(one), colours) for one in of]) for name, of in maps.items()
    }
    shown = set(np.unique(np.concatenate([np.ravel(of) for of in maps.values()])).tolist())
    figure, _ = _grid(columns, row_titles, title, lambda axis, picture: axis.imshow(picture, interpolation="nearest"))
    keys = [
        Patch(facecolor=to_hex(colour / 255), edgecolor=INK, lw=0.5, label=name)
        for number, (name, colour) in enumerate(zip(classes, colours))
        if number in shown
    ]
    if shown - set(range(len(classes))):
        keys.append(Patch(facecolor=_hex(IGNORE), edgecolor=INK, lw=0.5, label="no label"))
    across = max(1, int(figure.get_figwidth() / 1.05))
    # Below the lowest panel, however many lines it has.
    across = min(across, len(keys))
    figure.legend(
        handles=[key for column in range(across) for key in keys[column::across]],  # it fills column by column
        loc="upper center",
        bbox_to_anchor=(0.5, figure.subplotpars.bottom - 0.08 / figure.get_figheight()),
        ncols=across,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1.0,
        handleheight=1.0,
    )
    return png(figure)


def depth_grid(
    events: np.ndarray,
    truth: np.ndarray,
    methods: Mapping[str, np.ndarray],
    row_titles: Sequence[str],
    *,
    near_m: float,
    far_m: float,
    images: np.ndarray | None = None,
    title: str = "",
) -> bytes:
    """Depth maps side by side on one logarithmic scale, near light and far dark, with its bar below.

    Args:
        events, row_titles, images, title: as `segmentation_grid`.
        truth: (K, H, W) m, NaN = none.
        methods: column title -> (K, H, W) m.
        near_m, far_m: ends of the bar.
    Returns:
        PNG.
    """
    norm = LogNorm(near_m, far_m, clip=True)
    columns = _seen(events, images) | {
        name: np.ma.masked_invalid(np.asarray(of, float)) for name, of in {"ground truth": truth, **methods}.items()
    }

    def show(axis: Any, picture: np.ndarray) -> Any:
        if picture.ndim == 3:
            return axis.imshow(picture, interpolation="nearest")
        axis.set_facecolor(_hex(NONE))  # masked pixels are not painted
        return axis.imshow(picture, cmap="viridis_r", norm=norm, interpolation="nearest")

    figure, last = _grid(columns, row_titles, title, show)
    height = figure.get_figheight()
    across = figure.subplotpars.right - figure.subplotpars.left
    place = (figure.subplotpars.left + 0.15 * across, figure.subplotpars.bottom - 0.22 / height)
    bar = figure.colorbar(last, cax=figure.add_axes((*place, 0.7 * across, 0.1 / height)), orientation="horizontal")
    inner = [metres for metres in DepthLegend(near_m, far_m).ticks()[1:-1] if near_m * 1.25 < metres < far_m / 1.25]
    ticks = [near_m, *inner, far_m]
    bar.set_ticks(ticks, labels=[metres_text(value) for value in ticks], minor=False)
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8, colors=INK, length=2)
    bar.outline.set_edgecolor(GRID)
    return png(figure)


def _seen(events: np.ndarray, images: np.ndarray | None) -> dict[str, np.ndarray]:
    columns = {"events": np.asarray(events)}
    if images is not None:
        images = np.asarray(images)
        columns["image"] = np.repeat(images[..., None], 3, axis=-1) if images.ndim == 3 else images
    return columns


def _hex(colour: Sequence[int]) -> str:
    red, green, blue = (level / 255 for level in colour)
    return to_hex((red, green, blue))


def _grid(
    columns: Mapping[str, np.ndarray], row_titles: Sequence[str], title: str, show: Callable[[Any, np.ndarray], Any]
) -> tuple[Figure, Any]:
    """The figure with its panels, and what the last of them shows."""
    rows, (height, width) = len(row_titles), next(iter(columns.values())).shape[1:3]
    side = 1.35
    size = (side * len(columns) + 0.6, side * height / width * rows + 0.5)
    figure = Figure(figsize=size)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    figure.subplots_adjust(
        left=0.55 / size[0],
        right=1 - 0.05 / size[0],
        bottom=0.05 / size[1],
        top=1 - 0.45 / size[1],
        wspace=0.06,
        hspace=0.06 * width / height,
    )
    shown: Any = None
    for column, (name, pictures) in enumerate(columns.items()):
        for row in range(rows):
            axis = axes[row, column]
            shown = show(axis, pictures[row])
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_edgecolor(GRID)
            if row == 0:
                axis.set_title(name, fontsize=8, color=INK, pad=3)
            if column == 0:
                axis.set_ylabel(row_titles[row], fontsize=8, color=INK, rotation=0, ha="right", va="center")
    if title:
        figure.suptitle(title, fontsize=9, color=INK, y=1 - 0.02 / size[1], va="bottom")
    return figure, shown
