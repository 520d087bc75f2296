"""One SimpleConsumer against a real broker: what arrives, what is filtered, what is refused."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from random import Random

import pytest
from support.consuming import ALL, asleep, bodies_of, drain, numbered, send
from support.processes import SMALL, Child
from support.waiting import DEADLINE, assert_in_time, wait_until

import shmbroker
from shmbroker import Message
from shmbroker._native._core import decode_record, encode_record
from shmbroker.broker import Broker
from shmbroker.record import RecordKind
from shmbroker.subscription import format_subscription, parse_tags

# ---- one consumer ----------------------------------------------------------------------------------------------


def test_a_message_arrives_with_all_that_was_sent(broker: Broker) -> None:
    before = time.time_ns()
    with broker.producer("test") as producer:
        sent = producer.send(
            Message("orders", b"\0body\xff", tags="paid", keys=["k-1", "k-2"], properties={"colour": "blå"})
        )
    with broker.simple_consumer("audit", ALL) as consumer:
        (message,) = consumer.receive(wait=5.0)
        assert (message.topic, message.group) == ("orders", "audit")
        assert (message.queue_id, message.queue_offset) == (sent.queue_id, sent.queue_offset)
        assert (message.position, message.message_id) == (sent.position, sent.message_id)
        assert (message.tags, message.keys, message.properties) == ("paid", "k-1 k-2", {"colour": "blå"})
        assert (message.body, message.delivery_attempt) == (b"\0body\xff", 1)
        assert before <= message.born_timestamp * 1e9 + 1000 <= time.time_ns() + 2000  # a float has no ns


def test_the_messages_of_a_queue_come_once_each_and_in_order(broker: Broker) -> None:
    send(broker, *numbered(500))
    with broker.simple_consumer("audit", ALL) as consumer:
        assert drain(consumer, 500) == numbered(500)
        assert consumer.receive(100) == []


def test_every_queue_has_its_turn(broker: Broker) -> None:
    broker.create_topic("orders", queues=4)
    for queue in range(4):
        send(broker, *numbered(20), queue_id=queue)
    with broker.simple_consumer("audit", ALL) as consumer:
        assert {consumer.receive()[0].queue_id for _ in range(4)} == {0, 1, 2, 3}


def test_queues_added_later_are_received_from(broker: Broker) -> None:
    broker.create_topic("orders", queues=1)
    with broker.simple_consumer("audit", ALL) as consumer:
        assert consumer.receive() == []
        broker.alter_topic("orders", queues=3)
        send(broker, b"new", queue_id=2)
        assert bodies_of(consumer.receive(wait=5.0)) == [b"new"]


def test_a_new_group_begins_at_the_first_message_or_behind_the_last_as_asked(broker: Broker) -> None:
    broker.create_topic("orders", queues=1)
    send(broker, *numbered(5))
    with (
        broker.simple_consumer("all", ALL) as first,
        broker.simple_consumer("news", ALL, consume_from="last") as last,
    ):
        send(broker, b"later")
        assert bodies_of(first.receive(100)) == [*numbered(5), b"later"]
        assert bodies_of(last.receive(100)) == [b"later"]


@pytest.mark.parametrize("spin", [False, True])
def test_a_waiting_consumer_is_woken_by_a_send(broker: Broker, spin: bool) -> None:
    broker.create_topic("orders", queues=1)
    with broker.simple_consumer("audit", ALL, spin=spin) as consumer:

        def attempt() -> float:
            found: list[tuple[list[bytes], float]] = []

            def wait() -> None:
                bodies = bodies_of(consumer.receive(wait=20.0))
                found.append((bodies, time.monotonic()))

            thread = threading.Thread(target=wait)
            thread.start()
            if not spin:
                wait_until(lambda: asleep(broker), "the consumer asleep")
            sent = time.monotonic()
            send(broker, b"wake up")
            thread.join(DEADLINE)
            assert found[0][0] == [b"wake up"]
            return found[0][1] - sent

        assert_in_time(attempt, 1.0)


def test_receive_waits_as_long_as_it_was_told_and_no_longer(broker: Broker) -> None:
    with broker.simple_consumer("audit", ALL) as consumer:

        def attempt() -> float:
            begun = time.monotonic()
            assert consumer.receive(wait=0.25) == []
            took = time.monotonic() - begun
            assert took >= 0.25
            return took

        assert_in_time(attempt, 1.0)


def test_ctrl_c_ends_a_long_wait(directory: Path) -> None:
    source = """
        import sys, shmbroker
        with shmbroker.open(sys.argv[1]) as broker, broker.simple_consumer("audit", {"orders": "*"}) as consumer:
            try:
                consumer.receive(wait=600.0)
            except KeyboardInterrupt:
                print("interrupted")
    """
    with shmbroker.open(directory, **SMALL) as broker, Child(source, directory) as child:
        wait_until(lambda: asleep(broker), "the consumer asleep")
        os.kill(child.pid, signal.SIGINT)
        assert child.read_line() == "interrupted"
        assert child.wait() == 0


# ---- filters ---------------------------------------------------------------------------------------------------


def test_only_messages_with_a_subscribed_tag_are_delivered(broker: Broker) -> None:
    for i in range(300):
        send(broker, b"%d" % i, tags=("paid", "open", "refunded")[i % 3])
    send(broker, b"untagged")
    with broker.simple_consumer("audit", {"orders": "paid || refunded"}) as consumer:
        assert drain(consumer, 200) == [b"%d" % i for i in range(300) if i % 3 != 1]
        assert consumer.receive(100) == []
    (table,) = [table for table in broker.region.progress() if table["queue_id"] == 0]
    assert (table["base"], table["delivered"]) == (301, 200)


def test_tags_with_the_same_hash_are_told_apart(broker: Broker) -> None:
    random, seen = Random(20261121), dict[int, str]()
    while True:  # two of a hundred thousand random tags have the same 32 bits
        alike = f"{random.getrandbits(64):016x}"
        raw = encode_record(position=0, epoch=1, flushed=0, kind=RecordKind.MESSAGE, body=b"", tags=alike)
        wanted = seen.setdefault(decode_record(raw).tag_hash, alike)
        if wanted != alike:
            break
    send(broker, b"alike", tags=alike)
    send(broker, b"wanted", tags=wanted)
    with broker.simple_consumer("audit", {"orders": wanted}) as consumer:
        assert drain(consumer, 1) == [b"wanted"]
        assert consumer.receive(10) == []


@pytest.mark.parametrize(
    ("expression", "tags"), [("*", None), ("", None), ("a", ("a",)), ("b || a", ("a", "b")), (" a||a ", ("a",))]
)
def test_tag_expressions(expression: str, tags: tuple[str, ...] | None) -> None:
    assert parse_tags(expression) == tags


@pytest.mark.parametrize("expression", ["a ||", "a || *", "a | b", "|| a"])
def test_what_is_no_tag_expression_is_refused(expression: str) -> None:
    with pytest.raises(shmbroker.BadRequest, match="tag expression"):
        parse_tags(expression)


def test_a_subscription_too_long_to_compare_is_refused() -> None:
    with pytest.raises(shmbroker.BadRequest, match="at most 2047"):
        format_subscription({"t" * 100 + str(i): None for i in range(20)})


# ---- refused ---------------------------------------------------------------------------------------------------


def test_after_a_fork_consumer_and_messages_are_the_parents(broker: Broker) -> None:
    send(broker, b"mine")
    with broker.simple_consumer("audit", ALL) as consumer:
        (message,) = consumer.receive()
        pid = os.fork()
        if pid == 0:
            refused = 0
            for use in (lambda: message.body, lambda: consumer.ack(message), consumer.receive):
                try:
                    use()
                except shmbroker.ForkedHandleError:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        consumer.ack(message)


def test_nonsense_is_refused(broker: Broker) -> None:
    with broker.simple_consumer("audit", ALL) as consumer:
        for bad in (
            {"max_messages": 0},
            {"wait": -1.0},
            {"wait": float("nan")},
            {"invisible": 0.0},
            {"invisible": 43201.0},
        ):
            with pytest.raises(shmbroker.BadRequest):
                consumer.receive(**bad)
        with pytest.raises(TypeError):
            consumer.ack([b"no message"])  # type: ignore[list-item]
    with pytest.raises(shmbroker.BadRequest, match="at least one topic"):
        broker.simple_consumer("audit", {})
    with pytest.raises(shmbroker.BadRequest, match="consume_from"):
        broker.simple_consumer("audit", ALL, consume_from="yesterday")
    with pytest.raises(shmbroker.NameIllegal):
        broker.simple_consumer("audit", {"no topic": "*"})


def test_a_topic_without_the_read_permission_is_not_consumed(broker: Broker) -> None:
    broker.create_topic("orders", queues=1, permission=2)
    with pytest.raises(shmbroker.NoPermission):
        broker.simple_consumer("audit", ALL)


def test_a_closed_consumer_says_so(broker: Broker) -> None:
    send(broker, b"left")
    consumer = broker.simple_consumer("audit", ALL)
    (message,) = consumer.receive()
    consumer.close()
    consumer.close()
    for use in (consumer.receive, lambda: consumer.ack(message)):
        with pytest.raises(shmbroker.BrokerClosed, match="closed"):
            use()


def test_a_deleted_topic_takes_its_receipts_with_it(broker: Broker) -> None:
    send(broker, b"gone")
    with broker.simple_consumer("audit", ALL) as consumer:
        (message,) = consumer.receive()
        broker.delete_topic("orders")
        for use in (consumer.ack, lambda held: consumer.change_invisible_duration(held, 1.0)):
            with pytest.raises(shmbroker.ReceiptExpired):
                use(message)
        assert consumer.receive() == []
        send(broker, b"of the new topic")
        (again,) = consumer.receive(wait=5.0)
        assert (again.topic, again.queue_offset, again.body) == ("orders", 0, b"of the new topic")
