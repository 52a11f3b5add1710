"""Typed configuration: dataclass defaults < YAML files from left to right < dotted key=value on the command
line.

A program declares nested frozen, keyword-only dataclasses in which every field is followed by a string
literal saying what it means, and calls `load(Config, argv)`. Anything a user mistypes ends in a ConfigError
that names the key, where it came from and what was probably meant.
"""

import ast
import difflib
import inspect
import itertools
import os
import sys
import textwrap
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

T = TypeVar("T")

_COMMAND_LINE = "the command line"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its origin and the way out."""


def load(schema: type[T], argv: Sequence[str] | None = None) -> T:
    """Build a configuration from YAML files and dotted overrides.

    Args:
        schema: a dataclass, its fields primitives, Literal, Optional, list, tuple, dict or further
            dataclasses.
        argv: `file.yaml` and `dotted.key=value` arguments in any order (files apply first); None takes
            sys.argv. `--help` or `-h` prints every field and exits with code 0.
    Returns:
        An instance of schema.
    Raises:
        ConfigError: an unknown key, a value of the wrong type, a missing or unreadable file, a required
            field without value, or a rule of a dataclass's __post_init__.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(arg in ("-h", "--help") for arg in argv):
        print(help_text(schema))
        raise SystemExit(0)
    files, overrides = _split(argv)
    config = OmegaConf.structured(schema)
    for source, given in [(str(path), _read_yaml(path)) for path in files] + [(_COMMAND_LINE, _parse(overrides))]:
        _refuse_unknown_keys(schema, given, source)
        try:
            config = OmegaConf.merge(config, given)
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(schema, config, given, source, error)) from None
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no default: give {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error.msg or error).splitlines()[0]}") from None
    return _build(schema, typing.cast(dict[str, Any], plain), "")


def given(argv: Sequence[str] | None = None) -> set[str]:
    """Dotted names of the fields that YAML files and the command line set, whatever their values."""
    files, overrides = _split(list(sys.argv[1:] if argv is None else argv))
    parts = [_read_yaml(path) for path in files] + [_parse(overrides)]
    return {name for part in parts for name, _ in _leaves(OmegaConf.to_container(part), "") if name}


