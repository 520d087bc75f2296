"""The dispatcher's work: from the log's records to consume queues and to the key index.

    ring, or the files when it lags ──▶ Dispatcher ──▶ consume queues ──▶ ``dispatched``
                                            └─ marks ─▶ Indexer ──▶ key index ──▶ ``indexed``

Order, and what a crash leaves: entries first, then the watermark. A dispatcher killed in between leaves entries past
``dispatched``, which its successor writes again with the same bytes; readers stop at the watermark. It also leaves
entries before it that nobody has synced, and which may look clean (F1, F2): so the successor begins at the newest
checkpoint's ``dispatched``, and no checkpoint names more than its own dispatcher has written.

Damage that is met in the log is marked (``damaged``) and passed over to the next sound record: whoever dies of it meets
it again, and what lies behind it is sound. Recovery refuses such a log where it reads it; here it is what the disk has
lost since, or before the part that recovery reads.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from shmbroker._native._core import Region, decode_record, dispatch_scan
from shmbroker.errors import CorruptLog
from shmbroker.failpoint import failpoint
from shmbroker.record import RECORD_ALIGN_BYTES, RECORD_HEADER_BYTES, Record, RecordKind, TopicBody
from shmbroker.store.consume_queue import ENTRY, ConsumeQueues
from shmbroker.store.key_index import KeyIndex
from shmbroker.store.serving_reader import ServingReader

logger = logging.getLogger("shmbroker.dispatcher")

PASS_BYTES: Final = 4 << 20
PASS_RECORDS: Final = 65_536
SPARE_BYTES: Final = 256 * 1024  # of a record besides its body: header, tags, keys, properties
_OFFERS_MAX: Final = 1024
_OFFERED_MARKS_MAX: Final = 131_072
_INDEX_BATCH: Final = 2_000
_COMMIT_ENTRIES: Final = 20_000


class Scan(NamedTuple):
    """One pass over the log, as ``dispatch_scan`` gives it."""

    runs: list[tuple[int, int, int, bytes]]
    marks: list[int]
    end: int
    epoch: int
    why: str


def scan_to_dispatch(data: memoryview, position: int, epoch: int, segment_bytes: int) -> Scan:
    """What the dispatcher looks for."""
    return Scan(*dispatch_scan(data, position, epoch, segment_bytes, PASS_RECORDS))


class Pass(Protocol):
    """What every look at a stretch of log answers."""

    @property
    def end(self) -> int:
        """The position behind the last whole record."""

    @property
    def why(self) -> str:
        """Why it stopped there, as for ``scan``."""


Found = TypeVar("Found", bound=Pass)
Look = Callable[[memoryview, int, int, int], Found]  # data, its position, epoch, segment_bytes


class Source(Generic[Found]):
    """The records of a running broker's log: from the ring while it has them, else from the files.

    Not thread-safe, as LogReader is not.
    """

    def __init__(self, region: Region, log: ServingReader, look: Look[Found]) -> None:
        """``look`` finds in a run of records what this source is asked for."""
        self._region = region
        self._log = log
        self._look = look
        self._view = region.ring_view()
        self._pass_bytes = max(PASS_BYTES, region.max_message_bytes + SPARE_BYTES)

    def record(self, position: int) -> Record:
        """The record at ``position``, checked. Raises CorruptLog, PositionGone."""
        raw = self._region.read_raw(position)
        return self._log.read(position) if raw is None else decode_record(raw, position)

    def epoch_at(self, position: int) -> int:
        """The epoch of the first record at or after ``position``, where a record could begin."""
        left = self._region.segment_bytes - position % self._region.segment_bytes
        return self.record(position + left if left < RECORD_HEADER_BYTES else position).epoch

    def scan(self, position: int, end: int, epoch: int) -> Found:
        """What lies in [position, end), at most one pass of it.

        ``end``, loaded before this call, is a value that ``tail`` or ``flushed`` had: no record crosses it. Raises
        CorruptLog and PositionGone.
        """
        size = min(end - position, self._pass_bytes, self._region.ring_bytes)
        found = self._scan_ring(position, size, epoch)
        if found is None or found.end == position:
            # Only what is on the disk leaves the ring (R8); what an earlier life of the broker wrote was never in it.
            data = self._log.window(position, min(end, self._region.get("flushed")), self._pass_bytes)
            found = self._look(data, position, epoch, self._region.segment_bytes)
        if found.end == position:
            raise self._log.explain(position, f"no valid record, though the log goes on to {end}")
        return found

    def note(self, damage: CorruptLog, position: int) -> None:
        """Damage was met at ``position``: say so, and let ``status`` say so."""
        self._region.note_damage(position)
        logger.error("the log is damaged; what lies behind is served: %s", damage)

    def sound_after(self, position: int, end: int) -> int:
        """Where the sound log goes on behind the damage at ``position``: at a record, or at ``end``."""
        found = self._log.find(position + RECORD_ALIGN_BYTES, end)
        return end if found is None else found

    def _scan_ring(self, position: int, size: int, epoch: int) -> Found | None:
        if not self._in_ring(position):
            return None
        start = position & (self._region.ring_bytes - 1)
        data = self._view[start : start + size]
        found = self._look(data, position, epoch, self._region.segment_bytes)
        if found.why == "invalid" or not self._in_ring(position):
            return None  # overwritten while it was read, or older than this memory, which began behind a recovered log
        return found

    def _in_ring(self, position: int) -> bool:
        return self._region.get("write_limit") - position <= self._region.ring_bytes


class Dispatcher:
    """Keeps the consume queues. One thread steps it; it must keep up with the producers."""

    def __init__(
        self, region: Region, source: Source[Scan], queues: ConsumeQueues, indexer: Indexer, synced: int
    ) -> None:
        """``synced``: the consume queues' entries before it are durable, says the newest checkpoint."""
        self._region = region
        self._source = source
        self.queues = queues
        self._indexer = indexer
        # Entries before it are synced, or dirty in `queues`.
        self.position = max(region.get("kept"), min(synced, region.get("dispatched")))
        self._begun_at = region.get("tail")
        self.starved = False  # the last pass found no room on the disk
        self._epoch = 0  # of the record at `position`; 0: not known
        self._passed: range | None = None  # positions of the damage met last
        self._resumed: set[tuple[int, int]] = set()  # queues that had a message since

    @property
    def behind(self) -> bool:
        """What a predecessor has dispatched is still being written again."""
        return self.position < self._region.get("dispatched")

    def step(self) -> int:
        """Dispatch one bounded pass. Returns the bytes of log that it covered: 0 if there was nothing to do.

        Raises OSError and, for a file of the consume queues, CorruptLog; the pass may then be tried again.
        """
        tail = self._region.get("tail")  # first: what is read below is then there (R8)
        if self.position == tail:
            return 0
        try:
            scan = self._source.scan(self.position, tail, self._epoch or self._source.epoch_at(self.position))
        except CorruptLog as damage:
            self._source.note(damage, self.position)
            sound = self._source.sound_after(self.position, min(tail, self._region.get("flushed")))
            self._passed, self._resumed = range(self.position, sound, RECORD_ALIGN_BYTES), set()
            scan = Scan([], [], sound, 0, "damaged")
        runs = self._of_live_topics(scan.runs) if self.position < self._begun_at else scan.runs
        failpoint("dispatcher.before_queues")  # nothing written
        for run in runs:
            if self._passed is not None:
                self._mark_damaged(self._passed, *run[:3])
            self.queues.write(*run)
        failpoint("dispatcher.after_queues")  # entries past `dispatched`: written again by the next dispatcher
        self._region.raise_to("dispatched", scan.end)
        failpoint("dispatcher.after_publish")  # marks not offered: the next indexer scans for itself
        self._indexer.offer(self.position, scan.end, scan.marks)
        done = scan.end - self.position
        self.position, self._epoch = scan.end, scan.epoch
        return done

    def _mark_damaged(self, passed: range, topic_id: int, queue_id: int, offset: int) -> None:
        """Messages that the damage has swallowed get entries that lead there: their readers raise CorruptLog.

        Without them the queue would have a hole, and a hole is passed over in silence.
        """
        if (topic_id, queue_id) in self._resumed:
            return
        _, end = self.queues.offsets(topic_id, queue_id)
        missing = offset - end if end else 0
        if 0 < missing <= len(passed):  # else it has a hole for another reason
            entries = b"".join(ENTRY.pack(position, RECORD_HEADER_BYTES, 0) for position in passed[:missing])
            self.queues.write(topic_id, queue_id, end, entries)
        self._resumed.add((topic_id, queue_id))

    def _of_live_topics(self, runs: list[tuple[int, int, int, bytes]]) -> list[tuple[int, int, int, bytes]]:
        """Without those of topics whose files are removed already, or will be by the deletion that is yet to be met."""
        live = {topic["topic_id"] for topic in self._region.topics()}
        return [run for run in runs if run[0] in live]


