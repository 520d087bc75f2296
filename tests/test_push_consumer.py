"""PushConsumer, by the rows of RocketMQ's concurrent listener: answers, batches, threads, prefetching, time-outs, its life."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import served
from support.consuming import ALL, asleep, bodies_of, numbered, send
from support.listening import PUSHER, SUCCESS, Gate, Heard
from support.processes import SMALL, Child
from support.waiting import DEADLINE, wait_until

import shmbroker
from shmbroker import ConsumeContext, Message, ReceivedMessage
from shmbroker.broker import Broker


def done_with(broker: Broker, group: str = "audit") -> int:
    """How many messages of the topic the group is done with."""
    tables = [table for table in broker.region.progress() if table["group"] == group and table["topic"] == "orders"]
    return sum(table["base"] + sum(count for _, count in table["acked"]) for table in tables)


def held(broker: Broker) -> int:
    return sum(int(table["held"]) for table in broker.region.progress())


def attempts(broker: Broker) -> dict[int, int]:
    """Offset of queue 0 to deliveries counted."""
    return next(table["attempts"] for table in broker.region.progress() if table["queue_id"] == 0)


def handled_signals(pid: int) -> set[int]:
    """Signals that a process has handlers for."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = int(next(line.split()[1] for line in lines if line.startswith("SigCgt:")), 16)
    return {number for number in range(1, 65) if caught >> (number - 1) & 1}


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
    with broker.push_consumer("audit", heard, ALL, consume_timeout=0.3, max_renewals=3, consume_thread_max=1) as consumer:
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


# ---- its life --------------------------------------------------------------------------------------------------


def test_a_paused_consumer_begins_nothing_and_gives_back_what_it_had_prefetched(broker: Broker) -> None:
    gate = Gate()
    heard = Heard(gate)
    send(broker, *numbered(8))
    with broker.push_consumer("audit", heard, ALL, consume_thread_max=1) as consumer:
        wait_until(lambda: held(broker) == 8, "prefetched")
        consumer.pause()
        assert consumer.paused
        gate.let_go()
        wait_until(lambda: held(broker) == 0, "the rest given back")
        assert heard.bodies == [b"0"]
        with broker.simple_consumer("audit", ALL) as other:
            (message,) = other.receive(1)
            assert (message.body, message.delivery_attempt) == (b"1", 1)
            other.ack(message)
        consumer.resume()
        assert heard.wait(7) == [b"0", *numbered(6, 2)]


def test_shutdown_finishes_what_runs_and_gives_back_the_rest_uncounted(broker: Broker) -> None:
    gate = Gate()
    heard = Heard(gate)
    send(broker, *numbered(8))
    consumer = broker.push_consumer("audit", heard, ALL, consume_thread_max=2)
    wait_until(lambda: heard.running == 2, "two at work")
    ended: list[bool] = []
    ending = threading.Thread(target=lambda: ended.append(consumer.shutdown()))
    ending.start()
    wait_until(lambda: held(broker) == 2, "the rest given back")
    gate.let_go()
    ending.join(10.0)
    assert ended == [True]
    done = heard.bodies
    assert len(done) == 2
    with broker.simple_consumer("audit", ALL) as other:
        rest = other.receive(10)
        assert sorted([*done, *bodies_of(rest)]) == numbered(8)
        assert {message.delivery_attempt for message in rest} == {1}
        other.ack(rest)


