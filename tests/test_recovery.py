"""Recovery: groups, epochs, segments, what is read back, and kills inside it.

In the drawings ``|`` stands between records, ``E`` is an EPOCH record, ``B`` and ``Z`` begin and end a snapshot, ``.``
is zeros, ``x`` is damage, ``(`` and ``)`` enclose an atomic group, ``F`` marks what was known to be on the disk when
the records behind it were appended, and ``//`` is the end of a segment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.store_builder import SEGMENT, StoreBuilder, check_sound, standard

from shmbroker._native._core import decode_record
from shmbroker.errors import CorruptLog
from shmbroker.record import RecordKind, SnapshotBody, encode_record
from shmbroker.store.checkpoint import Checkpoint, CheckpointFile, Epoch
from shmbroker.store.recovery import repair
from shmbroker.store.segment import SegmentChecksum, SegmentError, list_segments

TESTS = Path(__file__).parent


@pytest.fixture
def log(tmp_path: Path) -> StoreBuilder:
    return standard(tmp_path)


# ---- groups


def test_a_group_that_lost_a_part_is_cut_as_a_whole(log: StoreBuilder) -> None:
    """E|30|(g|g|g|x|g)|m"""
    group = log.group(5)
    log.message()
    log.flip(group[3] + 85)
    result, seen = log.recover()
    assert (result.end, result.reason) == (group[0], "incomplete group")
    assert result.cut_bytes == log.position - group[0]
    assert seen.positions[-1] < group[0]
    check_sound(log, result)
    assert log.recover()[0].reason == "whole"


def test_a_whole_group_at_the_end_stays(log: StoreBuilder) -> None:
    """E|30|(g|g|g)......"""
    log.group(3)
    result, _ = log.recover()
    assert (result.end, result.reason) == (log.position, "whole")


def test_a_group_synced_in_part_is_cut_and_the_checkpoint_no_longer_claims_it(log: StoreBuilder) -> None:
    """E|30|(g|g F|x|g): the flusher stopped inside the group, and nobody was told of its first half."""
    group = log.group(4)
    log.checkpoint(flushed=group[2], clean=True)
    log.flip(group[2] + 3)
    result, _ = log.recover()
    assert (result.end, result.reason) == (group[0], "incomplete group")
    checkpoint = CheckpointFile(log.checkpoint_path).read()
    assert checkpoint is not None
    assert (checkpoint.flushed, checkpoint.clean) == (group[0], False)


@pytest.mark.parametrize("mask", range(16))
def test_a_power_cut_while_a_group_is_cut_leaves_it_to_be_cut_again(log: StoreBuilder, mask: int) -> None:
    """E|30|(g|g|g|g|x): any of its records may be zeros already when recovery is interrupted."""
    group = log.group(5)
    log.zero(group[4], 120)
    log.checkpoint(flushed=group[0])
    for index in range(4):
        if mask >> index & 1:
            log.zero(group[index], 120)
    result, _ = log.recover()
    assert result.end == group[0]
    check_sound(log, result)


# ---- epochs


def test_records_of_a_cut_epoch_do_not_come_back(log: StoreBuilder) -> None:
    """E1|20 F|x|1..9  then, cut:  E1|20|E2|a......  with the old 1..9 still on the disk where they were."""
    old = dict(zip(log.places[22:], log.records[22:], strict=True))
    log.zero(log.places[21], 180)
    result, _ = log.recover()
    log.position, log.flushed = result.end, result.end
    log.begin_epoch()
    log.message(bytes(56))
    end = log.position
    for place, raw in old.items():
        if place >= end:
            log.write_bytes(place, raw)
    result, seen = log.recover()
    assert (result.end, result.epoch) == (end, 2)
    assert seen.positions[-1] < end
    assert result.epochs == (Epoch(1, 0, 0), Epoch(2, log.places[-2], 1))


def test_a_record_of_an_epoch_that_nobody_introduced_is_cut(log: StoreBuilder) -> None:
    """E1|30|m3"""
    end = log.position
    log.epoch = 3
    log.message()
    assert log.recover()[0].end == end


def test_epochs_whose_records_are_gone_come_from_the_snapshot(log: StoreBuilder) -> None:
    body = SnapshotBody(1, 1, epochs=((1, 0, 0), (2, 60, 1), (3, 99_999, 2))).encode()
    log.append(RecordKind.SNAPSHOT_BEGIN, body)
    log.append(RecordKind.SNAPSHOT_END, body)
    assert log.recover()[0].epochs == (Epoch(1, 0, 0), Epoch(2, 60, 1)), "none that begins behind the end"


def test_epochs_come_from_the_checkpoint_and_from_the_log(log: StoreBuilder) -> None:
    log.begin_epoch()
    log.checkpoint(epochs=(Epoch(1, 0, 0),), flushed=0, dispatched=0)
    result, _ = log.recover()
    assert [epoch.epoch for epoch in result.epochs] == [1, 2]
    assert result.epochs[1].start == log.places[-1]


# ---- segments


def test_an_empty_directory_is_an_empty_log(tmp_path: Path) -> None:
    result, seen = StoreBuilder(tmp_path).recover()
    assert (result.end, result.epoch, result.reason, seen.replayed) == (0, 0, "empty", [])


def test_ready_segments_without_records_are_an_empty_log(tmp_path: Path) -> None:
    log = StoreBuilder(tmp_path)
    log.make_segment(0)
    log.make_segment(SEGMENT)
    result, _ = log.recover()
    assert (result.end, result.reason, list_segments(log.log)) == (0, "empty", [])


def test_a_log_that_the_checkpoint_knows_and_that_is_not_there_is_corruption(log: StoreBuilder) -> None:
    log.checkpoint()
    shutil.rmtree(log.log)
    log.log.mkdir()
    with pytest.raises(CorruptLog):
        log.recover()


def test_segments_behind_the_cut_are_removed(log: StoreBuilder) -> None:
    """E|20 F|x .. // unsynced records // ready"""
    hole = log.places[21]
    while log.position < SEGMENT + 500:
        log.message(bytes(200))
    log.make_segment(2 * SEGMENT)
    log.zero(hole, 100)
    result, _ = log.recover()
    assert result.end == hole
    assert list_segments(log.log) == [0]
    check_sound(log, result)


