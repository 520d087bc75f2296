"""Orderly push consumers: one thread for each queue, and what becomes of a message that its listener refuses."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.consuming import ALL, bodies_of, drain, numbered, send
from support.listening import Gate, Heard, attempts, done_with, held
from support.orderly import DONE, SUSPEND, owners
from support.processes import SMALL
from support.waiting import DEADLINE, wait_until

import shmbroker
from shmbroker import (
    BadRequest,
    ConsumeContext,
    ConsumeStatus,
    Message,
    ReceivedMessage,
    RetryPolicy,
    SubscriptionConflict,
)
from shmbroker.broker import Broker

QUICK = {"orderly": True, "suspend_current_queue_time": 0.02}


@pytest.fixture
def four(broker: Broker) -> Broker:
    broker.create_topic("orders", queues=4)
    return broker


def test_orderly_consumption_each_queue_by_one_thread_in_its_order_and_queues_side_by_side(four: Broker) -> None:
    """Row 71."""
    heard: dict[int, list[int]] = defaultdict(list)
    running: Counter[int] = Counter()
    most: Counter[str] = Counter()
    lock = threading.Lock()
    together = threading.Barrier(4)

    def listen(message: ReceivedMessage, context: ConsumeContext) -> Any:
        queue = message.queue_id
        assert (context.topic, context.queue_id) == ("orders", queue)
        with lock:
            running[queue] += 1
            most["of one queue"] = max(most["of one queue"], running[queue])
        if int(message.body) < 4:
            together.wait(DEADLINE)  # each queue's first, all four at a time
        heard[queue].append(int(message.body))
        with lock:
            running[queue] -= 1
        return DONE

    with four.push_consumer("audit", listen, ALL, orderly=True), four.producer("test") as producer:
        for i in range(4000):
            producer.send(Message("orders", b"%d" % i), queue_id=i % 4)
        wait_until(lambda: done_with(four) == 4000, "everything acknowledged", deadline=30.0)
    assert heard == {queue: list(range(queue, 4000, 4)) for queue in range(4)}
    assert most["of one queue"] == 1


def test_messages_of_one_sharding_key_are_heard_in_the_order_in_which_they_were_sent(four: Broker) -> None:
    heard = Heard(lambda _messages, _context: DONE)
    keys = [f"order-{i}" for i in range(10)]
    with four.push_consumer("audit", heard, ALL, orderly=True), four.producer("test") as producer:
        for step in range(50):
            for key in keys:
                producer.send(Message("orders", f"{key} {step}".encode()), sharding_key=key)
        heard.wait(500)
    for key in keys:
        assert [body for body in heard.bodies if body.startswith(f"{key} ".encode())] == [
            f"{key} {step}".encode() for step in range(50)
        ]


def fail(_message: Any, _context: ConsumeContext) -> Any:
    raise ValueError("not now")


@pytest.mark.parametrize("answer", [lambda *_: SUSPEND, lambda *_: None, fail], ids=["suspend", "none", "exception"])
def test_orderly_failure_holds_the_queue_and_the_same_message_comes_again(four: Broker, answer: Any) -> None:
    """Row 73."""
    heard = Heard(lambda message, context: answer(message, context) if message.delivery_attempt < 4 else DONE)
    send(four, *numbered(3))
    send(four, b"elsewhere", queue_id=1)
    with four.push_consumer("audit", heard, ALL, **QUICK):
        wait_until(lambda: done_with(four) == 4, "everything acknowledged")
    of_queue_0 = [(body, attempt) for body, attempt in heard.attempts if body != b"elsewhere"]
    assert of_queue_0 == [(b"%d" % i, attempt) for i in range(3) for attempt in (1, 2, 3, 4)]
    assert all(not topic["name"].startswith("%RETRY%") for topic in four.topics())


def test_a_queue_is_held_for_as_long_as_the_listener_says_and_the_others_are_not(four: Broker) -> None:
    began: list[tuple[bytes, float]] = []

    def listen(message: ReceivedMessage, context: ConsumeContext) -> Any:
        began.append((message.body, time.monotonic()))
        assert context.suspend_current_queue_time == 0.02
        context.suspend_current_queue_time = 0.3
        return SUSPEND if message.body == b"0" and message.delivery_attempt == 1 else DONE

    send(four, *numbered(2))
    with four.push_consumer("audit", listen, ALL, **QUICK):
        wait_until(lambda: began, "refused")
        send(four, b"elsewhere", queue_id=1)
        wait_until(lambda: done_with(four) == 3, "everything acknowledged")
    assert [body for body, _ in began] == [b"0", b"elsewhere", b"0", b"1"]
    assert 0.3 <= began[2][1] - began[0][1] < 1.0


def test_orderly_max_a_message_is_a_dead_letter_after_its_last_delivery_and_the_queue_goes_on(four: Broker) -> None:
    """Row 74; the group's retry policy says how many deliveries there are, 17 by default."""
    heard = Heard(lambda message, _context: SUSPEND if message.body == b"bad" else DONE)
    send(four, b"first", b"bad", b"last")
    with four.push_consumer("audit", heard, ALL, orderly=True, suspend_current_queue_time=0.01):
        wait_until(lambda: done_with(four) == 3, "everything done with")
    assert heard.attempts == [(b"first", 1), *((b"bad", n) for n in range(1, 18)), (b"last", 1)]
    with four.simple_consumer("undertaker", {"%DLQ%audit": "*"}) as consumer:
        (letter,) = consumer.receive(10, wait=10.0)
        assert (letter.body, letter.properties["DLQ_ORIGIN_TOPIC"]) == (b"bad", "orders")
        consumer.ack(letter)


