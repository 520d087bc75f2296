"""Group progress as records: what they say, that they are checked, and that merging them is order-free (R14)."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.progress import Progress, Run, RunKind, decode_progress
from support.regions import LIMITS, memory

from shmbroker._native._core import Region
from shmbroker.errors import GroupNotExist, LimitReached, QueueNotExist, TopicNotExist

WINDOW = LIMITS["claim_window"]
OFFSETS = 120  # more than a window


def define(region: Region) -> tuple[int, int]:
    return region.define_group("audit", record=False), region.define_topic("orders", 2, 6, record=False)


def restored(bodies: Iterable[bytes], **limits: int) -> Progress:
    """What a broker's memory says after these records were replayed into it."""
    with memory(**limits) as region:
        define(region)
        for body in bodies:
            region.restore_progress(body)
        (record,) = region.progress_records(only_changed=False)
        return decode_progress(record)


def example(base: int, *runs: Run, reset: int = 0) -> Progress:
    return Progress(group_id=1, topic_id=1, queue_id=1, reset_generation=reset, base=base, runs=runs)


@st.composite
def progresses(draw: st.DrawFn) -> Progress:
    """Any state that a group can be in: each offset acked, or delivered so often, or untouched."""
    base = draw(st.integers(0, OFFSETS - WINDOW))
    runs: list[Run] = []
    offset = draw(st.integers(0, OFFSETS))
    while offset < min(base + WINDOW, OFFSETS):
        count = min(draw(st.integers(1, 9)), base + WINDOW - offset)
        if offset < base:
            count = min(count, base - offset)
            runs.append(Run(offset, count, draw(st.integers(1, 9)), RunKind.UNACKED))
        elif draw(st.booleans()):
            runs.append(Run(offset, count, 0, RunKind.ACKED))
        else:
            runs.append(Run(offset, count, draw(st.integers(1, 9)), RunKind.UNACKED))
        offset += count + draw(st.integers(0, 20))
    return example(base, *runs)


@given(progresses())
def test_a_body_is_read_as_it_was_written(progress: Progress) -> None:
    assert decode_progress(progress.encode()) == progress


def test_the_drawing_holds() -> None:
    body = Progress(0x01020304, 0x05060708, 0x090A, 0x0B0C0D0E, 0x1112131415161718, ()).encode()
    assert body.hex() == "04030201080706050a0901000e0d0c0b18171615141312110000000000000000"
    run = example(0, Run(0x0102030405060708, 0x090A0B0C, 0x0D0E, RunKind.UNACKED)).encode()[32:]
    assert run.hex() == "08070605040302010c0b0a090e0d0200"


@pytest.mark.parametrize(
    ("runs", "complaint"),
    [
        ((Run(5, 0, 1, RunKind.UNACKED),), "empty"),
        ((Run(5, 2, 1, RunKind.UNACKED), Run(6, 1, 1, RunKind.UNACKED)), "overlaps"),
        ((Run(9, 1, 1, RunKind.UNACKED), Run(5, 1, 1, RunKind.UNACKED)), "out of order"),
        ((Run(5, 1, 0, RunKind.ACKED),), "from the base 10 on"),
        ((Run(1 << 64, 1, 1, RunKind.UNACKED),), "does not fit"),
    ],
)
def test_runs_that_contradict_each_other_are_refused(runs: tuple[Run, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        example(10, *runs).encode()


def test_damaged_bodies_are_refused() -> None:
    body = example(3, Run(4, 1, 0, RunKind.ACKED)).encode()
    for damaged, complaint in (
        (body[:31], "header alone"),
        (body[:-1], "runs need"),
        (body + b"\0", "runs need"),
        (body[:10] + struct.pack("<H", 2) + body[12:], "version 2"),
        (body[:-2] + struct.pack("<H", 7), "7 is not a valid RunKind"),
    ):
        with pytest.raises(ValueError, match=complaint):
            decode_progress(damaged)
    with memory() as region:
        define(region)
        for damaged in (body[:31], body[:-1], body[:-2] + struct.pack("<H", 7)):
            with pytest.raises(ValueError, match="progress record"):
                region.restore_progress(damaged)


@given(st.lists(progresses(), min_size=1, max_size=3), st.randoms())
@settings(max_examples=150, deadline=None)
def test_records_merge_to_the_same_state_in_any_order_and_any_number(progress: list[Progress], random: object) -> None:
    bodies = [one.encode() for one in progress]
    shuffled = bodies + bodies
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for merged in (restored(bodies), restored(shuffled)):
        assert merged.base >= max(one.base for one in progress)
        for offset in range(OFFSETS):
            acked = any(one.is_acked(offset) for one in progress)
            assert merged.is_acked(offset) == acked, offset
            if not acked:
                assert merged.attempts(offset) == max(one.attempts(offset) for one in progress), offset


def test_a_reset_replaces_what_was_before_and_is_not_undone_by_it() -> None:
    before = example(50, Run(20, 2, 3, RunKind.UNACKED), Run(60, 5, 0, RunKind.ACKED))
    reset = example(10, Run(12, 1, 0, RunKind.ACKED), reset=1)
    for order in ((before, reset), (reset, before)):
        merged = restored(one.encode() for one in order)
        assert (merged.base, merged.reset_generation) == (10, 1)
        assert merged.runs == (Run(12, 1, 0, RunKind.ACKED),)


def test_progress_names_what_is_unacked() -> None:
    with memory() as region:
        group_id, topic_id = define(region)
        region.restore_progress(example(50, Run(20, 2, 3, RunKind.UNACKED), Run(55, 2, 0, RunKind.ACKED)).encode())
        (table,) = region.progress()
        assert (table["group"], table["group_id"]) == ("audit", group_id)
        assert (table["topic"], table["topic_id"], table["queue_id"]) == ("orders", topic_id, 1)
        assert (table["base"], table["acked"], table["overflow"]) == (50, [(55, 2)], [20, 21])
        assert table["attempts"] == {20: 3, 21: 3}
        assert (table["held"], table["oldest_holder"]) == (0, None)


def test_only_what_changed_is_recorded_again() -> None:
    with memory() as region:
        define(region)
        region.restore_progress(example(5).encode())
        bodies = region.progress_records(only_changed=True)
        assert [decode_progress(body).base for body in bodies] == [5]
        assert region.progress_records(only_changed=True) == bodies  # not noted: the append may have failed
        region.progress_recorded(bodies)
        assert region.progress_records(only_changed=True) == []
        region.restore_progress(example(6).encode())
        assert [decode_progress(body).base for body in region.progress_records(only_changed=True)] == [6]


def test_what_is_not_there_or_does_not_fit_is_said() -> None:
    with memory(overflow_claims=4, claim_tables=1) as region:
        with pytest.raises(GroupNotExist):
            region.restore_progress(example(0).encode())
        region.define_group("audit", record=False)
        with pytest.raises(TopicNotExist):
            region.restore_progress(example(0).encode())
        region.define_topic("orders", 1, 6, record=False)
        with pytest.raises(QueueNotExist):
            region.restore_progress(example(0).encode())
        region.define_topic("orders", 2, 6, record=False)
        with pytest.raises(LimitReached, match="overflow_claims = 4"):
            region.restore_progress(example(9, Run(1, 5, 1, RunKind.UNACKED)).encode())
        with pytest.raises(LimitReached, match="claim_tables = 1"):
            region.restore_progress(Progress(1, 1, 0, 0, 0).encode())
