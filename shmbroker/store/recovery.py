"""Opening a log without its memory: find its end, cut what was torn, read back what it says.

    snapshot            group floor   hole             flushed, by the checkpoint or by a later record?
       ▼                     ▼          ▼
    ───┬── valid records ────┬── group ─┊ damage or nothing ── perhaps valid records, unsynced ── zeros
       └─ replayed ─────────▶└──────────┴─ cut: zeroed up to the segment's end, later segments removed ─────

A hole that nobody knew to be on the disk is a torn tail and is cut, with the whole of a group that it took a part of
(R18). Any other is corruption: the log stays as it is, recovery never truncates silently.

Everything here may be killed anywhere and run again: each step leaves a log whose recovery ends in the same state.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Final

from shmbroker._native._core import dispatch_scan
from shmbroker.failpoint import failpoint
from shmbroker.record import EpochBody, Record, RecordKind, SnapshotBody, decode_record
from shmbroker.store.checkpoint import Checkpoint, CheckpointFile, Epoch
from shmbroker.store.commit_log import LogReader
from shmbroker.store.files import is_zero, sync_directory
from shmbroker.store.log_end import LogEnd, LogPlace, corrupt, find_end, refuse_corruption, torn_extent
from shmbroker.store.segment import Segment, list_segments, remove_leftovers

BROKEN: Final = ".broken"
_PIECE_BYTES: Final = 1024 * 1024

Run = tuple[int, int, int, bytes]  # topic_id, queue_id, first queue offset, entries: see dispatch_scan
Replay = Callable[[Record], None]
Dispatch = Callable[[list[Run], int], None]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What recovery found and did; positions."""

    first: int  # of the oldest segment
    end: int  # the log goes on here; everything before it is on the disk
    epoch: int  # of the last record; a broker that lost its memory starts a higher one here (R2)
    epochs: tuple[Epoch, ...]  # all that are known, oldest first
    snapshot: int | None  # begin of the newest complete snapshot
    replayed_from: int
    dispatched: int  # consume queues held everything before it, and perhaps more: cut them at ``end``
    records: int  # valid ones seen
    cut_bytes: int  # from ``end`` to the last byte that belonged to something
    reason: str  # "empty", "clean" (stopped in order), "whole" (nothing to cut), "torn tail", "incomplete group"


def recover(
    place: LogPlace, checkpoints: CheckpointFile, replay: Replay, dispatch: Dispatch, *, trust_flushed: bool = True
) -> Recovery:
    """Make a log fit to be appended to, and pass on what it holds.

    From the newest snapshot that the checkpoint knows (without one, from the newest complete one of the whole log) to
    the end, ``replay(record)`` gets every system record and every message with a dedup id. ``dispatch(runs, position)``
    gets the consume queue entries of all records before ``position``, from where the consume queues may end or from
    the snapshot, whichever is older. Both come in the order of the log, definitions before the messages that need
    them, and may bring what an earlier recovery brought already.

    ``trust_flushed=False`` for a directory that was a slave's in the last epoch: what records say about the disk is
    true of the master's (R1). Raises CorruptLog, and then has changed nothing but leftovers of segments in the making.
    """
    remove_leftovers(place.directory)
    checkpoint = usable(checkpoints.read(), place)
    reader = LogReader(place.directory, place.segment_bytes, place.store)
    try:
        found = find_end(reader, place, checkpoint)
        refuse_corruption(reader, place, found, checkpoint, trust_flushed=trust_flushed)
        torn_to = torn_extent(reader, place, found)
        failpoint("recovery.scanned")
        clean = checkpoint is not None and checkpoint.clean and checkpoint.flushed == found.end == torn_to
        if not clean:
            _cut(place, found, checkpoints, checkpoint)
        failpoint("recovery.done")
        snapshot, epochs = _read_back(reader, place, found, checkpoint, replay, dispatch)
    finally:
        reader.close()
    if found.epoch == 0:
        reason = "empty"
    elif found.end < found.hole:
        reason = "incomplete group"
    else:
        reason = "torn tail" if torn_to > found.end else "clean" if clean else "whole"
    return Recovery(
        first=found.first,
        end=found.end,
        epoch=found.epoch,
        epochs=epochs,
        snapshot=snapshot,
        replayed_from=found.start,
        dispatched=found.first if checkpoint is None else max(found.first, min(checkpoint.dispatched, found.end)),
        records=found.records,
        cut_bytes=torn_to - found.end,
        reason=reason,
    )


