"""The checkpoint: where recovery may begin to read, and what is known to be on the disk. A hint, never the truth.

One file of two pages; each holds a whole copy, and the newer valid one counts. They are written alternately, so a torn
write spoils the older copy at worst, and an older checkpoint only means that recovery reads more.

    0        8        12       16           24           32           40           48           56           64
    +--------+--------+--------+------------+------------+------------+------------+------------+------------+
    | magic  | version| crc    | generation | flushed    | dispatched | snapshot   | kept       | written ns |
    +--------+--------+--------+------------+------------+------------+------------+------------+------------+
    | store (16 bytes)         | flags  | epochs | { epoch | previous | start } ... (24 bytes each)  | zeros to 4096
    64                         80       84       88          with 4 + 4 + 8 bytes and 8 of zeros

    little-endian; crc: CRC-32C of the page with zeros in its place; snapshot: 2^64 - 1 for none; flags: bit 0 clean
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

from shmbroker._native._core import crc32c
from shmbroker.failpoint import failpoint
from shmbroker.store.files import open_file, pwrite_all, sync_directory

PAGE_BYTES: Final = 4096
VERSION: Final = 1
_MAGIC: Final = b"SHMBCHK\0"
_FIELDS: Final = struct.Struct("<8sIIQQQQQq16sII")
_EPOCH: Final = struct.Struct("<IIQ8x")
_CRC_AT: Final = 12
_NONE: Final = 2**64 - 1
_CLEAN: Final = 1
EPOCHS_MAX: Final = (PAGE_BYTES - _FIELDS.size) // _EPOCH.size


class Epoch(NamedTuple):
    """Epoch ``epoch`` follows ``previous`` and begins at position ``start``."""

    epoch: int
    start: int
    previous: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What one copy says. Positions; ``written_ns`` is CLOCK_REALTIME; ``clean``: a clean stop left nothing behind."""

    store: bytes
    flushed: int = 0
    dispatched: int = 0
    snapshot: int | None = None
    kept: int = 0
    epochs: tuple[Epoch, ...] = ()
    clean: bool = False
    generation: int = 0
    written_ns: int = field(default=0, compare=False)

    def encode(self) -> bytes:
        """One page. Of more epochs than fit (166) the newest are kept."""
        epochs = self.epochs[-EPOCHS_MAX:]
        page = bytearray(PAGE_BYTES)
        _FIELDS.pack_into(
            page, 0, _MAGIC, VERSION, 0, self.generation, self.flushed, self.dispatched,
            _NONE if self.snapshot is None else self.snapshot, self.kept, self.written_ns, self.store,
            _CLEAN if self.clean else 0, len(epochs),
        )  # fmt: skip
        for index, epoch in enumerate(epochs):
            _EPOCH.pack_into(page, _FIELDS.size + index * _EPOCH.size, epoch.epoch, epoch.previous, epoch.start)
        struct.pack_into("<I", page, _CRC_AT, crc32c(page))
        return bytes(page)

    @staticmethod
    def parse(page: bytes) -> Checkpoint | None:
        """The copy in ``page``, or None if it is not whole, of another format, or contradicts itself."""
        if len(page) != PAGE_BYTES:
            return None
        magic, version, crc, generation, flushed, dispatched, snapshot, kept, written_ns, store, flags, count = (
            _FIELDS.unpack_from(page)
        )
        bare = page[:_CRC_AT] + bytes(4) + page[_CRC_AT + 4 :]
        if magic != _MAGIC or version != VERSION or crc != crc32c(bare) or count > EPOCHS_MAX:
            return None
        epochs = tuple(
            Epoch(epoch, start, previous)
            for epoch, previous, start in (
                _EPOCH.unpack_from(page, _FIELDS.size + index * _EPOCH.size) for index in range(count)
            )
        )
        if any(older.epoch >= newer.epoch or older.start > newer.start for older, newer in pairwise(epochs)):
            return None
        return Checkpoint(
            store, flushed, dispatched, None if snapshot == _NONE else snapshot, kept, epochs, bool(flags & _CLEAN),
            generation, written_ns,
        )  # fmt: skip


class CheckpointFile:
    """The file of two copies. One writer; readers may come at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._generation = 0

    def read(self) -> Checkpoint | None:
        """The newer of the valid copies; None if there is no file or both are bad."""
        try:
            fd = open_file(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            copies = [Checkpoint.parse(os.pread(fd, PAGE_BYTES, at)) for at in (0, PAGE_BYTES)]
        finally:
            os.close(fd)
        return max(filter(None, copies), key=lambda copy: copy.generation, default=None)

    def write(self, checkpoint: Checkpoint) -> None:
        """Write one copy, over the older one; durable when it returns. OSError leaves the other copy as it was.

        Generation and time are filled in here.
        """
        if self._fd < 0:
            self._open()
        self._generation += 1
        page = replace(checkpoint, generation=self._generation, written_ns=time.time_ns()).encode()
        at = self._generation % 2 * PAGE_BYTES
        pwrite_all(self._fd, page, at)
        failpoint("checkpoint.half_written")  # this copy is new, old or torn; the other holds
        os.fdatasync(self._fd)
        failpoint("checkpoint.synced")  # this copy counts from now on

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        newest = self.read()
        self._generation = newest.generation if newest is not None else 0
        if newest is None or self._path.stat().st_size != 2 * PAGE_BYTES:
            self._create(newest)
        self._fd = open_file(self._path, os.O_RDWR)

    def _create(self, newest: Checkpoint | None) -> None:
        """Appears whole or not at all: a crash leaves a ``.tmp``, written over by the next attempt."""
        temporary = self._path.with_name(self._path.name + ".tmp")
        page = newest.encode() if newest is not None else bytes(PAGE_BYTES)
        pages = page + page
        fd = open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            pwrite_all(fd, pages, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(self._path)
        sync_directory(self._path.parent)
