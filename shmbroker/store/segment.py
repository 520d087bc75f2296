"""One segment of the commit log: a header page, then ``segment_bytes`` of log.

    0        8        12       16                24                32       36       40                 56       60
    +--------+--------+--------+-----------------+-----------------+--------+--------+------------------+--------+----
    | magic  | version| zero   | base position   | segment_bytes   | epoch  | zero   | store (16 bytes) | crc    | zeros
    +--------+--------+--------+-----------------+-----------------+--------+--------+------------------+--------+----
    little-endian; crc: CRC-32C of bytes 0..55; epoch: of the store when the segment was made, for people only

The position p of the log lies at byte ``4096 + p % segment_bytes`` of the file ``<base position, 20 digits>``. A
segment is never longer or shorter than it was made. One that is used again gets a new header and name; its old
records are harmless, because every record's CRC covers its position and its epoch.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shmbroker._native._core import crc32c
from shmbroker.errors import CorruptLog
from shmbroker.failpoint import failpoint
from shmbroker.naming import segment_name, segment_start
from shmbroker.store.files import open_file, pread_into, pwrite_all, sync_directory, write_zeros

SEGMENT_HEADER_BYTES: Final = 4096
VERSION: Final = 1
TEMPORARY: Final = ".tmp"
_MAGIC: Final = b"SHMBSEG\0"
_FIELDS: Final = struct.Struct("<8sIIQQII16s")
_CRC: Final = struct.Struct("<I")


class SegmentError(CorruptLog):
    """A segment's header does not hold. The subclass says in what."""


class SegmentTruncated(SegmentError):
    """The file is shorter or longer than its header says, or has no whole header."""


class SegmentMagic(SegmentError):
    """The file is no segment at all."""


class SegmentVersion(SegmentError):
    """The segment was written by another version of the format."""


class SegmentChecksum(SegmentError):
    """The header fails its CRC."""


class SegmentMisplaced(SegmentError):
    """The header names another base position or another segment size than the file's place asks for."""


