"""``shmbroker.aio.open`` and the handle that it returns: a ``shmbroker.Broker`` for the coroutines of one loop."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from shmbroker import broker, pull_consumer, push_consumer
from shmbroker.aio import consumer, producer
from shmbroker.aio.consumer import SimpleConsumer
from shmbroker.aio.opening import AsyncHandle, Opening
from shmbroker.aio.producer import Producer
from shmbroker.aio.pull_consumer import PullConsumer
from shmbroker.aio.push_consumer import AsyncListener, Courier, PushConsumer
from shmbroker.aio.waits import LoopWaits, off_loop
from shmbroker.attachment import OPEN_TIMEOUT
from shmbroker.naming import check_group

if TYPE_CHECKING:
    from shmbroker.selector import Sql

Child = TypeVar("Child", bound=AsyncHandle)


def open(  # noqa: A001 - as in gzip.open
    directory: str | os.PathLike[str],
    config: str | os.PathLike[str] | None = None,
    *,
    timeout: float = OPEN_TIMEOUT,
    **settings: Any,
) -> Opening[Broker]:
    """As ``shmbroker.open``: await it, or begin an ``async with`` block."""

    async def make() -> Broker:
        call = partial(broker.open, directory, config, timeout=timeout, **settings)
        return Broker(await off_loop(call, broker.Broker.close))

    return Opening(make)


class Broker(AsyncHandle):
    """A running broker, for the coroutines of the event loop that it was opened in.

    ``plain`` is the ``shmbroker.Broker`` below, for all that is not here: ``await
    asyncio.to_thread(broker.plain.create_topic, "orders", 8)``.
    """

    def __init__(self, plain: broker.Broker) -> None:
        self.plain = plain
        self._waits = LoopWaits()
        self._loop_thread = threading.get_ident()
        self._children: weakref.WeakSet[AsyncHandle] = weakref.WeakSet()

    def producer(self, group: str) -> Opening[Producer]:
        """A producer of a producer group."""

        async def make() -> Producer:
            core = await off_loop(
                lambda: producer.Core(self.plain, check_group(group), self._loop_thread), producer.Core.close
            )
            return self._adopt(Producer(core, self._waits))

        return Opening(make)

    def simple_consumer(
        self, group: str, subscriptions: Mapping[str, str | Sql], **settings: Any
    ) -> Opening[SimpleConsumer]:
        """A consumer that fetches and acknowledges by itself."""

        async def make() -> SimpleConsumer:
            call = partial(consumer.Core, self.plain, group, subscriptions, self._loop_thread, **settings)
            return self._adopt(SimpleConsumer(await off_loop(call, consumer.Core.close), self._waits))

        return Opening(make)

    def push_consumer(
        self, group: str, listener: AsyncListener, subscriptions: Mapping[str, str | Sql], **settings: Any
    ) -> Opening[PushConsumer]:
        """Awaits ``listener`` with each message and a context."""

        async def make() -> PushConsumer:
            courier = Courier(listener)
            call = partial(self.plain.push_consumer, group, courier, subscriptions, **settings)
            return self._adopt(PushConsumer(await off_loop(call, push_consumer.PushConsumer.close), courier))

        return Opening(make)

    def pull_consumer(self, group: str, **settings: Any) -> Opening[PullConsumer]:
        """A consumer that reads queues from positions of its own."""

        async def make() -> PullConsumer:
            call = partial(self.plain.pull_consumer, group, **settings)
            return self._adopt(PullConsumer(await off_loop(call, pull_consumer.PullConsumer.close), self._waits))

        return Opening(make)

    async def recall(self, handle: str) -> bool:
        """Take back a delayed message. As ``shmbroker.Broker.recall``."""
        return await off_loop(lambda: self.plain.recall(handle))

    async def close(self) -> None:
        """Close all that was made here and leave the broker."""
        for child in list(self._children):
            await child.close()
        self._waits.close()
        await off_loop(self.plain.close)

    def _adopt(self, child: Child) -> Child:
        self._children.add(child)
        return child

    def __repr__(self) -> str:
        return f"<aio.{repr(self.plain)[1:]}"
