"""The dispatcher as a process: consume queues and key index say what the log says, whenever it is killed or late."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from support.running import derived_differences, log_bodies, running, starts_of, wait_restarted, wait_word, worker_pid
from support.waiting import wait_until

import shmbroker
from shmbroker import Message
from shmbroker.naming import BrokerPaths
from shmbroker.store.consume_queue import ConsumeQueues
from shmbroker.store.key_index import KeyIndex

FAILPOINTS = [
    "dispatcher.before_queues",
    "dispatcher.after_queues",
    "dispatcher.after_publish",
    "dispatcher.before_index",
    "dispatcher.after_index",
    "dispatcher.progress_written",
    "dispatcher.snapshot_begun",
    "dispatcher.snapshot_ended",
    "checkpoint.half_written",
    "checkpoint.synced",
]


def send_all(broker: shmbroker.Broker, count: int, size: int = 50, seed: int = 1) -> list[bytes]:
    """Messages to three topics, one in three with keys; the bodies in the order of the log."""
    choose = random.Random(seed)
    bodies = []
    with broker.producer("senders") as producer:
        for number in range(count):
            body = b"%d %d " % (seed, number) + choose.randbytes(choose.randrange(1, 2 * size))
            keys = f"k{number} shared" if number % 3 == 0 else None
            producer.send(Message(choose.choice(["red", "green", "blue"]), body, keys=keys, tags="t"))
            bodies.append(body)
    return bodies


def test_queues_and_index_say_what_the_log_says(tmp_path: Path) -> None:
    with running(tmp_path / "b") as broker:
        bodies = send_all(broker, 5000)
        wait_word(broker, "dispatched", broker.region.get("tail"))
        topics = {topic["name"]: topic for topic in broker.topics()}
        assert sum(queue["next_offset"] for topic in topics.values() for queue in topic["queues"]) == len(bodies)
    assert log_bodies(tmp_path / "b") == bodies
    assert derived_differences(tmp_path / "b", tmp_path / "side") == []


def test_keys_are_found_while_the_broker_runs(tmp_path: Path) -> None:
    with running(tmp_path / "b") as broker:
        send_all(broker, 300)
        wait_word(broker, "indexed", broker.region.get("tail"))
        topic = {topic["name"]: topic["topic_id"] for topic in broker.topics()}
        index = KeyIndex(BrokerPaths(tmp_path / "b").index, store_of(broker))
        found = [index.by_key(topic_id, "shared", 1000) for topic_id in topic.values()]
        assert sum(map(len, found)) == 100
        assert all(positions == sorted(positions, reverse=True) for positions in found)
        index.close()


@pytest.mark.crash
@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_dispatcher_killed_anywhere_leaves_nothing_out(tmp_path: Path, name: str) -> None:
    with running(tmp_path / "b", f"dispatcher/{name}=kill@2", snapshot_interval_bytes=64 << 10) as broker:
        bodies: list[bytes] = []
        seed = 0

        def killed() -> bool:
            nonlocal bodies, seed
            if starts_of(broker, "dispatcher") == 1 and broker.region.get("indexed") == broker.region.get("tail"):
                bodies += send_all(broker, 400, seed=seed)
                seed += 1
            return starts_of(broker, "dispatcher") > 1

        wait_until(killed, f"the dispatcher killed at {name}")
        wait_restarted(broker, "dispatcher")
        bodies += send_all(broker, 400, seed=1000)
        wait_word(broker, "dispatched", broker.region.get("tail"))
    assert log_bodies(tmp_path / "b") == bodies
    assert derived_differences(tmp_path / "b", tmp_path / "side") == []


def test_a_dispatcher_that_the_ring_has_passed_reads_the_files(tmp_path: Path) -> None:
    with running(tmp_path / "b") as broker:
        bodies = send_all(broker, 100)
        os.kill(worker_pid(broker, "dispatcher"), signal.SIGSTOP)
        stopped_at = broker.region.get("dispatched")
        bodies += send_all(broker, 400, size=10_000, seed=2)
        assert broker.region.get("tail") - stopped_at > 3 * broker.region.ring_bytes
        os.kill(worker_pid(broker, "dispatcher"), signal.SIGCONT)
        wait_word(broker, "dispatched", broker.region.get("tail"))
    assert log_bodies(tmp_path / "b") == bodies
    assert derived_differences(tmp_path / "b", tmp_path / "side") == []


def test_an_index_that_was_lost_is_built_anew(tmp_path: Path) -> None:
    with running(tmp_path / "b") as broker:
        send_all(broker, 500)
        wait_word(broker, "indexed", broker.region.get("tail"))
    paths = BrokerPaths(tmp_path / "b")
    (paths.index / "data.mdb").unlink()
    with running(tmp_path / "b") as broker:
        wait_word(broker, "indexed", broker.region.get("flushed"))
    assert derived_differences(tmp_path / "b", tmp_path / "side") == []


def test_a_deleted_topic_leaves_no_consume_queues(tmp_path: Path) -> None:
    with running(tmp_path / "b") as broker:
        send_all(broker, 100)
        gone = next(topic["topic_id"] for topic in broker.topics() if topic["name"] == "red")
        broker.delete_topic("red")
        wait_word(broker, "indexed", broker.region.get("tail"))
        kept = {topic["topic_id"] for topic in broker.topics()}
    queues = ConsumeQueues(BrokerPaths(tmp_path / "b").queues, bytes(16))
    assert {topic_id for topic_id, _ in queues.queues()} == kept
    assert gone not in kept
    assert derived_differences(tmp_path / "b", tmp_path / "side") == []


def store_of(broker: shmbroker.Broker) -> bytes:
    from support.running import reader_of

    return reader_of(broker.directory)[1].store
