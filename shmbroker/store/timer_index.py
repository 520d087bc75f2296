"""The timer index: which TIMER records of the log are pending, by due time. Derived, in LMDB (``timers/``).

LMDB's keys sort as bytes, so all numbers are big-endian. A timer is named by the position of its TIMER record; one
that was carried on, by its *origin* as well: the position of the first record that it descends from, which is in its
handle.

    due       due 8 | position 8      -> (nothing)
    pending   position 8              -> due 8 | size 4 | origin 8
    carried   origin 8                -> position 8         of the pending ones whose record is not the first
    recalled  due 8 | origin 8        -> (nothing)          kept for a while behind their due time
    meta      "store" -> store id and version, "position" -> the log position that the tables have applied

As in key_index.py, ``position`` is written in the same transaction as what it stands for: the tables hold exactly
what the log says up to there. Whoever wants to know more reads the log from there on. Nothing is committed before it
is durable in the log, so a table that is ahead of its log (a directory that was put together by hand) is made anew.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import lmdb

from shmbroker import access

logger = logging.getLogger(__name__)

TABLES: Final = ("due", "pending", "carried", "recalled")
MAP_BYTES: Final = 64 << 20  # address space at first; doubled when full
RECALLED_KEPT_NS: Final = 86_400 * 10**9

DAMAGED: Final = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.ProblemError,
    lmdb.VersionMismatchError,
)
_VERSION: Final = b"\x01"
_NEW_BYTES: Final = 256 << 10  # more than a new, empty index takes
_DROP_MAX: Final = 10_000
_U64: Final = struct.Struct(">Q")
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


class TimerIndex:
    """The index of one store. One process writes; any number of others read, each with an object of its own."""

    def __init__(self, directory: Path, store_id: bytes, *, writable: bool = False, map_bytes: int = MAP_BYTES) -> None:
        """Open the index; a writer makes it, and makes it anew if it is another store's or damaged.

        Raises lmdb.Error: there is none to read. OSError: there is no room for a new one.
        """
        self._directory = directory
        self._store_id = store_id
        self._writable = writable
        self._map_bytes = map_bytes
        try:
            self._open()
        except (*DAMAGED, _Foreign) as error:
            if not writable:
                raise
            logger.warning("timer index %s: %s; it is built anew from the log", directory, error)
            self.reset()

    def close(self) -> None:
        self._environment.close()

    def reset(self) -> None:
        """Throw everything away: position 0, to be filled from the log again."""
        if hasattr(self, "_environment"):
            self._environment.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._open()

    # ---- writing --------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """The tables hold what the log before this position says, durably but for the last moments."""
        return self._position

    def commit(
        self, position: int, added: Iterable[Timer], removed: Iterable[int], recalled: Iterable[tuple[int, int]] = ()
    ) -> None:
        """Make a stretch of the log that ends at ``position`` durable: timers that it added, positions of those that it
        removed, (due, origin) of those that it recalled. What it added and removed again is in neither.

        Raises lmdb.Error (disk full, bad map): the tables are as before.
        """
        timers, gone, undone = sorted(added), sorted(removed), sorted(recalled)
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    self._delete(transaction, gone)  # first: whose place is taken is gone by the same record
                    self._put(transaction, timers)
                    for due, origin in undone:
                        transaction.put(_DUE.pack(due, origin), b"", db=self._tables["recalled"])
                    transaction.put(b"position", _U64.pack(position), db=self._tables["meta"])
                break
            except lmdb.MapFullError:
                self._map_bytes *= 2
                self._environment.set_mapsize(self._map_bytes)
        self._position = position

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
        by_position = sorted((_U64.pack(t.position), _PENDING.pack(t.due, t.size, t.origin)) for t in timers)
        transaction.cursor(self._tables["pending"]).putmulti(by_position)
        for timer in timers:
            if timer.origin != timer.position:
                place = _U64.pack(timer.origin), _U64.pack(timer.position)
                transaction.put(*place, db=self._tables["carried"])

    def _delete(self, transaction: Any, positions: list[int]) -> None:
        for position in positions:
            value = transaction.pop(_U64.pack(position), db=self._tables["pending"])
            if value is None:
                continue
            due, _, origin = _PENDING.unpack(value)
            transaction.delete(_DUE.pack(due, position), db=self._tables["due"])
            if origin != position:
                transaction.delete(_U64.pack(origin), db=self._tables["carried"])

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
            more = cursor.set_range(_U64.pack(start))
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
            value = transaction.get(_U64.pack(position), db=self._tables["pending"])
        return None if value is None else _timer(_U64.pack(position), value)

    def know(self, origin: int, due: int) -> Known:
        """What the tables say about a handle, all of it at one moment."""
        with self._begin() as transaction:
            (position,) = _U64.unpack(transaction.get(b"position", db=self._tables["meta"]))
            key = transaction.get(_U64.pack(origin), db=self._tables["carried"]) or _U64.pack(origin)
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

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._writable:
            self._directory.mkdir(mode=access.directory_mode(), exist_ok=True)
            self._check_room()
        self._environment = lmdb.open(
            str(self._directory),
            map_size=self._map_bytes if self._writable else 0,
            max_dbs=len(TABLES) + 1,
            mode=access.file_mode(),
            readonly=not self._writable,
            metasync=False,
            readahead=False,
            max_readers=64,
            create=self._writable,
        )
        try:
            self._environment.reader_check()  # slots of killed readers
            self._map_bytes = max(self._map_bytes, self._environment.info()["map_size"])
            self._tables: Mapping[str, Any] = {
                name: self._environment.open_db(name.encode(), create=self._writable) for name in (*TABLES, "meta")
            }
            with self._environment.begin(write=self._writable) as transaction:
                meta = self._tables["meta"]
                if self._writable and transaction.get(b"store", db=meta) is None:
                    transaction.put(b"store", self._store_id + _VERSION, db=meta)
                    transaction.put(b"position", _U64.pack(0), db=meta)
                position = transaction.get(b"position", db=meta)
                if transaction.get(b"store", db=meta) != self._store_id + _VERSION or position is None:
                    raise _Foreign("it belongs to another store or version")
                (self._position,) = _U64.unpack(position)
        except BaseException:
            self._environment.close()
            raise

    def _check_room(self) -> None:
        """LMDB writes its lock file through a mapping: a full disk would be SIGBUS. Once made, it has its room."""
        disk = os.statvfs(self._directory)
        if not (self._directory / "lock.mdb").exists() and disk.f_bavail * disk.f_frsize < _NEW_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))

    def _begin(self) -> Any:
        """A reading transaction; follows a writer in another process that has made the map larger."""
        try:
            return self._environment.begin()
        except lmdb.MapResizedError:
            self._environment.set_mapsize(0)
            return self._environment.begin()


_readers = threading.Lock()  # LMDB opens an index once in a process


@contextmanager
def reading(directory: Path, store_id: bytes) -> Iterator[TimerIndex | None]:
    """The index, opened to read by one thread of this process at a time; None if there is none."""
    with _readers:
        try:
            index = TimerIndex(directory, store_id)
        except (lmdb.Error, OSError, _Foreign):
            yield None
            return
        try:
            yield index
        finally:
            index.close()


class _Foreign(Exception):
    """The environment opened, but is not this store's index."""


def _timer(key: bytes, value: bytes) -> Timer:
    due, size, origin = _PENDING.unpack(value)
    return Timer(due, _U64.unpack(key)[0], size, origin)
