"""Messages of a running broker by queue offset, by id and by key: from its memory, its files and its index.

What an index says is a hint: every record is read, checked and compared with what was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from shmbroker._native._core import RECORD_HEADER_BYTES, Record, decode_record
from shmbroker.errors import CorruptLog, PositionGone, TopicNotExist
from shmbroker.record import RecordKind, next_position
from shmbroker.store.consume_queue import ConsumeQueues, Entry
from shmbroker.store.key_index import KeyIndex
from shmbroker.tools.stored_log import StoredLog

if TYPE_CHECKING:
    from shmbroker._native._core import Region
    from shmbroker.naming import BrokerPaths


class StoredMessages:
    """Reads only. The broker must be running while this is used."""

    def __init__(self, paths: BrokerPaths, region: Region) -> None:
        self._region = region
        self._log = StoredLog(paths, region)
        self._paths = paths
        self._queues = ConsumeQueues(paths.queues, self._log.store)
        self._topic_ids = {entry["name"]: int(entry["topic_id"]) for entry in region.topics()}

    def topic_id(self, name: str) -> int:
        """Raises TopicNotExist."""
        if name not in self._topic_ids:
            raise TopicNotExist(f"topic {name!r} does not exist")
        return self._topic_ids[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._queues.close()
        self._log.close()

    def at_position(self, position: int) -> Record | None:
        """The record at ``position``, from the ring or the files; None if it is gone, not there yet, or no record."""
        raw = self._region.read_raw(position)
        if raw is not None:
            return decode_record(raw, position)
        if position >= self._region.get("flushed"):
            return None
        try:
            return self._log.reader.read(position)
        except (PositionGone, CorruptLog):
            return None

    def entries(self, topic_id: int, queue_id: int, offset: int, count: int) -> list[Entry]:
        """Entries of a queue from ``offset`` on, as far as the dispatcher has come."""
        limit = self._region.get("dispatched")
        return self._queues.read(topic_id, queue_id, offset, count, limit)

    def by_key(self, topic_id: int, key: str, limit: int) -> list[Record]:
        """The newest ``limit`` messages of a topic that have this key, newest first."""
        found: dict[int, Record] = {}
        with _Index(self._paths, self._log.store) as index:
            recent = [
                record
                for record in self._not_indexed(index.position)
                if record.topic_id == topic_id and record.kind == RecordKind.MESSAGE
            ]
            candidates = (self.at_position(position) for position in index.by_key(topic_id, key, 4 * limit))
            for record in [*candidates, *recent]:
                if record is not None and record.topic_id == topic_id and key in record.keys.split():
                    found[record.position] = record
        return [found[position] for position in sorted(found, reverse=True)[:limit]]

    def by_id(self, incarnation: int, sequence: int) -> Record | None:
        """The message with this id, if the log still has it; of one that has not fired yet the TIMER record."""
        with _Index(self._paths, self._log.store) as index:
            exact, (start, end) = index.by_id(incarnation, sequence)
            for position in exact:
                record = self.at_position(position)
                if record is not None and (record.incarnation, record.sequence) == (incarnation, sequence):
                    return record
            in_files: Iterator[Record] = iter(())
            if (start, end) != (0, 0):
                flushed = self._region.get("flushed")
                in_files = self._log.records(max(start, self._log.first), min(end or flushed, flushed))
            for source in (in_files, self._not_indexed(index.position)):
                for record in source:
                    if (record.incarnation, record.sequence) == (incarnation, sequence):
                        return record
        return None

    def _not_indexed(self, start: int) -> Iterator[Record]:
        """Messages, and timers, that the indexer has not come to yet."""
        tail = self._region.get("tail")
        position = max(start, self._log.first)
        left = self._log.segment_bytes - position % self._log.segment_bytes
        position += left if left < RECORD_HEADER_BYTES else 0
        while position < tail:
            record = self.at_position(position)
            if record is None:
                return
            if record.kind in (RecordKind.MESSAGE, RecordKind.TIMER):
                yield record
            position = next_position(position, record.size, self._log.segment_bytes)


class _Index:
    """The key index, opened to read; an index that does not exist yet has indexed nothing."""

    def __init__(self, paths: BrokerPaths, store: bytes) -> None:
        self._index = KeyIndex(paths.index, store) if (paths.index / "data.mdb").exists() else None
        self.position = self._index.position if self._index is not None else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._index is not None:
            self._index.close()

    def by_key(self, topic_id: int, key: str, limit: int) -> list[int]:
        return self._index.by_key(topic_id, key, limit) if self._index is not None else []

    def by_id(self, incarnation: int, sequence: int) -> tuple[list[int], tuple[int, int | None]]:
        return self._index.by_id(incarnation, sequence) if self._index is not None else ([], (0, 0))
