"""A SimpleConsumer for coroutines: it looks for messages on the loop, and sleeps without a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shmbroker import consumer
from shmbroker._native._core import ReceivedMessage
from shmbroker.aio.opening import AsyncHandle
from shmbroker.aio.waits import LoopWaits, OffLoop, off_loop
from shmbroker.errors import BadRequest, BrokerClosed, ShmBrokerError

if TYPE_CHECKING:
    from shmbroker.consumer import ConsumerHome
    from shmbroker.selector import Sql


class Core(consumer.SimpleConsumer):
    """As it is called on the loop: it does not wait for another broker, and leaves durable acks to be written."""

    def __init__(
        self, home: ConsumerHome, group: str, subscriptions: Mapping[str, str | Sql], loop_thread: int, **settings: Any
    ) -> None:
        if "spin" in settings:
            raise BadRequest("spin: an event loop does not burn its core while it waits")
        super().__init__(home, group, subscriptions, **settings)
        self._loop_thread = loop_thread
        self.unwritten: list[bytes] = []

    def _is_on_loop(self) -> bool:
        return threading.get_ident() == self._loop_thread

    def _reattach(self) -> None:
        if self._is_on_loop():
            raise OffLoop
        super()._reattach()

    def _write_acks(self, bodies: list[bytes]) -> None:
        if self._is_on_loop():
            self.unwritten += bodies
        else:
            super()._write_acks(bodies)


class SimpleConsumer(AsyncHandle):
    """Fetches messages, and acknowledges each one when it is done with it, for the coroutines of one event loop.

    As ``shmbroker.SimpleConsumer``, whose settings it has but for ``spin``. ``async for message in consumer`` goes on
    until the consumer is closed, and claims one message at a time. A ``receive`` that is cancelled has no messages:
    what it was about to return, if anything, is delivered to others.
    """

    def __init__(self, core: Core, waits: LoopWaits) -> None:
        self._core = core
        self._waits = waits
        self._closed = False

    @property
    def group(self) -> str:
        """The consumer group."""
        return self._core.group

    @property
    def lost(self) -> int:
        """Messages that retention took before this consumer could read them."""
        return self._core.lost

    # ---- receiving

    async def receive(self, max_messages: int = 1, wait: float = 0.0, invisible: float = 60.0) -> list[ReceivedMessage]:
        """At most ``max_messages``, as soon as there is one; [] if none comes within ``wait`` seconds.

        Each is this consumer's for ``invisible`` seconds. Raises what ``shmbroker.SimpleConsumer.receive`` raises.
        """
        if not wait >= 0.0:
            raise BadRequest(f"wait = {wait!r}: must be seconds, 0 or more")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        found = await self._look(max_messages, invisible)
        while not found and (left := deadline - loop.time()) > 0.0:
            try:
                waits = self._waits.at(self._core.client)
                with waits.message(self._core) as woken:
                    found = await self._look(max_messages, invisible)
                    if not found:
                        await waits.sleep(woken, left)
                        found = await self._look(max_messages, invisible)
                if found:
                    woken.pass_on()
            except BrokerClosed:
                if self._closed:
                    raise
                await off_loop(self._core._reattach)
        return found

    async def _look(self, max_messages: int, invisible: float) -> list[ReceivedMessage]:
        if self._core.durable_attempts:  # they are written to the disk before anybody gets the messages
            return await off_loop(lambda: self._core.receive(max_messages, 0.0, invisible), self._return)
        while True:
            try:
                return self._core.receive(max_messages, 0.0, invisible)
            except OffLoop:
                await off_loop(self._core._reattach)

    def _return(self, messages: list[ReceivedMessage]) -> None:
        """The receive was cancelled while the attempts were written: they go back at once, counted."""
        for message in messages:
            with suppress(ShmBrokerError):
                self._core.change_invisible_duration(message, 0.0)

    def __aiter__(self) -> AsyncIterator[ReceivedMessage]:
        return self.messages()

    async def messages(self, invisible: float = 60.0) -> AsyncIterator[ReceivedMessage]:
        """Message by message, each this consumer's for ``invisible`` seconds, until the consumer is closed."""
        while True:
            try:
                found = await self.receive(1, 3600.0, invisible)
            except BrokerClosed:
                if self._closed:
                    return
                raise
            for message in found:
                yield message

    # ---- what becomes of them

    async def ack(self, messages: ReceivedMessage | Iterable[ReceivedMessage], *, durable: bool | None = None) -> None:
        """These are done. Raises what ``shmbroker.SimpleConsumer.ack`` raises.

        If it is cancelled while it waits for the disk they are acknowledged in memory all the same.
        """
        try:
            self._core.ack(messages, durable=durable)
        finally:
            bodies, self._core.unwritten = self._core.unwritten, []
            if bodies:
                await off_loop(lambda: self._core._write_acks(bodies))

    async def change_invisible_duration(self, message: ReceivedMessage, seconds: float) -> None:
        """From now on ``message`` is this consumer's for ``seconds`` more; 0 gives it back at once."""
        self._core.change_invisible_duration(message, seconds)

    # ---- life

    async def close(self) -> None:
        """Leave the group. What was received and not acknowledged goes back to it at once, as a failed delivery."""
        self._closed = True
        self._core.close()
        self._waits.wake_all()

    def __repr__(self) -> str:
        return repr(self._core).replace("<Core", f"<aio.{type(self).__name__}")
