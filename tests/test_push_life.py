"""The life of a push consumer: pause, shutdown, signals, what ends it and what does not."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from support import served
from support.consuming import ALL, bodies_of, numbered, send
from support.listening import SUCCESS, Gate, Heard, attempts, done_with, held
from support.processes import SMALL, Child
from support.waiting import DEADLINE, wait_until

import shmbroker
from shmbroker import ConsumeContext, Message, ReceivedMessage
from shmbroker.broker import Broker


def handled_signals(pid: int) -> set[int]:
    """Signals that a process has handlers for."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = int(next(line.split()[1] for line in lines if line.startswith("SigCgt:")), 16)
    return {number for number in range(1, 65) if caught >> (number - 1) & 1}


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


def test_what_outlasts_the_end_goes_back_although_the_process_has_other_consumers_in_the_group(broker: Broker) -> None:
    gate = Gate()
    heard = Heard(gate)
    send(broker, b"slow", b"slower")
    with broker.simple_consumer("audit", ALL) as other:
        settings = {"consume_thread_max": 1, "consume_message_batch_max_size": 2}
        consumer = broker.push_consumer("audit", heard, ALL, **settings)
        heard.wait(2)
        assert consumer.shutdown(await_termination=0.0) is False
        again = other.receive(2)
        assert {message.body: message.delivery_attempt for message in again} == {b"slow": 2, b"slower": 2}
        gate.let_go()
        wait_until(lambda: consumer.late == 2, "the late answers refused")
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
    for name in ("consume_timeout", "await_termination", "suspend_current_queue_time"):
        times: dict[str, Any] = {name: "5"}
        with pytest.raises(TypeError, match=f"{name} must be seconds, as a float or an int, not str"):
            broker.push_consumer("audit", Heard(), ALL, **times)
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
