"""Every command in README.md and docs/: its script, files, sub-command and options exist, and its config loads."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from accelerate.commands.launch import launch_command_parser

import gep.cli
from downstream.dense.settings import PredictOptions
from downstream.depth.task import DepthConfig
from downstream.llm_evrep.config import EvRepConfig
from downstream.llm_evrep.evaluate import EvaluateConfig
from downstream.recognition.task import RecognitionConfig
from downstream.segmentation.task import SegmentationConfig
from gep import config
from gep.data.config import SourceConfig
from stage1_align.task import Stage1Config
from stage2_autoregress.pack import PackConfig
from stage2_autoregress.task import Stage2Config

ROOT = Path(__file__).resolve().parent.parent
# EXTEND.md's commands name what it adds; test_docs_extend.py runs them.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "EXTEND.md"),
]
SCHEMAS = {
    "stage1_align/run.py": Stage1Config,
    "stage2_autoregress/run.py": Stage2Config,
    "stage2_autoregress/tokens.py": PackConfig,
    "downstream/recognition/run.py": RecognitionConfig,
    "downstream/segmentation/run.py": SegmentationConfig,
    "downstream/depth/run.py": DepthConfig,
    "downstream/llm_evrep/run.py": EvRepConfig,
    "downstream/llm_evrep/evaluate.py": EvaluateConfig,
}
STAGES = {"configs/stage1/": Stage1Config, "configs/stage2/": Stage2Config}
PREFIXES = ("gep ", "accelerate launch", "python ", "make ")


class Command(NamedTuple):
    """A command as it is printed, without its continuation lines and its remark."""

    text: str
    page: str
    line: int


def commands_of(page: Path) -> list[Command]:
    """The commands in a page's fenced blocks, braces expanded and remarks cut off."""
    found, fence, pending, start = [], None, "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            fence, pending = (line[3:] if fence is None else None), ""
            continue
        if fence is None:
            continue
        start = start if pending else number
        line = pending + line.strip()
        pending = line[:-1] if line.endswith("\\") else ""
        if pending or not line.startswith(PREFIXES):
            continue
        # In a shell's block a remark follows a #, in a plain one four blanks do as well.
        line = re.split(r"\s#\s" if fence == "bash" else r"\s#\s|\s{4,}", line)[0].rstrip()
        found += [Command(each, page.name, start) for each in expanded(line)]
    return found


def expanded(line: str) -> Iterator[str]:
    """Braces as a shell expands them."""
    parts = re.split(r"\{([^{}\s]*,[^{}\s]*)\}", line)
    for chosen in itertools.product(*(part.split(",") for part in parts[1::2])):
        yield "".join(itertools.chain(*itertools.zip_longest(parts[::2], chosen, fillvalue="")))


def words_of(text: str) -> list[str]:
    """Words of a command; [optional] ones count, of one|other the first does, … stands for anything and is dropped."""
    words = []
    for word in shlex.split(text):
        word = word if "=[" in word else word.strip("[]")
        if word in ("…", ""):
            continue
        words.append(word if "=" in word else word.split("|")[0])
    return words


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = words_of(command.text)
    if program == "make":
        for word in words:
            assert "=" in word or re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE), word
    elif program == "gep":
        check_gep(words, monkeypatch)
    elif program == "accelerate":
        check_launch(words[1:])
    elif words[0] == "-m" and words[1] == "accelerate.commands.launch":
        check_launch(words[2:])
    else:
        check_python(words)


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        found = importlib.util.find_spec(words[1])
        assert found is not None and found.origin, words[1]
        if Path(found.origin).name == "__init__.py":
            found = importlib.util.find_spec(f"{words[1]}.__main__")
        script, rest = Path(found.origin), words[2:]
    else:
        script, rest = ROOT / words[0], words[1:]
        if words[0] in SCHEMAS:
            check_config(words[0], rest)
            return
    assert script.is_file(), script
    if not script.is_relative_to(ROOT / ".venv") and script.is_relative_to(ROOT):
        source = "".join(path.read_text() for path in script.parent.glob("*.py"))
        for word in rest:
            assert not word.startswith("--") or f'"{word}"' in source, f"{script.name} has no {word}"


