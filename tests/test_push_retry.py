"""What a push consumer's failures become, row by row of RocketMQ's: retries, their delays and their end in the DLQ."""

from __future__ import annotations

import errno
import time
from typing import Any

import pytest
from support.consuming import ALL, numbered, send
from support.failing import at_once
from support.listening import LATER, SUCCESS, Gate, Heard, done_with, held
from support.waiting import wait_until

from shmbroker import ConsumeContext, ReceivedMessage, RetryPolicy
from shmbroker.broker import Broker

DLQ = {"%DLQ%audit": "*"}


def dead_letters(broker: Broker, count: int) -> list[ReceivedMessage]:
    """The first ``count`` of the group's dead letters; there must not be more."""
    wait_until(lambda: any(topic["name"] == "%DLQ%audit" for topic in broker.topics()), "a dead-letter topic")
    with broker.simple_consumer("undertaker", DLQ) as consumer:
        found: list[ReceivedMessage] = []
        while len(found) < count:
            received = consumer.receive(32, wait=10.0)
            assert received, f"only {len(found)} of {count} dead letters"
            consumer.ack(received)
            found += received
        assert consumer.receive(32, wait=0.0) == []
    return found


def fail(_message: Any, _context: ConsumeContext) -> Any:
    raise ValueError("no such order")


@pytest.mark.parametrize("answer", [lambda *_: LATER, lambda *_: None, fail], ids=["later", "none", "exception"])
def test_retry_request_a_failed_message_comes_again_with_its_attempts_counted(broker: Broker, answer: Any) -> None:
    broker.create_group("audit", at_once())
    heard = Heard(lambda message, context: answer(message, context) if message.delivery_attempt < 4 else SUCCESS)
    with broker.push_consumer("audit", heard, ALL):
        send(broker, b"work", b"more")
        heard.wait(8)
        wait_until(lambda: held(broker) == 0 and done_with(broker) == 2, "everything acknowledged")
    assert sorted(heard.attempts) == sorted((body, n) for body in (b"work", b"more") for n in (1, 2, 3, 4))


def test_a_retried_message_shows_its_origin(broker: Broker) -> None:
    broker.create_group("audit", at_once())
    seen: list[tuple[str, str, bytes]] = []

    def listen(message: ReceivedMessage, _context: ConsumeContext) -> Any:
        seen.append((message.topic, message.message_id, message.body))
        return LATER if len(seen) == 1 else SUCCESS

    with broker.push_consumer("audit", listen, ALL):
        send(broker, b"work")
        wait_until(lambda: len(seen) == 2, "tried again")
    assert seen[0] == seen[1]


def test_retry_count_limit_after_its_retries_a_message_is_a_dead_letter_with_its_provenance(broker: Broker) -> None:
    broker.create_group("audit", at_once())
    heard = Heard(fail)
    with broker.push_consumer("audit", heard, ALL):
        send(broker, b"hopeless")
        heard.wait(17)
        (dead,) = dead_letters(broker, 1)
    assert heard.attempts == [(b"hopeless", n) for n in range(1, 18)]
    assert dead.body == b"hopeless"
    assert dead.properties["DLQ_ORIGIN_TOPIC"] == "orders"
    assert "ValueError: no such order" in "".join(dead.properties.values())


def test_retry_delay_follows_the_groups_policy(broker: Broker) -> None:
    broker.create_group("audit", RetryPolicy("table", delays=(0.2, 0.5)))
    times: list[float] = []

    def listen(_message: ReceivedMessage, _context: ConsumeContext) -> Any:
        times.append(time.monotonic())
        return LATER if len(times) < 3 else SUCCESS

    with broker.push_consumer("audit", listen, ALL):
        send(broker, b"work")
        wait_until(lambda: len(times) == 3, "two retries")
    first, second = times[1] - times[0], times[2] - times[1]
    assert 0.2 <= first < 2.0
    assert 0.5 <= second < 2.0


