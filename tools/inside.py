"""A running broker seen from beside it, through the memory that its descriptor names."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shmbroker import memory
from shmbroker._native._core import Region
from shmbroker.descriptor import read_descriptor
from shmbroker.errors import NotReady
from shmbroker.naming import BrokerPaths, segment_name
from shmbroker.store.segment import SEGMENT_HEADER_BYTES, list_segments


@contextmanager
def attached(directory: Path) -> Iterator[Region]:
    """The memory of the broker that serves ``directory``, without becoming a client of it. Raises NotReady."""
    found = memory.attach(BrokerPaths(directory))
    if found is None:
        raise NotReady(f"no broker serves {directory}")
    region, _ = found
    try:
        yield region
    finally:
        region.close()


def drained(region: Region) -> bool:
    """True when no worker has anything left to do for what was appended."""
    tail = region.get("tail")
    return region.get("flushed") == tail == region.get("dispatched")


def ready_bytes(directory: Path) -> int:
    """Bytes of log that fit into segments which stand ready and were already written over with zeros."""
    ready = 0
    paths = BrokerPaths(directory)
    with attached(directory) as region:
        tail, segment_bytes = region.get("tail"), region.segment_bytes
    for base in list_segments(paths.log):
        with (paths.log / segment_name(base)).open("rb") as stream:
            filled = os.lseek(stream.fileno(), SEGMENT_HEADER_BYTES, os.SEEK_HOLE) - SEGMENT_HEADER_BYTES
        if base > tail:  # the one that is written to is no longer filled
            if filled < segment_bytes:
                break
            ready += segment_bytes
    return ready


def worker_pids(region: Region) -> dict[str, int]:
    """Process ids of the workers by role, the supervisor among them."""
    return {worker["role"]: worker["pid"] for worker in region.workers() if worker["pid"]}


def wait_stopped(directory: Path, seconds: float = 60.0) -> None:
    """Wait until an embedded broker without clients has stopped and removed its memory. Raises NotReady."""
    deadline = time.monotonic() + seconds
    while memory_files(directory):
        if time.monotonic() > deadline:
            raise NotReady(f"the broker of {directory} has not stopped within {seconds:.0f} s")
        time.sleep(0.005)


def memory_files(directory: Path) -> list[Path]:
    """The files in /dev/shm that belong to the broker of ``directory``."""
    descriptor = read_descriptor(BrokerPaths(directory))
    if descriptor is None:
        return []
    return [memory.SHM_DIRECTORY / name.lstrip("/") for name in (descriptor.control, descriptor.ring)]
