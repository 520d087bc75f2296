"""A PushConsumer whose listener is a coroutine.

The threads are those of ``shmbroker.PushConsumer``, and so is all that it promises: each of them hands its message to
the loop and waits for the answer there. So ``consume_thread_max`` is how many listeners run at a time.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, Final

from shmbroker import push_consumer
from shmbroker._native._core import ConsumeContext
from shmbroker.aio.opening import AsyncHandle
from shmbroker.aio.waits import off_loop
from shmbroker.errors import BadRequest
from shmbroker.status import ConsumeStatus

AsyncListener = Callable[[Any, ConsumeContext], Awaitable[ConsumeStatus | None]]

LOOK_SECONDS: Final = 1.0  # a loop that is closed under its listeners answers nobody


class Courier:
    """Takes messages from listener threads to a coroutine function on the loop, and its answers back."""

    def __init__(self, listener: AsyncListener) -> None:
        if not push_consumer.is_coroutine_function(listener):
            raise BadRequest(
                f"listener = {listener!r}: must be a coroutine function (async def) of a message and a ConsumeContext; "
                "shmbroker.open() gives the push_consumer for other functions"
            )
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._running: set[Future[ConsumeStatus | None]] = set()
        self.stranded: Callable[[], None] = lambda: None  # the loop has been closed: nobody will answer any more

    async def _listen(self, messages: Any, context: ConsumeContext) -> ConsumeStatus | None:
        return await self._listener(messages, context)

    def __call__(self, messages: Any, context: ConsumeContext) -> ConsumeStatus | None:
        """On a listener thread. The time that the listener has runs on while the loop is busy with other things."""
        if self._loop.is_closed():
            self.stranded()
            return ConsumeStatus.RECONSUME_LATER
        running = asyncio.run_coroutine_threadsafe(self._listen(messages, context), self._loop)
        self._running.add(running)
        try:
            while True:
                try:
                    return running.result(LOOK_SECONDS)
                except TimeoutError:
                    if running.done():  # perhaps just now; a TimeoutError of the listener's own is raised again
                        return running.result()
                    if self._loop.is_closed():
                        self.stranded()
                        return ConsumeStatus.RECONSUME_LATER
        finally:
            self._running.discard(running)

    def cancel(self) -> None:
        """Those that run still."""
        for running in list(self._running):
            running.cancel()


class PushConsumer(AsyncHandle):
    """Awaits a listener with each message, until it is shut down. As ``shmbroker.PushConsumer``, whose settings it has.

    Listeners that run still when ``await_termination`` is over are cancelled. One that blocks the loop blocks them all.
    """

    def __init__(self, threads: push_consumer.PushConsumer, courier: Courier) -> None:
        self._threads = threads
        self._courier = courier
        courier.stranded = threads.pause

    @property
    def group(self) -> str:
        """The consumer group."""
        return self._threads.group

    @property
    def late(self) -> int:
        """Answers that were refused, since their time was over."""
        return self._threads.late

    @property
    def error(self) -> BaseException | None:
        """What has ended the consumer by itself."""
        return self._threads.error

    @property
    def paused(self) -> bool:
        """Whether ``pause`` was called last."""
        return self._threads.paused

    def pause(self) -> None:
        """Begin no further message until ``resume``."""
        self._threads.pause()

    def resume(self) -> None:
        """Go on after ``pause``."""
        self._threads.resume()

    async def run(self) -> bool:
        """Until SIGTERM, SIGINT or ``stop``; then shut down, and return what that returns.

        The signals are those of the main thread's loop. Raises the error that has ended the consumer, if one has.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._stop_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return await off_loop(self._threads.run)
        except asyncio.CancelledError:
            self.stop()  # the thread that waits in there leaves as well
            raise
        finally:
            self._courier.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Let ``run`` come to its end; also in the handler of a signal."""
        self._threads.stop()

    def _stop_on(self, _signum: int, _frame: object) -> None:
        self.stop()

    async def shutdown(self, await_termination: float | None = None) -> bool:
        """Begin no further message and wait for the listeners that run; False: some had to be cancelled."""
        in_time = await off_loop(lambda: self._threads.shutdown(await_termination))
        self._courier.cancel()
        return in_time

    async def close(self) -> None:
        """As ``shutdown()``."""
        await self.shutdown()

    def __repr__(self) -> str:
        return f"<aio.PushConsumer of group {self.group!r}>"