def repair(place: LogPlace, checkpoints: CheckpointFile) -> LogEnd:
    """Cut a log at its first hole, corrupt or not, on an operator's word. Everything behind it goes.

    The damaged segment is kept as a copy, later ones and one whose header does not hold under another name:
    ``<segment>.broken``, or ``<segment>.2.broken`` where an earlier repair has left one.
    """
    remove_leftovers(place.directory)
    checkpoint = usable(checkpoints.read(), place)
    reader = LogReader(place.directory, place.segment_bytes, place.store)
    try:
        found = find_end(reader, place, None, check_headers=False)
    finally:
        reader.close()
    if found.end % place.segment_bytes and place.path(found.end).exists():
        shutil.copyfile(place.path(found.end), _free_name(place.path(found.end)))
        sync_directory(place.directory)
    # Lowered first: a kill after it leaves a torn tail, a kill before it the same corrupt log and one more copy.
    if checkpoint is not None and (checkpoint.flushed > found.end or checkpoint.kept < found.first):
        # Without any segment left the log begins anew, at position 0.
        known = min(checkpoint.flushed, found.end if found.end > found.first else 0)
        checkpoints.write(replace(_lowered(checkpoint, known), kept=max(checkpoint.kept, found.first)))
    _cut(place, found, checkpoints, None, keep=True)
    return found


def _free_name(path: Path) -> Path:
    """What a segment that is cut off is kept as; nothing that was kept before is lost."""
    names = chain([path.with_suffix(BROKEN)], (path.with_suffix(f".{number}{BROKEN}") for number in count(2)))
    return next(name for name in names if not name.exists())


def usable(checkpoint: Checkpoint | None, place: LogPlace) -> Checkpoint | None:
    """The checkpoint, if it is one of this store."""
    return checkpoint if checkpoint is not None and checkpoint.store == place.store else None


def _cut(
    place: LogPlace,
    found: LogEnd,
    checkpoints: CheckpointFile,
    checkpoint: Checkpoint | None,
    *,
    keep: bool = False,
) -> None:
    """Make the disk hold nothing behind ``found.end`` that an older or a later scan could take for records (R2).

    The order matters: what lies behind the hole goes first, so that after a kill the hole is where it was and nothing
    more can vouch for it. Only then the torn group may go, which makes the hole come nearer.
    """
    later = [base for base in list_segments(place.directory) if base >= found.hole]
    for base in reversed(later):
        path = place.path(base)
        if keep:
            path.rename(_free_name(path))
        else:
            path.unlink()
    failpoint("recovery.removed")  # leaves some later segments after a power cut; none vouched, none does now
    if later:
        sync_directory(place.directory)
    if found.hole % place.segment_bytes == 0:
        return  # the segment before it is full to its last record
    segment = Segment.open(place.path(found.hole), place.segment_bytes, place.store, writable=True)
    try:
        _zero(segment, found.hole, segment.end)
        segment.sync()
        failpoint("recovery.tail_zeroed")  # leaves the hole, with nothing but zeros behind it
        if found.end == found.hole:
            return
        if checkpoint is not None and checkpoint.flushed > found.end:
            # The writer had synced a part of the group, which nobody was told of. Without this a kill inside the next
            # step would leave a hole below flushed: corruption, by rule.
            checkpoints.write(_lowered(checkpoint, found.end))
        failpoint("recovery.checkpoint_lowered")  # leaves a group with a hole in it, as before
        _zero(segment, found.end, found.hole)
        failpoint("recovery.cut")  # leaves the group in any state: its first record decides where the log ends
        segment.sync()
    finally:
        segment.close()


