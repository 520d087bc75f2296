"""The commit log's writer and its readers, on real files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.store_builder import RING, SEGMENT, STORE, StoreBuilder

from shmbroker import failpoint
from shmbroker._native._core import skim
from shmbroker.errors import CorruptLog, PositionGone, StoreFull, StoreReadOnly
from shmbroker.naming import segment_name
from shmbroker.record import encode_record
from shmbroker.store.commit_log import CommitLog, LogReader
from shmbroker.store.segment import SEGMENT_HEADER_BYTES, Segment, SegmentHeader
from shmbroker.store.segment_pool import SegmentPool

BYTES = 65_536


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[SegmentPool]:
    pool = SegmentPool(tmp_path, BYTES, STORE, 1, 0)
    while pool.work():
        pass
    yield pool
    pool.stop()


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
def disk() -> CountingDisk:
    return CountingDisk()


@pytest.fixture
def log(pool: SegmentPool, disk: CountingDisk) -> Iterator[CommitLog]:
    log = CommitLog(pool, BYTES, disk)
    yield log
    log.close()


def pattern(size: int, salt: int = 0) -> bytes:
    return bytes((index * 7 + index // 256 + salt) & 0xFF for index in range(size))


def on_disk(directory: Path, position: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        at = position + len(data)
        path = directory / segment_name(at - at % BYTES)
        data += path.read_bytes()[SEGMENT_HEADER_BYTES + at % BYTES :][: size - len(data)]
    return data


# ---- the writer


@pytest.mark.parametrize("size", [1, 4096, BYTES - 1, BYTES, BYTES + 1, 2 * BYTES + 9])
@pytest.mark.parametrize("start", [0, 8, BYTES - 8])
def test_what_is_written_stands_at_its_place_in_its_segments(
    tmp_path: Path, log: CommitLog, start: int, size: int
) -> None:
    data = pattern(size)
    log.write(memoryview(data), start)
    log.sync()
    assert on_disk(tmp_path, start, size) == data
    assert all(path.stat().st_size == SEGMENT_HEADER_BYTES + BYTES for path in tmp_path.iterdir())


def test_short_writes_are_continued(tmp_path: Path, log: CommitLog, disk: CountingDisk) -> None:
    disk.piece_bytes = 1000
    log.write(memoryview(pattern(5000)), BYTES - 2500)
    log.sync()
    assert on_disk(tmp_path, BYTES - 2500, 5000) == pattern(5000)


def test_only_what_was_written_is_synced_and_the_oldest_first(log: CommitLog, disk: CountingDisk) -> None:
    log.write(memoryview(pattern(3 * BYTES + 100)), 0)
    disk.calls.clear()
    log.sync()
    assert disk.calls == [("fdatasync", segment_name(base)) for base in (0, BYTES, 2 * BYTES, 3 * BYTES)]
    disk.errors["pwritev"] = errno.EINVAL  # a file system without direct writes
    log.write(memoryview(pattern(100)), 3 * BYTES + 100)
    disk.calls.clear()
    log.sync()
    assert disk.calls == [("fdatasync", segment_name(3 * BYTES))]


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


def test_a_writer_that_starts_again_writes_over_what_its_predecessor_left(tmp_path: Path, pool: SegmentPool) -> None:
    first = CommitLog(pool, BYTES)
    first.write(memoryview(pattern(BYTES + 500)), 0)
    first.close()  # killed before its sync
    adopted = SegmentPool(tmp_path, BYTES, STORE, 1, 300)
    second = CommitLog(adopted, BYTES)
    second.write(memoryview(pattern(BYTES + 900, salt=1)), 300)
    second.sync()
    assert on_disk(tmp_path, 0, BYTES + 1200) == pattern(300) + pattern(BYTES + 900, salt=1)
    second.close()
    adopted.stop()


@pytest.mark.parametrize(("call", "size"), [("fdatasync", 3 * BYTES), ("pwrite", 3 * BYTES), ("pwritev", 4)])
def test_the_first_failure_is_final_even_if_the_disk_recovers(
    log: CommitLog, disk: CountingDisk, call: str, size: int
) -> None:
    def write_and_sync() -> None:
        log.write(memoryview(pattern(size)), 4)
        log.sync()

    write_and_sync()
    disk.errors[call] = errno.EIO
    with pytest.raises(StoreReadOnly, match=f"{call.removesuffix('v')}.*EIO") as first:
        write_and_sync()
    disk.errors.clear()
    disk.calls.clear()
    for attempt in (log.sync, write_and_sync):
        with pytest.raises(StoreReadOnly) as again:
            attempt()
        assert again.value is first.value
    assert disk.calls == [], "the kernel takes failed pages for clean: a second sync would lie"


def test_a_failing_disk_at_the_failpoint_is_a_failing_disk(log: CommitLog) -> None:
    log.write(memoryview(b"data"), 0)
    failpoint.arm("flusher.before_fdatasync=errno:EIO", "test")
    try:
        with pytest.raises(StoreReadOnly):
            log.sync()
    finally:
        failpoint.arm("", "test")
    assert isinstance(log.failed, StoreReadOnly)


def test_a_disk_without_room_may_be_tried_again(tmp_path: Path, log: CommitLog, disk: CountingDisk) -> None:
    disk.errors["pwrite"] = disk.errors["pwritev"] = errno.ENOSPC
    with pytest.raises(StoreFull):
        log.write(memoryview(pattern(100)), 0)
    disk.errors.clear()
    log.write(memoryview(pattern(100)), 0)
    log.sync()
    assert on_disk(tmp_path, 0, 100) == pattern(100)


def test_a_segment_stays_open_from_its_first_write_to_its_last_sync(log: CommitLog) -> None:
    def open_segments() -> set[str]:
        names = set()
        for link in Path("/proc/self/fd").iterdir():
            try:
                names.add(link.readlink().name)
            except FileNotFoundError:
                continue
        return names

    log.write(memoryview(bytes(BYTES + 8)), 0)
    assert {segment_name(0), segment_name(BYTES)} <= open_segments()
    log.sync()
    assert segment_name(0) not in open_segments()
    assert segment_name(BYTES) in open_segments()


@pytest.mark.crash
@pytest.mark.parametrize(
    "point",
    [
        "flusher.before_pwrite",
        "flusher.pwrite",
        "flusher.after_pwrite",
        "flusher.before_fdatasync",
        "flusher.after_fdatasync",
    ],
)
@pytest.mark.parametrize("at_pass", [1, 9])
def test_a_kill_inside_the_writer_loses_nothing_that_was_synced(tmp_path: Path, point: str, at_pass: int) -> None:
    """E|m|m|...: written in pieces of 700 bytes, across records and segments; killed in the n-th of them."""
    source = StoreBuilder(tmp_path / "source")
    source.begin_epoch()
    source.messages(80)
    written = StoreBuilder(tmp_path / "written")
    data = tmp_path / "bytes"
    data.write_bytes(source.log_bytes())
    code = (
        "import sys; from pathlib import Path; from shmbroker import failpoint\n"
        "from shmbroker.store.commit_log import CommitLog; from shmbroker.store.segment_pool import SegmentPool\n"
        f"log = CommitLog(SegmentPool(Path(sys.argv[1]), {SEGMENT}, bytes(range(16)), 1, 0), {SEGMENT})\n"
        "failpoint.arm(sys.argv[3], 'test'); data = memoryview(Path(sys.argv[2]).read_bytes())\n"
        "for at in range(0, len(data), 700): log.write(data[at : at + 700], at); log.sync()"
    )
    action = "torn:333" if point == "flusher.pwrite" else "kill"
    command = [sys.executable, "-c", code, str(written.log), str(data), f"{point}={action}@{at_pass}"]
    assert subprocess.run(command, timeout=30).returncode == -9
    # Killed, not unplugged: what was written is in the page cache, and so on what the next process reads.
    there = 700 * at_pass if point not in ("flusher.before_pwrite", "flusher.pwrite") else 700 * (at_pass - 1)
    there += 333 if point == "flusher.pwrite" else 0
    written.checkpoint(flushed=max((place for place in source.places if place <= 700 * (at_pass - 1)), default=0))
    result, _ = written.recover()
    ends = [place + len(raw) for place, raw in zip(source.places, source.records, strict=True)]
    assert result.end == max((end for end in ends if end <= there), default=0)
    assert written.log_bytes(result.end) == source.log_bytes(result.end)


# ---- readers


@pytest.fixture
def builder(tmp_path: Path) -> StoreBuilder:
    builder = StoreBuilder(tmp_path)
    builder.begin_epoch()
    builder.messages(200)
    return builder


@pytest.fixture
def reader(builder: StoreBuilder) -> Iterator[LogReader]:
    reader = LogReader(builder.log, builder.segment_bytes, STORE)
    yield reader
    reader.close()


def test_every_record_is_read_at_its_position(builder: StoreBuilder, reader: LogReader) -> None:
    for place, raw in zip(builder.places, builder.records, strict=True):
        assert reader.read(place).raw == raw


def test_a_record_larger_than_the_first_read_is_read_whole(builder: StoreBuilder, reader: LogReader) -> None:
    place = builder.message(pattern(6000))
    assert reader.read(place).body == pattern(6000)


@pytest.mark.parametrize("window_bytes", [512, 4096, 1 << 20])
def test_feed_passes_every_byte_on_whatever_its_windows(builder: StoreBuilder, window_bytes: int) -> None:
    big = builder.message(pattern(5000))
    builder.messages(10)
    reader = LogReader(builder.log, builder.segment_bytes, STORE, window_bytes)
    seen = b""

    def consume(data: memoryview, position: int) -> int:
        nonlocal seen
        behind = skim(data, position, 1, builder.segment_bytes)[0]
        seen += bytes(data[: behind - position])
        return behind

    assert reader.feed(0, builder.position, consume) == builder.position
    assert seen == builder.log_bytes()
    builder.flip(big + 200)
    assert reader.feed(0, builder.position, consume) == big
    reader.close()


def test_a_damaged_record_is_corruption_with_its_place(builder: StoreBuilder, reader: LogReader) -> None:
    place = builder.places[50]
    builder.flip(place + 90)
    with pytest.raises(CorruptLog, match=r"shmbroker log repair") as caught:
        reader.read(place)
    assert (caught.value.position, caught.value.path) == (place, str(builder.place.path(place)))


def test_a_segment_recycled_under_an_open_reader_is_gone_not_corrupt(builder: StoreBuilder, reader: LogReader) -> None:
    assert reader.read(0).position == 0
    header = SegmentHeader(10 * builder.segment_bytes, builder.segment_bytes, 1, STORE)
    segment = Segment.create(builder.log, header, builder.place.path(0))
    assert reader.read(0).position == 0, "its old records are still whole"
    os.pwrite(segment.fd, bytes(200), SEGMENT_HEADER_BYTES)
    segment.close()
    for _ in range(2):
        with pytest.raises(PositionGone):
            reader.read(0)


def test_a_segment_removed_by_retention_is_gone_and_one_missing_in_the_middle_is_corruption(
    builder: StoreBuilder, reader: LogReader
) -> None:
    middle = 2 * builder.segment_bytes
    builder.place.path(0).unlink()
    builder.place.path(middle).unlink()
    with pytest.raises(PositionGone):
        reader.read(0)
    with pytest.raises(CorruptLog, match="missing"):
        reader.read(middle)


def test_a_readers_open_files_are_bounded(builder: StoreBuilder, reader: LogReader) -> None:
    builder.messages(1000)
    for place in builder.places:
        reader.read(place)
    assert len(reader._open) <= 4


def test_a_foreign_record_at_the_right_place_is_no_record(builder: StoreBuilder, reader: LogReader) -> None:
    place = builder.places[3]
    builder.write_bytes(place, encode_record(position=place + 8, epoch=1, flushed=0, kind=1, body=bytes(RING // 64)))
    with pytest.raises(CorruptLog, match="names another position"):
        reader.read(place)
