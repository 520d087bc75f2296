"""Where a log ends, and whether it may end there: scanning and judging, without changing anything.

A *hole* is the first place at which no valid record of a permitted epoch begins (R2). It is a torn tail unless somebody
knew it to be on the disk: the checkpoint, or the writer of a later record, who noted ``flushed`` in it (R1). With 16
unsynced pages every legal state after a power cut may have a hole with valid records behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shmbroker._native._core import find_record, group_floor, skim
from shmbroker.errors import CorruptLog, PositionGone
from shmbroker.naming import segment_name
from shmbroker.record import RECORD_HEADER_BYTES, Record, RecordKind, next_position, padded
from shmbroker.store.checkpoint import Checkpoint
from shmbroker.store.commit_log import LogReader
from shmbroker.store.segment import SEGMENT_HEADER_BYTES, Segment, list_segments

COPY_BYTES: Final = 8192  # SB_COPY_BYTES of layout.h
_EPOCH_MAX: Final = 2**32 - 1
_EPOCH_AT: Final = 16


@dataclass(frozen=True, slots=True)
class LogPlace:
    """Which log: its segments' directory, their size, how far the disk may have been behind, and its owner's id."""

    directory: Path
    segment_bytes: int
    ring_bytes: int
    store: bytes

    def base(self, position: int) -> int:
        """Base position of the segment of ``position``."""
        return position - position % self.segment_bytes

    def path(self, position: int) -> Path:
        """File of the segment of ``position``."""
        return self.directory / segment_name(self.base(position))


@dataclass(frozen=True, slots=True)
class LogEnd:
    """Where a log ends; positions."""

    first: int  # of the oldest segment
    start: int  # where the scan began
    start_epoch: int
    snapshot: int | None  # the checkpoint's, if it begins there
    hole: int  # behind the last valid record
    end: int  # behind the last whole group: the log goes on here
    epoch: int  # of the last record; 0 for an empty log
    records: int  # valid ones between start and hole


def find_end(
    reader: LogReader, place: LogPlace, checkpoint: Checkpoint | None, *, check_headers: bool = True
) -> LogEnd:
    """Walk over the valid records from the checkpoint's snapshot, or from the oldest segment, to the first hole.

    Changes nothing. Raises a SegmentError for a segment whose header does not hold: headers are durable before a
    segment gets its name, so that is never a torn tail. Without ``check_headers``, to repair, it is a hole at its base.
    """
    bases = list_segments(place.directory)
    if not bases:
        return LogEnd(0, 0, 0, None, 0, 0, 0, 0)
    first = bases[0]
    start, snapshot = _scan_start(reader, place, checkpoint, first)
    for base in bases:
        if check_headers and base + place.segment_bytes > start:
            Segment.open(place.path(base), place.segment_bytes, place.store).close()
    head = _record_at(reader, start)
    epoch = start_epoch = 0 if head is None else head.epoch
    records = 0

    def walk(data: memoryview, position: int) -> int:
        nonlocal epoch, records
        behind, count, epoch, _ = skim(data, position, epoch, place.segment_bytes)
        records += count
        return behind

    hole = reader.feed(start, bases[-1] + place.segment_bytes, walk)
    inside = max(start, place.base(hole))
    data = reader.window(inside, hole, place.segment_bytes) if hole > inside else memoryview(b"")
    end = group_floor(data, inside, place.segment_bytes, hole) if data else hole
    return LogEnd(first, start, start_epoch, snapshot, hole, end, epoch, records)


def refuse_corruption(
    reader: LogReader, place: LogPlace, found: LogEnd, checkpoint: Checkpoint | None, *, trust_flushed: bool = True
) -> None:
    """Raise CorruptLog if the hole lies in what was known to be on the disk (R1); else it is a torn tail.

    Also if the log begins behind the position from which the checkpoint says that it was kept.
    """
    if checkpoint is not None and checkpoint.kept < found.first:
        raise CorruptLog(
            f"{place.directory}: the log begins at position {found.first}, but was kept from {checkpoint.kept} on: its "
            f"oldest segments, {segment_name(checkpoint.kept)} first, are missing. Nothing was changed. Put them back; "
            "or `shmbroker log repair` accepts the loss",
            checkpoint.kept,
            str(place.path(checkpoint.kept)),
        )
    if checkpoint is not None and found.hole < checkpoint.flushed:
        raise corrupt(place, found.hole, f"the checkpoint knows {checkpoint.flushed} bytes to be on the disk")
    if not trust_flushed:
        return
    for data, position in _behind(reader, place, found.hole):
        record = find_record(data, position, place.segment_bytes, found.epoch, _EPOCH_MAX, found.hole)
        if record is not None:
            raise corrupt(
                place, found.hole, f"the valid record at {record[0]} knows {record[2]} bytes to be on the disk"
            )
    # What lies further off than the ring is large was written after the hole had to be on the disk. Segments begin
    # with a record: their first bytes show whether they were ever entered.
    for base in list_segments(place.directory):
        record_there = _record_at(reader, base) if base > found.hole + place.ring_bytes else None
        if record_there is not None and record_there.epoch >= found.epoch and record_there.flushed > found.hole:
            raise corrupt(place, found.hole, f"the segment at {base} begins with a later, valid record")


def _scan_start(
    reader: LogReader, place: LogPlace, checkpoint: Checkpoint | None, first: int
) -> tuple[int, int | None]:
    """Where to begin: the older of the checkpoint's snapshot and the consume queues' end. And the snapshot."""
    if checkpoint is None or checkpoint.snapshot is None or checkpoint.snapshot < first:
        return first, None
    begin = _record_at(reader, checkpoint.snapshot)
    if begin is None or begin.kind != RecordKind.SNAPSHOT_BEGIN:
        return first, None
    start = min(checkpoint.snapshot, next_position(checkpoint.dispatched, 0, place.segment_bytes))
    return start if start >= first and _record_at(reader, start) else first, checkpoint.snapshot


def _record_at(reader: LogReader, position: int) -> Record | None:
    try:
        return reader.read(position)
    except (CorruptLog, PositionGone):
        return None


def _behind(reader: LogReader, place: LogPlace, hole: int) -> Iterator[tuple[memoryview, int]]:
    """What the disk holds from ``hole`` on, as far as unsynced data may reach; one segment's part at a time."""
    largest = place.ring_bytes // 4 + COPY_BYTES  # group of records (R18)
    position, end = hole, hole + place.ring_bytes + largest  # begun where the ring ends
    while position < end:
        yield reader.window(position, end, place.segment_bytes), position
        position = place.base(position) + place.segment_bytes


