"""The data path's figures: sends, end to end, durable sends, latency. One function each, in the table's order."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shmbroker
from shmbroker import Message
from shmbroker._native._core import Region
from shmbroker.tools import bench_processes as processes
from shmbroker.tools import inside
from shmbroker.tools.bench_floors import Floors, Flushes, Latency, record_bytes
from shmbroker.tools.bench_report import Figure, Result, Target, alternate

MIB = 1 << 20
RING_BYTES = 32 * MIB
SEGMENT_BYTES = 64 * MIB
BODIES = {100: "100 B", 1024: "1 KiB"}
Results = Iterator[Result]


@dataclass(frozen=True, slots=True)
class Bench:
    """What every figure is given."""

    floors: Floors
    place: Path  # on the disk that is measured
    quick: bool
    full: bool

    @property
    def repeats(self) -> int:
        return 3 if self.quick else 5

    @contextmanager
    def broker(self, **settings: Any) -> Iterator[tuple[shmbroker.Broker, Path, Region]]:
        """A broker in a new directory, embedded in this process; gone with its directory afterwards."""
        with (
            self.directory() as directory,
            shmbroker.open(directory, embed_grace=0.0, **settings) as broker,
            inside.attached(directory) as region,
        ):
            broker.create_topic(processes.TOPIC)
            runtime = broker.config.runtime
            ahead = (runtime.segments_ahead + runtime.reserve_segments) * region.segment_bytes
            wait_until(lambda: inside.ready_bytes(directory) >= ahead, "zero-filled segments")  # the disk is at rest
            yield broker, directory, region

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A new one, removed when the broker that served it has stopped."""
        directory = Path(tempfile.mkdtemp(prefix="broker-", dir=self.place))
        try:
            yield directory
        finally:
            inside.wait_stopped(directory)
            shutil.rmtree(directory)


