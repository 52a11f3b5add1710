"""The account of a conversion: every tensor of the file, and what became of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

State = Literal["mapped", "changed", "not needed", "left over"]
_BLOCK = re.compile(r"(?<=blocks\.)\d+(?:\.\d+)?(?=\.)")


@dataclass(frozen=True)
class Row:
    """One tensor of the file."""

    source: str
    """Its name there."""
    shape: tuple[int, ...]
    """Its shape there."""
    state: State
    """What became of it."""
    target: str = ""
    """Name in the encoder's ViT; empty where it went nowhere."""
    how: str = ""
    """How it was changed, or why it is not needed."""


@dataclass
class Conversion:
    """Tensors on their way from a foreign layout to timm's names: what is not yet taken, what is done, and the account.

    Args:
        rest: tensors of the file that no rule has taken yet.
    """

    rest: dict[str, Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def move(self, source: str, target: str, value: Tensor | None = None, how: str = "") -> None:
        """Take `source`, as it is or as the `value` made of it, for `target`; "" = for no tensor of its own."""
        tensor = self.rest.pop(source)
        kept = tensor if value is None else value
        if kept.dtype != torch.float32:
            how = "; ".join(part for part in (how, f"{str(kept.dtype).removeprefix('torch.')} to float32") if part)
        self.rows.append(Row(source, tuple(tensor.shape), "changed" if how else "mapped", target, how))
        if target:
            self.tensors[target] = kept.float()

    def ignore(self, source: str, why: str) -> None:
        """Take `source` for nothing, as it has no part in the encoder's forward."""
        self.rows.append(Row(source, tuple(self.rest.pop(source).shape), "not needed", "", why))

    def ignore_under(self, prefixes: tuple[str, ...], why: str) -> None:
        """`ignore` every name that starts with one of `prefixes`."""
        for name in [name for name in self.rest if name.startswith(prefixes)]:
            self.ignore(name, why)

    def change(self, target: str, value: Tensor, how: str) -> None:
        """Replace a tensor that has been moved to `target`, and say how in its row."""
        self.tensors[target] = value
        at = next(i for i, row in enumerate(self.rows) if row.target == target)
        row = self.rows[at]
        text = "; ".join(part for part in (row.how, how) if part)
        self.rows[at] = Row(row.source, row.shape, "changed", target, text)

    def finish(self) -> None:
        """Whatever no rule took is left over."""
        for name in list(self.rest):
            self.rows.append(Row(name, tuple(self.rest.pop(name).shape), "left over"))

    @property
    def left_over(self) -> list[str]:
        """Names that no rule knew, blocks counted together."""
        return [line[0] for line in _together(row for row in self.rows if row.state == "left over")]


def table(rows: Iterable[Row], beside: Iterable[str] = ()) -> str:
    """The account as text: a line a tensor, equal lines of blocks as one, and the counts.

    Args:
        rows: of a Conversion.
        beside: what lay in the file beside the state dict.
    """
    rows = list(rows)
    lines = [("tensor of the file", "shape", "", "tensor of the encoder", "how"), *_together(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[4]]).rstrip() for line in lines]
    counts: Mapping[str, int] = {
        state: sum(row.state == state for row in rows) for state in ("mapped", "changed", "not needed", "left over")
    }
    text.append(f"{len(rows)} tensors: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    if names := ", ".join(beside):
        text.append(f"beside the state dict, not read: {names}")
    return "\n".join(text)


def _together(rows: Iterable[Row]) -> list[tuple[str, str, str, str, str]]:
    """Rows that differ in nothing but the number of their block, as one."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        number = _BLOCK.search(row.source)
        name, target = _BLOCK.sub("#", row.source), _BLOCK.sub("#", row.target)
        shape = "x".join(map(str, row.shape)) or "1"
        groups.setdefault((name, shape, row.state, target, row.how), []).append(number.group() if number else "")
    lines = []
    for (name, shape, state, target, how), numbers in groups.items():
        span = numbers[0] if len(numbers) == 1 else f"{{{numbers[0]}…{numbers[-1]}}}"
        lines.append((name.replace("#", span), shape, state, target.replace("#", span.split(".")[-1]), how))
    return lines
