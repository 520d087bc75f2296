"""Asynchronous sends on a real broker: who is told, when, in which order, and whoever closes the producer meanwhile."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator

import pytest
from support.processes import Child
from support.producing import Told, a_send_waits, bodies_of, count_of, fill_ring, records_of, stopped_flusher
from support.running import QUICK, room_of, running
from support.waiting import wait_until

from shmbroker import BadRequest, Broker, BrokerBusy, Message, SendResult, SendStatus, completion

numbers = itertools.count()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One broker for all tests here; each has a topic of its own."""
    settings = {**QUICK, "flush_interval": 0.02, "max_topics": 128, "max_queues": 512}
    with running(tmp_path_factory.mktemp("completion") / "broker", **settings) as opened:
        yield opened


@pytest.fixture
def topic(broker: Broker) -> str:
    name = f"topic-{next(numbers)}"
    broker.create_topic(name, queues=4)
    return name


def threads() -> int:
    return sum(thread.name == "shmbroker-callbacks" for thread in threading.enumerate())


def test_callbacks_are_told_in_the_order_of_the_sends(broker: Broker, topic: str) -> None:
    told = Told()
    with broker.producer("test") as producer:
        for number in range(200):
            producer.send_async(Message(topic, b"%d" % number), told)
    results = [outcome for outcome in told.outcomes if isinstance(outcome, SendResult)]
    records = records_of(broker, topic)
    assert [record.body for record in records] == [b"%d" % number for number in range(200)]
    assert [result.message_id for result in results] == [record.message_id for record in records]
    assert {result.status for result in results} == {SendStatus.SEND_OK}


def test_a_callback_that_could_not_be_told_is_refused_before_anything_is_sent(broker: Broker, topic: str) -> None:
    with broker.producer("test") as producer, pytest.raises(BadRequest, match="on_success and on_exception"):
        producer.send_async(Message(topic, b"1"), print)  # type: ignore[arg-type]
    assert records_of(broker, topic) == []


def test_what_was_not_stored_is_told_as_an_exception_in_its_turn(broker: Broker, topic: str) -> None:
    told, sent = Told(), list[bytes]()
    with broker.producer("test") as producer, stopped_flusher(broker):
        while room_of(broker) >= 60_080:  # the rest has room for small ones, the broker's own as well
            sent.append(b"%d " % len(sent) + b"x" * 10_000)
            producer.send(Message(topic, sent[-1]))
        producer.send_async(Message(topic, b"x" * 60_000), told, timeout=0.05)
        producer.send_async(Message(topic, b"small"), told, timeout=0.05)
        wait_until(lambda: len(told.outcomes) == 2, "both told")
    assert isinstance(told.outcomes[0], BrokerBusy)
    assert isinstance(told.outcomes[1], SendResult)
    assert bodies_of(broker, topic) == [*sent, b"small"]