def torn_extent(reader: LogReader, place: LogPlace, found: LogEnd) -> int:
    """Behind the last byte that belonged to something; for people, and to know whether anything was torn at all."""
    extent = found.hole
    for data, position in _behind(reader, place, found.hole):
        head = data[:RECORD_HEADER_BYTES]
        if position == found.hole and int.from_bytes(head[8:16], "little") == position and any(head[:8]):
            # Half of a record: it names its place, but its bytes are not all here.
            size = padded(max(RECORD_HEADER_BYTES, int.from_bytes(head[:4], "little")))
            extent = min(position + size, place.base(position) + place.segment_bytes)
        at = 0
        while record := find_record(data[at:], position + at, place.segment_bytes, 0, _EPOCH_MAX):
            found_at = data[record[0] - position :]
            epoch = int.from_bytes(found_at[_EPOCH_AT : _EPOCH_AT + 4], "little")
            extent = skim(found_at, record[0], epoch, place.segment_bytes)[0]
            at = extent - position
    return extent


def corrupt(place: LogPlace, position: int, why: str) -> CorruptLog:
    """The error that says where the damage is and what to do about it."""
    path = place.path(position)
    byte = SEGMENT_HEADER_BYTES + position - place.base(position)
    return CorruptLog(
        f"{path}, byte {byte}: no valid record at position {position}, but {why}: this is damage, not a torn tail. "
        "Nothing was changed. `shmbroker log verify` shows the extent; `shmbroker log repair` cuts the log there and "
        "keeps a copy",
        position,
        str(path),
    )