class Indexer:
    """Keeps the key index, at its own pace and in another thread than the dispatcher's.

    The dispatcher offers the marks that it has found anyway. Offers that find no room are dropped; the indexer then
    scans that stretch of the log itself. It never goes past ``flushed``: what it indexes no power cut takes back.
    """

    def __init__(self, region: Region, source: Source[Scan], open_index: Callable[[], KeyIndex]) -> None:
        """``open_index`` is called in the first step, and again in each one until the disk has room for an index."""
        self._region = region
        self._source = source
        self._open_index = open_index
        self._index: KeyIndex | None = None
        self._offers: deque[tuple[int, int, list[int]]] = deque()
        self._offered_marks = 0
        self._marks: deque[int] = deque()  # records to be indexed, all before `_scanned`
        self._scanned = region.get("indexed")
        self.deleted_topics: list[int] = []  # topics whose deletion was met: the caller removes their files

    @property
    def position(self) -> int:
        """Everything before it was added to the index; some of it may not be committed yet."""
        return self._marks[0] if self._marks else self._scanned

    @property
    def full(self) -> bool:
        """So much is pending that it should be committed now."""
        return self._index is not None and self._index.pending >= _COMMIT_ENTRIES

    def offer(self, start: int, end: int, marks: list[int]) -> None:
        """In [start, end) only the records at ``marks`` have to be looked at. Called by the dispatcher's thread."""
        if len(self._offers) < _OFFERS_MAX and self._offered_marks + len(marks) <= _OFFERED_MARKS_MAX:
            self._offered_marks += len(marks)  # a hint: both threads change it, an offer more or less does not matter
            self._offers.append((start, end, marks))

    def step(self) -> bool:
        """Index a bounded number of records. True if there may be more to do at once. Raises lmdb.Error, OSError."""
        index = self._index = self._index or self._opened()
        before, end = self.position, min(self._region.get("flushed"), self._region.get("dispatched"))
        if not self._marks:
            self._extend(end)
        for _ in range(min(len(self._marks), _INDEX_BATCH)):
            try:
                self._add(self._source.record(self._marks[0]), index)
            except CorruptLog as damage:
                self._source.note(damage, self._marks[0])
            self._marks.popleft()
        return before < self.position < end

    def commit(self) -> None:
        """Make what was added durable and publish ``indexed``. Raises lmdb.Error; nothing is lost, try again later."""
        if self._index is None:
            return
        failpoint("dispatcher.before_index")  # what is pending is found again from the position that LMDB has
        self._index.commit(self.position)
        failpoint("dispatcher.after_index")  # `indexed` is old: retention waits
        self._region.set("indexed", self.position)

    def drop_before(self, position: int) -> None:
        """Retention has deleted the log before ``position``."""
        if self._index is not None:
            self._index.drop_before(position)

    def close(self) -> None:
        if self._index is not None:
            self._index.close()

    def _opened(self) -> KeyIndex:
        index = self._open_index()
        try:
            index.cut(self._region.get("flushed"))
        except BaseException:
            index.close()
            raise
        # Deleted segments were indexed as far as they had to be.
        self._scanned = max(index.position, self._region.get("kept"))
        self._region.set("indexed", self._scanned)
        return index

    def _extend(self, end: int) -> None:
        """Find the next marks before ``end``: among the offers, or in the log where there is none."""
        while not self._marks and self._offers and self._offers[0][0] <= self._scanned:
            _, offered_end, marks = self._offers[0]
            if offered_end > end:
                return  # not flushed yet
            self._offers.popleft()
            self._offered_marks -= len(marks)
            self._marks.extend(mark for mark in marks if mark >= self._scanned)
            self._scanned = max(self._scanned, offered_end)
        end = min(end, self._offers[0][0]) if self._offers else end
        if not self._marks and self._scanned < end:
            try:
                scan = self._source.scan(self._scanned, end, self._source.epoch_at(self._scanned))
            except CorruptLog as damage:
                self._source.note(damage, self._scanned)
                scan = Scan([], [], self._source.sound_after(self._scanned, end), 0, "damaged")
            self._marks.extend(scan.marks)
            self._scanned = scan.end

    def _add(self, record: Record, index: KeyIndex) -> None:
        if record.kind == RecordKind.TOPIC:
            body = TopicBody.parse(record.body)
            if body.deleted:
                self.deleted_topics.append(body.topic_id)
        elif record.kind in (RecordKind.MESSAGE, RecordKind.TIMER):
            index.add(record)
