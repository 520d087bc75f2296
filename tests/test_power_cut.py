"""Real power cuts: an ext4 of its own on a loop device loses all that was not synced, in the middle of work."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from support.processes import Child, kill_all, wait_for_workers, workers_of
from support.running import QUICK, derived_differences, log_bodies, lose_memory, running
from support.waiting import wait_until

from shmbroker import Message, SendStatus, memory
from shmbroker.naming import BrokerPaths
from shmbroker.store.checkpoint import CheckpointFile

GOING_DOWN: Final = 0x8004587D  # FS_IOC_SHUTDOWN
WITHOUT_FLUSHING: Final = struct.pack("I", 2)

CLIENT = """
    import sys, shmbroker
    from shmbroker import Message, SendStatus
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    producer = broker.producer("p")
    number = 0
    while True:
        result = producer.send(Message("orders", b"%d " % number + bytes(number % 3000), keys=f"k{number}"))
        print(number if result.status is SendStatus.SEND_OK else -1)
        number += 1
"""

ON_DEMAND: Final = """
    import sys, shmbroker
    from shmbroker import Message
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    for topic in ("left", "busy"):
        broker.create_topic(topic, queues=1)
    producer = broker.producer("p")
    print("open")
    for line in sys.stdin:
        topic, first, end = line.split()
        for number in range(int(first), int(end)):
            result = producer.send(Message(topic, b"%d" % number))
        print(result.position)
"""


class Disk:
    """A mounted file system whose power can be cut and come back."""

    def __init__(self, image: Path, place: Path) -> None:
        self._image = image
        self.place = place

    def make(self) -> bool:
        self.place.mkdir()
        with self._image.open("wb") as file:
            file.truncate(160 << 20)
        made = subprocess.run(["mkfs.ext4", "-q", "-F", self._image], capture_output=True).returncode == 0
        return made and self.mount()

    def mount(self) -> bool:
        return subprocess.run(["mount", "-o", "loop", self._image, self.place], capture_output=True).returncode == 0

    def cut_power(self) -> None:
        """From now on nothing reaches the disk any more, not even what is in its journal in memory."""
        fd = os.open(self.place, os.O_RDONLY)
        fcntl.ioctl(fd, GOING_DOWN, WITHOUT_FLUSHING)
        os.close(fd)

    def power_on(self) -> None:
        subprocess.run(["umount", self.place], check=True)
        assert self.mount()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "image", tmp_path / "disk")
    try:
        able = disk.make()
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("needs mkfs.ext4 and the right to mount a loop device")
    yield disk
    subprocess.run(["umount", "-l", disk.place], check=True)


def sent(number: int) -> bytes:
    return b"%d " % number + bytes(number % 3000)


@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mode", ["SYNC_FLUSH", "ASYNC_FLUSH"])
def test_a_power_cut_takes_nothing_that_was_promised_and_leaves_no_gap(disk: Disk, mode: str, seed: int) -> None:
    directory = disk.place / "b"
    settings: dict[str, Any] = QUICK | {"flush_disk_type": mode, "flush_interval": 0.02}
    acknowledged = -1
    with Child(CLIENT, directory, settings) as child:
        for _ in range(random.Random(seed).randrange(500, 3000)):
            acknowledged = max(acknowledged, int(child.read_line()))
        disk.cut_power()
        kill_all(directory)
    disk.power_on()
    lose_memory(directory)
    with running(directory, flush_disk_type=mode) as broker, broker.producer("p") as producer:
        assert producer.send(Message("orders", b"after")).status is SendStatus.SEND_OK
    bodies = log_bodies(directory)
    assert bodies.pop() == b"after"
    assert bodies == [sent(number) for number in range(len(bodies))]
    if mode == "SYNC_FLUSH":
        assert len(bodies) > acknowledged
    assert derived_differences(directory, disk.place / "side") == []


@pytest.mark.crash
@pytest.mark.slow
def test_a_power_cut_does_not_take_what_a_killed_dispatcher_had_dispatched_and_nobody_synced(disk: Disk) -> None:
    directory = disk.place / "b"
    settings = QUICK | {"flush_disk_type": "SYNC_FLUSH", "checkpoint_interval": 1.0}

    def noted() -> int:
        checkpoint = CheckpointFile(BrokerPaths(directory).checkpoint).read()
        return 0 if checkpoint is None else checkpoint.dispatched

    with Child(ON_DEMAND, directory, settings) as child:

        def send(topic: str, first: int, end: int) -> int:
            """The position of the last record, once it is dispatched."""
            child.write_line(f"{topic} {first} {end}")
            position = int(child.read_line())
            wait_until(lambda: region.get("dispatched") > position, "the messages dispatched")
            return position

        assert child.read_line() == "open"
        dispatcher = wait_for_workers(directory)["dispatcher"]
        attached = memory.attach(BrokerPaths(directory))
        assert attached is not None
        region = attached[0]
        begun = region.get("tail")
        wait_until(lambda: noted() >= begun, "a checkpoint")
        left = send("left", 0, 100)
        os.kill(dispatcher, signal.SIGKILL)
        assert noted() <= left, "the checkpoint came too early: nothing was tried"
        wait_until(lambda: workers_of(directory).get("dispatcher", dispatcher) != dispatcher, "another dispatcher")
        busy = send("busy", 100, 120)
        wait_until(lambda: noted() > busy, "its checkpoint")
        disk.cut_power()
        kill_all(directory)
    disk.power_on()
    lose_memory(directory)
    received: set[int] = set()
    with running(directory) as broker, broker.simple_consumer("g", {"left": "*", "busy": "*"}) as consumer:
        while messages := consumer.receive(32, wait=1.0):
            received.update(int(message.body) for message in messages)
            consumer.ack(messages)
    assert received == set(range(120))
    assert derived_differences(directory, disk.place / "side") == []
