"""From a recovered log back to what was in memory: definitions, offsets, group progress, ids; and consume queues.

Recovery (store/recovery.py) walks over the log once, from the newest snapshot's BEGIN on, and hands what it meets to a
:class:`Restoration`; that merges it, and puts the result into new memory before anybody else is attached. Merging is
idempotent, so it does not matter that a snapshot's records stand between those of the time in which it was written.
"""

from __future__ import annotations

import json
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from shmbroker._native._core import Region, scan_ids
from shmbroker.delivery.retention import raise_first_offsets
from shmbroker.errors import CorruptLog, GroupNotExist, PositionGone, QueueNotExist, TopicNotExist
from shmbroker.record import GroupBody, Record, RecordKind, SnapshotBody, TopicBody, parse_ids, subscription_text
from shmbroker.store.commit_log import LogReader
from shmbroker.store.consume_queue import ENTRY_BYTES, ConsumeQueues
from shmbroker.store.files import NO_SPACE

Run = tuple[int, int, int, bytes]
Id = tuple[int, int, int]  # incarnation, sequence, position
_IDS_MAX: Final = 1 << 24  # the largest id_window
_ID_BYTES: Final = 64 << 20  # read at a start in some 0.1 s
_SHARE_OF_OTHERS: Final = 4
_BLOCK_ENTRIES: Final = 128  # SB_BLOCK_ENTRIES


