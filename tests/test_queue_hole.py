"""What the log says of offsets without an entry: never given, lost by the file of the queue, or nobody knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from support.store_builder import SEGMENT, STORE, StoreBuilder

from shmbroker._native._core import dispatch_scan
from shmbroker.errors import CorruptLog
from shmbroker.store import queue_hole
from shmbroker.store.commit_log import LogReader
from shmbroker.store.consume_queue import ENTRY_BYTES, ConsumeQueues

HOLE: Final = range(40, 60)  # between 40 messages and 40
END: Final = 100


@pytest.fixture
def log(tmp_path: Path) -> StoreBuilder:
    """Two queues, message by message; queue 0 of topic 1 has a hole. Several segments."""
    log = StoreBuilder(tmp_path)
    log.begin_epoch()
    for number in range(80):
        if number == HOLE.start:
            log.message(b"the other's" * 20, queue_id=1)
            log.offsets[0] = HOLE.stop
        log.message(bytes(number), queue_id=0)
        log.message(bytes(number), queue_id=1)
    return log


@pytest.fixture
def queues(log: StoreBuilder) -> Iterator[ConsumeQueues]:
    queues = ConsumeQueues(log.directory / "queues", STORE, writable=True, entries_per_file=16)
    for run in dispatch_scan(log.log_bytes(), 0, 1, SEGMENT)[0]:
        queues.write(*run)
    yield queues
    queues.close()


def judge(
    log: StoreBuilder, queues: ConsumeQueues, offset: int, start: int = 0, end: int = 1 << 60
) -> tuple[int, bool] | None:
    reader = LogReader(log.log, SEGMENT, STORE, window_bytes=1024)
    try:
        hole = queue_hole.examine(reader, SEGMENT, queues, (1, 0), offset, start, min(end, log.position))
        return (hole.end, hole.sound) if hole.end is not None else None
    finally:
        reader.close()


def place_of(log: StoreBuilder, queues: ConsumeQueues, offset: int) -> int:
    (entry,) = queues.read(1, 0, offset, 1, log.position)
    return entry.position


@pytest.mark.parametrize("offset", [HOLE.start, 50, HOLE.stop - 1])
def test_offsets_that_no_message_was_given_are_a_hole_up_to_the_next_one(
    log: StoreBuilder, queues: ConsumeQueues, offset: int
) -> None:
    assert judge(log, queues, offset) == (HOLE.stop, True)


def test_nothing_is_known_of_a_hole_before_the_message_behind_it_can_be_had(
    log: StoreBuilder, queues: ConsumeQueues
) -> None:
    behind = place_of(log, queues, HOLE.stop)
    assert judge(log, queues, HOLE.start, end=behind) is None
    assert judge(log, queues, HOLE.start, end=behind + 8) == (HOLE.stop, True)
    assert judge(log, queues, END) is None


def test_an_offset_that_has_got_its_entry_is_no_hole(log: StoreBuilder, queues: ConsumeQueues) -> None:
    assert judge(log, queues, 7) == (7, True)


@pytest.mark.parametrize(
    ("zeroed", "asked", "named"),
    [
        pytest.param(range(5, 15), 5, 5, id="| 0..4 | zeros | 15.. |"),
        pytest.param(range(5, 40), 5, 5, id="| 0..4 | zeros: two files and a part | hole | 60.. |"),
        pytest.param(range(38, 40), 40, None, id="| 0..37 | zeros, acknowledged long ago | hole | 60.. |"),
        pytest.param(range(60, 65), 40, 60, id="| 0..39 | hole | zeros | 65.. |"),
        pytest.param(range(3), 0, 0, id="| zeros | 3.. |"),
        pytest.param(range(95, 100), 95, 95, id="| ..94 | zeros |"),
        pytest.param(range(60, 100), 45, 60, id="| ..39 | hole | zeros |"),
    ],
)
def test_zeros_where_the_log_has_a_message_are_damage_of_the_file_and_no_hole(
    log: StoreBuilder, queues: ConsumeQueues, zeroed: range, asked: int, named: int | None
) -> None:
    queues.write(1, 0, zeroed.start, bytes(len(zeroed) * ENTRY_BYTES))
    if named is None:
        assert judge(log, queues, asked) == (HOLE.stop, True)
        return
    with pytest.raises(
        CorruptLog, match=f"queues/1/0/{named // 16 * 16:020d}: offset {named}: .*log rebuild --replace"
    ):
        judge(log, queues, asked)


def test_a_neighbour_that_leads_back_in_the_log_is_damage(log: StoreBuilder, queues: ConsumeQueues) -> None:
    first = queues.packed(1, 0, 0, 1)
    queues.write(1, 0, HOLE.stop, first)
    with pytest.raises(CorruptLog, match=f"offset {HOLE.stop}|offset {HOLE.start - 1}"):
        judge(log, queues, HOLE.start)


def test_what_a_damaged_log_cannot_tell_is_not_called_sound(log: StoreBuilder, queues: ConsumeQueues) -> None:
    other = next(log.places[at] for at, raw in enumerate(log.records) if b"the other's" in raw)
    log.zero(other, 80)
    assert judge(log, queues, HOLE.start) == (HOLE.stop, False)
    queues.write(1, 0, HOLE.stop, bytes(ENTRY_BYTES))
    with pytest.raises(CorruptLog, match=f"offset {HOLE.stop}: no entry"):  # found behind the damage
        judge(log, queues, HOLE.start)


def test_a_long_log_is_looked_through_in_several_calls(
    log: StoreBuilder, queues: ConsumeQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a message at the end of the queue that its file has lost, behind much of another queue."""
    monkeypatch.setattr(queue_hole, "LOOK_BYTES", 2000)
    for number in range(200):
        log.message(bytes(number), queue_id=1)
    log.message(b"lost", queue_id=0)
    reader = LogReader(log.log, SEGMENT, STORE, window_bytes=1024)
    lost, seen = log.places[-1], [0]

    def look() -> None:
        seen.append(queue_hole.examine(reader, SEGMENT, queues, (1, 0), END, seen[-1], log.position).seen)

    try:
        while seen[-1] < lost - 3000:
            look()
            assert seen[-1] > seen[-2]
        assert len(seen) > 5
        with pytest.raises(CorruptLog, match=f"offset {END}: no entry"):
            look()
    finally:
        reader.close()


def test_only_what_retention_has_left_of_the_log_is_asked(log: StoreBuilder, queues: ConsumeQueues) -> None:
    kept = SEGMENT
    log.place.path(0).unlink()
    first = next(entry.offset for entry in queues.read(1, 0, 0, 80, log.position) if entry.position >= kept)
    assert HOLE.start > first > 0
    queues.write(1, 0, 0, bytes(first * ENTRY_BYTES))
    assert judge(log, queues, 0, start=0) == (first, False)
    assert judge(log, queues, 0, start=kept) == (first, True)
