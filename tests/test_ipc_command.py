"""``shmbroker ipc``: memory is known by who has it mapped, and never removed while that would lose messages.

Each test names its own memory: other brokers of this host are none of its business.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import posix_ipc
import pytest
from support.command import shmbroker_json

from shmbroker import process
from shmbroker._native._core import Region
from shmbroker.config import Config
from shmbroker.naming import object_names

RING_BYTES = 1 << 20
LIMITS = Config.of({"ring_bytes": RING_BYTES, "max_message_bytes": 64 << 10, "claim_tables": 4}).native_limits()


class Objects:
    """The two objects of a broker, made by this test alone."""

    def __init__(self) -> None:
        self.names = object_names()
        self.name = self.names[0].removesuffix("-c")
        sizes = Region.sizes(LIMITS, RING_BYTES)
        self.control_fd, self.ring_fd = (
            int(posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size).fd)
            for name, size in zip(self.names, sizes, strict=True)
        )

    def format(self, namespaces: tuple[int, int]) -> Region:
        region = Region.create(
            self.control_fd, self.ring_fd, LIMITS, RING_BYTES, RING_BYTES, tail=0, epoch=1, instance=bytes(16),
            boot_id=bytes(16), directory=(0, 0), namespaces=namespaces, ring_name=self.names[1],
        )  # fmt: skip
        region.set("state", 2)
        region.set("user_capacity", RING_BYTES)
        region.set("system_capacity", RING_BYTES)
        return region

    def exist(self) -> bool:
        return any(Path("/dev/shm" + name).exists() for name in self.names)

    def remove(self) -> None:
        os.close(self.control_fd)
        os.close(self.ring_fd)
        for name in self.names:
            Path("/dev/shm" + name).unlink(missing_ok=True)


@pytest.fixture
def objects() -> Iterator[Objects]:
    made = Objects()
    yield made
    made.remove()


def listed(directory: Path, objects: Objects) -> dict[str, Any]:
    (entry,) = [entry for entry in shmbroker_json(directory, "ipc", "list") if entry["name"] == objects.name]
    return dict(entry)


def test_memory_that_a_process_has_mapped_is_in_use_and_stays(tmp_path: Path, objects: Objects) -> None:
    region = objects.format(process.namespaces())
    assert listed(tmp_path, objects)["pids"] == [os.getpid()]
    assert listed(tmp_path, objects)["state"] == "in use"
    assert shmbroker_json(tmp_path, "ipc", "clean", objects.name) == {"removed": [], "kept": []}
    assert objects.exist()
    region.close()


def test_memory_that_nobody_has_mapped_and_that_holds_nothing_is_removed(tmp_path: Path, objects: Objects) -> None:
    objects.format(process.namespaces()).close()
    gc.collect()
    assert listed(tmp_path, objects)["state"] == "dead"
    assert shmbroker_json(tmp_path, "ipc", "clean", objects.name)["removed"] == [objects.name]
    assert not objects.exist()


def test_memory_that_holds_unflushed_messages_is_kept_unless_told_otherwise(tmp_path: Path, objects: Objects) -> None:
    region = objects.format(process.namespaces())
    _, end = region.append_system(3, [b"{}"])
    region.close()
    del region
    gc.collect()
    assert listed(tmp_path, objects)["unflushed_bytes"] == end
    assert shmbroker_json(tmp_path, "ipc", "clean", objects.name, code=1)["kept"] == [objects.name]
    assert objects.exist()
    assert shmbroker_json(tmp_path, "ipc", "clean", "--lose-unflushed", objects.name)["removed"] == [objects.name]
    assert not objects.exist()


def test_memory_of_another_namespace_is_left_alone(tmp_path: Path, objects: Objects) -> None:
    """Its processes cannot be seen from here, so that nothing proves that they are dead."""
    pid_namespace, ipc_namespace = process.namespaces()
    objects.format((pid_namespace + 1, ipc_namespace)).close()
    gc.collect()
    assert listed(tmp_path, objects)["state"] == "another namespace's"
    shmbroker_json(tmp_path, "ipc", "clean", "--lose-unflushed", objects.name)
    assert objects.exist()


def test_memory_that_was_never_finished_is_shown_and_kept(tmp_path: Path, objects: Objects) -> None:
    """Killed between making and formatting it; or somebody is at it just now."""
    assert listed(tmp_path, objects)["unflushed_bytes"] == -1
    assert shmbroker_json(tmp_path, "ipc", "clean", objects.name, code=1)["kept"] == [objects.name]