class SegmentForeign(SegmentError):
    """The segment belongs to another store."""


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment says about itself; drawn at the head of this module."""

    base: int
    segment_bytes: int
    epoch: int
    store: bytes

    def encode(self) -> bytes:
        """The header page."""
        fields = _FIELDS.pack(_MAGIC, VERSION, 0, self.base, self.segment_bytes, self.epoch, 0, self.store)
        return (fields + _CRC.pack(crc32c(fields))).ljust(SEGMENT_HEADER_BYTES, b"\0")

    @staticmethod
    def parse(page: bytes, path: Path) -> SegmentHeader:
        """Read a header page; a SegmentError says what is wrong with it."""
        if len(page) < SEGMENT_HEADER_BYTES:
            raise SegmentTruncated(
                f"{path}: {len(page)} bytes, its header alone has {SEGMENT_HEADER_BYTES}", None, str(path)
            )
        magic, version, _, base, segment_bytes, epoch, _, store = _FIELDS.unpack_from(page)
        if magic != _MAGIC:
            raise SegmentMagic(f"{path}: starts with {magic!r}, a segment starts with {_MAGIC!r}", None, str(path))
        if version != VERSION:
            raise SegmentVersion(f"{path}: format {version}, this build reads {VERSION}", None, str(path))
        (crc,) = _CRC.unpack_from(page, _FIELDS.size)
        if crc != crc32c(page[: _FIELDS.size]):
            raise SegmentChecksum(f"{path}: the header fails its CRC", None, str(path))
        return SegmentHeader(base, segment_bytes, epoch, store)

    def check_place(self, path: Path, segment_bytes: int, store: bytes) -> None:
        """Raise the SegmentError if this header does not belong where it was found."""
        wanted = segment_start(path.name)
        if (self.base, self.segment_bytes) != (wanted, segment_bytes):
            raise SegmentMisplaced(
                f"{path}: the header says base {self.base} and {self.segment_bytes} bytes, "
                f"wanted {wanted} and {segment_bytes}",
                wanted,
                str(path),
            )
        if self.store != store:
            raise SegmentForeign(
                f"{path}: belongs to store {self.store.hex()}, this is {store.hex()}", wanted, str(path)
            )


class Segment:
    """An open segment. Positions are the log's, not the file's."""

    __slots__ = ("base", "end", "fd", "path", "segment_bytes")

    def __init__(self, path: Path, fd: int, base: int, segment_bytes: int) -> None:
        self.path = path
        self.fd = fd
        self.base = base
        self.segment_bytes = segment_bytes
        self.end = base + segment_bytes

    @staticmethod
    def open(path: Path, segment_bytes: int, store: bytes, *, writable: bool = False) -> Segment:
        """Open and check a segment. FileNotFoundError, or a SegmentError that says what is wrong with it."""
        fd = open_file(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            header = SegmentHeader.parse(os.pread(fd, SEGMENT_HEADER_BYTES, 0), path)
            header.check_place(path, segment_bytes, store)
            size = os.fstat(fd).st_size
            if size != SEGMENT_HEADER_BYTES + segment_bytes:
                raise SegmentTruncated(
                    f"{path}: {size} bytes, a segment has {SEGMENT_HEADER_BYTES + segment_bytes}",
                    header.base,
                    str(path),
                )
        except BaseException:
            os.close(fd)
            raise
        return Segment(path, fd, header.base, segment_bytes)

    @staticmethod
    def create(directory: Path, header: SegmentHeader, recycled: Path | None = None) -> Segment:
        """Make the segment that ``header`` describes, or make it of the retired segment ``recycled``.

        Durable when it returns. A crash on the way leaves a ``.tmp`` file, which the next start removes; a file under a
        segment's name is always whole. OSError (ENOSPC above all) leaves nothing of a new segment.
        """
        path = directory / segment_name(header.base)
        temporary = path.with_name(path.name + TEMPORARY)
        if recycled is not None:
            recycled.rename(temporary)
            # The old name has to be gone for good before the header stops agreeing with it.
            sync_directory(directory)
            failpoint("segment.retired")  # leaves an old segment as .tmp: retention's work was done anyway
        fd = open_file(temporary, os.O_RDWR | os.O_CREAT)
        try:
            failpoint("segment.created")  # leaves an empty .tmp
            os.posix_fallocate(fd, 0, SEGMENT_HEADER_BYTES + header.segment_bytes)
            pwrite_all(fd, header.encode(), 0)
            failpoint("segment.allocated")  # leaves a .tmp with or without its blocks
            os.fsync(fd)
            failpoint("segment.synced")  # leaves a whole segment as .tmp
            temporary.rename(path)
            failpoint("segment.renamed")  # leaves the segment under either name
            sync_directory(directory)
            failpoint("segment.ready")
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                temporary.unlink()
            raise
        return Segment(path, fd, header.base, header.segment_bytes)

    def offset(self, position: int) -> int:
        """Where ``position`` lies in the file."""
        return SEGMENT_HEADER_BYTES + position - self.base

    def read_into(self, buffer: memoryview, position: int) -> int:
        """Read log bytes from ``position`` on; the number read, fewer than asked for at the segment's end."""
        room = self.end - position
        return pread_into(self.fd, buffer[:room], self.offset(position))

    def read(self, position: int, size: int) -> bytes:
        """As ``read_into``, as new bytes."""
        return os.pread(self.fd, min(size, self.end - position), self.offset(position))

    def zero(self, start: int, end: int) -> None:
        """Write zeros over the positions from ``start`` to ``end``; not synced."""
        write_zeros(self.fd, self.offset(start), end - start)

    def sync(self) -> None:
        """fdatasync. After an OSError nobody knows what the disk holds: do not call it again on the same data (F1)."""
        os.fdatasync(self.fd)

    def filled_to(self) -> int:
        """Position up to which the file has written blocks: from there on a first write costs a journal commit.

        File systems that cannot tell answer the segment's end.
        """
        return self.base + max(0, os.lseek(self.fd, SEGMENT_HEADER_BYTES, os.SEEK_HOLE) - SEGMENT_HEADER_BYTES)

    def moved(self) -> bool:
        """True if the file behind this descriptor has been given to another part of the log meanwhile."""
        page = os.pread(self.fd, SEGMENT_HEADER_BYTES, 0)
        return SegmentHeader.parse(page, self.path).base != self.base

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def list_segments(directory: Path) -> list[int]:
    """Base positions of the segments in ``directory``, ascending; other files there are not looked at."""
    return sorted(start for name in os.listdir(directory) if (start := segment_start(name)) is not None)  # noqa: PTH208


def remove_leftovers(directory: Path) -> int:
    """Remove what a crash inside ``Segment.create`` left; the number of files. Nobody may be creating segments."""
    leftovers = [path for path in directory.glob(f"*{TEMPORARY}") if segment_start(path.stem) is not None]
    for path in leftovers:
        path.unlink()
    return len(leftovers)
