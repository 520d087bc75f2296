"""Retention gives up what every group has consumed, and nothing else (R15, R16)."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support.progress import Progress
from support.regions import memory
from support.running import receive_all, running, worker_pid
from support.waiting import wait_until

import shmbroker
from shmbroker import Message
from shmbroker._native._core import Region, failpoint_arm
from shmbroker.config import RuntimeConfig
from shmbroker.delivery.retention import STORE_FULL, floor, retain
from shmbroker.store.consume_queue import ENTRY, ConsumeQueues, Entry

STORE = bytes(16)
SEGMENT = 1 << 20
MESSAGES = 8  # of each queue, one in each segment
END = MESSAGES * SEGMENT


@contextmanager
def filled(tmp_path: Path) -> Iterator[tuple[Region, ConsumeQueues]]:
    """Topic "orders" with two queues, messages in every segment, everything flushed, dispatched and in a snapshot."""
    queues = ConsumeQueues(tmp_path, STORE, writable=True)
    with memory(segment_bytes=SEGMENT) as region:
        region.define_topic("orders", 2, 6, record=False)
        for group in ("billing", "audit"):
            region.define_group(group, record=False)
        for queue_id in range(2):
            entries = [ENTRY.pack(number * SEGMENT + 128 * queue_id, 100, 0) for number in range(MESSAGES)]
            queues.write(1, queue_id, 0, b"".join(entries))
            region.restore_queue(1, queue_id, MESSAGES, 0)
        for word in ("tail", "flushed", "dispatched", "indexed", "snapshot", "timers_kept"):
            region.set(word, END)
        yield region, queues
    queues.close()


def retained(
    region: Region, queues: ConsumeQueues, noted: list[int], log: Path = Path("/nowhere"), **settings: Any
) -> bool:
    return retain(region, queues, log, RuntimeConfig(**settings), noted.append)


def consume(region: Region, group_id: int, queue_id: int, base: int) -> None:
    region.restore_progress(Progress(group_id, 1, queue_id, 0, base).encode())


@contextmanager
def stopped_in_a_reset(region: Region, stored: int) -> Iterator[None]:
    """Group 1 goes back to offset 3 of queue 0; as many effects of that are stored."""
    pid = os.fork()
    if not pid:
        failpoint_arm("effect.stored", "stop", stored)
        region.reset_progress(1, 1, 0, 3)
        os._exit(1)
    try:
        assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("full", [False, True])
def test_what_no_group_has_consumed_yet_waits_for_the_first(tmp_path: Path, full: bool) -> None:
    noted: list[int] = []
    with filled(tmp_path) as (region, queues):
        if full:
            region.publish_store_state(STORE_FULL, 0)
        assert not retained(region, queues, noted, retention_bytes=1)
        assert (region.get("kept"), noted) == (0, [])


def test_a_queue_added_while_its_group_was_away_waits_for_it(tmp_path: Path) -> None:
    noted: list[int] = []
    with filled(tmp_path) as (region, queues):
        consume(region, 1, 0, MESSAGES)
        assert not retained(region, queues, noted, retention_bytes=1)
        consume(region, 2, 0, MESSAGES)
        consume(region, 2, 1, MESSAGES)
        assert not retained(region, queues, noted, retention_bytes=1), "one group has, the other has not"
        consume(region, 1, 1, 3)
        assert retained(region, queues, noted, retention_bytes=1)
        assert noted == [region.get("kept")] == [3 * SEGMENT]


@pytest.mark.parametrize("full", [False, True])
def test_what_every_group_has_consumed_is_given_up(tmp_path: Path, full: bool) -> None:
    noted: list[int] = []
    with filled(tmp_path) as (region, queues):
        if full:
            region.publish_store_state(STORE_FULL, 0)
        for queue_id in range(2):
            consume(region, 1, queue_id, 5)
            consume(region, 2, queue_id, 6)
        assert retained(region, queues, noted, retention_bytes=0 if full else 1)
        assert noted == [region.get("kept")] == [5 * SEGMENT]
        assert [queue["first_offset"] for queue in region.topics()[0]["queues"]] == [5, 5]


def test_without_retention_bytes_everything_stays_until_the_disk_is_full(tmp_path: Path) -> None:
    noted: list[int] = []
    with filled(tmp_path) as (region, queues):
        for queue_id in range(2):
            consume(region, 1, queue_id, MESSAGES)
        assert not retained(region, queues, noted, retention_bytes=0)
        assert retained(region, queues, noted, retention_bytes=2 * SEGMENT)
        assert noted == [region.get("kept")] == [6 * SEGMENT]


@pytest.mark.parametrize("lost", ["entries", "end of the file"])
def test_what_a_queue_has_lost_is_not_passed_over(tmp_path: Path, lost: str) -> None:
    """The log behind the last entry before it proves the damage, and the queue is made anew from it."""
    noted: list[int] = []
    with filled(tmp_path) as (region, queues):
        for queue_id, group_id in product(range(2), (1, 2)):
            consume(region, group_id, queue_id, MESSAGES - 2 * queue_id - 3)
        file = next((tmp_path / "1" / "1").iterdir())
        with file.open("r+b") as damaged:
            header, used = file.stat().st_size - MESSAGES * ENTRY.size, 2 * ENTRY.size
            if lost == "entries":
                damaged.seek(header + used)
                damaged.write(bytes(4 * ENTRY.size))
            else:
                damaged.truncate(header + used)
        assert retained(region, queues, noted, retention_bytes=1)
        assert noted == [region.get("kept")] == [SEGMENT]
        assert not retained(region, queues, noted, retention_bytes=1)


def test_a_queue_without_any_entry_gives_nothing_up(tmp_path: Path) -> None:
    with filled(tmp_path) as (region, queues):
        for queue_id, group_id in product(range(2), (1, 2)):
            consume(region, group_id, queue_id, 3)
        for file in (tmp_path / "1" / "1").iterdir():
            file.unlink()
        queues.close_unlinked()
        assert not retained(region, queues, [], retention_bytes=1)


def test_a_group_that_is_being_reset_keeps_what_its_old_and_its_new_place_need(tmp_path: Path) -> None:
    """Whoever resets it is stopped after each store: neither place is ever forgotten."""
    for stored in (1, 2, 3):
        directory = tmp_path / str(stored)
        with filled(directory) as (region, queues):
            for queue_id, group_id in product(range(2), (1, 2)):
                consume(region, group_id, queue_id, 6)
            with stopped_in_a_reset(region, stored):
                assert floor(region, queues) == 3 * SEGMENT


def test_what_a_group_is_reset_to_while_the_floor_is_measured_stays(tmp_path: Path) -> None:
    with filled(tmp_path) as (region, queues):
        for queue_id, group_id in product(range(2), (1, 2)):
            consume(region, group_id, queue_id, 6)

        class Meanwhile(ConsumeQueues):
            def read(self, *place: int) -> list[Entry]:
                if region.get("topic_generation") == generation:
                    region.reset_progress(1, 1, 0, 2)
                return super().read(*place)

        generation = region.get("topic_generation")
        noted: list[int] = []
        with closing(Meanwhile(tmp_path, STORE)) as reset:
            assert not retained(region, reset, noted, retention_bytes=1)
        assert retained(region, queues, noted, retention_bytes=1)
        assert noted == [region.get("kept")] == [2 * SEGMENT]


# ---- with a broker -----------------------------------------------------------------------------------------------


def test_nothing_that_a_group_has_not_consumed_is_deleted(directory: Path) -> None:
    settings: dict[str, Any] = {"retention_bytes": 1, "snapshot_interval_bytes": 64 << 10, "flush_interval": 0.01}
    with running(directory, **settings) as broker, broker.producer("p") as producer:
        with broker.simple_consumer("billing", {"orders": "*"}) as consumer:
            unconsumed = set()
            for number in range(4000):
                unconsumed.add(producer.send(Message("orders", b"%d " % number + bytes(1000))).position)
            wait_until(lambda: broker.region.get("snapshot") > 2 * SEGMENT, "a snapshot behind the first segments")
            while min(unconsumed) < 2 * SEGMENT:
                received = consumer.receive(max_messages=32, wait=5.0)
                consumer.ack(received)
                unconsumed -= {message.position for message in received}
        wait_until(lambda: broker.region.get("kept"), "consumed segments given up")
        wait_until(lambda: broker.region.get("kept") > min(unconsumed) - SEGMENT, "all of them")
        assert broker.region.get("kept") <= min(unconsumed)
        assert len(receive_all(broker, len(unconsumed))) == len(unconsumed)
        wait_until(lambda: broker.region.get("kept") > min(unconsumed), "the others, once they are consumed")


@pytest.mark.crash
def test_a_dispatcher_killed_while_it_gives_segments_up_takes_nothing_with_it(directory: Path) -> None:
    settings: dict[str, Any] = {"retention_bytes": 1, "snapshot_interval_bytes": 64 << 10, "flush_interval": 0.01}
    with running(directory, "dispatcher/dispatcher.kept_noted=kill", **settings) as broker:
        sent = list(range(3000))
        with broker.producer("p") as producer, broker.simple_consumer("billing", {"orders": "*"}) as consumer:
            dispatcher = worker_pid(broker, "dispatcher")
            for number in sent:
                producer.send(Message("orders", b"%d " % number + bytes(1000)))
            received: list[int] = []
            while len(received) < 2000:
                messages = consumer.receive(max_messages=32, wait=5.0)
                received += [int(message.body.split()[0]) for message in messages]
                consumer.ack(messages)
            wait_until(lambda: worker_pid(broker, "dispatcher") != dispatcher, "the dispatcher killed and restarted")
            wait_until(lambda: broker.region.get("kept"), "consumed segments given up")
    with running(directory, **settings) as broker:
        received += receive_all(broker, len(sent) - len(received))
        assert sorted(received) == sent


def test_a_full_disk_frees_itself_as_messages_are_consumed(tmp_path: Path) -> None:
    """R16, with no operator and with the default retention, which keeps everything until then."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        settings: dict[str, Any] = {"send_timeout": 0.5, "flush_interval": 0.01, "snapshot_interval_bytes": 256 << 10}
        with running(disk / "b", **settings) as broker, broker.producer("p") as producer:
            sent = 0

            def send(until: int) -> bool:
                nonlocal sent
                try:
                    while sent < until:
                        producer.send(Message("orders", b"%d " % sent + bytes(5000)))
                        sent += 1
                except (shmbroker.StoreFull, shmbroker.BrokerBusy) as refusal:
                    return isinstance(refusal, shmbroker.BrokerBusy)
                return True

            with broker.simple_consumer("billing", {"orders": "*"}):
                pass  # the group exists, and has consumed nothing
            wait_until(lambda: not send(1 << 30), "the disk full")
            filled = sent
            assert filled * 5000 > 8 << 20
            assert broker.region.get("kept") == 0
            assert sorted(receive_all(broker, filled)) == list(range(filled))
            wait_until(lambda: send(filled + 1000) and sent == filled + 1000, "sends accepted again", deadline=30.0)
            assert sorted(receive_all(broker, 1000)) == list(range(filled, sent))
            assert broker.region.get("store_errno") in (0, errno.ENOSPC)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
