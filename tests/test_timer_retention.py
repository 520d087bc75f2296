"""Pending timers and the log that holds them: kept, or carried on so that it may go (R15); and the index made anew."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.consuming import ALL, bodies_of
from support.running import derived_differences, log_bodies, running, wait_restarted, wait_word
from support.waiting import wait_until

from shmbroker import Message, SendResult
from shmbroker.broker import Broker
from shmbroker.naming import BrokerPaths
from shmbroker.store.checkpoint import CheckpointFile
from shmbroker.store.timer_index import reading

SEGMENT = 256 * 1024
SETTINGS: dict[str, Any] = {
    "ring_bytes": "256 KiB",
    "segment_bytes": SEGMENT,
    "retention_bytes": SEGMENT,
    "snapshot_interval_bytes": 64 * 1024,
}


def fill(broker: Broker, segments: int) -> None:
    """Messages that are consumed at once, for so many segments of log."""
    target = broker.region.get("tail") + segments * SEGMENT
    with broker.producer("filler") as producer, broker.simple_consumer("audit", {"filler": "*"}) as consumer:
        while broker.region.get("tail") < target:
            producer.send_batch([Message("filler", bytes(4000)) for _ in range(10)])
            consumer.ack(consumer.receive(32, wait=10.0))


def send_pending(broker: Broker, count: int, delay: float, size: int = 100) -> dict[bytes, SendResult]:
    with broker.producer("billing") as producer:
        return {
            body: producer.send(Message("orders", body, delay=delay))
            for body in (b"%d " % number + bytes(size) for number in range(count))
        }


def entries_of(place: Path, store: bytes) -> list[tuple[str, bytes, bytes]]:
    with reading(BrokerPaths(place).timers, store) as index:
        assert index is not None
        return list(index.items())


def test_a_segment_full_of_pending_timers_is_kept(tmp_path: Path) -> None:
    with running(tmp_path / "data", **SETTINGS) as broker:
        sent = send_pending(broker, 100, 3600.0, size=3000)
        first = min(result.position for result in sent.values()) // SEGMENT * SEGMENT
        fill(broker, 4)
        wait_word(broker, "timers_wanted", first + 2 * SEGMENT)
        wait_until(lambda: broker.region.get("timers_kept") > first, "the index")
        fill(broker, 1)
        assert broker.region.get("kept") <= first
        assert [result.recall() for result in sent.values()] == [True] * len(sent)
        wait_until(lambda: broker.region.get("kept") > first, "recalled ones hold nothing")


@pytest.mark.crash
@pytest.mark.parametrize("edge", ["", "scheduler.carried", "append.copied", "append.published"])
def test_few_pending_timers_are_carried_on_and_fire_once_or_are_recalled(tmp_path: Path, edge: str) -> None:
    directory = tmp_path / "data"
    with running(directory, failpoints=f"scheduler/{edge}=kill" if edge else "", **SETTINGS) as broker:
        with broker.producer("billing") as producer:  # by turns to be recalled, and to fire: then they were carried on
            sent = [
                producer.send(Message("orders", b"%d" % number, delay=14.0 if number % 2 else 3600.0))
                for number in range(20)
            ]
        last = sent[-1].position
        deadline = time.monotonic() + 25
        while broker.region.get("kept") <= last and time.monotonic() < deadline:
            fill(broker, 1)
        assert broker.region.get("kept") > last, "their segment was not given up"
        if edge:
            wait_restarted(broker, "scheduler")
        assert [result.recall() for result in sent[::2]] == [True] * 10
        with broker.simple_consumer("audit2", ALL) as consumer:
            found: Counter[bytes] = Counter()
            while found.total() < 10 and (messages := consumer.receive(32, wait=15.0)):
                consumer.ack(messages)
                found.update(bodies_of(messages))
            found.update(bodies_of(consumer.receive(32, wait=0.5)))
        assert found == Counter(b"%d" % number for number in range(1, 20, 2))
        assert [result.recall() for result in sent] == [True, False] * 10


def test_the_index_is_what_the_log_says(tmp_path: Path) -> None:
    """Sent, fired, recalled and pending: the index of a stopped broker is the one that a rebuild makes."""
    directory = tmp_path / "data"
    with running(directory) as broker:
        send_pending(broker, 30, 0.3)
        pending = send_pending(broker, 30, 3600.0)
        assert [result.recall() for result in list(pending.values())[:10]] == [True] * 10
        with broker.simple_consumer("audit", ALL) as consumer:
            found = 0
            while found < 30:
                messages = consumer.receive(32, wait=10.0)
                consumer.ack(messages)
                found += len(messages)
    assert derived_differences(directory, tmp_path / "side") == []
    checkpoint = CheckpointFile(BrokerPaths(directory).checkpoint).read()
    assert checkpoint is not None
    entries = [entries_of(place, checkpoint.store) for place in (directory, tmp_path / "side")]
    assert entries[0] == entries[1]
    assert Counter(table for table, _, _ in entries[0]) == {"due": 20, "pending": 20}
    shutil.rmtree(BrokerPaths(directory).timers)
    shutil.copytree(tmp_path / "side" / "timers", BrokerPaths(directory).timers)
    with running(directory) as broker:
        assert broker.status()["timers"]["pending"] == 20
        assert [broker.recall(str(result.recall_handle)) for result in list(pending.values())[10:12]] == [True] * 2
    assert len(log_bodies(directory)) == 30
