"""A commit log's writer over a real disk that can be told to fail, and a disk that is soon full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.store_builder import STORE

from shmbroker.naming import segment_name
from shmbroker.store.commit_log import CommitLog
from shmbroker.store.segment import SEGMENT_HEADER_BYTES
from shmbroker.store.segment_pool import SegmentPool

BYTES = 65_536  # of a segment


class CountingDisk:
    """The real disk, that can be told to fail, to write little at a time, and keeps account of its calls."""

    def __init__(self) -> None:
        self.errors: dict[str, int] = {}
        self.piece_bytes = 2**30
        self.calls: list[tuple[str, str]] = []

    def pwrite(self, fd: int, data: memoryview, offset: int, /) -> int:
        self._call("pwrite", fd)
        return os.pwrite(fd, data[: self.piece_bytes], offset)

    def pwritev(self, fd: int, pieces: Sequence[memoryview], offset: int, flags: int, /) -> int:
        assert flags == os.RWF_DSYNC
        self._call("pwritev", fd)
        (piece,) = pieces
        return os.pwritev(fd, [piece[: max(512, self.piece_bytes - self.piece_bytes % 512)]], offset, flags)

    def fdatasync(self, fd: int, /) -> None:
        self._call("fdatasync", fd)
        os.fdatasync(fd)

    def _call(self, name: str, fd: int) -> None:
        self.calls.append((name, Path(f"/proc/self/fd/{fd}").readlink().name))
        if error := self.errors.get(name):
            raise OSError(error, os.strerror(error))


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[SegmentPool]:
    pool = SegmentPool(tmp_path, BYTES, STORE, 1, 0)
    while pool.work():
        pass
    yield pool
    pool.stop()


@pytest.fixture
def disk() -> CountingDisk:
    return CountingDisk()


@pytest.fixture
def log(pool: SegmentPool, disk: CountingDisk) -> Iterator[CommitLog]:
    log = CommitLog(pool, BYTES, disk)
    yield log
    log.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def overwrite(file: Path, at: int, data: bytes | bytearray) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(data)


def pattern(size: int, salt: int = 0) -> bytes:
    return bytes((index * 7 + index // 256 + salt) & 0xFF for index in range(size))


def on_disk(directory: Path, position: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        at = position + len(data)
        path = directory / segment_name(at - at % BYTES)
        data += path.read_bytes()[SEGMENT_HEADER_BYTES + at % BYTES :][: size - len(data)]
    return data
