"""The commit log on disk: one writer that mirrors the ring into segments, and readers by position.

The writer is told bytes and their place; what is durable when, and who is told, is the flusher's business. The order
of the durable writes of one flush, and what a crash at each edge leaves:

    pwrite        ── any part of the range may be on the disk, in any order: a torn tail for recovery, or the same bytes
                     again from the ring
    fdatasync     ── all of the range is on the disk (a small range already is: store/direct_write.py)
    (flushed moves, waiters are posted: the flusher)

A segment entered on the way was made durable with its name by the pool before. Files are synced oldest first, and stay
open from their first write to their last sync, because the kernel reports a failed write-back to open files only (F2).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shmbroker._native._core import find_record, start_writeback
from shmbroker.errors import CorruptLog, PositionGone, ShmBrokerError, StoreFull, StoreReadOnly
from shmbroker.failpoint import die, failpoint
from shmbroker.naming import segment_name
from shmbroker.record import Record, decode_record, padded
from shmbroker.store.direct_write import DIRECT_BYTES_MAX, DirectWriter
from shmbroker.store.files import Disk
from shmbroker.store.segment import SEGMENT_HEADER_BYTES, Segment, SegmentError, list_segments
from shmbroker.store.segment_pool import SegmentPool

WINDOW_BYTES: Final = 4 * 1024 * 1024
WRITE_BYTES: Final = 1024 * 1024  # of one pwrite: how much is copied before the disk begins with it
_READ_AHEAD_BYTES: Final = 4096
_EPOCH_MAX: Final = 2**32 - 1
_OPEN_SEGMENTS: Final = 4
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class CommitLog:
    """The one writer of a log. Not thread-safe.

    Its first failed write or sync is its last: what the disk then holds is unknown, the kernel takes the failed pages
    for clean, and a second fdatasync would answer success over zeros (F1). Every later call raises the same error.
    Only a disk without room, or a process without file descriptors (StoreFull), may be tried again.
    """

    def __init__(self, pool: SegmentPool, segment_bytes: int, disk: Disk = os) -> None:
        self._pool = pool
        self._disk = disk
        self._segment_bytes = segment_bytes
        self._segment: Segment | None = None  # where the last write ended
        self._dirty: dict[int, Segment] = {}  # by base position: written since the last sync, and the current one
        self._direct = DirectWriter(disk)
        self._unsynced = False  # something was written that is durable only after the next sync
        self.failed: StoreReadOnly | None = None

    def write(self, data: memoryview, position: int) -> None:
        """Put ``data``, which begins at ``position``, into the segments it belongs to. Not durable before ``sync``.

        Writing a range again is allowed. Raises StoreFull (try again), StoreReadOnly (never again).
        """
        if self.failed is not None:
            raise self.failed
        failpoint("flusher.before_pwrite")  # nothing of this range is on the disk
        small = len(data) <= DIRECT_BYTES_MAX and not self._unsynced
        try:
            while data:
                segment = self._segment
                if segment is None or not segment.base <= position < segment.end:
                    segment = self._enter(position)
                piece = data[: segment.end - position]
                torn = failpoint("flusher.pwrite")  # torn: a part of the range, whatever its length
                if torn is not None:
                    self._disk.pwrite(segment.fd, piece[:torn], segment.offset(position))
                    die()
                written = self._write_piece(segment, piece, position, small)
                position += written
                data = data[written:]
        except OSError as error:
            raise self._failure("pwrite", error) from error
        failpoint("flusher.after_pwrite")  # the disk may hold any part of the range

    def sync(self) -> None:
        """fdatasync whatever was written, oldest segment first. When it returns, all of it is on the disk.

        Raises StoreReadOnly: nothing written since the last successful sync may be taken for durable, ever.
        """
        if self.failed is not None:
            raise self.failed
        try:
            failpoint("flusher.before_fdatasync")  # as after_pwrite
            for base in sorted(self._dirty) if self._unsynced else ():
                self._disk.fdatasync(self._dirty[base].fd)
        except OSError as error:
            raise self._failure("fdatasync", error) from error
        failpoint("flusher.after_fdatasync")  # durable, but flushed is old and nobody has been told
        self._unsynced = False
        for segment in self._dirty.values():
            if segment is not self._segment:
                segment.close()
        self._dirty = {base: segment for base, segment in self._dirty.items() if segment is self._segment}

    def close(self) -> None:
        """Close the files; syncs nothing."""
        self._direct.close()
        for segment in {*self._dirty.values(), *filter(None, [self._segment])}:
            segment.close()
        self._dirty.clear()
        self._segment = None

    def _write_piece(self, segment: Segment, piece: memoryview, position: int, small: bool) -> int:
        """Write what lies in one segment; how many bytes of it. If small, durably where the file system can."""
        offset = segment.offset(position)
        if small and self._direct.write(segment, piece, offset):
            return len(piece)
        self._unsynced = True
        written = self._disk.pwrite(segment.fd, piece[:WRITE_BYTES], offset)
        if written <= 0:
            raise OSError(errno.EIO, "pwrite wrote nothing")
        if written < len(piece):
            # The disk works while the next part is copied. A failure here may be the only report of it (F1).
            start_writeback(segment.fd, offset, written)
        return written

    def _enter(self, position: int) -> Segment:
        base = position - position % self._segment_bytes
        try:
            segment = self._dirty.get(base) or self._pool.take(base)
        except OSError as error:
            if error.errno in _NO_RESOURCES:  # opening is no write: nothing is unknown
                raise StoreFull(f"segment {segment_name(base)}: {error.strerror}") from error
            raise
        self._segment = self._dirty[base] = segment
        return segment

    def _failure(self, call: str, error: OSError) -> ShmBrokerError:
        """StoreFull for a disk without room; else the writer's last error, kept."""
        where = self._segment.path if self._segment is not None else "the log"
        if error.errno in _NO_SPACE and call == "pwrite":
            return StoreFull(f"{where}: {error.strerror}")
        self.failed = StoreReadOnly(
            f"{call} on {where} failed ({errno.errorcode.get(error.errno or 0, '?')}: {error.strerror}); what the disk "
            "holds is unknown. Nothing more is written before the store is opened anew on a disk that works"
        )
        return self.failed


