"""The log's reader for those who go on serving: dispatcher and consumers.

What the disk cannot read (EIO) is damage to them like any other: it is named, and what lies before and behind it is
served. Recovery and the tools use the plain reader: a start must not take a block that cannot be read for a torn tail.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from shmbroker.errors import CorruptLog, PositionGone, ShmBrokerError
from shmbroker.record import Record
from shmbroker.store.commit_log import LogReader

_LEAST_BYTES: Final = 512  # what a disk reads at once
_PAGE_BYTES: Final = 4096


class ServingReader(LogReader):
    """As LogReader; where it raises OSError for a block that cannot be read, this one knows what to say."""

    def read(self, position: int) -> Record:
        try:
            return super().read(position)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise self.explain(position, os.strerror(errno.EIO)) from error

    def window(self, position: int, end: int, size: int | None = None) -> memoryview:
        """As LogReader's, but only what stands before a block that cannot be read; empty if that is nothing."""
        size = min(size or self._window_bytes, end - position)
        while True:
            try:
                return super().window(position, end, size)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
            if size < _LEAST_BYTES:
                return memoryview(b"")
            size //= 2

    def explain(self, position: int, what: str) -> ShmBrokerError:
        """As LogReader's, for a segment whose header cannot be read either."""
        try:
            return super().explain(position, what)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return CorruptLog(
                f"position {position}: {what}; {error}. `shmbroker log verify` shows the extent", position
            )

    def _resume(self, position: int) -> int:
        """As LogReader's; but behind a block that cannot be read the segment goes on."""
        try:
            self._segment(position)
        except (PositionGone, CorruptLog):
            return super()._resume(position)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return super()._resume(position)
        return position + _PAGE_BYTES - position % _PAGE_BYTES
