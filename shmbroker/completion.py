"""The thread behind ``send_async``: positions only grow, so results become durable in the order in which they were stored,
and one thread that waits for the first answers them all in turn."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from shmbroker._native._core import SendResult
from shmbroker.errors import BrokerClosed

if TYPE_CHECKING:
    from shmbroker.producer import SendCallback

PENDING_MAX: Final = 65_536  # further sends wait for the callbacks
log = logging.getLogger(__name__)

Pending = tuple["SendCallback | None", SendResult | Exception, bool]


class Completion:
    """Calls callbacks, one at a time, in the order of the sends."""

    def __init__(self, settle: Callable[[SendResult, bool], SendResult]) -> None:
        self.order = threading.Lock()  # held around append and registration: callbacks keep the order of the log
        self._settle = settle
        self._pending: deque[Pending] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="shmbroker-callbacks", daemon=True)
        self._thread.start()

    def stored(self, callback: SendCallback | None, result: SendResult, wait_store_ok: bool) -> None:
        """``result`` is in the ring; its status is still to be found out."""
        self._put((callback, result, wait_store_ok))

    def failed(self, callback: SendCallback | None, error: Exception) -> None:
        """Nothing was stored."""
        self._put((callback, error, False))

    def _put(self, pending: Pending) -> None:
        with self._changed:
            while len(self._pending) >= PENDING_MAX and not self._closing:
                self._changed.wait()
            if self._closing:
                raise BrokerClosed("this producer was closed")
            self._pending.append(pending)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._pending:
                    if self._closing:
                        return
                    self._changed.wait()
                callback, outcome, wait_store_ok = self._pending.popleft()
                self._changed.notify_all()
            try:
                self._tell(callback, outcome, wait_store_ok)
            except Exception:  # a callback's own error must not silence those behind it
                log.exception("a send callback raised")

    def _tell(self, callback: SendCallback | None, outcome: SendResult | Exception, wait_store_ok: bool) -> None:
        if isinstance(outcome, SendResult):
            try:
                outcome = self._settle(outcome, wait_store_ok)
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
        """Return when every callback has been called."""
        with self.order, self._changed:  # a send that is under way registers first
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
