"""Which damages recovery cuts and which it refuses: a drawn table, and any damage against the rule (R1).

In the drawings ``|`` stands between records, ``E`` is an EPOCH record, ``B`` and ``Z`` begin and end a snapshot, ``.``
is zeros, ``x`` is damage, ``(`` and ``)`` enclose an atomic group, ``F`` marks what was known to be on the disk when
the records behind it were appended, and ``//`` is the end of a segment.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.store_builder import SEGMENT, StoreBuilder, check_sound, standard

from shmbroker._native._core import decode_record
from shmbroker.errors import CorruptLog


@pytest.fixture
def log(tmp_path: Path) -> StoreBuilder:
    return standard(tmp_path)


# ---- the table of damages


Damage = Callable[[StoreBuilder], object]
TORN: list[tuple[str, Damage, int]] = [
    # E|20 messages F|0|1|...|9|          records that remain
    ("E|20 F|0|1|2|3|4|5|6|7|8|9|......   nothing is damaged", lambda _log: None, 31),
    (
        "E|20 F|0|1|2|3|4|5|6|7|8|xx......   the last record is half there",
        lambda log: log.zero(log.places[30] + 90, 90),
        30,
    ),
    ("E|20 F|0|1|2|3|4|5|6|7|8|..9......  its header is missing", lambda log: log.zero(log.places[30], 80), 30),
    ("E|20 F|0|1|2|x|4|5|6|7|8|9|......   one bit, unsynced", lambda log: log.flip(log.places[24] + 100), 24),
    ("E|20 F|0|.........|6|7|8|9|......   a hole before valid records", lambda log: log.zero(log.places[22], 700), 22),
    ("E|20 F|x|1|2|3|4|5|6|7|8|9|......   the first unsynced one", lambda log: log.flip(log.places[21]), 21),
    ("E|20 F|.............................nothing unsynced survived", lambda log: log.zero(log.places[21], 1900), 21),
]


@pytest.mark.parametrize(("damage", "remain"), [case[1:] for case in TORN], ids=[case[0] for case in TORN])
def test_a_torn_tail_is_cut_at_the_last_record_before_it(log: StoreBuilder, damage: Damage, remain: int) -> None:
    log.checkpoint()
    damage(log)
    result, seen = log.recover()
    end = log.places[remain] if remain < len(log.places) else log.position
    assert (result.end, result.epoch) == (end, 1)
    assert result.reason == ("whole" if remain == 31 else "torn tail" if result.cut_bytes else "whole")
    assert seen.positions == log.places[1:remain]
    check_sound(log, result)
    again, seen_again = log.recover()
    assert (again.end, again.reason, again.cut_bytes) == (end, "whole", 0)
    assert seen_again == seen


CORRUPT: list[tuple[str, Damage, int]] = [
    ("x|20 F|10                the first record", lambda log: log.flip(log.places[0] + 20), 0),
    ("E|0..8|x|10..19 F|10     one bit among the synced", lambda log: log.flip(log.places[10] + 99, 7), 10),
    ("E|.........|19 F|10      zeros among the synced", lambda log: log.zero(log.places[1], 2000), 1),
    ("E|0..18|x F|10           the last synced record", lambda log: log.flip(log.places[20] + 8), 20),
]


@pytest.mark.parametrize("witness", ["checkpoint", "record", "both"])
@pytest.mark.parametrize(("damage", "hole"), [case[1:] for case in CORRUPT], ids=[case[0] for case in CORRUPT])
def test_damage_below_what_was_known_to_be_on_the_disk_is_refused_and_nothing_is_changed(
    log: StoreBuilder, damage: Damage, hole: int, witness: str
) -> None:
    if witness != "record":
        log.checkpoint()
    if witness == "checkpoint":
        log.zero(log.places[21], log.position - log.places[21])
    damage(log)
    before = {path.name: path.read_bytes() for path in log.log.iterdir()}
    for _ in range(2):
        with pytest.raises(CorruptLog, match="shmbroker log repair") as caught:
            log.recover()
        assert caught.value.position == log.places[hole]
        assert caught.value.path == str(log.place.path(log.places[hole]))
    assert {path.name: path.read_bytes() for path in log.log.iterdir()} == before


def test_a_slaves_directory_is_judged_by_its_own_checkpoint_alone(log: StoreBuilder) -> None:
    """E|0..8|x|10..19 F|10: what the records know is true of the master's disk only."""
    log.flip(log.places[10] + 99)
    with pytest.raises(CorruptLog):
        log.recover()
    result, _ = log.recover(trust_flushed=False)
    assert (result.end, result.reason) == (log.places[10], "torn tail")
    check_sound(log, result)