def check_gep(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By gep's own parser, and by the dataclass behind the sub-command's dotted options."""
    words = ["onnx" if before == "--format" and word == "FORMAT" else word for before, word in pairs(words)]
    monkeypatch.setattr(gep.cli.config, "run_cli", lambda main: None)
    gep.cli.main(words)
    options = [word for word in words[1:] if "=" in word and not word.startswith("-")]
    if words[0] == "shard":
        config.load(SourceConfig, [f"name={words[1]}", *options])
    elif words[0] == "predict":
        config.load(PredictOptions, options)
    elif words[0] == "natural":
        config.load(Stage1Config, options)
    elif words[0] == "plan":
        files = [word for word in words if word.endswith(".yaml")]
        schema = next((schema for prefix, schema in STAGES.items() for file in files if file.startswith(prefix)), None)
        for each in yamls(files):
            assert schema is None or config.load(schema, [*each, *options])


def check_launch(words: list[str]) -> None:
    """By accelerate's own parser, which ends at the script."""
    try:
        arguments = launch_command_parser().parse_args(words)
    except SystemExit:
        raise AssertionError(f"accelerate does not take {words}") from None
    if arguments.config_file is not None:
        assert (ROOT / arguments.config_file).is_file(), arguments.config_file
    check_config(arguments.training_script, arguments.training_script_args)


def check_config(script: str, words: list[str]) -> None:
    assert script in SCHEMAS and (ROOT / script).is_file(), f"{script} is no program that is launched"
    if "--help" in words:
        return
    files = [word for word in words if word.endswith(".yaml")]
    for each in yamls(files):
        config.load(SCHEMAS[script], [*each, *(word for word in words if word not in files)])


def yamls(files: list[str]) -> Iterator[list[str]]:
    """The files of a command by their whole path; NAME.yaml stands for each of its folder."""
    choices = [
        sorted(map(str, (ROOT / file).parent.glob("*.yaml"))) if Path(file).stem == "NAME" else [str(ROOT / file)]
        for file in files
    ]
    return map(list, itertools.product(*choices))


def pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    return itertools.pairwise(["", *words])


COMMANDS = [command for page in PAGES if page.is_file() for command in commands_of(page)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}:{command.line}")
def test_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        check(command, monkeypatch)
    except (AssertionError, ValueError, SystemExit) as error:
        pytest.fail(f"{command.page}:{command.line}: {command.text}\n{error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_commands_name_what_there_is(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gep …` and `accelerate launch …` in running text and tables: sub-command, options, script and files."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8") if page.is_file() else "", flags=re.DOTALL)
    known = subcommands(monkeypatch)
    for span in re.findall(r"`((?:gep|accelerate launch|python) [^`]+)`", text):
        words = words_of(span.replace("\\|", "|"))
        if words[0] == "gep":
            name = words[1]
            assert name in known or name.startswith("-"), f"{page.name}: {span}"
            unknown = {word for word in words if word.startswith("--")} - known.get(name, {"--version", "--help"})
            assert not unknown, f"{page.name}: {span}"
        for word in words:
            if re.fullmatch(r"[a-z0-9_/]+\.(py|yaml)", word) and "/" in word:  # capitals stand for something
                assert (ROOT / word).is_file(), f"{page.name}: {span}"


def subcommands(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """gep's sub-commands and their options, from the parser that its main makes."""
    made: list[argparse.ArgumentParser] = []

    def caught(self: argparse.ArgumentParser, *_: object) -> None:
        made.append(self)
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", caught)
    with pytest.raises(InterruptedError):
        gep.cli.main([])
    monkeypatch.undo()
    (sub,) = (action for action in made[0]._actions if isinstance(action, argparse._SubParsersAction))
    return {name: {o for action in each._actions for o in action.option_strings} for name, each in sub.choices.items()}


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "docs" / "EXTEND.md"]:
        if not page.is_file():
            continue
        for target in re.findall(r"\]\(([^)#\s]+?)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    "text",
    [
        "gep nothing FILE",
        "gep info FILE --colour",
        "gep info FILE data.name=nmnist",
        "gep shard nmnist OUT --root DIR windows=3",
        "gep plan configs/stage1/none.yaml",
        "accelerate launch stage1_align/none.py",
        "accelerate launch --processes 2 stage1_align/run.py",
        "accelerate launch --config_file configs/accelerate/none.yaml stage1_align/run.py",
        "accelerate launch stage1_align/run.py configs/stage1/none.yaml",
        "accelerate launch stage1_align/run.py configs/stage1/nmnist.yaml train.step=3",
        "accelerate launch downstream/depth/run.py data.windows=many",
        "python -m bench.none",
        "python -m bench.plan --nothing",
        "make nothing",
    ],
)
def test_a_wrong_command_is_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check(Command(text, "", 0), monkeypatch)


def test_commands_are_read_as_printed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "gep info outside\n```\ngep info  A      a remark\n```\n```bash\n# no command\n"
        "accelerate launch a.py \\\n    b=[1, 2]\n"
        "gep plan c/{x,y}.yaml [k=1 …] --what one|two    # of many\n```\n"
    )
    assert [(command.text, command.line) for command in commands_of(page)] == [
        ("gep info  A", 3),
        ("accelerate launch a.py b=[1, 2]", 7),
        ("gep plan c/x.yaml [k=1 …] --what one|two", 9),
        ("gep plan c/y.yaml [k=1 …] --what one|two", 9),
    ]
    assert words_of("gep plan [k=1 …] --what one|two p=a|b") == ["gep", "plan", "k=1", "--what", "one", "p=a|b"]