def test_a_missing_segment_in_the_middle_is_corruption(log: StoreBuilder) -> None:
    """E|20 F|... // missing // records that know more // ..."""
    while log.position < 4 * SEGMENT:
        log.message(bytes(300))
        log.sync()
    log.place.path(2 * SEGMENT).unlink()
    with pytest.raises(CorruptLog) as caught:
        log.recover()
    assert caught.value.position == 2 * SEGMENT


def test_damage_larger_than_the_ring_is_seen_by_the_segments_behind_it(log: StoreBuilder) -> None:
    """E|20 F|xxxxxxxx // xxxxxxxx // records that know more"""
    while log.position < 3 * SEGMENT:
        log.message(bytes(300))
        log.sync()
    log.write_bytes(log.places[25], b"\xee" * (2 * SEGMENT - log.places[25]))
    with pytest.raises(CorruptLog) as caught:
        log.recover()
    assert caught.value.position == log.places[25]


def test_a_damaged_header_is_never_taken_for_a_torn_tail(log: StoreBuilder) -> None:
    log.make_segment(SEGMENT)
    path = log.place.path(SEGMENT)
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(SegmentError):
        log.recover()
    assert path.exists()


def test_a_segment_full_to_its_end_is_not_touched(tmp_path: Path) -> None:
    """E|m|m|.... filler // .....   the log ends exactly where a segment does"""
    log = StoreBuilder(tmp_path)
    log.begin_epoch()
    while SEGMENT - log.position >= 4000:
        log.message(bytes(1000))
    log.message(bytes(SEGMENT - log.position - 80))
    assert log.position == SEGMENT
    log.make_segment(SEGMENT)
    result, _ = log.recover()
    assert (result.end, list_segments(log.log)) == (SEGMENT, [0])


def test_a_recycled_segments_old_records_are_no_records(log: StoreBuilder) -> None:
    """// E|20|10|old records of another position //"""
    junk = b"".join(
        encode_record(position=50 * SEGMENT + at, epoch=1, flushed=0, kind=1, body=bytes(40))
        for at in range(0, 1200, 120)
    )
    log.write_bytes(log.position, junk)
    result, _ = log.recover()
    assert (result.end, result.reason, result.cut_bytes) == (log.position, "whole", 0)
    check_sound(log, result)


def test_leftovers_of_segments_in_the_making_are_removed(log: StoreBuilder) -> None:
    leftover = log.log / ("0" * 19 + "9.tmp")
    leftover.touch()
    log.recover()
    assert not leftover.exists()


# ---- what is read back


def long_log(directory: Path) -> tuple[StoreBuilder, int, int]:
    """E|300|B Z|300|B Z|100 (checkpoint: second snapshot)|50"""
    log = StoreBuilder(directory)
    log.begin_epoch()
    log.messages(300)
    first = log.snapshot()
    log.messages(300)
    second = log.snapshot()
    log.messages(100)
    log.sync()
    return log, first, second


