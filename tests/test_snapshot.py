"""What a broker knows survives the loss of its memory and of every segment before the newest snapshot."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from reference_ring import Draft, Shape
from support.native_ring import NativeRing
from support.processes import Child
from support.progress import Progress, Run, RunKind
from support.regions import LIMITS
from support.regions import memory as bare_memory
from support.running import QUICK, log_records, lose_memory, receive_all, running, wait_word
from support.waiting import wait_until

from shmbroker import Message, memory
from shmbroker._native._core import Record, Region, decode_record, encode_record, failpoint_arm
from shmbroker.delivery.restore import Restoration
from shmbroker.delivery.snapshot import Snapshot
from shmbroker.errors import CorruptLog
from shmbroker.naming import BrokerPaths
from shmbroker.record import GroupBody, RecordKind, SnapshotBody, TopicBody
from shmbroker.store.commit_log import LogReader
from shmbroker.store.consume_queue import ENTRY, ConsumeQueues
from shmbroker.store.segment import list_segments

STORE = bytes(16)
SEGMENT = 1 << 20


# ---- merging, without a broker -----------------------------------------------------------------------------------


@contextmanager
def restored(tmp_path: Path, *steps: tuple[RecordKind, bytes] | tuple[int, int, int]) -> Iterator[Region]:
    """Memory after a log of these: (kind, body) of a system record, or (topic, queue, end offset) of messages."""
    queues = ConsumeQueues(tmp_path / "queues", STORE, writable=True)
    restoration = Restoration(queues, 1 << 40)
    for number, step in enumerate(steps):
        if isinstance(step[0], RecordKind):
            restoration.replay(system_record(step[0], step[1], 1024 * number))  # type: ignore[arg-type]
        else:
            topic_id, queue_id, end = step  # type: ignore[misc]
            restoration.dispatch([(topic_id, queue_id, end - 1, bytes(16))], 1024 * number)
    restoration.finish(0)
    (tmp_path / "log").mkdir(exist_ok=True)
    reader = LogReader(tmp_path / "log", SEGMENT, STORE)
    with bare_memory() as region:
        restoration.apply(region, reader, 0)
        yield region
    reader.close()
    queues.close()


def system_record(kind: RecordKind, body: bytes, position: int) -> Record:
    return decode_record(encode_record(position=position, epoch=1, flushed=0, kind=kind, body=body))


def topic(name: str, topic_id: int, queues: int = 2, permission: int = 6) -> tuple[RecordKind, bytes]:
    return RecordKind.TOPIC, TopicBody(name, topic_id, queues, permission).encode()


def topic_snapshot(
    name: str, topic_id: int, offsets: list[int], first: list[int], permission: int = 6
) -> tuple[RecordKind, bytes]:
    body = TopicBody(name, topic_id, len(offsets), permission, tuple(offsets), tuple(first))
    return RecordKind.TOPIC, body.encode()


def deletion(name: str, topic_id: int) -> tuple[RecordKind, bytes]:
    return RecordKind.TOPIC, TopicBody(name, topic_id, deleted=True).encode()


def offsets_of(region: Region) -> dict[str, list[tuple[int, int]]]:
    return {
        found["name"]: [(queue["first_offset"], queue["next_offset"]) for queue in found["queues"]]
        for found in region.topics()
    }


def test_offsets_come_from_the_snapshot_and_from_the_messages_around_it(tmp_path: Path) -> None:
    begin = (RecordKind.SNAPSHOT_BEGIN, SnapshotBody(1, 1, 4, 2).encode())
    with restored(
        tmp_path,
        begin,
        (1, 1, 78),  # appended between BEGIN and the topic's record: after its offsets were read
        topic_snapshot("orders", 1, [1000, 77], [900, 0]),
        (1, 0, 1003),
    ) as region:
        assert offsets_of(region) == {"orders": [(900, 1003), (0, 78)]}
        assert region.get("next_topic_id") == 4
        assert region.get("next_group_id") == 2


def test_a_snapshot_does_not_bring_back_what_was_deleted_meanwhile(tmp_path: Path) -> None:
    with restored(
        tmp_path,
        topic("gone", 1),
        deletion("gone", 1),
        topic_snapshot("gone", 1, [5, 5], [0, 0]),
        topic("gone", 2, queues=1),  # the name may come back, the id does not
        (RecordKind.GROUP, GroupBody("g", 1).encode()),
        (RecordKind.GROUP, GroupBody("g", 1, deleted=True).encode()),
        (RecordKind.GROUP, GroupBody("g", 1).encode()),
    ) as region:
        assert [(found["name"], found["topic_id"]) for found in region.topics()] == [("gone", 2)]
        assert offsets_of(region) == {"gone": [(0, 0)]}
        assert region.groups() == []
        assert region.define_topic("new", 1, record=False) == 3


def test_a_snapshot_does_not_undo_a_change_that_came_before_its_record(tmp_path: Path) -> None:
    with restored(
        tmp_path,
        topic("orders", 1, queues=4, permission=4),
        topic_snapshot("orders", 1, [7, 8], [0, 0], permission=6),
    ) as region:
        (found,) = region.topics()
        assert (found["permission"], len(found["queues"])) == (4, 4)
        assert offsets_of(region) == {"orders": [(0, 7), (0, 8), (0, 0), (0, 0)]}


def test_a_snapshot_does_not_undo_a_subscription_that_was_set_before_its_record(tmp_path: Path) -> None:
    with restored(
        tmp_path,
        (RecordKind.GROUP, GroupBody("g", 1, {"orders": "*"}, 1).encode()),
        (RecordKind.GROUP, GroupBody("g", 1, {"orders": "paid"}, 3).encode()),
        (RecordKind.GROUP, GroupBody("g", 1, {"orders": "*"}, 1).encode()),  # the snapshot's
        (RecordKind.GROUP, GroupBody("h", 2, {"orders": "*"}, 1).encode()),
        (RecordKind.GROUP, GroupBody("h", 2).encode()),  # one of before it was set
    ) as region:
        assert [(group["subscription"], group["subscription_set"]) for group in region.groups()] == [
            ('{"orders":"paid"}', True),
            ('{"orders":"*"}', True),
        ]


def test_messages_of_a_topic_that_was_deleted_restore_nothing(tmp_path: Path) -> None:
    with restored(tmp_path, topic("gone", 1), (1, 0, 10), deletion("gone", 1)) as region:
        assert region.topics() == []


def test_replaying_twice_is_replaying_once(tmp_path: Path) -> None:
    steps = [topic("a", 1), (1, 0, 5), topic_snapshot("a", 1, [5, 0], [2, 0]), (1, 1, 3)]
    with restored(tmp_path, *steps) as region:  # type: ignore[arg-type]
        once = offsets_of(region)
    with restored(tmp_path, *steps, *steps) as region:  # type: ignore[arg-type]
        assert offsets_of(region) == once == {"a": [(2, 5), (0, 3)]}


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b'{"op":"define","name":"x"}'])
def test_a_sound_record_with_a_senseless_body_is_corruption(tmp_path: Path, body: bytes) -> None:
    with pytest.raises(CorruptLog, match="TOPIC"), restored(tmp_path, (RecordKind.TOPIC, body)):
        pass


def test_a_written_snapshot_restores_the_same_memory(tmp_path: Path) -> None:
    with bare_memory() as region:
        region.define_topic("orders", 3)
        region.define_topic("invoices", 1, 4)
        region.define_group("billing")
        region.define_group("audit")
        region.set_subscription("audit", b'{"orders":"paid"}')
        for queue_id, end in enumerate((10, 20, 30)):
            region.restore_queue(1, queue_id, end, end // 2)
        snapshot = Snapshot(region, [(1, 0, 0)])
        end = snapshot.complete()
        assert end == region.get("tail")
        records, position = [], snapshot.begin
        while position < end:
            raw = region.read_raw(position)
            assert raw is not None
            records.append(decode_record(raw, position))
            position += records[-1].padded
        before, groups = region.topics(), region.groups()
    assert [record.kind for record in records] == [
        RecordKind.SNAPSHOT_BEGIN, RecordKind.TOPIC, RecordKind.TOPIC, RecordKind.GROUP, RecordKind.GROUP,
        RecordKind.SNAPSHOT_END
    ]  # fmt: skip
    with restored(tmp_path, *((RecordKind(record.kind), record.body) for record in records)) as region:
        kept = ("name", "topic_id", "permission")
        assert [[found[word] for word in kept] for found in region.topics()] == [
            [found[word] for word in kept] for found in before
        ]
        assert offsets_of(region)["orders"] == [(5, 10), (10, 20), (15, 30)]
        assert region.groups() == groups


def test_a_snapshot_does_not_count_the_message_of_a_sender_that_died_within_its_append() -> None:
    """The queue's counter has moved, `tail` has not: whoever takes the lock next moves the counter back."""
    with bare_memory() as region:
        region.define_topic("test", 1, record=False)
        snapshot = Snapshot(region, [(1, 0, 0)])
        if (child := os.fork()) == 0:
            failpoint_arm("append.effects", "kill", 1)
            NativeRing(region, Shape(queues=1)).send(Draft(b"body"))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert region.topics()[0]["queues"][0]["next_offset"] == 1
        snapshot.complete()
        raw = region.read_raw(snapshot.begin)
        assert raw is not None
        raw = region.read_raw(snapshot.begin + decode_record(raw, snapshot.begin).padded)
        assert raw is not None
        assert TopicBody.parse(decode_record(raw).body).next_offsets == (0,)


