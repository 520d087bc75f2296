"""Consumers in trouble: rotten records, a stopping broker, queues that come later, handles that are forgotten."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import struct
import threading
from pathlib import Path

import pytest
from support.consuming import ALL, CONSUMER, asleep, bodies_of, drain, numbered, send
from support.processes import SMALL, Child, stop_broker, wait_for_workers
from support.running import QUICK, lose_memory, running, wait_word
from support.waiting import wait_until

import shmbroker
from shmbroker import BrokerClosed, CorruptLog, LimitReached, Message, SimpleConsumer
from shmbroker.broker import Broker
from shmbroker.descriptor import read_descriptor
from shmbroker.janitor import is_stopped
from shmbroker.naming import BrokerPaths, segment_name
from shmbroker.store.segment import SEGMENT_HEADER_BYTES

DRAINING = 3  # enum sb_state
RUNNING = 2


def test_one_rotten_record_holds_neither_its_neighbours_nor_other_queues_up(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker, broker.producer("test") as producer:
        broker.create_topic("orders", queues=2)
        results = [producer.send(Message("orders", body), queue_id=0) for body in numbered(40)]
        producer.send(Message("orders", b"beside"), queue_id=1).confirm()
    stop_broker(directory)
    rotten = results[20].position
    with (directory / "log" / segment_name(0)).open("r+b") as file:  # a bit of its body
        file.seek(SEGMENT_HEADER_BYTES + rotten + 81)
        file.write(b"\xff")
    with (
        shmbroker.open(directory, **SMALL) as broker,
        broker.simple_consumer("audit", ALL) as consumer,
    ):
        got: list[bytes] = []
        while len(got) < 40:
            messages = consumer.receive(16, wait=10.0)
            got += bodies_of(messages)
            consumer.ack(messages)
        assert sorted(got) == sorted([*numbered(20), *numbered(19, first=21), b"beside"])
        with pytest.raises(CorruptLog, match=str(rotten)):
            consumer.receive(16)
        assert consumer.receive(16) == [], "the rotten one is claimed: said once in its invisible time"


def test_an_acknowledgement_that_a_stopping_broker_may_not_record_is_not_called_done(broker: Broker) -> None:
    send(broker, *numbered(2))
    with broker.simple_consumer("audit", ALL) as consumer:
        first, second = consumer.receive(2, wait=10.0)
        consumer.ack(first)
        broker.region.set("state", DRAINING)
        try:
            with pytest.raises(BrokerClosed, match="delivers the message again"):
                consumer.ack(second)
        finally:
            broker.region.set("state", RUNNING)


def test_a_group_that_began_at_the_last_message_misses_nothing_in_queues_added_later(broker: Broker) -> None:
    broker.create_topic("orders", queues=1)
    send(broker, *numbered(3))
    with broker.simple_consumer("audit", ALL, consume_from="last") as consumer:
        assert consumer.receive(8) == []
        broker.alter_topic("orders", queues=2)
        send(broker, b"later", queue_id=1)  # before the consumer has seen the new queue
        send(broker, b"again", queue_id=0)
        assert sorted(drain(consumer, 2)) == [b"again", b"later"]


def test_a_consumer_that_was_dropped_without_close_is_no_member_any_more(broker: Broker) -> None:
    send(broker, *numbered(1), tags="paid")
    consumer = broker.simple_consumer("audit", {"orders": "paid"})
    del consumer
    gc.collect()
    with broker.simple_consumer("audit", {"orders": "refunded"}) as other:
        assert other.receive(1) == []


def test_more_threads_may_wait_for_messages_than_there_are_wait_slots(directory: Path) -> None:
    got: list[list[bytes]] = []
    with shmbroker.open(directory, **{**SMALL, "max_waiters": 2}) as broker:
        broker.create_topic("orders", queues=1)
        consumers = [broker.simple_consumer("audit", ALL) for _ in range(6)]

        def consume(consumer: shmbroker.SimpleConsumer) -> None:
            got.append(drain(consumer, 1))

        threads = [threading.Thread(target=consume, args=(consumer,)) for consumer in consumers]
        for thread in threads:
            thread.start()
        wait_until(lambda: asleep(broker), "somebody waits")
        send(broker, *numbered(6))
        for thread in threads:
            thread.join(20.0)
        assert sorted(got) == [[body] for body in numbered(6)]
        for consumer in consumers:
            consumer.close()


def test_a_consumer_for_whose_queues_there_is_no_room_is_refused_when_it_is_made(directory: Path) -> None:
    with shmbroker.open(directory, **{**SMALL, "claim_tables": 5}) as broker:
        broker.create_topic("orders", queues=4)
        with broker.simple_consumer("audit", ALL):
            with pytest.raises(LimitReached, match=r"'billing' cannot consume orders\[0\], .* claim_tables = 5"):
                broker.simple_consumer("billing", ALL)
            assert {queue["group"] for queue in broker.region.progress()} == {"audit"}, "nothing is kept for the other"


def test_queues_without_a_claim_table_keep_no_group_from_the_others_and_are_named(directory: Path) -> None:
    with shmbroker.open(directory, **{**SMALL, "claim_tables": 6}) as broker:
        wait_for_workers(directory)
        broker.create_topic("orders", queues=4)
        broker.create_topic("spare", queues=2)
        with broker.simple_consumer("audit", ALL) as consumer, broker.simple_consumer("idle", {"spare": "*"}):
            broker.alter_topic("orders", queues=6)
            send(broker, b"old", queue_id=3)
            assert drain(consumer, 1) == [b"old"]
            assert consumer.receive(1) == [], "nothing waits in the queues that cannot be consumed"
            assert broker.status()["findings"] == []
            send(broker, b"new", queue_id=5)
            send(broker, b"old", queue_id=3)
            assert drain(consumer, 1) == [b"old"]
            with pytest.raises(LimitReached, match=r"'audit' cannot consume orders\[5\]: .* claim_tables = 6"):
                consumer.receive(1, wait=10.0)
            (finding,) = broker.status()["findings"]
            assert finding.startswith("group 'audit' cannot consume orders[5], where messages wait")
        with broker.simple_consumer("audit", ALL) as consumer:  # as the program does when it is started again
            send(broker, b"more", queue_id=0)
            assert drain(consumer, 1) == [b"more"]
            broker.delete_group("idle")
            assert drain(consumer, 1) == [b"new"], "with a table of the group that was deleted"
            assert broker.status()["findings"] == []


def test_a_lagging_consumer_reads_every_message_in_order_from_the_files(directory: Path) -> None:
    bodies = [b"%06d" % i + bytes(i % 700) for i in range(6000)]  # several times the ring
    with running(directory) as broker:
        broker.create_topic("orders", queues=1)
        send(broker, *bodies)
        with broker.simple_consumer("audit", ALL) as consumer:
            assert drain(consumer, len(bodies)) == bodies


SENDER = """
    import sys, shmbroker
    from shmbroker import Message
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    broker.create_topic("orders", queues=1)
    with broker.producer("test") as producer:
        for number in range(500):
            producer.send(Message("orders", b"%d" % number))
    print("sent")
    sys.stdin.read()
