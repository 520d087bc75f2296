"""A hole in a consume queue, judged by the log, which alone knows whether messages belong there.

    queue    | 4 |  zeros   | 15 |        entries have no checksum: what the disk has lost reads as zeros, too
    log        4 ── walked ──▶ 15

No record of the queue between its neighbours' records: the offsets were never given to a message (R4). One: the file of
the queue is damaged.
"""

from __future__ import annotations

from typing import NamedTuple

from shmbroker._native._core import RECORD_ALIGN_BYTES, dispatch_scan
from shmbroker.errors import CorruptLog, PositionGone
from shmbroker.store.commit_log import LogReader
from shmbroker.store.consume_queue import ENTRY_BYTES, ConsumeQueues


class Hole(NamedTuple):
    """``end``: the first offset behind it; ``sound``: the log is whole there and has no message for it."""

    end: int
    sound: bool


def examine(
    log: LogReader, segment_bytes: int, queues: ConsumeQueues, queue: tuple[int, int], offset: int, start: int, end: int
) -> Hole | None:
    """The hole of a queue (topic id, queue id) that has no entry at ``offset``. None: nothing is behind it yet.

    ``start`` and ``end`` of what can be had of the log: where the oldest segment begins, and up to where it is durable
    and dispatched. Raises CorruptLog for a damaged file of the queue.
    """
    before = queues.last_before(*queue, offset)
    neighbours = [before] if before is not None else []
    neighbours = queues.read(*queue, before.offset if before else offset, len(neighbours) + 1, end)
    if not neighbours or neighbours[-1].offset < offset:
        return None
    behind = neighbours[-1]
    position, sound, epoch = max(start, before.position if before else 0), True, 0

    def look(data: memoryview, position: int) -> int:
        nonlocal epoch
        try:
            epoch = epoch or log.read(position).epoch
        except (CorruptLog, PositionGone):
            return position
        runs, _, reached, epoch, _ = dispatch_scan(data, position, epoch, segment_bytes, keys=False)
        for topic_id, queue_id, first, entries in runs:
            found = max(first, offset)
            if (topic_id, queue_id) == queue and found < min(first + len(entries) // ENTRY_BYTES, behind.offset):
                raise queues.corrupt(topic_id, queue_id, found, "no entry, but the log has its message")
        return reached

    while position < behind.position:
        position = log.feed(position, behind.position, look)
        if position < behind.position:  # the log is damaged here: nobody knows what has stood there
            sound, epoch = False, 0
            position = log.find(position + RECORD_ALIGN_BYTES, behind.position) or behind.position
    return Hole(behind.offset, sound)
