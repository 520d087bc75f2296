"""Sending to a real broker, and what it stored: for tests of producers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from support.running import log_records, worker_pid
from support.waiting import wait_until

from shmbroker import Broker, BrokerBusy, Message, Producer, SendResult
from shmbroker.record import Record


class Told:
    """Remembers what a callback was told, in order."""

    def __init__(self, then: Callable[[], object] | None = None) -> None:
        self.outcomes: list[SendResult | Exception] = []
        self._then = then

    def on_success(self, result: SendResult) -> None:
        self.outcomes.append(result)
        if self._then is not None:
            self._then()

    def on_exception(self, error: Exception) -> None:
        self.outcomes.append(error)


@contextmanager
def stopped_flusher(broker: Broker) -> Iterator[None]:
    """The flusher stands still: nothing reaches the disk, the ring fills."""
    pid = worker_pid(broker, "flusher")
    region = broker.region
    wait_until(lambda: region.get("user_capacity") >= region.get("tail") + region.ring_bytes, "room for a full ring")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def records_of(broker: Broker, topic: str) -> list[Record]:
    """The records of a topic in the order of the log."""
    region = broker.region
    tail = region.get("tail")
    wait_until(lambda: region.get("flushed") >= tail, "everything on the disk")
    topic_id = next(known["topic_id"] for known in broker.topics() if known["name"] == topic)
    return [
        record for record in log_records(broker.directory, tail) if record.topic_id == topic_id and record.kind == 1
    ]


def count_of(broker: Broker, topic: str) -> int:
    """How many messages the topic has, flushed or not."""
    (known,) = (known for known in broker.topics() if known["name"] == topic)
    return sum(queue["next_offset"] for queue in known["queues"])


def bodies_of(broker: Broker, topic: str) -> list[bytes]:
    return [record.body for record in records_of(broker, topic)]


def a_send_waits(broker: Broker) -> bool:
    """Some thread sleeps until there is room in the ring."""
    return any(waiter["kind"] == "space" and waiter["state"] == "waiting" for waiter in broker.region.waiters())


def fill_ring(producer: Producer, topic: str, timeout: float = 0.0) -> list[bytes]:
    """Send until the ring is full; the bodies that were accepted."""
    sent: list[bytes] = []
    while True:
        body = f"{len(sent)} ".encode() + b"x" * 40_000
        try:
            producer.send(Message(topic, body), timeout)
        except BrokerBusy:
            return sent
        sent.append(body)
