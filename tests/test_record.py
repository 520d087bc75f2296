"""Records: round trip, every bit flip, scans, groups by queue, and the bodies of the system's own records."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker._native import _core
from shmbroker.record import (
    EpochBody,
    GroupBody,
    RecordFlag,
    RecordKind,
    SnapshotBody,
    TopicBody,
    decode_record,
    encode_record,
    next_position,
    padded,
    parse_ids,
)

SEGMENT = 1 << 20
GOLDEN = Path(__file__).parent / "data" / "records-1.json"

words = st.text(st.characters(codec="utf-8", exclude_characters="\x01\x02"), max_size=40)
u64 = st.integers(0, 2**64 - 1)
messages = st.fixed_dictionaries(
    {
        "body": st.binary(max_size=400),
        "queue_offset": u64,
        "queue_id": st.integers(0, 0xFFFE),
        "topic_id": st.integers(0, 2**32 - 1),
        "incarnation": u64,
        "sequence": u64,
        "born_ns": st.integers(-(2**63), 2**63 - 1),
        "tags": words,
        "keys": words,
        "properties": st.dictionaries(words, words, max_size=4),
        "attempts": st.integers(0, 255),
    }
)


def message(position: int = 0, epoch: int = 1, **fields: Any) -> bytes:
    every: dict[str, Any] = {"flushed": 0, "kind": RecordKind.MESSAGE, "body": b"body", "queue_id": 0} | fields
    return encode_record(position=position, epoch=epoch, **every)


def epoch_record(position: int, epoch: int) -> bytes:
    body = EpochBody(epoch, position, epoch - 1, "test").encode()
    return encode_record(position=position, epoch=epoch, flushed=position, kind=RecordKind.EPOCH, body=body)


def run_of(count: int, position: int = 0, epoch: int = 1, **fields: Any) -> bytes:
    parts = b""
    for index in range(count):
        parts += message(position + len(parts), epoch, queue_offset=index, **fields)
    return parts


# ---- one record


@given(messages, st.integers(0, 2**40).map(lambda n: n * 8), st.integers(1, 2**32 - 1), st.integers(0, 1000))
def test_what_is_encoded_is_decoded(fields: dict[str, Any], position: int, epoch: int, unflushed: int) -> None:
    flushed = max(0, position - unflushed)
    raw = message(position, epoch, flushed=flushed, **fields)
    record = decode_record(raw, position)
    assert {name: getattr(record, name) for name in fields} == fields
    assert (record.position, record.epoch, record.flushed, record.raw) == (position, epoch, flushed, raw)
    assert (record.padded, record.padded % 8) == (len(raw), 0)
    assert record.size <= record.padded == padded(record.size)
    assert record.message_id == f"{fields['incarnation']:016x}{fields['sequence']:016x}"
    assert (record.tag_hash == 0) == (fields["tags"] == "")


@settings(max_examples=15)
@given(messages)
def test_every_flipped_bit_is_found(fields: dict[str, Any]) -> None:
    raw = message(4096, 7, flushed=4000, **fields)
    for bit in range(len(raw) * 8):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            decode_record(damaged, 4096)
        assert _core.scan(damaged + bytes(1024), 4096, 7, SEGMENT)[:2] == ([], 4096), bit


@pytest.mark.parametrize("size", [0, 1, 79, 80, 84])
def test_a_record_that_is_not_whole_is_refused_but_not_called_invalid(size: int) -> None:
    raw = message(body=b"x" * 9)
    with pytest.raises(ValueError):
        decode_record(raw[:size])
    assert _core.skim(raw[:size], 0, 1, SEGMENT) == (0, 0, 1, "end")


@given(st.binary(max_size=300), st.integers(0, 64).map(lambda n: n * 8))
def test_arbitrary_bytes_are_refused_with_an_error_and_nothing_worse(data: bytes, position: int) -> None:
    with pytest.raises(ValueError):
        decode_record(data, position)
    assert _core.scan(data, position, 1, 512)[0] == []
    assert _core.find_record(data, position, 512, 0, 2**32 - 1) is None


def test_a_property_with_a_separator_in_it_is_refused() -> None:
    with pytest.raises(ValueError):
        message(properties={"a\x01": "b"})


# ---- scans


def test_a_scan_returns_every_record_and_where_the_next_begins() -> None:
    data = run_of(50, position=800)
    records, behind, why = _core.scan(data, 800, 1, SEGMENT)
    assert [record.queue_offset for record in records] == list(range(50))
    assert b"".join(record.raw for record in records) == data
    assert (behind, why) == (800 + len(data), "end")
    assert _core.scan(data, 800, 1, SEGMENT, 10)[1:] == (records[10].position, "limit")


def test_a_record_of_a_lower_epoch_ends_a_scan() -> None:
    # | epoch 2 | epoch 2 | epoch 1, left over |
    data = run_of(2, epoch=2)
    end = len(data)
    data += message(end, epoch=1)
    assert _core.skim(data, 0, 2, SEGMENT) == (end, 2, 2, "invalid")


def test_a_higher_epoch_is_accepted_only_from_an_epoch_record() -> None:
    # | epoch 1 | EPOCH 3 | epoch 3 |      | epoch 1 | epoch 3, not introduced |
    first = message(0)
    introduction = epoch_record(len(first), 3)
    end = len(first) + len(introduction)
    introduced = first + introduction + message(end, epoch=3)
    assert _core.skim(introduced, 0, 1, SEGMENT) == (len(introduced), 3, 3, "end")
    assert _core.skim(first + message(len(first), epoch=3), 0, 1, SEGMENT) == (len(first), 1, 1, "invalid")


def test_short_ends_of_segments_are_stepped_over() -> None:
    # | record | 72 bytes of anything || record |
    segment = 1024
    first = message(0, body=bytes(1024 - 72 - 80))
    assert next_position(0, 952, segment) == 1024
    data = first + b"\xaa" * 72 + message(1024)
    assert _core.skim(data, 0, 1, segment) == (len(data), 2, 1, "end")


def test_a_scan_never_answers_a_place_behind_its_data() -> None:
    segment = 1024
    data = message(0, body=bytes(1024 - 72 - 80)) + bytes(40)
    assert _core.skim(data, 0, 1, segment)[0] == len(data)


def test_a_filler_reaches_the_end_of_its_segment_and_its_payload_does_not_count() -> None:
    filler = encode_record(position=512, epoch=1, flushed=0, kind=RecordKind.FILLER, body=bytes(512 - 80))
    assert _core.skim(filler, 512, 1, 1024) == (1024, 1, 1, "end")
    stale = filler[:80] + b"\xaa" * (512 - 80)
    assert _core.skim(stale, 512, 1, 1024) == (1024, 1, 1, "end")
    assert _core.skim(filler, 512, 1, 2048) == (512, 0, 1, "invalid"), "it must end its segment"


def test_a_record_across_the_end_of_a_segment_is_none() -> None:
    raw = message(512, body=bytes(600))
    assert _core.skim(raw, 512, 1, 1024) == (512, 0, 1, "invalid")


@pytest.mark.parametrize("segment_bytes", [0, -8, 1001])
def test_a_senseless_segment_size_is_refused(segment_bytes: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        _core.skim(b"", 0, 1, segment_bytes)


def test_find_record_steps_over_garbage_and_asks_for_what_its_writer_knew() -> None:
    # position 0: | 128 of garbage | flushed 0 | flushed 300 |
    first = message(128, flushed=0)
    second = message(128 + len(first), flushed=200)
    data = b"\x11" * 128 + first + second
    assert _core.find_record(data, 0, SEGMENT, 1, 1) == (128, 84, 0)
    assert _core.find_record(data, 0, SEGMENT, 1, 1, 0) == (128 + len(first), 84, 200)
    assert _core.find_record(data, 0, SEGMENT, 1, 1, 200) is None
    assert _core.find_record(data, 0, SEGMENT, 2, 9) is None
    assert _core.find_record(data, 8, SEGMENT, 1, 1) is None, "every position is wrong now"


def group_of(count: int, position: int) -> bytes:
    size = len(message()) * count
    data = b""
    for index in range(count):
        flags = RecordFlag.GROUP | (RecordFlag.GROUP_LAST if index == count - 1 else 0)
        data += message(position + len(data), flags=flags, group_bytes=size if index == 0 else 0)
    return data


def test_a_cut_inside_a_group_falls_back_to_its_start() -> None:
    # | single | group of 3 | single | group of 2 |
    one = len(message())
    data = message(0) + group_of(3, one) + message(4 * one) + group_of(2, 5 * one)
    floors = [_core.group_floor(data, 0, SEGMENT, index * one) // one for index in range(8)]
    assert floors == [0, 1, 1, 1, 4, 5, 5, 7]


def test_a_group_floor_never_looks_behind_its_data() -> None:
    data = message(0, body=bytes(1024 - 72 - 80))  # the next record begins 72 bytes further on
    assert _core.group_floor(data, 0, 1024, 5000) == len(data)
    assert _core.group_floor(data[:100], 0, 1024, 5000) == 0


# ---- dispatch


def test_dispatch_scan_deals_messages_out_by_queue_in_their_order() -> None:
    data = b""
    expected: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for index in range(300):
        key = (index % 3, index % 7)
        entries = expected.setdefault(key, [])
        raw = message(
            len(data), topic_id=key[0], queue_id=key[1], queue_offset=100 + len(entries), tags="t" * (index % 2)
        )
        entries.append((len(data), decode_record(raw).size, decode_record(raw).tag_hash))
        data += raw
    runs, marked, behind, epoch, why = _core.dispatch_scan(data, 0, 1, SEGMENT)
    assert [run[:3] for run in runs] == [(*key, 100) for key in sorted(expected)]
    assert {run[:2]: list(struct.iter_unpack("<QII", run[3])) for run in runs} == expected
    assert (marked, behind, epoch, why) == ([], len(data), 1, "end")


def test_dispatch_scan_goes_on_after_a_limit_without_loss() -> None:
    data = run_of(25)
    position, counts = 0, []
    while position < len(data):
        runs, _, position, _, why = _core.dispatch_scan(memoryview(data)[position:], position, 1, SEGMENT, 10)
        counts.append((runs[0][2], len(runs[0][3]) // 16, why))
    assert counts == [(0, 10, "limit"), (10, 10, "limit"), (20, 5, "end")]


@pytest.mark.parametrize("cut", [0, 1, 87, 88, 90, 263, 264, 265, 351, 352, 400])
def test_a_group_floor_cuts_no_record_and_no_group(cut: int) -> None:
    # | 88: plain | 88: group of two | 88 | 88: plain | ends 40 bytes before the segment's end
    data = message(0) + message(88, flags=RecordFlag.GROUP, group_bytes=176) + message(176) + message(264)
    floors = [0, 88, 264, 352, 392]
    assert _core.group_floor(data + bytes(40) + message(392), 0, 392, cut) == max(
        floor if floor < 352 else min(floor, cut) for floor in floors if floor <= cut
    )


def test_a_jump_of_offsets_begins_a_run_of_its_own() -> None:
    data = run_of(2)
    data += message(len(data), queue_offset=1000) + message(len(data) + 88, queue_offset=1001)
    runs = _core.dispatch_scan(data, 0, 1, SEGMENT)[0]
    assert [(first, len(entries) // 16) for _, _, first, entries in runs] == [(0, 2), (1000, 2)]


def test_many_queues_do_not_overflow_a_scan() -> None:
    data = b"".join(message(index * 88, queue_id=index % 60_000, topic_id=index) for index in range(5000))
    position, queues = 0, set()
    while position < len(data):
        runs, _, position, _, _ = _core.dispatch_scan(memoryview(data)[position:], position, 1, SEGMENT)
        queues |= {run[:2] for run in runs}
    assert len(queues) == 5000


def test_records_to_be_looked_at_one_by_one_are_marked() -> None:
    # | plain | keys | dedup | EPOCH 2 | filler |
    plain, keys = message(0), message(88, keys="k")
    dedup = message(88 + len(keys), flags=RecordFlag.DEDUP)
    places = [88, 88 + len(keys), 88 + len(keys) + len(dedup)]
    data = plain + keys + dedup + epoch_record(places[2], 2)
    end = len(data)
    data += encode_record(position=end, epoch=2, flushed=0, kind=RecordKind.FILLER, body=bytes(1024 - end - 80))
    runs, marked, behind, epoch, why = _core.dispatch_scan(data, 0, 1, 1024)
    assert (marked, behind, epoch, why) == (places, 1024, 2, "end")
    assert sum(len(run[3]) // 16 for run in runs) == 3
    assert _core.dispatch_scan(data, 0, 1, 1024, keys=False)[1] == places[1:]


def test_of_a_producers_messages_the_first_and_then_each_1024th_are_marked() -> None:
    data, places = b"", {}
    for sequence in range(1, 2100):
        places[sequence] = len(data)
        data += message(len(data), queue_offset=sequence, incarnation=9, sequence=sequence)
    assert _core.dispatch_scan(data, 0, 1, 1 << 20)[1] == [places[1], places[1024], places[2048]]
    assert _core.dispatch_scan(data, 0, 1, 1 << 20, keys=False)[1] == []


# ---- bodies


@pytest.mark.parametrize(
    "body",
    [
        EpochBody(3, 4096, 2, "opened"),
        TopicBody("orders", 7, 2),
        TopicBody("orders", 7, 2, 6, (5, 9), (0, 4)),
        TopicBody("orders", 7, deleted=True),
        GroupBody("billing", 1),
        GroupBody("billing", 1, {"orders": "paid || refunded", "refunds": "*"}, 7),
        GroupBody("billing", 1, deleted=True),
        SnapshotBody(12, 3),
    ],
)
def test_bodies_come_back_as_they_were(body: EpochBody | TopicBody | GroupBody | SnapshotBody) -> None:
    assert type(body).parse(body.encode()) == body
    with pytest.raises(ValueError):
        type(body).parse(body.encode()[:-1])


@pytest.mark.parametrize(
    ("parse", "fields"),
    [
        (EpochBody.parse, {"epoch": 0, "start": 0, "previous": 0, "reason": ""}),
        (EpochBody.parse, {"epoch": 2, "start": 0, "previous": 2, "reason": ""}),
        (EpochBody.parse, {"epoch": True, "start": 0, "previous": 0, "reason": ""}),
        (EpochBody.parse, {"epoch": 2, "start": -8, "previous": 1, "reason": ""}),
        (EpochBody.parse, {"epoch": 2, "start": 0, "previous": 1}),
        (TopicBody.parse, {"op": "rename", "name": "a", "topic_id": 1, "queues": 1, "permission": 6}),
        (TopicBody.parse, {"op": "define", "name": "a", "topic_id": 1, "queues": 1, "permission": 9}),
        (TopicBody.parse, {"op": "define", "name": "a", "topic_id": 2**32, "queues": 1, "permission": 6}),
        (
            TopicBody.parse,
            {
                "op": "define",
                "name": "a",
                "topic_id": 1,
                "queues": 1,
                "permission": 6,
                "next_offsets": [1],
                "first_offsets": [2],
            },
        ),
        (parse_ids, {"an id": "has 24 bytes"}),
        (GroupBody.parse, {"op": "define", "name": 5, "group_id": 1}),
        (GroupBody.parse, {"op": "define", "name": "g", "group_id": 1, "subscription": {}, "generation": 1}),
        (GroupBody.parse, {"op": "define", "name": "g", "group_id": 1, "subscription": {"t": 1}, "generation": 1}),
        (GroupBody.parse, {"op": "define", "name": "g", "group_id": 1, "subscription": {"t": "*"}}),
        (SnapshotBody.parse, {"snapshot": -1, "epoch": 1}),
        (SnapshotBody.parse, [1, 2]),
    ],
)
def test_bodies_that_make_no_sense_are_refused(parse: Any, fields: Any) -> None:
    with pytest.raises(ValueError):
        parse(json.dumps(fields).encode())


# ---- the format itself


def test_records_of_format_1_are_read_as_they_were_written() -> None:
    """Bytes kept since the format was made: whoever changes it changes SB_RECORD_VERSION and adds a file."""
    assert _core.RECORD_VERSION == 1
    for case in json.loads(GOLDEN.read_text()):
        raw = bytes.fromhex(case["raw"])
        record = decode_record(raw, case["fields"]["position"])
        fields = case["fields"] | {"body": bytes.fromhex(case["fields"]["body"])}
        assert {name: getattr(record, name) for name in fields} == fields
        assert record.message_id == case["message_id"]
        assert encode_record(**fields) == raw
