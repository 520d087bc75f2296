"""Damage that recovery has not met: dispatcher and consumers pass it over, loudly, and the broker serves the rest.

segment 0          segment 1                               snapshot       end
├─ records ────────┼─ damage ─┬─ records ──── ... ─────────┬──────────────┤
                              ▲ goes on here               ▲ a restart reads from here on
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any, Final

import pytest
from support.consuming import deliverable
from support.processes import Child, wait_gone
from support.running import log_records, running, starts_of, wait_restarted, wait_word, worker_pid
from support.system_calls import failing
from support.waiting import wait_until

import shmbroker
from shmbroker import Message, memory
from shmbroker.broker import Broker
from shmbroker.descriptor import read_descriptor
from shmbroker.naming import BrokerPaths
from shmbroker.record import Record, RecordKind
from shmbroker.store.checkpoint import CheckpointFile
from shmbroker.store.consume_queue import ConsumeQueues
from shmbroker.store.key_index import KeyIndex
from shmbroker.store.segment import SEGMENT_HEADER_BYTES

SEGMENT: Final = 1 << 20
COUNT: Final = 4000
SETTINGS: Final[dict[str, Any]] = {"snapshot_interval_bytes": 256 << 10, "claim_window": 8192, "overflow_claims": 8192}


def send_all(broker: Broker) -> None:
    with broker.producer("test") as producer:
        for number in range(COUNT):
            producer.send(Message("orders", b"%d " % number + bytes(1000), keys=f"k{number}"))


def damage(directory: Path, records: list[Record], first: int, count: int) -> set[int]:
    """Zeros over the messages from position ``first`` on, ``count`` of them. Returns their numbers."""
    victims = [record for record in records if record.position >= first][:count]
    assert all(record.kind == RecordKind.MESSAGE for record in victims)
    assert victims[0].position == first
    with (BrokerPaths(directory).log / f"{first - first % SEGMENT:020d}").open("r+b") as file:
        file.seek(SEGMENT_HEADER_BYTES + first % SEGMENT)
        file.write(bytes(victims[-1].position + victims[-1].padded - first))
    return {int(record.body.split()[0]) for record in victims}


def let_the_dispatcher_lag(broker: Broker) -> tuple[int, int]:
    """Stop it before all messages are sent and on the disk. Its pid, and the log's end."""
    dispatcher = worker_pid(broker, "dispatcher")
    os.kill(dispatcher, signal.SIGSTOP)
    send_all(broker)
    end = broker.region.get("tail")
    wait_word(broker, "flushed", end)
    return dispatcher, end


def stopped_cleanly(directory: Path) -> bool:
    wait_gone(directory)
    checkpoint = CheckpointFile(BrokerPaths(directory).checkpoint).read()
    return checkpoint is not None and checkpoint.clean and read_descriptor(BrokerPaths(directory)) is None


def is_damage_named(broker: Broker, position: int) -> bool:
    return any(f"damaged at position {position}:" in finding for finding in broker.status()["findings"])


@pytest.mark.parametrize("index", ["as it was", "to be made anew"])
def test_a_damaged_old_segment_stops_neither_the_dispatcher_nor_a_clean_stop(tmp_path: Path, index: str) -> None:
    directory = tmp_path / "b"
    with running(directory, **SETTINGS) as broker:
        send_all(broker)
    assert stopped_cleanly(directory)
    swallowed = damage(directory, log_records(directory), SEGMENT, 1)
    paths = BrokerPaths(directory)
    if index == "to be made anew":
        shutil.rmtree(paths.index)
    with running(directory, **SETTINGS) as broker:
        if index == "to be made anew":
            wait_until(lambda: is_damage_named(broker, SEGMENT), "status names the damage")
        wait_word(broker, "indexed", broker.region.get("tail"))
        numbers, damages = deliverable(broker, "audit")
        assert numbers == set(range(COUNT)) - swallowed
        assert {error.position for error in damages} == {SEGMENT}
        assert is_damage_named(broker, SEGMENT), "by whoever met it first"
        with broker.producer("test") as producer:
            producer.send(Message("orders", b"4000"))
        assert deliverable(broker, "audit")[0] == {COUNT}
        assert starts_of(broker, "dispatcher") == 1
    assert stopped_cleanly(directory)
    checkpoint = CheckpointFile(paths.checkpoint).read()
    assert checkpoint is not None
    made = KeyIndex(paths.index, checkpoint.store)
    assert made.position == checkpoint.flushed
    assert [len(made.by_key(1, f"k{number}", 10)) for number in (0, COUNT - 1)] == [1, 1]
    made.close()


