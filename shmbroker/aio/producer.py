"""A producer for coroutines: a send appends on the loop, which takes microseconds, and waits elsewhere if it must."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from shmbroker import producer
from shmbroker._native._core import BatchResult, Message, SendResult
from shmbroker.aio.opening import AsyncHandle
from shmbroker.aio.waits import LoopWaits, OffLoop, off_loop
from shmbroker.errors import Retryable
from shmbroker.status import SendStatus

if TYPE_CHECKING:
    from shmbroker.producer import ProducerHome, QueueSelector

Stored = TypeVar("Stored", SendResult, BatchResult)

MOMENT_SECONDS: Final = 0.001  # of the loop's time for the append lock, which others hold for microseconds


class Core(producer.Producer):
    """As it is called on the loop: it waits for nothing but a moment for the lock."""

    def __init__(self, home: ProducerHome, group: str, loop_thread: int) -> None:
        super().__init__(home, group)
        self._loop_thread = loop_thread
        self.flush_seconds = self.sync_flush_timeout_ns / 1e9
        self.sync_flush_timeout_ns = 0  # whoever sends waits by itself

    def _stay_off_loop(self) -> None:
        if threading.get_ident() == self._loop_thread:
            raise OffLoop

    def _missing_topic(self, topic: str) -> None:
        self._stay_off_loop()
        super()._missing_topic(topic)

    def _send_again(self, send: Callable[[float], Any], timeout: float | None) -> Any:
        self._stay_off_loop()
        return super()._send_again(send, timeout)


class Producer(AsyncHandle):
    """Sends messages to topics, for the coroutines of one event loop. As ``shmbroker.Producer``, but for what follows.

    A send that is cancelled may have stored its message, or, while it waits for room or for a broker that restarts,
    may do so later; to send it again and still have it once, give it a ``dedup_key``.
    """

    def __init__(self, core: Core, waits: LoopWaits) -> None:
        self._core = core
        self._waits = waits

    @property
    def group(self) -> str:
        """The producer group."""
        return self._core.group

    async def send(
        self,
        message: Message,
        timeout: float | None = None,  # noqa: ASYNC109 - of the send, and told by its error; the caller's is asyncio.timeout
        *,
        selector: QueueSelector | None = None,
        argument: Any = None,
        sharding_key: str | bytes | None = None,
        queue_id: int | None = None,
        dedup_key: str | bytes | None = None,
    ) -> SendResult:
        """Store a message, and wait until it is as durable as promised. Raises what ``Producer.send`` raises."""

        def send(left: float) -> SendResult:
            return self._core.send(
                message, left, selector=selector, argument=argument, sharding_key=sharding_key, queue_id=queue_id,
                dedup_key=dedup_key,
            )  # fmt: skip

        return await self._durable(await self._store(send, timeout))

    async def send_batch(
        self,
        messages: Iterable[Message],
        timeout: float | None = None,  # noqa: ASYNC109 - as above
        *,
        selector: QueueSelector | None = None,
        argument: Any = None,
        sharding_key: str | bytes | None = None,
        queue_id: int | None = None,
    ) -> BatchResult:
        """Store messages of one topic, all or none, in one queue."""
        batch = list(messages)

        def send(left: float) -> BatchResult:
            return self._core.send_batch(
                batch, left, selector=selector, argument=argument, sharding_key=sharding_key, queue_id=queue_id
            )

        return await self._durable(await self._store(send, timeout))

    async def confirm(self, result: Stored, timeout: float = 5.0) -> SendStatus:  # noqa: ASYNC109 - as above
        """Wait again for the durability of what was sent; sends nothing. Raises StoreReadOnly: it will never come."""
        await self._waits.at(self._core.client).flushed(result.end_position, timeout)
        status: SendStatus = result.confirm(0.0)
        return status

    async def close(self) -> None:
        """Refuse further sends. The broker goes on."""
        self._core.close()

    def __repr__(self) -> str:
        return repr(self._core).replace("<Core", f"<aio.{type(self).__name__}")

    async def _store(self, send: Callable[[float], Stored], timeout: float | None) -> Stored:  # noqa: ASYNC109
        wanted = self._core.send_timeout_ns / 1e9 if timeout is None else timeout
        deadline = time.monotonic() + wanted
        try:
            return send(min(MOMENT_SECONDS, wanted))
        except Retryable:  # nothing is stored: in a thread there is more time for it
            if wanted <= MOMENT_SECONDS:
                raise
        except OffLoop:
            pass
        return await off_loop(lambda: send(max(0.0, deadline - time.monotonic())))

    async def _durable(self, result: Stored) -> Stored:
        if result.status is SendStatus.FLUSH_DISK_TIMEOUT:
            await self._waits.at(self._core.client).flushed(result.end_position, self._core.flush_seconds)
            self._core._settle(result, 0)
        return result
