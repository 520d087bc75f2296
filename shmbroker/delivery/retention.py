"""What of the log may be deleted, and in which order (R15, R16).

A segment goes when it is too old, when the log is too large, or when the disk is full; and when the newest complete
snapshot begins behind it, consume queues and key index have what is in it, no delayed message in it is pending, and
every group has consumed it, unless nobody is to ask for that; what no group has consumed yet is kept for the first one.

    kept         wanted                          flushed
      |  old        |   in use, young, small enough |          a segment's age is that of its last write, by its file:
      ▼             ▼                               ▼          a file that was copied, or touched, is young again
      | seg | seg | seg | seg | seg | seg ...

Order, and what a crash leaves: queues' first offsets, then the checkpoint's ``kept``, durably, then the memory's, then
the flusher retires the segments, then files of the consume queues. Killed anywhere: all of it is done again, from the
same floor. A segment that is missing from ``kept`` on was taken by nobody of ours, and recovery refuses to begin
without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shmbroker._native._core import Region
from shmbroker.config import RuntimeConfig
from shmbroker.failpoint import failpoint
from shmbroker.naming import segment_name
from shmbroker.store.consume_queue import ConsumeQueues

STORE_FULL: Final = 1  # enum sb_store_state
_ANYWHERE: Final = 1 << 63


def derived(region: Region) -> int:
    """The position before which the broker itself needs the log no more, but for delayed messages."""
    return min(region.get(word) for word in ("snapshot", "flushed", "dispatched", "indexed"))


def floor(region: Region, queues: ConsumeQueues) -> int:
    """The position before which nobody needs the log any more, but for delayed messages.

    A group that consumes one queue of a topic is to get the others as well, also those added while it was away. What
    no group consumes yet waits for the first one.
    """
    lowest = derived(region)
    groups: dict[int, set[int]] = {}  # of each topic
    oldest: dict[tuple[int, int], dict[int, int]] = {}  # of each queue: the first offset that a group still needs
    for table in region.progress():
        groups.setdefault(table["topic_id"], set()).add(table["group_id"])
        needed = oldest.setdefault((table["topic_id"], table["queue_id"]), {})
        first = min([table["base"], *table["overflow"]])
        needed[table["group_id"]] = min(first, needed.get(table["group_id"], first))  # twice while a reset is under way
    for topic in region.topics():
        consumers = groups.get(topic["topic_id"], set())
        for queue in topic["queues"]:
            identity = topic["topic_id"], queue["queue_id"]
            needed = oldest.get(identity, {})
            untouched = not needed or consumers - needed.keys()
            first = queue["first_offset"]
            offset = max(first, min([*needed.values(), *([first] if untouched else [])]))
            if offset < queue["next_offset"]:
                lowest = min(lowest, _position_of(queues, *identity, offset))
    return lowest


def retain(
    region: Region, queues: ConsumeQueues, log: Path, config: RuntimeConfig, note_kept: Callable[[int], None]
) -> bool:
    """Give up segments that are old enough, or too many, and needed by nobody; True if there were any.

    ``log`` is where their files are. ``note_kept(position)`` makes it durable that the log before that position is
    given up. While the disk is full it gives up whatever is consumed. What is not stays, and then a full disk refuses
    writes, unless ``delete_unconsumed``: then the oldest segment goes as well, one with each call.
    """
    kept, segment_bytes = region.get("kept"), region.segment_bytes
    full = region.get("store_state") == STORE_FULL
    wanted = region.get("flushed") if full else _outlived(region, log, config)
    wanted -= wanted % segment_bytes
    if wanted <= kept:
        return False
    generation = region.get("topic_generation")
    limit = floor(region, queues)
    limit -= limit % segment_bytes
    if config.delete_unconsumed:
        oldest = kept + segment_bytes if full else wanted
        limit = max(limit, min(oldest, derived(region)))
    wanted = min(wanted, limit - limit % segment_bytes)
    region.raise_to("timers_wanted", wanted)  # the scheduler takes out of the way what holds a segment for little
    limit = region.get("timers_kept")
    wanted = min(wanted, limit - limit % segment_bytes)
    if wanted <= kept:
        return False
    if region.get("topic_generation") != generation:
        return False  # somebody has reset a group to older messages, perhaps: the floor is another one
    kept = wanted
    raise_first_offsets(region, queues, kept)
    note_kept(kept)
    failpoint("dispatcher.kept_noted")  # leaves segments that nobody needs: given up again after the restart
    region.set("kept", kept)
    for topic in region.topics():
        for queue in topic["queues"]:
            queues.delete_before(topic["topic_id"], queue["queue_id"], queue["first_offset"])
    return True


def _outlived(region: Region, log: Path, config: RuntimeConfig) -> int:
    """The position that the settings keep the log from, by size and by age."""
    flushed, position = region.get("flushed"), region.get("kept")
    if config.retention_ms:
        oldest_ns = time.time_ns() - config.retention_ms * 1_000_000
        while position + region.segment_bytes <= flushed and _written_ns(log, position) < oldest_ns:
            position += region.segment_bytes
    return max(position, flushed - config.retention_bytes) if config.retention_bytes else position


def _written_ns(log: Path, base: int) -> int:
    """When a segment was last written; one that somebody has taken away is for recovery to complain about."""
    try:
        return (log / segment_name(base)).stat().st_mtime_ns
    except FileNotFoundError:
        return _ANYWHERE


def raise_first_offsets(region: Region, queues: ConsumeQueues, kept: int) -> None:
    """Each queue's first offset: that of its first message at or past ``kept``."""
    for topic in region.topics():
        for queue in topic["queues"]:
            identity = topic["topic_id"], queue["queue_id"]
            first, end = queue["first_offset"], queue["next_offset"]
            oldest = queues.read(*identity, first, 1, _ANYWHERE) if first < end else []
            if oldest and oldest[0].position < kept:
                region.set_first_offset(*identity, min(end, queues.find_position(*identity, kept)))


def _position_of(queues: ConsumeQueues, topic_id: int, queue_id: int, offset: int) -> int:
    """A position at or before that of the first message at or after ``offset``.

    Where the file has no entry for it, the last one before says how far it is. What is missing is not dispatched yet,
    was never there (R4), or the disk has lost it: then the log behind that one has to tell (queue_hole.py).
    """
    entries = queues.read(topic_id, queue_id, offset, 1, _ANYWHERE)
    if entries and entries[0].offset == offset:
        return entries[0].position
    before = queues.last_before(topic_id, queue_id, offset)
    return before.position if before else 0