def test_claims_that_two_queues_held_at_different_times_need_not_fit_into_memory_together(tmp_path: Path) -> None:
    room = LIMITS["overflow_claims"]
    full = (Run(0, room, 1, RunKind.UNACKED),)
    states = [
        Progress(1, 1, 0, 0, 1000, full),  # this queue held as much as there is room for,
        Progress(1, 1, 1, 0, 1000, full),  # then, after an acknowledgement of all that, the other one
        Progress(1, 1, 0, 0, 1001),
    ]
    steps = [(RecordKind.PROGRESS, state.encode()) for state in states]
    with restored(tmp_path, topic("orders", 1), (RecordKind.GROUP, GroupBody("g", 1).encode()), *steps) as region:
        found = {table["queue_id"]: (table["base"], table["overflow"]) for table in region.progress()}
    assert found == {0: (1001, []), 1: (1000, list(range(room)))}


class FullDisk(ConsumeQueues):
    """Has no room from a certain call on."""

    def __init__(self, directory: Path, room: int) -> None:
        super().__init__(directory, STORE, writable=True)
        self.room = room

    def write(self, topic_id: int, queue_id: int, offset: int, entries: bytes | memoryview) -> None:
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(topic_id, queue_id, offset, entries)


def test_what_a_full_disk_does_not_take_is_left_to_the_dispatcher_and_found_by_the_index(tmp_path: Path) -> None:
    queues = FullDisk(tmp_path / "queues", room=2)
    restoration = Restoration(queues, 1000)
    restoration.replay(system_record(*topic("orders", 1, queues=3), position=0))
    pieces = [(900, 0, 0), (2000, 0, 10), (3000, 1, 0), (4000, 0, 20), (5000, 0, 30), (6000, 2, 7), (7000, 2, 27)]
    for end, queue_id, offset in pieces:  # ten messages each
        entries = b"".join(ENTRY.pack(end - 800 + 80 * i, 80, 0) for i in range(10))
        restoration.dispatch([(1, queue_id, offset, entries)], end)
    assert restoration.finish(8000) == 3000, "all before it is there, of what lies behind it nothing"
    assert [queues.offsets(1, queue_id) for queue_id in range(3)] == [(0, 20), (0, 10), (0, 0)]
    (tmp_path / "log").mkdir()
    with bare_memory() as region, closing(LogReader(tmp_path / "log", SEGMENT, STORE)) as reader:
        restoration.apply(region, reader, 0)
        found = [(queue["index_first"], queue["next_offset"]) for queue in region.topics()[0]["queues"]]
        assert found == [(20, 40), (10, 10), (27, 37)], "offsets 17 to 26 of queue 2 have no message"
    queues.close()


