"""How the coroutines of one event loop wait: for messages, for the disk, and for calls that block.

The first two cost no thread each: one thread, of the loop, sleeps for all of them (``_native/hub.pxi``). When it is
woken it has the loop look which of them were meant. What is cancelled meanwhile holds nothing.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, Final, TypeVar

from shmbroker._native._core import Client, ConsumerCore, Hub, MessageWait

Result = TypeVar("Result")

LOOK_SECONDS: Final = 0.5  # so long at most nobody looks: what is waited for is the truth, wake-ups are hints


class OffLoop(Exception):
    """What was called on the loop's thread would block there; nothing has happened yet."""


async def off_loop(call: Callable[[], Result], undo: Callable[[Result], Any] | None = None) -> Result:
    """``call()`` in a thread. If this is cancelled meanwhile, its result goes to ``undo``, in a thread as well."""
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(None, call)

    def nobody_waits(done: asyncio.Future[Result]) -> None:
        if not done.cancelled() and done.exception() is None and undo is not None:
            loop.run_in_executor(None, undo, done.result())

    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(nobody_waits)
        raise


class LoopWaits:
    """The waits of one event loop, in whatever memory its broker has at the moment."""

    def __init__(self) -> None:
        self._now: Waits | None = None

    def at(self, client: Client) -> Waits:
        """Those in the memory that ``client`` is attached to."""
        if self._now is None or self._now.client is not client:
            self.close()
            self._now = Waits(client)
        return self._now

    def wake_all(self) -> None:
        """Have everybody look: something has been closed."""
        if self._now is not None:
            self._now.wake_all()

    def close(self) -> None:
        """Who still waits looks, and finds its broker gone; the thread ends."""
        if self._now is not None:
            self._now.close()
            self._now = None


class Waits:
    """The waits of one event loop in the memory of one broker; not thread-safe, but for its own thread."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._loop = asyncio.get_running_loop()
        self._hub = Hub(client)
        self._sleepers: dict[MessageWait, asyncio.Future[None]] = {}
        self._flushes: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap: (position, number, who waits)
        self._numbers = count()
        self._look_is_due = False
        threading.Thread(target=self._sleep_for_all, name="shmbroker-loop", daemon=True).start()

    def close(self) -> None:
        """End the thread, and everybody's wait."""
        self._hub.close()
        self.wake_all()

    def wake_all(self) -> None:
        """Have everybody look."""
        for future in [*self._sleepers.values(), *(future for _, _, future in self._flushes)]:
            _wake(future)

    # ---- the thread

    def _sleep_for_all(self) -> None:
        try:
            while self._hub.sleep(LOOK_SECONDS):
                if not self._look_is_due and (self._sleepers or self._flushes):
                    self._look_is_due = True  # while the loop is busy it is asked once
                    self._loop.call_soon_threadsafe(self._look)
            self._loop.call_soon_threadsafe(self.wake_all)
        except RuntimeError:
            pass  # the loop was closed: nobody waits any more
        finally:
            self._hub.leave()

    # ---- the loop

    @contextmanager
    def message(self, consumer: ConsumerCore) -> Iterator[MessageWait]:
        """From here on whoever makes a message claimable wakes us. Look once more, then ``sleep``, then look.

        Who was woken wakes another member if there is more: if it has found something, and then says so with
        ``pass_on``, or if it is cancelled before it could look.
        """
        wait = MessageWait(self._hub, consumer)
        try:
            yield wait
        except BaseException:
            wait.end()
            wait.pass_on()
            raise
        wait.end()

    async def sleep(self, wait: MessageWait, seconds: float) -> None:
        """Until it is posted, but at most so long, and no longer than LOOK_SECONDS."""
        future = self._loop.create_future()
        self._sleepers[wait] = future
        if wait.posted:  # before the hub's thread could see that somebody sleeps
            _wake(future)
        timer = self._loop.call_later(max(0.0, min(seconds, wait.seconds, LOOK_SECONDS)), _wake, future)
        try:
            await future
        finally:
            timer.cancel()
            del self._sleepers[wait]

    async def flushed(self, end: int, seconds: float) -> None:
        """Until the log is flushed up to ``end``, or it is known that it will not be, or so long."""
        future = self._loop.create_future()
        heapq.heappush(self._flushes, (end, next(self._numbers), future))
        self._await_flush()
        timer = self._loop.call_later(seconds, _wake, future)
        try:
            await future
        finally:
            timer.cancel()

    def _look(self) -> None:
        self._look_is_due = False
        for wait, future in self._sleepers.items():
            if wait.posted or wait.polls:
                _wake(future)
        self._await_flush()

    def _await_flush(self) -> None:
        """The hub waits for the earliest position alone: the next one's turn comes when that is reached."""
        while self._flushes:
            end, _, future = self._flushes[0]
            if not future.done() and not self._hub.begin_flush(end):
                return
            heapq.heappop(self._flushes)
            _wake(future)
        self._hub.end_flush()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