def dump(cfg: Any) -> str:
    """A configuration as YAML text, every field included; `load` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def help_text(schema: type) -> str:
    """One line per field: dotted name, type, default and meaning."""
    summary = (inspect.getdoc(schema) or "").split("\n")[0]
    if summary.startswith(f"{schema.__name__}("):  # what @dataclass writes where there is no docstring
        summary = f"{schema.__name__}:"
    program = Path(sys.argv[0]).name
    lines = [f"usage: {program} [file.yaml ...] [dotted.key=value ...]", "", summary, ""]
    entries = [(name, f"({kind}, {default})", text) for name, kind, default, text in _walk(schema, None, "")]
    name_width = min(40, max(len(name) for name, _, _ in entries))
    kind_width = min(30, max(len(kind) for _, kind, _ in entries))
    lines += [f"  {name:<{name_width}}  {kind:<{kind_width}}  {text}" for name, kind, text in entries]
    return "\n".join(lines)


def run_cli(main: Callable[[], Any]) -> None:
    """Run a program's main; a user's mistake ends in one line `error: ...` and exit code 2.

    GEP_TRACEBACK=1 prints the traceback too. A user's warning is one line `warning: ...`. A program that ends well
    leaves its process group.
    """
    with_place = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *place: (
        f"warning: {message}\n" if category is UserWarning else with_place(message, category, *place)
    )
    try:
        main()
        ranks = sys.modules.get("torch.distributed")
        if ranks is not None and ranks.is_available() and ranks.is_initialized():
            ranks.destroy_process_group()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("GEP_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error (rank {rank})"
        print(f"{prefix}: {error}", file=sys.stderr)
        if not isinstance(error, ConfigError):
            print("(GEP_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        warnings.formatwarning = with_place


# Reading what the user gave.


def _split(argv: list[str]) -> tuple[list[Path], list[str]]:
    files, overrides = [], []
    for arg in argv:
        if arg.startswith("-"):
            hint = arg.lstrip("-").replace("-", "_")
            hint = hint if "=" in hint else f"{hint}=VALUE"
            raise ConfigError(f"{arg}: there are no flags here; write {hint} (--help lists the keys)")
        if "=" in arg:
            overrides.append(arg)
        elif arg.endswith((".yaml", ".yml")):
            files.append(Path(arg))
        else:
            raise ConfigError(f"{arg}: give a file.yaml or dotted.key=value (--help lists the keys)")
    return files, overrides


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        near = sorted(path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        names = ", ".join(p.name for p in near[:8])
        beside = f"; {path.parent} holds {names}" if near else ""
        raise ConfigError(f"no config file {path} (configs live under configs/){beside}")
    try:
        given = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{path} holds a list; a config file maps keys to values")
    return given


def _parse(overrides: list[str]) -> DictConfig:
    given = OmegaConf.create({})
    for override in overrides:
        key, _, value = override.partition("=")
        if value in ("no", "off", "yes", "on"):  # YAML 1.1 would make truth values of them, and of train.precision=no
            override = f'{key}="{value}"'
        if not key or any(not part for part in key.split(".")):
            raise ConfigError(f"{override}: the key before = must be a dotted name (--help lists the keys)")
        try:
            # An empty value means the empty string, as in a shell; null says "none".
            parsed = OmegaConf.from_dotlist([override]) if value else OmegaConf.create(_nested(key, ""))
            given = typing.cast(DictConfig, OmegaConf.merge(given, parsed))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{override}: {str(error).splitlines()[0]}") from None
    return given


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _refuse_unknown_keys(schema: type, given: DictConfig, source: str) -> None:
    known = [name for name, *_ in _walk(schema, None, "")]
    groups = {name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)}

    def visit(sub_schema: type, node: DictConfig, prefix: str) -> None:
        hints = typing.get_type_hints(sub_schema)
        names = [f.name for f in fields(sub_schema)]
        for key in node:
            dotted = prefix + str(key)
            if key not in names:
                near = difflib.get_close_matches(dotted, [*known, *groups], n=3, cutoff=0.6)
                # The right leaf in the wrong group is the commonest slip: train.lr for optim.lr.
                near += [n for n in known if n.rsplit(".", 1)[-1] == str(key) and n not in near]
                own = ", ".join(names)
                hint = f"did you mean {' or '.join(near[:3])}?" if near else f"keys here are: {own}"
                raise ConfigError(f"unknown key {dotted} in {source}: {hint}")
            inner = _dataclass_in(hints[key])
            if inner is not None and isinstance(child := node._get_node(key), DictConfig) and not node._is_none():
                if not (child._is_none() or child._is_interpolation() or child._is_missing()):
                    visit(inner, child, dotted + ".")

    visit(schema, given, "")


def _explain(schema: type, config: DictConfig, given: DictConfig, source: str, error: Exception) -> str:
    """Which given value does not fit, and what would: OmegaConf does not say it for tuples and groups."""
    expected = {name: kind for name, kind, *_ in _walk(schema, None, "")}
    for key, value in _leaves(OmegaConf.to_container(given), ""):
        try:
            OmegaConf.merge(config, _nested(key, value))
        except OmegaConfBaseException as culprit:
            field = max((n for n in expected if f"{key}.".startswith(f"{n}.")), key=len, default=None)
            if field is None:
                detail = "this is a group of fields; give one of its keys (--help lists them)"
            else:
                kind = expected[field].replace("|", " or ")
                detail = f"{value!r} does not fit, the field takes {kind}"
                if "Integer" in str(culprit) and isinstance(value, float):
                    detail += " (write whole numbers without a point or an exponent)"
            return f"{key} in {source}: {detail}"
    return f"{source}: {str(error).splitlines()[0]}"


def _leaves(value: Any, prefix: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(prefix, value)]
    return [leaf for k, v in value.items() for leaf in _leaves(v, f"{prefix}.{k}" if prefix else str(k))]


# From plain values to dataclasses. Not OmegaConf.to_object: a rule's ValueError should say which group it is
# about.


def _build(schema: type[T], plain: dict[str, Any], prefix: str) -> T:
    hints = typing.get_type_hints(schema)
    values = {name: _convert(hints[name], value, f"{prefix}{name}") for name, value in plain.items()}
    try:
        return schema(**values)
    except ConfigError:
        raise
    except ValueError as error:
        place = prefix.rstrip(".")
        raise ConfigError(f"{place}: {error}" if place else str(error)) from error


def _convert(hint: Any, value: Any, dotted: str) -> Any:
    inner = _dataclass_in(hint)
    if inner is not None and isinstance(value, dict):
        return _build(inner, value, dotted + ".")
    hint = _without_none(hint)
    arguments = typing.get_args(hint)
    if isinstance(value, list) and arguments:
        return [_convert(arguments[0], item, f"{dotted}.{i}") for i, item in enumerate(value)]
    if isinstance(value, dict) and len(arguments) == 2:
        return {key: _convert(arguments[1], item, f"{dotted}.{key}") for key, item in value.items()}
    if hint in (int, float, str, bool) and isinstance(value, dict | list):  # inside a dict, OmegaConf lets it pass
        raise ConfigError(f"{dotted}: {value!r} does not fit, the field takes {_type_name(hint)}")
    return value


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (Union, types.UnionType):
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        return options[0] if len(options) == 1 else hint
    return hint


def _dataclass_in(hint: Any) -> type | None:
    hint = _without_none(hint)
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


# Help.


def _walk(schema: type, instance: Any, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, meaning) of every field, nested groups in place."""
    hints, meanings = typing.get_type_hints(schema), field_meanings(schema)
    for field in fields(schema):
        default = _default(field) if instance is None else getattr(instance, field.name)
        inner = _dataclass_in(hints[field.name])
        if inner is not None and default is not None:
            yield from _walk(inner, None if default is MISSING else default, f"{prefix}{field.name}.")
            continue
        shown = "required" if default is MISSING else _shown(default)
        yield f"{prefix}{field.name}", _type_name(hints[field.name]), shown, meanings.get(field.name, "")
        if inner is not None:  # an optional group that is off by default: its keys exist all the same
            yield from _walk(inner, None, f"{prefix}{field.name}.")


def field_meanings(schema: type) -> dict[str, str]:
    """The string literal that follows each field in the source of a dataclass and of those it inherits."""
    meanings: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # no source: a frozen app, a class typed into a console
            continue
        assert isinstance(tree.body[0], ast.ClassDef)
        for statement, following in itertools.pairwise(tree.body[0].body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                literal = following.value
                if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                    meanings[ast.unparse(statement.target)] = " ".join(literal.value.split())
    return meanings


def _default(field: Field) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else MISSING


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value.items()) + "}"
    return '""' if value == "" else str(value)


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(_shown(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return "|".join("null" if a is type(None) else _type_name(a) for a in arguments)
    if origin is not None:
        inner = ", ".join("..." if a is Ellipsis else _type_name(a) for a in arguments)
        return f"{origin.__name__}[{inner}]"
    return getattr(hint, "__name__", str(hint))
