"""The timer index: which TIMER records of the log are pending, by due time. Derived, in LMDB (``timers/``).

A timer is named by the position of its TIMER record; one that was carried on, by its *origin* as well: the position of
the first record that it descends from, which is in its handle.

    due       due 8 | position 8      -> (nothing)
    pending   position 8              -> due 8 | size 4 | origin 8
    carried   origin 8                -> position 8         of the pending ones whose record is not the first
    recalled  due 8 | origin 8        -> (nothing)          kept for a while behind their due time

A table that is ahead of its log (a directory that was put together by hand) is made anew.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import lmdb

from shmbroker.store.lmdb_index import U64, LmdbIndex

RECALLED_KEPT_NS: Final = 86_400 * 10**9
_DROP_MAX: Final = 10_000
_DUE: Final = struct.Struct(">QQ")
_PENDING: Final = struct.Struct(">QIQ")


class Timer(NamedTuple):
    """A delayed message that is pending."""

    due: int  # CLOCK_REALTIME ns
    position: int  # of its TIMER record
    size: int  # of that record, padded
    origin: int


class Known(NamedTuple):
    """What the index says about the timer that a handle names."""

    position: int  # the log position that this answer stands for
    timer: Timer | None  # it is pending
    recalled: bool


class TimerIndex(LmdbIndex):
    """The timers of one store. One process writes; any number of others read, each with an object of its own."""

    NAME: ClassVar = "timer index"
    TABLES: ClassVar = ("due", "pending", "carried", "recalled")
    VERSION: ClassVar = b"\x01"

    # ---- writing --------------------------------------------------------------------------------------------------

    def commit(
        self, position: int, added: Iterable[Timer], removed: Iterable[int], recalled: Iterable[tuple[int, int]] = ()
    ) -> None:
        """Make a stretch of the log that ends at ``position`` durable: timers that it added, positions of those that it
        removed, (due, origin) of those that it recalled. What it added and removed again is in neither.

        Raises lmdb.Error (disk full, bad map): the tables are as before.
        """
        timers, gone, undone = sorted(added), sorted(removed), sorted(recalled)

        def change(transaction: Any) -> None:
            self._delete(transaction, gone)  # first: whose place is taken is gone by the same record
            self._put(transaction, timers)
            for due, origin in undone:
                transaction.put(_DUE.pack(due, origin), b"", db=self._tables["recalled"])

        self._commit(position, change)

    def forget_recalled(self, now_ns: int) -> None:
        """Drop those that were due long ago, a bounded number."""
        with self._begin() as transaction:
            cursor = transaction.cursor(self._tables["recalled"])
            if not cursor.first() or _DUE.unpack(cursor.key())[0] > now_ns - RECALLED_KEPT_NS:
                return
        with self._environment.begin(write=True) as transaction:
            cursor = transaction.cursor(self._tables["recalled"])
            for _ in range(_DROP_MAX):
                if not cursor.first() or _DUE.unpack(cursor.key())[0] > now_ns - RECALLED_KEPT_NS:
                    break
                cursor.delete()

    def _put(self, transaction: Any, timers: list[Timer]) -> None:
        transaction.cursor(self._tables["due"]).putmulti([(_DUE.pack(t.due, t.position), b"") for t in timers])
        by_position = sorted((U64.pack(t.position), _PENDING.pack(t.due, t.size, t.origin)) for t in timers)
        transaction.cursor(self._tables["pending"]).putmulti(by_position)
        for timer in timers:
            if timer.origin != timer.position:
                place = U64.pack(timer.origin), U64.pack(timer.position)
                transaction.put(*place, db=self._tables["carried"])

    def _delete(self, transaction: Any, positions: list[int]) -> None:
        for position in positions:
            value = transaction.pop(U64.pack(position), db=self._tables["pending"])
            if value is None:
                continue
            due, _, origin = _PENDING.unpack(value)
            transaction.delete(_DUE.pack(due, position), db=self._tables["due"])
            if origin != position:
                transaction.delete(U64.pack(origin), db=self._tables["carried"])

    # ---- looking up -----------------------------------------------------------------------------------------------

    def after(self, due: int, position: int, count: int) -> list[tuple[int, int]]:
        """(due, position) of the next ``count`` pending timers behind that one."""
        found: list[tuple[int, int]] = []
        with self._begin() as transaction:
            cursor = transaction.cursor(self._tables["due"])
            more = cursor.set_range(_DUE.pack(due, position + 1))
            while more and len(found) < count:
                found.append(_DUE.unpack(cursor.key()))
                more = cursor.next()
        return found

    def oldest(self, start: int, end: int, count: int) -> list[Timer]:
        """The first ``count`` pending timers whose record lies in [start, end), by position."""
        found: list[Timer] = []
        with self._begin() as transaction:
            cursor = transaction.cursor(self._tables["pending"])
            more = cursor.set_range(U64.pack(start))
            while more and len(found) < count:
                timer = _timer(cursor.key(), cursor.value())
                if timer.position >= end:
                    break
                found.append(timer)
                more = cursor.next()
        return found

    def get(self, position: int) -> Timer | None:
        """The pending timer whose record lies there."""
        with self._begin() as transaction:
            value = transaction.get(U64.pack(position), db=self._tables["pending"])
        return None if value is None else _timer(U64.pack(position), value)

    def know(self, origin: int, due: int) -> Known:
        """What the tables say about a handle, all of it at one moment."""
        with self._begin() as transaction:
            (position,) = U64.unpack(transaction.get(b"position", db=self._tables["meta"]))
            key = transaction.get(U64.pack(origin), db=self._tables["carried"]) or U64.pack(origin)
            value = transaction.get(key, db=self._tables["pending"])
            recalled = transaction.get(_DUE.pack(due, origin), db=self._tables["recalled"]) is not None
        return Known(position, None if value is None else _timer(key, value), recalled)

    @property
    def count(self) -> int:
        """How many are pending."""
        with self._begin() as transaction:
            return int(transaction.stat(self._tables["pending"])["entries"])

    def items(self) -> Iterator[tuple[str, bytes, bytes]]:
        """Every entry that follows from the log alone, as (table, key, value): what the rebuild tool compares."""
        with self._begin() as transaction:
            for name in ("due", "pending", "carried"):
                for key, value in transaction.cursor(self._tables[name]):
                    yield name, bytes(key), bytes(value)


_readers = threading.Lock()  # LMDB opens an index once in a process


@contextmanager
def reading(directory: Path, store_id: bytes) -> Iterator[TimerIndex | None]:
    """The index, opened to read by one thread of this process at a time; None if there is none."""
    with _readers:
        try:
            index = TimerIndex(directory, store_id)
        except (lmdb.Error, OSError):
            yield None
            return
        try:
            yield index
        finally:
            index.close()


def _timer(key: bytes, value: bytes) -> Timer:
    due, size, origin = _PENDING.unpack(value)
    return Timer(due, U64.unpack(key)[0], size, origin)
