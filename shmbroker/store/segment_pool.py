"""Segments made ready ahead of need, so that the writer meets neither a new file nor a full disk.

    writer ─▶ | entered | ready | ready | reserve | reserve |          retired ─▶ recycled to the end, or removed
                                        ▲ user_capacity     ▲ system_capacity

A segment is *ready* when its file stands durably under its name with all blocks allocated; its capacity counts from
then on. Writing zeros over it comes after, because a first write into a block that was never written costs a journal
commit. Both are the work of one thread of lowest priority. The last ``reserve_segments`` are for the broker's own
records only (R16): with them consumers can still acknowledge, and retention can still free space, on a full disk.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shmbroker.errors import CorruptLog, StoreFull
from shmbroker.failpoint import failpoint
from shmbroker.naming import segment_name
from shmbroker.store.files import ZERO_STEP_BYTES, sync_directory
from shmbroker.store.segment import Segment, SegmentError, SegmentHeader, list_segments

RETRY_SECONDS: Final = 1.0
BUSY_SECONDS: Final = 0.1  # how long no zeros are written after a large write of the log
FIRST_FILL_SECONDS: Final = 0.1  # the first SYNC_FLUSH send of a new store waits so long, and one gentle step more
GENTLE_STEP_BYTES: Final = 256 * 1024  # what a small flush meets on its way to the disk
GENTLE_REST: Final = 4  # and how many times as long the disk is then left alone
RECYCLED_AHEAD_MAX: Final = 2
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class _Ready:
    """A ready segment. ``step`` is held for one step of zeros, so the writer never waits for more than that."""

    def __init__(self, segment: Segment, filled: int) -> None:
        self.segment = segment
        self.filled = filled
        self.entered = False
        self.step = threading.Lock()

    def fill_step(self, step_bytes: int = ZERO_STEP_BYTES) -> bool:
        """Write and sync the next zeros; False when there is nothing (more) to do here."""
        with self.step:
            segment, start = self.segment, self.filled
            if self.entered or start >= segment.end:
                return False
            end = min(start + step_bytes, segment.end)
            self.filled = segment.end  # unless all goes well: a segment that cannot be filled is merely slower
            segment.zero(start, end)
            segment.sync()
            self.filled = end
            failpoint("segment.half_filled")  # leaves a ready segment whose rest is unwritten: valid, and slower
            return True


class SegmentPool:
    """The segments from the writer's on. One pool, one writer and one thread to a log.

    ``position``: where the writer will go on. ``on_capacity(user, system)`` is called, from any thread, after either
    has grown; both only grow, and are positions before which an append has to end. ``gentle``: small flushes wait for
    the same disk, so fill slowly.
    """

    def __init__(
        self,
        directory: Path,
        segment_bytes: int,
        store: bytes,
        epoch: int,
        position: int,
        *,
        segments_ahead: int = 1,
        reserve_segments: int = 2,
        disk_full_watermark: float = 0.95,
        on_capacity: Callable[[int, int], None] | None = None,
        gentle: bool = False,
    ) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._store = store
        self._epoch = epoch
        self._ahead_bytes = segments_ahead * segment_bytes
        self._reserve_bytes = reserve_segments * segment_bytes
        self._watermark = disk_full_watermark
        self._on_capacity = on_capacity
        self._gentle = gentle
        self._making = threading.Lock()  # held while a file is made: the thread and the writer take turns
        self._changed = threading.Condition()  # guards all below
        self._ready: dict[int, _Ready] = {}
        self._retired: list[Path] = []
        self._retired_to = 0
        self._writer_base = position - position % segment_bytes
        self._end = self._writer_base
        self._user_capacity = 0
        self._told = (-1, -1)
        self._stopping = False
        self._busy_until = 0.0
        self._thread: threading.Thread | None = None
        self.full = False  # the disk has no room for what comes after the capacity of now
        self.error: Exception | None = None  # why the last attempt to make a segment failed; None once one succeeded
        self._adopt(position)

    @property
    def user_capacity(self) -> int:
        """Position before which every user append has to end."""
        with self._changed:
            return self._user_capacity

    @property
    def system_capacity(self) -> int:
        """Position before which every append of the broker's own has to end."""
        with self._changed:
            return self._end

    def start(self) -> None:
        """Make and fill the segment that the writer is about to enter, then start the thread.

        Only a new store's first segment has much to be filled, and nothing fills it once the writer is in it: every
        small flush into it would be slower for as long as it lasts.
        """
        deadline = time.monotonic() + FIRST_FILL_SECONDS
        try:
            if self._end == self._writer_base:
                self._make_next()
            with self._changed:
                first = self._ready.get(self._writer_base)
            while first is not None and time.monotonic() < deadline and first.fill_step(GENTLE_STEP_BYTES):
                pass
        except (OSError, StoreFull) as error:
            self.error = error
        self._thread = threading.Thread(target=self._run, name="segment-pool", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after its present step; close the segments that nobody has taken."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._changed:
            for ready in self._ready.values():
                ready.segment.close()
            self._ready.clear()

    def take(self, base: int) -> Segment:
        """The segment at ``base``, for the writer to enter. It waits for one step of zeros at most.

        A segment that is not ready is made here and now. Raises StoreFull if there is no room for it.
        """
        with self._changed:
            ready = self._ready.pop(base, None)
        if ready is None:
            with self._making:
                with self._changed:
                    ready = self._ready.pop(base, None)
                if ready is None:
                    ready = self._make(base)
        ready.entered = True  # no further step begins
        with ready.step:  # and the present one is over
            pass
        with self._changed:
            self._writer_base = max(self._writer_base, base)
            self._grow(base + self._segment_bytes, users=False)
            self._changed.notify_all()
        self._tell()
        return ready.segment

    def retire(self, kept: int) -> int:
        """Segments that end at or before position ``kept`` are no longer needed. Returns how many are new to that."""
        with self._changed:
            limit = min(kept - kept % self._segment_bytes, self._writer_base)
            if limit <= self._retired_to:
                return 0
            bases = [base for base in list_segments(self._directory) if self._retired_to <= base < limit]
            self._retired += [self._directory / segment_name(base) for base in bases]
            self._retired_to = limit
            self._changed.notify_all()
        return len(bases)

    def leave_disk_alone(self) -> None:
        """The writer has all the disk for BUSY_SECONDS: large writes gain nothing from zeros, and wait for them."""
        self._busy_until = time.monotonic() + BUSY_SECONDS

    def work(self) -> bool:
        """One piece of work: make, recycle, remove or fill a segment. False if there was none, or no room for it."""
        return self._make_next() or self._recycle() or self._fill()

    def _rest(self, seconds: float) -> None:
        with self._changed:
            if not self._stopping:
                self._changed.wait(seconds)

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # on Linux: of this thread alone
        while True:
            with self._changed:
                if self._stopping:
                    return
            begun = time.monotonic()
            try:
                busy = self.work()
            except (OSError, StoreFull) as error:
                self.error = error
                busy = False
            if not busy:
                self._rest(RETRY_SECONDS)
            elif self._gentle:
                self._rest(GENTLE_REST * (time.monotonic() - begun))

    def _adopt(self, position: int) -> None:
        """Take over what an earlier pool made ready: the segments that follow the writer's without a gap."""
        while (path := self._directory / segment_name(self._end)).exists():
            try:
                segment = Segment.open(path, self._segment_bytes, self._store, writable=True)
            except SegmentError:
                if self._end == self._writer_base:
                    raise
                break  # holds no log: it is made anew when its turn comes
            # Never zeros over the log: a block of zeros in a record may count as not written on some file systems.
            self._ready[self._end] = _Ready(segment, max(position, segment.filled_to()))
            self._end = segment.end
        self._user_capacity = max(0, self._end - self._reserve_bytes)

    def _make_next(self) -> bool:
        """Make one more segment if fewer than wanted stand ready and the disk has room."""
        room = self._disk_has_room()
        with self._making:
            with self._changed:
                beyond = self._end - (self._writer_base + self._segment_bytes)
                recycled = self._retired.pop(0) if beyond < self._wanted() and self._retired else None
                if room or recycled:
                    self._grow(self._end, users=True)
                base = self._end
            self._tell()
            self.full = not room
            if recycled is None and beyond >= (self._wanted() if room else self._reserve_bytes):
                return False
            try:
                ready = self._make(base, recycled)
            except StoreFull:
                self.full = True
                return False
            with self._changed:
                self._ready[base] = ready
                self._grow(ready.segment.end, users=room or recycled is not None)
        self._tell()
        return True

    def _recycle(self) -> bool:
        """Deal with a retired segment that nobody needs just now: keep it ready, or give its space back."""
        with self._making:
            with self._changed:
                if not self._retired:
                    return False
                path = self._retired.pop(0)
                base = self._end
                ahead = base - (self._writer_base + self._segment_bytes)
            if ahead >= self._wanted() + RECYCLED_AHEAD_MAX * self._segment_bytes:
                path.unlink(missing_ok=True)
                sync_directory(self._directory)
                return True
            ready = self._make(base, path)
            with self._changed:
                self._ready[base] = ready
                self._grow(ready.segment.end, users=True)
        self._tell()
        return True

    def _fill(self) -> bool:
        if time.monotonic() < self._busy_until:
            return False
        with self._changed:
            waiting = sorted(self._ready.items())
        step_bytes = GENTLE_STEP_BYTES if self._gentle else ZERO_STEP_BYTES
        return any(ready.fill_step(step_bytes) for _, ready in waiting)

    def _make(self, base: int, recycled: Path | None = None) -> _Ready:
        header = SegmentHeader(base, self._segment_bytes, self._epoch, self._store)
        path = self._directory / segment_name(base)
        if base < self._end and path.exists():
            # The writer goes back to a segment that it, or a pool before, has had: its records must stay.
            segment = Segment.open(path, self._segment_bytes, self._store, writable=True)
            return _Ready(segment, segment.end)
        if base != self._end:
            raise CorruptLog(f"{path}: asked for, but the log's segments end at {self._end}", base, str(path))
        try:
            segment = Segment.create(self._directory, header, recycled)
        except OSError as error:
            self.error = error
            if error.errno in _NO_SPACE:
                raise StoreFull(f"{path}: no room for a segment of {self._segment_bytes} bytes") from error
            raise
        self.error = None
        return _Ready(segment, base if recycled is None else segment.end)

    def _wanted(self) -> int:
        return self._ahead_bytes + self._reserve_bytes

    def _disk_has_room(self) -> bool:
        """Below the watermark? Above it only the reserve is kept up, and users get no more capacity."""
        disk = os.statvfs(self._directory)
        free = disk.f_bavail * disk.f_frsize
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        return used <= self._watermark * (used + free)

    def _grow(self, end: int, *, users: bool) -> None:
        """Under ``_changed``: capacity only grows."""
        self._end = max(self._end, end)
        if users:
            self._user_capacity = max(self._user_capacity, self._end - self._reserve_bytes)

    def _tell(self) -> None:
        with self._changed:
            now = self._user_capacity, self._end
            if now == self._told or self._on_capacity is None:
                return
            self._told = now
        self._on_capacity(*now)
