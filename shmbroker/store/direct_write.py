"""Small writes that go past the page cache and are durable when they return: what a SYNC_FLUSH sender waits for.

One call does what ``pwrite`` + ``fdatasync`` do in two, without dirtying pages and looking for them again. It writes
whole blocks only, so the block in which the last write ended is kept and written again with what follows:

    file      | block        | block        | block        |
    before    |##############|#####         |              |        # durable already
    data                      ·····+++++++++++++               + kept block's head, data, zeros: one aligned write

A crash leaves what one of ``pwrite`` leaves: any part of the range; bytes that were durable are written with the same
value. A file system that knows no direct writes is written the ordinary way. Larger writes are as well: they gain
nothing, and what they leave in the page cache is what a lagging consumer reads next.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from typing import Final

from shmbroker.store.files import Disk, open_file
from shmbroker.store.segment import Segment

DIRECT_BYTES_MAX: Final = 128 * 1024
BLOCK_BYTES: Final = 4096
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


class DirectWriter:
    """Writes the growing end of a segment. One writer to a log; not thread-safe."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._buffer = memoryview(mmap.mmap(-1, DIRECT_BYTES_MAX + 2 * BLOCK_BYTES))  # begins at a page
        self._segment: Segment | None = None
        self._fd = -1  # of that segment; -1: write it the ordinary way
        self._end = -1  # file offset behind the last write; the block that it lies in begins the buffer
        self._supported = True

    def write(self, segment: Segment, data: memoryview, offset: int) -> bool:
        """Put ``data``, at most DIRECT_BYTES_MAX, at ``offset`` of the segment's file, durably.

        False if it has to be written the ordinary way. Raises OSError; what the disk then holds is unknown.
        """
        if segment is not self._segment:
            self._enter(segment)
        if self._fd < 0:
            return False
        head = offset % BLOCK_BYTES
        start, end = offset - head, head + len(data)
        size = -(-end // BLOCK_BYTES) * BLOCK_BYTES  # a segment is a whole number of blocks: never past its end
        buffer = self._buffer
        if offset != self._end:
            kept = os.pread(segment.fd, head, start)
            buffer[: len(kept)] = kept
            if len(kept) < head:
                return False
        buffer[head:end] = data
        buffer[end:size] = bytes(size - end)
        self._end = -1  # unless all goes well
        try:
            written = self._disk.pwritev(self._fd, [buffer[:size]], start, os.RWF_DSYNC)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self._supported = False
            self.close()
            return False
        if written != size:
            return False
        last = end - end % BLOCK_BYTES
        if last:
            buffer[: end - last] = buffer[last:end]
        self._end = offset + len(data)
        return True

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = self._end = -1

    def _enter(self, segment: Segment) -> None:
        """Opening is no write: where it fails, the ordinary way may still work."""
        self.close()
        self._segment = segment
        if self._supported:
            with suppress(OSError):
                self._fd = open_file(segment.path, os.O_WRONLY | os.O_DIRECT)
