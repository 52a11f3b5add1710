"""The bytes of every member of a set of shards, mapped or fetched when they are first asked for."""

from __future__ import annotations

import mmap
import warnings
import zlib
from collections import OrderedDict
from typing import Any

from gep.data.bad import BadSample
from gep.data.shard_index import Table
from gep.data.shard_store import Store

EVENTS = "events.arrow"
"""Suffix of the events in gep's own container."""
_OPEN_SHARDS = 64  # mapped at once in a process


class Shards:
    """The bytes of every member; pickles without its open files, so that data workers can take it along.

    Args:
        store: where the shards are.
        table: what is in them.
        past_us, future_us: how much of a recording is stored before and after each span.
    Raises:
        FileNotFoundError: a shard on this machine is missing.
    """

    def __init__(self, store: Store, table: Table, past_us: int = 0, future_us: int = 0):
        self.store, self.table, self.past_us, self.future_us = store, table, past_us, future_us
        self._open: OrderedDict[int, memoryview] = OrderedDict()
        self._faults: dict[int, str] = {}
        if store.folder is not None:
            self._look()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def name(self, index: int, suffix: str) -> str:
        """What messages call a member: its shard's address and its suffix."""
        return f"{self.store.name(self.table.shards[self.table.shard[index]].file)}: {self.table.keys[index]}.{suffix}"

    def suffix(self, index: int, choices: tuple[str, ...]) -> str | None:
        """The first of the suffixes that the sample has a member of."""
        members = self.table.members
        return next((s for s in choices if s in members and members[s][index, 0] >= 0), None)

    def member(self, index: int, suffix: str) -> memoryview:
        """A member's bytes, without a copy; checked against its CRC-32 where the index knows it.

        Raises:
            BadSample: the sample has no such member, its shard is damaged or cut off before it, or its bytes changed.
        """
        key, number = self.table.keys[index], int(self.table.shard[index])
        column = self.table.members.get(suffix)
        offset, size, crc = (-1, 0, -1) if column is None else column[index].tolist()
        if offset < 0:
            raise BadSample(key, f"{self.name(index, suffix)}: there is no such member")
        data = self._map(number, key)
        if offset + size > len(data):
            raise BadSample(key, f"{self.name(index, suffix)}: bytes {offset}..{offset + size}: {self._short(number)}")
        part = data[offset : offset + size]
        # The container of events has checksums of its own, and is not always read whole.
        if crc >= 0 and suffix != EVENTS and zlib.crc32(part) != crc:
            raise BadSample(key, f"{self.name(index, suffix)}: byte {offset}: its CRC-32 is not the index's")
        return part

    def _map(self, number: int, key: str) -> memoryview:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.table.shards[number]
        if number not in self._faults:
            try:
                path = self.store.local(shard.file, shard.bytes, shard.sha256)
                with open(path, "rb") as file:
                    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except ValueError as error:  # damaged on its way, or empty; what cannot be reached stays an OSError
                name = self.store.name(shard.file)
                self._faults[number] = str(error) if name in str(error) else f"{name}: {error}"
        if number in self._faults:
            raise BadSample(key, self._faults[number])
        self._open[number] = data
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)  # unmapped once no event array is a view on it
        return data

    def _look(self) -> None:
        """Says at once which local shards are missing or cut off, before a run finds out sample by sample."""
        missing = []
        for shard in self.table.shards:
            path = self.store.local(shard.file)
            if not path.is_file():
                missing.append(path)
            elif 0 <= shard.bytes != path.stat().st_size:
                warnings.warn(
                    f"{path}: {path.stat().st_size:,} bytes where the index says {shard.bytes:,}; samples beyond "
                    "its end cannot be read: copy it again",
                    stacklevel=4,
                )
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self.table.shards)} shards are missing, first {missing[0]}"
            )

    def _short(self, number: int) -> str:
        shard = self.table.shards[number]
        return f"the shard has {len(self._open[number]):,} bytes" + (
            f", {shard.bytes:,} by the index" * (shard.bytes >= 0)
        )
