"""Image data sets that are streamed: rows in the order they come in, shuffled in a buffer, resumable all the same."""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from gep import distributed
from gep.data.bad import BadSample
from gep.data.image_list import Pictures, Size, as_bytes, class_names, columns, load, num_rows, undecoded
from gep.data.images import StillImages, film
from gep.data.listing import Listing
from gep.data.sampler import Batch, Batches, Sample, _Reader
from gep.data.view import decode

if TYPE_CHECKING:
    from gep.data.config import DataConfig

_STREAM = 0x726F7773  # keeps the samples' randomness apart from the order's, which has the same seed
Row = tuple[str, bytes, int]
"""Key, the picture's file (empty where it cannot be read), and label (-1 = none)."""


class StillStream:
    """The rows of a streamed image data set, and the sample that each becomes (see `StillImages`).

    Without an evaluation split, rows are kept apart by a hash of the picture itself (`data.holdout`), so that neither
    their order nor a copy under another name moves them.

    Args:
        rows: `datasets.IterableDataset` with the picture undecoded.
        image, label: its columns.
        config: canvas, windows and `images`.
        length: rows in all where that is known; resuming past an epoch is quicker with it.
        paired: whether samples hold the `image`.
    """

    def __init__(
        self,
        rows: Any,
        image: str,
        label: str | None,
        config: DataConfig,
        *,
        length: int | None = None,
        paired: bool = True,
    ):
        self.rows, self.image, self.label, self.config, self.length = rows, image, label, config, length
        self.paired = paired
        self.classes = class_names(rows, label)

    @classmethod
    def split(cls, config: DataConfig, *, paired: bool = True) -> tuple[StillStream, StillImages]:
        """(training, evaluation) sets of a config; what is evaluated is read here and kept in memory.

        Raises:
            FileNotFoundError, ValueError: see `image_list.load` and `columns`; or nothing to evaluate.
        """
        images = config.images
        names = [split for split in dict.fromkeys((config.train_split, config.eval_split)) if split]
        parts = [cls._open(config, split, paired) for split in names]
        train, other = parts[0], parts[-1]
        chosen = (row for row in other.one_pass() if config.eval_split or other.held(row))
        found = list(itertools.islice(chosen, images.held_rows))
        rows = [row for row in found if row[1]]
        if len(rows) < len(found):
            warnings.warn(
                f"data.images.path={images.path}: {len(found) - len(rows)} of {len(found)} rows to evaluate hold no "
                "picture and are left out",
                stacklevel=2,
            )
        if not rows:
            raise ValueError(f"data.images.path={images.path}: no row to evaluate; set data.holdout higher")
        name = config.eval_split or f"{config.train_split}[held out {config.holdout:g}]"
        keys, pictures, labels = zip(*rows)
        view = Memory(pictures, (config.height, config.width))
        listing = Listing("images", name, keys, (), np.array(labels, np.int64), train.classes, image=view)
        return train, StillImages(listing, config, paired=paired)

    @classmethod
    def _open(cls, config: DataConfig, split: str, paired: bool) -> StillStream:
        images = config.images
        rows = load(images.path, split, streaming=True)
        rows = rows if rows.features is not None else rows._resolve_features()
        image, label = columns(rows, images.path, images.image_column, images.label_column)
        if label and not _numbered(rows.features[label]):
            _refuse_label(config, label, rows.features[label])
            label = None
        rows = undecoded(rows.select_columns([image, label] if label else [image]), image)
        return cls(rows, image, label, config, length=num_rows(rows, images.path, split), paired=paired)

    def __len__(self) -> int:
        """Rows in all; without end where their number is not known."""
        return sys.maxsize if self.length is None else self.length

    def describe(self) -> str:
        """One line for people."""
        length = "an unknown number of" if self.length is None else str(self.length)
        return f"images {self.config.train_split}: {length} streamed rows, {len(self.classes)} classes"

    def one_pass(self, seed: int | None = None, epoch: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        """One epoch's rows of a rank, shuffled where there is a seed; by files where these divide over the ranks."""
        from datasets.distributed import split_dataset_by_node

        rows = self.rows
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=self.config.images.buffer)
        rows = split_dataset_by_node(rows, rank=rank, world_size=world_size) if world_size > 1 else rows
        rows.set_epoch(epoch)
        empty = 0
        for row in rows:
            try:
                data, _ = as_bytes(row[self.image])
                key = f"{zlib.crc32(data):08x}"
            except (ValueError, OSError):
                # Named by what is the same in every epoch, so that one bad row is counted once.
                data, key = b"", str((row[self.image] or {}).get("path") or "")
                if not key:
                    empty += 1
                    key = f"row without a picture, number {empty}"
            label = row[self.label] if self.label else None
            yield key, data, -1 if label is None else int(label)

    def held(self, row: Row) -> bool:
        """Whether a row of the training split is kept apart for evaluation; one without a picture is not."""
        return bool(row[1]) and int(row[0], 16) < self.config.holdout * 2**32

    def endless(self, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Row]:
        """A rank's training rows, epoch after epoch, from number `skip` on."""
        holdout = not self.config.eval_split
        for epoch in itertools.count():
            length = None if holdout else self._length(rank, world_size)
            if length is not None and skip >= length:
                skip -= length
                continue
            found = 0
            for row in self.one_pass(seed, epoch, rank, world_size):
                if holdout and self.held(row):
                    continue
                found += 1
                if skip:
                    skip -= 1
                else:
                    yield row
            if not found:
                raise ValueError(f"data.images.path={self.config.images.path}: no row for rank {rank} of {world_size}")

    def _length(self, rank: int, world_size: int) -> int | None:
        """Rows of a rank in an epoch; None where it depends on which files the rank gets."""
        by_file = world_size > 1 and self.rows.num_shards % world_size == 0
        return None if self.length is None or by_file else len(range(rank, self.length, world_size))

    def sample_of(self, row: Row, rng: np.random.Generator) -> Sample:
        """The sample that a row becomes.

        Raises:
            BadSample: the picture cannot be read.
        """
        key, data, label = row
        if not data:
            raise BadSample(key, "the cell holds no picture, or the file that it names cannot be read")
        try:
            picture = decode(data, key)
        except ValueError as error:
            raise BadSample(key, str(error)) from error
        return film(picture, self.config, key=key, label=label, number=0, rng=rng, paired=self.paired)


