"""A PullConsumer for coroutines: it reads on the loop, and sleeps without a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

from shmbroker import pull_consumer
from shmbroker._native._core import ReceivedMessage
from shmbroker.aio.opening import AsyncHandle
from shmbroker.aio.waits import LoopWaits, off_loop
from shmbroker.errors import BrokerClosed
from shmbroker.pull_consumer import QueuePosition, check_poll

if TYPE_CHECKING:
    from shmbroker.selector import Sql


class PullConsumer(AsyncHandle):
    """Reads the queues that it is assigned, from positions that it may set. As ``shmbroker.PullConsumer``.

    A ``poll`` that is cancelled has moved no position.
    """

    def __init__(self, plain: pull_consumer.PullConsumer, waits: LoopWaits) -> None:
        self._plain = plain
        self._waits = waits
        self._turn = asyncio.Lock()  # one call at a time; a poll that sleeps lets the others by

    @property
    def group(self) -> str:
        """The consumer group."""
        return self._plain.group

    async def assign(self, queues: Iterable[str | tuple[str, int]], expression: str | Sql = "*") -> None:
        """Read these queues from now on: each a (topic, queue_id), or a topic, for all queues that it has now."""
        async with self._turn:
            await off_loop(lambda: self._plain.assign(queues, expression))

    async def poll(self, max_messages: int = 32, wait: float = 0.0) -> list[ReceivedMessage]:
        """The next messages, at most so many, as soon as there is one; [] if none comes in ``wait`` seconds."""
        check_poll(max_messages, wait)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        found = await self._look(max_messages)
        while not found and (left := deadline - loop.time()) > 0.0:
            reader = self._plain._assigned_reader()
            try:
                waits = self._waits.at(reader.client)
                with waits.message(reader) as woken:
                    found = await self._look(max_messages)
                    if not found:
                        await waits.sleep(woken, left)
                        found = await self._look(max_messages)
            except BrokerClosed:
                self._plain._check_open()
                await off_loop(reader._reattach)
        return found

    async def _look(self, max_messages: int) -> list[ReceivedMessage]:
        async with self._turn:
            while True:
                reader = self._plain._assigned_reader()
                try:
                    return reader._poll(max_messages, 0.0)
                except BrokerClosed:
                    self._plain._check_open()
                    await off_loop(reader._reattach)

    async def queues(self) -> list[QueuePosition]:
        """Each assigned queue: position, what is committed, and the offsets that it has."""
        async with self._turn:
            return await off_loop(self._plain.queues)

    async def seek(self, topic: str, queue_id: int, offset: int) -> None:
        """Read on from ``offset``."""
        async with self._turn:
            await off_loop(lambda: self._plain.seek(topic, queue_id, offset))

    async def seek_to_time(
        self, instant: float | datetime, topic: str | None = None, queue_id: int | None = None
    ) -> None:
        """Read on with what was sent at an instant or later, in all assigned queues or some."""
        async with self._turn:
            await off_loop(lambda: self._plain.seek_to_time(instant, topic, queue_id))

    async def seek_to_begin(self, topic: str | None = None, queue_id: int | None = None) -> None:
        """Read on from the first message that the log has."""
        async with self._turn:
            await off_loop(lambda: self._plain.seek_to_begin(topic, queue_id))

    async def seek_to_end(self, topic: str | None = None, queue_id: int | None = None) -> None:
        """Read on behind the last message."""
        async with self._turn:
            await off_loop(lambda: self._plain.seek_to_end(topic, queue_id))

    async def commit(self, *, durable: bool = False) -> None:
        """The group is done with all that stands before the positions, in each assigned queue."""
        async with self._turn:
            await off_loop(lambda: self._plain.commit(durable=durable))

    async def close(self) -> None:
        """Leave; what was not committed is read again by whoever is assigned the queue next."""
        self._plain.close()
        self._waits.wake_all()

    def __repr__(self) -> str:
        return repr(self._plain).replace("<", "<aio.", 1)
