"""Fixtures of all tests, and what must not be left behind by any of them: memory, processes, file descriptors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.disk import disk, log, pool, small_disk  # noqa: F401 - fixtures of the tests that write segments
from support.processes import SMALL, wait_gone
from support.waiting import wait_until

import shmbroker
from shmbroker._native._core import Region
from shmbroker.broker import Broker

SHM = Path("/dev/shm")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Where a test may make a broker. It is stopped afterwards, and must not have left anything in memory."""
    place = tmp_path / "broker"
    before = {path.name for path in SHM.iterdir()}  # left by others, perhaps naming our inode
    yield place
    wait_gone(place)
    assert set(objects_of(place)) <= before


@pytest.fixture
def broker(directory: Path) -> Iterator[Broker]:
    """A small broker, embedded in the test."""
    with shmbroker.open(directory, **SMALL) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_open() -> Iterator[None]:
    before = _open_descriptors()
    yield
    wait_until(lambda: _open_descriptors() <= before, "file descriptors closed", deadline=5.0)


def _open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def objects_of(directory: Path) -> list[str]:
    """Memory objects in /dev/shm whose control segment names ``directory``; both of a pair, if both are there."""
    if not directory.exists():
        return []
    status = directory.stat()
    found = []
    for control in SHM.glob("shmbroker-*-c"):
        try:
            with control.open("rb") as stream:
                header = Region.read_header(stream.fileno())
        except (OSError, shmbroker.LayoutMismatch):
            continue  # of another test run, coming or going
        if header["directory"] == (status.st_dev, status.st_ino):
            found += [name for name in (control.name, control.name[:-1] + "r") if (SHM / name).exists()]
    return found
