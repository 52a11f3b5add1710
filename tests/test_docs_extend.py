"""docs/EXTEND.md taken literally: its files and edits in a copy of the source, then its Python and its commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from gep.events.io.bin import write_bin
from gep.models.teacher import ImageModel
from tests.layouts import random_events
from tests.test_docs_own_camera import write_own

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "EXTEND.md"
PACKAGES = ("gep", "stage1_align", "stage2_autoregress", "downstream", "configs")
QUICK = ["train.steps=2", "train.batch_size=4", "train.save_every=0", "train.eval_every=0", "train.progress=false"]
DRIVER = """
import importlib, json, sys, warnings
from pathlib import Path

import gep, gep.cli

assert Path(gep.__file__).resolve().parent.parent == Path.cwd().resolve(), gep.__file__
warnings.simplefilter("ignore")
for kind, name, content in json.load(sys.stdin):
    print(f"== {name}", flush=True)
    if kind == "python":
        exec(compile(content, name, "exec"), {})
    elif kind == "gep":
        gep.cli.main(content)
    else:
        importlib.import_module(kind).main(content)
"""


class Block(NamedTuple):
    """A fenced block of the page."""

    language: str
    text: str
    line: int
    """Where it begins."""


def blocks() -> list[Block]:
    text = DOCUMENT.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in found]


def new_file(block: Block) -> tuple[str, str] | None:
    """(path, content) of a block that is a whole file."""
    match = re.match(r"# ([\w/]+\.py)\n", block.text)
    return None if block.language != "python" or match is None else (match[1], block.text[match.end() :])


def edit(block: Block, tree: Path) -> None:
    """Applies a diff block: a path, then lines that begin with a blank, a minus or a plus."""
    head, *lines = block.text.splitlines()
    path = tree / head.removeprefix("--- ")
    old = [line[1:] for line in lines if line[:1] != "+"]
    new = [line[1:] for line in lines if line[:1] != "-"]
    have = path.read_text(encoding="utf-8").splitlines()
    places = [at for at in range(len(have)) if have[at : at + len(old)] == old]
    assert len(places) == 1, f"{DOCUMENT.name}:{block.line}: these lines are in {head[4:]} {len(places)} times: {old}"
    have[places[0] : places[0] + len(old)] = new
    path.write_text("\n".join(have) + "\n", encoding="utf-8")


def steps() -> list[tuple[str, str, str | list[str]]]:
    """(python | gep | module, name, code or arguments) of the blocks that are run, in order."""
    found: list[tuple[str, str, str | list[str]]] = []
    for block in blocks():
        name = f"{DOCUMENT.name}:{block.line}"
        if block.language == "python" and new_file(block) is None:
            found.append(("python", name, block.text))
        elif block.language == "bash":
            for line in block.text.splitlines():
                program, *words = shlex.split(line)
                if program == "gep":
                    found.append(("gep", name, words))
                else:
                    assert [program, words[0]] == ["accelerate", "launch"], line
                    module = words[1].removesuffix(".py").replace("/", ".")
                    found.append((module, name, [*words[2:], *QUICK]))
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source with the page's files and edits in it, and the data that it names."""
    folder = tmp_path_factory.mktemp("extend") / "tree"
    for package in PACKAGES:
        # Compiled kernels go along: they count as fresh where the file's time is the same.
        shutil.copytree(ROOT / package, folder / package)
    for block in blocks():
        if block.language == "diff":
            edit(block, folder)
        elif (file := new_file(block)) is not None:
            assert not (folder / file[0]).exists(), file[0]
            (folder / file[0]).write_text(file[1], encoding="utf-8")
    rng = np.random.default_rng(0)
    for number in range(24):
        home = folder / "marbles" / ("test" if number % 4 == 3 else "train") / ("glass", "steel")[number % 2]
        home.mkdir(parents=True, exist_ok=True)
        write_bin(home / f"{number:03d}.bin", random_events(number, 600, 300_000, 36, 36))
        Image.fromarray(rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)).save(home / f"{number:03d}.png")
    write_own(folder / "own", recordings=2, pictures=12, size=(36, 36), depth=True)
    torch.manual_seed(0)
    model = ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}, ["glass", "steel"])
    model.save(folder / "runs" / "demo" / "teacher" / "export")
    return folder


def test_everything_on_the_page_runs(tree: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=tree, env=environment, input=json.dumps(steps()), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    assert "marbles train: 18 recordings, 2 classes, with images" in done.stdout  # gep info knows the folder
    exported = {name: json.loads((tree / "runs" / name / "export" / "config.json").read_text()) for name in
                ("marbles", "saturated", "projection", "mlp")}  # fmt: skip
    assert exported["saturated"]["representation"] == {"name": "saturated", "params": {"most": 4}}
    assert exported["saturated"]["encoder"]["in_chans"] == 1
    assert exported["projection"]["teacher"] == "projection:6x96"
    assert exported["mlp"]["head"]["name"] == "mlp"


def test_the_page_has_all_four() -> None:
    files = [file[0] for block in blocks() if (file := new_file(block))]
    assert files == ["gep/data/marbles.py", "gep/events/saturated.py", "gep/models/teacher_projection.py"]
    assert len(steps()) >= 10 and any("class MLPHead" in block.text for block in blocks())


def test_a_page_that_no_longer_fits_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one\ntwo\none\n")
    edit(Block("diff", "--- a.py\n-two\n+three\n one\n", 1), tmp_path)
    assert (tmp_path / "a.py").read_text() == "one\nthree\none\n"
    for gone in ("--- a.py\n two\n+four\n", "--- a.py\n one\n+four\n"):
        with pytest.raises(AssertionError, match=r"EXTEND\.md:7: these lines are in a\.py"):
            edit(Block("diff", gone, 7), tmp_path)
