"""The key index: from a key, a dedup key's id or a message id to positions in the log. Derived, in LMDB (``index/``).

LMDB's keys sort as bytes, so all numbers are big-endian. Entries are grouped by *span*, a fixed stretch of the log, so
that retention drops what it deletes as one range at the front of each table, and a look-up goes from new to old:

    keys     span 4 | topic 4 | digest of the key 16 | position 8            -> (nothing)
    dedup    span 4 | incarnation 8 | sequence 8 | position 8                -> (nothing)
    ids      span 4 | incarnation 8 | sequence // 1024  8                    -> lowest position 8
    meta     "store" -> store id and version, "position" -> the log position that the tables have applied

``position`` is written in the same transaction as the entries it stands for, and LMDB syncs the data of a transaction
before the page that makes it the newest (``metasync=False`` only lets the last transactions go at a loss of power).
So the tables hold what ``position`` says, no less and no more. An entry is a hint all the same: whoever follows it
compares the record itself.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import lmdb

from shmbroker import access
from shmbroker.record import Record, RecordFlag, RecordKind

logger = logging.getLogger(__name__)

SPAN_BYTES: Final = 1 << 30
_DAMAGED: Final = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.ProblemError,
    lmdb.VersionMismatchError,
)
SEQUENCES_PER_ENTRY: Final = 1024
TABLES: Final = ("keys", "dedup", "ids")

_VERSION: Final = b"\x01"
MAP_BYTES: Final = 64 << 20  # address space at first; doubled when full
_NEW_BYTES: Final = 256 << 10  # more than a new, empty index takes
_DROP_MAX: Final = 20_000  # entries deleted in one call: a bounded pass
_U64: Final = struct.Struct(">Q")
_KEY: Final = struct.Struct(">II16sQ")
_KEY_PREFIX: Final = struct.Struct(">II16s")
_DEDUP: Final = struct.Struct(">IQQQ")
_DEDUP_PREFIX: Final = struct.Struct(">IQQ")
_ID: Final = struct.Struct(">IQQ")
_SPAN: Final = struct.Struct(">I")


class KeyIndex:
    """The index of one store. One process writes; any number of others read, each with an object of its own."""

    def __init__(
        self,
        directory: Path,
        store_id: bytes,
        *,
        writable: bool = False,
        span_bytes: int = SPAN_BYTES,
        map_bytes: int = MAP_BYTES,
    ) -> None:
        """Open the index; a writer makes it, and makes it anew if it is another store's or damaged.

        Raises lmdb.Error: there is none to read. OSError: there is no room for a new one.
        """
        self._directory = directory
        self._store_id = store_id
        self._writable = writable
        self._span_bytes = span_bytes
        self._map_bytes = map_bytes
        self._entries: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in TABLES}
        self._lowest: dict[bytes, int] = {}
        try:
            self._open()
        except (*_DAMAGED, _Foreign) as error:
            if not writable:
                raise
            logger.warning("key index %s: %s; it is built anew from the log", directory, error)
            self.reset()

    def close(self) -> None:
        self._environment.close()

    def reset(self) -> None:
        """Throw everything away: position 0, to be filled from the log again."""
        if hasattr(self, "_environment"):
            self._environment.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._forget_pending()
        self._open()

    # ---- writing --------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """The tables hold everything before this position, durably but for the last moments."""
        return self._position

    @property
    def pending(self) -> int:
        """Entries added since the last :meth:`commit`."""
        return sum(map(len, self._entries.values())) + len(self._lowest)

    def add(self, record: Record) -> None:
        """Take a message, or a timer, that the scan has marked. Call it in the order of the log.

        A timer counts as the message that came in its place: the one that it becomes when it fires is not among those
        of its producer, and is found by its own entry.
        """
        span = record.position // self._span_bytes
        if record.kind == RecordKind.MESSAGE:
            for key in record.keys.split():
                self._entries["keys"].append((_KEY.pack(span, record.topic_id, _digest(key), record.position), b""))
        if record.flags & (RecordFlag.DEDUP | RecordFlag.LATE):
            entry = _DEDUP.pack(span, record.incarnation, record.sequence, record.position)
            self._entries["dedup"].append((entry, b""))
        elif record.sequence == 1 or (record.sequence and record.sequence % SEQUENCES_PER_ENTRY == 0):
            number = _ID.pack(span, record.incarnation, record.sequence // SEQUENCES_PER_ENTRY)
            self._lowest.setdefault(number, record.position)

    def commit(self, position: int) -> None:
        """Make all that was added since the last commit, and ``position``, durable together.

        Raises lmdb.Error (disk full, bad map); what was added is then still pending and the tables are as before.
        """
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for name, entries in self._entries.items():
                        transaction.cursor(self._tables[name]).putmulti(sorted(entries))
                    ids = [(key, _U64.pack(lowest)) for key, lowest in sorted(self._lowest.items())]
                    transaction.cursor(self._tables["ids"]).putmulti(ids, overwrite=False)
                    transaction.put(b"position", _U64.pack(position), db=self._tables["meta"])
                break
            except lmdb.MapFullError:
                self._map_bytes *= 2
                self._environment.set_mapsize(self._map_bytes)
        self._position = position
        self._forget_pending()

    def drop_before(self, position: int) -> int:
        """Delete entries of spans that lie wholly before ``position``, a bounded number. Returns how many went."""
        first_kept = _SPAN.pack(position // self._span_bytes)
        dropped = 0
        if not any(self._oldest(name) < first_kept for name in TABLES):
            return 0
        with self._environment.begin(write=True) as transaction:
            for name in TABLES:
                cursor = transaction.cursor(self._tables[name])
                while dropped < _DROP_MAX and cursor.first() and cursor.key()[:4] < first_kept:
                    cursor.delete()
                    dropped += 1
        return dropped

    def cut(self, position: int) -> None:
        """The log was cut at ``position``: forget what lay past it. Rare: nothing is indexed before it is durable."""
        if self._position <= position:
            return
        self._forget_pending()
        first = _SPAN.pack(position // self._span_bytes)
        with self._environment.begin(write=True) as transaction:
            for name in TABLES:
                cursor = transaction.cursor(self._tables[name])
                items = cursor.iternext() if cursor.set_range(first) else ()
                for key in [item[0] for item in items if _position_of(item) >= position]:
                    transaction.delete(key, db=self._tables[name])
            transaction.put(b"position", _U64.pack(position), db=self._tables["meta"])
        self._position = position

    # ---- looking up -----------------------------------------------------------------------------------------------

    def by_key(self, topic_id: int, key: str, limit: int) -> list[int]:
        """Positions of at most ``limit`` records of this topic that have this key, newest first."""
        digest = _digest(key)
        found: list[int] = []
        with self._begin() as transaction:
            cursor = transaction.cursor(self._tables["keys"])
            for span in self._spans(cursor):
                if len(found) >= limit:
                    break
                prefix = _KEY_PREFIX.pack(span, topic_id, digest)
                found.extend(_newest_with_prefix(cursor, prefix, limit - len(found)))
        return found

    def by_id(self, incarnation: int, sequence: int) -> tuple[list[int], tuple[int, int | None]]:
        """Where a message with this id may lie: positions to look at first, then a range of the log to scan.

        The positions are those indexed for a dedup key's id. The range, (0, 0) if this incarnation is unknown, reaches
        from the entry before the id's own to the second one behind it, for threads of one producer may overtake each
        other between numbering and append; an end of None is the end of the log.
        """
        exact: list[int] = []
        with self._begin() as transaction:
            cursor = transaction.cursor(self._tables["dedup"])
            for span in self._spans(cursor):
                exact.extend(_newest_with_prefix(cursor, _DEDUP_PREFIX.pack(span, incarnation, sequence), 64))
            cursor = transaction.cursor(self._tables["ids"])
            entry = sequence // SEQUENCES_PER_ENTRY
            spans = list(self._spans(cursor))
            lowest = {
                number: self._lowest_of(cursor, spans, incarnation, number)
                for number in (entry - 1, entry, entry + 2)
                if number >= 0
            }
        starts = [lowest[number] for number in (entry - 1, entry) if lowest.get(number) is not None]
        if not starts:
            return exact, (0, 0)
        return exact, (min(start for start in starts if start is not None), lowest[entry + 2])

    def items(self, table: str, first: int, end: int) -> Iterator[tuple[bytes, bytes]]:
        """Entries of a table whose position lies in [first, end): what the rebuild tool compares."""
        with self._begin() as transaction:
            for key, value in transaction.cursor(self._tables[table]):
                if first <= _position_of((key, value)) < end:
                    yield key, value

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
            self._tables: dict[str, Any] = {
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

    def _forget_pending(self) -> None:
        for entries in self._entries.values():
            entries.clear()
        self._lowest.clear()

    def _oldest(self, table: str) -> bytes:
        with self._begin() as transaction:
            cursor = transaction.cursor(self._tables[table])
            return bytes(cursor.key()[:4]) if cursor.first() else b"\xff\xff\xff\xff"

    @staticmethod
    def _spans(cursor: Any) -> Iterator[int]:
        """Spans that have entries, newest first."""
        more = cursor.last()
        while more:
            (span,) = _SPAN.unpack(cursor.key()[:4])
            yield span
            cursor.set_range(_SPAN.pack(span))
            more = cursor.prev()

    @staticmethod
    def _lowest_of(cursor: Any, spans: list[int], incarnation: int, number: int) -> int | None:
        for span in reversed(spans):
            value = cursor.get(_ID.pack(span, incarnation, number))
            if value is not None:
                return int(_U64.unpack(value)[0])
        return None


class _Foreign(Exception):
    """The environment opened, but is not this store's index."""


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _position_of(item: tuple[bytes, bytes]) -> int:
    """Of an entry of any table: its value, or the last part of its key."""
    key, value = item
    return int(_U64.unpack(value or key[-8:])[0])


def _newest_with_prefix(cursor: Any, prefix: bytes, limit: int) -> list[int]:
    """Positions behind the keys that begin with ``prefix``, highest first."""
    found: list[int] = []
    # One past the highest key with this prefix, then backwards.
    more = cursor.prev() if cursor.set_range(prefix + b"\xff" * 9) else cursor.last()
    while more and len(found) < limit and cursor.key().startswith(prefix):
        found.append(_U64.unpack(cursor.key()[-8:])[0])
        more = cursor.prev()
    return found
