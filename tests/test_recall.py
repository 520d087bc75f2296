"""A recall is true if and only if the message will not fire (RocketMQ row 48), whoever is killed, whoever is first."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.consuming import ALL, bodies_of
from support.processes import Child
from support.running import QUICK, log_bodies, running, wait_restarted
from support.waiting import wait_until

from shmbroker import Message, SendResult
from shmbroker.broker import Broker
from shmbroker.errors import BadRequest

RECALLER = """
    import sys, shmbroker
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    print(*(broker.recall(handle) for handle in sys.argv[3:]))
"""


def handle_of(result: SendResult) -> str:
    assert result.recall_handle is not None
    return result.recall_handle


def indexed(broker: Broker, result: SendResult) -> None:
    """Wait until the timer index knows of the message."""
    wait_until(lambda: broker.region.get("timers_kept") >= result.position, "the index")


@pytest.mark.parametrize("when", ["at once", "from the index"])
def test_a_recalled_message_never_comes_and_a_second_recall_says_so(tmp_path: Path, when: str) -> None:
    with running(tmp_path / "data") as broker, broker.producer("billing") as producer:
        recalled = producer.send(Message("orders", b"recalled", delay=1.5))
        producer.send(Message("orders", b"kept", delay=1.6))
        if when == "from the index":
            indexed(broker, recalled)
        assert recalled.recall() is True
        assert broker.recall(handle_of(recalled)) is True
        with broker.simple_consumer("audit", ALL) as consumer:
            assert bodies_of(consumer.receive(32, wait=10.0)) == [b"kept"]
        assert recalled.recall() is True
    with running(tmp_path / "data") as broker:
        assert broker.recall(handle_of(recalled)) is True
    assert log_bodies(tmp_path / "data") == [b"kept"]


def test_what_has_fired_cannot_be_recalled(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker, broker.producer("billing") as producer:
        fired = producer.send(Message("orders", b"1", delay=0.1))
        with broker.simple_consumer("audit", ALL) as consumer:
            assert bodies_of(consumer.receive(wait=10.0)) == [b"1"]
        assert fired.recall() is False
        wait_until(lambda: broker.region.get("timers_kept") > fired.position, "the index")
        assert fired.recall() is False


def test_another_process_recalls_by_the_handle(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker, broker.producer("billing") as producer:
        handles = [handle_of(producer.send(Message("orders", b"%d" % n, delay=3600.0))) for n in range(3)]
        with Child(RECALLER, tmp_path / "data", QUICK, *handles[:2]) as child:
            assert child.read_line() == "True True"
        assert [broker.recall(handle) for handle in handles] == [True, True, True]


@pytest.mark.parametrize("handle", ["", "0" * 63, "g" * 64, "00" * 33])
def test_what_is_no_handle_is_refused(tmp_path: Path, handle: str) -> None:
    with running(tmp_path / "data") as broker, pytest.raises(BadRequest, match="no recall handle"):
        broker.recall(handle)


def test_the_handle_of_a_message_that_is_not_there_recalls_nothing(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker, broker.producer("billing") as producer:
        sent = producer.send(Message("orders", b"1", delay=1.0))
        handle = handle_of(sent)
        other = f"{handle[:32]}{int(handle[32:48], 16) ^ 1:016x}{handle[48:]}"  # the same place, another id
        assert broker.recall(other) is False
        assert broker.recall(f"{1 << 40:016x}" + handle[16:]) is False
        with broker.simple_consumer("audit", ALL) as consumer:
            assert bodies_of(consumer.receive(wait=10.0)) == [b"1"]


def test_of_recall_and_fire_at_one_moment_exactly_one_wins(tmp_path: Path) -> None:
    """Messages become due while they are recalled: each is recalled or comes, and never both."""
    count = 300
    with running(tmp_path / "data") as broker:
        with broker.producer("billing") as producer:
            sent = [
                producer.send(Message("orders", b"%d" % number, delay=0.3 + 0.7 * number / count))
                for number in range(count)
            ]
        answers: dict[bytes, bool] = {}

        def recall(numbers: range) -> None:
            for number in numbers:
                answers[b"%d" % number] = sent[number].recall()

        threads = [threading.Thread(target=recall, args=(range(start, count, 2),)) for start in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        coming = {body for body, recalled in answers.items() if not recalled}
        found: Counter[bytes] = Counter()
        with broker.simple_consumer("audit", ALL) as consumer:
            while messages := consumer.receive(32, wait=1.5):
                consumer.ack(messages)
                found.update(bodies_of(messages))
        assert found == Counter(coming)
    assert Counter(log_bodies(tmp_path / "data")) == Counter(coming)


@pytest.mark.crash
@pytest.mark.parametrize(
    ("edge", "recalled"),
    [
        ("recall.before_append", False),
        ("append.half_copied", False),
        ("append.effects", False),
        ("append.published", True),
        ("append.unlocked", True),
        ("recall.after_append", True),
    ],
)
def test_a_recaller_killed_at_an_edge_has_recalled_or_not(tmp_path: Path, edge: str, recalled: bool) -> None:
    with running(tmp_path / "data") as broker, broker.producer("billing") as producer:
        sent = producer.send(Message("orders", b"1", delay=3.0))
        armed = {"SHMBROKER_FAILPOINTS": f"client/{edge}=kill"}
        with Child(RECALLER, tmp_path / "data", QUICK, handle_of(sent), environment=armed) as child:
            assert child.wait() == -signal.SIGKILL
        producer.send(Message("orders", b"2", delay=3.1))
        with broker.simple_consumer("audit", ALL) as consumer:
            messages = consumer.receive(1, wait=10.0)
            consumer.ack(messages)
            assert bodies_of(messages) == ([b"2"] if recalled else [b"1"])
        assert sent.recall() is recalled


@pytest.mark.crash
@pytest.mark.parametrize("edge", ["scheduler.before_fire", "append.copied", "append.published", "scheduler.after_fire"])
def test_a_recall_beside_a_scheduler_that_is_killed_tells_the_truth(tmp_path: Path, edge: str) -> None:
    with (
        running(tmp_path / "data", failpoints=f"scheduler/{edge}=kill") as broker,
        broker.producer("billing") as producer,
    ):
        sent: Any = producer.send(Message("orders", b"1", delay=0.2))
        wait_restarted(broker, "scheduler")
        recalled = sent.recall()
        with broker.simple_consumer("audit", ALL) as consumer:
            assert bodies_of(consumer.receive(wait=0.5 if recalled else 10.0)) == ([] if recalled else [b"1"])
    assert log_bodies(tmp_path / "data") == ([] if recalled else [b"1"])
