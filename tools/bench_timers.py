"""Figures of delayed messages, a great many of them pending."""

from __future__ import annotations

import struct
import time
from typing import Final

import psutil

import shmbroker
from shmbroker import Message
from shmbroker.tools import bench_processes as processes
from shmbroker.tools import inside
from shmbroker.tools.bench_figures import MIB, Bench, Results, wait_until
from shmbroker.tools.bench_report import Figure, Target, percentile

FAR_SECONDS: Final = 7 * 86_400.0
LEAD_SECONDS: Final = 3.0  # behind the last send, so that sending is over when the first is due
SENDS_PER_SECOND: Final = 50_000  # at least: how long the sends may take
GIVE_UP_SECONDS: Final = 60.0
_DUE: Final = struct.Struct("<d92x")


def timers(bench: Bench) -> Results:
    """How late delayed messages come, end to end, while many more are pending, and what those cost in memory."""
    pending, due = (50_000, 20_000) if bench.quick else (1_000_000, 100_000)
    with bench.broker() as (broker, _, region):
        wait_until(lambda: region.get("timers_kept") > 0, "the scheduler at work")
        scheduler = psutil.Process(inside.worker_pids(region)["scheduler"])
        empty = scheduler.memory_full_info().uss
        send_due(broker, pending, time.time_ns() / 1e9 + FAR_SECONDS, FAR_SECONDS)
        wait_until(lambda: broker.status()["timers"]["pending"] == pending, "all of them in the index", 300.0)
        grown = max(0, scheduler.memory_full_info().uss - empty)
        name = f"scheduler's memory for {pending:,} pending timers"
        yield Figure(name, grown, "B", target=Target(at_most=256 * MIB))

        late = lateness(broker, due, 1.0)
        name = f"lateness of {due:,} messages due evenly over one second"
        yield Figure(f"{name}, p50", percentile(late, 0.5), "s")
        yield Figure(f"{name}, p99", percentile(late, 0.99), "s", target=Target(at_most=0.05))

        late = lateness(broker, due, 0.0)
        yield Figure(f"lateness of the last of {due:,} messages due at once", late[-1], "s", target=Target(at_most=1.2))

        late = sorted(late for _ in range(50) for late in lateness(broker, 1, 0.0, lead=0.05))
        yield Figure(
            "lateness of one message on an idle broker, p99", percentile(late, 0.99), "s", target=Target(at_most=0.01)
        )


def send_due(broker: shmbroker.Broker, count: int, first: float, spread: float) -> None:
    """Delayed messages, due evenly over ``spread`` seconds from ``first`` (since 1970); each says when in its body."""
    with broker.producer(processes.GROUP) as producer:
        for number in range(count):
            at = first + spread * number / count
            producer.send(Message(processes.TOPIC, _DUE.pack(at), deliver_at=at))


def lateness(broker: shmbroker.Broker, count: int, spread: float, lead: float = LEAD_SECONDS) -> list[float]:
    """Seconds between due and received of messages that are due evenly over ``spread`` seconds, sorted."""
    first = time.time_ns() / 1e9 + lead + count / SENDS_PER_SECOND
    send_due(broker, count, first, spread)
    late: list[float] = []
    deadline = first + spread + GIVE_UP_SECONDS
    with broker.simple_consumer(processes.GROUP, {processes.TOPIC: "*"}) as consumer:
        while len(late) < count:
            received = consumer.receive(256, wait=1.0)
            now = time.time_ns() / 1e9
            if now > deadline:
                raise processes.Failed(f"{count - len(late):,} of {count:,} delayed messages have not come")
            late += [now - _DUE.unpack(message.body)[0] for message in received]
            consumer.ack(received)
    return sorted(late)
