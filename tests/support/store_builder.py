"""Writes logs of known records, damages them, and recovers them: real files, no broker."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shmbroker.record import (
    EpochBody,
    Record,
    RecordFlag,
    RecordKind,
    SnapshotBody,
    encode_record,
    next_position,
    padded,
)
from shmbroker.store.checkpoint import Checkpoint, CheckpointFile
from shmbroker.store.log_end import LogPlace
from shmbroker.store.recovery import Recovery, recover
from shmbroker.store.segment import SEGMENT_HEADER_BYTES, Segment, SegmentHeader, list_segments

STORE = bytes(range(16))
SEGMENT = 8192
RING = 4096
HEADER = 80


@dataclass
class StoreBuilder:
    """A log in ``directory``, written record by record as append and flusher would."""

    directory: Path
    segment_bytes: int = SEGMENT
    ring_bytes: int = RING
    epoch: int = 0
    position: int = 0
    flushed: int = 0
    records: list[bytes] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    offsets: dict[int, int] = field(default_factory=dict)
    snapshots: int = 0

    def __post_init__(self) -> None:
        self.log = self.directory / "log"
        self.log.mkdir(parents=True, exist_ok=True)
        self.place = LogPlace(self.log, self.segment_bytes, self.ring_bytes, STORE)
        self.checkpoint_path = self.directory / "checkpoint"

    # ---- writing

    def begin_epoch(self, reason: str = "test") -> int:
        self.epoch += 1
        body = EpochBody(self.epoch, self._room(HEADER + 100), self.epoch - 1, reason).encode()
        return self.append(RecordKind.EPOCH, body)

    def message(self, body: bytes = b"body", queue_id: int = 0, topic_id: int = 1, **fields: Any) -> int:
        offset = self.offsets.get(queue_id, 0)
        self.offsets[queue_id] = offset + 1
        ids = {"topic_id": topic_id, "queue_id": queue_id, "queue_offset": offset}
        return self.append(RecordKind.MESSAGE, body, **ids, **fields)

    def messages(self, count: int, size: int = 100) -> list[int]:
        return [self.message(b"%08d" % index * (size // 8), queue_id=index % 3) for index in range(count)]

    def group(self, count: int, size: int = 40) -> list[int]:
        """``count`` messages published by one store of tail."""
        whole = padded(HEADER + size) * count
        self._room(whole)
        places = []
        for index in range(count):
            flags = RecordFlag.GROUP | (RecordFlag.GROUP_LAST if index == count - 1 else 0)
            group_bytes = whole if index == 0 else 0
            places.append(self.message(b"g" * size, flags=flags, group_bytes=group_bytes))
        return places

    def snapshot(self, complete: bool = True) -> int:
        self.snapshots += 1
        body = SnapshotBody(self.snapshots, self.epoch).encode()
        begin = self.append(RecordKind.SNAPSHOT_BEGIN, body)
        if complete:
            self.append(RecordKind.SNAPSHOT_END, body)
        return begin

    def append(self, kind: int, body: bytes, **fields: Any) -> int:
        size = HEADER + len(body)
        position = self._room(padded(size))
        self._write(
            encode_record(position=position, epoch=self.epoch, flushed=self.flushed, kind=kind, body=body, **fields)
        )
        return position

    def sync(self) -> None:
        """The flusher has synced all so far: later records know it."""
        self.flushed = self.position

    def checkpoint(self, **fields: Any) -> None:
        file = CheckpointFile(self.checkpoint_path)
        file.write(Checkpoint(STORE, **({"flushed": self.flushed, "dispatched": self.flushed} | fields)))
        file.close()

    def _room(self, size: int) -> int:
        """Where ``size`` bytes may be appended: a filler ends a segment that is too short for them."""
        position = next_position(self.position, 0, self.segment_bytes)
        left = self.segment_bytes - position % self.segment_bytes
        self.position = position
        if size > left:
            filler = encode_record(
                position=position,
                epoch=self.epoch,
                flushed=self.flushed,
                kind=RecordKind.FILLER,
                body=bytes(left - HEADER),
            )
            self._write(filler)
        return self.position

    def _write(self, raw: bytes) -> None:
        self.records.append(raw)
        self.places.append(self.position)
        self.write_bytes(self.position, raw)
        self.position += len(raw)

    # ---- bytes

    def write_bytes(self, position: int, data: bytes) -> None:
        """Write log bytes at their place, making segments as needed."""
        while data:
            base = position - position % self.segment_bytes
            piece = data[: base + self.segment_bytes - position]
            path = self.place.path(position)
            if not path.exists():
                self.make_segment(base)
            with path.open("r+b") as file:
                file.seek(SEGMENT_HEADER_BYTES + position - base)
                file.write(piece)
            position, data = position + len(piece), data[len(piece) :]

    def make_segment(self, base: int) -> Path:
        Segment.create(self.log, SegmentHeader(base, self.segment_bytes, self.epoch, STORE)).close()
        return self.place.path(base)

    def read_bytes(self, position: int, size: int) -> bytes:
        """Log bytes, also across segments; zeros where there is no segment."""
        data = b""
        while size > 0:
            base = position - position % self.segment_bytes
            piece = min(size, base + self.segment_bytes - position)
            path = self.place.path(position)
            found = path.read_bytes()[SEGMENT_HEADER_BYTES + position - base :][:piece] if path.exists() else b""
            data += found.ljust(piece, b"\0")
            position, size = position + piece, size - piece
        return data

    def zero(self, position: int, size: int) -> None:
        self.write_bytes(position, bytes(size))

    def flip(self, position: int, bit: int = 0) -> None:
        (byte,) = self.read_bytes(position, 1)
        self.write_bytes(position, bytes([byte ^ 1 << bit]))

    def log_bytes(self, end: int | None = None) -> bytes:
        """All that was written, up to ``end``."""
        return self.read_bytes(0, self.position if end is None else end)

    # ---- reading

    def recover(self, **options: Any) -> tuple[Recovery, Seen]:
        seen = Seen()
        checkpoints = CheckpointFile(self.checkpoint_path)
        try:
            result = recover(self.place, checkpoints, seen.replayed.append, seen.dispatched, **options)
        finally:
            checkpoints.close()
        return result, seen


@dataclass
class Seen:
    """What a recovery passed on."""

    replayed: list[Record] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # of messages

    def dispatched(self, runs: list[tuple[int, int, int, bytes]], position: int) -> None:
        places = [place for run in runs for place, _, _ in struct.iter_unpack("<QII", run[3])]
        assert all(place < position for place in places)
        self.positions = sorted({*self.positions, *places})

    @property
    def kinds(self) -> list[RecordKind]:
        return [RecordKind(record.kind) for record in self.replayed]


def standard(directory: Path) -> StoreBuilder:
    """``E | 20 messages F`` then ``| 10 messages``: 30 messages, of which the first 20 are known to be on the disk."""
    log = StoreBuilder(directory)
    log.begin_epoch()
    log.messages(20)
    log.sync()
    log.messages(10)
    return log


def check_sound(log: StoreBuilder, result: Recovery) -> None:
    """Nothing behind the end is anything but zeros, and what stands before it is what was written."""
    assert log.log_bytes(result.end) == b"".join(log.records)[: result.end]
    tail = log.place.base(result.end) + SEGMENT
    if result.end % SEGMENT:
        assert log.read_bytes(result.end, tail - result.end).count(0) == tail - result.end
    assert all(base < max(result.end, 1) for base in list_segments(log.log))
