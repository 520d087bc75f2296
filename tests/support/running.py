"""A real broker with real worker processes in a directory of the test's, and a look at what it left there."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from support.processes import SMALL, kill_all, processes_of, wait_gone
from support.waiting import wait_until

import shmbroker
from shmbroker import memory
from shmbroker.descriptor import read_descriptor
from shmbroker.naming import BrokerPaths
from shmbroker.record import Record, RecordKind
from shmbroker.store.checkpoint import CheckpointFile
from shmbroker.store.commit_log import LogReader
from shmbroker.store.rebuild import Difference, differences, rebuild
from shmbroker.store.segment import SEGMENT_HEADER_BYTES, SegmentHeader, list_segments

QUICK: dict[str, Any] = {**SMALL, "embed_grace": 0.05, "progress_interval": 0.05, "checkpoint_interval": 0.1}

# Progress is written so seldom that only the consumer itself can have written it; so is the log flushed.
SELDOM: dict[str, Any] = {**SMALL, "progress_interval": 3000.0, "flush_interval": 3000.0}


@contextmanager
def running(directory: Path, failpoints: str = "", **settings: Any) -> Iterator[shmbroker.Broker]:
    """An open broker; afterwards its processes have gone, by themselves or killed."""
    os.environ["SHMBROKER_FAILPOINTS"] = failpoints
    try:
        broker = shmbroker.open(directory, **(QUICK | settings))
    finally:
        del os.environ["SHMBROKER_FAILPOINTS"]
    try:
        yield broker
    finally:
        for process in processes_of(directory):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        broker.close()
        try:
            wait_gone(directory)
        finally:
            kill_all(directory)


def worker_pid(broker: shmbroker.Broker, role: str) -> int:
    wait_until(lambda: starts_of(broker, role), f"a {role}")
    return next(int(worker["pid"]) for worker in broker.region.workers() if worker["role"] == role)


def wait_restarted(broker: shmbroker.Broker, role: str, times: int = 1) -> None:
    """Wait until the supervisor has replaced a worker that died."""
    wait_until(lambda: starts_of(broker, role) > times, f"a new {role}")


def starts_of(broker: shmbroker.Broker, role: str) -> int:
    return next((int(worker["starts"]) for worker in broker.region.workers() if worker["role"] == role), 0)


def wait_word(broker: shmbroker.Broker, word: str, at_least: int) -> None:
    wait_until(lambda: broker.region.get(word) >= at_least, f"{word} >= {at_least}")


def receive_all(broker: shmbroker.Broker, count: int) -> list[int]:
    """Numbers of the next ``count`` messages of the group, and a look whether there are more."""
    numbers: list[int] = []
    with broker.simple_consumer("billing", {"orders": "*"}) as consumer:
        while len(numbers) < count and (received := consumer.receive(max_messages=32, wait=10.0)):
            consumer.ack(received)
            numbers += [int(message.body.split()[0]) for message in received]
        numbers += [int(message.body.split()[0]) for message in consumer.receive(max_messages=32, wait=0.0)]
    return numbers


def room_of(broker: shmbroker.Broker) -> int:
    """Bytes of the ring that producers may still fill before something is flushed."""
    region = broker.region
    return region.ring_bytes - region.limits["reserve_bytes"] - (region.get("tail") - region.get("flushed"))


def lose_memory(directory: Path) -> None:
    """Kill everything that serves the directory, and take away its memory: only what is in files is left."""
    kill_all(directory)
    paths = BrokerPaths(directory)
    descriptor = read_descriptor(paths)
    assert descriptor is not None
    memory.remove(paths, descriptor)


# ---- what is on the disk ----------------------------------------------------------------------------------------


def reader_of(directory: Path) -> tuple[LogReader, SegmentHeader]:
    log = BrokerPaths(directory).log
    first = min(log.iterdir())
    header = SegmentHeader.parse(first.read_bytes()[:SEGMENT_HEADER_BYTES], first)
    return LogReader(log, header.segment_bytes, header.store), header


def log_end(directory: Path) -> int:
    checkpoint = CheckpointFile(BrokerPaths(directory).checkpoint).read()
    assert checkpoint is not None
    return checkpoint.flushed


def log_records(directory: Path, end: int | None = None) -> list[Record]:
    """Every record of a log whose broker has stopped."""
    from shmbroker._native._core import scan

    reader, header = reader_of(directory)
    first = list_segments(BrokerPaths(directory).log)[0]
    epoch, found = reader.read(first).epoch, []

    def take(data: memoryview, position: int) -> int:
        nonlocal epoch
        records, behind, _ = scan(data, position, epoch, header.segment_bytes)
        found.extend(records)
        epoch = records[-1].epoch if records else epoch
        return behind

    end = log_end(directory) if end is None else end
    assert reader.feed(first, end, take) == end
    reader.close()
    return found


def log_bodies(directory: Path) -> list[bytes]:
    return [record.body for record in log_records(directory) if record.kind == RecordKind.MESSAGE]


def derived_differences(directory: Path, side: Path) -> list[Difference]:
    """How consume queues and key index of a stopped broker differ from what its log says."""
    reader, header = reader_of(directory)
    paths = BrokerPaths(directory)
    first = list_segments(paths.log)[0]
    rebuilt = rebuild(reader, header.segment_bytes, header.store, first, log_end(directory), side)
    reader.close()
    return list(differences(paths, rebuilt))
