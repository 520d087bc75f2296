"""Acknowledgements that outlive the memory: what is on the disk when ``ack`` returns, what comes again without."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.claims import HELD_TO_MOVING, claims_in, control_words
from support.consuming import ALL, bodies_of, numbered, send
from support.processes import SMALL, Child, kill_all
from support.progress import RunKind, decode_progress
from support.running import log_records, lose_memory, running, worker_pid
from support.waiting import wait_until

import shmbroker
from shmbroker import BrokerBusy
from shmbroker.broker import Broker
from shmbroker.record import RecordKind

# Progress is written so seldom that only a durable acknowledgement can have written it.
SELDOM: dict[str, Any] = {**SMALL, "progress_interval": 3000.0}

# Sends 20 messages durably, then does what its third argument says to the consumer. Killed with the broker.
SCRIPT = """
    import sys, shmbroker
    from shmbroker import Message
    from shmbroker._native._core import failpoint_arm
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    broker.create_topic("orders", queues=2)
    producer, consumer = broker.producer("test"), broker.simple_consumer("audit", {"orders": "*"})
    for queue in range(2):
        producer.send_batch([Message("orders", b"%d" % (10 * queue + i)) for i in range(10)], queue_id=queue)
    exec(sys.argv[3])
    print("done")
    sys.stdin.read()
