"""The scheduler killed at every edge of firing, its index lost, the memory lost: each message fires, and fires once."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from support.consuming import ALL
from support.processes import Child, workers_of
from support.running import QUICK, log_bodies, lose_memory, running, starts_of, wait_restarted, worker_pid
from support.waiting import wait_until

from shmbroker import Message
from shmbroker.broker import Broker
from shmbroker.naming import BrokerPaths

EDGES = [
    "scheduler.before_fire",
    "scheduler.after_fire",
    "scheduler.before_commit",
    "scheduler.after_commit",
    "append.locked",
    "append.undo_written",
    "append.armed",
    "append.write_limit",
    "append.half_copied",
    "append.copied",
    "append.effects",
    "append.published",
    "append.final",
    "append.disarmed",
    "append.unlocked",
]
COUNT = 40

# Sends delayed messages over 0.8 seconds to come, says so when the first has come, and lives on.
SENDER = """
    import sys, shmbroker
    from shmbroker import Message
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    count = int(sys.argv[3])
    with broker.producer("billing") as producer:
        for number in range(count):
            producer.send(Message("orders", b"%d" % number, delay=0.4 + 0.8 * number / count))
    assert broker.simple_consumer("audit", {"orders": "*"}).receive(wait=10.0)
    print("some have fired")
    sys.stdin.read()
"""


def send_delayed(broker: Broker, count: int, delay: float, spread: float = 0.0) -> list[bytes]:
    bodies = [b"%d" % number for number in range(count)]
    with broker.producer("billing") as producer:
        for number, body in enumerate(bodies):
            producer.send(Message("orders", body, delay=delay + spread * number / count))
    return bodies


def receive_all(broker: Broker, count: int, deadline: float = 15.0) -> Counter[bytes]:
    """Bodies of all that come, and a last look whether there are more."""
    end = time.monotonic() + deadline
    found: Counter[bytes] = Counter()
    with broker.simple_consumer("audit", ALL) as consumer:
        while found.total() < count and time.monotonic() < end:
            messages = consumer.receive(32, wait=1.0)
            consumer.ack(messages)
            found.update(message.body for message in messages)
        found.update(message.body for message in consumer.receive(32, wait=0.2))
    return found


@pytest.mark.crash
@pytest.mark.parametrize("edge", EDGES)
def test_a_scheduler_killed_at_an_edge_fires_each_message_once(tmp_path: Path, edge: str) -> None:
    with running(tmp_path / "data", failpoints=f"scheduler/{edge}=kill@2") as broker:
        # Two batches at least: the second is killed.
        bodies = send_delayed(broker, COUNT, 0.3, spread=0.5)
        assert receive_all(broker, COUNT) == Counter(bodies)
        wait_restarted(broker, "scheduler")
    assert Counter(log_bodies(tmp_path / "data")) == Counter(bodies)


@pytest.mark.crash
def test_what_became_due_while_nobody_served_fires_at_once_and_once(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        bodies = send_delayed(broker, COUNT, 0.5, spread=0.5)
        with broker.simple_consumer("audit", ALL) as consumer:
            [first] = consumer.receive(wait=10.0)
            consumer.ack(first)
    with running(tmp_path / "data") as broker:
        assert receive_all(broker, COUNT - 1) == Counter(bodies) - Counter([first.body])
    assert Counter(log_bodies(tmp_path / "data")) == Counter(bodies)


@pytest.mark.crash
@pytest.mark.parametrize("index", ["as it was", "lost", "damaged", "of another store"])
def test_pending_timers_survive_the_loss_of_memory_and_index(tmp_path: Path, index: str) -> None:
    directory = tmp_path / "data"
    timers = BrokerPaths(directory).timers
    bodies = [b"%d" % number for number in range(COUNT)]
    with Child(SENDER, directory, {**QUICK, "flush_disk_type": "SYNC_FLUSH"}, COUNT) as child:
        assert child.read_line() == "some have fired"
        lose_memory(directory)
    if index == "lost":
        shutil.rmtree(timers)
    elif index == "damaged":
        (timers / "data.mdb").write_bytes(b"no index" * 4096)
    elif index == "of another store":
        with running(tmp_path / "other") as broker:
            send_delayed(broker, 5, 3600.0)
            wait_until(lambda: broker.region.get("timers_kept") > 0, "an index")
        shutil.rmtree(timers)
        shutil.copytree(BrokerPaths(tmp_path / "other").timers, timers)
    with running(directory) as broker:
        found = receive_all(broker, COUNT)
        assert set(found) == set(bodies)
    assert Counter(log_bodies(directory)) == Counter(bodies)


@pytest.mark.crash
def test_everything_killed_while_messages_fire_loses_and_doubles_none(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with running(directory) as broker:
        bodies = send_delayed(broker, 300, 0.4, spread=0.4)
        with broker.simple_consumer("audit", ALL) as consumer:
            assert consumer.receive(wait=10.0)
        for pid in workers_of(directory).values():
            os.kill(pid, signal.SIGKILL)
        assert set(receive_all(broker, len(bodies))) == set(bodies)
    assert Counter(log_bodies(directory)) == Counter(bodies)


def test_an_earlier_message_wakes_a_scheduler_that_sleeps_for_a_later_one(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker, broker.producer("billing") as producer:
        wait_until(lambda: starts_of(broker, "scheduler"), "a scheduler")
        producer.send(Message("orders", b"late", delay=3600.0))
        with broker.simple_consumer("audit", ALL) as consumer:
            lateness = []
            for number in range(20):
                due = time.time() + 0.03
                producer.send(Message("orders", b"%d" % number, deliver_at=due))
                [message] = consumer.receive(wait=10.0)
                lateness.append(time.time() - due)
                assert message.body == b"%d" % number
                consumer.ack(message)
        assert min(lateness) >= -1e-6
        assert sorted(lateness)[len(lateness) // 2] < 0.05, "each waited for the scheduler's next look"


def test_an_idle_scheduler_uses_next_to_nothing_and_stops_at_once(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        with broker.producer("billing") as producer:
            producer.send(Message("orders", b"late", delay=3600.0))
        scheduler = psutil.Process(worker_pid(broker, "scheduler"))
        wait_until(lambda: broker.region.get("timers_kept") > 0, "the scheduler at work")
        before, begun = scheduler.cpu_times(), time.monotonic()
        wait_until(lambda: time.monotonic() - begun > 2.0, "two seconds")
        used = sum(scheduler.cpu_times()[:2]) - sum(before[:2])
        assert used < 0.1, f"{used} s of 2 s"
        begun = time.monotonic()
        scheduler.terminate()
        wait_until(lambda: not scheduler.is_running() or scheduler.status() == psutil.STATUS_ZOMBIE, "its end")
        assert time.monotonic() - begun < 1.0