class LogReader:
    """Reads a log by position, also while it is written and while retention takes segments away. Not thread-safe.

    Only positions before ``flushed`` may be asked for: the files say nothing reliable about the rest.
    """

    def __init__(self, directory: Path, segment_bytes: int, store: bytes, window_bytes: int = WINDOW_BYTES) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._store = store
        self._open: dict[int, Segment] = {}
        self._window_bytes = window_bytes
        self._buffer = bytearray()

    def read(self, position: int) -> Record:
        """The record at ``position``. Raises PositionGone if retention took it, CorruptLog if it does not hold."""
        segment = self._segment(position)
        data = segment.read(position, _READ_AHEAD_BYTES)
        size = int.from_bytes(data[:4], "little")
        if len(data) < size <= segment.end - position:
            data = segment.read(position, size + 7)
        try:
            return decode_record(data, position)
        except ValueError as error:
            raise self.explain(position, str(error)) from error

    def window(self, position: int, end: int, size: int | None = None) -> memoryview:
        """At most ``size`` (default ``window_bytes``) bytes from ``position`` on, before ``end``, within one segment.

        Valid until the next call. Empty if there is no (sound) segment for ``position``.
        """
        try:
            segment = self._segment(position)
        except (PositionGone, CorruptLog):
            return memoryview(b"")
        size = min(size or self._window_bytes, end - position, segment.end - position)
        if size > len(self._buffer):
            self._buffer = bytearray(size)  # grows to a segment at most, and stays
        view = memoryview(self._buffer)[:size]
        return view[: segment.read_into(view, position)]

    def feed(self, start: int, end: int, consume: Callable[[memoryview, int], int]) -> int:
        """Pass the log from ``start`` to ``end`` in large pieces to ``consume(data, position)``.

        It returns the position behind what it could use, always that of a record: the next piece begins there. Returns
        ``end``, or the position at which consume did not get on although it had all up to the segment's end.
        """
        position, size = start, self._window_bytes
        while position < end:
            data = self.window(position, end, size)
            behind = consume(data, position) if data else position
            if behind > position:
                position, size = behind, self._window_bytes
                continue
            # Nothing used: either no record, or one larger than the window, which then is made as large.
            wanted = padded(int.from_bytes(data[:4], "little"))
            if not size < wanted <= self._segment_bytes:
                break
            size = wanted
        return position

    def find(self, position: int, end: int, flushed_above: int = -1) -> int | None:
        """Where the next valid record begins that lies in [position, end); both are places where one could begin.

        With ``flushed_above``: the next whose writer knew more than that to be durable. None: there is none.
        """
        size = self._window_bytes
        while position < end:
            data = self.window(position, end, size)
            found = find_record(data, position, self._segment_bytes, 1, _EPOCH_MAX, flushed_above)
            if found is not None:
                return found[0]
            behind = position + len(data)
            if len(data) == size and behind < end and behind % self._segment_bytes:
                size *= 2  # from the same place: a record that a piece cuts in two is not found
                continue
            position = behind if data and behind % self._segment_bytes == 0 else self._resume(behind)
            size = self._window_bytes
        return None

    def explain(self, position: int, what: str) -> ShmBrokerError:
        """Why the bytes at ``position`` were not as they should be: the error to raise.

        A segment that has been recycled under the reader says so in its header: PositionGone. Else CorruptLog.
        """
        base = position - position % self._segment_bytes
        path = self._directory / segment_name(base)
        segment = self._open.pop(base, None)
        try:
            if segment is not None and segment.moved():
                return PositionGone(f"position {position}: retention has taken its segment")
        except SegmentError:
            pass  # the header is damaged as well
        finally:
            if segment is not None:
                segment.close()
        if base < min(list_segments(self._directory), default=0):
            return PositionGone(f"position {position}: retention has taken its segment")
        return CorruptLog(
            f"{path}, byte {SEGMENT_HEADER_BYTES + position - base} (position {position}): {what}. "
            "`shmbroker log verify` shows the extent, `shmbroker log repair` cuts there and keeps a copy",
            position,
            str(path),
        )

    def close(self) -> None:
        """Close the files."""
        for segment in self._open.values():
            segment.close()
        self._open.clear()

    def _resume(self, position: int) -> int:
        """Where to look on behind what cannot be read: its segment is missing, cut off, or not to be believed."""
        return position + self._segment_bytes - position % self._segment_bytes

    def _segment(self, position: int) -> Segment:
        base = position - position % self._segment_bytes
        segment = self._open.pop(base, None)
        if segment is None:
            path = self._directory / segment_name(base)
            try:
                segment = Segment.open(path, self._segment_bytes, self._store)
            except (FileNotFoundError, SegmentError) as error:
                if path.exists():
                    raise  # damaged; a segment that was recycled while it was opened has another name by now
                raise self.explain(position, "the segment is missing") from error
        self._open[base] = segment  # last used, last to go
        if len(self._open) > _OPEN_SEGMENTS:
            self._open.pop(next(iter(self._open))).close()
        return segment