def test_a_callback_that_raises_or_sends_silences_nobody(
    broker: Broker, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    told, again = Told(), Told()

    def fail() -> None:
        raise ZeroDivisionError

    with broker.producer("test") as producer:
        producer.send_async(Message(topic, b"raises"), Told(fail))
        producer.send_async(Message(topic, b"sends"), Told(lambda: producer.send_async(Message(topic, b"sent"), again)))
        producer.send_async(Message(topic, b"nobody is told"))
        producer.send_async(Message(topic, b"last"), told)
        wait_until(lambda: told.outcomes and again.outcomes, "all told")
    assert sorted(bodies_of(broker, topic)) == [b"last", b"nobody is told", b"raises", b"sends", b"sent"]
    assert "a send callback raised" in caplog.text


# ---- closing, and signals --------------------------------------------------------------------------------------------

# Sends until a signal's handler has run, then says what became of it all.
INTERRUPTED = """
    import signal, sys, shmbroker
    from shmbroker import Message
    broker = shmbroker.open(sys.argv[1])
    producer, topic, told, handled = broker.producer("test"), sys.argv[2], {True: 0, False: 0}, False

    class Told:
        def on_success(self, result): told[True] += 1
        def on_exception(self, error): told[False] += 1

    def handle(*_):
        global handled
        exec(sys.argv[3])
        handled = True
        print("handled")

    signal.signal(signal.SIGTERM, handle)
    try:
        while not handled:
            producer.send_async(Message(topic, b"x" * 40_000), Told(), timeout=30.0)
        producer.send_async(Message(topic, b"after the handler"), Told())
    except shmbroker.BrokerClosed as error:
        print(error)
    else:
        print("open")
    producer.close()
    print(told[True], told[False])
"""


@pytest.mark.parametrize(
    ("handler", "then", "failed"),
    [
        ("producer.close()", "this producer was closed", "0"),
        ("broker.close()", "this producer was closed", "0"),
        ("producer.send_async(Message(topic, bytes(40_000)), Told(), timeout=0.0)", "open", "1"),
    ],
)
def test_the_handler_of_a_signal_that_interrupts_a_send_may_close_or_send(
    broker: Broker, topic: str, handler: str, then: str, failed: str
) -> None:
    """The send goes on when the handler has returned, and its callback is called, too."""
    with Child(INTERRUPTED, broker.directory, topic, handler) as child:
        with stopped_flusher(broker):
            wait_until(lambda: a_send_waits(broker), "the send waiting for room")
            os.kill(child.pid, signal.SIGTERM)
            assert child.read_line() == "handled"
        assert child.read_line() == then
        assert child.read_line().split() == [str(count_of(broker, topic)), failed]
        assert child.wait() == 0


def test_who_closes_a_producer_waits_for_the_sends_of_other_threads(broker: Broker, topic: str) -> None:
    told = Told()
    producer = broker.producer("test")
    told_at_the_end: list[int] = []

    def close() -> None:
        producer.close()
        told_at_the_end.append(len(told.outcomes))

    sending = threading.Thread(target=lambda: producer.send_async(Message(topic, b"x" * 60_000), told, timeout=30.0))
    closing = threading.Thread(target=close)
    with stopped_flusher(broker):
        fill_ring(producer, topic)
        sending.start()
        wait_until(lambda: a_send_waits(broker), "the send waiting for room")
        closing.start()
        wait_until(lambda: producer._closed, "the other thread closing")
    for thread in (sending, closing):
        thread.join()
    assert told_at_the_end == [1]
    assert isinstance(told.outcomes[0], SendResult)


def test_a_dropped_producer_leaves_no_thread_behind_and_tells_what_it_sent(broker: Broker, topic: str) -> None:
    before, told = threads(), Told()
    producer = broker.producer("test")
    for _ in range(100):
        producer.send_async(Message(topic, b"x"), told)
    assert threads() == before + 1
    del producer
    wait_until(lambda: threads() == before, "its thread gone")
    assert len(told.outcomes) == 100


def test_a_send_does_not_wait_for_stuck_callbacks_past_its_timeout(
    broker: Broker, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, "PENDING_MAX", 100)
    stuck = threading.Event()
    with broker.producer("test") as producer:
        told = Told(stuck.wait)
        producer.send_async(Message(topic, b"0"), told)
        wait_until(lambda: told.outcomes, "the first callback stuck")
        for number in range(1, 101):
            producer.send_async(Message(topic, b"%d" % number), told)
        with pytest.raises(BrokerBusy, match=r"100 sends wait for their callbacks, .* within 0\.05 s"):
            producer.send_async(Message(topic, b"refused"), told, timeout=0.05)
        stuck.set()
        producer.send_async(Message(topic, b"101"), told)
    assert bodies_of(broker, topic) == [b"%d" % number for number in range(102)]
    assert len(told.outcomes) == 102


def test_a_fork_while_a_thread_begins_an_asynchronous_send_does_not_block_the_childs(
    broker: Broker, topic: str
) -> None:
    source = """
        import os, sys, threading, shmbroker, shmbroker.producer
        producer = shmbroker.open(sys.argv[1]).producer("parent")
        held, done = threading.Event(), threading.Event()

        def hold():
            with shmbroker.producer._completions:
                held.set()
                done.wait()

        threading.Thread(target=hold).start()
        held.wait()
        child = os.fork()
        if child == 0:
            producer.send_async(shmbroker.Message(sys.argv[2], b"from the child"))
            producer.close()
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        done.set()
    """
    with Child(source, broker.directory, topic) as child:
        assert child.read_line() == "0"
    assert bodies_of(broker, topic) == [b"from the child"]
