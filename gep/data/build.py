"""From a data config to the sets that a run trains and evaluates on."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from gep.data.config import DataConfig
from gep.data.image_stream import StillStream, StreamBatches
from gep.data.images import StillImages
from gep.data.listing import Listing
from gep.data.mix import Mixed
from gep.data.paired import Recordings
from gep.data.registry import list_recordings
from gep.data.sampler import Batch, Batches, Sample, SampleSource
from gep.events.frames import PerSource
from gep.events.represent import Representation

_PLACES = ("root", "images.path", "cache_dir")


def take_over(
    config: DataConfig,
    settings: Mapping[str, Any],
    source: str,
    *,
    given: Collection[str] = (),
    free: Collection[str] = (),
) -> DataConfig:
    """The config with an export's input settings; warns where the config asked for something else.

    Args:
        config: the user's.
        settings: `GEPModel.input_settings`.
        source: the export's name, for the message.
        given: dotted keys that the user set (`config.given`).
        free: settings that are the config's own where it sets them (stage 2 may read longer sequences of the same
            frames, a probe larger frames); in a mix each source has its own anyway.
    """
    own = [name for name in free if f"data.{name}" in given]
    if "num_events" in own or "window_us" in own:
        own += ["num_events", "window_us"]  # one of them cuts, the other is 0
        if "num_events" in own and "data.window_us" not in given:
            config = dataclasses.replace(config, window_us=0)
    own += [name for name in ("fit", "window_us", "num_events") if config.mix]
    settings = {name: value for name, value in settings.items() if name not in own}
    ignored = [
        f"data.{name}={getattr(config, name)} ({value} there)"
        for name, value in settings.items()
        if f"data.{name}" in given and getattr(config, name) != value
    ]
    if ignored:
        warnings.warn(f"no effect, as {source} fixes its own input: {', '.join(ignored)}", stacklevel=2)
    return dataclasses.replace(config, **settings)


def build(
    config: DataConfig, *, paired: bool, crops: bool = False
) -> tuple[Recordings | StillImages | StillStream | Mixed, Recordings | StillImages]:
    """(training, evaluation) sets of a config, disjoint. A mix is evaluated on its first source.

    A further source of the same set and folder holds the same samples back. That one holds the first one's recordings
    in another form (shards) is not noticed.

    Args:
        config: what to read.
        paired: whether every sample must have its image.
        crops: see `Recordings`.
    Raises:
        FileNotFoundError, ValueError: see `list_recordings`, `Recordings` and `StillImages`.
    """
    found: dict[str, Any] = {}
    first = next(iter(config.sources().values()))
    for name, source in config.sources().items():
        try:
            if not found:
                found[name] = _build_one(source, paired=paired, crops=crops)
            elif _place(source) == _place(first):
                same = dataclasses.replace(source, holdout=first.holdout)
                found[name] = _build_one(same, paired=paired, crops=crops)
            else:  # only the first source is evaluated on: nothing else is held back
                found[name] = (_train_only(source, paired=paired, crops=crops), None)
        except (ValueError, OSError) as error:
            if not config.mix:
                raise
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"data.mix.{name}: {error}") from error
    held = next(iter(found.values()))[1]
    if not config.mix:
        return next(iter(found.values()))
    streams = [name for name, (train, _) in found.items() if isinstance(train, StillStream)]
    if streams:
        raise ValueError(
            f"data.mix.{streams[0]}.images.streaming=true: a stream cannot be mixed, as its rows have no numbers; "
            "read it without streaming, or pack it into shards"
        )
    weights = {name: entry.weight for name, entry in config.mix.items()}
    return Mixed({name: train for name, (train, _) in found.items()}, weights), held


def batches_of(
    source: SampleSource | StillStream, collate: Callable[[Sequence[Sample]], Batch], train: Any, data: DataConfig
) -> Batches | StreamBatches:
    """What `engine.fit` iterates over, by a run's `TrainConfig`: addressed by index, or read as a stream."""
    kind: Any = StreamBatches if isinstance(source, StillStream) else Batches
    return kind.of_run(source, collate, train, data.max_bad_fraction)


def represent_of(represent: Representation, data: DataConfig) -> Representation | PerSource:
    """The representation; in a mix with statistics of their own, one a source behind one face.

    Raises:
        ValueError: a statistic that this representation does not have.
    """
    if not any(entry.represent for entry in data.mix.values()):
        return represent
    for name, entry in data.mix.items():
        unknown = set(entry.represent) - {field.name for field in dataclasses.fields(represent)}
        if unknown:
            raise ValueError(f"data.mix.{name}.represent.{unknown.pop()}: {type(represent).__name__} has no such value")
    return PerSource(tuple(dataclasses.replace(represent, **entry.represent) for entry in data.mix.values()))


def roots(data: DataConfig) -> tuple[str, ...]:
    """The names of the fields that say where data lie, which a resumed run may find elsewhere."""
    return (*(f"data.{f}" for f in _PLACES), *(f"data.mix.{n}.{f}" for n in data.mix for f in _PLACES))


def _build_one(
    config: DataConfig, *, paired: bool, crops: bool
) -> tuple[Recordings | StillImages | StillStream, Recordings | StillImages]:
    if config.name == "images":
        return StillImages.split(config, paired=paired)
    listing = list_recordings(config.name, config.root, config.train_split, config)
    if config.eval_split:
        train, held = listing, list_recordings(config.name, config.root, config.eval_split, config)
    else:
        train, held = listing.hold_out(config.holdout)
    check_classes(train, held)
    for name, part in (("training", train), ("evaluation", held)):
        if len(part) == 0:
            raise ValueError(
                f"data: the {name} set is empty ({len(listing)} recordings, data.holdout={config.holdout})"
            )
    settings: dict[str, Any] = {"config": config, "paired": paired, "crops": crops}
    train_set = Recordings(train, **settings)
    try:
        return train_set, Recordings(held, **settings)
    except ValueError as error:
        if config.eval_split:
            raise
        raise ValueError(f"{error}; or hold more of the recordings out (data.holdout={config.holdout:g})") from error


def _train_only(config: DataConfig, *, paired: bool, crops: bool) -> Recordings | StillImages | StillStream:
    if config.name == "images":
        return StillImages.whole(config, paired=paired)
    listing = list_recordings(config.name, config.root, config.train_split, config)
    return Recordings(listing, config, paired=paired, crops=crops)


def _place(config: DataConfig) -> tuple[str, str, str]:
    return config.name, config.root, config.images.path


def check_classes(train: Listing, held: Listing) -> None:
    """Raises ValueError where the two do not hold the same classes in the same order."""
    if train.classes != held.classes:
        differing = sorted(set(train.classes) ^ set(held.classes)) or ["(their order)"]
        raise ValueError(
            f"data: {train.split} and {held.split} do not hold the same classes, so that one label would mean two "
            f"things: {', '.join(differing[:5])} … ({len(train.classes)} and {len(held.classes)}); complete the splits"
        )
