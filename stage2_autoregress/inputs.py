"""What a stage-2 run reads: recordings and the models that turn them into tokens, or packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from gep.data.build import build, represent_of
from gep.data.config import DataConfig
from gep.data.image_stream import StillStream
from gep.data.images import StillImages
from gep.data.mix import Mixed
from gep.data.paired import Recordings
from gep.data.sampler import Batch, Sample, SampleSource
from gep.data.sequence import Sequences, collate_sequences
from gep.data.token_samples import TokenSamples, TokenSequences, collate_tokens
from gep.data.token_store import TokenStore
from gep.hub import GEPModel
from stage2_autoregress.packed import key_of, lists_of, warn_idle
from stage2_autoregress.tokens import FrozenTokens, PackedTokens

if TYPE_CHECKING:
    from stage2_autoregress.task import Stage2Config


class Inputs(NamedTuple):
    """The sets of a run, and how their batches become sequences of tokens."""

    train: SampleSource
    held: SampleSource
    collate: Callable[[Sequence[Sample]], Batch]
    tokens: FrozenTokens | PackedTokens
    describe: tuple[str, str]
    """What is trained and evaluated on, for people."""


def inputs_of(cfg: Stage2Config, data: DataConfig, model: GEPModel) -> Inputs:
    """A run's sets, from the recordings or from `cfg.tokens`; the image model is built where it is to look at images.

    Args:
        cfg: the run's.
        data: its data settings with the export's input taken over.
        model: stage 1's, on the device to use.
    Raises:
        FileNotFoundError, ValueError: see `build`; or the tokens are not complete, not made from this model, teacher,
            data set and settings (naming both), or without the images that the run needs.
    """
    if cfg.tokens:
        train, held, grid = _packed(cfg, data, model)
        described = train.describe(), held.describe()
        sets = TokenSequences(train, cfg.sequence), TokenSequences(held, cfg.sequence)
        return Inputs(*sets, collate_tokens, PackedTokens(grid), described)
    train_set, eval_set = sources_of(cfg, data)
    teacher = cfg.teacher.build(encoder_preset=model.preset, device=model.device) if uses_images(cfg) else None
    frozen = FrozenTokens(model.encoder, teacher, represent_of(model.represent, data))
    sequences = Sequences(train_set, cfg.sequence), Sequences(eval_set, cfg.sequence)
    return Inputs(*sequences, collate_sequences, frozen, (train_set.describe(), eval_set.describe()))


def uses_images(cfg: Stage2Config) -> bool:
    """Whether a run reads images or their tokens."""
    return cfg.sequence.uses_images or cfg.loss.image > 0


def sources_of(
    cfg: Stage2Config, data: DataConfig
) -> tuple[Recordings | StillImages | Mixed, Recordings | StillImages]:
    """(training, evaluation) sets of recordings.

    Raises:
        ValueError: a stream, whose rows have no numbers; and see `build`.
    """
    train_set, eval_set = build(data, paired=uses_images(cfg))
    if isinstance(train_set, StillStream):
        raise ValueError("data.images.streaming=true: stage 2 addresses its samples by number; unset streaming")
    return train_set, eval_set


def named(data: DataConfig, train_set: Recordings | StillImages | Mixed) -> dict[str, Recordings | StillImages]:
    """The training set's sources by name."""
    sources = train_set.sources if isinstance(train_set, Mixed) else (train_set,)
    # `build` mixes nothing else, streams apart, which have been refused.
    return dict(zip(data.sources(), cast("tuple[Recordings | StillImages, ...]", sources)))


def _packed(
    cfg: Stage2Config, data: DataConfig, model: GEPModel
) -> tuple[TokenSamples | Mixed, TokenSamples, tuple[int, int]]:
    """(training set, evaluation set, rows and columns of a frame's tokens) of `cfg.tokens`.

    Where no source has a root (or a path of pictures) the data set itself is not needed; its list is then not compared.
    """
    store, paired = TokenStore(cfg.tokens), uses_images(cfg)
    key = key_of(data, model, cfg.teacher if paired else None)
    if any(source.root or source.images.path for source in data.sources().values()):
        train_set, eval_set = sources_of(cfg, data)
        key |= lists_of(named(data, train_set), eval_set)
    store.check(key)
    warn_idle(data)
    found = {}
    for number, part in enumerate(store.plan.parts):
        pick = data.pick if part.split == "train" else 0
        found[part.split, part.source] = TokenSamples(store, number, pick=pick, paired=paired)
    names = list(data.sources())
    if missing := [name for name in names if ("train", name) not in found]:
        packed = ", ".join(name for split, name in found if split == "train")
        raise ValueError(f"tokens={cfg.tokens} hold the sources {packed}, not {missing[0]}; pack them anew")
    train: TokenSamples | Mixed = found["train", names[0]]
    if data.mix:
        weights = {name: entry.weight for name, entry in data.mix.items()}
        train = Mixed({name: found["train", name] for name in names}, weights)
    return train, found["eval", names[0]], store.plan.grid
