"""Classes by names that a language model knows: a set's own, ImageNet's, or those of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from downstream.llm_evrep.prompts import said


def class_names(classes: Sequence[str], how: str = "") -> tuple[str, ...]:
    """Names to ask for, in the order of the classes.

    Args:
        classes: of the data set, as its folders are called.
        how: empty = the classes themselves; "imagenet" = English names of ImageNet-1k's synsets; else a file with a
            line a class: "<class> <name>" (as ImageNet's LOC_synset_mapping.txt), or names alone in the classes' order.
    Returns:
        A name a class; underscores are written as spaces.
    Raises:
        ValueError: classes that have no name there.
        FileNotFoundError: no such file.
    """
    if not how:
        return tuple(said(name) for name in classes)
    if how == "imagenet":
        return _looked_up(classes, _imagenet(), "class_names=imagenet: ImageNet-1k has")
    path = Path(how).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"class_names={how}: no such file; give imagenet, or a file with a line a class")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    named = {first: rest.strip() for first, _, rest in (line.partition(" ") for line in lines) if rest.strip()}
    if set(classes) & set(named):
        return _looked_up(classes, named, f"class_names={how} has")
    if len(lines) != len(classes):
        raise ValueError(
            f"class_names={how}: {len(lines)} lines for {len(classes)} classes; write '<class> <name>' on each, or "
            "exactly one name a class, in the order of the sorted classes"
        )
    return tuple(said(line) for line in lines)


def first_of_name(names: Sequence[str]) -> list[int]:
    """For each class the first one of its name: a reader cannot tell classes of one name apart."""
    first: dict[str, int] = {}
    return [first.setdefault(said(name).lower(), label) for label, name in enumerate(names)]


def _looked_up(classes: Sequence[str], named: dict[str, str], where: str) -> tuple[str, ...]:
    missing = [name for name in classes if name not in named]
    if missing:
        raise ValueError(f"{where} no name for {len(missing)} of {len(classes)} classes, such as {missing[0]!r}")
    return tuple(said(named[name]) for name in classes)


def _imagenet() -> dict[str, str]:
    import open_clip  # seconds to import
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), open_clip.IMAGENET_CLASSNAMES))
