"""Sending to and receiving from a real broker, for tests of consumers."""

from __future__ import annotations

from typing import Final

from shmbroker import CorruptLog, Message, ReceivedMessage, SimpleConsumer, Sql
from shmbroker.broker import Broker

ALL: Final = {"orders": "*"}

# A member of the group "audit" that acts on lines: "ack 10" or "hold 5". It answers with the bodies.
CONSUMER: Final = """
    import sys, shmbroker
    broker = shmbroker.open(sys.argv[1])
    consumer = broker.simple_consumer("audit", {"orders": "*"})
    print("ready")
    for line in sys.stdin:
        command, count = line.split()
        messages = consumer.receive(int(count), wait=10.0)
        if command == "ack":
            consumer.ack(messages)
        print(*(message.body.decode() for message in messages))
"""


def send(broker: Broker, *bodies: bytes, tags: str | None = None, queue_id: int | None = 0) -> None:
    send_to(broker, "orders", *bodies, tags=tags, queue_id=queue_id)


def send_to(broker: Broker, topic: str, *bodies: bytes, tags: str | None = None, queue_id: int | None = 0) -> None:
    with broker.producer("test") as producer:
        for start in range(0, len(bodies), 100):
            batch = [Message(topic, body, tags=tags) for body in bodies[start : start + 100]]
            producer.send_batch(batch, queue_id=queue_id)


def numbered(count: int, first: int = 0) -> list[bytes]:
    return [b"%d" % i for i in range(first, first + count)]


def drain(consumer: SimpleConsumer, count: int, *, batch: int = 32) -> list[bytes]:
    """Receive and acknowledge until there were ``count``."""
    bodies: list[bytes] = []
    while len(bodies) < count:
        messages = consumer.receive(min(batch, count - len(bodies)), wait=10.0)
        assert messages, f"only {len(bodies)} of {count} came"
        bodies += [message.body for message in messages]
        consumer.ack(messages)
    return bodies


def asleep(broker: Broker) -> bool:
    """Whether some consumer sleeps."""
    return any(waiter["kind"] == "message" and waiter["state"] == "waiting" for waiter in broker.region.waiters())


def bodies_of(messages: list[ReceivedMessage]) -> list[bytes]:
    return [message.body for message in messages]


def deliverable(broker: Broker, group: str, wanted: str | Sql = "*") -> tuple[set[int], list[CorruptLog]]:
    """Numbers, of which bodies begin with one, that the group gets until only damage is left; and what told of that."""
    numbers: set[int] = set()
    damages: list[CorruptLog] = []
    with broker.simple_consumer(group, {"orders": wanted}) as consumer:
        while len(damages) < 2:  # once more after the first: each queue may have something to say
            try:
                messages = consumer.receive(100)
            except CorruptLog as error:
                damages.append(error)
                continue
            if not messages:
                break
            consumer.ack(messages)
            numbers |= {int(message.body.split()[0]) for message in messages}
        assert consumer.lost == 0
    return numbers, damages
