"""What of the log may be deleted, and in which order (R15, R16).

A segment may go when the newest complete snapshot begins behind it, consume queues and key index have what is in it,
no delayed message in it is pending, and every group has consumed it; what no group has consumed yet is kept for the
first one. Order, and what a crash leaves: queues' first offsets, then the checkpoint's ``kept``, durably, then the
memory's, then the flusher retires the segments, then files of the consume queues. Killed anywhere: all of it is done
again, from the same floor. A segment that is missing from ``kept`` on was taken by nobody of ours, and recovery
refuses to begin without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from shmbroker._native._core import Region
from shmbroker.failpoint import failpoint
from shmbroker.store.consume_queue import ConsumeQueues

STORE_FULL: Final = 1  # enum sb_store_state
_ANYWHERE: Final = 1 << 63


def floor(region: Region, queues: ConsumeQueues) -> int:
    """The position before which nobody needs the log any more, but for delayed messages.

    A group that consumes one queue of a topic is to get the others as well, also those added while it was away. What
    no group consumes yet waits for the first one.
    """
    lowest = min(region.get(word) for word in ("snapshot", "flushed", "dispatched", "indexed"))
    groups: dict[int, set[int]] = {}  # of each topic
    oldest: dict[tuple[int, int], dict[int, int]] = {}  # of each queue: the first offset that a group still needs
    for table in region.progress():
        groups.setdefault(table["topic_id"], set()).add(table["group_id"])
        needed = oldest.setdefault((table["topic_id"], table["queue_id"]), {})
        needed[table["group_id"]] = min([table["base"], *table["overflow"]])
    for topic in region.topics():
        consumers = groups.get(topic["topic_id"], set())
        for queue in topic["queues"]:
            identity = topic["topic_id"], queue["queue_id"]
            needed = oldest.get(identity, {})
            untouched = not needed or consumers - needed.keys()
            offset = min([*needed.values(), *([queue["first_offset"]] if untouched else [])])
            lowest = min(lowest, _position_of(queues, *identity, offset, lowest))
    return lowest


def retain(region: Region, queues: ConsumeQueues, retention_bytes: int, note_kept: Callable[[int], None]) -> bool:
    """Give up segments that are consumed and more than ``retention_bytes`` old; True if there were any.

    ``note_kept(position)`` makes it durable that the log before that position is given up.

    While the disk is full it gives up whatever is consumed. ``retention_bytes`` 0 keeps all until then. What is not
    consumed stays in either case: then a full disk refuses writes.
    """
    full = region.get("store_state") == STORE_FULL
    if not (full or retention_bytes):
        return False
    wanted = region.get("flushed") - (0 if full else retention_bytes)
    wanted -= wanted % region.segment_bytes
    if wanted <= region.get("kept"):
        return False
    limit = floor(region, queues)
    wanted = min(wanted, limit - limit % region.segment_bytes)
    region.raise_to("timers_wanted", wanted)  # the scheduler takes out of the way what holds a segment for little
    limit = region.get("timers_kept")
    kept = min(wanted, limit - limit % region.segment_bytes)
    if kept <= region.get("kept"):
        return False
    raise_first_offsets(region, queues, kept)
    note_kept(kept)
    failpoint("dispatcher.kept_noted")  # leaves segments that nobody needs: given up again after the restart
    region.set("kept", kept)
    for topic in region.topics():
        for queue in topic["queues"]:
            queues.delete_before(topic["topic_id"], queue["queue_id"], queue["first_offset"])
    return True


def raise_first_offsets(region: Region, queues: ConsumeQueues, kept: int) -> None:
    """Each queue's first offset: that of its first message at or past ``kept``."""
    for topic in region.topics():
        for queue in topic["queues"]:
            identity = topic["topic_id"], queue["queue_id"]
            first, end = queue["first_offset"], queue["next_offset"]
            oldest = queues.read(*identity, first, 1, _ANYWHERE) if first < end else []
            if oldest and oldest[0].position < kept:
                region.set_first_offset(*identity, min(end, queues.find_position(*identity, kept)))


def _position_of(queues: ConsumeQueues, topic_id: int, queue_id: int, offset: int, limit: int) -> int:
    """Where the first message at or after ``offset`` lies; ``limit`` if there is none before it."""
    entries = queues.read(topic_id, queue_id, offset, 1, limit)
    return entries[0].position if entries else limit