@pytest.mark.crash
def test_what_the_disk_loses_before_the_dispatcher_has_it_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    """The dispatcher lags behind the ring: for the damaged messages it has no entry in the consume queues."""
    directory = tmp_path / "b"
    with running(directory, **SETTINGS) as broker:
        dispatcher, end = let_the_dispatcher_lag(broker)
        swallowed = damage(directory, log_records(directory, end), SEGMENT, 10)
        os.kill(dispatcher, signal.SIGCONT)
        wait_word(broker, "dispatched", end)
        wait_until(lambda: is_damage_named(broker, SEGMENT), "status names the damage")
        assert deliverable(broker, "audit")[0] == set(range(COUNT)) - swallowed
        assert starts_of(broker, "dispatcher") == 1
    assert stopped_cleanly(directory)
    with running(directory, **SETTINGS) as broker:  # with nothing in memory that knows where they were
        numbers, damages = deliverable(broker, "second")
        assert numbers == set(range(COUNT)) - swallowed
        assert damages
        assert all(SEGMENT <= (error.position or 0) < SEGMENT + 10 * 1200 for error in damages)
        queues = ConsumeQueues(BrokerPaths(directory).queues, log_store(directory))
        entries = [queues.read(1, queue_id, 0, COUNT, 1 << 62) for queue_id in range(4)]
        assert [[entry.offset for entry in queue] for queue in entries] == [[*range(COUNT // 4)]] * 4, "no holes"
        queues.close()


@pytest.mark.crash
def test_a_block_that_the_disk_cannot_read_is_damage_to_the_dispatcher_and_no_reason_to_die(tmp_path: Path) -> None:
    directory = tmp_path / "b"
    with running(directory, **SETTINGS) as broker:
        dispatcher, end = let_the_dispatcher_lag(broker)
        with failing("preadv,preadv2:error=EIO:when=1..20", dispatcher, tmp_path / "calls"):
            os.kill(dispatcher, signal.SIGCONT)
            wait_word(broker, "dispatched", end)
        assert (tmp_path / "calls").read_text().count("EIO") == 20
        assert broker.status()["damaged_at"] is not None
        assert starts_of(broker, "dispatcher") == 1
        assert deliverable(broker, "audit") == (set(range(COUNT)), []), "the index in memory knows where they are"
    assert stopped_cleanly(directory)
    with running(directory, **SETTINGS) as broker:
        numbers, damages = deliverable(broker, "second")
        assert len(numbers) >= COUNT - 1, "what could not be read is one record, of a message or of the broker's own"
        assert len({error.position for error in damages}) == COUNT - len(numbers)


@pytest.mark.crash
def test_a_block_that_the_disk_cannot_read_keeps_its_neighbours_from_no_consumer(tmp_path: Path) -> None:
    source = """
        import sys, shmbroker
        broker = shmbroker.open(sys.argv[1])
        consumer = broker.simple_consumer("audit", {"orders": "*"})
        print("ready")
        sys.stdin.readline()
        numbers, refused = [], 0
        while True:
            try:
                messages = consumer.receive(100)
            except shmbroker.CorruptLog as error:
                refused += "Input/output error" in str(error)
                break
            if not messages:
                break
            consumer.ack(messages)
            numbers += [int(message.body.split()[0]) for message in messages]
        print(len(set(numbers)), refused)
    """
    directory = tmp_path / "b"
    with running(directory, **SETTINGS) as broker:
        send_all(broker)
        wait_word(broker, "dispatched", broker.region.get("tail"))
        with Child(source, directory) as child:
            assert child.read_line() == "ready"
            segment = BrokerPaths(directory).log / f"{SEGMENT:020d}"
            reads = "preadv,preadv2:error=EIO pread64:error=EIO:when=2+"  # all but the segment's header
            with failing(reads, child.pid, tmp_path / "calls", segment):
                child.write_line()
                received, refused = map(int, child.read_line().split())
        records = log_records(directory, broker.region.get("flushed"))
        unreadable = sum(SEGMENT <= record.position < 2 * SEGMENT for record in records)
        assert refused == 1
        assert COUNT - unreadable <= received < COUNT, "all but what lies where it cannot be read"
        assert broker.status()["damaged_at"] is not None


def test_a_damaged_file_of_the_consume_queues_is_waited_with_and_the_log_is_stopped_whole(tmp_path: Path) -> None:
    directory = tmp_path / "b"
    with running(directory) as broker, broker.producer("test") as producer:
        producer.send(Message("orders", b"1"), queue_id=0)
        end = broker.region.get("tail")
        wait_word(broker, "dispatched", end)
        file = next((BrokerPaths(directory).queues / "1" / "0").iterdir())
        with file.open("r+b") as opened:
            opened.write(b"\xff" * 64)
        os.kill(worker_pid(broker, "dispatcher"), signal.SIGKILL)
        wait_restarted(broker, "dispatcher")
        producer.send(Message("orders", b"2"), queue_id=0)
        assert deliverable(broker, "audit") == ({1, 2}, [])
        assert starts_of(broker, "dispatcher") == 2
    wait_gone(directory)
    assert memory.attach(BrokerPaths(directory)) is None
    with pytest.raises(shmbroker.CorruptLog, match=r"queues/.*log rebuild"):
        shmbroker.open(directory)


def log_store(directory: Path) -> bytes:
    checkpoint = CheckpointFile(BrokerPaths(directory).checkpoint).read()
    assert checkpoint is not None
    return checkpoint.store
