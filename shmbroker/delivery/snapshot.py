"""Snapshots: topics, groups and group progress, repeated in the log so that what lies before may be deleted (R4).

    SNAPSHOT_BEGIN | TOPIC with its queues' next and first offsets ... | GROUP ... | PROGRESS ... | IDS of dedup keys
        ... | SNAPSHOT_END

A change of a definition is a record of its own, appended by the native core in one with the words that make it true.

Others go on appending while a snapshot is written, so its records describe different moments. That is no matter: the
replay from BEGIN on (restore.py) merges offsets, progress and ids by maximum; ids are never given twice, so the record
of something that was deleted after BEGIN is known by its id and ignored; and a snapshot never overrules a definition
met before it, or a subscription that was set since. A snapshot without END, because its writer was killed, does no
harm; it just frees no segment.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from shmbroker._native._core import Region
from shmbroker.record import RECORD_HEADER_BYTES, GroupBody, RecordKind, SnapshotBody, TopicBody, padded

APPEND_TIMEOUT_NS: Final = 3_000_000_000
_GROUP_BYTES: Final = 64 * 1024
_GROUP_RECORDS: Final = 64
_BYTES_FOR_AN_ID: Final = 192  # of a segment: no more than an eighth of the log is ids of dedup keys


def append_bounded(region: Region, kind: RecordKind, bodies: Iterable[bytes]) -> int:
    """Append system records as several short groups, so that producers get in between. Returns the end position.

    Raises what Region.append_system raises; groups before the failed one are then in the log.
    """
    end = region.get("tail")
    for group in bounded_groups(region, bodies):
        _, end = region.append_system(kind, group, timeout_ns=APPEND_TIMEOUT_NS)
    return end


def append_progress(region: Region, *, only_changed: bool = True) -> None:
    """Write how far the groups are into the log (R14). Raises as ``append_bounded``: then nothing counts as written."""
    bodies = region.progress_records(only_changed=only_changed)
    append_bounded(region, RecordKind.PROGRESS, bodies)
    region.progress_recorded(bodies)


class Snapshot:
    """One snapshot being written. Reads memory only after BEGIN is in the log: nothing newer than BEGIN is missed."""

    def __init__(self, region: Region, epochs: Sequence[tuple[int, int, int]]) -> None:
        """Append BEGIN; ``begin`` is its position."""
        ids = region.get("next_topic_id"), region.get("next_group_id")
        self._region = region
        self._frame = SnapshotBody(region.get("tail"), region.get("epoch"), *ids, tuple(epochs)).encode()
        self.begin, _ = region.append_system(RecordKind.SNAPSHOT_BEGIN, [self._frame], timeout_ns=APPEND_TIMEOUT_NS)

    def complete(self) -> int:
        """Append everything, then END; returns the position from which on the snapshot is whole once flushed."""
        append_bounded(self._region, RecordKind.TOPIC, map(_topic_body, self._region.topics(exact=True)))
        append_bounded(self._region, RecordKind.GROUP, map(_group_body, self._region.groups()))
        append_progress(self._region, only_changed=False)
        append_bounded(
            self._region, RecordKind.IDS, self._region.dedup_ids(self._region.segment_bytes // _BYTES_FOR_AN_ID)
        )
        return append_bounded(self._region, RecordKind.SNAPSHOT_END, [self._frame])


def _topic_body(topic: dict[str, Any]) -> bytes:
    queues = topic["queues"]
    # Next offsets are of one moment; retention may have moved `first` since.
    next_offsets = tuple(queue["next_offset"] for queue in queues)
    first_offsets = tuple(min(queue["first_offset"], queue["next_offset"]) for queue in queues)
    ids = topic["name"], topic["topic_id"]
    return TopicBody(*ids, len(queues), topic["permission"], next_offsets, first_offsets).encode()


def _group_body(group: dict[str, Any]) -> bytes:
    body = GroupBody(group["name"], group["group_id"])
    if group["subscription_set"]:
        subscription = json.loads(group["subscription"])
        body = replace(body, subscription=subscription, generation=group["subscription_generation"])
    if group["retry"]:
        body = replace(body, retry=json.loads(group["retry"]), retry_generation=group["retry_generation"])
    return replace(body, pause_generation=group["pause_generation"]).encode()


def _record_bytes(body: bytes) -> int:
    return padded(RECORD_HEADER_BYTES + len(body))


def bounded_groups(region: Region, bodies: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The bodies in groups for one append each: the lock is held no longer than for a small batch of messages."""
    room = min(_GROUP_BYTES, region.ring_bytes // 16, region.segment_bytes // 16)
    group: list[bytes] = []
    group_bytes = 0
    for body in bodies:
        size = _record_bytes(body)
        if group and (group_bytes + size > room or len(group) == _GROUP_RECORDS):
            yield group
            group, group_bytes = [], 0
        group.append(body)
        group_bytes += size
    if group:
        yield group
