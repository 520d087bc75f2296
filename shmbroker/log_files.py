"""The files of the broker that a handle is attached to, as its producers and consumers read them.

They are opened by the first consumer that lags behind the ring, and anew after a restart of the broker or a fork.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shmbroker._native._core import Region
from shmbroker.errors import BrokerClosed
from shmbroker.naming import BrokerPaths

if TYPE_CHECKING:
    from shmbroker.store.commit_log import LogReader
    from shmbroker.store.consume_queue import ConsumeQueues
    from shmbroker.store.queue_hole import Hole
    from shmbroker.store.serving_reader import ServingReader

WINDOW_BYTES: Final = 1 << 20  # of the log's files, read at a time for a consumer that lags


class LogFiles:
    """Thread-safe. ``serving``: memory and store of the broker that runs now; raises BrokerClosed, NotReady.

    It is the method of a handle that owns this and must not be kept alive by it.
    """

    def __init__(self, paths: BrokerPaths, serving: Callable[[], tuple[Region, bytes]]) -> None:
        self._paths = paths
        self._serving_of_owner = weakref.WeakMethod(serving)
        self._lock = threading.Lock()
        self._opened: tuple[LogReader, ConsumeQueues] | None = None
        self._holes: dict[tuple[int, int, int], Hole] = {}  # without an end; who waits for it asks again and again

    @property
    def store(self) -> bytes:
        """Identity of the log that is served now: another one if somebody has emptied the directory."""
        return self._serving()[1]

    def read_log(self, position: int) -> bytes:
        """The record at ``position``. Raises PositionGone, CorruptLog."""
        with self._lock:
            _, log, _ = self._open()
            return log.read(position).raw

    def hole_at(self, topic_id: int, queue_id: int, offset: int) -> tuple[int, bool] | None:
        """The first offset behind the hole at ``offset``, and whether the log is whole there and has no message for it.

        None: nothing is behind it yet. Raises CorruptLog.
        """
        from shmbroker.store.queue_hole import Hole, examine

        asked = topic_id, queue_id, offset
        with self._lock:
            region, log, queues = self._open()
            start, end = region.get("kept"), min(region.get("flushed"), region.get("dispatched"))
            known = self._holes.pop(asked, Hole(None, True, start))
            if known.seen < end:
                found = examine(log, region.segment_bytes, queues, asked[:2], offset, max(start, known.seen), end)
                known = Hole(found.end, found.sound and known.sound, found.seen)
            if known.end is None:
                self._holes[asked] = known
                return None
            return known.end, known.sound

    def read_entries(self, topic_id: int, queue_id: int, offset: int, count: int) -> bytes:
        """Packed consume queue entries (``<QII``: position, size, tag hash) as the file has them, holes as zeros."""
        with self._lock:
            _, _, queues = self._open()
            return queues.packed(topic_id, queue_id, offset, count)

    def read_window(self, position: int) -> bytes:
        """At most WINDOW_BYTES from ``position`` on, in one segment; b"" if retention took it."""
        with self._lock:
            region, log, _ = self._open()
            return bytes(log.window(position, region.get("flushed"), WINDOW_BYTES))

    def open_log(self) -> ServingReader:
        """The log, for the caller alone, who closes it."""
        from shmbroker.store.serving_reader import ServingReader

        region, store = self._serving()
        return ServingReader(self._paths.log, region.segment_bytes, store)

    @property
    def timers(self) -> tuple[Path, bytes]:
        """Where the timer index lies, and the identity of its log."""
        return self._paths.timers, self._serving()[1]

    def close(self) -> None:
        """Close what is open; the next call opens it anew."""
        with self._lock:
            for opened in self._opened or ():
                opened.close()
            self._opened = None
            self._holes.clear()

    def _serving(self) -> tuple[Region, bytes]:
        serving = self._serving_of_owner()
        if serving is None:
            raise BrokerClosed("this handle was dropped")
        return serving()

    def _open(self) -> tuple[Region, LogReader, ConsumeQueues]:
        region, store = self._serving()
        if self._opened is None:
            from shmbroker.store.consume_queue import ConsumeQueues

            self._opened = self.open_log(), ConsumeQueues(self._paths.queues, store)
        log, queues = self._opened
        return region, log, queues