def test_attempts_survive_the_owner_and_a_listener_may_give_up_at_once(four: Broker) -> None:
    four.create_group("audit", RetryPolicy("table", max_retries=3, delays=(0.0,)))
    refuse = Heard(lambda *_: SUSPEND)
    send(four, *numbered(2))
    for _ in range(2):
        before = len(refuse.bodies)
        with four.push_consumer("audit", refuse, ALL, orderly=True, suspend_current_queue_time=30.0):
            refuse.wait(before + 1)
            wait_until(lambda: held(four) == 1 and not refuse.running, "the queue held")
    assert attempts(four) == {0: 2}

    def give_up(_message: ReceivedMessage, context: ConsumeContext) -> Any:
        context.delay_level_when_next_consume = -1
        return SUSPEND

    with four.push_consumer("audit", Heard(give_up), ALL, **QUICK):
        wait_until(lambda: done_with(four) == 2, "both given up")
    with four.dead_letters("audit") as letters:
        assert bodies_of(letters.receive(10)) == numbered(2)


def test_a_list_is_refused_or_acknowledged_from_its_beginning_on(four: Broker) -> None:
    def listen(messages: list[ReceivedMessage], context: ConsumeContext) -> Any:
        assert len({message.queue_id for message in messages}) == 1
        if messages[0].body == b"0" and messages[0].delivery_attempt == 1:
            return SUSPEND
        context.ack_index = 1  # the others come again
        return DONE

    send(four, *numbered(5))
    heard = Heard(listen)
    with four.push_consumer("audit", heard, ALL, consume_message_batch_max_size=3, **QUICK):
        wait_until(lambda: done_with(four) == 5, "everything acknowledged")
    assert heard.calls == [numbered(3), numbered(3), numbered(3, 2), numbered(1, 4)]


def test_what_waits_behind_a_refused_message_was_not_delivered(four: Broker) -> None:
    send(four, *numbered(10))
    heard = Heard(lambda *_: SUSPEND)
    with four.push_consumer("audit", heard, ALL, orderly=True, suspend_current_queue_time=30.0):
        heard.wait(1)
        wait_until(lambda: held(four) == 1, "the rest given back")
        assert attempts(four) == {0: 1}
    assert heard.attempts == [(b"0", 1)]


def test_filtered_messages_are_passed_over_in_order(four: Broker) -> None:
    with four.producer("test") as producer:
        for i in range(100):
            producer.send(Message("orders", b"%d" % i, tags="odd" if i % 2 else "even"), queue_id=0)
    heard = Heard(lambda *_: DONE)
    with four.push_consumer("audit", heard, {"orders": "odd"}, orderly=True):
        wait_until(lambda: done_with(four) == 100, "everything done with")
    assert heard.bodies == [b"%d" % i for i in range(1, 100, 2)]