def test_caller_chosen_retry_delay_is_that_level_and_minus_one_the_dead_letters_at_once(broker: Broker) -> None:
    broker.create_group("audit", at_once())
    times: list[float] = []

    def listen(message: ReceivedMessage, context: ConsumeContext) -> Any:
        if message.body == b"never":
            context.delay_level_when_next_consume = -1
            return LATER
        times.append(time.monotonic())
        context.delay_level_when_next_consume = 1  # a second
        return LATER if len(times) == 1 else SUCCESS

    heard = Heard(listen)
    with broker.push_consumer("audit", heard, ALL):
        send(broker, b"never", b"later")
        (dead,) = dead_letters(broker, 1)
        wait_until(lambda: len(times) == 2, "tried again")
    assert 1.0 <= times[1] - times[0] < 3.0
    assert (dead.body, heard.bodies.count(b"never")) == (b"never", 1)


def test_partial_batch_ack_what_stands_behind_the_ack_index_comes_again(broker: Broker) -> None:
    broker.create_group("audit", at_once())

    def listen(_messages: list[ReceivedMessage], context: ConsumeContext) -> Any:
        if len(heard.calls) == 1:
            context.ack_index = 1
        return SUCCESS

    heard = Heard(listen)
    send(broker, *numbered(5))
    with broker.push_consumer("audit", heard, ALL, consume_message_batch_max_size=5, consume_thread_max=1):
        heard.wait(8)
        wait_until(lambda: held(broker) == 0, "everything acknowledged")
    assert heard.calls[0] == numbered(5)
    assert sorted(heard.attempts[5:]) == [(body, 2) for body in numbered(3, 2)]


def test_reconsume_later_fails_the_whole_batch_whatever_the_ack_index_says(broker: Broker) -> None:
    broker.create_group("audit", at_once())

    def listen(_messages: list[ReceivedMessage], context: ConsumeContext) -> Any:
        context.ack_index = 1
        return LATER if len(heard.calls) == 1 else SUCCESS

    heard = Heard(listen)
    send(broker, *numbered(3))
    with broker.push_consumer("audit", heard, ALL, consume_message_batch_max_size=3, consume_thread_max=1):
        heard.wait(6)
    assert heard.calls[0] == numbered(3)
    assert {(body, 2) for body in numbered(3)} <= set(heard.attempts)


def test_send_back_failure_nothing_is_acknowledged_and_the_message_comes_again_in_a_moment(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    broker.create_group("audit", at_once())
    gate = Gate(LATER)
    heard = Heard(lambda message, context: gate(message, context) if message.delivery_attempt == 1 else SUCCESS)
    with broker.push_consumer("audit", heard, ALL):
        send(broker, b"work")
        heard.wait(1)
        broker.region.publish_store_state(2, errno.EIO)  # read-only
        gate.let_go()
        wait_until(lambda: "could not be stored: StoreReadOnly" in caplog.text, "the failure told")
        assert (held(broker), done_with(broker)) == (1, 0)
        broker.region.publish_store_state(0, 0)
        assert heard.wait(2) == [b"work", b"work"]
        wait_until(lambda: done_with(broker) == 1, "acknowledged")
    assert heard.attempts == [(b"work", 1), (b"work", 2)]


def test_consume_timeout_counts_as_a_delivery_until_the_dead_letters(broker: Broker) -> None:
    broker.create_group("audit", at_once(2))
    gate = Gate()
    heard = Heard(gate)
    settings = {"consume_thread_max": 4, "consume_timeout": 0.2, "max_renewals": 0}
    with broker.push_consumer("audit", heard, ALL, **settings) as consumer:
        send(broker, b"slow")
        (dead,) = dead_letters(broker, 1)
        gate.let_go()
        wait_until(lambda: consumer.late == 3, "all late answers refused")
    assert heard.attempts == [(b"slow", n) for n in (1, 2, 3)]
    assert dead.body == b"slow"
