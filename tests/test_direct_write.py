"""Small writes past the page cache: durable by themselves, and the ordinary way wherever they cannot be made."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.disk import BYTES, CountingDisk, on_disk, pattern
from support.store_builder import STORE

from shmbroker.errors import StoreFull
from shmbroker.naming import segment_name
from shmbroker.store.commit_log import CommitLog
from shmbroker.store.segment import SEGMENT_HEADER_BYTES
from shmbroker.store.segment_pool import SegmentPool


def test_a_small_write_is_durable_by_itself_and_needs_no_sync(log: CommitLog, disk: CountingDisk) -> None:
    for position in (0, 100, 200):
        log.write(memoryview(pattern(100)), position)
        log.sync()
    assert disk.calls == [("pwritev", segment_name(0))] * 3


def test_a_small_write_behind_one_that_waits_for_its_sync_waits_as_well(log: CommitLog, disk: CountingDisk) -> None:
    """Else a failed sync could be told for the older one only after the younger one was taken for durable."""
    log.write(memoryview(pattern(3 * BYTES)), 0)
    log.write(memoryview(pattern(100)), 3 * BYTES)
    disk.calls.clear()
    log.sync()
    assert disk.calls == [("fdatasync", segment_name(base)) for base in (0, BYTES, 2 * BYTES, 3 * BYTES)]


def test_a_file_system_without_direct_writes_is_asked_once(tmp_path: Path, log: CommitLog, disk: CountingDisk) -> None:
    disk.errors["pwritev"] = errno.EINVAL
    for position in (0, 100, 200):
        log.write(memoryview(pattern(100, position)), position)
        log.sync()
    name = segment_name(0)
    assert disk.calls == [("pwritev", name), *[("pwrite", name), ("fdatasync", name)] * 3]
    assert on_disk(tmp_path, 0, 300) == b"".join(pattern(100, position) for position in (0, 100, 200))


def test_a_segment_that_cannot_be_opened_once_more_is_written_the_ordinary_way(
    tmp_path: Path, log: CommitLog, disk: CountingDisk
) -> None:
    """EMFILE is no failed write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    log.write(memoryview(pattern(3 * BYTES)), 0)
    log.sync()
    disk.calls.clear()
    highest = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
    fillers = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest + 8)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fillers) + 1, hard))
    try:
        log.write(memoryview(pattern(100)), 2 * BYTES + 200)
        log.sync()
        with pytest.raises(StoreFull, match="Too many open files"):
            log.write(memoryview(pattern(100)), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)
    name = segment_name(2 * BYTES)
    assert disk.calls == [("pwrite", name), ("fdatasync", segment_name(2 * BYTES))]
    log.write(memoryview(pattern(100)), 3 * BYTES)
    assert disk.calls[-1] == ("pwritev", segment_name(3 * BYTES)), "the next segment is tried again"
    assert on_disk(tmp_path, 2 * BYTES + 200, 100) == pattern(100)


@given(st.lists(st.tuples(st.integers(1, 9000), st.booleans()), min_size=1, max_size=25), st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_writes_large_and_small_leave_what_was_written_and_zeros_behind_it(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, bool]], start: int
) -> None:
    """Large ones through the page cache, small ones past it, over a segment that an older log has used."""
    directory = tmp_path_factory.mktemp("log")
    pool = SegmentPool(directory, 4 * BYTES, STORE, 1, 0)
    pool.take(0).close()
    used = directory / segment_name(0)
    used.write_bytes(used.read_bytes()[:SEGMENT_HEADER_BYTES] + b"\xee" * 4 * BYTES)
    pool.stop()
    pool = SegmentPool(directory, 4 * BYTES, STORE, 1, start)
    disk = CountingDisk()
    log = CommitLog(pool, 4 * BYTES, disk)
    expected, position = b"\xee" * start, start
    for number, (size, small) in enumerate(writes):
        data = pattern(size, number)
        log._direct._supported = small
        log.write(memoryview(data), position)
        log.sync()
        expected += data
        position += size
        stored = used.read_bytes()[SEGMENT_HEADER_BYTES:]
        assert stored[:position] == expected
        behind = stored[position : position + -position % 4096]
        assert behind in (b"\0" * len(behind), b"\xee" * len(behind))
    log.close()
    pool.stop()
