"""A log on disk as the tools see it: its extent, its records, and every place where it does not hold.

Reads through ``shmbroker.store`` alone. Works on the directory of a running broker, a stopped or a killed one, and on a
backup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shmbroker._native import _core
from shmbroker._native._core import RECORD_ALIGN_BYTES
from shmbroker.naming import BrokerPaths, segment_name
from shmbroker.record import RecordKind, TopicBody
from shmbroker.store.checkpoint import CheckpointFile
from shmbroker.store.commit_log import LogReader
from shmbroker.store.consume_queue import ENTRY_BYTES
from shmbroker.store.segment import SEGMENT_HEADER_BYTES, Segment, SegmentError, SegmentHeader, list_segments
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Failure

if TYPE_CHECKING:
    from shmbroker._native._core import Record, Region

_RECORDS_PER_SCAN: Final = 4096


@dataclass(frozen=True, slots=True)
class Damage:
    """Log from ``position`` up to ``end`` that no valid record accounts for."""

    position: int
    end: int
    path: str
    what: str


@dataclass(slots=True)
class Verdict:
    """What reading every byte has shown."""

    first: int
    end: int
    durable: int  # the log is known to have reached the disk up to here
    segments: int = 0
    records: int = 0
    messages: int = 0
    damages: list[Damage] = field(default_factory=list)
    torn_bytes: int = 0  # behind the end and never acknowledged as durable: recovery cuts it

    @property
    def sound(self) -> bool:
        return not self.damages

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sound": self.sound}


class StoredLog:
    """The segments of one directory. ``region``, of the running broker, says how far the files are to be believed."""

    def __init__(self, paths: BrokerPaths, region: Region | None = None) -> None:
        self.paths = paths
        self.bases = list_segments(paths.log)
        if not self.bases:
            raise Failure(f"{paths.log} has no segments yet: nothing was ever sent", ExitCode.FINDING)
        header = _any_header(paths.log, self.bases)
        self.segment_bytes = header.segment_bytes
        self.store = header.store
        self.checkpoint = CheckpointFile(paths.checkpoint).read()
        if self.checkpoint is not None and self.checkpoint.store != self.store:
            self.checkpoint = None
        self.live_end = region.get("flushed") if region is not None else None
        self._live_dispatched = region.get("dispatched") if region is not None else None
        self.durable = self.live_end or (self.checkpoint.flushed if self.checkpoint is not None else 0)
        self.reader = LogReader(paths.log, self.segment_bytes, self.store)

    @property
    def first(self) -> int:
        return self.bases[0]

    @property
    def limit(self) -> int:
        """No record lies at or past it: what is flushed while a broker writes, else where the files end."""
        return self.live_end if self.live_end is not None else self.bases[-1] + self.segment_bytes

    def close(self) -> None:
        self.reader.close()

    def dispatched_end(self) -> int:
        """Up to where the log is whole and its consume queues should be complete. Raises Failure for a damaged log."""
        if self.live_end is not None and self._live_dispatched is not None:
            return min(self.live_end, self._live_dispatched)
        verdict = self.verify()
        if not verdict.sound:
            raise Failure("the log is damaged; `shmbroker log verify` names the places", ExitCode.OPERATOR)
        return verdict.end

    def records(self, start: int, end: int) -> Iterator[Record]:
        """Whole records from ``start``, which is where one begins, to the first place without a valid one."""
        position, epoch = start, self._epoch_at(start)
        while position < end and epoch:
            data = self._window(position, end)
            found, behind, _ = _core.scan(data, position, epoch, self.segment_bytes, _RECORDS_PER_SCAN)
            if behind == position:
                return
            yield from found
            if found:
                epoch = max(epoch, found[-1].epoch)
            position = behind

    def align(self, position: int) -> int:
        """The first place at or after ``position`` where a valid record begins; the limit if there is none."""
        place = -(-max(position, self.first) // RECORD_ALIGN_BYTES) * RECORD_ALIGN_BYTES
        found = self.reader.find(place, self.limit)
        return found if found is not None else self.limit

    def topic_ids(self, name: str) -> set[int]:
        """The ids under which the log knows a topic of this name: one for each time that it was made."""
        found: set[int] = set()
        position = self.first
        while position < self.limit:
            epoch = self._epoch_at(position)
            if epoch:
                position = self._collect_topic_ids(name, position, epoch, found)
            following = self.reader.find(position, self.limit)  # behind a damaged place, if that is why it ended here
            if following is None:
                break
            position = following
        return found

    def verify(self, advance: Callable[[float], None] = lambda amount: None) -> Verdict:  # noqa: ARG005
        """Read every byte from the oldest segment on and account for it.

        A place without a valid record is damage if the log is known to have been durable there (the running broker or
        the checkpoint says so, or a later record that knew it), else it is the torn end that recovery will cut.
        """
        verdict = Verdict(self.first, self.first, self.durable, segments=len(self.bases))
        if self.checkpoint is not None and self.checkpoint.kept < self.first:
            verdict.damages.append(self._damage(self.checkpoint.kept, self.first, "the oldest segments are missing"))
        self._verify_headers(verdict)
        position = self.first
        while position < self.limit:
            epoch = self._epoch_at(position)
            if epoch:
                position = self._walk(verdict, position, epoch, advance)
            if position >= self.limit:
                break
            following = self.reader.find(position, self.limit)
            if following is None or not self._was_durable(position):
                break
            verdict.damages.append(self._damage(position, following, "no valid record"))
            advance(following - position)
            position = following
        verdict.end = position
        if position < self.durable:
            verdict.damages.append(self._damage(position, self.durable, "durable log is missing"))
        elif self.live_end is None:
            verdict.torn_bytes = self._used_behind(position)
        return verdict

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _walk(self, verdict: Verdict, start: int, epoch: int, advance: Callable[[float], None]) -> int:
        def consume(data: memoryview, position: int) -> int:
            nonlocal epoch
            behind, count, last_epoch, _ = _core.skim(data, position, epoch, self.segment_bytes)
            checked = data[: behind - position]
            runs = _core.dispatch_scan(checked, position, epoch, self.segment_bytes, max(1, count), check_crc=False)[0]
            verdict.records += count
            verdict.messages += sum(len(entries) // ENTRY_BYTES for *_, entries in runs)
            epoch = last_epoch
            advance(behind - position)
            return behind

        return self.reader.feed(start, self.limit, consume)

    def _collect_topic_ids(self, name: str, start: int, epoch: int, found: set[int]) -> int:
        """Take them from the whole records that begin at ``start``; returns where those end."""

        def consume(data: memoryview, position: int) -> int:
            nonlocal epoch
            _, marked, behind, epoch, _ = _core.dispatch_scan(data, position, epoch, self.segment_bytes, keys=False)
            for place in marked:
                record = _core.decode_record(data[place - position :], place)
                if record.kind == RecordKind.TOPIC and (body := TopicBody.parse(record.body)).name == name:
                    found.add(body.topic_id)
            return behind

        return self.reader.feed(start, self.limit, consume)

    def _window(self, position: int, end: int) -> memoryview:
        """From ``position`` on, at least one whole record if there is one."""
        data = self.reader.window(position, end)
        if len(data) >= 4 and int.from_bytes(data[:4], "little") > len(data):
            data = self.reader.window(position, end, self.segment_bytes)
        return data

    def _epoch_at(self, position: int) -> int:
        """Epoch of the valid record at ``position``; 0 if there is none."""
        try:
            return _core.decode_record(self._window(position, self.limit), position).epoch
        except ValueError:
            return 0

    def _was_durable(self, hole: int) -> bool:
        """True if the place is known to have been on the disk: a torn write cannot explain a hole there (R1)."""
        return hole < self.durable or self.reader.find(hole, self.limit, flushed_above=hole) is not None

    def _verify_headers(self, verdict: Verdict) -> None:
        for base, following in zip(self.bases, [*self.bases[1:], None], strict=True):
            try:
                Segment.open(self.paths.log / segment_name(base), self.segment_bytes, self.store).close()
            except SegmentError as error:
                verdict.damages.append(self._damage(base, base + self.segment_bytes, str(error)))
            if following is not None and following != base + self.segment_bytes:
                verdict.damages.append(self._damage(base + self.segment_bytes, following, "segments are missing"))

    def _used_behind(self, position: int) -> int:
        """Bytes from ``position`` to the last that is not zero."""
        used = 0
        for base in self.bases:
            at = max(base, position)
            while at < base + self.segment_bytes:
                data = self.reader.window(at, base + self.segment_bytes)
                if not data:
                    break
                stripped = bytes(data).rstrip(b"\0")
                if stripped:
                    used = at + len(stripped) - position
                at += len(data)
        return used

    def _damage(self, position: int, end: int, what: str) -> Damage:
        base = position - position % self.segment_bytes
        return Damage(
            position, end, f"{self.paths.log / segment_name(base)}:{SEGMENT_HEADER_BYTES + position - base}", what
        )


def _any_header(directory: Path, bases: list[int]) -> SegmentHeader:
    """The header of the oldest segment that has a sound one: it says how long segments are and whose they are."""
    reason: SegmentError | None = None
    for base in bases:
        path = directory / segment_name(base)
        try:
            with path.open("rb") as stream:
                return SegmentHeader.parse(stream.read(SEGMENT_HEADER_BYTES), path)
        except SegmentError as error:
            reason = error
    assert reason is not None
    raise reason
