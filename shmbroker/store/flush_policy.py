"""When the flusher writes what it has. Pure: the flusher acts on the answer, and tells what happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

LARGE_BYTES: Final = 1 << 20  # not worth waiting for more: a larger write is no faster per byte


class FlushPolicy:
    """SYNC_FLUSH: at once; what comes during one fdatasync shares the next (group commit).

    ASYNC_FLUSH: from ``least_bytes`` on, after ``interval`` seconds, or as soon as somebody waits for it.
    """

    def __init__(
        self, sync: bool, least_bytes: int, interval: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sync = sync
        self._least_bytes = least_bytes
        self._interval = interval
        self._clock = clock
        self._waiting_since: float | None = None
        self._hurry = False

    def due(self, unflushed_bytes: int) -> bool:
        """Is it time to write ``unflushed_bytes`` (more than 0)?"""
        if self._sync or self._hurry or unflushed_bytes >= LARGE_BYTES:
            return True
        if self._waiting_since is None:
            # The first record after a rest: a burst usually follows it within the tick that comes now.
            self._waiting_since = self._clock()
            return False
        return unflushed_bytes >= self._least_bytes or self._clock() - self._waiting_since >= self._interval

    def hurry(self) -> None:
        """Somebody waits for the disk: the next answer is yes."""
        self._hurry = True

    def flushed(self) -> None:
        """Something was written and synced."""
        self._hurry = False
        self._waiting_since = None
