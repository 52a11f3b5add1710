"""From what readers answered to the table: accuracy, refusals, words shared with the RGB frame's, edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from downstream.llm_evrep.intervals import bootstrap, paired_difference
from downstream.llm_evrep.prompts import parse_answer
from downstream.llm_evrep.words import jaccard, words


@dataclass(frozen=True)
class Row:
    """What was asked and measured of one sample."""

    key: str
    """of the sample"""
    label: int
    """its class"""
    answers: dict[str, dict[str, str]] = field(default_factory=dict)
    """reader -> source -> answer to the question"""
    descriptions: dict[str, dict[str, str]] = field(default_factory=dict)
    """reader -> source -> description; empty without an RGB frame"""
    frame: dict[str, str] = field(default_factory=dict)
    """reader -> description of the RGB frame"""
    sobel: dict[str, float] = field(default_factory=dict)
    """source -> mean squared difference of the Sobel magnitudes to the RGB frame's"""


def summarise(
    rows: Sequence[Row],
    reader: str,
    sources: Sequence[str],
    *,
    names: Sequence[str],
    labels: Sequence[int],
    baseline: str = "",
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """The numbers of one reader.

    Args:
        rows: one a sample.
        reader: whose answers.
        sources: in the table's order.
        names: of the classes, as they were asked for.
        labels: for each class the first one of its name.
        baseline: source to measure the gain against; none where it is not in `sources`.
        draws, level, seed: of the intervals.
    Returns:
        source -> accuracy [%] with low and high, refused (answers that name no class), jaccard and sobel_error (None
        without RGB frames), num; beside a baseline also gain [points] over it with gain_low and gain_high.
    """
    options: dict[str, Any] = {"draws": draws, "level": level, "seed": seed}
    found: dict[str, dict[str, Any]] = {}
    right: dict[str, np.ndarray] = {}
    for source in sources:
        parsed = [parse_answer(row.answers[reader][source], names) for row in rows]
        right[source] = 100.0 * np.array([label == labels[row.label] for label, row in zip(parsed, rows)])
        paired = [row for row in rows if reader in row.frame]
        shared = [jaccard(words(row.descriptions[reader][source]), words(row.frame[reader])) for row in paired]
        errors = [row.sobel[source] for row in paired]
        accuracy = bootstrap(right[source], **options)
        found[source] = {
            "accuracy": accuracy.mean,
            "low": accuracy.low,
            "high": accuracy.high,
            "refused": parsed.count(-1),
            "jaccard": float(np.mean(shared)) if paired else None,
            "sobel_error": float(np.mean(errors)) if paired else None,
            "num": len(rows),
        }
    for source in sources if baseline in sources else ():
        if source != baseline:
            gain = paired_difference(right[source], right[baseline], **options)
            found[source] |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
    return found


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The results as lines of text, a reader after the other."""
    width = max([len(source) for found in results.values() for source in found] + [6])
    lines = []
    for reader, found in results.items():
        lines.append(f"\nread by {reader}")
        head = f"{'source':<{width}}  {'accuracy %':>10}  {'interval':>15}  {'gain':>24}"
        lines.append(f"{head}  {'refused':>7}  {'Jaccard':>7}  {'Sobel':>7}  {'samples':>7}")
        for source, row in found.items():
            gain = f"{row['gain']:+.2f} [{row['gain_low']:+.2f}, {row['gain_high']:+.2f}]" if "gain" in row else ""
            interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
            lines.append(
                f"{source:<{width}}  {row['accuracy']:>10.2f}  {interval:>15}  {gain:>24}  {row['refused']:>7}"
                f"  {_or_dash(row['jaccard'])}  {_or_dash(row['sobel_error'])}  {row['num']:>7}"
            )
    return "\n".join(lines).lstrip("\n")


def _or_dash(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.4f'):>7}"
