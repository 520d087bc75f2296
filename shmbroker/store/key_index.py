"""The key index: from a key, a dedup key's id or a message id to positions in the log. Derived, in LMDB (``index/``).

Entries are grouped by *span*, a fixed stretch of the log, so that retention drops what it deletes as one range at the
front of each table, and a look-up goes from new to old:

    keys     span 4 | topic 4 | digest of the key 16 | position 8            -> (nothing)
    dedup    span 4 | incarnation 8 | sequence 8 | position 8                -> (nothing)
    ids      span 4 | incarnation 8 | sequence // 1024  8                    -> lowest position 8

An entry is a hint: whoever follows it compares the record itself.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Final

from shmbroker.record import Record, RecordFlag, RecordKind
from shmbroker.store.lmdb_index import MAP_BYTES, U64, LmdbIndex

SPAN_BYTES: Final = 1 << 30
SEQUENCES_PER_ENTRY: Final = 1024

_DROP_MAX: Final = 20_000  # entries deleted in one call: a bounded pass
_KEY: Final = struct.Struct(">II16sQ")
_KEY_PREFIX: Final = struct.Struct(">II16s")
_DEDUP: Final = struct.Struct(">IQQQ")
_DEDUP_PREFIX: Final = struct.Struct(">IQQ")
_ID: Final = struct.Struct(">IQQ")
_SPAN: Final = struct.Struct(">I")


class KeyIndex(LmdbIndex):
    """The keys and ids of one store. One process writes; any number of others read, each with an object of its own."""

    NAME: ClassVar = "key index"
    TABLES: ClassVar = ("keys", "dedup", "ids")
    VERSION: ClassVar = b"\x01"

    def __init__(
        self,
        directory: Path,
        store_id: bytes,
        *,
        writable: bool = False,
        span_bytes: int = SPAN_BYTES,
        map_bytes: int = MAP_BYTES,
    ) -> None:
        self._span_bytes = span_bytes
        self._entries: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in self.TABLES}
        self._lowest: dict[bytes, int] = {}
        super().__init__(directory, store_id, writable=writable, map_bytes=map_bytes)

    def reset(self) -> None:
        self._forget_pending()
        super().reset()

    # ---- writing --------------------------------------------------------------------------------------------------

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

        def change(transaction: Any) -> None:
            for name, entries in self._entries.items():
                transaction.cursor(self._tables[name]).putmulti(sorted(entries))
            ids = [(key, U64.pack(lowest)) for key, lowest in sorted(self._lowest.items())]
            transaction.cursor(self._tables["ids"]).putmulti(ids, overwrite=False)

        self._commit(position, change)
        self._forget_pending()

    def drop_before(self, position: int) -> int:
        """Delete entries of spans that lie wholly before ``position``, a bounded number. Returns how many went."""
        first_kept = _SPAN.pack(position // self._span_bytes)
        dropped = 0
        if not any(self._oldest(name) < first_kept for name in self.TABLES):
            return 0
        with self._environment.begin(write=True) as transaction:
            for name in self.TABLES:
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

        def change(transaction: Any) -> None:
            for name in self.TABLES:
                cursor = transaction.cursor(self._tables[name])
                items = cursor.iternext() if cursor.set_range(first) else ()
                for key in [item[0] for item in items if _position_of(item) >= position]:
                    transaction.delete(key, db=self._tables[name])

        self._commit(position, change)

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
                return int(U64.unpack(value)[0])
        return None


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _position_of(item: tuple[bytes, bytes]) -> int:
    """Of an entry of any table: its value, or the last part of its key."""
    key, value = item
    return int(U64.unpack(value or key[-8:])[0])


def _newest_with_prefix(cursor: Any, prefix: bytes, limit: int) -> list[int]:
    """Positions behind the keys that begin with ``prefix``, highest first."""
    found: list[int] = []
    # One past the highest key with this prefix, then backwards.
    more = cursor.prev() if cursor.set_range(prefix + b"\xff" * 9) else cursor.last()
    while more and len(found) < limit and cursor.key().startswith(prefix):
        found.append(U64.unpack(cursor.key()[-8:])[0])
        more = cursor.prev()
    return found
