"""Ids against second copies (R17): what is remembered across restarts, and where it is read back from."""

from __future__ import annotations

import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from reference_ring import Draft, Shape
from support.native_ring import NativeRing
from support.processes import Child, wait_for_workers, wait_gone
from support.regions import memory as bare_memory
from support.running import QUICK, lose_memory, running
from support.store_builder import StoreBuilder

from shmbroker import Message
from shmbroker._native._core import Record, decode_record, encode_record
from shmbroker.delivery.restore import Restoration
from shmbroker.record import RecordFlag, RecordKind, parse_ids
from shmbroker.store.commit_log import LogReader
from shmbroker.store.consume_queue import ConsumeQueues

STORE = bytes(16)
SEGMENT = 1 << 20


def ids_record(body: bytes, position: int) -> Record:
    return decode_record(encode_record(position=position, epoch=1, flushed=0, kind=RecordKind.IDS, body=body))


def test_ids_of_messages_before_the_snapshot_are_known_again_as_far_as_the_log_is_sound(tmp_path: Path) -> None:
    """Those without a dedup key: the others are in the snapshot."""
    builder = StoreBuilder(tmp_path, segment_bytes=SEGMENT)
    builder.begin_epoch()
    sent = [builder.message(bytes(100_000), incarnation=7, sequence=1 + number) for number in range(60)]
    builder.zero(2 * SEGMENT, 64)  # nobody replays this segment: it is no reason not to start
    queues = ConsumeQueues(tmp_path / "queues", STORE, writable=True)
    reader = LogReader(builder.log, SEGMENT, builder.place.store)
    with bare_memory(ids=1024) as region:
        for word in ("tail", "write_limit", "flushed", "dispatched"):
            region.set(word, builder.position)
        Restoration(queues, builder.position).apply(region, reader, 0)
        assert region.dedup_ids(1024) == [], "a snapshot is to hold those of dedup keys only"
        ring = NativeRing(region, Shape(queues=1))
        ring.remember(dict(zip(builder.places, builder.records, strict=True)))
        for number in (1, 31, 58, 59):
            again = ring.send_once(Draft(b"again"), (7, 1 + number))
            assert (again.duplicate, again.positions) == (True, (sent[number],))
        assert not ring.send_once(Draft(b"new"), (7, 1 + 25)).duplicate, "it lies in the damaged segment"
        ring.close()
    reader.close()
    queues.close()


def test_ids_of_dedup_keys_come_from_the_snapshot_and_from_the_messages_behind_it(tmp_path: Path) -> None:
    known = [(7, number, 8 * number) for number in range(100)]
    body = b"".join(struct.pack("<QQQ", *identity) for identity in [*known, (7, 999, 1 << 20)])
    message = {"kind": RecordKind.MESSAGE, "flags": RecordFlag.DEDUP, "incarnation": 8, "sequence": 9, "queue_id": 0}
    queues = ConsumeQueues(tmp_path / "queues", STORE, writable=True)
    restoration = Restoration(queues, 0)
    restoration.replay(ids_record(body, 1024))
    restoration.replay(decode_record(encode_record(position=2048, epoch=1, flushed=0, body=b"x", **message)))  # type: ignore[arg-type]
    restoration.replay(ids_record(body, 4096))  # of the next snapshot
    (tmp_path / "log").mkdir()
    with bare_memory(ids=64) as region, closing(LogReader(tmp_path / "log", SEGMENT, STORE)) as reader:
        restoration.apply(region, reader, 0)
        assert ids_of(region.dedup_ids(64)) == [*known[-63:], (8, 9, 2048)], (
            "an id lies before the record that tells it"
        )
    queues.close()


def test_a_snapshot_takes_the_newest_ids_of_which_the_log_still_has_the_messages() -> None:
    with bare_memory(ids=1024) as region:
        ring = NativeRing(region, Shape(queues=1))
        sent = [(5, number, ring.send_once(Draft(b"x"), (5, number)).positions[0]) for number in range(1500)]
        assert ids_of(region.dedup_ids(4096)) == sent[-1024:]
        assert ids_of(region.dedup_ids(600)) == sent[-600:]
        region.set("kept", sent[1400][2])
        assert ids_of(region.dedup_ids(4096)) == sent[1400:]
        ring.close()


def ids_of(bodies: list[bytes]) -> list[tuple[int, int, int]]:
    return [identity for body in bodies for identity in parse_ids(body)]


# ---- with a broker -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dedup_keys_of_the_window_are_known_after_a_restart_however_much_log_lies_behind_them(directory: Path) -> None:
    large: dict[str, Any] = {"segment_bytes": 4 << 20, "ring_bytes": 4 << 20}
    with running(directory, **large) as broker, broker.producer("p") as producer:
        first = [
            producer.send(Message("orders", b"x"), dedup_key=f"order-{number}").message_id for number in range(100)
        ]
        for _ in range(150):
            producer.send(Message("orders", bytes(500_000)))
        assert broker.region.get("tail") > 70 << 20
    for _ in range(2):  # the second time, nothing but the first start's snapshot knows them
        with running(directory, **large) as broker, broker.producer("p") as producer:
            for number in (0, 50, 99):
                again = producer.send(Message("orders", b"again"), dedup_key=f"order-{number}")
                assert (again.duplicate, again.message_id) == (True, first[number])


@pytest.mark.parametrize("stopped_cleanly", [True, False])
def test_a_dedup_key_is_known_after_a_restart(directory: Path, stopped_cleanly: bool) -> None:
    settings: dict[str, Any] = {"flush_disk_type": "SYNC_FLUSH"}
    source = """
        import sys, shmbroker
        from shmbroker import Message
        broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
        producer = broker.producer("p")
        for number in range(60):
            result = producer.send(Message("orders", bytes(100_000)), dedup_key=f"order-{number}")
            print(result.message_id, result.position, flush=True)
        sys.stdin.readline()
        broker.close()
    """
    with Child(source, directory, QUICK | settings) as child:
        sent = [child.read_line().split() for _ in range(60)]
        assert int(sent[-1][1]) > 5 * SEGMENT
        if stopped_cleanly:
            wait_for_workers(directory)
            child.write_line("")
            wait_gone(directory)
        else:
            lose_memory(directory)
    with running(directory, **settings) as broker, broker.producer("p") as producer:
        for number in (0, 31, 59):  # far before the newest snapshot, and the last one
            again = producer.send(Message("orders", b"again"), dedup_key=f"order-{number}")
            assert (again.duplicate, again.message_id) == (True, sent[number][0])