"""


def delivered(directory: Path) -> dict[int, int]:
    """What the reopened broker delivers to the group: body to attempt."""
    with shmbroker.open(directory, **SELDOM) as broker, broker.simple_consumer("audit", ALL) as consumer:
        messages = consumer.receive(100)
        consumer.ack(messages)
        return {int(message.body): message.delivery_attempt for message in messages}


def after_power_cut(directory: Path, action: str) -> dict[int, int]:
    with Child(SCRIPT, directory, SELDOM, action) as child:
        assert child.read_line() == "done"
        lose_memory(directory)
    return delivered(directory)


# ---- across the loss of the memory -----------------------------------------------------------------------------


@pytest.mark.crash
def test_what_was_acknowledged_durably_is_not_delivered_again_after_a_power_cut(directory: Path) -> None:
    action = """if True:
        messages = sorted(consumer.receive(20), key=lambda message: int(message.body))
        consumer.ack(messages[:3] + messages[5:7] + messages[12:14], durable=True)
    """
    left = {3, 4, 7, 8, 9, 10, 11, *range(14, 20)}
    assert after_power_cut(directory, action) == dict.fromkeys(left, 2)


@pytest.mark.crash
def test_without_it_nothing_is_lost_but_it_may_come_again(directory: Path) -> None:
    """The messages themselves are made durable, by a later durable acknowledgement of another group."""
    action = """if True:
        consumer.ack(consumer.receive(20))
        other = broker.simple_consumer("other", {"orders": "*"})
        other.ack(other.receive(1), durable=True)
    """
    assert after_power_cut(directory, action) == dict.fromkeys(range(20), 1)


@pytest.mark.crash
def test_a_consumer_made_durable_acknowledges_so_by_itself(directory: Path) -> None:
    action = """if True:
        careful = broker.simple_consumer("audit", {"orders": "*"}, ack="durable")
        careful.ack(careful.receive(20))
    """
    assert after_power_cut(directory, action) == {}


@pytest.mark.crash
def test_progress_records_outlive_the_memory_and_merge(directory: Path) -> None:
    """What the last progress record knew is known again: acknowledged is done, delivered counts as an attempt."""
    action = """if True:
        first = consumer.receive(20)
        consumer.ack([message for message in first if int(message.body) % 2], durable=True)
        for message in first:
            if int(message.body) == 4:
                consumer.change_invisible_duration(message, 0)
        (again,) = consumer.receive(20)
        one = next(message for message in first if int(message.body) == 16)
        consumer.ack([one], durable=True)
        two = next(message for message in first if int(message.body) == 6)
        consumer.ack([two], durable=True)
    """
    attempts = dict.fromkeys({0, 2, 8, 10, 12, 14, 18}, 2) | {4: 3}
    assert after_power_cut(directory, action) == attempts


@pytest.mark.crash
def test_killed_between_append_and_flush_the_acknowledgement_stands_in_memory(directory: Path) -> None:
    action = "consumer.ack(consumer.receive(20), durable=True)"
    environment = {"SHMBROKER_FAILPOINTS": "client/consumer.acks_appended=kill"}
    with Child(SCRIPT, directory, SELDOM, action, environment=environment) as child:
        assert child.wait() == -signal.SIGKILL
        kill_all(directory)
    assert delivered(directory) == {}


@pytest.mark.crash
def test_several_consumers_of_one_queue_lose_none_of_their_durable_acknowledgements(
    directory: Path, tmp_path: Path
) -> None:
    """They claim, acknowledge and move the base of one table at the same time, each at its own places."""
    source = """
        import sys, shmbroker
        consumer = shmbroker.open(sys.argv[1]).simple_consumer("audit", {"orders": "*"}, ack="durable")
        with open(sys.argv[2], "w", buffering=1) as history:
            print("ready")
            while True:
                messages = consumer.receive(3, wait=10.0)[::-2]
                consumer.ack(messages)
                print(*(message.body.decode() for message in messages), file=history)
    """
    opener = """
        import sys, shmbroker
        broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
        broker.create_topic("orders", queues=1)
        producer = broker.producer("test")
        for start in range(0, 3000, 100):
            producer.send_batch([shmbroker.Message("orders", b"%d" % i) for i in range(start, start + 100)])
        print("done")
        sys.stdin.read()
    """
    histories = [tmp_path / f"history-{i}" for i in range(3)]
    settings = {**SELDOM, "overflow_claims": 4096}
    with Child(opener, directory, settings) as child, ExitStack() as stack:
        assert child.read_line() == "done"
        consumers = [stack.enter_context(Child(source, directory, history)) for history in histories]
        assert [consumer.read_line() for consumer in consumers] == ["ready"] * 3
        wait_until(lambda: all(len(_numbers(history)) > 100 for history in histories), "a hundred each")
        lose_memory(directory)
    acknowledged = set().union(*map(_numbers, histories))
    with (
        shmbroker.open(directory, **settings) as broker,
        broker.simple_consumer("audit", ALL) as consumer,
    ):
        again: set[int] = set()
        while messages := consumer.receive(100):
            again |= {int(message.body) for message in messages}
    assert again.isdisjoint(acknowledged)
    assert len(again | acknowledged) >= 3000 - 3 * 2  # one acknowledgement each may be durable and unreported


# ---- what stands in the log when ack returns ---------------------------------------------------------------------


def test_an_acknowledgement_that_another_is_just_moving_the_base_over_is_recorded(directory: Path) -> None:
    """Stopped between two words of the base's way, the other leaves words that are of the next lap already."""
    source = """
        import sys, shmbroker
        from shmbroker._native._core import failpoint_arm
        consumer = shmbroker.open(sys.argv[1]).simple_consumer("audit", {"orders": "*"})
        messages = consumer.receive(1)
        print(messages[0].queue_offset)
        sys.stdin.readline()
        failpoint_arm("claim.half_reset", "stop", 1)
        consumer.ack(messages)
    """
    with running(directory) as broker:
        broker.create_topic("orders", queues=1)
        send(broker, *numbered(6))
        with Child(source, directory) as other, broker.simple_consumer("audit", ALL) as consumer:
            assert other.read_line() == "0"
            messages = consumer.receive(4)
            consumer.ack(messages[:3])
            other.write_line()
            wait_until(lambda: _is_stopped(other.pid), "the other stopped on its way")
            consumer.ack(messages[3], durable=True)
            (body,) = broker.region.progress_records(only_changed=False)
            progress = decode_progress(body)
            acked = {o for run in progress.runs if run.kind is RunKind.ACKED for o in range(run.first, run.end)}
            assert acked | set(range(progress.base)) == {0, 1, 2, 3, 4}
            os.kill(other.pid, signal.SIGCONT)
            assert other.wait() == 0


@pytest.mark.parametrize("durable", [False, True])
def test_what_a_stopped_append_holds_up_is_named_and_the_others_acknowledgement_is_done(
    directory: Path, durable: bool
) -> None:
    with running(directory, **SELDOM) as broker:
        broker.create_topic("orders", queues=1)
        send(broker, *numbered(5))
        with broker.simple_consumer("audit", ALL) as consumer, control_words(directory) as words:
            messages = consumer.receive(5)
            place = claims_in(words, consumer.client.slot)[1]
            words[place] ^= HELD_TO_MOVING
            with pytest.raises(BrokerBusy, match=r"these alone: orders\[0\] offset 1$") as caught:
                consumer.ack(messages, durable=durable)
            assert caught.value.messages == [messages[1]]
            with pytest.raises(BrokerBusy, match="change of the invisible duration"):
                consumer.change_invisible_duration(messages[1], 60)
            words[place] ^= HELD_TO_MOVING
            (table,) = broker.region.progress()
            assert (table["base"], table["acked"], table["held"]) == (1, [(2, 3)], 1)
            assert broker.region.clients()[consumer.client.slot]["acks"] == 4
            last = log_records(directory, broker.region.get("flushed"))[-1] if durable else None
            if last is not None:
                progress = decode_progress(last.body)
                assert progress.base == 1
                assert [(run.first, run.end) for run in progress.runs if run.kind is RunKind.ACKED] == [(2, 5)]
            consumer.ack(messages[1])
            assert [table["base"] for table in broker.region.progress()] == [5]