# ---- anything


damages = st.one_of(
    st.tuples(st.just("zero"), st.integers(0, 6000), st.integers(1, 900)),
    st.tuples(st.just("flip"), st.integers(0, 6000), st.integers(0, 7)),
    st.tuples(st.just("garbage"), st.integers(0, 6000), st.integers(1, 300)),
    st.tuples(st.just("duplicate"), st.integers(0, 11), st.integers(0, 11)),  # 512-byte blocks
    st.tuples(st.just("truncate"), st.integers(0, 6000), st.just(0)),
)


def apply(log: StoreBuilder, damage: tuple[str, int, int]) -> None:
    kind, place, size = damage
    if kind == "zero":
        log.zero(place, size)
    elif kind == "flip":
        log.flip(place, size)
    elif kind == "garbage":
        log.write_bytes(place, b"\xa5" * size)
    elif kind == "duplicate":
        log.write_bytes(size * 512, log.read_bytes(place * 512, 512))
    else:  # what was never written reads as zeros
        log.zero(place, SEGMENT - place)


def first_damaged(log: StoreBuilder) -> int | None:
    for place, raw in zip(log.places, log.records, strict=True):
        if log.read_bytes(place, len(raw)) != raw:
            return place
    return None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(damages, min_size=1, max_size=3), st.booleans(), st.booleans())
@example([("zero", 0, 1), ("zero", 2933, 900)], False, False)  # the only witness lies across the ring's reach
def test_any_damage_is_cut_or_refused_by_the_rule_and_never_anything_else(
    tmp_path: Path, applied: list[tuple[str, int, int]], with_checkpoint: bool, with_group: bool
) -> None:
    shutil.rmtree(tmp_path)
    log = standard(tmp_path)  # about 5,600 bytes, one segment
    group = log.group(4, 8) if with_group else []
    if with_checkpoint:
        log.checkpoint()
    for damage in applied:
        apply(log, damage)
    hole = first_damaged(log)
    witnesses = [log.flushed] if with_checkpoint else []
    for place, raw in zip(log.places, log.records, strict=True):
        reach = (hole or 0) + log.ring_bytes + log.ring_bytes // 4
        if hole is not None and hole < place <= reach - len(raw) and log.read_bytes(place, len(raw)) == raw:
            witnesses.append(decode_record(raw, place).flushed)
    if hole is not None and any(known > hole for known in witnesses):
        with pytest.raises(CorruptLog) as caught:
            log.recover()
        assert caught.value.position == hole
        return
    end = log.position if hole is None else hole
    if group and group[0] < end < log.position:
        end = group[0]
    result, seen = log.recover()
    assert result.end == end
    assert seen.positions == [place for place in log.places[1:] if place < end]
    check_sound(log, result)
    again, seen_again = log.recover()
    assert replace(again, cut_bytes=0, reason="", records=0) == replace(result, cut_bytes=0, reason="", records=0)
    assert seen_again == seen


def test_every_length_of_a_log_is_cut_at_a_record(tmp_path: Path) -> None:
    """E|m|m|...: truncated at each byte in turn."""
    log = StoreBuilder(tmp_path)
    log.begin_epoch()
    for _ in range(8):
        log.message(bytes(range(1, 33)))
    whole = log.log_bytes()
    for size in range(len(whole), -1, -1):
        log.zero(0, len(whole))
        if size:
            log.write_bytes(0, whole[:size])
        else:
            log.make_segment(0)
        result, _ = log.recover()
        # Of a record's padding nothing can be missed: it is zeros.
        ends = [place + len(raw) for place, raw in zip(log.places, log.records, strict=True)]
        needs = [place + decode_record(raw).size for place, raw in zip(log.places, log.records, strict=True)]
        assert result.end == max([end for end, need in zip(ends, needs, strict=True) if need <= size], default=0), size
