"""The thread behind ``send_async``: positions only grow, so results become durable in the order they were stored in,
and one thread that waits for the first answers them all in turn."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from shmbroker._native._core import SendResult, monotonic_ns
from shmbroker.errors import BadRequest, BrokerClosed

if TYPE_CHECKING:
    from shmbroker.producer import SendCallback

PENDING_MAX: Final = 65_536  # further sends wait for the callbacks
log = logging.getLogger(__name__)


class Pending(NamedTuple):
    """One send that somebody is to be told about."""

    callback: SendCallback | None
    outcome: SendResult | Exception
    deadline_ns: int  # of CLOCK_MONOTONIC; 0: no durability is waited for


class Completion:
    """Calls callbacks, one at a time, in the order of the sends."""

    def __init__(self, settle: Callable[[SendResult, int], SendResult]) -> None:
        self._settle = settle
        self._order = threading.Lock()  # held around append and registration: callbacks keep the order of the log
        self._pending: deque[Pending] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="shmbroker-callbacks", daemon=True)
        self._thread.start()

    def send(self, store: Callable[[], SendResult], callback: SendCallback | None, wait_ns: int) -> None:
        """Store a message now and register who is told. BadRequest is raised, any other failure is the callback's."""
        self._wait_for_room()
        with self._order:
            if self._closing:
                raise BrokerClosed("this producer was closed")
            outcome: SendResult | Exception
            try:
                outcome = store()
            except BadRequest:
                raise
            except Exception as error:
                outcome = error
            with self._changed:
                self._pending.append(Pending(callback, outcome, monotonic_ns() + wait_ns if wait_ns else 0))
                self._changed.notify_all()

    def _wait_for_room(self) -> None:
        if threading.current_thread() is self._thread:
            return  # a callback that sends would wait for itself
        with self._changed:
            while len(self._pending) >= PENDING_MAX and not self._closing:
                self._changed.wait()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._pending:
                    if self._closing:
                        return
                    self._changed.wait()
                pending = self._pending.popleft()
                self._changed.notify_all()
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

    def close(self) -> None:
        """Return when every callback has been called. A callback may close its own producer: it is not awaited then."""
        with self._order, self._changed:  # a send that is under way registers first
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
