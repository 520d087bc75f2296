"""The few file calls that every part of the store shares. No memory maps: a failing disk is an OSError, not SIGBUS."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from shmbroker import access

NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
ZERO_STEP_BYTES: Final = 8 * 1024 * 1024
_ZEROS: Final = bytes(1024 * 1024)


class Disk(Protocol):
    """What the commit log's writer asks of a disk. The module ``os`` is one; tests pass one that fails."""

    def pwrite(self, fd: int, data: memoryview, offset: int, /) -> int: ...
    def pwritev(self, fd: int, pieces: Sequence[memoryview], offset: int, flags: int, /) -> int: ...
    def fdatasync(self, fd: int, /) -> None: ...


def open_file(path: Path, flags: int) -> int:
    """Open ``path`` itself, never what a link there points to; the descriptor does not survive an exec."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, access.file_mode())


def sync_directory(directory: Path) -> None:
    """Make names created, renamed and removed in ``directory`` durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """``pwrite`` until all is written: a short write is no error, but half a record."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        if written == 0:
            raise OSError(errno.EIO, "pwrite wrote nothing")
        rest = rest[written:]
        offset += written


def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset`` on; fewer bytes than asked for only at the end of the file."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done


def write_zeros(fd: int, offset: int, size: int) -> None:
    """Write ``size`` zeros, real ones: a hole would cost a journal commit at the first write into it."""
    while size > 0:
        batch = min(size, len(_ZEROS) * 8)
        pieces = [_ZEROS] * (batch // len(_ZEROS)) or [_ZEROS[:batch]]
        written = os.pwritev(fd, pieces, offset)
        if written == 0:
            raise OSError(errno.EIO, "pwritev wrote nothing")
        offset += written
        size -= written


def is_zero(data: bytes) -> bool:
    """True if every byte is zero; compares by whole blocks."""
    return all(data[at : at + len(_ZEROS)] == _ZEROS[: len(data) - at] for at in range(0, len(data), len(_ZEROS)))
