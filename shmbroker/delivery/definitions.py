"""Topics, groups and group progress as records of the log: the snapshot that is written, and the replay that restores it.

Bodies are JSON objects. A change is appended by the native core together with the words that make it true:

    TOPIC    {"op": "define", "name", "topic_id", "queues", "permission"}     create or alter: complete, not a difference
             {"op": "delete", "name", "topic_id"}
    GROUP    {"op": "define", "name", "group_id"}      {"op": "delete", "name", "group_id"}

A snapshot (R4) repeats all of it, so that what lies before its BEGIN may be deleted:

    SNAPSHOT_BEGIN   {"epochs": [[epoch, start, previous] ...], "next_topic_id", "next_group_id"}
    TOPIC            {"op": "snapshot", "name", "topic_id", "queues", "permission",
                      "first_queue", "next_offsets": [...], "first_offsets": [...]}       at most 256 queues a record
    GROUP            {"op": "snapshot", "name", "group_id"}
    PROGRESS ...     one per claim table, binary
    SNAPSHOT_END     {"begin": position}

Others go on appending meanwhile, so a snapshot's records describe different moments. That is no matter, because replay
from BEGIN merges: offsets, progress and ids by maximum; ids are never used twice, so a snapshot record of something that
was deleted after BEGIN is known by its id and ignored; and a snapshot never overrules a "define" that was met before it.
So a snapshot that was never ended, because its writer was killed, does no harm either; it just frees no segment.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

from shmbroker._native._core import RECORD_HEADER_BYTES, Record, Region
from shmbroker.errors import CorruptLog

KIND_MESSAGE: Final = 1
KIND_FILLER: Final = 2
KIND_EPOCH: Final = 3
KIND_TOPIC: Final = 4
KIND_GROUP: Final = 5
KIND_PROGRESS: Final = 6
KIND_SNAPSHOT_BEGIN: Final = 7
KIND_SNAPSHOT_END: Final = 8

APPEND_TIMEOUT_NS: Final = 3_000_000_000
_QUEUES_PER_RECORD: Final = 256
_GROUP_BYTES: Final = 64 * 1024  # of one append: the lock is not held for longer than a few messages need it
_GROUP_RECORDS: Final = 64


def append_bounded(region: Region, kind: int, bodies: Iterable[bytes]) -> int:
    """Append system records as several short groups, so that producers get in between. Returns the end position."""
    room = min(_GROUP_BYTES, region.ring_bytes // 16, region.segment_bytes // 16)
    end = region.get("tail")
    group: list[bytes] = []
    group_bytes = 0
    for body in bodies:
        size = RECORD_HEADER_BYTES + len(body) + 7
        if group and (group_bytes + size > room or len(group) == _GROUP_RECORDS):
            _, end = region.append_system(kind, group, timeout_ns=APPEND_TIMEOUT_NS)
            group, group_bytes = [], 0
        group.append(body)
        group_bytes += size
    if group:
        _, end = region.append_system(kind, group, timeout_ns=APPEND_TIMEOUT_NS)
    return end


def begin_snapshot(region: Region, epochs: Sequence[Sequence[int]]) -> int:
    """Append the BEGIN record; returns its position. What is written after it is read from memory after it, too."""
    body = {"epochs": [list(epoch) for epoch in epochs]}
    body |= {word: region.get(word) for word in ("next_topic_id", "next_group_id")}
    position, _ = region.append_system(KIND_SNAPSHOT_BEGIN, [_encode(body)], timeout_ns=APPEND_TIMEOUT_NS)
    return position


def end_snapshot(region: Region, begin: int) -> int:
    """Append everything and the END record; returns the position at which the snapshot is complete."""
    append_bounded(region, KIND_TOPIC, (body for topic in region.topics() for body in _topic_bodies(topic)))
    append_bounded(region, KIND_GROUP, map(_group_body, region.groups()))
    append_bounded(region, KIND_PROGRESS, region.progress_records(only_changed=False))
    _, end = region.append_system(KIND_SNAPSHOT_END, [_encode({"begin": begin})], timeout_ns=APPEND_TIMEOUT_NS)
    return end


class Replay:
    """Applies the records of a log, from a snapshot's BEGIN on and in order, to a Region under recovery."""

    def __init__(self, region: Region) -> None:
        self.epochs: list[list[int]] = []
        self._region = region
        self._topics: set[int] = set()
        self._groups: set[int] = set()
        self._deleted_topics: set[int] = set()
        self._deleted_groups: set[int] = set()
        self._offsets: dict[tuple[int, int], tuple[int, int]] = {}
        self._progress: list[bytes] = []

    def apply(self, record: Record) -> None:
        """Take one system record. Raises CorruptLog for a body that this version cannot have written."""
        try:
            if record.kind == KIND_PROGRESS:
                self._progress.append(record.body)  # its topic and group may be defined further on
            elif record.kind in (KIND_TOPIC, KIND_GROUP, KIND_SNAPSHOT_BEGIN):
                body = json.loads(record.body)
                if record.kind == KIND_TOPIC:
                    self._topic(body)
                elif record.kind == KIND_GROUP:
                    self._group(body)
                else:
                    self.epochs = [[int(number) for number in epoch] for epoch in body["epochs"]]
                    for word in ("next_topic_id", "next_group_id"):
                        self._region.raise_to(word, int(body[word]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptLog(
                f"position {record.position}: a record of kind {record.kind} that makes no sense: {error!r}", record.position
            ) from error

    def messages(self, topic_id: int, queue_id: int, end_offset: int) -> None:
        """The log holds messages of this queue up to ``end_offset``."""
        self._raise_offsets(topic_id, queue_id, end_offset, 0)

    def finish(self) -> None:
        """Everything has been applied: progress, and offsets that none of it lies beyond (R4)."""
        for body in self._progress:
            self._region.restore_progress(body)
        for table in self._region.progress():
            self._raise_offsets(table["topic_id"], table["queue_id"], _first_untouched(table), 0)
        for (topic_id, queue_id), (next_offset, first_offset) in self._offsets.items():
            if topic_id not in self._deleted_topics:
                self._region.restore_queue(topic_id, queue_id, next_offset, first_offset)

    def _topic(self, body: dict[str, Any]) -> None:
        topic_id = int(body["topic_id"])
        if body["op"] == "delete":
            if topic_id in self._topics:
                self._region.delete_topic(body["name"], record=False)
                self._topics.discard(topic_id)
            self._deleted_topics.add(topic_id)
            return
        if topic_id in self._deleted_topics:
            return
        snapshot = body["op"] == "snapshot"
        permission = 0 if snapshot and topic_id in self._topics else int(body["permission"])  # 0: as it is
        self._region.define_topic(body["name"], int(body["queues"]), permission, topic_id, record=False)
        self._topics.add(topic_id)
        if snapshot:
            first_queue = int(body["first_queue"])
            for index, offsets in enumerate(zip(body["next_offsets"], body["first_offsets"], strict=True)):
                self._raise_offsets(topic_id, first_queue + index, *map(int, offsets))

    def _group(self, body: dict[str, Any]) -> None:
        group_id = int(body["group_id"])
        if body["op"] == "delete":
            if group_id in self._groups:
                self._region.delete_group(body["name"], record=False)
                self._groups.discard(group_id)
            self._deleted_groups.add(group_id)
        elif group_id not in self._deleted_groups:
            self._region.define_group(body["name"], group_id, record=False)
            self._groups.add(group_id)

    def _raise_offsets(self, topic_id: int, queue_id: int, next_offset: int, first_offset: int) -> None:
        have = self._offsets.get((topic_id, queue_id), (0, 0))
        self._offsets[topic_id, queue_id] = max(have[0], next_offset), max(have[1], first_offset)


def _first_untouched(table: dict[str, Any]) -> int:
    """The first offset that this group's progress does not speak of."""
    acked = [first + count for first, count in table["acked"]]
    return int(max([table["base"], *acked, *(offset + 1 for offset in (*table["attempts"], *table["overflow"]))]))


def _topic_bodies(topic: dict[str, Any]) -> Iterable[bytes]:
    queues = topic["queues"]
    head = {"op": "snapshot", "name": topic["name"], "topic_id": topic["topic_id"], "queues": len(queues)}
    for first in range(0, len(queues), _QUEUES_PER_RECORD):
        part = queues[first : first + _QUEUES_PER_RECORD]
        tail = {"permission": topic["permission"], "first_queue": first}
        tail |= {f"{word}s": [queue[word] for queue in part] for word in ("next_offset", "first_offset")}
        yield _encode(head | tail)


def _group_body(group: dict[str, Any]) -> bytes:
    return _encode({"op": "snapshot", "name": group["name"], "group_id": group["group_id"]})


def _encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
