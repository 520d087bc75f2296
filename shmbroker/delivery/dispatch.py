"""The dispatcher's work: from the log's records to consume queues and to the key index.

    ring, or the files when it lags ──▶ Dispatcher ──▶ consume queues ──▶ ``dispatched``
                                            └─ marks ─▶ Indexer ──▶ key index ──▶ ``indexed``

Order, and what a crash leaves: entries first, then the watermark. A dispatcher killed in between leaves entries past
``dispatched``, which its successor writes again with the same bytes; readers stop at the watermark.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Final, NamedTuple, Protocol

from shmbroker._native._core import Record, Region, decode_record, dispatch_scan
from shmbroker.delivery.definitions import KIND_MESSAGE
from shmbroker.errors import CorruptLog
from shmbroker.failpoint import failpoint
from shmbroker.store.consume_queue import ConsumeQueues
from shmbroker.store.key_index import KeyIndex

logger = logging.getLogger(__name__)

PASS_BYTES: Final = 4 << 20
PASS_RECORDS: Final = 65_536
SPARE_BYTES: Final = 256 * 1024  # of a record besides its body: header, tags, keys, properties
_OFFERS_MAX: Final = 1024
_MARKS_MAX: Final = 131_072
_INDEX_BATCH: Final = 2_000
_COMMIT_ENTRIES: Final = 20_000


class LogReader(Protocol):
    """What is needed of the commit log's files."""

    def read(self, position: int, size: int) -> bytes:
        """Bytes from ``position`` on, at most ``size``, not past the end of their segment; b"" past the log's end.

        Raises PositionGone if retention has deleted them.
        """


class Source:
    """Records of the log as seen from here: from the ring while it has them, else from the files."""

    def __init__(self, region: Region, log: LogReader) -> None:
        self._region = region
        self._log = log
        self._view = region.ring_view()
        self._mask = region.ring_bytes - 1
        self._pass_bytes = max(PASS_BYTES, region.max_message_bytes + SPARE_BYTES)

    def record(self, position: int) -> Record:
        """The record at ``position``, checked. Raises CorruptLog, PositionGone."""
        raw = self._region.read_raw(position)
        try:
            if raw is None:
                raw = self._log.read(position, self._pass_bytes)
            return decode_record(raw, position)
        except ValueError as error:
            raise CorruptLog(f"no record at position {position}: {error}", position) from error

    def scan(self, position: int, end: int, epoch: int) -> Scan:
        """What lies in [position, end), at most one pass of it.

        ``end`` was loaded from ``tail`` or ``flushed`` before. Raises CorruptLog, PositionGone.
        """
        size = min(end - position, self._pass_bytes)
        start = position & self._mask
        segment_bytes = self._region.segment_bytes
        found = dispatch_scan(self._view[start : start + size], position, epoch, segment_bytes, PASS_RECORDS)
        if self._region.get("write_limit") - position > self._region.ring_bytes:
            # An append has overwritten what was just read (R8). It is on the disk: nothing else frees ring space.
            data = self._log.read(position, min(size, self._region.get("flushed") - position))
            found = dispatch_scan(data, position, epoch, segment_bytes, PASS_RECORDS)
        scan = Scan(*found)
        if scan.end == position or scan.why == "invalid":
            raise CorruptLog(f"position {scan.end}: no valid record before the log's end at {end}", scan.end)
        return scan


class Scan(NamedTuple):
    """One pass over the log, as :func:`dispatch_scan` gives it."""

    runs: list[tuple[int, int, int, bytes]]
    marks: list[int]
    end: int
    epoch: int
    why: str


