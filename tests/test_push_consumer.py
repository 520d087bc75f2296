"""PushConsumer, row by row of RocketMQ's concurrent listener: answers, batches, threads, prefetching, time-outs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from support.consuming import ALL, asleep, bodies_of, numbered, send
from support.listening import PUSHER, SUCCESS, Gate, Heard, attempts, done_with, held
from support.processes import SMALL, Child
from support.waiting import wait_until

import shmbroker
from shmbroker import ConsumeContext, Message, ReceivedMessage
from shmbroker.broker import Broker

# ---- what the listener answers ---------------------------------------------------------------------------------


def test_ack_success_what_succeeded_is_done_with_and_never_comes_again(broker: Broker) -> None:
    heard = Heard()
    with broker.push_consumer("audit", heard, ALL):
        send(broker, *numbered(200), queue_id=None)
        assert sorted(heard.wait(200)) == sorted(numbered(200))
        wait_until(lambda: done_with(broker) == 200, "everything acknowledged")
    with broker.simple_consumer("audit", ALL) as consumer:
        assert consumer.receive(10) == []
    assert {attempt for _, attempt in heard.attempts} == {1}


def test_what_a_listener_is_told(broker: Broker) -> None:
    told: list[tuple[Any, ...]] = []

    def listen(message: ReceivedMessage, context: ConsumeContext) -> Any:
        told.append((message.body, message.group, context.group, context.topic, context.queue_id))
        told.append((context.delay_level_when_next_consume, context.ack_index))
        return SUCCESS

    with broker.push_consumer("audit", listen, ALL):
        send(broker, b"work", queue_id=2)
        wait_until(lambda: len(told) == 2, "heard")
    assert told == [(b"work", "audit", "audit", "orders", 2), (0, 0x7FFFFFFF)]


@pytest.mark.parametrize("answer", [None, True, "CONSUME_SUCCESS", 0], ids=repr)
def test_retry_request_what_is_no_status_counts_as_a_failure_and_is_logged_once(
    broker: Broker, answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard(lambda _message, _context: answer)
    with broker.push_consumer("audit", heard, ALL):
        send(broker, b"work")
        heard.wait(1)
    logged = [record.getMessage() for record in caplog.records if record.name == "shmbroker.push_consumer"]
    assert len(logged) == 1
    assert f"the listener returned {answer!r}" in logged[0]
    assert "must return a ConsumeStatus" in logged[0]


def test_retry_request_an_exception_is_logged_once_with_its_traceback(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_message: ReceivedMessage, _context: ConsumeContext) -> Any:
        raise ValueError("no such order")

    heard = Heard(fail)
    with broker.push_consumer("audit", heard, ALL):
        send(broker, b"work")
        heard.wait(1)
    (record,) = [record for record in caplog.records if record.name == "shmbroker.push_consumer"]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)
    assert "audit" in record.getMessage()
    assert "orders[0] offset 0" in record.getMessage()


def test_a_listener_that_ends_its_thread_ends_only_that_delivery(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(message: ReceivedMessage, _context: ConsumeContext) -> Any:
        if message.body == b"0":
            raise SystemExit(3)
        return SUCCESS

    heard = Heard(leave)
    with broker.push_consumer("audit", heard, ALL, consume_thread_max=1):
        send(broker, *numbered(3))
        assert heard.wait(3) == numbered(3)
    assert "SystemExit" in caplog.text


# ---- batches ---------------------------------------------------------------------------------------------------


def test_batch_delivery_the_listener_gets_lists_of_one_queue_no_longer_than_asked_for(broker: Broker) -> None:
    queues: list[set[int]] = []

    def listen(messages: list[ReceivedMessage], context: ConsumeContext) -> Any:
        queues.append({message.queue_id for message in messages} | {context.queue_id})
        return SUCCESS

    heard = Heard(listen)
    for queue in range(3):
        send(broker, *numbered(10, 10 * queue), queue_id=queue)
    with broker.push_consumer("audit", heard, ALL, consume_message_batch_max_size=4, consume_thread_max=1):
        assert sorted(heard.wait(30)) == sorted(numbered(30))
        wait_until(lambda: done_with(broker) == 30, "everything acknowledged")
    assert max(map(len, heard.calls)) == 4
    assert {len(each) for each in queues} == {1}


def test_a_batch_of_one_is_still_a_list_if_lists_were_asked_for(broker: Broker) -> None:
    heard = Heard(lambda messages, _context: SUCCESS if isinstance(messages, list) else None)
    with broker.push_consumer("audit", heard, ALL, consume_message_batch_max_size=8):
        send(broker, b"alone")
        assert heard.wait(1) == [b"alone"]
        wait_until(lambda: done_with(broker) == 1, "acknowledged")


# ---- threads ---------------------------------------------------------------------------------------------------


def test_consumer_threads_as_many_listeners_run_at_a_time_as_were_asked_for(broker: Broker) -> None:
    gate = Gate()
    heard = Heard(gate)
    with broker.push_consumer("audit", heard, ALL, consume_thread_max=5):
        send(broker, *numbered(12))
        wait_until(lambda: heard.running == 5, "five listeners at work")
        gate.let_go()
        assert sorted(heard.wait(12)) == sorted(numbered(12))
    assert heard.most_running == 5
    assert len(heard.threads) == 5


# ---- prefetching -----------------------------------------------------------------------------------------------


def test_prefetch_flow_control_by_count_bounds_what_one_queue_has_under_way(broker: Broker) -> None:
    gate = Gate()
    heard = Heard(gate)
    send(broker, *numbered(50))
    with broker.push_consumer("audit", heard, ALL, consume_thread_max=2, pull_threshold_for_queue=3):
        wait_until(lambda: heard.running == 2, "two at work")
        wait_until(lambda: held(broker) == 3, "three claimed")
        with broker.simple_consumer("audit", ALL) as other:
            assert other.receive(1, wait=0.0)[0].body == b"3"
        gate.let_go()
        heard.wait(49)


def test_prefetch_flow_control_by_bytes_bounds_what_is_claimed_at_a_time(broker: Broker) -> None:
    gate = Gate()
    heard = Heard(gate)
    send(broker, *[b"%03d" % i + bytes(1000) for i in range(20)])
    with broker.push_consumer("audit", heard, ALL, consume_thread_max=1, pull_batch_size_in_bytes=4000):
        wait_until(lambda: heard.running == 1, "at work")
        assert held(broker) == 4  # the last one begins below the limit
        gate.let_go()
        assert len(heard.wait(20)) == 20


def test_what_is_prefetched_is_no_delivery_and_an_idle_member_takes_it_over(broker: Broker) -> None:
    gate = Gate()
    heard = Heard(gate)
    send(broker, *numbered(10))
    with broker.push_consumer("audit", heard, ALL, consume_thread_max=1):
        wait_until(lambda: heard.running == 1 and held(broker) == 10, "one at work, nine ahead")
        assert attempts(broker) == {0: 1}
        with broker.simple_consumer("audit", ALL) as idle:
            taken = idle.receive(4)
            assert bodies_of(taken) == numbered(4, 1)  # the oldest first
            assert {message.delivery_attempt for message in taken} == {1}
            idle.ack(taken)
            gate.let_go()
            wait_until(lambda: done_with(broker) == 10, "everything acknowledged")
    assert heard.bodies == [b"0", *numbered(5, 5)]


def test_what_a_busy_process_has_prefetched_other_processes_work_on(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker, Child(PUSHER, directory) as other:
        assert other.read_line() == "ready"
        wait_until(lambda: asleep(broker), "the other asleep")
        gate = Gate()
        heard = Heard(gate)
        with broker.push_consumer("audit", heard, ALL, consume_thread_max=1):
            send(broker, *numbered(10))
            wait_until(lambda: done_with(broker) >= 9, "all but what runs here done by the other")
            other.write_line("end")
            said = []
            while (line := other.read_line()) != "ended True":
                said.append(line.split())
            gate.let_go()
            wait_until(lambda: done_with(broker) == 10, "everything acknowledged")
        assert sorted([*(int(body) for _, body, _ in said), *map(int, heard.bodies)]) == list(range(10))
        assert {attempt for *_, attempt in said} == {"1"}


# ---- waiting ---------------------------------------------------------------------------------------------------


def test_long_polling_a_message_is_heard_at_once_by_who_sleeps_for_it(broker: Broker) -> None:
    heard = Heard()
    with broker.push_consumer("audit", heard, ALL), broker.producer("test") as producer:
        for number in range(20):
            wait_until(lambda: asleep(broker), "asleep")
            sent = time.monotonic()
            producer.send(Message("orders", b"%d" % number))
            heard.wait(number + 1)
            assert time.monotonic() - sent < 0.25  # less than any wait of its own


# ---- the time that a listener has ------------------------------------------------------------------------------


def test_consume_timeout_a_listener_that_overruns_loses_the_claim_then_and_its_late_answer_is_refused(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    heard = Heard(gate)
    send(broker, b"slow")
    with broker.push_consumer(
        "audit", heard, ALL, consume_timeout=0.3, max_renewals=0, consume_thread_max=1
    ) as consumer:
        heard.wait(1)
        begun = time.monotonic()
        with broker.simple_consumer("audit", ALL) as other:
            (again,) = other.receive(1, wait=10.0)
            assert 0.1 < time.monotonic() - begun < 0.6
            assert (again.body, again.delivery_attempt) == (b"slow", 2)
            gate.let_go()
            wait_until(lambda: consumer.late == 1, "the late answer refused")
            assert held(broker) == 1  # the other's
            other.ack(again)
    assert "refused: its time was over" in caplog.text


def test_a_listener_keeps_its_message_as_long_as_it_is_renewed_and_no_longer(broker: Broker) -> None:
    gate = Gate()
    heard = Heard(gate)
    send(broker, b"slow")
    with broker.push_consumer(
        "audit", heard, ALL, consume_timeout=0.3, max_renewals=3, consume_thread_max=1
    ) as consumer:
        heard.wait(1)
        begun = time.monotonic()
        with broker.simple_consumer("audit", ALL) as other:
            (again,) = other.receive(1, wait=10.0)
            assert 0.7 < time.monotonic() - begun < 1.4  # 0.3 s and three times about 0.2 more
            assert again.delivery_attempt == 2
            other.ack(again)
        gate.let_go()
        wait_until(lambda: consumer.late == 1, "the late answer refused")


def test_an_answer_within_renewed_time_counts(broker: Broker) -> None:
    gate = Gate()
    heard = Heard(gate)
    send(broker, *numbered(3))
    with broker.push_consumer(
        "audit", heard, ALL, consume_timeout=0.1, max_renewals=None, consume_message_batch_max_size=3
    ) as consumer:
        heard.wait(3)
        with broker.simple_consumer("audit", ALL) as other:
            assert other.receive(1, wait=0.5) == []
        gate.let_go()
        wait_until(lambda: done_with(broker) == 3, "acknowledged")
        assert consumer.late == 0
    assert heard.calls == [numbered(3)]


def test_an_unexpected_keyword_is_named_with_those_that_there_are(broker: Broker) -> None:
    unknown: dict[str, Any] = {"threads": 2}
    with pytest.raises(TypeError) as refused:
        broker.push_consumer("audit", Heard(), ALL, **unknown)
    text, known = str(refused.value).split("; there are ")
    assert text == "push_consumer() got an unexpected keyword argument 'threads'"
    assert {"consume_thread_max", "consume_from", "message_model", "member", "ack"} < {*known.split(", ")}
    assert broker.groups() == []
    broker.push_consumer("audit", Heard(), ALL, orderly=True, message_model="CLUSTERING").close()  # one that there is
