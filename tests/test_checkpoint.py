"""The checkpoint: two copies, either may be torn, neither is believed without its CRC."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmbroker import failpoint
from shmbroker.store.checkpoint import EPOCHS_MAX, PAGE_BYTES, Checkpoint, CheckpointFile, Epoch

STORE = bytes(range(16))
positions = st.integers(0, 2**63 - 1)


def write(path: Path, *checkpoints: Checkpoint) -> None:
    file = CheckpointFile(path)
    try:
        for checkpoint in checkpoints:
            file.write(checkpoint)
    finally:
        file.close()


def content(checkpoint: Checkpoint | None) -> Checkpoint | None:
    return None if checkpoint is None else replace(checkpoint, generation=0, written_ns=0)


def at(flushed: int) -> Checkpoint:
    return Checkpoint(STORE, flushed=flushed, dispatched=flushed)


@given(positions, positions, st.none() | positions, positions, st.booleans(), st.lists(positions, max_size=5))
def test_what_is_encoded_is_parsed(
    flushed: int, dispatched: int, snapshot: int | None, kept: int, clean: bool, starts: list[int]
) -> None:
    epochs = tuple(Epoch(index + 2, start, index + 1) for index, start in enumerate(sorted(starts)))
    checkpoint = Checkpoint(STORE, flushed, dispatched, snapshot, kept, epochs, clean, 7, 123)
    page = checkpoint.encode()
    assert len(page) == PAGE_BYTES
    assert Checkpoint.parse(page) == checkpoint


def test_flipped_bits_are_found() -> None:
    page = replace(at(4096), epochs=(Epoch(1, 0, 0), Epoch(2, 900, 1))).encode()
    for bit in (*range(160 * 8), *range(160 * 8, PAGE_BYTES * 8, 13)):  # all that is used, and some of the rest
        damaged = bytearray(page)
        damaged[bit // 8] ^= 1 << bit % 8
        assert Checkpoint.parse(bytes(damaged)) is None, bit


@given(st.binary(max_size=PAGE_BYTES))
def test_arbitrary_bytes_are_no_checkpoint(data: bytes) -> None:
    assert Checkpoint.parse(data) is None
    assert Checkpoint.parse(data.ljust(PAGE_BYTES, b"\0")) is None


def test_of_too_many_epochs_the_newest_are_kept() -> None:
    epochs = tuple(Epoch(number, number * 100, number - 1) for number in range(1, 500))
    parsed = Checkpoint.parse(replace(at(0), epochs=epochs).encode())
    assert parsed is not None
    assert parsed.epochs == epochs[-EPOCHS_MAX:]


def test_epochs_out_of_order_are_not_believed() -> None:
    assert Checkpoint.parse(replace(at(0), epochs=(Epoch(2, 0, 1), Epoch(1, 5, 0))).encode()) is None
    assert Checkpoint.parse(replace(at(0), epochs=(Epoch(1, 9, 0), Epoch(2, 5, 1))).encode()) is None


def test_the_newest_write_is_read_by_whoever_opens_the_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    assert CheckpointFile(path).read() is None
    for flushed in range(1, 6):
        write(path, at(flushed))
        assert content(CheckpointFile(path).read()) == at(flushed)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == 2 * PAGE_BYTES


# The file after writes of flushed = 1, 2, 3:  | page 0: 2 | page 1: 3 |
@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, 0, 3),
        (0, PAGE_BYTES, 3),
        (PAGE_BYTES + 24, 1, 2),
        (PAGE_BYTES, PAGE_BYTES, 2),
        (PAGE_BYTES // 2, PAGE_BYTES, None),
    ],
    ids=["none", "older copy", "a byte of the newer", "newer copy", "half of the older, half of the newer"],
)
def test_the_other_copy_counts_when_one_is_damaged(
    tmp_path: Path, offset: int, size: int, expected: int | None
) -> None:
    path = tmp_path / "checkpoint"
    write(path, at(1), at(2), at(3))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xee" * size)
    assert content(CheckpointFile(path).read()) == (None if expected is None else at(expected))
    write(path, at(4))
    assert content(CheckpointFile(path).read()) == at(4)


def test_both_copies_damaged_are_no_checkpoint_and_the_next_write_heals_them(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    write(path, at(1), at(2))
    path.write_bytes(b"\xff" * 2 * PAGE_BYTES)
    assert CheckpointFile(path).read() is None
    write(path, at(3))
    assert content(CheckpointFile(path).read()) == at(3)


@pytest.mark.parametrize("size", [0, 1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 100])
def test_a_file_cut_short_is_read_as_far_as_it_holds(tmp_path: Path, size: int) -> None:
    path = tmp_path / "checkpoint"
    write(path, at(1), at(2))
    os.truncate(path, size)
    assert content(CheckpointFile(path).read()) == (at(2) if size >= PAGE_BYTES else None)
    write(path, at(3))
    assert content(CheckpointFile(path).read()) == at(3)
    assert path.stat().st_size == 2 * PAGE_BYTES


@pytest.mark.crash
@pytest.mark.parametrize("at_pass", [1, 2, 3])
@pytest.mark.parametrize("point", ["checkpoint.half_written", "checkpoint.synced"])
def test_a_kill_while_writing_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, point: str, at_pass: int) -> None:
    path = tmp_path / "checkpoint"
    code = (
        "import sys; from pathlib import Path; from shmbroker import failpoint\n"
        "from shmbroker.store.checkpoint import Checkpoint, CheckpointFile\n"
        f"failpoint.arm('{point}=kill@{at_pass}', 'test'); file = CheckpointFile(Path(sys.argv[1]))\n"
        "for flushed in (1, 2, 3): file.write(Checkpoint(bytes(range(16)), flushed, flushed))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=30).returncode == -9
    assert content(CheckpointFile(path).read()) == at(at_pass)


def test_a_failed_sync_is_reported_and_the_older_copy_still_holds(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    write(path, at(1))
    failpoint.arm("checkpoint.half_written=errno:EIO", "test")
    try:
        with pytest.raises(OSError, match="Input/output"):
            write(path, at(2))
    finally:
        failpoint.arm("", "test")
    pages = path.read_bytes()
    assert content(Checkpoint.parse(pages[PAGE_BYTES:])) == at(1)