"""


def test_what_only_the_files_have_is_read_after_the_memory_was_lost(directory: Path) -> None:
    with Child(SENDER, directory, QUICK | {"flush_disk_type": "SYNC_FLUSH"}) as child:
        assert child.read_line() == "sent"
        lose_memory(directory)
    with running(directory) as broker, broker.simple_consumer("audit", ALL) as consumer:
        send(broker, b"new")
        assert drain(consumer, 501) == [*numbered(500), b"new"]
        assert consumer.receive(1, wait=0.0) == []


class Interrupted(SimpleConsumer):
    """The third time that it reads a record or a window from the files, Ctrl-C comes or the read fails."""

    def __init__(self, broker: Broker, where: str, failure: str) -> None:
        super().__init__(broker, "audit", ALL)
        self._where, self._failure, self._left = where, failure, 3

    def _may_fail(self, here: str) -> None:
        self._left -= here == self._where
        if self._left == 0 and here == self._where:
            if self._failure == "Ctrl-C":
                signal.raise_signal(signal.SIGINT)
            raise OSError("no more descriptors")

    def _read_window(self, position: int) -> bytes:
        self._may_fail("window")
        return b"" if self._where == "record" else super()._read_window(position)  # as of a larger record

    def _read_at(self, position: int) -> bytes | None:
        self._may_fail("record")
        return super()._read_at(position)


@pytest.mark.parametrize("where", ["window", "record"])
@pytest.mark.parametrize(("failure", "raised"), [("Ctrl-C", KeyboardInterrupt), ("OSError", OSError)])
def test_a_receive_that_is_interrupted_gives_back_all_that_it_had_claimed(
    directory: Path, where: str, failure: str, raised: type[BaseException]
) -> None:
    bodies = [b"%06d" % i + bytes(2000) for i in range(2000)]  # several times the ring, and windows
    with running(directory, claim_window=2048) as broker:
        broker.create_topic("orders", queues=1)
        send(broker, *bodies)
        with Interrupted(broker, where, failure) as consumer:
            with pytest.raises(raised):
                consumer.receive(2000, invisible=3600.0)
            assert [table["held"] for table in broker.region.progress()] == [0]
            got = consumer.receive(2000)
            assert bodies_of(got) == bodies
            assert {message.delivery_attempt for message in got} == {1}, "nobody had them before"


def test_an_index_that_makes_no_sense_keeps_a_consumer_neither_from_messages_nor_from_signals(
    directory: Path,
) -> None:
    """The chain of a queue's index leads nowhere: the files have what it should have led to."""
    with running(directory) as broker:
        broker.create_topic("orders", queues=1)
        send(broker, *numbered(5))
        wait_word(broker, "dispatched", broker.region.get("tail"))
        descriptor = read_descriptor(BrokerPaths(directory))
        assert descriptor is not None
        with (
            Path(f"/dev/shm/{descriptor.control}").open("r+b") as control,
            mmap.mmap(control.fileno(), 0) as memory,
        ):
            (queues_at,) = struct.unpack_from("<Q", memory, 256 + 12 * 4 + 4 * 8)  # sb_limits, behind the header
            struct.pack_into("<Q", memory, queues_at + 2 * 8, 0xDEADBEEF)  # sb_queue.oldest_block
        with Child(CONSUMER, directory) as consumer:
            assert consumer.read_line() == "ready"
            consumer.write_line("ack 5")
            assert consumer.read_line().split() == ["0", "1", "2", "3", "4"]