def test_reading_begins_at_the_checkpoints_snapshot(tmp_path: Path) -> None:
    log, _, second = long_log(tmp_path)
    log.checkpoint(snapshot=second, epochs=(Epoch(1, 0, 0),))
    log.messages(50)
    result, seen = log.recover()
    assert (result.replayed_from, result.snapshot, result.end) == (second, second, log.position)
    assert seen.kinds == [RecordKind.SNAPSHOT_BEGIN, RecordKind.SNAPSHOT_END]
    assert len(seen.positions) == 150
    assert result.epochs == (Epoch(1, 0, 0),)


def test_reading_begins_where_the_consume_queues_end_if_that_is_older(tmp_path: Path) -> None:
    log, _, second = long_log(tmp_path)
    dispatched = log.places[log.places.index(second) - 10]
    log.checkpoint(snapshot=second, dispatched=dispatched)
    result, seen = log.recover()
    assert (result.replayed_from, result.dispatched) == (dispatched, dispatched)
    assert seen.positions == [place for place in log.places if place >= dispatched and is_message(log, place)]
    assert seen.replayed[0].position == second, "definitions from the snapshot on"


@pytest.mark.parametrize("damage", ["missing", "both copies", "another store", "no snapshot there"])
def test_without_a_usable_checkpoint_all_is_read_and_the_newest_whole_snapshot_counts(
    tmp_path: Path, damage: str
) -> None:
    log, _, second = long_log(tmp_path)
    log.snapshot(complete=False)
    log.checkpoint(snapshot=second if damage != "no snapshot there" else log.places[200])
    if damage == "missing":
        log.checkpoint_path.unlink()
    elif damage == "both copies":
        log.checkpoint_path.write_bytes(b"\xee" * 8192)
    elif damage == "another store":
        log.checkpoint_path.write_bytes(Checkpoint(b"x" * 16, flushed=2**40).encode() * 2)
    result, seen = log.recover()
    assert (result.replayed_from, result.snapshot) == (0, second)
    assert len(seen.positions) == 700
    assert seen.replayed[0].position == second


def test_a_log_whose_first_segments_are_gone_is_read_from_what_it_has(tmp_path: Path) -> None:
    log, _, second = long_log(tmp_path)
    for base in range(0, second - SEGMENT, SEGMENT):
        log.place.path(base).unlink()
    first = list_segments(log.log)[0]
    assert first > 0
    result, seen = log.recover()
    assert (result.first, result.replayed_from, result.snapshot, result.end) == (first, first, second, log.position)
    assert seen.positions == [place for place in log.places if place >= first and is_message(log, place)]


def is_message(log: StoreBuilder, place: int) -> bool:
    return decode_record(log.records[log.places.index(place)], place).kind == RecordKind.MESSAGE


def test_after_a_clean_stop_nothing_is_written(log: StoreBuilder) -> None:
    log.make_segment(SEGMENT)
    log.sync()
    log.checkpoint(clean=True)
    before = {path: path.stat().st_mtime_ns for path in log.log.iterdir()}
    result, _ = log.recover()
    assert (result.reason, result.end) == ("clean", log.position)
    assert {path: path.stat().st_mtime_ns for path in log.log.iterdir()} == before


def test_a_sound_record_with_a_senseless_body_is_refused(log: StoreBuilder) -> None:
    log.append(RecordKind.EPOCH, b"[]")
    with pytest.raises(CorruptLog, match="senseless"):
        log.recover()


def test_repair_cuts_at_the_hole_and_keeps_what_it_cut(log: StoreBuilder) -> None:
    """E|0..8|x|10..19 F|10 // later"""
    while log.position < SEGMENT + 200:
        log.message(bytes(300))
    log.sync()
    log.checkpoint()
    log.flip(log.places[10] + 99)
    damaged = {path.name: path.read_bytes() for path in log.log.iterdir()}
    with pytest.raises(CorruptLog):
        log.recover()
    checkpoints = CheckpointFile(log.checkpoint_path)
    assert repair(log.place, checkpoints).end == log.places[10]
    checkpoints.close()
    assert {path.stem: path.read_bytes() for path in log.log.glob("*.broken")} == damaged
    result, _ = log.recover()
    assert (result.end, result.reason) == (log.places[10], "whole")
    check_sound(log, result)


def test_a_log_without_its_oldest_segments_is_refused_until_the_loss_is_accepted(log: StoreBuilder) -> None:
    """E|20 F|10 // later // later, kept from position 0 on: what was in the first segment may not be consumed yet."""
    while log.position < 2 * SEGMENT + 200:
        log.message(bytes(300))
    log.sync()
    log.checkpoint()
    log.place.path(0).unlink()
    for _ in range(2):
        with pytest.raises(CorruptLog, match=r"begins at position .* oldest segments.* log repair") as caught:
            log.recover()
        assert (caught.value.position, caught.value.path) == (0, str(log.place.path(0)))
    checkpoints = CheckpointFile(log.checkpoint_path)
    assert repair(log.place, checkpoints).end == log.position
    accepted = checkpoints.read()
    checkpoints.close()
    assert accepted is not None
    assert (accepted.kept, accepted.flushed) == (SEGMENT, log.flushed)
    result, _ = log.recover()
    assert (result.first, result.end) == (SEGMENT, log.position)