def _numbered(kind: Any) -> bool:
    """Whether a label column's values are numbers as they are."""
    return hasattr(kind, "names") or str(getattr(kind, "dtype", "")).startswith(("int", "uint", "bool"))


def _refuse_label(config: DataConfig, label: str, kind: Any) -> None:
    """A column that was asked for is an error; one that was found by its name is left out, with a warning."""
    text = (
        f"data.images.path={config.images.path}: the labels in column {label} are {getattr(kind, 'dtype', kind)}, "
        "which have no numbers before all rows are read"
    )
    if config.images.label_column:
        raise ValueError(f"{text}; set data.images.streaming=false, or label_column to a column of integers")
    warnings.warn(f"{text}: this stream has no labels (with data.images.streaming=false it has)", stacklevel=2)


@dataclass(frozen=True, eq=False)
class Memory(Pictures):
    """Pictures whose files are held in memory."""

    files: tuple[bytes, ...]
    size: Size

    def encoded(self, index: int) -> tuple[bytes, str]:
        return as_bytes({"bytes": self.files[index]})


class StreamBatches(Batches):
    """`Batches` over a stream: the training process reads the rows, its workers make samples of them.

    What a step takes is a function of (seed, step, ranks), and not of the number of workers; a resumed run reads the
    stream up to its place again, without decoding it. The arguments are those of `Batches`, with a `StillStream`.
    """

    source: StillStream  # type: ignore[assignment]

    def _stream(self, start_step: int) -> Generator[list[Batch], None, None]:
        reader = _RowReader(self.source, self.collate, self.seed, self.max_bad)
        requests = _ahead(self._requests(start_step), 2)
        micro_batches: Iterator[Batch]
        if self.num_workers == 0:
            micro_batches = (reader[request] for request in requests)
        else:
            micro_batches = iter(
                DataLoader(
                    reader,
                    batch_size=None,
                    sampler=requests,
                    num_workers=self.num_workers,
                    pin_memory=torch.cuda.is_available(),
                    worker_init_fn=distributed.ignore_signals,
                    multiprocessing_context="spawn" if torch.cuda.is_available() else None,
                )
            )
        try:
            while True:
                yield [next(micro_batches) for _ in range(self.accumulate)]
        finally:
            requests.close()

    def _requests(self, start_step: int) -> Iterator[list[tuple[int, Row]]]:  # type: ignore[override]
        own = self.batch_size // self.world_size
        rows = self.source.endless(self.seed, self.rank, self.world_size, start_step * own)
        for step in itertools.count(start_step):
            first = step * self.batch_size + self.rank * own
            for part in np.split(np.arange(first, first + own), self.accumulate):
                yield [(int(position), next(rows)) for position in part]


class _RowReader(_Reader):
    """Requests of (position, row) -> batch; an unreadable row is named, counted and replaced by its neighbour."""

    def __init__(
        self, source: StillStream, collate: Callable[[Sequence[Sample]], Batch], seed: int, max_bad: float = 0.0
    ):
        # Without the rows themselves: workers are handed theirs, and an open stream does not travel.
        bare = StillStream.__new__(StillStream)
        bare.config, bare.length, bare.paired = source.config, source.length, source.paired
        super().__init__(bare, collate, seed, max_bad)  # type: ignore[arg-type]

    def __getitem__(self, request: Sequence[tuple[int, Row]]) -> Batch:  # type: ignore[override]
        return self.collate([self._sample_at(place, request) for place in range(len(request))])

    def _sample_at(self, place: int, request: Sequence[tuple[int, Row]]) -> Sample:
        self._seen += 1
        position = request[place][0]
        for later in range(len(request)):
            _, row = request[(place + later) % len(request)]
            try:
                rng = np.random.default_rng([_STREAM, self.seed, position])
                return cast(StillStream, self.source).sample_of(row, rng)
            except BadSample as error:
                if later == 0:
                    self._count(error)
        raise ValueError(f"none of the {len(request)} pictures of a micro-batch can be read; check the data set")


def _ahead(items: Iterable[Any], size: int) -> Generator[Any, None, None]:
    """The same items, up to `size` of them made in advance by a thread, so that reading overlaps with training."""
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(size)
    stop = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stop.is_set():
            try:
                made.put(entry, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            if all(put((True, item)) for item in items):
                put((False, StopIteration()))
        except BaseException as error:  # handed on to the consumer, whatever it is
            put((False, error))

    threading.Thread(target=work, daemon=True, name="rows").start()
    try:
        while True:
            good, value = made.get()
            if not good:
                if isinstance(value, StopIteration):
                    return
                raise value
            yield value
    finally:
        stop.set()
