"""Consume queues and indexes made anew from the log, beside the live ones: to compare them, or to replace them.

rebuild(...)       log ──▶ SIDE/queues, SIDE/index, SIDE/timers
differences(...)   SIDE against the live ones, entry by entry
swap(...)          SIDE takes their place; only while no broker runs in the directory
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Final

from shmbroker._native._core import dispatch_scan, timer_scan
from shmbroker.naming import BrokerPaths
from shmbroker.record import RecordKind, TopicBody, decode_record
from shmbroker.store.checkpoint import CheckpointFile
from shmbroker.store.commit_log import LogReader
from shmbroker.store.consume_queue import ENTRIES_PER_FILE, ENTRY, ENTRY_BYTES, ConsumeQueues
from shmbroker.store.files import sync_directory
from shmbroker.store.key_index import KeyIndex
from shmbroker.store.timer_index import TimerIndex, reading
from shmbroker.store.timers import Timers

_COMMIT_ENTRIES: Final = 100_000
_NO_ENTRY: Final = (0, 0, 0)

Progress = Callable[[int, int], None]  # bytes of log done, bytes in all


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild made: everything in [first, end), which the log holds."""

    side: BrokerPaths
    store: bytes
    first: int
    end: int
    messages: int
    keys: int  # entries of the key index
    timed: int  # behind the last record that says something about delayed messages


@dataclass(frozen=True, slots=True)
class Difference:
    """One entry that is not as the log says. None: not there."""

    what: str  # "queue 7/0 offset 12", "index keys 00ff..."
    live: object
    rebuilt: object


def rebuild(
    log: LogReader, segment_bytes: int, store: bytes, first: int, end: int, side: Path, progress: Progress | None = None
) -> Rebuilt:
    """Derive everything from [first, end) of the log into the new directory ``side``, durably.

    ``first`` is a segment's start, ``end`` a place up to which records are whole. Raises CorruptLog, PositionGone (a
    running broker's retention was faster), FileExistsError.
    """
    side.mkdir(mode=0o700)
    made = BrokerPaths(side)
    queues = ConsumeQueues(made.queues, store, writable=True)
    index = KeyIndex(made.index, store, writable=True)
    timers = TimerIndex(made.timers, store, writable=True)
    pending = Timers(timers, first)
    epoch, messages, keys, timed = log.read(first).epoch if first < end else 0, 0, 0, 0

    def derive(data: memoryview, position: int) -> int:
        nonlocal epoch, messages, keys, timed
        told, told_epoch = position, epoch
        runs, marks, behind, epoch, _ = dispatch_scan(data, position, epoch, segment_bytes)
        while told < behind:
            piece = data[told - position : behind - position]
            events, told, told_epoch, _ = timer_scan(piece, told, told_epoch, segment_bytes)
            pending.learn(events, told)
            timed = events[-1][0] + 1 if events else timed
        if pending.uncommitted >= _COMMIT_ENTRIES:
            pending.commit(behind, pending.uncommitted)
        for run in runs:
            queues.write(*run)
            messages += len(run[3]) // ENTRY_BYTES
        for mark in marks:
            record = decode_record(data[mark - position :], mark)
            if record.kind in (RecordKind.MESSAGE, RecordKind.TIMER):
                index.add(record)
            elif record.kind == RecordKind.TOPIC and (topic := TopicBody.parse(record.body)).deleted:
                queues.delete_topic(topic.topic_id)
        if index.pending >= _COMMIT_ENTRIES:
            keys += index.pending
            index.commit(behind)
        if progress is not None:
            progress(behind - first, end - first)
        return behind

    try:
        reached = log.feed(first, end, derive)
        if reached != end:
            raise log.explain(reached, f"no valid record, though the log goes on to {end}")
        keys += index.pending
        index.commit(end)
        pending.commit(end, pending.uncommitted)
        queues.sync()
    finally:
        queues.close()
        index.close()
        timers.close()
    return Rebuilt(made, store, first, end, messages, keys, timed)


def differences(live: BrokerPaths, rebuilt: Rebuilt) -> Iterator[Difference]:
    """Compare the live consume queues and indexes with rebuilt ones, entry by entry, as far as both reach.

    A broker may run meanwhile: what it adds lies past the end of what was rebuilt, and what it deletes is deleted from
    the front. Raises CorruptLog for a live file that cannot be read at all, lmdb.Error without an index.
    """
    ours, theirs = (ConsumeQueues(paths.queues, rebuilt.store) for paths in (rebuilt.side, live))
    try:
        for topic_id, queue_id in sorted({*ours.queues(), *theirs.queues()}):
            yield from _queue_differences(ours, theirs, topic_id, queue_id, rebuilt)
    finally:
        ours.close()
        theirs.close()
    index, live_index = (KeyIndex(paths.index, rebuilt.store) for paths in (rebuilt.side, live))
    try:
        end = min(rebuilt.end, live_index.position)
        for table in KeyIndex.TABLES:
            pairs = _merged(live_index.items(table, rebuilt.first, end), index.items(table, rebuilt.first, end))
            for key, has, wanted in pairs:
                if has != wanted:
                    yield Difference(f"index {table} {key.hex()}", has, wanted)
    finally:
        index.close()
        live_index.close()
    yield from _timer_differences(live, rebuilt)


