"""Which timers are pending and which are due: bookkeeping, index and the log behind it, against a simple model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import lmdb
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmbroker.record import RecordKind
from shmbroker.store.timer_index import RECALLED_KEPT_NS, Timer, TimerIndex
from shmbroker.store.timers import Event, Timers

STORE = b"s" * 16
SIZE = 128
NEAR = 8  # timers, so that most of them wait in the index


class Model(RuleBasedStateMachine):
    """A log of TIMER, FIRED and RECALL records, and what is pending by it; killed and begun anew at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.log: list[Event] = []
        self.end = 0
        self.durable = 0
        self.pending: dict[int, tuple[int, int]] = {}  # position: due, origin

    @initialize()
    def begin(self) -> None:
        self.index = TimerIndex(Path(self.directory.name) / "timers", STORE, writable=True)
        self.timers = Timers(self.index, 0, near_max=NEAR)

    def _append(self, *told: tuple[int, int, int, int]) -> None:
        for event in told:
            self.log.append((self.end, *event))
        self.end += SIZE

    @rule(due=st.integers(1, 50))
    def send(self, due: int) -> None:
        self.pending[self.end] = due, self.end
        self._append((RecordKind.TIMER, self.end, due, SIZE))

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def recall(self, data: st.DataObject) -> None:
        position = data.draw(st.sampled_from(sorted(self.pending)))
        del self.pending[position]
        self._append((RecordKind.RECALL, position, self.end + SIZE, 0))

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def carry_on(self, data: st.DataObject) -> None:
        position = data.draw(st.sampled_from(sorted(self.pending)))
        due, origin = self.pending.pop(position)
        successor = self.end
        self.pending[successor] = due, origin
        self._append((RecordKind.TIMER, successor, due, SIZE))
        self._append((RecordKind.FIRED, position, origin, successor))

    @rule()
    def read_on(self) -> None:
        events = [event for event in self.log if event[0] >= self.timers.position]
        self.timers.learn(events, self.end)

    @rule(count=st.integers(1, 5), now=st.integers(1, 50), visible=st.integers(0, 20))
    def fire(self, count: int, now: int, visible: int) -> None:
        self.read_on()
        limit = self.end - visible * SIZE
        taken = self.timers.take(now, limit, count)
        due = sorted((due, position) for position, (due, _) in self.pending.items() if due <= now and position < limit)
        assert taken == due[:count]
        fired, kept = taken[::2], taken[1::2]
        self.timers.fired(fired)
        self.timers.put_back(kept)
        for _, position in fired:
            del self.pending[position]
        if fired:
            self._append(*((RecordKind.FIRED, position, 0, 0) for _, position in fired))

    @rule()
    def flush(self) -> None:
        self.durable = self.end

    @rule(count=st.integers(0, 6))
    def commit(self, count: int) -> None:
        self.timers.commit(self.durable, count)

    @rule()
    def kill(self) -> None:
        kept = self.timers.kept(self.durable)
        self.index.close()
        self.index = TimerIndex(Path(self.directory.name) / "timers", STORE, writable=True)
        self.timers = Timers(self.index, kept, near_max=NEAR)

    @invariant()
    def nothing_pending_lies_before_what_may_be_given_up(self) -> None:
        if not hasattr(self, "timers"):
            return
        assert self.timers.kept(self.durable) <= min([self.durable, *(p for p in self.pending if p < self.durable)])
        known = {t.position: (t.due, t.origin) for t in self.index.oldest(0, 1 << 62, 10_000)}
        at = self.index.position
        assert all(
            known.get(position) == entry for position, entry in self.pending.items() if position + SIZE < at
        ) or (any(event[0] < at <= event[0] + SIZE for event in self.log if event[1] == RecordKind.FIRED))

    def teardown(self) -> None:
        try:
            self._compare_at_the_end()
        finally:
            self.index.close()
            self.directory.cleanup()

    def _compare_at_the_end(self) -> None:
        if hasattr(self, "timers"):
            self.read_on()
            now = sorted((due, position) for position, (due, _) in self.pending.items())
            assert self.timers.take(1 << 62, self.end, 10_000) == now
            self.timers.commit(self.end, 10_000)
            known = {t.position: (t.due, t.origin) for t in self.index.oldest(0, 1 << 62, 10_000)}
            assert known == self.pending
            for position, (due, origin) in self.pending.items():
                assert self.index.know(origin, due).timer == Timer(due, position, SIZE, origin)


# A disk that others use takes its time for each commit.
Model.TestCase.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
TestModel = pytest.mark.timeout(180)(Model.TestCase)


@pytest.fixture
def index(tmp_path: Path) -> TimerIndex:
    return TimerIndex(tmp_path / "timers", STORE, writable=True)


def test_the_index_grows_its_map_and_keeps_every_entry(tmp_path: Path) -> None:
    index = TimerIndex(tmp_path / "timers", STORE, writable=True, map_bytes=256 << 10)
    timers = [
        Timer(due=number * 7919 % 10_007, position=number * SIZE, size=SIZE, origin=number * SIZE)
        for number in range(20_000)
    ]
    index.commit(1 << 30, timers, [])
    assert index.count == 20_000
    assert index.after(0, 0, 30_000) == sorted(
        (timer.due, timer.position) for timer in timers if (timer.due, timer.position) > (0, 0)
    )
    index.commit(1 << 31, [], [timer.position for timer in timers])
    assert (index.count, index.after(0, 0, 1)) == (0, [])
    index.close()


def test_a_timer_that_was_carried_on_again_and_again_is_known_by_its_first_place(index: TimerIndex) -> None:
    timers = Timers(index, 0)
    timers.learn([(0, RecordKind.TIMER, 0, 7, SIZE)], SIZE)
    for place in range(SIZE, 9 * SIZE, 2 * SIZE):
        timers.commit(place, 10)
        old = index.oldest(0, 1 << 62, 1)[0].position
        moved = [(place, RecordKind.TIMER, place, 7, SIZE), (place + SIZE, RecordKind.FIRED, old, 0, place)]
        timers.learn(moved, place + 2 * SIZE)
        timers.commit(place + 2 * SIZE, 10)
        assert index.know(0, 7).timer == Timer(7, place, SIZE, 0)
        assert index.count == 1
    index.close()


def test_recalled_messages_are_known_for_a_day_behind_their_time(index: TimerIndex) -> None:
    index.commit(1000, [], [], [(5, 80), (6, 160)])
    assert index.know(80, 5).recalled
    assert not index.know(80, 6).recalled
    index.forget_recalled(5 + RECALLED_KEPT_NS)
    assert not index.know(80, 5).recalled
    assert index.know(160, 6).recalled
    index.close()


def test_a_failed_commit_changes_nothing(index: TimerIndex) -> None:
    timers = Timers(index, 0)
    timers.learn([(0, RecordKind.TIMER, 0, 7, SIZE), (SIZE, RecordKind.TIMER, SIZE, 8, SIZE)], 2 * SIZE)
    index.close()
    with pytest.raises(lmdb.Error):
        timers.commit(2 * SIZE, 10)
    assert timers.uncommitted == 2