class Restoration:
    """What the records of a log say, in the order of the log. First the log, then ``finish``, then ``apply``."""

    def __init__(self, queues: ConsumeQueues, dispatched: int) -> None:
        """``dispatched``: the checkpoint's: ``queues`` hold everything before it durably, and perhaps more."""
        self._queues = queues
        self._dispatched = dispatched
        self._read = 0  # consume queue entries of the records before it were met
        self._full = False  # the disk has no room for more of them: they are left to the dispatcher
        self._unwritten: dict[tuple[int, int], tuple[int, array[int]]] = {}  # queue: an offset, positions from it on
        self._topics: dict[int, TopicBody] = {}
        self._groups: dict[int, GroupBody] = {}
        self._deleted_topics: set[int] = set()
        self._deleted_groups: set[int] = set()
        self._next_ids: dict[str, int] = {}
        self._offsets: dict[tuple[int, int], tuple[int, int]] = {}
        self._progress: list[bytes] = []
        self._dedup: deque[Id] = deque(maxlen=_IDS_MAX)

    def replay(self, record: Record) -> None:
        """Take a system record, or a message with a dedup id. Raises CorruptLog for a body that nobody wrote so."""
        try:
            match record.kind:
                case RecordKind.MESSAGE | RecordKind.TIMER:
                    self._dedup.append((record.incarnation, record.sequence, record.position))
                case RecordKind.TOPIC:
                    self._topic(TopicBody.parse(record.body))
                case RecordKind.GROUP:
                    self._group(GroupBody.parse(record.body))
                case RecordKind.PROGRESS:
                    self._progress.append(record.body)  # its topic or group may be defined further on
                case RecordKind.IDS:
                    self._dedup.extend(known for known in parse_ids(record.body) if known[2] < record.position)
                case RecordKind.SNAPSHOT_BEGIN:
                    frame = SnapshotBody.parse(record.body)
                    self._next_ids = {"next_topic_id": frame.next_topic_id, "next_group_id": frame.next_group_id}
        except ValueError as error:
            message = f"position {record.position}: {RecordKind(record.kind).name} record: {error}"
            raise CorruptLog(message, record.position) from error

    def dispatch(self, runs: Sequence[Run], position: int) -> None:
        """Take consume queue entries of the records before ``position`` and after those of the last call.

        A disk without room for them is no reason not to start: they are derived, and written when there is some.
        """
        for topic_id, queue_id, offset, entries in runs:
            self._raise_offsets(topic_id, queue_id, offset + len(entries) // ENTRY_BYTES, 0)
        if position <= self._dispatched:
            return
        runs = [run for run in runs if run[0] not in self._deleted_topics]
        self._full = self._full or not self._write(runs)
        if not self._full:
            self._read = position
            return
        for topic_id, queue_id, offset, entries in runs:
            start, positions = self._unwritten.get((topic_id, queue_id), (offset, array("Q")))
            if start + len(positions) != offset:  # there are none between: the older ones wait for the dispatcher
                start, positions = offset, array("Q")
            positions.extend(memoryview(entries).cast("B").cast("Q")[::2])
            self._unwritten[topic_id, queue_id] = start, positions

    def _write(self, runs: Sequence[Run]) -> bool:
        """False: there is no room for them."""
        try:
            for run in runs:
                self._queues.write(*run)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            return False
        return True

    def finish(self, end: int) -> int:
        """The log ends at ``end``. Returns the position up to which consume queues hold exactly what it has, durably.

        A crash before this leaves entries past the checkpoint's ``dispatched``: the next recovery does it all again.
        """
        dispatched = min(end, max(self._read, self._dispatched)) if self._full else end
        self._queues.truncate(dispatched)
        for topic_id in self._deleted_topics:
            self._queues.delete_topic(topic_id)
        self._queues.sync()
        return dispatched

    def apply(self, region: Region, log: LogReader, kept: int) -> None:
        """Put everything into new memory, to which nobody else is attached. Raises LimitReached if it is too small."""
        for topic in self._topics.values():
            region.define_topic(topic.name, topic.queues, topic.permission, topic.topic_id, record=False)
        for group in self._groups.values():
            region.define_group(group.name, group.group_id, record=False)
            if group.subscription:
                text = subscription_text(group.subscription)
                region.set_subscription(group.name, text, group.generation, record=False)
            if group.retry:
                text = json.dumps(dict(group.retry), sort_keys=True, separators=(",", ":")).encode()
                region.set_retry(group.name, text, group.retry_generation, record=False)
            if group.pause_generation:
                region.set_paused(group.name, group.pause_generation % 2 == 1, group.pause_generation, record=False)
        for word, value in self._next_ids.items():
            region.raise_to(word, value)
        # Newest first: its unacknowledged claims are all that ever was there at one time. In the order of the log, what
        # one queue held at one time and another at another would have to fit into the overflow table together.
        for body in sorted(self._progress, key=_age)[::-1]:
            try:
                region.restore_progress(body)
            except (GroupNotExist, TopicNotExist, QueueNotExist):
                continue  # of a topic or group that was deleted later
        for table in region.progress():
            self._raise_offsets(table["topic_id"], table["queue_id"], _first_untouched(table), 0)
        for (topic_id, queue_id), (next_offset, first_offset) in self._offsets.items():
            if topic_id in self._topics:
                region.restore_queue(topic_id, queue_id, next_offset, first_offset)
        raise_first_offsets(region, self._queues, kept)
        self._restore_index(region)
        self._remember_ids(region, log, kept)

    def _restore_index(self, region: Region) -> None:
        """What the consume queues have no room for is delivered by the index in memory, which had it before as well.

        Else a full disk could be freed by nobody's consuming. If it is too much, the oldest waits for the dispatcher.
        """
        ends = {
            (topic["topic_id"], queue["queue_id"]): queue["next_offset"]
            for topic in region.topics()
            for queue in topic["queues"]
        }
        for identity, (start, positions) in self._unwritten.items():
            room = max(0, region.limits["blocks"] // len(self._unwritten) - 2) * _BLOCK_ENTRIES
            newest = positions[-room:] if room else array("Q")
            end = start + len(positions)
            if newest and ends.get(identity) == end:
                region.restore_index(*identity, end - len(newest), newest.tobytes())

    def _topic(self, body: TopicBody) -> None:
        if body.deleted:
            self._topics.pop(body.topic_id, None)
            self._deleted_topics.add(body.topic_id)
        elif body.topic_id not in self._deleted_topics:
            for queue_id, offsets in enumerate(zip(body.next_offsets, body.first_offsets, strict=True)):
                self._raise_offsets(body.topic_id, queue_id, *offsets)
            if not body.next_offsets or body.topic_id not in self._topics:  # a definition, or all there is
                self._topics[body.topic_id] = body

    def _group(self, body: GroupBody) -> None:
        if body.deleted:
            self._groups.pop(body.group_id, None)
            self._deleted_groups.add(body.group_id)
        elif body.group_id not in self._deleted_groups:
            known = self._groups.get(body.group_id, body)
            self._groups[body.group_id] = known.merged(body)

    def _raise_offsets(self, topic_id: int, queue_id: int, next_offset: int, first_offset: int) -> None:
        have = self._offsets.get((topic_id, queue_id), (0, 0))
        self._offsets[topic_id, queue_id] = max(have[0], next_offset), max(have[1], first_offset)

    def _remember_ids(self, region: Region, log: LogReader, kept: int) -> None:
        """The last ids go into the window against second copies (R17), whether the broker was stopped or killed.

        Those of dedup keys are in the snapshot and in the records behind it. The others, whose resend comes soon or
        never, are read from the log's last ``_ID_BYTES`` and get a share of the window.
        """
        room, size, tail = region.limits["ids"], region.segment_bytes, region.get("tail")
        given: deque[Id] = deque(maxlen=room // _SHARE_OF_OTHERS)
        epoch = 0

        def take(data: memoryview, position: int) -> int:
            nonlocal epoch
            try:
                epoch = epoch or log.read(position).epoch
            except (CorruptLog, PositionGone):
                return position
            others, behind, epoch = scan_ids(data, position, epoch, size)
            given.extend(others)
            return behind

        position = max(kept, tail - _ID_BYTES)
        position -= position % size
        while position < tail:  # one turn, but for damage: nothing was replayed from there, so it is no reason to stop
            position = log.feed(position, tail, take)
            position, epoch = position - position % size + size, 0
        for identity in given:
            region.remember_id(*identity, given=True)
        for identity in sorted(set(self._dedup), key=_position_of)[-room:]:
            region.remember_id(*identity)


def _position_of(identity: Id) -> int:
    return identity[2]


def _first_untouched(table: dict[str, Any]) -> int:
    """The first offset beyond all that this group's progress speaks of: no new message may get one before it (R4)."""
    acked = [first + count for first, count in table["acked"]]
    return int(max([table["base"], *acked, *(offset + 1 for offset in (*table["attempts"], *table["overflow"]))]))


def _age(body: bytes) -> tuple[int, int]:
    """Reset generation and base (sb_progress of layout.h): of bodies about one queue the newest has the largest."""
    return int.from_bytes(body[12:16], "little"), int.from_bytes(body[16:24], "little")
