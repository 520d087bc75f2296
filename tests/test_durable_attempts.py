"""``attempts = "durable"``: no delivery is ever forgotten, whatever is lost; else a power cut may take some back."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.claims import HELD_TO_MOVING, claims_in, control_words
from support.consuming import ALL, bodies_of, numbered, send
from support.processes import Child, kill_all
from support.progress import decode_progress
from support.running import SELDOM, lose_memory, running, worker_pid
from support.waiting import wait_until

import shmbroker
from shmbroker import ReceivedMessage
from shmbroker._native._core import scan
from shmbroker.broker import Broker
from shmbroker.record import Record, RecordFlag, RecordKind

# Sends ten messages to each of two queues, durably, then receives as its third argument says. Killed with the broker.
SCRIPT = """
    import sys, shmbroker
    from shmbroker import Message
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    broker.create_topic("orders", queues=2)
    producer = broker.producer("test")
    for queue in range(2):
        sent = producer.send_batch([Message("orders", b"%d" % (10 * queue + i)) for i in range(10)], queue_id=queue)
    broker.attach().wait_flushed(sent.end_position, 10**10)

    def deliver(consumer, *numbers):
        "One more delivery of these, after which they are given back; the others are not looked at."
        messages = consumer.receive(20)
        assert set(numbers) <= {int(message.body) for message in messages}
        for message in messages:
            if int(message.body) in numbers:
                consumer.change_invisible_duration(message, 0)

    exec(sys.argv[3])
    print("done")
    sys.stdin.read()