# ---- with a broker -----------------------------------------------------------------------------------------------

CLIENT = """
    import sys, shmbroker
    from shmbroker import Message
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    producer = broker.producer("p")
    consumer = broker.simple_consumer("billing", {"orders": "*"})
    print("open")
    for line in sys.stdin:
        command, first, last = line.split()
        if command == "send":
            for number in range(int(first), int(last)):
                producer.send(Message("orders", b"%d " % number + bytes(1000)))
        else:
            left = int(last) - int(first)
            while left:
                received = consumer.receive(max_messages=min(32, left), wait=10.0)
                consumer.ack(received)
                left -= len(received)
        region = broker.region
        print(region.get("tail"))
"""


def wait_settled(directory: Path, tail: int, segments_at_most: int = 1 << 30) -> None:
    """Wait until progress and a snapshot behind ``tail`` are on the disk and retention has done its work."""
    found = memory.attach(BrokerPaths(directory))
    assert found is not None
    region = found[0]
    wait_until(lambda: region.get("flushed") >= tail, "everything flushed")
    wait_until(lambda: not region.progress_records(only_changed=True), "progress recorded")
    written = region.get("tail")
    wait_until(lambda: region.get("flushed") >= written, "progress flushed")
    log = BrokerPaths(directory).log
    wait_until(lambda: sum(base < region.get("tail") for base in list_segments(log)) <= segments_at_most, "retention")
    region.close()


