"""Real power cuts: an ext4 of its own on a loop device loses all that was not synced, in the middle of work."""

from __future__ import annotations

import fcntl
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from support.processes import Child, kill_all
from support.running import QUICK, derived_differences, log_bodies, lose_memory, running

from shmbroker import Message, SendStatus

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