def wait_until(reached: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Poll ``reached``. Raises Failed after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise processes.Failed(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.002)


def burst(bench: Bench) -> Results:
    """Send into half a ring that is empty: what a send costs its caller, with nothing to wait for."""
    targets = {(100, "send"): 1_500_000, (100, "send_batch(100)"): 5_000_000}
    with bench.broker(ring_bytes=RING_BYTES) as (broker, _, region), broker.producer(processes.GROUP) as producer:
        for body_bytes, body in BODIES.items():
            for call, (batch, send_all) in BURSTS.items():
                bare, measured = _burst(bench, region, producer, body_bytes, batch, send_all)
                limit = targets.get((body_bytes, call))
                target = Target(at_least=limit) if limit else None
                yield Figure(f"{call}, {body}, burst", measured, "1/s", bare, "bare append", target)


def _send_each(producer: shmbroker.Producer, pool: list[Message]) -> None:
    send = producer.send
    for message in pool:
        send(message)


def _make_and_send_each(producer: shmbroker.Producer, pool: list[Message]) -> None:
    send, topic, body = producer.send, pool[0].topic, pool[0].body
    for _ in pool:
        send(Message(topic, body))


def _send_batches(producer: shmbroker.Producer, pool: list[Message]) -> None:
    send_batch = producer.send_batch
    for at in range(0, len(pool), 100):
        send_batch(pool[at : at + 100])


BURSTS = {"send": (1, _send_each), "Message, send": (1, _make_and_send_each), "send_batch(100)": (100, _send_batches)}


def _burst(
    bench: Bench,
    region: Region,
    producer: shmbroker.Producer,
    body_bytes: int,
    batch: int,
    send_all: Callable[[shmbroker.Producer, list[Message]], None],
) -> tuple[float, float]:
    count = RING_BYTES // 2 // record_bytes(body_bytes) // 100 * 100
    pool = processes.messages(count, body_bytes)

    def figure() -> float:
        wait_until(lambda: inside.drained(region), "an empty ring")
        begin = time.perf_counter()
        send_all(producer, pool)
        return count / (time.perf_counter() - begin)

    def floor() -> float:
        return bench.floors.append(body_bytes, batch, count=count, ring_bytes=RING_BYTES)

    figure()  # the paths are warm
    return alternate(4 * bench.repeats, floor, figure)


def sustained(bench: Bench) -> Results:
    """Send far more than the ring holds into segments that stand ready, up to the last byte's fdatasync."""
    for body_bytes, body in BODIES.items():
        bare, measured = _sustained(bench, body_bytes, 512 * MIB if bench.quick else 3072 * MIB)
        target = Target(at_least=0.8, of_floor=True)
        note = f"{measured / record_bytes(body_bytes) / 1e6:.1f} M messages/s"
        yield Figure(f"send_batch(100), {body}, sustained", measured, "B/s", bare, "1 MiB writes", target, note)


def _sustained(bench: Bench, body_bytes: int, total: int) -> tuple[float, float]:
    batch = processes.messages(100, body_bytes)
    calls = total // (100 * record_bytes(body_bytes))
    sent_bytes = calls * 100 * record_bytes(body_bytes)
    settings = {"segments_ahead": total // SEGMENT_BYTES + 2, "segment_bytes": SEGMENT_BYTES}
    with (
        bench.broker(**settings) as (broker, directory, region),
        broker.producer(processes.GROUP) as producer,
    ):

        def figure() -> float:
            wait_until(lambda: inside.ready_bytes(directory) >= sent_bytes, "zero-filled segments", 300)
            wait_until(lambda: inside.drained(region), "an empty ring")
            begin = time.perf_counter()
            for _ in range(calls):
                last = producer.send_batch(batch)
            wait_until(lambda: region.get("flushed") >= last.end_position, "the last flush")
            return sent_bytes / (time.perf_counter() - begin)

        def floor() -> float:
            return bench.floors.sequential_write(MIB, total, ring_bytes=RING_BYTES)

        return alternate(bench.repeats - 2, floor, figure)


def end_to_end(bench: Bench) -> Results:
    """One producer process to one consumer process that acknowledges everything, first send to last ack."""
    targets = {(100, 1): 500_000, (100, 100): 2_000_000}
    for body_bytes, body in BODIES.items():
        for batch, api in ((1, "single-message API"), (100, "batch API (100)")):
            bare, measured = _end_to_end(bench, body_bytes, batch)
            limit = targets.get((body_bytes, batch))
            target = Target(at_least=limit) if limit else None
            yield Figure(f"1 -> 1 with ack, {body}, {api}", measured, "1/s", bare, "bare append", target)


def _end_to_end(bench: Bench, body_bytes: int, batch: int) -> tuple[float, float]:
    count = (200_000 if bench.quick else 500_000) * (1 if batch == 1 else 4)

    def figure() -> float:
        with bench.broker() as (_, directory, _):
            producer = (processes.send_counted, (directory, count, body_bytes, batch))
            consumer = (processes.receive_counted, (directory, count, batch))
            begin, end = processes.run_fleet([producer, consumer], seconds=120)
            return float(count / (end - begin) * 1e9)

    return alternate(
        bench.repeats, lambda: bench.floors.append(body_bytes, batch, count=count, ring_bytes=RING_BYTES), figure
    )


def durable(bench: Bench) -> Results:
    """Single sends under SYNC_FLUSH: each is on the disk when it returns. The flusher commits for all who wait."""
    for body_bytes, body in BODIES.items():
        for producers in (1, 4, 16):
            bare, measured = _durable(bench, body_bytes, producers)
            name = f"SYNC_FLUSH, {body}, {producers:2} producer{'s' if producers > 1 else ''}"
            p50 = Target(at_most=1.3, of_floor=True) if (producers, body_bytes) == (1, 100) else None
            rate = Target(at_least=0.8, of_floor=True) if (producers, body_bytes) == (16, 100) else None
            yield Figure(f"{name}: rate", measured.rate, "1/s", bare.rate, "bare hand-over", rate)
            yield Figure(f"{name}: p50", measured.p50, "s", bare.p50, "bare hand-over", p50)
            yield Figure(f"{name}: p99", measured.p99, "s", bare.p99, "bare hand-over")


def _durable(bench: Bench, body_bytes: int, producers: int) -> tuple[Flushes, Flushes]:
    seconds = 1.0 if bench.quick else 2.0

    def figure() -> Flushes:
        with bench.broker(flush_disk_type="SYNC_FLUSH") as (_, directory, _):
            producer = (processes.send_durably, (directory, seconds, body_bytes))
            answers = processes.run_fleet([producer] * producers, seconds=seconds + 30)
            latency = Latency.of([nanoseconds for _, some in answers for nanoseconds in some])
            return Flushes(sum(rate for rate, _ in answers), latency.p50, latency.p99)

    return alternate(bench.repeats, lambda: bench.floors.hand_over(body_bytes, producers, seconds), figure)


def one_way(bench: Bench) -> Results:
    """From the stamp before a send to the stamp after its receipt, 2,000 messages a second, nothing queued.

    The floor of a sleeping consumer is a ping-pong between two cores. Two programs that only hand over a stamp at the
    same pace are often run on one core and then cost less: what they take is shown without a target.
    """
    rate, count = 2000, 4000 if bench.quick else 10_000
    seconds = count / rate + 30

    def figure(spin: bool) -> Latency:
        with bench.broker() as (_, directory, _):
            producer = (processes.send_paced, (directory, rate, count, 100))
            consumer = (processes.receive_stamped, (directory, count, spin))
            return Latency.of(processes.run_fleet([producer, consumer], seconds=seconds)[1])

    def bare_programs() -> Latency:
        with processes.bare_semaphore() as name:
            sender = (processes.post_paced, (name, rate, count))
            receiver = (processes.wait_stamped, (name, count))
            return Latency.of(processes.run_fleet([sender, receiver], seconds=seconds)[1])

    bare, measured = alternate(
        bench.repeats, lambda: bench.floors.one_way(0, 20_000, apart=True), lambda: figure(spin=False)
    )
    yield Figure(
        "one way, sleeping consumer: p50", measured.p50, "s", bare.p50, "semaphore", Target(at_most=1.6, of_floor=True)
    )
    yield Figure("one way, sleeping consumer: p99", measured.p99, "s", bare.p99, "semaphore", Target(at_most=100e-6))
    paced = bare_programs()
    yield Figure("two Python programs with a bare semaphore, 2,000/s: p50", paced.p50, "s")
    yield Figure("two Python programs with a bare semaphore, 2,000/s: p99", paced.p99, "s")
    bare, measured = alternate(
        bench.repeats, lambda: bench.floors.one_way(rate, count, spin=True), lambda: figure(spin=True)
    )
    yield Figure("one way, spinning consumer: p50", measured.p50, "s", bare.p50, "shared word", Target(at_most=6e-6))
    yield Figure("one way, spinning consumer: p99", measured.p99, "s", bare.p99, "shared word")


def machine(bench: Bench) -> Results:
    """What bare C takes on this machine, without a broker, for the reader of the figures above."""
    for name, way in (
        ("bare C semaphore, one way, 2,000/s", bench.floors.one_way(2000, 4000)),
        ("bare C semaphore, ping-pong on two cores", bench.floors.one_way(0, 20_000, apart=True)),
        ("bare C semaphore, ping-pong anywhere", bench.floors.one_way(0, 20_000)),
        ("bare C 4 KiB pwrite + fdatasync", bench.floors.small_write(4096, 1000)),
    ):
        yield Figure(f"{name}: p50", way.p50, "s")
        yield Figure(f"{name}: p99", way.p99, "s")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
