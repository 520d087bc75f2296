"""Which listener threads of this process run beside each other, and which one alone.

A message whose last delivery ended without an answer may be one that kills its process. If it does so again, whatever
runs beside it is charged an attempt as well, and reaches the dead letters innocent. So it runs alone: nobody else
begins a message while a thread asks for that, and it begins when the others' listeners have returned (R10). Until then
it stays prefetched, and an idle process may take it over. A listener whose time is over holds nothing that could be
charged, so that one which never returns does not stand in the way for ever.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from shmbroker._native._core import Lane, hold_back

LOOK_SECONDS: Final = 0.05  # whoever waits here looks so often whether it is still wanted, or somebody's time is over


class Floor:
    """Guarded by one condition. Threads come and go once for many messages, so its cost does not matter."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As new; in a forked child, since the threads that were on it exist in the parent only."""
        self._changed = threading.Condition()
        self._running: set[Lane] = set()
        self._asking = 0
        self._alone: Lane | None = None
        hold_back(False)

    @contextmanager
    def together(self, lane: Lane, unwanted: Callable[[], bool]) -> Iterator[bool]:
        """Run beside others. False: ``unwanted`` before that was possible."""
        with self._changed:
            while self._is_closed() and not unwanted():
                self._changed.wait(LOOK_SECONDS)
            entered = not self._is_closed()
            if entered:
                self._running.add(lane)
                hold_back(False)
        try:
            yield entered
        finally:
            with self._changed:
                self._running.discard(lane)
                self._tell()

    @contextmanager
    def alone(self, lane: Lane, unwanted: Callable[[], bool]) -> Iterator[bool]:
        """Run beside nobody. False: ``unwanted`` before that was possible."""
        with self._changed:
            self._asking += 1
            hold_back(True)
            while self._is_taken() and not unwanted():
                self._changed.wait(LOOK_SECONDS)
            self._asking -= 1
            entered = not self._is_taken()
            if entered:
                self._alone = lane
            self._tell()
        try:
            yield entered
        finally:
            with self._changed:
                if self._alone is lane:
                    self._alone = None
                self._tell()

    def _is_taken(self) -> bool:
        """Somebody runs whom a crash would charge."""
        return self._is_alone() or any(not lane.overran for lane in self._running)

    def _is_alone(self) -> bool:
        return self._alone is not None and not self._alone.overran

    def _is_closed(self) -> bool:
        """Somebody runs alone, or wants to."""
        return self._asking > 0 or self._is_alone()

    def _tell(self) -> None:
        hold_back(self._is_closed())
        self._changed.notify_all()


floor = Floor()  # the process's: a crash ends all of its consumers, whatever their groups
os.register_at_fork(after_in_child=floor.reset)
