"""``shmbroker ipc``: memory is known by who has it mapped, and never removed while that would lose messages.

Each test names its own memory: other brokers of this host are none of its business.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import posix_ipc
import pytest
from click.testing import CliRunner
from conftest import objects_of
from support.command import shmbroker_json
from support.processes import SMALL, Child, kill_all, wait_for_workers
from support.progress import Progress

from shmbroker import process, remains
from shmbroker._native._core import Region
from shmbroker.config import Config
from shmbroker.descriptor import read_descriptor
from shmbroker.naming import BrokerPaths, object_names
from shmbroker.tools import ipc
from shmbroker.tools.cli import cli

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


def clean(directory: Path, objects: Objects, *options: str, code: int = 0) -> dict[str, Any]:
    return dict(shmbroker_json(directory, "ipc", "clean", *options, objects.name, code=code))


def command(*arguments: str) -> Any:
    """The same in this process."""
    return json.loads(CliRunner().invoke(cli, ["--json", "ipc", *arguments]).output)


def test_memory_that_a_process_has_mapped_is_in_use_and_stays(tmp_path: Path, objects: Objects) -> None:
    region = objects.format(process.namespaces())
    assert listed(tmp_path, objects)["pids"] == [os.getpid()]
    assert listed(tmp_path, objects)["state"] == "in use"
    assert clean(tmp_path, objects) == {"removed": [], "kept": []}
    assert objects.exist()
    region.close()


def test_memory_that_nobody_has_mapped_and_that_holds_nothing_is_removed(tmp_path: Path, objects: Objects) -> None:
    objects.format(process.namespaces()).close()
    gc.collect()
    assert listed(tmp_path, objects)["state"] == "dead"
    assert clean(tmp_path, objects)["removed"] == [objects.name]
    assert not objects.exist()


def test_memory_that_holds_unflushed_messages_is_kept_unless_told_otherwise(tmp_path: Path, objects: Objects) -> None:
    region = objects.format(process.namespaces())
    _, end = region.append_system(3, [b"{}"])
    region.close()
    del region
    gc.collect()
    assert listed(tmp_path, objects)["unflushed_bytes"] == end
    assert clean(tmp_path, objects, code=1)["kept"] == [objects.name]
    assert objects.exist()
    assert clean(tmp_path, objects, "--lose-unflushed")["removed"] == [objects.name]
    assert not objects.exist()


def test_memory_of_another_namespace_is_left_alone(tmp_path: Path, objects: Objects) -> None:
    """Its processes cannot be seen from here, so that nothing proves that they are dead."""
    pid_namespace, ipc_namespace = process.namespaces()
    objects.format((pid_namespace + 1, ipc_namespace)).close()
    gc.collect()
    assert listed(tmp_path, objects)["state"] == "another namespace's"
    clean(tmp_path, objects, "--lose-unflushed")
    assert objects.exist()


def test_memory_that_was_never_finished_is_left_alone_at_first_and_kept_then(
    tmp_path: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody is at it just now, or was killed between making and formatting it."""
    assert (listed(tmp_path, objects)["state"], listed(tmp_path, objects)["unflushed_bytes"]) == ("being made", -1)
    assert clean(tmp_path, objects, "--lose-unflushed") == {"removed": [], "kept": []}
    assert objects.exist()
    monkeypatch.setattr(remains, "YOUNG_SECONDS", 0.0)  # for us; any broker that starts would clear old ones away
    assert command("clean", objects.name) == {"removed": [], "kept": [objects.name]}
    assert command("clean", "--lose-unflushed", objects.name) == {"removed": [objects.name], "kept": []}


def test_memory_with_acknowledgements_that_are_not_on_the_disk_is_kept(tmp_path: Path, objects: Objects) -> None:
    region = objects.format(process.namespaces())
    region.define_group("audit", record=False)
    region.define_topic("orders", 1, 6, record=False)
    region.restore_progress(Progress(1, 1, 0, 0, 5).encode())
    region.close()
    del region
    assert listed(tmp_path, objects)["unflushed_bytes"] == 0
    assert clean(tmp_path, objects, code=1) == {"removed": [], "kept": [objects.name]}
    assert objects.exist()