def swap(live: BrokerPaths, rebuilt: Rebuilt) -> None:
    """Put what was rebuilt in the place of the live files. No broker may run in the directory.

    The order, and what a crash at each edge leaves:

    checkpoint: nothing dispatched   recovery dispatches the whole log, into whichever files it finds
    renames                          the same; a missing directory is begun anew
    checkpoint as before             done, but for what is left of the old files
    """
    checkpoints = CheckpointFile(live.checkpoint)
    last = checkpoints.read()
    if last is not None:
        checkpoints.write(replace(last, dispatched=rebuilt.first, snapshot=None, clean=False))
    for name in ("queues", "index", "timers"):
        place: Path = getattr(live, name)
        shutil.rmtree(_old(place), ignore_errors=True)
        if place.exists():
            place.rename(_old(place))
        Path(getattr(rebuilt.side, name)).rename(place)
    sync_directory(live.directory)
    if last is not None:
        checkpoints.write(replace(last, dispatched=min(last.dispatched, rebuilt.end)))
    checkpoints.close()
    for place in (live.queues, live.index, live.timers):
        shutil.rmtree(_old(place), ignore_errors=True)
    shutil.rmtree(rebuilt.side.directory)


def _old(place: Path) -> Path:
    return place.with_name(place.name + ".old")


def _queue_differences(
    ours: ConsumeQueues, theirs: ConsumeQueues, topic_id: int, queue_id: int, rebuilt: Rebuilt
) -> Iterator[Difference]:
    starts, ends = zip(ours.offsets(topic_id, queue_id), theirs.offsets(topic_id, queue_id), strict=True)
    for first in range(min(starts) // ENTRIES_PER_FILE * ENTRIES_PER_FILE, max(ends), ENTRIES_PER_FILE):
        wanted, has = (queues.packed(topic_id, queue_id, first, ENTRIES_PER_FILE) for queues in (ours, theirs))
        if wanted == has:
            continue
        pairs = zip_longest(ENTRY.iter_unpack(has), ENTRY.iter_unpack(wanted), fillvalue=_NO_ENTRY)
        for offset, (live_entry, entry) in enumerate(pairs, first):
            if live_entry == entry:
                continue
            outside = entry == _NO_ENTRY and not rebuilt.first <= live_entry[0] < rebuilt.end
            if not outside:
                what = f"queue {topic_id}/{queue_id} offset {offset}"
                yield Difference(what, _shown(live_entry), _shown(entry))


def _timer_differences(live: BrokerPaths, rebuilt: Rebuilt) -> Iterator[Difference]:
    """Of a live index that has applied all that was rebuilt and no more, as a stopped broker's: others say nothing."""
    with reading(live.timers, rebuilt.store) as index:
        if index is None or not rebuilt.timed <= index.position <= rebuilt.end:
            return
        has = {(table, key): value for table, key, value in index.items()}
    with reading(rebuilt.side.timers, rebuilt.store) as index:
        wanted = {(table, key): value for table, key, value in index.items()} if index is not None else {}
    for table, key in sorted(has.keys() | wanted.keys()):
        ours, theirs = wanted.get((table, key)), has.get((table, key))
        if ours != theirs:
            yield Difference(f"timers {table} {key.hex()}", theirs, ours)


def _shown(entry: tuple[int, ...]) -> tuple[int, ...] | None:
    return None if entry == _NO_ENTRY else entry


def _merged(
    left: Iterator[tuple[bytes, bytes]], right: Iterator[tuple[bytes, bytes]]
) -> Iterator[tuple[bytes, bytes | None, bytes | None]]:
    """Two sorted runs of (key, value) as one of (key, left value, right value)."""
    ours, theirs = next(left, None), next(right, None)
    while ours is not None or theirs is not None:
        if theirs is None or (ours is not None and ours[0] < theirs[0]):
            assert ours is not None
            yield ours[0], ours[1], None
            ours = next(left, None)
        elif ours is None or theirs[0] < ours[0]:
            yield theirs[0], None, theirs[1]
            theirs = next(right, None)
        else:
            yield ours[0], ours[1], theirs[1]
            ours, theirs = next(left, None), next(right, None)