def test_segments_that_were_given_up_may_be_gone_or_not(log: StoreBuilder) -> None:
    while log.position < 2 * SEGMENT + 200:
        log.message(bytes(300))
    log.sync()
    log.checkpoint(kept=SEGMENT)
    assert log.recover()[0].first == 0, "the flusher had not retired it yet"
    log.place.path(0).unlink()
    assert log.recover()[0].first == SEGMENT


def test_a_segment_with_a_damaged_header_is_cut_off_with_all_behind_it(log: StoreBuilder) -> None:
    """E|20 F|10 // x // later"""
    while log.position < 3 * SEGMENT + 200:
        log.message(bytes(300))
    log.sync()
    log.checkpoint()
    with log.place.path(SEGMENT).open("r+b") as damaged:
        damaged.seek(20)
        damaged.write(b"\xff")
    cut_off = {name: (log.log / name).read_bytes() for name in sorted(path.name for path in log.log.iterdir())[1:]}
    with pytest.raises(SegmentChecksum):
        log.recover()
    checkpoints = CheckpointFile(log.checkpoint_path)
    assert repair(log.place, checkpoints).end == SEGMENT
    checkpoints.close()
    assert {path.stem: path.read_bytes() for path in log.log.glob("*.broken")} == cut_off
    result, seen = log.recover()
    assert (result.end, result.reason) == (SEGMENT, "whole")
    assert [path.name for path in log.log.iterdir() if not path.suffix] == [log.place.path(0).name]
    assert len(seen.positions) > 20


@pytest.mark.parametrize("first", [0, SEGMENT])
def test_a_log_of_which_no_header_holds_begins_anew(tmp_path: Path, first: int) -> None:
    log = standard(tmp_path)
    while log.position < 2 * SEGMENT - 500:
        log.message(bytes(300))
    log.sync()
    log.checkpoint()
    if first:
        log.place.path(0).unlink()  # retention has taken it
    with log.place.path(first).open("r+b") as damaged:
        damaged.write(bytes(60))
    checkpoints = CheckpointFile(log.checkpoint_path)
    repair(log.place, checkpoints)
    checkpoints.close()
    result, _ = log.recover()
    assert (result.end, result.reason) == (0, "empty")


def test_a_second_repair_keeps_what_the_first_one_kept(log: StoreBuilder) -> None:
    checkpoints = CheckpointFile(log.checkpoint_path)
    kept = []
    for number in (20, 10):
        log.flip(log.places[number] + 99)
        kept.append(log.place.path(0).read_bytes())
        assert repair(log.place, checkpoints).end == log.places[number]
    checkpoints.close()
    assert [path.read_bytes() for path in sorted(log.log.glob("*.broken"), reverse=True)] == kept


# ---- kills


POINTS = [
    "recovery.scanned",
    "recovery.removed",
    "recovery.tail_zeroed",
    "recovery.checkpoint_lowered",
    "recovery.cut",
    "recovery.done",
]


@pytest.mark.crash
@pytest.mark.parametrize("first", POINTS)
@pytest.mark.parametrize("second", [None, "recovery.removed", "recovery.cut"])
def test_a_kill_inside_recovery_changes_nothing_about_where_the_log_ends(
    tmp_path: Path, first: str, second: str | None
) -> None:
    """E|20 F|10|(g|g F'|x|g)|m // m: every step has something to do."""
    log = standard(tmp_path)
    group = log.group(4)
    while log.position < SEGMENT + 200:
        log.message(bytes(300))
    log.checkpoint(flushed=group[2])
    log.flip(group[2] + 3)
    code = (
        "import sys; from pathlib import Path; from support.store_builder import StoreBuilder\n"
        "from shmbroker import failpoint; failpoint.arm(sys.argv[2] + '=kill', 'test')\n"
        "StoreBuilder(Path(sys.argv[1])).recover()"
    )
    for point in filter(None, (first, second)):
        command = [sys.executable, "-c", code, str(tmp_path), point]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(TESTS)}, timeout=30)
        assert done.returncode == -9 or (point == second and done.returncode == 0), "nothing left to do the second time"
    result, seen = log.recover()
    assert (result.end, result.epoch) == (group[0], 1)
    assert seen.positions == log.places[1:31]
    check_sound(log, result)
