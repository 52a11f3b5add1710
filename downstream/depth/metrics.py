"""Depth's numbers as the papers report them: per frame, at a cut-off, at all pixels and where events are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

NEARER_M = (10.0, 20.0, 30.0)  # the mean absolute error is reported of truth nearer than these, too
_THRESHOLDS = (1.25, 1.25**2, 1.25**3)
_PIXELS = ("all", "events")


def depth_rows(
    prediction_m: Tensor,
    target_m: Tensor,
    events: Tensor,
    cutoffs: Sequence[float] = (30.0, 80.0),
    min_m: float = 1e-3,
) -> dict[str, Tensor]:
    """A row a frame of every number that `depth_summary` needs.

    Truth beyond a cut-off is left out of that cut-off's numbers; predictions are clamped to [min_m, cut-off] and never
    left out. With g the truth and d the prediction: abs_rel = mean |d − g| / g; sq_rel = mean (d − g)² / g and
    sq_rel_gt2 = mean (d − g)² / g²; rmse; rmse_log of ln d − ln g; silog = the variance of ln d − ln g (no root, not
    in percent); delta1–3 = share with max(d/g, g/d) < 1.25ᵏ; mae = mean |d − g|, also of truth < 10, 20, 30 m.

    Args:
        prediction_m: (B, H, W) float, m.
        target_m: (B, H, W) float, m; NaN, 0 and below = none.
        events: (B, H, W) bool, True where the window holds an event.
        cutoffs: m.
        min_m: the smallest prediction, as its logarithm is taken.
    Returns:
        "cut-off 80 m/all/abs_rel" and the like -> (B,) float64, NaN for a frame without such pixels; `pixels` (and
        `pixels_10`, …, of mae_10) count them; `log_bias` is the mean of ln d − ln g. "pixels_not_finite" counts
        predictions that are not where there is truth: an error of `depth_summary`, which all ranks see, not one alone.
    Raises:
        ValueError: sizes that differ.
    Source:
        Hidalgo-Carrió et al. 2020 (E2Depth), §4; Eigen et al. 2014.
    """
    if prediction_m.dim() != 3 or not prediction_m.shape == target_m.shape == events.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (prediction_m, target_m, events))
        raise ValueError(f"prediction, truth and events are {shapes}, not all the same (B, H, W)")
    rows: dict[str, list[Tensor]] = {}
    # Frame by frame: a frame's numbers then do not depend, in their last bits, on what else is in the batch.
    for frame in range(len(target_m)):
        known = (target_m[frame] > 0) & target_m[frame].isfinite()
        truth = target_m[frame][known].double()
        predicted = prediction_m[frame][known].double()
        active = events[frame][known].bool()
        rows.setdefault("pixels_not_finite", []).append((~predicted.isfinite()).sum().double())
        for cutoff in cutoffs:
            for pixels in _PIXELS:
                chosen = truth <= cutoff if pixels == "all" else (truth <= cutoff) & active
                values = _frame_metrics(predicted[chosen].clamp(min_m, cutoff), truth[chosen])
                for name, value in values.items():
                    rows.setdefault(f"{_title(cutoff)}/{pixels}/{name}", []).append(value)
    return {name: torch.stack(values) for name, values in rows.items()}


def _title(cutoff: float) -> str:
    return f"cut-off {cutoff:g} m"


def _frame_metrics(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Scalars (float64) of one frame's pixels; NaN, as the mean of nothing, where there is none."""
    off = (predicted - truth).abs()
    log_off = predicted.log() - truth.log()
    ratio = torch.maximum(predicted / truth, truth / predicted)
    values = {
        "pixels": truth.new_tensor(len(truth)),
        "abs_rel": (off / truth).mean(),
        "sq_rel": (off.square() / truth).mean(),
        "sq_rel_gt2": (off / truth).square().mean(),
        "rmse": off.square().mean().sqrt(),
        "rmse_log": log_off.square().mean().sqrt(),
        "log_bias": log_off.mean(),
        "silog": (log_off - log_off.mean()).square().mean(),
        **{f"delta{k}": (ratio < limit).double().mean() for k, limit in enumerate(_THRESHOLDS, start=1)},
        "mae": off.mean(),
    }
    for limit in NEARER_M:
        near = off[truth < limit]
        values |= {f"mae_{limit:g}": near.mean(), f"pixels_{limit:g}": truth.new_tensor(len(near))}
    return values


