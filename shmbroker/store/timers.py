"""Which delayed messages are pending, and which is due next: the timer index, and in memory what it does not have yet.

    log ──▶ learn ──┬──▶ changes ──commit──▶ timer index (all that are pending, by due time)
                    └──▶ near ◀────reload──────┘
                          └──▶ take ──▶ fired by one append, which the log then tells us like any other

*near* holds all timers up to the *horizon*, and a bounded number of them: what is due later waits in the index.
*Changes* are what the log says behind the position that the index has applied; timers among them are *fresh*. Nothing
here is the truth: after a kill all of it is made again from the index and from the log behind its position.

Pure bookkeeping: no clock, no shared memory; the index is its only file. One thread uses it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import Final, NamedTuple

from shmbroker.record import RecordKind
from shmbroker.store.timer_index import Timer, TimerIndex

NEAR_MAX: Final = 65_536
LITTLE_MAX: Final = 16_384  # timers of a segment
_ANYWHERE: Final = 1 << 63

Event = tuple[int, int, int, int, int]  # as timer_scan gives it
_Key = tuple[int, int]  # due, position


class _Change(NamedTuple):
    """What the record at ``at`` says of one timer: it is there, or it is not any more."""

    at: int
    added: Timer | None
    removed: int
    recalled: _Key | None  # due, origin


class Timers:
    """The pending timers of one log."""

    def __init__(self, index: TimerIndex, kept: int, near_max: int = NEAR_MAX) -> None:
        """``kept``: the log before it was given up, with nothing pending in it that the index does not have."""
        self._index = index
        self._near_max = near_max
        self.position = max(index.position, kept)  # what the log says before it is known here
        self._changes: deque[_Change] = deque()
        self._fresh: dict[int, Timer] = {}  # by position
        self._removed: set[int] = set()  # the index may still have them
        self._near: set[int] = set()  # positions; `_heap` may hold others, which are passed over
        self._heap: list[_Key] = []
        self._horizon: _Key | None = (0, 0)  # None: nothing is due later than what is near

    # ---- what the log says

    def learn(self, events: Iterable[Event], position: int) -> None:
        """Take what the log says from where we are up to ``position``, in its order."""
        for at, kind, timer, first, second in events:
            if kind == RecordKind.TIMER:
                self._add(at, Timer(first, timer, second, timer))
            elif kind == RecordKind.RECALL:
                self._recall(at, timer)
            else:
                self._remove(at, timer)
                if second:
                    self._carried(at, second, first)
        self.position = position

    def _add(self, at: int, timer: Timer) -> None:
        self._fresh[timer.position] = timer
        self._changes.append(_Change(at, timer, 0, None))
        if self._horizon is None or (timer.due, timer.position) <= self._horizon:
            self._bring_near(timer.due, timer.position)
            if len(self._heap) > self._near_max:
                self._shrink()

    def _remove(self, at: int, position: int, recalled: _Key | None = None) -> None:
        self._near.discard(position)
        self._fresh.pop(position, None)
        self._removed.add(position)
        self._changes.append(_Change(at, None, position, recalled))

    def _recall(self, at: int, position: int) -> None:
        timer = self._find(position)
        if timer is not None:  # else it was not pending, and nobody was told that this has recalled it
            self._remove(at, position, (timer.due, timer.origin))

    def _carried(self, at: int, successor: int, origin: int) -> None:
        """The TIMER record at ``successor``, met just before, stands for an older one."""
        timer = self._find(successor)
        if timer is not None:
            self._add(at, timer._replace(origin=origin))

    def _find(self, position: int) -> Timer | None:
        if position in self._removed:
            return None
        return self._fresh.get(position) or self._index.get(position)

    # ---- what is due

    def take(self, now_ns: int, durable: int, count: int) -> list[_Key]:
        """At most ``count`` timers that are due, and whose record lies before ``durable``, earliest first.

        The caller says what became of them: ``fired``, or ``put_back``.
        """
        taken: list[_Key] = []
        early: list[_Key] = []
        while len(taken) < count:
            due = self.next_due()
            if due is None or due > now_ns:
                break
            key = heapq.heappop(self._heap)
            (taken if key[1] < durable else early).append(key)
        for key in early:
            heapq.heappush(self._heap, key)
        return taken

    def put_back(self, keys: Iterable[_Key]) -> None:
        """They did not fire."""
        for key in keys:
            heapq.heappush(self._heap, key)

    def fired(self, keys: Iterable[_Key]) -> None:
        """They did, says the log, which we have not read so far yet."""
        for _, position in keys:
            self._near.discard(position)
            self._removed.add(position)

    def is_pending(self, key: _Key) -> bool:
        """Whether a timer that was taken is still to fire."""
        return key[1] in self._near

    def drop(self, key: _Key) -> None:
        """Its record cannot be read: it does not fire in this life, and stays in the index."""
        self._near.discard(key[1])

    def next_due(self) -> int | None:
        """When the next timer is due; None if there is none."""
        while True:
            while self._heap and self._heap[0][1] not in self._near:
                heapq.heappop(self._heap)
            if self._heap:
                return self._heap[0][0]
            if self._horizon is None:
                return None
            self._reload(self._horizon)

    def _reload(self, horizon: _Key) -> None:
        """Nothing is near any more: move the horizon on."""
        count = self._near_max // 4
        loaded = self._index.after(*horizon, count)
        self._horizon = loaded[-1] if len(loaded) == count else None
        for timer in self._fresh.values():
            key = timer.due, timer.position
            if key > horizon and (self._horizon is None or key <= self._horizon):
                loaded.append(key)
        for due, position in loaded:
            if position not in self._removed:
                self._bring_near(due, position)

    def _bring_near(self, due: int, position: int) -> None:
        if position not in self._near:
            self._near.add(position)
            heapq.heappush(self._heap, (due, position))

    def _shrink(self) -> None:
        """Leave the later half to the index."""
        self._heap.sort()  # a sorted list is a heap
        del self._heap[self._near_max // 2 :]
        self._horizon = self._heap[-1]
        self._near.intersection_update([position for _, position in self._heap])

    # ---- the index

    @property
    def uncommitted(self) -> int:
        """Changes that the index does not have."""
        return len(self._changes)

    def commit(self, durable: int, count: int) -> None:
        """Make at most about ``count`` changes durable in the index, none that the log itself could still lose.

        Raises lmdb.Error, and has changed nothing then.
        """
        added: dict[int, Timer] = {}
        removed: list[int] = []
        done_with: list[int] = []
        recalled: list[_Key] = []
        done = 0
        end = min(self.position, durable)
        for done, change in enumerate(self._changes):
            if change.at >= durable or (done >= count and change.at != self._changes[done - 1].at):
                end = change.at
                break
            if change.added is not None:
                added[change.added.position] = change.added
            else:
                done_with.append(change.removed)
                timer = added.pop(change.removed, None)
                if (
                    timer is None or timer.origin != timer.position
                ):  # carried on: an earlier commit may have put it there
                    removed.append(change.removed)
            if change.recalled is not None:
                recalled.append(change.recalled)
        else:
            done = len(self._changes)
        self._index.commit(max(end, self._index.position), added.values(), removed, recalled)
        for change in islice(self._changes, done):
            if change.added is not None and self._fresh.get(change.added.position) == change.added:
                del self._fresh[change.added.position]
        for _ in range(done):
            self._changes.popleft()
        self._removed.difference_update(done_with)

    def forget_recalled(self, now_ns: int) -> None:
        """Of messages that were due long ago nobody needs to know any more that they were recalled."""
        self._index.forget_recalled(now_ns)

    def little_left(self, start: int, end: int, bytes_max: int) -> list[Timer]:
        """The pending timers of [start, end), which the index has applied, if they take no more than that of it.

        Else none of them: they are worth the room that they hold.
        """
        found = self._index.oldest(start, end, LITTLE_MAX) if end <= self._index.position else []
        found = [timer for timer in found if timer.position not in self._removed]
        return found if len(found) < LITTLE_MAX and sum(timer.size for timer in found) <= bytes_max else []

    def kept(self, durable: int) -> int:
        """No timer before this position is pending, and none there has a fate that the index does not know.

        The log before it may go. Not behind ``durable``.
        """
        oldest = self._index.oldest(0, _ANYWHERE, 1)
        unknown = self._changes[0].at if self._changes else self.position
        return min([unknown, durable, *(timer.position for timer in oldest)])
