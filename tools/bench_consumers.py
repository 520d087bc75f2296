"""The processes of delivery's figures: consumers, and whoever sends beside them. bench_processes.py runs them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import shmbroker
from shmbroker import ConsumeStatus, ReceivedMessage
from shmbroker.naming import BrokerPaths
from shmbroker.tools import inside
from shmbroker.tools.bench_floors import record_bytes
from shmbroker.tools.bench_processes import GROUP, TOPIC, Failed, messages

BACKLOG: Final = 40_000  # messages kept waiting: enough for every prefetch, and well within the ring
FEED_SECONDS: Final = 0.005  # between two looks at what is acknowledged, which costs more than a message
SLICE_SECONDS: Final = 0.001  # a paced producer sends what is due, then sleeps so long
LOOK_SECONDS: Final = 0.1
SETTLE_SECONDS: Final = 2.0


def acked(broker: shmbroker.Broker) -> int:
    """Messages that the groups of this broker are done with, without gaps."""
    return sum(table["base"] for table in broker.region.progress())


def feed(gate: Callable[[], None], directory: Path, count: int, body_bytes: int) -> float:
    """Send ``count`` messages so that BACKLOG are never acknowledged yet. Answers the seconds until the last ack."""
    batch = messages(100, body_bytes)
    with shmbroker.open(directory) as broker, broker.producer(GROUP) as producer:
        for _ in range(BACKLOG // len(batch)):
            producer.send_batch(batch)
        gate()
        begin = time.perf_counter()
        sent, done = BACKLOG, 0
        while done < count:
            for _ in range((min(done + BACKLOG, count) - sent) // len(batch)):
                producer.send_batch(batch)
                sent += len(batch)
            time.sleep(FEED_SECONDS)
            done = acked(broker)
        return time.perf_counter() - begin


def push(gate: Callable[[], None], directory: Path, count: int) -> float:
    """Consume with an empty listener until the group is done with ``count``. Answers processor seconds."""

    def listener(_message: ReceivedMessage, _context: Any) -> ConsumeStatus:
        return ConsumeStatus.CONSUME_SUCCESS

    with shmbroker.open(directory) as broker:
        gate()
        begin = time.process_time()
        with broker.push_consumer(GROUP, listener, {TOPIC: "*"}):
            while acked(broker) < count:
                time.sleep(LOOK_SECONDS)
        return time.process_time() - begin


@dataclass(frozen=True, slots=True)
class Caught:
    """What a lagging consumer measures; sums over its parts."""

    seconds: float
    bare_seconds: float  # of reading the same bytes without a broker, a mebibyte after the other
    processor: float
    from_disk: int


def receive_lagging(gate: Callable[[], None], directory: Path, count: int, batch: int, parts: int) -> Caught:
    """Receive and acknowledge ``count`` messages, in parts; before each its files are read bare. All cold."""
    log = BrokerPaths(directory).log
    seconds = bare_seconds = processor = 0.0
    from_disk = 0
    with shmbroker.open(directory) as broker, broker.simple_consumer(GROUP, {TOPIC: "*"}) as consumer:
        files = sorted(log.iterdir())[: -(-count * record_bytes(1024) // broker.region.segment_bytes)]
        gate()
        for part in range(parts):
            forget(directory)
            begin = time.perf_counter()
            for file in files[len(files) * part // parts : len(files) * (part + 1) // parts]:
                _read_bare(file)
            bare_seconds += time.perf_counter() - begin
            forget(directory)
            from_disk -= _bytes_from_disk()
            begin, begin_processor = time.perf_counter(), time.process_time()
            left = count // parts
            while left > 0:
                received = consumer.receive(max_messages=min(batch, left), wait=10.0)
                if not received:
                    raise Failed(f"{left} of {count} messages did not come")
                consumer.ack(received)
                left -= len(received)
            seconds += time.perf_counter() - begin
            processor += time.process_time() - begin_processor
            from_disk += _bytes_from_disk()
    return Caught(seconds, bare_seconds, processor, from_disk)


def forget(directory: Path) -> None:
    """Have the kernel drop what it caches of a broker's files; what is not on the disk yet stays."""
    for path in (path for path in directory.rglob("*") if path.is_file()):
        with suppress(FileNotFoundError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_bare(path: Path) -> None:
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _bytes_from_disk() -> int:
    told = Path("/proc/self/io").read_text()
    return next(int(line.split()[1]) for line in told.splitlines() if line.startswith("read_bytes:"))


def send_beside(gate: Callable[[], None], directory: Path, rate: int, body_bytes: int, behind: int) -> float:
    """Send ``rate`` messages a second, one by one, until the group is done with ``behind``. Answers the rate kept."""
    with shmbroker.open(directory) as broker, broker.producer(GROUP) as producer:
        pool = messages(1000, body_bytes)
        gate()
        begin = looked = time.monotonic()
        sent = 0
        while True:
            now = time.monotonic()
            for number in range(sent, int((now - begin) * rate)):
                producer.send(pool[number % len(pool)])
                sent += 1
            if now - looked > LOOK_SECONDS:
                if acked(broker) >= behind:
                    return sent / (now - begin)
                looked = now
            time.sleep(SLICE_SECONDS)


def sleep_in_receive(gate: Callable[[], None], directory: Path, seconds: float) -> float:
    """A simple consumer that waits for messages. Answers processor seconds."""
    with shmbroker.open(directory) as broker, broker.simple_consumer(GROUP, {TOPIC: "*"}) as consumer:
        gate()
        consumer.receive(wait=SETTLE_SECONDS)
        begin = time.process_time()
        consumer.receive(wait=seconds)
        return time.process_time() - begin


def sleep_in_push(gate: Callable[[], None], directory: Path, seconds: float) -> float:
    """The same of a push consumer with all its threads."""
    with (
        shmbroker.open(directory) as broker,
        broker.push_consumer(GROUP, lambda _message, _context: None, {TOPIC: "*"}),
    ):
        gate()
        time.sleep(SETTLE_SECONDS)
        begin = time.process_time()
        time.sleep(seconds)
        return time.process_time() - begin


def watch_workers(gate: Callable[[], None], directory: Path, seconds: float) -> dict[str, float]:
    """Processor seconds of each worker, by role."""
    with inside.attached(directory) as region:
        workers = inside.worker_pids(region)
    gate()
    time.sleep(SETTLE_SECONDS)
    before = {role: _processor_seconds(pid) for role, pid in workers.items()}
    time.sleep(seconds)
    return {role: _processor_seconds(pid) - before[role] for role, pid in workers.items()}


def _processor_seconds(pid: int) -> float:
    """Of all threads that live, in nanoseconds as the scheduler counts them: /proc/PID/stat has hundredths."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
