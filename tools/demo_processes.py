"""The processes of the demo: a sender and a receiver that may be killed at any instruction, and replaced."""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import shmbroker
from shmbroker import Message
from shmbroker.errors import BrokerBusy
from shmbroker.tools.demo_history import History, acked_line, body_of, read_sent, received_line, sent_line

TOPIC = "demo"
GROUP = "demo"
SENDS_PER_WRITE = 32  # lines in doubt after a kill: the successor sends them again, the broker stores them once
RECEIVE_MESSAGES = 100
INVISIBLE_SECONDS = 120.0  # longer than the demo: only a death gives a message back
IDLE_SECONDS = 1.0

# Shared with the parent: for the progress bar and the moment of the kills, not for the verdict. CLOSING and VICTIM are
# the parent's: all is sent; this receiver is to die (number + 1), and waits for it where it has written down what it
# received and has not acknowledged it.
Counters = ctypes.Array[ctypes.c_int64]
SENT, RECEIVED, HOLDING, COUNTERS = 0, 1, 2, 3
CLOSING, VICTIM, WORDS = 0, 1, 2  # before the counters


def read_lines(path: Path, at_least: int) -> list[bytes]:
    """The lines of the file, which is repeated as a whole until there are ``at_least`` of them."""
    lines = path.read_bytes().split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    return lines * max(1, -(-at_least // len(lines))) if lines else []


class Counter:
    """One process's share of the counters: a word that only it writes."""

    def __init__(self, counters: Any, kind: int, index: int) -> None:
        self._counters, self._at = counters, WORDS + index * COUNTERS + kind

    def add(self, count: int) -> None:
        self._counters[self._at] += count


def total(counters: Any, kind: int) -> int:
    return sum(counters[WORDS + kind :: COUNTERS])


def send_lines(
    directory: Path,
    histories: Path,
    name: str,
    life: int,
    lines_file: Path,
    at_least: int,
    share: tuple[int, int],
    counters: Any,
) -> None:
    """Send every line whose number is ``share[0]`` modulo ``share[1]``, from where the histories of earlier lives end.

    What a predecessor had sent but not yet written down is sent again with the same dedup key: stored once.
    """
    index, senders = share
    lines = read_lines(lines_file, at_least)
    resume = 1 + max((sent.number for sent in _earlier(histories, name)), default=index - senders)
    first = resume + (index - resume) % senders
    counter = Counter(counters, SENT, index)
    clock = time.monotonic_ns
    with (
        History(histories / f"{name}-{life}.sent") as history,
        shmbroker.open(directory) as broker,
        broker.producer(GROUP) as producer,
    ):
        for number in range(first, len(lines), senders):
            message = Message(TOPIC, body_of(number, lines[number]))
            started = clock()
            result = _send(producer, message, f"line-{number}")
            history.note(sent_line(started, number, result.status.name, result.duplicate, clock() - started))
            if number // senders % SENDS_PER_WRITE == 0:
                history.write()
                counter.add(SENDS_PER_WRITE)


def _send(producer: shmbroker.Producer, message: Message, dedup_key: str) -> shmbroker.SendResult:
    """A full ring is no failure: nothing was stored, so the same line is sent once more."""
    while True:
        with suppress(BrokerBusy):
            return producer.send(message, dedup_key=dedup_key)
        if not _parent_lives():
            raise SystemExit(1)


def _earlier(histories: Path, name: str) -> list[Any]:
    return [sent for path in histories.glob(f"{name}-*.sent") for sent in read_sent(path)]


def receive_lines(directory: Path, histories: Path, name: str, life: int, index: int, counters: Any) -> None:
    """Receive, write down, acknowledge, write that down; until the parent says that all is sent and nothing comes."""
    counter = Counter(counters, RECEIVED, index)
    clock = time.monotonic_ns
    with (
        History(histories / f"{name}-{life}.got") as history,
        shmbroker.open(directory) as broker,
        broker.simple_consumer(GROUP, {TOPIC: "*"}) as consumer,
    ):
        while True:
            messages = consumer.receive(RECEIVE_MESSAGES, wait=IDLE_SECONDS, invisible=INVISIBLE_SECONDS)
            received, now_ns = clock(), time.time_ns()
            if not messages:
                if counters[CLOSING] or not _parent_lives():
                    return
                continue
            for message in messages:
                latency = now_ns - round(message.born_timestamp * 1e9)
                history.note(
                    received_line(received, message.message_id, message.delivery_attempt, latency, message.body)
                )
            history.write()
            if counters[VICTIM] == index + 1:
                _await_death(Counter(counters, HOLDING, index), len(messages))
            consumer.ack(messages)
            history.note(acked_line(clock(), len(messages)))
            history.write()
            counter.add(len(messages))


def _await_death(holding: Counter, messages: int) -> None:
    holding.add(messages)
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    raise SystemExit(1)


def _parent_lives() -> bool:
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()