def test_what_outlasts_await_termination_goes_to_others_and_its_answer_is_refused(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    heard = Heard(gate)
    send(broker, b"slow")
    consumer = broker.push_consumer("audit", heard, ALL, consume_thread_max=1, await_termination=0.1)
    heard.wait(1)
    assert consumer.shutdown() is False
    assert "1 listeners still run" in caplog.text
    with broker.simple_consumer("audit", ALL) as other:
        (again,) = other.receive(1)
        assert again.delivery_attempt == 2
        gate.let_go()
        wait_until(lambda: consumer.late == 1, "the late answer refused")
        other.ack(again)


def test_a_listener_may_shut_its_consumer_down(broker: Broker) -> None:
    consumers: list[shmbroker.PushConsumer] = []

    def listen(_message: ReceivedMessage, _context: ConsumeContext) -> Any:
        wait_until(lambda: consumers, "the consumer made")
        consumers[0].shutdown()
        return SUCCESS

    heard = Heard(listen)
    send(broker, *numbered(5))
    consumers.append(broker.push_consumer("audit", heard, ALL, consume_thread_max=1))
    heard.wait(1)
    wait_until(lambda: held(broker) == 0, "everything given back")
    with broker.simple_consumer("audit", ALL) as other:
        assert bodies_of(other.receive(10)) == numbered(5)


def test_a_broker_that_is_closed_ends_its_push_consumers_first(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker:
        producer = broker.producer("test")
        gate = Gate()

        def forward(message: ReceivedMessage, context: ConsumeContext) -> Any:
            gate(message, context)
            producer.send(Message("results", message.body))
            return SUCCESS

        heard = Heard(forward)
        broker.push_consumer("audit", heard, ALL)
        send(broker, b"work")
        heard.wait(1)
        threading.Timer(0.2, gate.let_go).start()
    with shmbroker.open(directory, **SMALL) as broker, broker.simple_consumer("other", {"results": "*"}) as consumer:
        (message,) = consumer.receive(1, wait=10.0)
        assert message.body == b"work"
        assert done_with(broker) == 1


def test_what_makes_no_sense_is_refused_before_anything_runs(broker: Broker) -> None:
    before = threading.active_count()
    for wrong in (
        {"consume_thread_max": 0},
        {"consume_message_batch_max_size": 1025},
        {"pull_batch_size": 1.5},
        {"consume_timeout": 0.0},
        {"max_renewals": -1},
        {"await_termination": -1.0},
        {"spin": True},
        {"ack": "somehow"},
    ):
        with pytest.raises(shmbroker.BadRequest, match=next(iter(wrong))):
            broker.push_consumer("audit", Heard(), ALL, **wrong)
    with pytest.raises(shmbroker.BadRequest, match="listener"):
        broker.push_consumer("audit", None, ALL)  # type: ignore[arg-type]
    assert threading.active_count() == before
    assert all(group["members"] == [] for group in broker.region.groups())


def test_a_broker_that_is_stopped_and_started_again_is_found_again(directory: Path) -> None:
    heard = Heard()
    directory.mkdir()
    (directory / "broker.toml").write_text(served.SETTINGS)
    first = served.start(directory, "serve")
    wait_until(lambda: served.runs(directory), "the broker runs")
    with shmbroker.open(directory) as broker:
        consumer = broker.push_consumer("audit", heard, ALL)
        send(broker, b"before")
        heard.wait(1)
        wait_until(lambda: done_with(broker) == 1, "acknowledged")
        first.terminate()
        assert first.wait(DEADLINE) == 0
        second = served.start(directory, "serve")
        send(broker, b"after")
        assert heard.wait(2) == [b"before", b"after"]
        wait_until(lambda: done_with(broker) == 2, "acknowledged")
        assert consumer.error is None
    second.terminate()
    assert second.wait(DEADLINE) == 0


def test_a_consumer_whose_broker_is_gone_for_good_says_so(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker:
        consumer = broker.push_consumer("audit", Heard(), ALL)
        broker._closed = True  # as close does it, but for its consumers
        broker._attached.close()
        with pytest.raises(shmbroker.BrokerClosed, match="closed"):
            consumer.run()
        broker._closed = False


def test_a_program_that_only_consumes_ends_at_sigterm_when_its_listeners_have(directory: Path) -> None:
    program = """
        import sys, shmbroker
        def handle(message, context):
            print("began", flush=True)
            sys.stdin.readline()
            return shmbroker.ConsumeStatus.CONSUME_SUCCESS
        with shmbroker.open(sys.argv[1]) as broker:
            print(broker.push_consumer("audit", handle, {"orders": "*"}, consume_thread_max=1).run())
    """
    with shmbroker.open(directory, **SMALL) as broker, Child(program, directory) as child:
        send(broker, *numbered(3))
        assert child.read_line() == "began"
        wait_until(lambda: signal.SIGTERM in handled_signals(child.pid), "the program ready for the signal")
        os.kill(child.pid, signal.SIGTERM)
        wait_until(lambda: held(broker) == 1, "the rest given back")
        child.write_line()
        assert child.read_line() == "True"
        assert child.wait() == 0
        assert done_with(broker) == 1
        assert attempts(broker) == {}