"""


def attempts_after_reopening(directory: Path) -> dict[int, int]:
    """Body to attempt of the twenty messages, as the reopened broker delivers them."""
    messages: list[ReceivedMessage] = []
    with shmbroker.open(directory, **SELDOM) as broker, broker.simple_consumer("audit", ALL) as consumer:
        while len(messages) < 20 and (received := consumer.receive(100, wait=10.0)):  # dead members' as they are reaped
            messages += received
    assert len(messages) == 20
    return {int(message.body): message.delivery_attempt for message in messages}


def after_power_cut(directory: Path, action: str) -> dict[int, int]:
    with Child(SCRIPT, directory, SELDOM, action) as child:
        assert child.read_line() == "done"
        lose_memory(directory)
    return attempts_after_reopening(directory)


@pytest.mark.crash
def test_after_a_power_cut_delivery_attempts_go_on_from_the_right_number(directory: Path) -> None:
    action = """if True:
        consumer = broker.simple_consumer("audit", {"orders": "*"}, attempts="durable")
        deliver(consumer, 3, 4, 15)
        deliver(consumer, 3, 15)
        deliver(consumer, 15)
    """
    assert after_power_cut(directory, action) == dict.fromkeys(range(20), 2) | {4: 3, 3: 4, 15: 4}


@pytest.mark.crash
def test_without_it_a_power_cut_takes_back_the_attempts_since_the_last_record(directory: Path) -> None:
    action = """if True:
        consumer = broker.simple_consumer("audit", {"orders": "*"})
        deliver(consumer, 3)
        deliver(consumer, 3)
    """
    assert after_power_cut(directory, action) == dict.fromkeys(range(20), 1)


@pytest.mark.crash
def test_attempts_of_every_member_survive_its_death_and_the_brokers_with_the_memory(directory: Path) -> None:
    action = """if True:
        consumer = broker.simple_consumer("audit", {"orders": "*"})
        deliver(consumer, 3)
        deliver(consumer, 3)
    """
    with Child(SCRIPT, directory, SELDOM, action) as child:
        assert child.read_line() == "done"
        kill_all(directory)
    assert attempts_after_reopening(directory) == dict.fromkeys(range(20), 2) | {3: 3}


@pytest.mark.crash
@pytest.mark.parametrize("loss", [kill_all, lose_memory], ids=["with-memory", "without-memory"])
@pytest.mark.parametrize(
    ("failpoint", "counted"),
    [("consumer.claimed", {1}), ("consumer.attempts_appended", {1, 2}), ("consumer.attempts_flushed", {2})],
)
def test_killed_before_it_has_the_messages_a_member_has_counted_them_or_not(
    directory: Path, failpoint: str, counted: set[int], loss: Any
) -> None:
    """With the memory the attempt always counts, as that of any consumer that dies behind its claim."""
    action = 'broker.simple_consumer("audit", {"orders": "*"}, attempts="durable").receive(20)'
    settings = {**SELDOM, "embed_grace": 60.0}  # or it stops when its one client is dead, and writes its progress
    armed = {"SHMBROKER_FAILPOINTS": f"{failpoint}=kill"}
    with Child(SCRIPT, directory, settings, action, environment=armed) as child:
        assert child.wait() == -signal.SIGKILL
        loss(directory)
    attempts = attempts_after_reopening(directory)
    assert sorted(attempts) == list(range(20))
    assert len(set(attempts.values())) == 1, "all or none of one receive"
    assert set(attempts.values()) <= ({2} if loss is kill_all else counted)


def records_between(broker: Broker, begin: int, end: int) -> list[Record]:
    view, at = broker.region.ring_view(), begin & (broker.region.ring_bytes - 1)
    records, reached, _ = scan(
        view[at : at + end - begin], begin, broker.region.get("epoch"), broker.region.segment_bytes
    )
    assert reached == end
    return records


def test_one_receive_is_one_atomic_append_for_all_queues_and_one_flush(directory: Path) -> None:
    with running(directory, **SELDOM) as broker:
        broker.create_topic("orders", queues=3)
        for queue_id in range(3):
            send(broker, *numbered(4, 10 * queue_id), queue_id=queue_id)
        with broker.simple_consumer("audit", ALL, attempts="durable") as consumer:
            begin = broker.region.get("tail")
            assert len(consumer.receive(12)) == 12
            end = broker.region.get("tail")
            assert broker.region.get("flushed") >= end
            records = records_between(broker, begin, end)
            assert [record.kind for record in records] == [RecordKind.PROGRESS] * 3
            assert all(record.flags & RecordFlag.GROUP for record in records)
            assert sum(bool(record.group_bytes) for record in records) == 1
            bodies = [decode_progress(record.body) for record in records]
            assert sorted(
                (body.queue_id, run.first, run.length, run.attempts) for body in bodies for run in body.runs
            ) == [(queue_id, 0, 4, 1) for queue_id in range(3)]
            assert consumer.receive(1) == []
            assert broker.region.get("tail") == end, "nothing was claimed, nothing is written"


def test_messages_whose_attempts_cannot_be_written_go_back_uncounted(directory: Path) -> None:
    with running(directory, sync_flush_timeout=0.2, **SELDOM) as broker:
        send(broker, *numbered(3))
        with (
            broker.simple_consumer("audit", ALL, attempts="durable") as careful,
            broker.simple_consumer("audit", ALL) as other,
        ):
            flusher = worker_pid(broker, "flusher")
            os.kill(flusher, signal.SIGSTOP)
            with pytest.raises(
                shmbroker.BrokerBusy, match=r"back to the group, uncounted: .* sync_flush_timeout = 0\.2 s"
            ):
                careful.receive(3)
            taken = other.receive(1)
            assert [(message.body, message.delivery_attempt) for message in taken] == [(b"0", 1)]
            os.kill(flusher, signal.SIGCONT)
            messages = careful.receive(3)
            assert [(message.body, message.delivery_attempt) for message in messages] == [(b"1", 1), (b"2", 1)]
            careful.ack(messages)
            other.ack(taken)


def test_on_a_read_only_store_the_cause_is_named_and_the_messages_stay_the_groups(directory: Path) -> None:
    with (
        running(directory, "flusher/flusher.before_fdatasync=errno:EIO@4+", **SELDOM) as broker,
        broker.simple_consumer("audit", ALL, attempts="durable") as careful,
        broker.simple_consumer("audit", ALL) as other,
    ):

        def consume_one_by_one() -> None:
            while True:
                send(broker, b"one")
                careful.ack(careful.receive(1, wait=5.0))

        with pytest.raises(shmbroker.StoreReadOnly, match=r"back to the group, uncounted: .*read-only"):
            consume_one_by_one()
        assert [(message.body, message.delivery_attempt) for message in other.receive(3)] == [(b"one", 1)]
    with running(directory, **SELDOM) as broker, broker.simple_consumer("audit", ALL, attempts="durable") as careful:
        (again,) = careful.receive(3, wait=5.0)  # the memory was kept, and is written to a disk that works
        assert (again.body, again.delivery_attempt) == (b"one", 2)


def test_the_invisible_time_begins_when_the_caller_has_the_message(directory: Path) -> None:
    slow = "flusher/flusher.before_fdatasync=sleep:400@1+"
    with running(directory, slow, **SELDOM) as broker:
        send(broker, b"work")
        with (
            broker.simple_consumer("audit", ALL, attempts="durable") as careful,
            broker.simple_consumer("audit", ALL) as other,
        ):
            messages = careful.receive(1, invisible=0.2)
            assert [message.delivery_attempt for message in messages] == [1]
            careful.ack(messages)
            assert other.receive(1) == []
            send(broker, b"more")
            (late,) = careful.receive(1, invisible=0.2)
            (again,) = other.receive(1, wait=10.0)
            assert (bodies_of([late, again]), again.delivery_attempt) == ([b"more", b"more"], 2)


def test_a_claim_that_an_append_decides_about_keeps_its_neighbours_from_nobody(directory: Path) -> None:
    """Whoever was to decide was stopped in the middle: that message stays away, the others are handed out at once."""
    with running(directory, sync_flush_timeout=20.0, **SELDOM) as broker, ThreadPoolExecutor(1) as thread:
        broker.create_topic("orders", queues=1)
        send(broker, *numbered(5))
        with (
            broker.simple_consumer("audit", ALL, attempts="durable") as careful,
            control_words(directory) as words,
        ):
            flusher = worker_pid(broker, "flusher")
            os.kill(flusher, signal.SIGSTOP)
            receiving = thread.submit(careful.receive, 5, 0.0, 0.5)
            wait_until(lambda: broker.region.progress()[0]["held"] == 5, "all claimed")
            places = claims_in(words, careful.client.slot)
            assert len(places) == 5
            held = words[places[1]]
            words[places[1]] = held ^ HELD_TO_MOVING
            os.kill(flusher, signal.SIGCONT)
            messages = receiving.result(timeout=10.0)
            assert bodies_of(messages) == [b"0", b"2", b"3", b"4"]
            careful.ack(messages)  # none of them had to wait so long that its time was over
            words[places[1]] = held
            assert broker.region.progress()[0]["held"] == 1


def test_only_memory_and_durable_are_words_for_it(broker: Broker) -> None:
    with pytest.raises(shmbroker.BadRequest, match=r"attempts = 'disk': must be 'memory' or 'durable'"):
        broker.simple_consumer("audit", ALL, attempts="disk")
