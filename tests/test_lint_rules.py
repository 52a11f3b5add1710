"""What linters leave out: long files give their reason, silenced rules are named, and all but kernels is annotated."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gep", "stage1_align", "stage2_autoregress", "downstream")
FOLDERS = (*PACKAGES, "bench", "tests")
MOST_LINES = 350
REASON = "One file:"
MOST_IGNORES = 15
_SILENCED = re.compile(r"#\s*(type:\s*ignore|noqa)\b(.*)")
_NAMED = {"type:ignore": re.compile(r"\[[a-z-]+\]"), "noqa": re.compile(r":\s*[A-Z]+[0-9]+")}
_KERNELS = ("njit", "intrinsic")  # numba infers their types and reads no annotations


@cache
def files(*folders: str) -> tuple[Path, ...]:
    return tuple(sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")))


def too_long(source: str) -> bool:
    """Whether a file is above the limit and its first docstring gives no reason."""
    return len(source.splitlines()) > MOST_LINES and REASON not in (ast.get_docstring(ast.parse(source)) or "")


def comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment; "noqa" inside a string is none."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def blanket(comment: str) -> bool:
    """Whether a comment silences a linter without saying which rule."""
    found = _SILENCED.search(comment)
    return found is not None and not _NAMED[found[1].replace(" ", "")].match(found[2])


def unannotated(source: str) -> list[str]:
    """Functions that lack the type of an argument or of what they return; kernels and lambdas aside."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(name in ast.unparse(decorator) for decorator in node.decorator_list for name in _KERNELS):
            continue
        own = node.args
        given = [*own.posonlyargs, *own.args, *own.kwonlyargs, *(arg for arg in (own.vararg, own.kwarg) if arg)]
        bare = [arg.arg for arg in given if arg.annotation is None and arg.arg not in ("self", "cls")]
        if bare or (node.returns is None and node.name != "__init__"):
            found.append(f"{node.lineno} {node.name}({', '.join(bare)})")
    return found


def test_long_files_say_why() -> None:
    faults = [str(path.relative_to(ROOT)) for path in files(*FOLDERS) if too_long(path.read_text(encoding="utf-8"))]
    assert not faults, f"more than {MOST_LINES} lines: split them, or give the reason in the docstring ({REASON!r} …)"


def test_silenced_rules_are_named() -> None:
    silenced = [
        f"{path.relative_to(ROOT)}:{line} {text}"
        for path in files(*FOLDERS)
        for line, text in comments(path.read_text(encoding="utf-8"))
        if blanket(text)
    ]
    assert not silenced


def test_few_types_are_ignored() -> None:
    ignored = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files(*PACKAGES)
        for line, text in comments(path.read_text(encoding="utf-8"))
        if re.search(r"type:\s*ignore", text)
    ]
    assert len(ignored) < MOST_IGNORES, ignored


def test_all_but_kernels_is_annotated() -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in files(*PACKAGES)
        for fault in unannotated(path.read_text(encoding="utf-8"))
    ]
    assert not faults


def test_the_rules_find_what_they_look_for() -> None:
    assert too_long('"""Much."""\n' + "x = 1\n" * MOST_LINES)
    assert not too_long('"""Much.\n\nOne file: a table.\n"""\n' + "x = 1\n" * MOST_LINES)
    assert unannotated("def f(a, *b: int) -> None: ...") == ["1 f(a)"]
    assert unannotated("class A:\n    def g(self): ...") == ["2 g()"]
    assert not unannotated("@numba.njit(cache=True)\ndef k(a): ...\nclass A:\n    def __init__(self): ...")


@pytest.mark.parametrize(
    ("comment", "found"),
    [
        ("# type: ignore", True),
        ("# type: ignore  # a reason", True),
        ("# type: ignore[arg-type]  # a reason", False),
        ("# noqa", True),
        ("# noqa: E731", False),
        ("# fmt: skip", False),
    ],
)
def test_blanket_comments(comment: str, found: bool) -> None:
    assert blanket(comment) == found
