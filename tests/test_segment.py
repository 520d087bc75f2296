"""Segments and their pool on real files: headers, creation, reuse, capacity, full disks."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.disk import overwrite
from support.waiting import wait_until

from shmbroker import failpoint
from shmbroker._native._core import crc32c
from shmbroker.errors import CorruptLog, StoreFull
from shmbroker.naming import segment_name
from shmbroker.store.segment import (
    SEGMENT_HEADER_BYTES,
    Segment,
    SegmentChecksum,
    SegmentError,
    SegmentForeign,
    SegmentHeader,
    SegmentMagic,
    SegmentMisplaced,
    SegmentTruncated,
    SegmentVersion,
    list_segments,
    remove_leftovers,
)
from shmbroker.store.segment_pool import SegmentPool

BYTES = 65_536
STORE = bytes(range(16))


def header(base: int = 0) -> SegmentHeader:
    return SegmentHeader(base, BYTES, 3, STORE)


def version_2(path: Path) -> None:
    page = bytearray(path.read_bytes()[:60])
    struct.pack_into("<I", page, 8, 2)
    struct.pack_into("<I", page, 56, crc32c(page[:56]))
    overwrite(path, 0, page)


def test_a_segment_reads_back_what_was_written_into_it(tmp_path: Path) -> None:
    segment = Segment.create(tmp_path, header(BYTES))
    assert (segment.base, segment.end) == (BYTES, 2 * BYTES)
    os.pwrite(segment.fd, b"hello", segment.offset(BYTES + 100))
    segment.close()
    again = Segment.open(tmp_path / segment_name(BYTES), BYTES, STORE)
    assert again.read(BYTES + 98, 9) == b"\0\0hello\0\0"
    assert again.read(2 * BYTES - 4, 100) == bytes(4), "never behind its end"
    again.close()


def test_a_segment_is_private_to_its_owner_and_has_all_its_blocks(tmp_path: Path) -> None:
    Segment.create(tmp_path, header()).close()
    status = (tmp_path / segment_name(0)).stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == SEGMENT_HEADER_BYTES + BYTES
    assert status.st_blocks * 512 >= status.st_size


def test_a_link_in_the_place_of_a_segment_is_not_followed(tmp_path: Path) -> None:
    Segment.create(tmp_path, header()).close()
    (tmp_path / "real").mkdir()
    target = (tmp_path / segment_name(0)).rename(tmp_path / "real" / segment_name(0))
    (tmp_path / segment_name(0)).symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        Segment.open(tmp_path / segment_name(0), BYTES, STORE)


DAMAGES: list[tuple[str, Callable[[Path], object], type[SegmentError]]] = [
    ("cut inside the header", lambda path: os.truncate(path, 100), SegmentTruncated),
    ("cut inside the log", lambda path: os.truncate(path, 5000), SegmentTruncated),
    ("longer than made", lambda path: os.truncate(path, SEGMENT_HEADER_BYTES + BYTES + 1), SegmentTruncated),
    ("another magic", lambda path: overwrite(path, 0, b"X"), SegmentMagic),
    ("zeros", lambda path: overwrite(path, 0, bytes(4096)), SegmentMagic),
    ("another version", version_2, SegmentVersion),
    ("a flipped bit in the base", lambda path: overwrite(path, 16, b"\x08"), SegmentChecksum),
    ("another store", lambda path: overwrite(path, 0, SegmentHeader(0, BYTES, 3, b"x" * 16).encode()), SegmentForeign),
    ("another base", lambda path: overwrite(path, 0, header(BYTES).encode()), SegmentMisplaced),
    ("another size", lambda path: overwrite(path, 0, SegmentHeader(0, 4096, 3, STORE).encode()), SegmentMisplaced),
]


@pytest.mark.parametrize(("damage", "error"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_each_thing_that_can_be_wrong_with_a_header_has_its_own_error(
    tmp_path: Path, damage: Callable[[Path], object], error: type[SegmentError]
) -> None:
    Segment.create(tmp_path, header()).close()
    path = tmp_path / segment_name(0)
    damage(path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(error, match=segment_name(0)):
        Segment.open(path, BYTES, STORE)
    assert issubclass(error, CorruptLog)
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "no descriptor is left open"


def test_every_bit_of_the_used_header_is_covered(tmp_path: Path) -> None:
    page = header().encode()
    for bit in range(60 * 8):
        damaged = bytearray(page)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SegmentError):
            SegmentHeader.parse(bytes(damaged), tmp_path)


def test_only_segment_names_are_listed(tmp_path: Path) -> None:
    for name in (
        "00000000000000065536",
        "00000000000000000000",
        "1",
        "0" * 19,
        "0" * 20 + ".tmp",
        "0" * 20 + ".broken",
    ):
        (tmp_path / name).touch()
    assert list_segments(tmp_path) == [0, 65_536]
    assert remove_leftovers(tmp_path) == 1
    assert (tmp_path / ("0" * 20 + ".broken")).exists()


@pytest.mark.crash
@pytest.mark.parametrize(
    "point",
    [
        "segment.retired",
        "segment.created",
        "segment.allocated",
        "segment.synced",
        "segment.renamed",
        "segment.ready",
    ],
)
@pytest.mark.parametrize("recycled", [False, True])
def test_a_kill_while_a_segment_is_made_leaves_a_whole_segment_or_a_leftover(
    tmp_path: Path, point: str, recycled: bool
) -> None:
    Segment.create(tmp_path, header()).close()
    code = (
        "import sys; from pathlib import Path; from shmbroker import failpoint\n"
        "from shmbroker.store.segment import Segment, SegmentHeader\n"
        f"failpoint.arm('{point}=kill', 'test'); log = Path(sys.argv[1])\n"
        f"header = SegmentHeader({BYTES}, {BYTES}, 3, bytes(range(16)))\n"
        f"Segment.create(log, header, log / '{segment_name(0)}' if {recycled} else None)"
    )
    passed = recycled or point != "segment.retired"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=30).returncode == (-9 if passed else 0)
    remove_leftovers(tmp_path)
    left = list_segments(tmp_path)
    assert left == ([] if recycled else [0]) + (
        [BYTES] if not passed or point in ("segment.renamed", "segment.ready") else []
    )
    for base in left:
        Segment.open(tmp_path / segment_name(base), BYTES, STORE).close()
    if BYTES not in left:
        Segment.create(tmp_path, header(BYTES)).close()
        Segment.open(tmp_path / segment_name(BYTES), BYTES, STORE).close()


# ---- the pool


def pool_at(directory: Path, position: int = 0, **options: float) -> SegmentPool:
    return SegmentPool(directory, BYTES, STORE, 3, position, **options)  # type: ignore[arg-type]


def work_off(pool: SegmentPool) -> None:
    for _ in range(1000):
        if not pool.work():
            return
    pytest.fail("the pool never comes to rest")


@pytest.fixture(autouse=True)
def disarm() -> Iterator[None]:
    yield
    failpoint.arm("", "test")


def test_the_pool_keeps_segments_and_a_reserve_ready_behind_the_writers(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    pool = SegmentPool(tmp_path, BYTES, STORE, 3, 0, on_capacity=lambda user, system: told.append((user, system)))
    work_off(pool)
    # | writer's | ahead | reserve | reserve |
    assert list_segments(tmp_path) == [0, BYTES, 2 * BYTES, 3 * BYTES]
    assert (pool.user_capacity, pool.system_capacity) == (2 * BYTES, 4 * BYTES)
    for path in tmp_path.iterdir():
        assert path.stat().st_blocks * 512 >= BYTES
    pool.take(0).close()
    work_off(pool)
    pool.take(BYTES).close()
    work_off(pool)
    assert (pool.user_capacity, pool.system_capacity) == (3 * BYTES, 5 * BYTES)
    assert told == sorted(set(told)), "told only of growth, and of each step"
    assert told[-1] == (3 * BYTES, 5 * BYTES)
    pool.stop()


def test_every_block_of_a_ready_segment_gets_written(tmp_path: Path) -> None:
    pool = pool_at(tmp_path)
    work_off(pool)
    segment = pool.take(0)
    assert segment.filled_to() == segment.end
    segment.close()
    pool.stop()


def test_the_writer_waits_for_a_step_of_zeros_and_no_other_follows(tmp_path: Path) -> None:
    pool = pool_at(tmp_path)
    while list_segments(tmp_path) != [0, BYTES, 2 * BYTES, 3 * BYTES]:
        pool.work()
    ready = pool._ready[0]
    assert ready.filled == 0
    taken: list[Segment] = []
    writer = threading.Thread(target=lambda: taken.append(pool.take(0)))
    with ready.step:  # as the pool's thread does while it writes zeros
        writer.start()
        wait_until(lambda: 0 not in pool._ready, "the writer at the segment")
        assert not taken
    writer.join(10)
    os.pwrite(taken[0].fd, b"\xaa" * BYTES, SEGMENT_HEADER_BYTES)
    assert not ready.fill_step()
    work_off(pool)
    pool.stop()
    assert taken[0].read(0, BYTES) == b"\xaa" * BYTES, "no zeros over the writer's bytes"
    taken[0].close()


def test_the_writer_that_needs_the_disk_has_it_and_the_zeros_come_later(tmp_path: Path) -> None:
    pool = pool_at(tmp_path)
    while list_segments(tmp_path) != [0, BYTES, 2 * BYTES, 3 * BYTES]:
        pool.work()
    pool.leave_disk_alone()
    until = pool._busy_until
    while time.monotonic() < until:
        did_something = pool.work()
        assert time.monotonic() >= until or not did_something
    work_off(pool)
    segment = pool.take(0)
    assert segment.filled_to() == segment.end
    segment.close()
    pool.stop()


def test_the_segment_that_the_writer_enters_is_filled_before_it_starts(tmp_path: Path) -> None:
    """Else the first 64 MiB of a new store would take slow flushes for as long as they last."""
    pool = pool_at(tmp_path)
    pool.start()
    segment = pool.take(0)
    assert segment.filled_to() == BYTES
    segment.close()
    pool.stop()


def test_the_writer_never_finds_nothing(tmp_path: Path) -> None:
    pool = pool_at(tmp_path)
    for base in range(0, 5 * BYTES, BYTES):
        segment = pool.take(base)
        assert segment.base == base
        segment.close()
    assert pool.system_capacity == 5 * BYTES
    pool.stop()


def test_a_segment_that_would_leave_a_gap_is_refused(tmp_path: Path) -> None:
    pool = pool_at(tmp_path)
    with pytest.raises(CorruptLog):
        pool.take(7 * BYTES)
    pool.stop()


def test_a_new_pool_adopts_what_stands_ready_and_makes_anew_what_does_not_hold(tmp_path: Path) -> None:
    pool = pool_at(tmp_path)
    work_off(pool)
    pool.stop()
    overwrite(tmp_path / segment_name(2 * BYTES), 0, b"X")
    inode = (tmp_path / segment_name(BYTES)).stat().st_ino
    pool = pool_at(tmp_path, 100)
    assert pool.system_capacity == 2 * BYTES
    work_off(pool)
    assert pool.system_capacity == 4 * BYTES
    assert (tmp_path / segment_name(BYTES)).stat().st_ino == inode
    Segment.open(tmp_path / segment_name(2 * BYTES), BYTES, STORE).close()
    pool.stop()


def test_a_hole_in_the_log_of_the_writers_segment_is_no_place_for_zeros(tmp_path: Path) -> None:
    """Some file systems store a block of zeros as a hole: | log | hole: zeros of a message | log | position."""
    path = tmp_path / segment_name(0)
    path.write_bytes(header().encode())
    os.truncate(path, SEGMENT_HEADER_BYTES + BYTES)
    overwrite(path, SEGMENT_HEADER_BYTES + BYTES // 2, b"\xaa" * 8192)
    position = BYTES // 2 + 8192
    pool = pool_at(tmp_path, position)
    work_off(pool)
    segment = pool.take(0)
    assert segment.read(0, position) == bytes(BYTES // 2) + b"\xaa" * 8192
    assert segment.filled_to() == 0, "the hole is still one: nobody wrote there"
    segment.close()
    pool.stop()


def test_the_writers_own_segment_is_never_made_anew(tmp_path: Path) -> None:
    pool = pool_at(tmp_path)
    work_off(pool)
    pool.stop()
    overwrite(tmp_path / segment_name(0), 0, b"X")
    with pytest.raises(SegmentMagic):
        pool_at(tmp_path, 100)


def test_retired_segments_are_used_again_and_then_removed(tmp_path: Path) -> None:
    pool = pool_at(tmp_path)
    for base in range(0, 7 * BYTES, BYTES):
        pool.take(base).close()
    work_off(pool)
    old = {(tmp_path / segment_name(base)).stat().st_ino for base in range(0, 5 * BYTES, BYTES)}
    reader = Segment.open(tmp_path / segment_name(0), BYTES, STORE)
    assert pool.retire(5 * BYTES + 10) == 5
    assert pool.retire(5 * BYTES + 10) == 0
    work_off(pool)
    bases = list_segments(tmp_path)
    assert bases[0] == 5 * BYTES
    assert bases == list(range(bases[0], bases[-1] + 1, BYTES))
    used_again = [base for base in bases if (tmp_path / segment_name(base)).stat().st_ino in old]
    assert len(used_again) == 2, "as many as may stand ready beyond need; the others gave their space back"
    assert reader.moved(), "whoever has it open can see that it is another part of the log now"
    reader.close()
    pool.stop()


def test_a_segment_that_the_writer_is_in_is_never_retired(tmp_path: Path) -> None:
    pool = pool_at(tmp_path)
    pool.take(0).close()
    assert pool.retire(10 * BYTES) == 0
    pool.stop()


def test_a_full_disk_keeps_the_reserve_from_users_and_space_that_returns_is_used(tmp_path: Path) -> None:
    pool = pool_at(tmp_path)
    work_off(pool)
    failpoint.arm("segment.created=errno:ENOSPC@1+", "test")
    for base in range(0, 4 * BYTES, BYTES):
        pool.take(base).close()
        work_off(pool)
    # | 0 | 1 | reserve | reserve, entered |  and no more room
    assert (pool.user_capacity, pool.system_capacity) == (2 * BYTES, 4 * BYTES)
    assert "No space" in str(pool.error)
    with pytest.raises(StoreFull):
        pool.take(4 * BYTES)
    assert list_segments(tmp_path)[-1] == 3 * BYTES
    assert not list(tmp_path.glob("*.tmp")), "an attempt in vain leaves nothing"
    failpoint.arm("", "test")
    work_off(pool)
    assert (pool.user_capacity, pool.system_capacity) == (5 * BYTES, 7 * BYTES)
    assert pool.error is None
    pool.stop()


def test_above_the_watermark_only_the_reserve_is_kept_up(tmp_path: Path) -> None:
    pool = pool_at(tmp_path, disk_full_watermark=0.0)
    work_off(pool)
    assert (pool.user_capacity, pool.system_capacity) == (0, 3 * BYTES)
    pool.take(0).close()
    pool.take(BYTES).close()
    work_off(pool)
    assert (pool.user_capacity, pool.system_capacity) == (0, 4 * BYTES)
    pool.retire(BYTES)
    work_off(pool)
    assert (pool.user_capacity, pool.system_capacity) == (3 * BYTES, 5 * BYTES), "space freed by retention counts"
    pool.stop()


def test_a_failing_disk_while_filling_costs_speed_and_nothing_else(tmp_path: Path) -> None:
    pool = pool_at(tmp_path)
    failpoint.arm("segment.half_filled=errno:EIO@1", "test")
    pool.start()
    wait_until(lambda: pool.error is not None, "the error noted")
    wait_until(lambda: pool.system_capacity == 4 * BYTES, "all segments made")
    wait_until(lambda: all(r.filled == r.segment.end for r in list(pool._ready.values())), "all filled or given up")
    pool.take(0).close()
    pool.stop()
