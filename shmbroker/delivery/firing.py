"""The scheduler's work: delayed messages fire when they are due.

    read_on   the log up to its tail ──▶ which timers are pending, which are due (store/timers.py)
    fire      one append: their messages, and a FIRED record that names their TIMER records
    commit    what the log says ──▶ timer index, off the hot path

**Once.** Whoever decides about a timer (fires it, recalls it, carries it on) reads the word ``timer_turn``, then the
log up to its tail, and then appends with the effect that the word is still what it was, and moves it (R3). If it has
moved, somebody else has decided something that was not read yet: nothing is appended, and it begins anew. So the
log's order decides, and a record that decides about a timer which is no longer pending never comes into being.

What a kill at each edge leaves:

    read_on                  nothing
    append                   its messages and FIRED, or nothing (see append.c)
    after it                 fired, though nobody has noted it: the next scheduler reads it in the log
    commit                   the index as it was, or with what it says it has applied; the rest is read in the log again

A message fires no sooner than its TIMER record is as durable as consumers want messages to be (``visible_after``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

from shmbroker._native._core import Region, decode_record, timer_scan
from shmbroker.delivery.dispatch import Source
from shmbroker.errors import CorruptLog, PositionGone
from shmbroker.failpoint import failpoint
from shmbroker.store.serving_reader import ServingReader
from shmbroker.store.timers import Event, Timers

TAKEN: Final = 2_048  # at one time: records are read in the order of the log, and fire in that of their times
_GROUP_RECORDS: Final = 255  # of one append: the lock is held no longer than for a batch of messages
_GROUP_BYTES: Final = 256 * 1024
_APPEND_TIMEOUT_NS: Final = 1_000_000_000
_WINDOW_BYTES: Final = 256 * 1024
_NEAR_BYTES: Final = 16 * 1024  # records as close as this are read in one window
_DURABLE_WAIT_NS: Final = 20_000_000
_FINISH_WAIT_NS: Final = 1_000_000_000
_COMMIT_CHANGES: Final = 4_000  # at one time: some ten milliseconds in which nothing fires
_CHANGES_MAX: Final = 200_000  # from here on they are committed also while timers are due
_COMMIT_INTERVAL: Final = 1.0
_BUSY_INTERVAL: Final = 5.0
_FORGET_INTERVAL: Final = 60.0
_COMMIT_BYTES: Final = 16 << 20  # of log without timers, which a successor would read again

_Key = tuple[int, int]


class TimerScan(NamedTuple):
    """One pass over the log, as ``timer_scan`` gives it."""

    events: list[Event]
    end: int
    epoch: int
    why: str


def scan_timers(data: memoryview, position: int, epoch: int, segment_bytes: int) -> TimerScan:
    """What a ``Source`` is to look for."""
    return TimerScan(*timer_scan(data, position, epoch, segment_bytes))


class Records:
    """TIMER records by position, from the ring or from the files, where those that lie close are read at once."""

    def __init__(self, region: Region, log: ServingReader) -> None:
        self._region = region
        self._log = log
        self._start = 0
        self._window = b""

    def read(self, positions: list[int]) -> Iterator[tuple[int, bytes | CorruptLog]]:
        """Each with its record, checked, or with what is wrong with it. ``positions`` are sorted."""
        for position, following in pairwise([*positions, 1 << 63]):
            try:
                raw = self._region.read_raw(position)
                yield position, self._of_files(position, following) if raw is None else raw
            except CorruptLog as damage:
                yield position, damage
            except PositionGone as gone:  # somebody has removed files: it cannot fire any more
                yield position, CorruptLog(str(gone), position)

    def _of_files(self, position: int, following: int) -> bytes:
        if not self._start <= position < self._start + len(self._window) and following - position < _NEAR_BYTES:
            self._window = bytes(self._log.window(position, self._region.get("flushed"), _WINDOW_BYTES))
            self._start = position
        if self._start <= position < self._start + len(self._window):
            try:
                return decode_record(memoryview(self._window)[position - self._start :], position).raw
            except ValueError:
                pass  # the window cuts it in two, or it is damaged: that is said there
        return self._log.read(position).raw


class Firing:
    """Fires the timers of a running broker. One thread uses it."""

    def __init__(self, region: Region, timers: Timers, log: ServingReader) -> None:
        self._region = region
        self._timers = timers
        self._source = Source(region, log, scan_timers)
        self._records = Records(region, log)
        self._epoch = 0  # of the record at the timers' position; 0: not known
        self._turn = 0
        self._caught_up = False  # only behind what was read once does the memory's `timed` know everything
        self._committed = 0.0  # monotonic
        self._committed_position = 0
        self._forgot = 0.0  # monotonic

    @property
    def position(self) -> int:
        """What the log says before it was read."""
        return self._timers.position

    def read_on(self) -> None:
        """Read the log up to its tail. Raises lmdb.Error if so much is new that the index has to take it."""
        self._turn = self._region.get("timer_turn")  # first: who has moved it has published what he decided
        tail = self._region.get("tail")
        if self._caught_up and self._region.get("timed") <= self._timers.position < tail:  # SYNC: timed
            self._timers.learn([], tail)  # whatever else was sent, there is nothing for us
            self._epoch = 0
        while self._timers.position < tail:
            start = self._timers.position
            try:
                found = self._source.scan(start, tail, self._epoch or self._source.epoch_at(start))
            except CorruptLog as damage:  # timers in there are lost with it
                self._source.note(damage, start)
                sound = self._source.sound_after(start, min(tail, self._region.get("flushed")))
                found = TimerScan([], sound, 0, "damaged")
            except PositionGone:  # nothing is pending in what retention took
                found = TimerScan([], max(start, self._region.get("kept")), 0, "gone")
            self._timers.learn(found.events, found.end)
            self._epoch = found.epoch
            if self._timers.uncommitted > _CHANGES_MAX:
                self._commit()
        self._caught_up = True

    def fire(self, now_ns: int) -> int:
        """Fire what is due by now. Returns how many timers; the rest of them waits for the next call.

        Raises what the append raises (StoreFull, BrokerBusy, ...): what has not fired yet is still pending.
        """
        keys = self._timers.take(now_ns, self._visible(), TAKEN)
        if not keys:
            return 0
        done: list[_Key] = []
        try:
            records = self._load(keys)
            for group in self._groups(keys, records):
                if not self._append(group, records):
                    break
                done += group
        finally:
            fired = set(done)
            self._timers.put_back(key for key in keys if key not in fired and self._timers.is_pending(key))
        return len(done)

    def wait_durable(self) -> None:
        """What is due waits for the disk only: so do we, for a moment."""
        word = "flushed" if self._region.get("visible_after") == 1 else "replicated"
        self._region.wait_for(word, self._region.get("tail"), _DURABLE_WAIT_NS)

    def next_due(self) -> int | None:
        """When the next timer is due, CLOCK_REALTIME ns."""
        return self._timers.next_due()

    def commit_if_due(self, *, quiet: bool) -> bool:
        """Let the index take what is new: often enough, and rather while nothing is due. True if there is more of it.

        Raises lmdb.Error.
        """
        uncommitted = self._timers.uncommitted
        since = time.monotonic() - self._committed
        if not quiet and uncommitted < _CHANGES_MAX and since < _BUSY_INTERVAL:
            return False
        log_bytes = self._timers.position - self._committed_position
        if uncommitted > _COMMIT_CHANGES or (since >= _COMMIT_INTERVAL and (uncommitted or log_bytes > _COMMIT_BYTES)):
            return self._commit() and self._timers.uncommitted > _COMMIT_CHANGES
        self._publish_kept()
        if time.monotonic() - self._forgot >= _FORGET_INTERVAL:
            self._timers.forget_recalled(time.time_ns())
            self._forgot = time.monotonic()
        return False

    def carry_on(self) -> bool:
        """Retention waits for a segment in which little but timers is left: append some of them anew (R15).

        Their old records are done with in the same append. True if there may be more of them. Raises as ``fire`` does.
        """
        size = self._region.segment_bytes
        start = self._region.get("timers_kept") // size * size
        if start + size > self._region.get("timers_wanted"):
            return False
        left = self._timers.little_left(start, start + size, size // 2)
        found = self._records.read([timer.position for timer in left[:_GROUP_RECORDS]])
        # Damage stays where it can be looked at.
        records = {position: raw for position, raw in found if isinstance(raw, bytes)}
        keys = [(timer.due, timer.position) for timer in left if timer.position in records]
        group = next(self._groups(keys, records), [])
        if not group:
            return False
        origins = {timer.position: timer.origin for timer in left}
        old = [position for _, position in group]
        done = self._region.carry_on(
            [records[position] for position in old],
            [origins[position] for position in old],
            self._turn,
            _APPEND_TIMEOUT_NS,
        )
        failpoint("scheduler.carried")
        self.read_on()  # either way: what we have just appended is told us by the log, like anybody else's
        return done

    def finish(self) -> None:
        """Leave an index that has what the log has on the disk. Raises lmdb.Error."""
        self._region.wait_for("flushed", self._timers.position, _FINISH_WAIT_NS)
        while self._timers.uncommitted and self._commit():
            pass

    # ---- inside

    def _visible(self) -> int:
        return self._region.get(("tail", "flushed", "replicated")[self._region.get("visible_after")])

    def _load(self, keys: list[_Key]) -> dict[int, bytes]:
        records: dict[int, bytes] = {}
        for position, raw in self._records.read(sorted(position for _, position in keys)):
            if isinstance(raw, CorruptLog):
                self._source.note(raw, position)
            else:
                records[position] = raw
        for key in keys:
            if key[1] not in records:
                self._timers.drop(key)
        return records

    def _groups(self, keys: list[_Key], records: dict[int, bytes]) -> Iterator[list[_Key]]:
        room = min(_GROUP_BYTES, self._region.ring_bytes // 8, self._region.segment_bytes // 8)
        group: list[_Key] = []
        size = 0
        for key in keys:
            if key[1] not in records:
                continue
            if group and (len(group) == _GROUP_RECORDS or size + len(records[key[1]]) > room):
                yield group
                group, size = [], 0
            group.append(key)
            size += len(records[key[1]])
        if group:
            yield group

    def _append(self, group: list[_Key], records: dict[int, bytes]) -> bool:
        """False: somebody has decided about a timer meanwhile. Then the log is read on, and who is left is put back."""
        failpoint("scheduler.before_fire")
        done = self._region.fire([records[position] for _, position in group], self._turn, _APPEND_TIMEOUT_NS)
        if done is None:
            self.read_on()
            return False
        failpoint("scheduler.after_fire")
        self._turn += 1
        self._timers.fired(group)
        return True

    def _commit(self) -> bool:
        """False: nothing of what is left is durable in the log yet."""
        before = self._timers.uncommitted
        failpoint("scheduler.before_commit")
        self._timers.commit(self._region.get("flushed"), _COMMIT_CHANGES)
        failpoint("scheduler.after_commit")
        self._committed_position = self._timers.position
        if self._timers.uncommitted <= _COMMIT_CHANGES:
            self._committed = time.monotonic()
        self._publish_kept()
        return self._timers.uncommitted < before

    def _publish_kept(self) -> None:
        self._region.raise_to("timers_kept", self._timers.kept(self._region.get("flushed")))
