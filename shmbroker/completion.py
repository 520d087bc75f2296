"""The thread behind ``send_async``: results become durable in the order they were stored in, so one thread that waits
for the first answers them all in turn.

A send may wait for room in the ring, and its wait runs signal handlers, which may send or close in their turn: so no
lock is held here, over that wait or at all. What is shared is changed by single operations that nothing interrupts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread, current_thread, get_ident
from typing import TYPE_CHECKING, Final, NamedTuple

from shmbroker._native._core import SendResult, monotonic_ns
from shmbroker.errors import BadRequest, BrokerBusy, BrokerClosed

if TYPE_CHECKING:
    from shmbroker.producer import SendCallback

PENDING_MAX: Final = 65_536  # further sends wait for the callbacks
_LOOK_SECONDS: Final = 0.001  # with so many pending, nobody notices
log = logging.getLogger(__name__)


class Pending(NamedTuple):
    """One send that somebody is to be told about."""

    callback: SendCallback | None
    outcome: SendResult | Exception
    deadline_ns: int  # of CLOCK_MONOTONIC; 0: no durability is waited for


class Completion:
    """Calls callbacks, one at a time, each thread's in the order of its sends."""

    def __init__(self, settle: Callable[[SendResult, int], SendResult]) -> None:
        self._settle = settle
        self._pending: SimpleQueue[Pending | None] = SimpleQueue()  # None: see whether it is time to end
        self._under_way: dict[object, int] = {}  # sends that are in here, and the threads that they are on
        self._closing = False
        self._thread = Thread(target=self._run, name="shmbroker-callbacks", daemon=True)
        self._thread.start()

    def send(
        self, store: Callable[[float], SendResult], callback: SendCallback | None, timeout: float, wait_ns: int
    ) -> None:
        """Store a message within ``timeout`` seconds and register who is told, in ``wait_ns`` after that at the latest.

        Raises BadRequest, TypeError, and BrokerBusy if nobody can be told any more; other failures are the callback's.
        """
        this_send = object()
        try:
            self._under_way[this_send] = get_ident()
            if self._pending.qsize() >= PENDING_MAX:
                timeout = self._wait_for_room(timeout)
            if self._closing:
                raise BrokerClosed("this producer was closed")
            outcome: SendResult | Exception
            try:
                outcome = store(timeout)
            except (BadRequest, TypeError):  # the caller's mistake, told where it was made
                raise
            except Exception as error:
                outcome = error
            self._pending.put(Pending(callback, outcome, monotonic_ns() + wait_ns if wait_ns else 0))
        finally:
            self._under_way.pop(this_send, None)
            if self._closing:
                self._pending.put(None)

    def _wait_for_room(self, timeout: float) -> float:
        """What is left of ``timeout`` when there is room."""
        if current_thread() is self._thread:
            return timeout  # a callback that sends would wait for itself
        deadline = time.monotonic() + timeout
        while self._pending.qsize() >= PENDING_MAX and not self._closing:
            if time.monotonic() >= deadline:
                raise BrokerBusy(
                    f"{PENDING_MAX} sends wait for their callbacks, and none was called within {timeout:g} s: they "
                    "run one at a time, and have to return soon. Nothing was stored"
                )
            time.sleep(_LOOK_SECONDS)
        return max(0.0, deadline - time.monotonic())

    def _run(self) -> None:
        while True:
            pending = self._pending.get()
            if pending is None:
                if not self._under_way and self._pending.empty():
                    return
                continue
            try:
                self._tell(*pending)
            except Exception:  # a callback's own error must not silence those behind it
                log.exception("a send callback raised")

    def _tell(self, callback: SendCallback | None, outcome: SendResult | Exception, deadline_ns: int) -> None:
        if deadline_ns and isinstance(outcome, SendResult):
            try:
                outcome = self._settle(outcome, deadline_ns)
            except Exception as error:
                outcome = error
        if callback is None:
            if isinstance(outcome, Exception):
                log.error("an asynchronous send failed: %s", outcome)
        elif isinstance(outcome, Exception):
            callback.on_exception(outcome)
        else:
            callback.on_success(outcome)

    def end(self) -> None:
        """Accept no further sends; the thread ends when every callback has been called."""
        self._closing = True
        self._pending.put(None)

    def close(self) -> None:
        """The same, and return when it has ended, unless it is waiting for us: for the callback that closes its own
        producer, or for the send that the signal handler which closes it has interrupted."""
        self.end()
        if current_thread() is not self._thread and get_ident() not in self._under_way.values():
            self._thread.join()
