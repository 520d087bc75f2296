"""Whoever is killed or stopped between two steps of a wake-up, the message reaches a member that waits (R6).

The promise is 50 ms. A machine that is busy with other things may take longer than that over anything, so each case
has five tries, of which two have to keep to it. That is enough to tell: the message is sent as soon as the member
sleeps, and without the janitor's backstop it would sleep for its whole slice of 500 ms, in every try.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
from support.consuming import ALL, bodies_of, send
from support.processes import Child
from support.running import running
from support.waiting import DEADLINE, wait_until

from shmbroker import ReceivedMessage
from shmbroker.broker import Broker

pytestmark = pytest.mark.crash

PROMISED: Final = 0.050
TRIES: Final = 5
ENOUGH: Final = 2

# Sends one message on a line, and is killed or stopped at a failpoint on its way. Says when it began.
PRODUCER = """
    import sys, time, shmbroker
    from shmbroker._native._core import failpoint_arm
    producer = shmbroker.open(sys.argv[1]).producer("test")
    print("ready")
    sys.stdin.readline()
    failpoint_arm(sys.argv[2], sys.argv[3], 1)
    print(time.monotonic_ns())
    producer.send(shmbroker.Message("orders", b"work"), queue_id=0)
    print("survived")
"""

# A member that is killed or stopped at a failpoint of its receive ("-": at none).
MEMBER = """
    import sys, shmbroker
    from shmbroker._native._core import failpoint_arm
    consumer = shmbroker.open(sys.argv[1]).simple_consumer("audit", {"orders": "*"})
    if sys.argv[2] != "-":
        failpoint_arm(sys.argv[2], sys.argv[3], 1)
    print("ready")
    consumer.receive(wait=30.0)
    print("survived")
"""


# A member that claims a message for 0.2 s, and is stopped on the way, or when it gives it back. Says when that was due.
HOLDER = """
    import sys, time, shmbroker
    from shmbroker._native._core import failpoint_arm
    broker = shmbroker.open(sys.argv[1])
    consumer = broker.simple_consumer("audit", {"orders": "*"})
    broker.producer("test").send(shmbroker.Message("orders", b"work"), queue_id=0)
    if sys.argv[2] == "claim.taken":
        failpoint_arm(sys.argv[2], "stop", 1)
    print(time.monotonic_ns() + 200_000_000)
    (message,) = consumer.receive(invisible=0.2 if sys.argv[2] == "claim.taken" else 60.0)
    print("held")
    sys.stdin.readline()
    failpoint_arm(sys.argv[2], "stop", 1)
    print(time.monotonic_ns())
    consumer.change_invisible_duration(message, 0)
"""


@pytest.mark.parametrize("action", ["kill", "stop"])
@pytest.mark.parametrize(
    ("failpoint", "settings"),
    [
        ("append.published", {}),
        ("append.unlocked", {}),
        ("wake.claimed", {}),
        ("append.published", {"flush_disk_type": "SYNC_FLUSH"}),
        ("append.unlocked", {"flush_disk_type": "SYNC_FLUSH"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()) or "ASYNC_FLUSH",
)
def test_a_producer_gone_between_publish_and_post_delays_nobody(
    tmp_path: Path, failpoint: str, settings: dict[str, Any], action: str
) -> None:
    """It has published and posted nobody; or it has the one right to post the member, and does not use it."""

    def attempt(broker: Broker, waiting: Waiting) -> float:
        with Child(PRODUCER, broker.directory, failpoint, action) as producer:
            assert producer.read_line() == "ready"
            waiting.begin()
            producer.write_line()
            began = int(producer.read_line())
            messages, received = waiting.end()
            wait_until(lambda: is_gone(producer.pid, action), f"the producer {action}ed")
        assert bodies_of(messages) == [b"work"]
        return (received - began) / 1e9

    two_of_five_keep_the_promise(tmp_path / "b", settings, attempt)


@pytest.mark.parametrize(("failpoint", "action"), [("wait.woken", "kill"), ("wait.woken", "stop"), ("-", "stop")])
def test_a_member_gone_between_wake_up_and_claim_delays_no_other(tmp_path: Path, failpoint: str, action: str) -> None:
    """The group's one wake-up went to it: it took it and came no further, or ("-") it was stopped in its sleep."""

    def attempt(broker: Broker, waiting: Waiting) -> float:
        with Child(MEMBER, broker.directory, failpoint, action) as member:
            assert member.read_line() == "ready"
            wait_until(lambda: len(sleepers(broker)) == 1, "the member asleep")
            waiting.begin(others=1)
            ours = broker.attach().slot
            assert min(sleepers(broker).items())[1] != ours, "the other member is woken first"
            if failpoint == "-":
                os.kill(member.pid, signal.SIGSTOP)
                wait_until(lambda: is_gone(member.pid, "stop"), "the member stopped")
            began = time.monotonic_ns()
            send(broker, b"work")
            messages, received = waiting.end()
            wait_until(lambda: is_gone(member.pid, action), f"the member {action}ed")
        wait_until(lambda: not sleepers(broker), "its wait slot taken back")
        assert bodies_of(messages) == [b"work"]
        return (received - began) / 1e9

    two_of_five_keep_the_promise(tmp_path / "b", {}, attempt)


