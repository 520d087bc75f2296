"""Figures of delivery: push consumers, receive and ack, a consumer that lags, a broker with much in it, an idle one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

from shmbroker import Message
from shmbroker.tools import bench_consumers as consumers
from shmbroker.tools import bench_processes as processes
from shmbroker.tools import inside
from shmbroker.tools.bench_figures import MIB, RING_BYTES, Bench, Results, wait_until
from shmbroker.tools.bench_floors import record_bytes
from shmbroker.tools.bench_report import Figure, Target, alternate

GIB: Final = 1 << 30
RECEIVE_BATCH: Final = 32
PACE: Final = 100_000  # messages a second, of all producers beside a lagging consumer
PRODUCERS: Final = 2
SLEEPERS: Final = 50
TOPICS_OF_MANY: Final = 100
QUEUES_OF_EACH: Final = 10


@dataclass(frozen=True, slots=True)
class Pushed:
    """Messages per second, and processor seconds that one took its consumer."""

    rate: float
    processor: float


def push(bench: Bench) -> Results:
    """Push consumers as they come, 20 threads each, with an empty listener; a producer keeps messages waiting."""
    count = 400_000 if bench.quick else 2_000_000
    for fleet, least in ((1, 300_000), (4, 400_000)):

        def figure(fleet: int = fleet) -> Pushed:
            with bench.broker() as (_, directory, _):
                work: list[processes.Work] = [(consumers.feed, (directory, count, 100))]
                work += [(consumers.push, (directory, count))] * fleet
                seconds, *processor = processes.run_fleet(work, seconds=120)
                return Pushed(count / seconds, sum(processor) / count)

        bare, measured = alternate(
            bench.repeats, lambda: bench.floors.append(100, 100, count=count, ring_bytes=RING_BYTES), figure
        )
        name = f"push consumer, 100 B, empty listener, {fleet} process{'es' if fleet > 1 else ''}"
        note = f"{measured.processor * 1e9:.0f} ns of processor time each"
        yield Figure(name, measured.rate, "1/s", bare, "bare append", Target(at_least=least), note)


def receive_and_ack(bench: Bench) -> Results:
    """One process takes what is in the ring, 32 at a time, and acknowledges it."""
    count = RING_BYTES // 2 // record_bytes(100) // 100 * 100
    batch = processes.messages(100, 100)
    with (
        bench.broker(ring_bytes=RING_BYTES) as (broker, _, region),
        broker.producer(processes.GROUP) as producer,
        broker.simple_consumer(processes.GROUP, {processes.TOPIC: "*"}) as consumer,
    ):

        def figure() -> float:
            for _ in range(count // len(batch)):
                producer.send_batch(batch)
            wait_until(lambda: inside.drained(region), "the workers at rest")
            receive, ack = consumer.receive, consumer.ack
            left = count
            begin = time.perf_counter()
            while left:
                received = receive(RECEIVE_BATCH)
                ack(received)
                left -= len(received)
            return count / (time.perf_counter() - begin)

        def floor() -> float:
            return bench.floors.append(100, RECEIVE_BATCH, count=count, ring_bytes=RING_BYTES)

        figure()  # the paths are warm
        bare, measured = alternate(2 * bench.repeats, floor, figure)
    name = f"receive and ack of {RECEIVE_BATCH}, 100 B, in the ring"
    yield Figure(name, measured, "1/s", bare, "bare append", Target(at_least=1_000_000))


def lag(bench: Bench) -> Results:
    """A consumer that is 5 GiB behind, nothing of them in memory, beside producers who keep a pace."""
    gibibytes = 1 if bench.quick else 5
    count = gibibytes * GIB // record_bytes(1024) // 100 * 100
    with bench.broker() as (broker, directory, region):
        broker.create_group(processes.GROUP)
        batch = processes.messages(100, 1024)
        with broker.producer(processes.GROUP) as producer:
            for _ in range(count // len(batch)):
                producer.send_batch(batch, timeout=60.0)
        wait_until(lambda: inside.drained(region), "the last flush", 120)
        lagging = (consumers.receive_lagging, (directory, count, RECEIVE_BATCH, 2 * gibibytes))
        beside = (consumers.send_beside, (directory, PACE // PRODUCERS, 1024, count))
        caught, *rates = processes.run_fleet([lagging, *[beside] * PRODUCERS], seconds=300)
    read = count * record_bytes(1024)
    yield Figure(
        f"a consumer {gibibytes} GiB behind, 1 KiB, from the disk, beside {PRODUCERS} producers",
        read / caught.seconds, "B/s", read / caught.bare_seconds, "1 MiB reads beside them", Target(at_least=400 * MIB),
        f"{caught.processor / count * 1e9:.0f} ns of processor time each; {caught.from_disk / read:.0%} from the disk",
    )  # fmt: skip
    name = f"the {PRODUCERS} producers, paced at {PACE:,} x 1 KiB/s"
    yield Figure(name, sum(rates), "1/s", PACE, "the pace", Target(at_least=0.99, of_floor=True))


def many(bench: Bench) -> Results:
    """Sends into 1,000 queues of 100 topics with a group each, beside sends into one queue of one group."""
    with ExitStack() as stack:
        one = _sends(stack, bench, topics=1, queues=1)
        thousand = _sends(stack, bench, topics=TOPICS_OF_MANY, queues=QUEUES_OF_EACH)
        burst = RING_BYTES // 4 // record_bytes(100)
        for name, count in (("burst", burst), ("sustained", 500_000 if bench.quick else 1_000_000)):
            bare, measured = alternate(2 * bench.repeats, partial(one, count), partial(thousand, count))
            yield Figure(
                f"send, 100 B, {TOPICS_OF_MANY * QUEUES_OF_EACH:,} queues and {TOPICS_OF_MANY} groups, {name}",
                measured, "1/s", bare, "one of each", Target(at_least=0.8, of_floor=True),
            )  # fmt: skip


def _sends(stack: ExitStack, bench: Bench, *, topics: int, queues: int) -> Callable[[int], float]:
    """A broker with so many topics and a group for each; what sends to all of them in turn, and how many a second."""
    layout = {"ring_bytes": RING_BYTES, "max_queues": 2048, "claim_tables": 2048}
    broker, _, region = stack.enter_context(bench.broker(**layout))
    for number in range(topics):
        broker.create_topic(f"topic-{number}", queues)
        stack.enter_context(broker.simple_consumer(f"group-{number}", {f"topic-{number}": "*"}))
    producer = stack.enter_context(broker.producer(processes.GROUP))
    pool = [Message(f"topic-{number % topics}", number.to_bytes(100, "little")) for number in range(1000)]

    def sends(count: int) -> float:
        wait_until(lambda: inside.drained(region), "an empty ring")
        send = producer.send
        begin = time.perf_counter()
        for _ in range(count // len(pool)):
            for message in pool:
                send(message)
        return count // len(pool) * len(pool) / (time.perf_counter() - begin)

    sends(10 * len(pool))  # the paths are warm
    return sends


def idle(bench: Bench) -> Results:
    """Processor time of a broker, and of 50 processes that wait for its messages."""
    seconds = 5.0 if bench.quick else 20.0
    with bench.broker() as (_, directory, _):
        work: list[processes.Work] = [(consumers.watch_workers, (directory, seconds))]
        work += [(consumers.sleep_in_receive, (directory, seconds))] * (SLEEPERS // 2)
        work += [(consumers.sleep_in_push, (directory, seconds))] * (SLEEPERS // 2)
        workers, *sleepers = processes.run_fleet(work, seconds=seconds + 60)
    asleep = f"idle, {SLEEPERS} sleeping consumers: processor time per second"
    note = ", ".join(f"{role} {used / seconds * 1e3:.1f} ms" for role, used in workers.items())
    used = sum(workers.values()) / seconds
    yield Figure(f"{asleep}, the workers", used, "s", target=Target(at_most=0.01), note=note)
    used = sum(sleepers) / seconds
    note = f"half of them push consumers, of {sum(sleepers[SLEEPERS // 2 :]) / seconds * 1e3:.1f} ms"
    yield Figure(f"{asleep}, the consumers", used, "s", note=note)
