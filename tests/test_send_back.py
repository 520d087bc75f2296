"""Retries and dead letters, as consumers of a real broker see them: what is copied, when it comes, where it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.consuming import ALL, asleep, bodies_of, drain, send
from support.failing import DEAD_LETTERS, GROUP, at_once, dead_letters
from support.producing import stopped_flusher
from support.running import QUICK, log_records, running, wait_word
from support.waiting import wait_until

from shmbroker import BadRequest, Message, ReceiptExpired, ReceivedMessage, RetryPolicy, SendStatus, SimpleConsumer
from shmbroker.broker import Broker
from shmbroker.errors import GroupNotExist
from shmbroker.record import RecordKind
from shmbroker.send_back import SendBack

SENT = Message("orders", b"poison", tags="paid", keys="order-42", properties={"trace": "t1"})


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with running(tmp_path / "broker", **QUICK) as opened:
        opened.create_topic("orders", queues=1)
        yield opened


def one(consumer: SimpleConsumer, wait: float = 10.0) -> ReceivedMessage:
    (message,) = consumer.receive(1, wait=wait)
    return message


def test_a_retry_shows_its_origin_and_counts_its_deliveries(broker: Broker) -> None:
    broker.create_group(GROUP, at_once(5))
    with broker.producer("test") as producer, broker.simple_consumer(GROUP, {"orders": "paid"}) as consumer:
        sent = producer.send(SENT)
        send_back = SendBack(broker, consumer)
        for attempt in range(1, 4):
            message = one(consumer)
            assert (message.topic, message.message_id) == ("orders", sent.message_id)
            assert (message.tags, message.keys, message.body) == ("paid", "order-42", b"poison")
            assert message.properties["trace"] == "t1"
            assert message.delivery_attempt == attempt
            assert send_back.later(message, error=f"error {attempt}") is SendStatus.SEND_OK
        last = one(consumer)
        assert last.properties["RETRY_TOPIC"] == "orders"
        assert last.properties["ORIGIN_MESSAGE_ID"] == sent.message_id
        assert (last.properties["RETRY_FIRST_ERROR"], last.properties["RETRY_LAST_ERROR"]) == ("error 1", "error 3")
        consumer.ack(last)
        assert consumer.receive(1) == []
    assert dead_letters(broker) == []


def test_after_one_and_max_retries_deliveries_a_message_is_a_dead_letter(broker: Broker) -> None:
    broker.create_group(GROUP, at_once(2))
    with broker.producer("test") as producer, broker.simple_consumer(GROUP, ALL) as consumer:
        sent = producer.send(SENT)
        send_back = SendBack(broker, consumer)
        for attempt in range(1, 4):
            assert dead_letters(broker) == []
            send_back.later(one(consumer), error=f"error {attempt}")
        assert consumer.receive(1) == []
    (dead,) = dead_letters(broker)
    assert (dead.body, dead.tags, dead.keys, dead.message_id) == (b"poison", "paid", "order-42", sent.message_id)
    assert dead.attempts == 3
    assert dead.properties == {
        "trace": "t1", "RETRY_TOPIC": "orders", "ORIGIN_MESSAGE_ID": sent.message_id, "DLQ_ORIGIN_TOPIC": "orders",
        "DLQ_ORIGIN_MESSAGE_ID": sent.message_id, "RETRY_FIRST_ERROR": "error 1", "RETRY_LAST_ERROR": "error 3",
    }  # fmt: skip


@pytest.mark.parametrize(("level", "seconds"), [(0, 10.0), (1, 1.0), (5, 60.0), (18, 7200.0), (30, 7200.0)])
def test_a_retry_that_has_to_wait_is_a_timer_with_all_of_the_message(
    level: int, seconds: float, broker: Broker
) -> None:
    with broker.producer("test") as producer, broker.simple_consumer(GROUP, ALL) as consumer:
        sent = producer.send(SENT)
        before = time.time()
        SendBack(broker, consumer).later(one(consumer), level=level, error="later")
        after = time.time()
    tail = broker.region.get("tail")
    wait_word(broker, "flushed", tail)
    (timer,) = (record for record in log_records(broker.directory, tail) if record.kind == RecordKind.TIMER)
    (retries,) = (known for known in broker.topics() if known["name"] == "%RETRY%audit")
    assert before + seconds <= timer.queue_offset / 1e9 <= after + seconds
    assert (timer.topic_id, timer.queue_id, timer.attempts) == (retries["topic_id"], 0, 1)
    assert (timer.message_id, timer.body, timer.tags, timer.keys) == (sent.message_id, b"poison", "paid", "order-42")
    assert timer.properties["RETRY_TOPIC"] == "orders"
    assert retries["queues"][0]["next_offset"] == 0


def test_a_retry_comes_when_its_time_has_come_and_not_before(broker: Broker) -> None:
    broker.create_group(GROUP, RetryPolicy("exponential", 3, initial=0.3, multiplier=2.0))
    with broker.producer("test") as producer, broker.simple_consumer(GROUP, ALL) as consumer:
        sent = producer.send(SENT)
        send_back = SendBack(broker, consumer)
        message = one(consumer)
        for attempt, delay in ((2, 0.3), (3, 0.6)):
            start = time.time()
            send_back.later(message, error="later")
            message = one(consumer)
            assert time.time() - start >= delay
            assert (message.delivery_attempt, message.message_id, message.body) == (attempt, sent.message_id, b"poison")
        consumer.ack(message)
    assert dead_letters(broker) == []


def test_level_minus_one_is_a_dead_letter_at_once(broker: Broker) -> None:
    with broker.simple_consumer(GROUP, ALL) as consumer:
        send(broker, b"hopeless")
        SendBack(broker, consumer).later(one(consumer), level=-1, error="no such customer")
        assert consumer.receive(1) == []
    (dead,) = dead_letters(broker)
    assert (dead.body, dead.attempts, dead.properties["RETRY_LAST_ERROR"]) == (b"hopeless", 1, "no such customer")


def test_a_level_below_minus_one_is_refused_and_nothing_happens(broker: Broker) -> None:
    with broker.simple_consumer(GROUP, ALL) as consumer:
        send(broker, b"1")
        message = one(consumer)
        with pytest.raises(BadRequest, match="level = -2"):
            SendBack(broker, consumer).later(message, level=-2)
        consumer.ack(message)


def test_an_error_text_is_bounded_and_harmless(broker: Broker) -> None:
    with broker.simple_consumer(GROUP, ALL) as consumer:
        send(broker, b"1")
        SendBack(broker, consumer).later(one(consumer), level=-1, error="a\x01b\x02" + "é" * 2000)
    (dead,) = dead_letters(broker)
    assert dead.properties["RETRY_LAST_ERROR"] == "a b " + "é" * 496


def test_what_has_been_taken_over_is_not_moved(broker: Broker) -> None:
    with broker.simple_consumer(GROUP, ALL) as consumer:
        send(broker, b"1")
        (late,) = consumer.receive(1, invisible=0.001)
        wait_until(lambda: bodies_of(consumer.receive(1)) == [b"1"], "the claim over and taken again")
        with pytest.raises(ReceiptExpired):
            SendBack(broker, consumer).later(late)
        acked = consumer.receive(1)
        assert acked == []
    assert dead_letters(broker) == []


def test_the_retry_comes_from_a_group_that_filters_tags_and_began_at_the_last(broker: Broker) -> None:
    send(broker, b"older", tags="paid")
    broker.create_group(GROUP, at_once(5))
    with broker.simple_consumer(GROUP, {"orders": "paid"}, consume_from="last") as consumer:
        send(broker, b"wanted", tags="paid")
        send(broker, b"unwanted", tags="refunded")
        SendBack(broker, consumer).later(one(consumer))
        assert drain(consumer, 1) == [b"wanted"]
        assert consumer.receive(1) == []


def test_a_sleeping_member_is_woken_by_the_groups_first_retry(broker: Broker) -> None:
    from support.processes import Child

    broker.create_group(GROUP, at_once(5))
    sleeper = """
        import sys, shmbroker
        consumer = shmbroker.open(sys.argv[1]).simple_consumer("audit", {"orders": "*"})
        print("ready")
        (message,) = consumer.receive(1, wait=30.0)
        print(message.body.decode(), message.delivery_attempt)
        consumer.ack(message)
    """
    with broker.simple_consumer(GROUP, ALL) as consumer:
        send(broker, b"1")
        message = one(consumer)
        with Child(sleeper, broker.directory) as child:
            assert child.read_line() == "ready"
            wait_until(lambda: asleep(broker), "a sleeping member")
            start = time.monotonic()
            SendBack(broker, consumer).later(message)
            assert child.read_line() == "1 2"
            assert time.monotonic() - start < 5.0
            assert child.wait() == 0


def test_a_message_may_bring_its_own_policy(broker: Broker) -> None:
    with broker.producer("test") as producer, broker.simple_consumer(GROUP, ALL) as consumer:
        producer.send(Message("orders", b"own", retry=at_once(1)))
        send_back = SendBack(broker, consumer)
        send_back.later(one(consumer))
        send_back.later(one(consumer))
        assert consumer.receive(1) == []
    (dead,) = dead_letters(broker)
    assert (dead.body, dead.attempts) == (b"own", 2)


def test_a_dead_letter_is_new_to_whoever_consumes_it(broker: Broker) -> None:
    """Its deliveries to the group that failed are no deliveries to this one."""
    broker.create_group(GROUP, at_once(0))
    with broker.simple_consumer(GROUP, ALL) as consumer:
        send(broker, b"1")
        SendBack(broker, consumer).later(one(consumer))
    broker.create_group("ops", at_once(1))
    with broker.simple_consumer("ops", {DEAD_LETTERS: "*"}) as consumer:
        for attempt in (1, 2):
            message = one(consumer)
            assert (message.topic, message.delivery_attempt) == (DEAD_LETTERS, attempt)
            SendBack(broker, consumer).later(message)
        assert consumer.receive(1) == []
    (dead,) = dead_letters(broker, "ops")
    assert dead.properties["DLQ_ORIGIN_TOPIC"] == DEAD_LETTERS


def test_deliveries_that_timed_out_count_and_the_receiver_buries_what_is_spent(broker: Broker) -> None:
    broker.create_group(GROUP, at_once(2))
    with broker.simple_consumer(GROUP, ALL) as consumer:
        send(broker, b"poison", b"sound")
        deliveries: list[bytes] = []
        while not dead_letters(broker):
            for message in consumer.receive(2, wait=0.01, invisible=0.02):
                deliveries.append(message.body)
                if message.body == b"sound":
                    consumer.ack(message)
        assert sorted(deliveries) == [b"poison"] * 3 + [b"sound"]
        assert consumer.receive(1, wait=0.1) == []
    (dead,) = dead_letters(broker)
    assert (dead.body, dead.attempts) == (b"poison", 3)


def test_the_policy_of_a_group_is_set_and_read_by_its_live_members(broker: Broker) -> None:
    with broker.simple_consumer(GROUP, ALL) as consumer:
        send_back = SendBack(broker, consumer)
        send(broker, b"1")
        message = one(consumer)
        assert send_back.policy(message) == RetryPolicy()
        broker.set_retry(GROUP, RetryPolicy("exponential", 3))
        assert send_back.policy(message) == RetryPolicy("exponential", 3)
        broker.set_retry(GROUP, None)
        assert send_back.policy(message) == RetryPolicy()


def test_a_group_is_made_with_its_policy_once(broker: Broker) -> None:
    broker.create_group(GROUP, at_once(1))
    broker.create_group(GROUP, at_once(1))
    with pytest.raises(BadRequest, match="1 retries after 0s: set its retry policy instead"):
        broker.create_group(GROUP, at_once(2))
    with pytest.raises(GroupNotExist):
        broker.set_retry("nobody", at_once(1))


def test_a_group_made_again_begins_with_the_default_policy(broker: Broker) -> None:
    broker.create_group(GROUP, at_once(1))
    broker.delete_group(GROUP)
    broker.create_group(GROUP)
    assert broker.region.retry_text(GROUP) == ""


def test_under_sync_flush_a_move_tells_whether_it_is_on_the_disk(tmp_path: Path) -> None:
    settings = QUICK | {"flush_disk_type": "SYNC_FLUSH", "sync_flush_timeout": 0.2, "visible_after": "append"}
    with running(tmp_path / "broker", **settings) as broker, broker.simple_consumer(GROUP, ALL) as consumer:
        broker.create_group("ops")
        send(broker, b"1", b"2")
        first, second = consumer.receive(2, wait=10.0)
        send_back = SendBack(broker, consumer)
        assert send_back.later(first, level=-1) is SendStatus.SEND_OK
        flushed = broker.region.get("flushed")
        assert flushed == broker.region.get("tail")
        with stopped_flusher(broker):
            assert send_back.later(second, level=-1) is SendStatus.FLUSH_DISK_TIMEOUT
            with pytest.raises(ReceiptExpired):
                consumer.ack(second)
        assert [record.body for record in dead_letters(broker)] == [b"1", b"2"]


def test_the_retries_of_a_deleted_group_go_with_it(broker: Broker) -> None:
    broker.create_group(GROUP, at_once(5))
    with broker.simple_consumer(GROUP, ALL) as consumer:
        send(broker, b"1", b"2")
        first, second = consumer.receive(2, wait=10.0)
        SendBack(broker, consumer).later(first)
        SendBack(broker, consumer).later(second, level=-1)
    broker.delete_group(GROUP)
    with broker.simple_consumer(GROUP, ALL, consume_from="last") as consumer:
        assert consumer.receive(1) == []
    with broker.dead_letters(GROUP) as letters:
        assert bodies_of(letters.receive(2)) == [b"2"]


def test_the_largest_message_that_can_be_sent_can_be_retried_and_buried(broker: Broker) -> None:
    body = bytes(range(256)) * (broker.config.layout.max_message_bytes // 256)
    body += b"x" * (broker.config.layout.max_message_bytes - len(body))
    broker.create_group(GROUP, RetryPolicy("table", 2, delays=(0.0, 0.05)))
    with broker.producer("test") as producer, broker.simple_consumer(GROUP, ALL) as consumer:
        producer.send(Message("orders", body))
        send_back = SendBack(broker, consumer)
        for attempt in (1, 2, 3):
            message = one(consumer)
            assert (message.delivery_attempt, message.body == body) == (attempt, True)
            send_back.later(message, error="é" * 500)
        assert consumer.receive(1) == []
    (dead,) = dead_letters(broker)
    assert (dead.attempts, dead.body == body) == (3, True)