def _zero(segment: Segment, start: int, end: int) -> None:
    """Zeros from ``start`` to ``end``; what is zero already is not written again."""
    for at in range(start, end, _PIECE_BYTES):
        data = segment.read(at, min(_PIECE_BYTES, end - at))
        if not is_zero(data):
            segment.zero(at, at + len(data))


def _lowered(checkpoint: Checkpoint, end: int) -> Checkpoint:
    return replace(checkpoint, flushed=end, dispatched=min(checkpoint.dispatched, end), clean=False)


def _read_back(
    reader: LogReader,
    place: LogPlace,
    found: LogEnd,
    checkpoint: Checkpoint | None,
    replay: Replay,
    dispatch: Dispatch,
) -> tuple[int | None, tuple[Epoch, ...]]:
    """Pass the log on, see ``recover``; the begin of its newest complete snapshot, and its epochs."""
    replay_from = found.snapshot
    if replay_from is None:
        replay_from = _Reading(reader, place, found, found.end).run()
    reading = _Reading(reader, place, found, replay_from or 0, replay, dispatch)
    snapshot = reading.run()
    epochs = {epoch.epoch: epoch for epoch in checkpoint.epochs} if checkpoint is not None else {}
    epochs |= reading.epochs
    return snapshot, tuple(epochs[number] for number in sorted(epochs) if epochs[number].start < found.end)


class _Reading:
    """One pass over the sound part of the log."""

    def __init__(
        self,
        reader: LogReader,
        place: LogPlace,
        found: LogEnd,
        replay_from: int,
        replay: Replay | None = None,
        dispatch: Dispatch | None = None,
    ) -> None:
        self._reader = reader
        self._place = place
        self._found = found
        self._replay_from = replay_from
        self._replay = replay
        self._dispatch = dispatch
        self._epoch = found.start_epoch
        self._begun: tuple[int, SnapshotBody] | None = None
        self._snapshot: int | None = None
        self.epochs: dict[int, Epoch] = {}

    def run(self) -> int | None:
        """The begin of the newest complete snapshot."""
        reached = self._reader.feed(self._found.start, self._found.end, self._piece)
        if reached != self._found.end:
            raise corrupt(self._place, reached, "this record was sound a moment ago")
        return self._snapshot

    def _piece(self, data: memoryview, position: int) -> int:
        runs, marked, behind, self._epoch, _ = dispatch_scan(
            data, position, self._epoch, self._place.segment_bytes, keys=False, check_crc=False
        )
        for at in marked:
            record = decode_record(data[at - position :], at)
            if record.kind != RecordKind.MESSAGE:
                self._note(record)
            if self._replay is not None and at >= self._replay_from:
                self._replay(record)
        if self._dispatch is not None and runs:
            self._dispatch(runs, behind)
        return behind

    def _note(self, record: Record) -> None:
        try:
            if record.kind == RecordKind.EPOCH:
                epoch = EpochBody.parse(record.body)
                self.epochs[epoch.epoch] = Epoch(epoch.epoch, epoch.start, epoch.previous)
            elif record.kind == RecordKind.SNAPSHOT_BEGIN:
                body = SnapshotBody.parse(record.body)
                self._begun = record.position, body
                self.epochs |= {item[0]: Epoch(*item) for item in body.epochs}
            elif record.kind == RecordKind.SNAPSHOT_END and self._begun is not None:
                begin, wanted = self._begun
                if SnapshotBody.parse(record.body) == wanted:
                    self._snapshot = begin
                self._begun = None
        except ValueError as error:
            raise corrupt(self._place, record.position, f"a sound record with a senseless body: {error}") from error