def depth_summary(
    rows: dict[str, Tensor],
    groups: Sequence[str],
    *,
    sq_rel: Literal["gt", "gt2"] = "gt",
    averaging: Literal["frame", "pixel"] = "frame",
) -> dict[str, Any]:
    """The table of a set, pooled and by sequence.

    Args:
        rows: of `depth_rows`, all frames of the set.
        groups: the sequence of each frame.
        sq_rel: what SqRel's square is divided by: the truth, or its square as in RAMNet.
        averaging: "frame" = every frame's number counts alike (as in E2Depth and RAMNet); "pixel" = as if all frames
            were one.
    Returns:
        "cut-off 80 m" -> {"all": numbers, "events": numbers, "sequences": {name: {"all", "events"}}, "averaging",
        "sq_rel"}; numbers: abs_rel, sq_rel, rmse, rmse_log, silog, delta1–3 (shares), mae, mae_10, … (m), `frames`
        and `pixels` that they are of; NaN for none. The pooled numbers are of all frames, not of the sequences' means.
    Raises:
        ValueError: a prediction that is not finite where there is truth.
    """
    if (bad := rows["pixels_not_finite"] > 0).any():
        raise ValueError(
            f"a predicted depth is not finite in {int(bad.sum())} of {len(bad)} frames, the first being number "
            f"{int(bad.nonzero()[0])} (of {groups[int(bad.nonzero()[0])]}); has training diverged?"
        )
    titles = [name.removesuffix("/all/pixels") for name in rows if name.endswith("/all/pixels")]
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    table: dict[str, Any] = {}
    for title in titles:
        own = {pixels: _columns(rows, f"{title}/{pixels}/") for pixels in _PIXELS}
        assert len(groups) == len(own["all"]["pixels"]), f"{len(groups)} groups of {len(own['all']['pixels'])} frames"
        table[title] = {
            **{pixels: _average(columns, sq_rel, averaging) for pixels, columns in own.items()},
            "sequences": {
                group: {
                    pixels: _average({name: column[of] for name, column in columns.items()}, sq_rel, averaging)
                    for pixels, columns in own.items()
                }
                for group, of in members.items()
            },
            "averaging": averaging,
            "sq_rel": sq_rel,
        }
    return table


def _columns(rows: dict[str, Tensor], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): column.detach().cpu().double().numpy()
        for name, column in rows.items()
        if name.startswith(prefix)
    }


def _average(columns: dict[str, np.ndarray], sq_rel: str, averaging: str) -> dict[str, float | int]:
    def mean(name: str, count: str = "pixels", square: bool = False) -> float:
        pixels = columns[count]
        values, weights = columns[name][pixels > 0], pixels[pixels > 0]
        if not len(values):
            return float("nan")
        if averaging == "frame":
            return float(values.mean())
        average = float(np.average(values**2 if square else values, weights=weights))
        return average**0.5 if square else average

    silog = mean("silog")
    if averaging == "pixel":
        silog = max(mean("rmse_log", square=True) ** 2 - mean("log_bias") ** 2, 0.0)
    return {
        "abs_rel": mean("abs_rel"),
        "sq_rel": mean("sq_rel" if sq_rel == "gt" else "sq_rel_gt2"),
        "rmse": mean("rmse", square=True),
        "rmse_log": mean("rmse_log", square=True),
        "silog": silog,
        **{f"delta{k}": mean(f"delta{k}") for k in (1, 2, 3)},
        "mae": mean("mae"),
        **{f"mae_{limit:g}": mean(f"mae_{limit:g}", f"pixels_{limit:g}") for limit in NEARER_M},
        "frames": int((columns["pixels"] > 0).sum()),
        "pixels": int(columns["pixels"].sum()),
    }


_COLUMNS = {
    "abs_rel": "AbsRel",
    "sq_rel": "SqRel",
    "rmse": "RMSE",
    "rmse_log": "RMSElog",
    "silog": "SILog",
    "delta1": "δ1",
    "delta2": "δ2",
    "delta3": "δ3",
    "mae": "MAE",
    **{f"mae_{limit:g}": f"<{limit:g}m" for limit in NEARER_M},
}


def tables(summary: dict[str, Any]) -> str:
    """Text for a terminal: a table a cut-off, a row a kind of pixels, and one of each sequence where there are several.

    Args:
        summary: of `depth_summary`.
    """
    lines: list[str] = []
    for title, table in summary.items():
        divisor = "gt" if table["sq_rel"] == "gt" else "gt²"
        entries = [("all frames", table)]
        if len(table["sequences"]) > 1:
            entries += list(table["sequences"].items())
        names = [f"{name}, {pixels}" for name, _ in entries for pixels in _PIXELS]
        width = max(map(len, names))
        lines.append(f"{title} · mean per {table['averaging']} · SqRel ÷ {divisor} · MAE in m, <10m = where gt < 10 m")
        lines.append(" " * width + "".join(f"{label:>9}" for label in _COLUMNS.values()) + f"{'frames':>9}")
        for name, entry in zip(names, (each[pixels] for _, each in entries for pixels in _PIXELS)):
            numbers = "".join(f"{entry[column]:9.3f}" for column in _COLUMNS)
            lines.append(f"{name:<{width}}{numbers}{entry['frames']:>9}")
        lines.append("")
    return "\n".join(lines).rstrip()