# ---- a broker that comes while somebody clears away --------------------------------------------------------------

OPENER = """
    import sys, shmbroker
    with shmbroker.open(sys.argv[1], **eval(sys.argv[2])) as broker, broker.producer("test") as producer:
        producer.send(shmbroker.Message("orders", b"42")).confirm()  # nothing is unflushed
        print("open")
        sys.stdin.readline()
"""


@pytest.fixture
def start(directory: Path) -> Iterator[Callable[[], object]]:
    """Opens the broker of ``directory`` in a process of its own, the first time it is called."""
    with ExitStack() as stack:
        started: list[Child] = []

        def open_once() -> None:
            if not started:
                started.append(stack.enter_context(Child(OPENER, directory, SMALL)))
                assert started[0].read_line() == "open"

        yield open_once
        started[0].write_line()
        assert started[0].wait() == 0


def name_of(directory: Path) -> str:
    descriptor = read_descriptor(BrokerPaths(directory))
    assert descriptor is not None
    return descriptor.control.removesuffix("-c")


def test_memory_that_is_made_while_somebody_looks_is_not_called_dead(
    directory: Path, start: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    look = ipc._mapped
    monkeypatch.setattr(ipc, "_mapped", lambda: (look(), start())[0])
    found = {memory.name: memory.state for memory in ipc.memories()}
    assert found.get(name_of(directory), "in use") == "in use"


@pytest.mark.parametrize("step", ["_mapped", "memories"])
def test_memory_that_is_taken_over_while_somebody_clears_away_stays(
    directory: Path, start: Callable[[], object], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Its broker comes back when the processes have been looked at, or when it has been found dead."""
    with Child(OPENER, directory, SMALL) as child:
        assert child.read_line() == "open"
        wait_for_workers(directory)
        os.kill(child.pid, signal.SIGSTOP)  # or it would start another supervisor
        kill_all(directory)
    name = name_of(directory)
    look = getattr(ipc, step)
    monkeypatch.setattr(ipc, step, lambda: (look(), start())[0])
    assert command("clean", "--lose-unflushed", name) == {"removed": [], "kept": []}
    assert name_of(directory) == name, "it works on the memory of its predecessor"
    assert len(objects_of(directory)) == 2


def test_memory_that_a_supervisor_holds_is_left_alone_though_nobody_is_seen_to_map_it(
    tmp_path: Path, objects: Objects
) -> None:
    objects.format(process.namespaces()).close()
    gc.collect()
    assert process.try_flock(objects.control_fd)
    assert clean(tmp_path, objects, "--lose-unflushed") == {"removed": [], "kept": []}
    assert objects.exist()


def test_memory_is_listed_with_its_directory_and_when_all_are_dead_with_the_inode(directory: Path) -> None:
    with Child(OPENER, directory, SMALL) as child:
        assert child.read_line() == "open"
        wait_for_workers(directory)
        name = name_of(directory)
        assert directory_of(name) == str(directory)
        os.kill(child.pid, signal.SIGSTOP)  # or it would start another supervisor
        kill_all(directory)
    shown = re.fullmatch(r"inode (\d+) of (/.*)", directory_of(name))
    assert shown is not None
    status = directory.stat()
    assert (int(shown[1]), Path(shown[2]).stat().st_dev) == (status.st_ino, status.st_dev)
    assert directory_of(name) in CliRunner().invoke(cli, ["ipc", "list"]).stdout
    assert command("clean", "--lose-unflushed", name) == {"removed": [name], "kept": []}


def directory_of(name: str) -> str:
    return next(memory.directory for memory in ipc.memories() if memory.name == name)
