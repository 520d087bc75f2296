"""The flusher: mirrors the ring to the commit log, and is the only process that writes it.

One flush, and what a crash at each edge leaves (failpoints in store/commit_log.py):

    pwrite of [flushed, end)   any part of it is on the disk: written again from the ring by the next flusher or, if the
                               memory is lost as well, a torn tail
    fdatasync                  all of it is on the disk, nobody knows: written again
    flushed = end, posts       durable and told; a waiter that was not posted is posted by the janitor

``end`` cuts no record and no group in two: what is durable can be recovered. A flusher begins at ``flushed`` and
never relies on what its predecessor wrote: pages that failed to reach the disk look clean to a successor (F1, F2).
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from shmbroker._native._core import Region, group_floor
from shmbroker.errors import StoreFull, StoreReadOnly
from shmbroker.failpoint import failpoint
from shmbroker.store.commit_log import CommitLog
from shmbroker.store.flush_policy import FlushPolicy
from shmbroker.store.segment_pool import SegmentPool
from shmbroker.workers import common

STORE_OK: Final = 0  # enum sb_store_state
STORE_FULL: Final = 1
STORE_READ_ONLY: Final = 2
STEP_BYTES: Final = 4 << 20  # of one flush: who waits for its first bytes does not wait for all that came after
BUSY_BYTES: Final = 1 << 20  # of one flush: from here on the disk is what the log waits for
IDLE_SLEEP: Final = 0.5
HOUSEKEEPING_INTERVAL: Final = 0.1
NO_SPACE_PAUSE: Final = 0.02


class Flusher:
    """The flusher's state between two flushes."""

    def __init__(self, worker: common.Worker) -> None:
        runtime = worker.config.runtime
        self._worker = worker
        self._region = worker.region
        self._view = worker.region.ring_view()
        self._position = worker.region.get("flushed")
        self._pool = SegmentPool(
            worker.paths.log,
            worker.region.segment_bytes,
            worker.store,
            worker.region.get("epoch"),
            self._position,
            segments_ahead=runtime.segments_ahead,
            reserve_segments=runtime.reserve_segments,
            disk_full_watermark=runtime.disk_full_watermark,
            on_capacity=self._publish_capacity,
            gentle=worker.config.sync_flush,
        )
        self._log = CommitLog(self._pool, worker.region.segment_bytes)
        self._policy = FlushPolicy(
            worker.config.sync_flush, runtime.flush_least_bytes, runtime.flush_interval_ms / 1000
        )
        self._tick = runtime.worker_tick_ms / 1000
        self._tails: deque[int] = deque()  # seen, and not yet flushed up to
        self._kept = 0
        self._pool_error: Exception | None = None
        self._next_housekeeping = 0.0
        self._read_only = self._region.get("store_state") == STORE_READ_ONLY

    def serve(self) -> None:
        """Flush until told to stop; then flush what is left and leave.

        On a full disk that may take until retention or the operator makes room. Who waits for us has a deadline; if
        nobody does any more we leave as well. Either way the rest is kept in memory, for the next flusher.
        """
        self._pool.start()
        try:
            while not self._worker.stopping:
                self._housekeeping()
                if self._read_only:
                    # Readers and `status` live on; nothing is written or acknowledged any more (rule 7).
                    self._worker.sleep(common.SLEEP_IDLE, self._region.get("tail"), IDLE_SLEEP)
                elif not self._flush_if_due():
                    self._pause()
            while not self._read_only and self._region.get("tail") > self._position:
                self._housekeeping()
                if not self._flush(self._region.get("tail")) and self._worker.orphaned:
                    break
        finally:
            self._pool.stop()
            self._log.close()

    def _flush_if_due(self) -> bool:
        tail = self._region.get("tail")
        if tail == self._position or not self._policy.due(tail - self._position):
            return False
        return self._flush(tail)

    def _pause(self) -> None:
        """Idle: until the next append. Else for a tick, unless somebody waits for the disk."""
        if self._region.get("tail") == self._position:
            self._worker.sleep(common.SLEEP_IDLE, self._position, IDLE_SLEEP)
        elif self._worker.sleep(common.SLEEP_TICK, 0, self._tick):
            self._policy.hurry()

    def _flush(self, tail: int) -> bool:
        """One flush of at most STEP_BYTES, or of one group that is larger. False if it could not be made."""
        position, end = self._position, self._end_of_step(tail)
        start = position & (self._region.ring_bytes - 1)
        try:
            self._log.write(self._view[start : start + end - position], position)
            self._log.sync()
        except StoreFull:
            time.sleep(NO_SPACE_PAUSE)  # the pool goes on looking for room
            return False
        except StoreReadOnly as error:
            self._latch(error)
            return False
        if end - self._position >= BUSY_BYTES:
            self._pool.leave_disk_alone()
        self._position = end
        self._region.publish_flushed(end)
        failpoint("flusher.after_publish")
        self._policy.flushed()
        return True

    def _end_of_step(self, tail: int) -> int:
        """About STEP_BYTES away, and behind whole groups: whatever was once the tail ends a group."""
        reach = self._position + STEP_BYTES
        if not self._tails or self._tails[-1] != tail:
            self._tails.append(tail)
        end = 0
        while self._tails and self._tails[0] <= (reach if end else reach + STEP_BYTES):
            end = self._tails.popleft()
        if end > self._position:
            return end
        start = self._position & (self._region.ring_bytes - 1)
        data = self._view[start : start + tail - self._position]
        end = group_floor(data, self._position, self._region.segment_bytes, reach)
        return end if end > self._position else tail

    def _latch(self, error: StoreReadOnly) -> None:
        """A write or a sync failed. What the disk holds is unknown: nobody is told that it is durable, ever."""
        number = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
        self._read_only = True
        self._region.publish_store_state(STORE_READ_ONLY, number or 0)
        self._worker.log.critical("the store is read-only from now on: %s", error)

    def _housekeeping(self) -> None:
        now = time.monotonic()
        if now < self._next_housekeeping:
            return
        self._next_housekeeping = now + HOUSEKEEPING_INTERVAL
        self._region.worker_beat(self._worker.role)
        kept = self._region.get("kept")
        if kept > self._kept:
            self._kept = kept
            self._pool.retire(kept)
        if not self._read_only:
            self._publish_full(self._pool.full)
        error = self._pool.error
        if error is not None and repr(error) != repr(self._pool_error):
            self._worker.log.warning("no segment could be made: %s", error)
        self._pool_error = error

    def _publish_full(self, full: bool) -> None:
        if full == (self._region.get("store_state") == STORE_FULL):
            return
        self._region.publish_store_state(STORE_FULL if full else STORE_OK, 0)
        if full:
            self._worker.log.warning("the disk is full: sends are refused once the prepared segments are used up")
        else:
            self._worker.log.info("the disk has room again")

    def _publish_capacity(self, user: int, system: int) -> None:
        publish_capacity(self._region, user, system)


def publish_capacity(region: Region, user: int, system: int) -> None:
    """Appends may go on up to these positions: segments stand ready for them. Called from any thread."""
    region.raise_to("system_capacity", system)
    region.raise_to("user_capacity", user)


def serve(worker: common.Worker) -> None:
    Flusher(worker).serve()


def main(argv: Sequence[str] | None = None) -> int:
    return common.run("flusher", serve, argv)


if __name__ == "__main__":
    sys.exit(main())
