"""Retention by age, and without regard to who has consumed what; and what a full disk does then.

A segment's age is that of its file's last write. Tests that need an old one date its file back.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from support.consuming import ALL, drain
from support.regions import memory
from support.running import receive_all, running, wait_word
from support.waiting import wait_until

import shmbroker
from shmbroker import Message, SendStatus
from shmbroker.broker import Broker
from shmbroker.config import RuntimeConfig
from shmbroker.delivery.retention import retain
from shmbroker.naming import BrokerPaths, segment_name
from shmbroker.store.consume_queue import ConsumeQueues
from shmbroker.store.segment import list_segments
from shmbroker.tools import group_lag

SEGMENT: Final = 1 << 20
HOUR: Final = 3600.0
SETTINGS: Final[dict[str, Any]] = {"snapshot_interval_bytes": 64 << 10, "flush_interval": 0.01, "retention": HOUR}


def date_back(path: Path, seconds: float) -> None:
    then = time.time_ns() - round(seconds * 1e9)
    os.utime(path, ns=(then, then))


def age(directory: Path, segments: int, seconds: float = 2 * HOUR) -> None:
    """Make the first segments look as if they had last been written so long ago."""
    log = BrokerPaths(directory).log
    for base in list_segments(log)[:segments]:
        date_back(log / segment_name(base), seconds)


def send(broker: Broker, count: int) -> None:
    """Messages of a kilobyte with their numbers."""
    end = 0
    with broker.producer("test") as producer:
        for start in range(0, count, 100):
            batch = [Message("orders", b"%d " % number + bytes(1000)) for number in range(start, start + 100)]
            end = producer.send_batch(batch, queue_id=0).end_position
        assert producer.client.wait_flushed(end, 10**10)
    wait_word(broker, "indexed", end)
    wait_until(lambda: broker.region.get("snapshot") > end - SEGMENT, "a snapshot of late")


@pytest.mark.parametrize(
    ("ages", "settings", "kept"),
    [
        ((3, 2, 1, 0, 0), {"retention_ms": 5_400_000}, 2),
        ((3, 1, 3, 3, 0), {"retention_ms": 5_400_000}, 1),
        ((-9, 3, 3, 3, 0), {"retention_ms": 5_400_000}, 0),
        ((3, 3, 3, 3, 3), {"retention_ms": 5_400_000}, 4),
        ((3, 3, 3, 3, 3), {}, 0),
        ((3, 0, 0, 0, 0), {"retention_ms": 5_400_000, "retention_bytes": 2 * SEGMENT}, 2),
        ((3, 3, 3, 0, 0), {"retention_ms": 5_400_000, "retention_bytes": 3 * SEGMENT}, 3),
    ],
    ids=["the old", "up to a young one", "clock was put back", "not the last", "no limit", "or size", "or age"],
)
def test_whole_segments_go_from_the_front_by_their_last_write(
    tmp_path: Path, ages: tuple[int, ...], settings: dict[str, Any], kept: int
) -> None:
    """Ages in hours of five segments, the last of them in use; how many are given up."""
    for number, hours in enumerate(ages):
        path = tmp_path / segment_name(number * SEGMENT)
        path.touch()
        date_back(path, hours * HOUR)
    queues = ConsumeQueues(tmp_path, bytes(16), writable=True)
    noted: list[int] = []
    with memory(segment_bytes=SEGMENT) as region:
        for word in ("tail", "flushed", "dispatched", "indexed", "snapshot", "timers_kept"):
            region.set(word, 4 * SEGMENT + SEGMENT // 2)
        assert retain(region, queues, tmp_path, RuntimeConfig(**settings), noted.append) is (kept > 0)
        assert noted == [kept * SEGMENT] * (kept > 0)
        assert region.get("kept") == kept * SEGMENT
    queues.close()


def test_an_old_segment_goes_once_it_is_consumed_and_a_young_one_stays(directory: Path) -> None:
    with running(directory, **SETTINGS) as broker:
        broker.create_topic("orders", queues=1)
        send(broker, 3500)
        age(directory, 3)
        with broker.simple_consumer("billing", ALL) as consumer:
            received = [int(body.split()[0]) for body in drain(consumer, 1500)]
        wait_word(broker, "kept", SEGMENT)
        assert broker.region.get("kept") == SEGMENT, "the second one is not consumed to its end"
        received += receive_all(broker, 2000)
        assert received == list(range(3500))
        wait_word(broker, "kept", 3 * SEGMENT)
        wait_until(lambda: list_segments(BrokerPaths(directory).log)[0] == 3 * SEGMENT, "their files gone")
        assert broker.region.get("kept") == 3 * SEGMENT


@pytest.mark.parametrize("restarted", [False, True], ids=["at work", "restarted"])
def test_what_is_deleted_unconsumed_is_told_to_the_group_and_the_rest_delivered(
    directory: Path, restarted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = SETTINGS | {"delete_unconsumed": True}
    with ExitStack() as stack:
        broker = stack.enter_context(running(directory, **settings))
        broker.create_topic("orders", queues=1)
        broker.simple_consumer("billing", ALL).close()
        send(broker, 3500)
        with broker.simple_consumer("billing", ALL) as consumer:
            assert drain(consumer, 10)[0].split()[0] == b"0"
            held = consumer.receive(10, wait=10.0)
            age(directory, 2)
            wait_word(broker, "kept", 2 * SEGMENT)
            consumer.ack(held)  # what a consumer has, it has
        first = broker.topics()[0]["queues"][0]["first_offset"]
        assert 1500 < first < 2200
        (group,) = group_lag.brief(broker.region)
        assert group["lag_messages"] == 3500 - first
        if restarted:
            stack.close()
            broker = stack.enter_context(running(directory, **settings))
        with broker.simple_consumer("billing", ALL) as consumer:
            bodies = drain(consumer, 3500 - first)
            assert [int(body.split()[0]) for body in bodies] == list(range(first, 3500))
            assert consumer.receive(1) == []
            assert consumer.lost == first - 20
        told = re.findall(r"(\d+) messages of orders\[0\], from offset \d+ on, cannot be had", caplog.text)
        assert sum(map(int, told)) == first - 20
        assert len(told) < 50, "not a line for each"
        keeps = f"retention_ms = {broker.config.runtime.retention_ms}, retention_bytes = 0"
        assert f"deleted by retention (delete_unconsumed = true, {keeps}), lost, or" in caplog.text
        wait_until(lambda: all(table["base"] == 3500 for table in broker.region.progress()), "all of it done")


def test_delayed_messages_outlive_the_age_of_their_segment(directory: Path) -> None:
    settings = SETTINGS | {"delete_unconsumed": True}
    with running(directory, **settings) as broker, broker.producer("test") as producer:
        broker.create_topic("orders", queues=1)
        sent = producer.send(Message("orders", b"90000 later", delay=HOUR))
        send(broker, 3500)
        age(directory, 3)
        wait_word(broker, "kept", 2 * SEGMENT)
        assert sent.recall(), "it still waits, in a younger place"


# ---- a full disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def accepts(broker: Broker, number: int) -> bool:
    with broker.producer("test") as producer:
        try:
            return producer.send(Message("orders", b"%d " % number + bytes(5000))).status is SendStatus.SEND_OK
        except (shmbroker.StoreFull, shmbroker.BrokerBusy):
            return False


def test_beyond_the_watermark_sends_are_refused_and_below_it_they_go_on(disk: Path) -> None:
    """Long before the last byte; nothing of a refused send is stored, and nobody has to do anything afterwards."""
    with running(disk / "b", send_timeout=0.2, flush_interval=0.01, disk_full_watermark=0.6) as broker:
        sent = [number for number in range(100) if accepts(broker, number)]
        assert sent == list(range(100))
        (disk / "ballast").write_bytes(bytes(30 << 20))
        number = 100
        while accepts(broker, number):
            sent.append(number)
            number += 1
        wait_until(lambda: broker.status()["store"]["state"] == "full", "the store says that it is full")
        with broker.producer("test") as producer, pytest.raises(shmbroker.StoreFull):
            producer.send(Message("orders", b"refused" + bytes(100_000)))
        assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > 4 << 20
        (disk / "ballast").unlink()
        wait_until(lambda: accepts(broker, number), "sends accepted again")
        wait_until(lambda: broker.status()["store"]["state"] == "ok", "the store well again")
        assert sorted(receive_all(broker, number + 1)) == [*sent, number]


def test_a_full_disk_takes_the_oldest_segments_if_nobody_is_to_be_asked(disk: Path) -> None:
    settings: dict[str, Any] = {"send_timeout": 5.0, "flush_interval": 0.01, "snapshot_interval_bytes": 256 << 10}
    with running(disk / "b", delete_unconsumed=True, **settings) as broker, broker.producer("test") as producer:
        broker.create_topic("orders", queues=1)
        broker.simple_consumer("billing", ALL).close()
        count = 0
        while broker.region.get("kept") < 4 * SEGMENT:
            wait_until(lambda: accepts(broker, count), "sends go on")  # noqa: B023 - called at once
            count += 1
        producer.send(Message("orders", b"%d last" % count))
        numbers: list[int] = []
        with broker.simple_consumer("billing", ALL) as consumer:
            while not numbers or numbers[-1] < count:  # meanwhile another segment may have to go
                numbers += [int(body.split()[0]) for body in drain(consumer, 1)]
            assert numbers == sorted(set(numbers))
            assert len(numbers) + consumer.lost == count + 1
            assert consumer.lost > 4 * SEGMENT // 6000