class Dispatcher:
    """Keeps the consume queues. One thread steps it; it must keep up with the producers."""

    def __init__(self, region: Region, source: Source, queues: ConsumeQueues, indexer: Indexer) -> None:
        self._region = region
        self._source = source
        self._queues = queues
        self._indexer = indexer
        self.position = region.get("dispatched")
        self._epoch = 0  # of the record at `position`; 0: look there

    def step(self) -> int:
        """Dispatch one bounded pass; returns the bytes of log that it covered, 0 if there was nothing to do.

        Raises OSError, after which the same pass may be tried again, and CorruptLog.
        """
        tail = self._region.get("tail")  # first: what is read below is then there (R8)
        if self.position == tail:
            return 0
        if not self._epoch:
            self._epoch = self._source.record(self.position).epoch
        scan = self._source.scan(self.position, tail, self._epoch)
        failpoint("dispatcher.before_queues")  # nothing written
        for run in scan.runs:
            self._queues.write(*run)
        failpoint("dispatcher.after_queues")  # entries past `dispatched`: written again by the next dispatcher
        self._region.set("dispatched", scan.end)
        failpoint("dispatcher.after_publish")
        self._indexer.offer(self.position, scan.end, scan.marks)
        done = scan.end - self.position
        self.position, self._epoch = scan.end, scan.epoch
        return done


class Indexer:
    """Keeps the key index, at its own pace and in another thread than the dispatcher's.

    The dispatcher offers the marks that it has found anyway. Offers that do not fit any more are dropped; the indexer
    then scans that stretch of the log itself. It never goes past ``flushed``: what it indexes no power cut takes back.
    """

    def __init__(self, region: Region, source: Source, index: KeyIndex) -> None:
        self._region = region
        self._source = source
        self._index = index
        self._offers: deque[tuple[int, int, list[int]]] = deque()
        self._offered_marks = 0
        self._marks: deque[int] = deque()
        self._scanned = max(index.position, region.get("kept"))  # what is deleted was indexed, or had nothing to index
        self._position = self._scanned
        self.deleted_topics: list[int] = []

    def offer(self, start: int, end: int, marks: list[int]) -> None:
        """The records at ``marks`` are all in [start, end) that have to be looked at. Called by the dispatcher."""
        if len(self._offers) < _OFFERS_MAX and self._offered_marks + len(marks) <= _MARKS_MAX:
            self._offered_marks += len(marks)
            self._offers.append((start, end, marks))

    def step(self) -> bool:
        """Index a bounded number of records. True if there may be more to do at once."""
        flushed = self._region.get("flushed")
        if not self._marks:
            self._next_stretch(min(flushed, self._region.get("dispatched")))
        for _ in range(min(len(self._marks), _INDEX_BATCH)):
            if self._marks[0] >= flushed:
                break
            self._add(self._source.record(self._marks.popleft()))
        self._position = min(self._marks[0] if self._marks else self._scanned, flushed)
        return bool(self._marks) and self._marks[0] < flushed

    def commit(self, *, force: bool = False) -> None:
        """Publish ``indexed``, after a commit if there is something to commit. Raises lmdb.Error, to be tried again.

        ``force`` stores the position even if nothing was found since the last commit.
        """
        failpoint("dispatcher.before_index")  # whatever is pending is found again from the position that LMDB has
        if self._index.pending or force:
            self._index.commit(self._position)
        failpoint("dispatcher.after_index")
        self._region.set("indexed", self._position)

    @property
    def full(self) -> bool:
        """So much is pending that it should be committed now."""
        return self._index.pending >= _COMMIT_ENTRIES

    def _next_stretch(self, end: int) -> None:
        while self._offers and self._offers[0][0] <= self._scanned:
            start, offered_end, marks = self._offers[0]
            if offered_end > self._scanned:
                if offered_end > end:
                    return
                self._marks.extend(mark for mark in marks if mark >= self._scanned)
                self._scanned = offered_end
            self._offers.popleft()
            self._offered_marks -= len(marks)
            if self._marks:
                return
        if self._offers:
            end = min(end, self._offers[0][0])
        if self._scanned < end:
            epoch = self._source.record(self._scanned).epoch
            scan = self._source.scan(self._scanned, end, epoch)
            self._marks.extend(scan.marks)
            self._scanned = scan.end

    def _add(self, record: Record) -> None:
        if record.kind == KIND_MESSAGE:
            ...