STALLED = """
    import sys, shmbroker
    broker = shmbroker.open(sys.argv[1])
    consumer = broker.simple_consumer("audit", {"orders": sys.argv[2]})
    print(len(consumer.receive(10)))
"""


@pytest.mark.crash
@pytest.mark.parametrize("tags", ["paid", "*"])
def test_a_consumer_that_was_stopped_while_its_topic_was_deleted_touches_no_message_of_another(
    directory: Path, tags: str
) -> None:
    """Its claim table and its queue serve another group and topic when it goes on."""
    with running(directory) as broker:
        broker.create_topic("orders", queues=1)
        send(broker, *numbered(5), tags="refunded")
        with Child(STALLED, directory, tags, environment={"SHMBROKER_FAILPOINTS": "client/claim.chosen=stop"}) as child:
            wait_until(lambda: is_stopped(child.pid), "the consumer stopped before its first claim")
            (before,) = broker.region.progress()
            broker.delete_topic("orders")
            broker.create_topic("invoices", queues=1)
            with (
                broker.simple_consumer("billing", {"invoices": "*"}) as consumer,
                broker.producer("test") as producer,
            ):
                producer.send_batch([Message("invoices", body) for body in numbered(5)])
                assert [table["table"] for table in broker.region.progress()] == [before["table"]]
                os.kill(child.pid, signal.SIGCONT)
                assert child.read_line() == "0"
                assert drain(consumer, 5) == numbered(5)
