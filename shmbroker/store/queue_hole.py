"""A hole in a consume queue, judged by the log, which alone knows whether messages belong there.

    queue    | 4 |  zeros   | 15 |        entries have no checksum: what the disk has lost reads as zeros, too,
    log        4 ── walked ──▶ 15
    queue    | 4 |  nothing               or is missing at the end of the file
    log        4 ── walked ──▶            up to what is dispatched

No record of the queue between its neighbours' records: the offsets were never given to a message (R4). One: the file of
the queue is damaged.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from shmbroker._native._core import RECORD_ALIGN_BYTES, dispatch_scan
from shmbroker.errors import CorruptLog, PositionGone
from shmbroker.store.commit_log import LogReader
from shmbroker.store.consume_queue import ENTRY_BYTES, ConsumeQueues

LOOK_BYTES: Final = 64 << 20  # of the log, in one call for a hole that nothing is behind


class Hole(NamedTuple):
    """``end``: the first offset behind it, None if there is none yet. ``sound``: the log is whole there and has no
    message for it. ``seen``: the position up to which that is known.
    """

    end: int | None
    sound: bool
    seen: int


def examine(
    log: LogReader, segment_bytes: int, queues: ConsumeQueues, queue: tuple[int, int], offset: int, start: int, end: int
) -> Hole:
    """The hole of a queue (topic id, queue id) that has no entry at ``offset``.

    ``start`` and ``end`` of what can be had of the log: where the oldest segment begins, or what was ``seen``; and up
    to where it is durable and dispatched. Raises CorruptLog for a damaged file of the queue.
    """
    before = queues.last_before(*queue, offset)
    neighbours = [before] if before is not None else []
    neighbours = queues.read(*queue, before.offset if before else offset, len(neighbours) + 1, end)
    behind = neighbours[-1] if neighbours and neighbours[-1].offset >= offset else None
    position = max(start, before.position if before else 0)
    end, enough = (behind.position, end) if behind else (end, position + LOOK_BYTES)
    sound, epoch = True, 0

    def look(data: memoryview, position: int) -> int:
        nonlocal epoch
        if position >= enough:
            return position
        try:
            epoch = epoch or log.read(position).epoch
        except (CorruptLog, PositionGone):
            return position
        runs, _, reached, epoch, _ = dispatch_scan(data, position, epoch, segment_bytes, keys=False)
        for topic_id, queue_id, first, entries in runs:
            found, last = max(first, offset), first + len(entries) // ENTRY_BYTES
            if (topic_id, queue_id) == queue and found < (min(last, behind.offset) if behind else last):
                raise queues.corrupt(topic_id, queue_id, found, "no entry, but the log has its message")
        return reached

    while position < min(end, enough):
        position = log.feed(position, end, look)
        if position < min(end, enough):  # the log is damaged here: nobody knows what has stood there
            sound, epoch = False, 0
            position = log.find(position + RECORD_ALIGN_BYTES, end) or end
    return Hole(behind.offset if behind else None, sound, position)
