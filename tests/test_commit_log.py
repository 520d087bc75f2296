"""The commit log's writer and its readers, on real files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.disk import BYTES, CountingDisk, on_disk, pattern
from support.store_builder import RING, SEGMENT, STORE, StoreBuilder

from shmbroker import failpoint
from shmbroker._native._core import skim
from shmbroker.errors import CorruptLog, PositionGone, StoreFull, StoreReadOnly
from shmbroker.naming import segment_name
from shmbroker.record import encode_record
from shmbroker.store.commit_log import CommitLog, LogReader
from shmbroker.store.segment import SEGMENT_HEADER_BYTES, Segment, SegmentHeader
from shmbroker.store.segment_pool import SegmentPool
from shmbroker.store.serving_reader import ServingReader

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


@pytest.mark.parametrize("kind", [LogReader, ServingReader])
def test_the_next_record_behind_damage_is_found_whatever_its_size_and_the_windows(
    builder: StoreBuilder, kind: type[LogReader]
) -> None:
    damaged = builder.message(pattern(SEGMENT - 80))  # a segment of its own
    large = builder.message(pattern(3000))  # fits into no window, nor into two
    builder.sync()
    knows = builder.message(pattern(3000))
    builder.flip(damaged + 200)
    reader = kind(builder.log, builder.segment_bytes, STORE, window_bytes=1024)
    assert reader.find(damaged, builder.position) == large
    assert reader.find(large, builder.position) == large
    assert reader.find(damaged, builder.position, flushed_above=damaged) == knows
    assert reader.find(knows + 8, builder.position) is None
    reader.close()


@pytest.mark.parametrize("kind", [LogReader, ServingReader])
def test_the_search_for_the_next_record_goes_on_behind_missing_and_shortened_segments(
    builder: StoreBuilder, kind: type[LogReader]
) -> None:
    missing, short, behind = (number * SEGMENT for number in (1, 2, 3))
    builder.place.path(missing).unlink()
    os.truncate(builder.place.path(short), SEGMENT_HEADER_BYTES + 60)
    reader = kind(builder.log, builder.segment_bytes, STORE)
    assert reader.find(missing, builder.position) == behind
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
