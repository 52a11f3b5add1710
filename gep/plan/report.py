"""A plan as text, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from gep.plan.measure import Measured
from gep.plan.plan import Plan

_GIB = 2**30


def text(plan: Plan) -> str:
    """The plan for people: Markdown tables."""
    return "\n".join([*_head(plan), *_parts(plan), *_memory(plan), *_pace(plan), *_disk(plan), *_ways(plan)])


def measured_text(measured: Measured, device: str) -> str:
    """Prediction against measurement."""
    head = f"## {measured.batch} samples a step on this machine ({device}): predicted, measured"
    columns = ["", "predicted", "measured", "predicted / measured"]
    return "\n".join([head, "", *table(columns, measured.rows()), ""])


def to_json(plan: Plan, **more: Any) -> str:
    """The plan for programs: its fields, bytes and seconds; `more` is added at the top level."""
    found = dataclasses.asdict(plan)
    for entry, part in zip(found["parts"], plan.parts):
        entry["flops"] = part.flops._asdict()
    found["memory_bytes"] = sum(plan.memory.values())
    return json.dumps({**found, **more}, indent=2) + "\n"


def _head(plan: Plan) -> list[str]:
    train, shapes = plan.train, plan.shapes
    sequence = ""
    if plan.stage == 2:
        sequence = f", sequences of {_number(shapes['frames'])} frames = {shapes['tokens_a_sequence']:,} tokens"
    processes = "CPU process" if plan.device.name == "cpu" else plan.device.name
    return [
        f"## Stage {plan.stage} on {plan.gpus} x {processes} ({plan.sharding})",
        "",
        f"{train['steps']:,} steps x {train['batch_size']} samples ({train['micro_batch']} a device"
        + (f", {train['accumulate']} micro-batches" if train["accumulate"] > 1 else "")
        + f"), precision {train['precision']}{', compiled' if train['compile'] else ''}"
        f"{', checkpointed' if train['checkpointing'] else ''}; a sample: "
        f"{shapes['windows']} windows and {_number(shapes['images'])} images of "
        f"{shapes['tokens_a_window']} tokens{sequence}",
        "",
    ]


def _parts(plan: Plan) -> list[str]:
    rows = []
    for part in plan.parts:
        count = part.trained + part.frozen
        kind = "–" if not count else "trained" if part.trained else "frozen"
        numbers = (part.flops.forward, part.flops.backward, part.again)
        rows.append([part.name, f"{count / 1e6:.2f}", kind, *(f"{value / 1e9:.3f}" for value in numbers)])
    trained, frozen = (sum(getattr(part, name) for part in plan.parts) for name in ("trained", "frozen"))
    sums = [sum(values) for values in zip(*((p.flops.forward, p.flops.backward, p.again) for p in plan.parts))]
    total = f"{trained / 1e6:.2f} trained, {frozen / 1e6:.2f} frozen"
    rows.append(["all", f"{(trained + frozen) / 1e6:.2f}", total, *(f"{value / 1e9:.3f}" for value in sums)])
    columns = ["part", "parameters [M]", "", "forward [GFLOP/sample]", "backward", "done twice"]
    return [*table(columns, rows), ""]


def _memory(plan: Plan) -> list[str]:
    rows = [[kind, _gib(size)] for kind, size in plan.memory.items()]
    needed = sum(plan.memory.values())
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    rows.append(["all", f"{_gib(needed)} of {plan.usable_bytes / _GIB:.1f} usable: {verdict}"])
    largest = plan.largest_micro_batch
    room = f"up to {largest:,} samples at a time" if largest else "not even one sample at a time"
    return [*table(["memory of a device", "GiB"], rows), "", f"A device could hold {room}.", ""]


def _pace(plan: Plan) -> list[str]:
    pace = plan.pace
    names = ("products", "traffic", "launch", "optimiser", "exchange")
    parts = ", ".join(f"{name} {_seconds(getattr(pace, name + '_s'))}" for name in names)
    data = plan.data
    rows = [
        ["step", f"{_seconds(pace.step_s)} ({parts}), MFU {100 * pace.mfu:.0f} %"],
        ["samples/s", f"{_number(pace.samples_per_s)}"],
        ["whole run", f"{_duration(3600 * pace.hours)} for {plan.samples:,} samples"],
        ["loading must give", f"{_bytes(data['bytes_per_s'])}/s: {_count(data['events_per_s'])} events/s, "
         f"{_count(data['images_per_s'])} images/s ({_bytes(data['bytes_per_sample'])} a sample)"],
    ]  # fmt: skip
    return [*table(["speed", ""], rows), ""]


def _disk(plan: Plan) -> list[str]:
    return [*table(["disk", ""], [[kind, _bytes(size)] for kind, size in plan.disk.items()]), ""]


def _ways(plan: Plan) -> list[str]:
    rows = []
    for option in plan.options:
        if not option.bytes:
            rows.append([option.change, "–", "–", "–", ""])
            continue
        fits = f"{_gib(option.bytes)} GiB, {'fits' if option.fits else 'does not fit'}"
        rows.append([option.change, fits, _seconds(option.step_s), _number(option.samples_per_s), option.note])
    lines = [*table(["option", "memory", "step", "samples/s", ""], rows), ""] if rows else []
    return [*lines, *(f"- {note}" for note in plan.notes), f"- {plan.device.name}: {plan.device.source}"]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, padded so that it reads in a terminal too."""
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
    lines = [[text.ljust(width) for text, width in zip(row, widths)] for row in (columns, *rows)]
    lines.insert(1, ["-" * max(3, width) for width in widths])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}" if size >= 0.1 * _GIB else f"{size / _GIB:.4f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
