"""Waiting on an event loop, for tests of ``shmbroker.aio``."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from support.running import QUICK, worker_pid
from support.waiting import DEADLINE

from shmbroker import aio

Value = TypeVar("Value")

FAR: Final = 30.0  # seconds that nobody is to wait for


async def until(predicate: Callable[[], Value], what: str) -> Value:
    """As ``wait_until``, with a loop that goes on meanwhile."""
    end = time.monotonic() + DEADLINE
    while not (value := predicate()):
        assert time.monotonic() < end, f"{what}: not within {DEADLINE:g} s"
        await asyncio.sleep(0.002)
    return value


@asynccontextmanager
async def opened(directory: Path, **settings: Any) -> AsyncIterator[aio.Broker]:
    """A small broker, embedded in the test, in its event loop."""
    async with aio.open(directory, **(QUICK | settings)) as broker:
        yield broker


def waiting(broker: aio.Broker) -> int:
    """Coroutines that sleep until there is a message."""
    found = broker.plain.region.waiters()
    return sum(waiter["kind"] == "message" and waiter["state"] == "waiting" for waiter in found)


@contextmanager
def stopped(broker: aio.Broker, role: str) -> Iterator[None]:
    pid = worker_pid(broker.plain, role)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def take(consumer: aio.SimpleConsumer, count: int) -> list[bytes]:
    """The bodies of the next messages, each acknowledged."""
    bodies = []
    async for message in consumer:
        bodies.append(message.body)
        await consumer.ack(message)
        if len(bodies) == count:
            break
    return bodies
