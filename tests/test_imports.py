"""The direction of imports is the architecture (DESIGN §2): a test over the syntax tree keeps it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gep", "stage1_align", "stage2_autoregress", "downstream")

# Module prefix -> prefixes of the modules it may import (itself always). The longest match rules.
ALLOWED: dict[str, tuple[str, ...]] = {
    "gep": (),
    "gep.config": (),
    "gep.card": (),
    "gep.export_schema": (),
    "gep.folder_swap": (),
    "gep.export": ("gep.card", "gep.folder_swap"),
    "gep.pretrained": ("gep.export", "gep.export_schema"),
    "gep.distributed": (),
    "gep.optim": (),
    "gep.logs": ("gep.distributed",),
    "gep.guards": ("gep.distributed",),
    "gep.losses": ("gep.distributed",),
    "gep.events": ("gep.events",),
    "gep.models.layers": (),
    "gep.models": ("gep.models", "gep.events.represent", "gep.export", "gep.export_schema", "gep.pretrained"),
    "gep.data": ("gep.data", "gep.events", "gep.distributed"),
    "gep.run_lock": ("gep.distributed",),
    "gep.mask": (),
    "gep.checkpoint_files": (),
    "gep.checkpoint": ("gep.config", "gep.distributed", "gep.run_lock", "gep.checkpoint_files", "gep.mask"),
    "gep.accelerator": ("gep.distributed", "gep.cpu", "gep.logs"),
    "gep.engine": (
        "gep.optim",
        "gep.checkpoint",
        "gep.run_lock",
        "gep.logs",
        "gep.guards",
        "gep.distributed",
        "gep.accelerator",
    ),
    "gep.evaluate": ("gep.data", "gep.accelerator"),
    "gep.hub": ("gep.export", "gep.export_schema", "gep.pretrained", "gep.models", "gep.events", "gep.stream"),
    "gep.stream": ("gep.events", "gep.models"),
    "gep.embed": ("gep.hub", "gep.stream", "gep.events"),
    "gep.interop": ("gep.interop", "gep.hub", "gep.export", "gep.models", "gep.events"),
    "gep.interop.command": ("gep.interop", "gep.hub", "gep.export", "downstream"),
    "gep.cli": ("gep", "stage1_align", "stage2_autoregress", "downstream"),
    "gep.demo": ("gep", "stage1_align", "stage2_autoregress", "downstream"),
    "gep.plan": ("gep", "stage1_align", "stage2_autoregress"),
    "gep.app": ("gep", "downstream"),
    "stage1_align": ("gep", "stage1_align"),
    "stage2_autoregress": ("gep", "stage2_autoregress"),
    "downstream": ("gep", "downstream"),
}
ROOF = ("gep.cli", "gep.demo", "gep.plan", "gep.interop.command", "gep.app")


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(path: Path) -> set[str]:
    """Project modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from gep import config` imports gep.config.
            base = node.module or ""
            names = {f"{base}.{alias.name}" for alias in node.names}
            known = {name for name, _ in modules()}
            found |= {name if name in known else base for name in names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("name, path", modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_down(name: str, path: Path) -> None:
    rule = max((prefix for prefix in ALLOWED if under(name, prefix)), key=len)
    for imported in imports(path):
        if imported == "gep":  # the version alone
            continue
        allowed = under(imported, name) or any(under(imported, prefix) for prefix in ALLOWED[rule])
        assert allowed, f"{name} imports {imported}; {rule} may import {ALLOWED[rule] or 'nothing of the project'}"
        if not any(under(name, roof) for roof in ROOF):
            assert not any(under(imported, roof) for roof in ROOF), f"{name} imports the roof ({imported})"
