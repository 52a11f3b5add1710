"""Typed configuration: precedence, types, typos, help."""

import sys
import warnings
from dataclasses import dataclass, field
from typing import Literal

import pytest

from gep import config
from gep.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Base:
    seed: int = 0
    """inherited: seed of everything"""


@dataclass(frozen=True, kw_only=True)
class Optim(Base):
    lr: float = 1e-3
    """peak learning rate"""
    schedule: Literal["cosine", "linear"] = "cosine"
    """shape over
    the run"""
    warmup: int | None = None
    """warm-up steps"""
    scales: dict[str, float] = field(default_factory=dict)
    """factor by part"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay of moments"""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; give a value > 0")


@dataclass(frozen=True, kw_only=True)
class Root:
    """Train a toy."""

    root: str
    """data folder"""
    names: list[str] = field(default_factory=list)
    """which classes"""
    flag: bool = False
    """a switch"""
    optim: Optim = field(default_factory=lambda: Optim(lr=2e-3))
    """optimiser"""
    second: Optim | None = None
    """another one"""


def test_precedence_defaults_files_command_line(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("root: from_one\noptim: {lr: 3e-4, warmup: 5, scales: {a: 1}}\n")
    two.write_text("optim: {lr: 4.0e-4, betas: [0.8, 0.9]}\n")
    cfg = config.load(Root, [str(one), "optim.warmup=7", str(two), "names=[x, y]", "optim.scales.b=0.5"])
    assert cfg == Root(
        root="from_one",
        names=["x", "y"],
        optim=Optim(lr=4e-4, warmup=7, betas=(0.8, 0.9), scales={"a": 1.0, "b": 0.5}),
    )
    assert isinstance(cfg.optim.betas, tuple) and isinstance(cfg.optim.scales["a"], float)


def test_defaults_come_from_the_field_that_holds_the_group():
    assert config.load(Root, ["root=r"]).optim.lr == 2e-3
    assert config.load(Root, ["root=r"]).second is None
    assert config.load(Root, ["root=r", "second.lr=1.0"]).second == Optim(lr=1.0)
    assert config.load(Root, ["root="]).root == ""
    assert config.load(Root, ["root=a=b c"]).root == "a=b c"


def test_dump_reads_back(tmp_path):
    cfg = Root(root="r", names=["q"], optim=Optim(scales={"a": 0.1}, betas=(0.5, 0.6)), second=Optim())
    (tmp_path / "config.yaml").write_text(config.dump(cfg))
    assert config.load(Root, [str(tmp_path / "config.yaml")]) == cfg
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=1", ["optim.lrr", "the command line", "did you mean optim.lr"]),
        ("lr=1", ["unknown key lr", "optim.lr"]),
        ("optin.lr=1", ["optin", "did you mean optim"]),
        ("zzzzzz=1", ["zzzzzz", "root, names, flag, optim, second"]),
        ("optim.warmup=2.5", ["optim.warmup", "2.5", "int"]),
        ("optim.warmup=1e3", ["optim.warmup", "without a point or an exponent"]),
        ("optim.lr=fast", ["optim.lr", "'fast'", "float"]),
        ("optim.schedule=step", ["optim.schedule", "'step'", "cosine or linear"]),
        ("optim.betas=[0.9]", ["optim.betas", "[0.9]", "tuple[float, float]"]),
        ("optim.scales={a: b}", ["optim.scales.a", "'b'", "dict[str, float]"]),
        ("optim.scales.a.b=1", ["optim.scales.a", "float"]),
        ("names=x", ["names", "'x'", "list[str]"]),
        ("flag=maybe", ["flag", "'maybe'", "bool"]),
        ("optim=3", ["optim", "group of fields"]),
        ("optim.lr=-1", ["optim: lr is -1.0; give a value > 0"]),
        ("second.lr=0", ["second: lr is 0.0"]),
        ("root=${nope}", ["root", "nope"]),
        ("--lr=1", ["--lr=1", "no flags", "lr=1"]),
        ("--flag", ["write flag=VALUE", "--help"]),
        ("words", ["words", "file.yaml or dotted.key=value"]),
        ("=1", ["=1", "dotted name"]),
        ("names=[a", ["names=[a"]),
    ],
)
def test_what_a_user_mistypes_is_named(override, parts):
    with pytest.raises(ConfigError) as caught:
        config.load(Root, ["root=r", override])
    for part in parts:
        assert part in str(caught.value)


def test_the_file_a_mistake_is_in_is_named(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("root: r\noptim: {learning_rate: 1}\n")
    with pytest.raises(ConfigError, match=r"optim\.learning_rate in .*bad\.yaml"):
        config.load(Root, [str(path)])
    path.write_text("root: [unclosed\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not readable YAML"):
        config.load(Root, [str(path)])
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml holds a list"):
        config.load(Root, [str(path)])
    with pytest.raises(ConfigError, match=r"no config file .*gone\.yaml .*live under configs/.*holds bad\.yaml"):
        config.load(Root, [str(tmp_path / "gone.yaml")])
    path.write_text("")
    with pytest.raises(ConfigError, match=r"root has no default: give root=VALUE"):
        config.load(Root, [str(path)])


def test_help_lists_every_field_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        config.load(Root, ["root=r", "--help"])
    assert caught.value.code == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert lines["root"].split(None, 1)[1].startswith("(str, required)")
    assert "(float, 0.002)" in lines["optim.lr"] and lines["optim.lr"].endswith("peak learning rate")
    assert "(cosine|linear, cosine)" in lines["optim.schedule"]
    assert lines["optim.schedule"].endswith("shape over the run")
    assert "(int|null, null)" in lines["optim.warmup"]
    assert "(tuple[float, float], [0.9, 0.999])" in lines["optim.betas"]
    assert lines["optim.seed"].endswith("inherited: seed of everything")
    assert "(dict[str, float], {})" in lines["optim.scales"]
    assert "second.lr" in lines and "(bool, false)" in lines["flag"]


def test_every_field_of_our_own_configs_says_what_it_means():
    from gep.engine import TrainConfig
    from gep.optim import OptimConfig

    for schema in (TrainConfig, OptimConfig):
        assert set(config.field_meanings(schema)) == set(schema.__dataclass_fields__)


def test_run_cli_prints_one_line_and_exits_2(capsys, monkeypatch):
    def fail():
        raise ConfigError("optim.lr: no")

    with pytest.raises(SystemExit) as caught:
        config.run_cli(fail)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: optim.lr: no\n"

    monkeypatch.setenv("GEP_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        config.run_cli(lambda: open("/nonexistent/file"))
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "error: [Errno 2]" in printed
    with pytest.raises(RuntimeError):  # a bug is not a user's mistake
        config.run_cli(lambda: (_ for _ in ()).throw(RuntimeError("bug")))


def test_run_cli_prints_a_missing_extra_and_warnings_in_one_line(capsys):
    def job():
        print(warnings.formatwarning("odd", UserWarning, "file.py", 3), end="", file=sys.stderr)
        raise ImportError("MP4 needs OpenCV")

    before = warnings.formatwarning
    with pytest.raises(SystemExit) as caught:
        config.run_cli(job)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("warning: odd\nerror: MP4 needs OpenCV\n")
    assert warnings.formatwarning is before