def test_an_owner_that_lags_reads_from_the_files_in_order(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker:
        bodies = [b"%d " % i + b"x" * 2000 for i in range(1500)]  # three rings
        send(broker, *bodies)
        heard = Heard(lambda *_: DONE)
        with broker.push_consumer("audit", heard, ALL, orderly=True):
            assert heard.wait(1500) == bodies


@pytest.mark.parametrize("order", [True, False])
def test_a_group_is_consumed_in_order_by_all_its_members_or_by_none(four: Broker, order: bool) -> None:
    def answer(*_: object) -> Any:
        return DONE if order else ConsumeStatus.CONSUME_SUCCESS

    with four.push_consumer("audit", answer, ALL, orderly=order):
        with pytest.raises(SubscriptionConflict, match="orderly=True"):
            four.push_consumer("audit", answer, ALL, orderly=not order)
        if order:
            with pytest.raises(SubscriptionConflict, match="orderly=True"):
                four.simple_consumer("audit", ALL)
    with four.push_consumer("audit", answer, ALL, orderly=not order):
        pass


def test_a_group_that_was_consumed_side_by_side_goes_on_in_order(four: Broker) -> None:
    """What was acknowledged out of order is not delivered again; what had gone to the overflow table comes first."""
    send(four, *numbered(200))
    with four.simple_consumer("audit", ALL) as consumer:
        kept = consumer.receive(3, invisible=600.0)
        assert drain(consumer, 150) == numbered(150, 3)  # the window has 64 places
        assert [message.queue_offset for message in kept] == [0, 1, 2]
    heard = Heard(lambda *_: DONE)
    with four.push_consumer("audit", heard, ALL, orderly=True):
        assert heard.wait(50) == [*numbered(3), *numbered(47, 153)]
    assert attempts(four) == {}


def test_a_paused_owner_leaves_its_queues_to_others(four: Broker) -> None:
    heard, other = Heard(lambda *_: DONE), Heard(lambda *_: DONE)
    with four.push_consumer("audit", heard, ALL, orderly=True) as consumer:
        wait_until(lambda: len(owners(four)) == 4, "all queues owned")
        consumer.pause()
        assert owners(four) == {}
        with shmbroker.open(four.directory) as second, second.push_consumer("audit", other, ALL, orderly=True):
            send(four, *numbered(10))
            assert other.wait(10) == numbered(10)
            consumer.resume()
            wait_until(lambda: len(set(slots_of(four))) == 2, "shared again")
        send(four, *numbered(10, 10))
        assert heard.wait(10) == numbered(10, 10)


def slots_of(broker: Broker) -> list[int]:
    return [table["owner"] for table in broker.region.progress() if table["owner"] is not None]


def test_a_queue_whose_listener_still_runs_stays_with_its_process_when_the_consumer_leaves(four: Broker) -> None:
    gate = Gate(DONE)
    heard, other = Heard(gate), Heard(lambda *_: DONE)
    consumer = four.push_consumer("audit", heard, ALL, orderly=True)
    send(four, *numbered(5))
    heard.wait(1)
    assert consumer.shutdown(0.0) is False
    with shmbroker.open(four.directory) as second, second.push_consumer("audit", other, ALL, orderly=True):
        send(four, b"elsewhere", queue_id=1)
        assert other.wait(1) == [b"elsewhere"]
        assert heard.running == 1
        gate.let_go()
        assert other.wait(6)[1:] == numbered(5)
    assert dict(other.attempts)[b"0"] == 2  # the late answer was refused
    assert consumer.late == 1


def test_an_answer_that_is_none_of_the_two_is_said(four: Broker, caplog: pytest.LogCaptureFixture) -> None:
    answers: Iterator[Any] = iter([ConsumeStatus.CONSUME_SUCCESS, DONE])
    send(four, b"0")
    with caplog.at_level(logging.ERROR), four.push_consumer("audit", lambda *_: next(answers), ALL, **QUICK):
        wait_until(lambda: done_with(four) == 1, "acknowledged")
    assert "it must return a ConsumeOrderlyStatus; taken for SUSPEND_CURRENT_QUEUE_A_MOMENT" in caplog.text


@pytest.mark.parametrize("seconds", [0.0, 31.0, float("nan")])
def test_the_time_that_a_queue_is_held_has_limits(four: Broker, seconds: float) -> None:
    with pytest.raises(BadRequest, match="suspend_current_queue_time"):
        four.push_consumer("audit", lambda *_: DONE, ALL, orderly=True, suspend_current_queue_time=seconds)
