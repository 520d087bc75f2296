"""Consumers that fail, and what became of their messages."""

from __future__ import annotations

from support.producing import records_of

from shmbroker import RetryPolicy, SimpleConsumer
from shmbroker.broker import Broker
from shmbroker.naming import DEAD_LETTER_PREFIX
from shmbroker.record import Record
from shmbroker.send_back import SendBack

GROUP = "audit"
DEAD_LETTERS = DEAD_LETTER_PREFIX + GROUP


def at_once(max_retries: int = 16) -> RetryPolicy:
    """Retries that need no scheduler."""
    return RetryPolicy("table", max_retries, delays=(0.0,))


def dead_letters(broker: Broker, group: str = GROUP) -> list[Record]:
    """The group's dead letters, in order; none if it never had any."""
    topic = DEAD_LETTER_PREFIX + group
    return records_of(broker, topic) if any(known["name"] == topic for known in broker.topics()) else []


def sending_back(broker: Broker, consumer: SimpleConsumer) -> SendBack:
    return SendBack(broker, consumer)