def test_one_record_for_each_queue_that_was_acknowledged(directory: Path) -> None:
    with running(directory, progress_interval=3000.0) as broker:
        broker.create_topic("orders", queues=3)
        for queue_id in range(3):
            send(broker, *numbered(4, 10 * queue_id), queue_id=queue_id)
        with broker.simple_consumer("audit", ALL) as consumer:
            messages = consumer.receive(12)
            begin = broker.region.get("tail")
            consumer.ack((message for message in messages if message.queue_id != 1), durable=True)
            end = broker.region.get("tail")
            assert broker.region.get("flushed") >= end
    records = [record for record in log_records(directory) if begin <= record.position < end]
    assert [record.kind for record in records] == [RecordKind.PROGRESS] * 2
    assert {(p.queue_id, p.base, p.runs) for p in map(decode_progress, (record.body for record in records))} == {
        (0, 4, ()),
        (2, 4, ()),
    }


# ---- when the disk does not answer -------------------------------------------------------------------------------


def test_a_stopped_flusher_makes_it_late_and_says_that_it_stands_in_memory(directory: Path) -> None:
    with running(directory, sync_flush_timeout=0.2) as broker:
        send(broker, *numbered(3))
        with broker.simple_consumer("audit", ALL) as consumer:
            messages = consumer.receive(3)
            os.kill(worker_pid(broker, "flusher"), signal.SIGSTOP)
            with pytest.raises(shmbroker.AckNotDurable, match=r"in memory.* sync_flush_timeout = 0\.2 s"):
                consumer.ack(messages, durable=True)
            assert [table["base"] for table in broker.region.progress() if table["queue_id"] == 0] == [3]
            os.kill(worker_pid(broker, "flusher"), signal.SIGCONT)


def test_a_read_only_store_is_named_as_the_cause(directory: Path) -> None:
    consumed: list[bytes] = []

    def consume_one_by_one(broker: Broker, consumer: shmbroker.SimpleConsumer) -> None:
        while True:
            send(broker, b"one")
            messages = consumer.receive(1)
            consumed.extend(bodies_of(messages))
            consumer.ack(messages, durable=True)

    with (
        running(directory, "flusher/flusher.before_fdatasync=errno:EIO@4+", sync_flush_timeout=10.0) as broker,
        broker.simple_consumer("audit", ALL) as consumer,
    ):
        with pytest.raises(shmbroker.AckNotDurable, match=r"in memory.*read-only") as refused:
            consume_one_by_one(broker, consumer)
        assert isinstance(refused.value.__cause__, shmbroker.StoreReadOnly)
        assert sum(table["base"] for table in broker.region.progress()) == len(consumed)
    assert delivered(directory) == {}  # the memory was kept, and is written to a disk that works again


def test_an_expired_message_is_named_and_the_others_are_durable(broker: Broker) -> None:
    send(broker, *numbered(3))
    with broker.simple_consumer("audit", ALL) as consumer:
        late = consumer.receive(1, invisible=0.05)
        others = consumer.receive(2)
        (again,) = consumer.receive(wait=10.0)
        begin = broker.region.get("tail")
        with pytest.raises(shmbroker.ReceiptExpired) as refused:
            consumer.ack(late + others, durable=True)
        assert refused.value.messages == late
        assert begin < broker.region.get("tail") <= broker.region.get("flushed")
        consumer.ack(again)


def test_only_memory_and_durable_are_words_for_it(broker: Broker) -> None:
    with pytest.raises(shmbroker.BadRequest, match="'memory' or 'durable'"):
        broker.simple_consumer("audit", ALL, ack="disk")


def _numbers(history: Path) -> set[int]:
    """Of the whole lines."""
    return {int(word) for word in history.read_text().rpartition("\n")[0].split()}


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
