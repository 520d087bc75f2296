"""Listeners for tests of push consumers: what they heard, and when they answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from support.waiting import DEADLINE, wait_until

from shmbroker import ConsumeContext, ConsumeStatus, ReceivedMessage
from shmbroker.broker import Broker

SUCCESS: Final = ConsumeStatus.CONSUME_SUCCESS
LATER: Final = ConsumeStatus.RECONSUME_LATER

# A member of the group "audit" in a process of its own, with settings as keyword arguments. It prints "began BODY
# ATTEMPT" for each message, and answers at once, unless the body begins with "slow": then when a line comes. A body
# "poison" kills it.
PUSHER: Final = """
    import os, signal, sys, threading, shmbroker
    lines, turn = threading.Semaphore(0), threading.Lock()
    def handle(message, context):
        with turn:
            print("began", message.body.decode(), message.delivery_attempt, flush=True)
        if message.body == b"poison":
            os.kill(os.getpid(), signal.SIGKILL)
        if message.body.startswith(b"slow"):
            lines.acquire()
        return shmbroker.ConsumeStatus.CONSUME_SUCCESS
    broker = shmbroker.open(sys.argv[1])
    consumer = broker.push_consumer("audit", handle, {"orders": "*"}, **eval(sys.argv[2] if sys.argv[2:] else "{}"))
    with turn:
        print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        lines.release()
    print("ended", consumer.shutdown(), flush=True)
    broker.close()
"""


class Heard:
    """A listener that keeps what it was given: bodies, attempts, threads. ``answer`` is called as a listener is."""

    def __init__(self, answer: Callable[[Any, ConsumeContext], Any] = lambda _messages, _context: SUCCESS) -> None:
        self._answer = answer
        self._lock = threading.Lock()
        self.calls: list[list[bytes]] = []
        self.attempts: list[tuple[bytes, int]] = []
        self.threads: set[int] = set()
        self.running = 0
        self.most_running = 0

    def __call__(self, messages: ReceivedMessage | list[ReceivedMessage], context: ConsumeContext) -> Any:
        listed = messages if isinstance(messages, list) else [messages]
        with self._lock:
            self.calls.append([message.body for message in listed])
            self.attempts += [(message.body, message.delivery_attempt) for message in listed]
            self.threads.add(threading.get_ident())
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        try:
            return self._answer(messages, context)
        finally:
            with self._lock:
                self.running -= 1

    @property
    def bodies(self) -> list[bytes]:
        with self._lock:
            return [body for call in self.calls for body in call]

    def wait(self, count: int, deadline: float = DEADLINE) -> list[bytes]:
        """The bodies, once there are ``count``."""
        wait_until(lambda: len(self.bodies) >= count, f"{count} messages heard, not {len(self.bodies)}", deadline)
        return self.bodies


class Gate:
    """An answer that waits until the test lets it go."""

    def __init__(self, answer: Any = SUCCESS) -> None:
        self._open = threading.Semaphore(0)
        self._result = answer

    def __call__(self, _messages: object, _context: object) -> Any:
        assert self._open.acquire(timeout=DEADLINE)
        return self._result

    def let_go(self, count: int = 1000) -> None:
        self._open.release(count)


def done_with(broker: Broker, group: str = "audit", topic: str = "orders") -> int:
    """How many messages of the topic the group is done with."""
    tables = [table for table in broker.region.progress() if table["group"] == group and table["topic"] == topic]
    acked = sum(table["base"] + sum(count for _, count in table["acked"]) for table in tables)
    return int(acked - sum(len(table["overflow"]) for table in tables))


def all_done(broker: Broker, group: str, topic: str, count: int) -> bool:
    """Whether the group is done with ``count`` messages of the topic, and with all retries of them."""
    retries = f"%RETRY%{group}"
    done = done_with(broker, group, topic), done_with(broker, group, retries)  # before the look at how many there are
    moved = [queue["next_offset"] for known in broker.topics() if known["name"] == retries for queue in known["queues"]]
    return done == (count, sum(moved))


def held(broker: Broker) -> int:
    return sum(int(table["held"]) for table in broker.region.progress())


def attempts(broker: Broker) -> dict[int, int]:
    """Offset of queue 0 to deliveries counted."""
    return next(table["attempts"] for table in broker.region.progress() if table["queue_id"] == 0)
