"""One contract, two rings: the native one and the slow model in ``reference_ring.py`` answer alike, to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_ring import BLOCK_ENTRIES, HEADER, Draft, Placed, ReferenceRing, Refused, Shape, Stamp
from support.native_ring import NativeRing, native_ring

from shmbroker.record import decode_record

SHAPE = Shape()
SMALLEST = HEADER + 8  # of a message of up to eight bytes


@pytest.fixture(params=["native", "reference"])
def ring(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "reference":
        yield ReferenceRing(SHAPE)
    else:
        with native_ring(SHAPE) as native:
            yield native


def settle(ring: Any) -> None:
    """What flusher and dispatcher would have done by now."""
    ring.flushed = ring.dispatched = ring.tail


def code_of(append: Callable[[], Placed]) -> str:
    with pytest.raises(Refused) as refused:
        append()
    return refused.value.code


def fill_segment(ring: Any, room: int) -> None:
    """Send until exactly ``room`` bytes are left in the segment."""
    while (left := SHAPE.segment_bytes - ring.tail % SHAPE.segment_bytes) != room:
        size = min(left - room, 8192) if left - room > 16384 or left - room <= 8192 else 4096
        ring.send(Draft(bytes(size - HEADER)))
        settle(ring)


# ---- the contract ---------------------------------------------------------------------------------------------------


def test_records_follow_each_other_and_offsets_count_by_queue(ring: Any) -> None:
    first = ring.send(Draft(b"one", queue=0))
    second = ring.send(Draft(b"two", queue=2, tags="red", keys="k", properties=(("a", "b"),)))
    third = ring.send(Draft(b"three", queue=0))
    assert (first.positions, first.offsets) == ((0,), (0,))
    assert (second.positions, second.offsets) == ((first.end,), (0,))
    assert (third.positions, third.offsets) == ((second.end,), (1,))
    assert [queue.next_offset for queue in ring.queues] == [2, 0, 1]
    assert [queue.bytes for queue in ring.queues] == [8, 0, 3]
    record = decode_record(ring.read(second.positions[0]), second.positions[0])
    assert (record.body, record.tags, record.keys, record.properties) == (b"two", "red", "k", {"a": "b"})
    assert ring.read(third.end) is None


def test_a_group_is_published_at_once_with_its_size_in_its_first_record(ring: Any) -> None:
    ring.send(Draft(b"before"))
    placed = ring.send_group([Draft(bytes([i + 1]) * 100, queue=1) for i in range(5)])
    records = [decode_record(ring.read(position), position) for position in placed.positions]
    assert [record.group_bytes for record in records] == [5 * 184, 0, 0, 0, 0]
    assert [record.flags for record in records] == [1, 1, 1, 1, 1 | 4]
    assert placed.offsets == (0, 1, 2, 3, 4)
    assert placed.end == placed.positions[0] + 5 * 184 == ring.tail


@pytest.mark.parametrize("rest", range(8, HEADER, 8))
def test_a_rest_too_short_for_a_header_is_stepped_over_as_zeros(ring: Any, rest: int) -> None:
    fill_segment(ring, 2048)
    last = ring.send(Draft(b"x" * (2048 - HEADER - rest)))
    assert last.end == ring.tail == SHAPE.segment_bytes
    first, data = ring.window()
    assert data[SHAPE.segment_bytes - rest - first :] == bytes(rest)
    assert ring.send(Draft(b"y")).positions == (SHAPE.segment_bytes,)


@pytest.mark.parametrize("room", [HEADER, HEADER + 8, 1000])
def test_what_does_not_fit_into_a_segment_begins_the_next_behind_a_filler(ring: Any, room: int) -> None:
    fill_segment(ring, room)
    at = ring.tail
    placed = ring.send(Draft(b"z" * 1000))
    filler = decode_record(ring.read(at), at)
    assert (filler.kind, filler.size, filler.queue_id) == (2, room, 0xFFFF)
    assert placed.positions == (SHAPE.segment_bytes,)


def test_what_just_fits_ends_the_segment(ring: Any) -> None:
    fill_segment(ring, 2 * 184)
    at = ring.tail
    placed = ring.send_group([Draft(b"a" * 104), Draft(b"b" * 104)])
    assert placed.positions == (at, at + 184)
    assert placed.end == SHAPE.segment_bytes


def test_a_full_ring_keeps_a_reserve_for_the_system(ring: Any) -> None:
    body = b"x" * (1024 - HEADER)
    for _ in range((SHAPE.ring_bytes - SHAPE.reserve_bytes) // 1024):
        ring.send(Draft(body))
    tail = ring.tail
    assert code_of(lambda: ring.send(Draft(body))) == "NO_SPACE"
    assert code_of(lambda: ring.send_group([Draft(b"y")] * 2)) == "NO_SPACE"
    assert ring.tail == tail
    for _ in range(SHAPE.reserve_bytes // 1024):
        ring.send_system([body])
    assert code_of(lambda: ring.send_system([b"z"])) == "NO_SPACE"
    ring.flushed = ring.dispatched = 1024 + SHAPE.reserve_bytes
    ring.send(Draft(body))
    assert ring.read(0) is None
    assert ring.read(1024) is not None


def test_capacity_bounds_senders_and_system_apart(ring: Any) -> None:
    ring.user_capacity, ring.system_capacity = 2 * SMALLEST, 3 * SMALLEST
    ring.send(Draft(b"1"))
    assert code_of(lambda: ring.send(Draft(b"123456789"))) == "NO_CAPACITY"
    ring.send(Draft(b"2"))
    assert code_of(lambda: ring.send(Draft(b"3"))) == "NO_CAPACITY"
    ring.send_system([b"3"])
    assert code_of(lambda: ring.send_system([b"4"])) == "NO_CAPACITY"
    assert ring.tail == 3 * SMALLEST


def test_groups_over_their_limits_are_refused(ring: Any) -> None:
    limit = min(SHAPE.ring_bytes, SHAPE.segment_bytes) // 4
    assert code_of(lambda: ring.send(Draft(bytes(limit - HEADER + 1)))) == "TOO_LARGE"
    assert code_of(lambda: ring.send(Draft(bytes(SHAPE.max_message_bytes + 1)))) == "TOO_LARGE"
    assert code_of(lambda: ring.send_group([Draft(b"x")] * (limit // SMALLEST + 1))) == "TOO_LARGE"
    assert code_of(lambda: ring.send_group([Draft(b"x")] * 1025)) == "TOO_LARGE"
    assert code_of(lambda: ring.send(Draft(b""))) == "ILLEGAL"
    assert code_of(lambda: ring.send_group([])) == "ILLEGAL"
    assert code_of(lambda: ring.send_group([Draft(b"x"), Draft(b"")])) == "ILLEGAL"
    assert ring.tail == 0
    assert ring.send(Draft(bytes(limit - HEADER))).end == limit


def test_an_index_without_a_free_block_waits_for_the_dispatcher(ring: Any) -> None:
    for _ in range(SHAPE.blocks * BLOCK_ENTRIES):
        ring.send(Draft(b"x"))
        ring.flushed = ring.tail
    assert code_of(lambda: ring.send(Draft(b"x"))) == "NO_INDEX"
    assert code_of(lambda: ring.send(Draft(b"x", queue=1))) == "NO_INDEX"
    ring.dispatched = (BLOCK_ENTRIES - 1) * SMALLEST
    assert code_of(lambda: ring.send(Draft(b"x"))) == "NO_INDEX"
    ring.dispatched = BLOCK_ENTRIES * SMALLEST
    assert ring.send(Draft(b"x")).offsets == (SHAPE.blocks * BLOCK_ENTRIES,)
    assert ring.queues[0].index_first == BLOCK_ENTRIES


def test_a_remembered_id_is_stored_once(ring: Any) -> None:
    placed = ring.send_once(Draft(b"first"), (5, 6))
    assert ring.send_once(Draft(b"again", queue=1), (5, 6)) == Placed(placed.positions, (), 0, duplicate=True)
    assert not ring.send_once(Draft(b"other"), (5, 7)).duplicate
    for _ in range(20):
        ring.send(Draft(bytes(8000)))
        settle(ring)
    assert ring.read(placed.positions[0]) is None
    assert ring.send_once(Draft(b"again"), (5, 6)).positions == placed.positions
    for sequence in range(SHAPE.ids * 8):
        ring.send_once(Draft(b"x"), (9, sequence))
        settle(ring)
    assert not ring.send_once(Draft(b"forgotten"), (5, 6)).duplicate


# ---- any sequence of operations --------------------------------------------------------------------------------------

queues = st.integers(0, SHAPE.queues - 1)
sizes = st.one_of(st.integers(1, 120), st.integers(1, 4000), st.integers(4000, 17000))
texts = st.text(st.characters(codec="utf-8", categories=["L", "N"]), max_size=12)
drafts = st.builds(
    lambda size, queue, tags, keys, value: Draft(
        bytes([size % 251]) * size, queue, tags, keys, (("name", value),) if value else ()
    ),
    sizes, queues, texts, texts, texts,
)  # fmt: skip
operations = st.one_of(
    st.tuples(st.just("send"), drafts),
    st.tuples(st.just("burst"), queues, st.integers(1, 300)),
    st.tuples(
        st.just("group"), st.integers(0, SHAPE.queues - 1), st.lists(st.integers(1, 500), min_size=1, max_size=190)
    ),
    st.tuples(st.just("system"), st.lists(st.integers(1, 300), min_size=1, max_size=5)),
    st.tuples(st.just("once"), drafts, st.integers(1, 90)),
    st.tuples(st.just("flush"), st.floats(0, 1)),
    st.tuples(st.just("dispatch"), st.floats(0, 1)),
    st.tuples(st.just("capacity"), st.integers(0, 40_000), st.integers(0, 40_000)),
    st.tuples(st.just("read"), st.floats(0, 1)),
)


class Both:
    """Drives the two rings and compares after each step."""

    def __init__(self, native: NativeRing, reference: ReferenceRing) -> None:
        self.native, self.reference = native, reference
        self.records = [0]  # positions at which a record starts, or will

    def step(self, operation: tuple[Any, ...]) -> None:
        getattr(self, operation[0])(*operation[1:])
        self.compare()

    def both(self, native: Callable[[], Placed], reference: Callable[[list[Stamp]], Placed]) -> Placed | None:
        try:
            placed = native()
        except Refused as error:
            refused = error.code
        else:
            assert reference([] if placed.duplicate else self.native.stamps(placed.positions)) == placed
            if not placed.duplicate:
                self.records += [*placed.positions[1:], placed.end]
            return placed
        assert code_of(lambda: reference([])) == refused
        return None

    def send(self, draft: Draft) -> Placed | None:
        return self.both(lambda: self.native.send(draft), lambda stamps: self.reference.send(draft, *stamps))

    def burst(self, queue: int, count: int) -> None:
        while count and self.send(Draft(b"burst", queue)):
            count -= 1

    def group(self, queue: int, lengths: list[int]) -> None:
        group = [Draft(bytes([length % 256]) * length, queue) for length in lengths]
        self.both(lambda: self.native.send_group(group), lambda stamps: self.reference.send_group(group, stamps))

    def system(self, lengths: list[int]) -> None:
        bodies = [b"s" * length for length in lengths]
        self.both(lambda: self.native.send_system(bodies), lambda stamps: self.reference.send_system(bodies, stamps))

    def once(self, draft: Draft, number: int) -> None:
        dedup_id = (number, number * 7)
        self.both(
            lambda: self.native.send_once(draft, dedup_id),
            lambda stamps: self.reference.send_once(draft, dedup_id, *stamps),
        )

    def flush(self, share: float) -> None:
        self.native.flushed = self.reference.flushed = self._between(self.reference.flushed, share)

    def dispatch(self, share: float) -> None:
        self.native.dispatched = self.reference.dispatched = self._between(self.reference.dispatched, share)

    def _between(self, now: int, share: float) -> int:
        """A record's start from ``now`` to tail."""
        wanted = now + (self.reference.tail - now) * share
        return max(now, *(position for position in self.records if position <= wanted))

    def capacity(self, user: int, system: int) -> None:
        tail = self.reference.tail
        self.native.user_capacity = self.reference.user_capacity = tail + user
        self.native.system_capacity = self.reference.system_capacity = tail + user + system

    def read(self, share: float) -> None:
        position = self.records[int(share * (len(self.records) - 1))]
        assert self.native.read(position) == self.reference.read(position)

    def compare(self) -> None:
        native, reference = self.native, self.reference
        assert (native.tail, native.write_limit) == (reference.tail, reference.write_limit)
        for mine, other in zip(native.queues, reference.queues, strict=True):
            assert (mine.next_offset, mine.bytes, mine.index_first) == (
                other.next_offset,
                other.bytes,
                other.index_first,
            )
        assert native.window() == reference.window()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(operations, max_size=60))
def test_any_sequence_of_operations_gives_the_same_bytes_and_answers(steps: list[tuple[Any, ...]]) -> None:
    with native_ring(SHAPE) as native:
        both = Both(native, ReferenceRing(SHAPE))
        for step in steps:
            both.step(step)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 180), st.floats(0, 1)), min_size=20, max_size=60))
def test_an_index_of_few_blocks_gives_the_same_answers(steps: list[tuple[int, int, float]]) -> None:
    shape = replace(SHAPE, blocks=4)
    with native_ring(shape) as native:
        both = Both(native, ReferenceRing(shape))
        for queue, count, share in steps:
            both.step(("group", queue, [1] * count))
            both.step(("flush", 1.0))
            both.step(("dispatch", share))