def test_a_claim_whose_holder_is_stopped_before_it_says_until_when_is_over_in_time(tmp_path: Path) -> None:
    def attempt(broker: Broker, waiting: Waiting) -> float:
        with Child(HOLDER, broker.directory, "claim.taken") as holder:
            due = int(holder.read_line())
            wait_until(lambda: is_gone(holder.pid, "stop"), "the holder stopped")
            waiting.begin()
            messages, received = waiting.end()
        assert [(message.body, message.delivery_attempt) for message in messages] == [(b"work", 2)]
        return (received - due) / 1e9

    two_of_five_keep_the_promise(tmp_path / "b", {}, attempt)


def test_a_message_given_back_by_one_that_is_stopped_before_it_says_so_reaches_a_member_that_waits(
    tmp_path: Path,
) -> None:
    def attempt(broker: Broker, waiting: Waiting) -> float:
        with Child(HOLDER, broker.directory, "claim.freed") as holder:
            assert [holder.read_line(), holder.read_line()][1] == "held"
            waiting.begin()
            holder.write_line()
            began = int(holder.read_line())
            messages, received = waiting.end()
            wait_until(lambda: is_gone(holder.pid, "stop"), "the holder stopped")
        assert [(message.body, message.delivery_attempt) for message in messages] == [(b"work", 2)]
        return (received - began) / 1e9

    two_of_five_keep_the_promise(tmp_path / "b", {}, attempt)


def test_a_ctrl_c_between_the_last_look_and_the_sleep_is_seen(tmp_path: Path) -> None:
    """Its handler has run by the time of the sleep, which nothing interrupts: the look behind it has to ask."""
    directory = tmp_path / "b"
    with running(directory), Child(MEMBER, directory, "wait.flagged", "stop") as member:
        assert member.read_line() == "ready"
        wait_until(lambda: is_gone(member.pid, "stop"), "the member stopped")
        os.kill(member.pid, signal.SIGINT)
        os.kill(member.pid, signal.SIGCONT)
        assert member.wait() == -signal.SIGINT


class Waiting:
    """A member of this process that waits for one message in a thread."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._consumer = broker.simple_consumer("audit", ALL)

    def begin(self, others: int = 0) -> None:
        """Wait, and return as soon as it sleeps, as the one above ``others``."""
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()
        wait_until(lambda: len(sleepers(self._broker)) == 1 + others, "the member asleep")

    def end(self) -> tuple[list[ReceivedMessage], int]:
        """What it got, now acknowledged, and when, in ns."""
        self._thread.join(DEADLINE)
        self._consumer.ack(self._messages)
        return self._messages, self._received

    def _receive(self) -> None:
        self._messages = self._consumer.receive(wait=DEADLINE)
        self._received = time.monotonic_ns()


@contextmanager
def waiting_member(directory: Path, settings: dict[str, Any]) -> Iterator[tuple[Broker, Waiting]]:
    with running(directory, **settings) as broker:
        broker.create_topic("orders", queues=1)
        yield broker, Waiting(broker)


def two_of_five_keep_the_promise(
    directory: Path, settings: dict[str, Any], attempt: Callable[[Broker, Waiting], float]
) -> None:
    taken: list[float] = []
    with waiting_member(directory, settings) as (broker, waiting):
        while len(taken) < TRIES and sum(seconds < PROMISED for seconds in taken) < ENOUGH:
            taken.append(attempt(broker, waiting))
    assert sum(seconds < PROMISED for seconds in taken) >= ENOUGH, f"seconds taken: {taken}"


def sleepers(broker: Broker) -> dict[int, int]:
    """Wait slots in which a consumer sleeps: slot to client."""
    return {
        waiter["slot"]: waiter["client"]
        for waiter in broker.region.waiters()
        if waiter["kind"] == "message" and waiter["state"] == "waiting"
    }


def is_gone(pid: int, action: str) -> bool:
    """Stopped, or dead (and perhaps not waited for)."""
    wanted = psutil.STATUS_STOPPED if action == "stop" else psutil.STATUS_ZOMBIE
    try:
        return psutil.Process(pid).status() == wanted
    except psutil.NoSuchProcess:
        return action == "kill"