@pytest.mark.crash
def test_new_messages_are_delivered_after_all_older_segments_and_the_memory_are_gone(directory: Path) -> None:
    """R4: send, consume, delete the segments, drop the memory, send again: delivered, with offsets that go on."""
    settings: dict[str, Any] = QUICK | {
        "retention_bytes": 1,
        "snapshot_interval_bytes": 64 << 10,
        "flush_interval": 0.01,
    }
    with Child(CLIENT, directory, settings) as child:
        assert child.read_line() == "open"
        child.write_line("send 0 4000")
        child.read_line()
        child.write_line("receive 0 4000")
        tail = int(child.read_line())
        assert tail > 4 * SEGMENT
        wait_settled(directory, tail, segments_at_most=2)
        lose_memory(directory)
    assert min(list_segments(BrokerPaths(directory).log)) > 2 * SEGMENT
    with running(directory, **settings) as broker, broker.producer("p") as producer:
        ends = [queue["next_offset"] for queue in broker.topics()[0]["queues"]]
        assert sum(ends) == 4000
        assert receive_all(broker, 0) == []
        results = [producer.send(Message("orders", b"%d" % number)) for number in range(5000, 5040)]
        assert min(result.queue_offset for result in results) >= min(ends)
        assert sorted(receive_all(broker, 40)) == list(range(5000, 5040))


@pytest.mark.crash
def test_definitions_and_progress_survive_the_loss_of_memory(directory: Path) -> None:
    settings: dict[str, Any] = QUICK | {"flush_disk_type": "SYNC_FLUSH"}
    with Child(CLIENT, directory, settings) as child:
        assert child.read_line() == "open"
        child.write_line("send 0 300")
        child.read_line()
        child.write_line("receive 0 200")
        wait_settled(directory, int(child.read_line()))
        lose_memory(directory)
    with running(directory, **settings) as broker:
        assert [group["name"] for group in broker.region.groups()] == ["billing"]
        left = receive_all(broker, 100)
    sent = {int(record.body.split()[0]) for record in log_records(directory) if record.kind == RecordKind.MESSAGE}
    assert len(left) == len(set(left)) == 100
    assert set(left) < sent == set(range(300))


def test_a_clean_stop_leaves_a_snapshot_and_nothing_to_replay_before_it(directory: Path) -> None:
    with running(directory) as broker, broker.producer("p") as producer:
        for number in range(100):
            producer.send(Message("orders", b"%d" % number))
        wait_word(broker, "dispatched", broker.region.get("tail"))
        wait_until(lambda: len(broker.region.workers()) == 5, "all workers")
    kinds = [RecordKind(record.kind) for record in log_records(directory)]
    begin = len(kinds) - kinds[::-1].index(RecordKind.SNAPSHOT_BEGIN) - 1
    assert kinds[begin:] == [RecordKind.SNAPSHOT_BEGIN, RecordKind.TOPIC, RecordKind.SNAPSHOT_END]
