"""The producer on a real broker: what is refused and how, which queue, which id, what is stored, who is told when."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.processes import Child
from support.producing import Told, a_send_waits, bodies_of, count_of, fill_ring, records_of, stopped_flusher
from support.running import QUICK, running
from support.waiting import wait_until

import shmbroker
from shmbroker import (
    BadRequest,
    Broker,
    BrokerBusy,
    BrokerClosed,
    Message,
    MessageIllegal,
    MessageTooLarge,
    NameIllegal,
    NoPermission,
    Producer,
    PropertiesTooLarge,
    QueueNotExist,
    SendResult,
    SendStatus,
    ShmBrokerError,
    TopicNotExist,
)
from shmbroker.record import decode_record

RING = 1 << 20
SEGMENT = 3 << 19  # the ring's end lies in the middle of segments: records cross it
MAX_MESSAGE = 64 << 10
numbers = itertools.count()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One broker for all tests here; each has a topic of its own."""
    settings = {**QUICK, "ring_bytes": RING, "segment_bytes": SEGMENT, "max_message_bytes": MAX_MESSAGE}
    settings |= {"flush_interval": 0.02, "auto_create_topics": False, "max_topics": 128, "max_queues": 512}
    with running(tmp_path_factory.mktemp("producer") / "broker", **settings) as opened:
        yield opened


@pytest.fixture
def topic(broker: Broker) -> str:
    """A new topic with four queues."""
    name = f"topic-{next(numbers)}"
    broker.create_topic(name, queues=4)
    return name


@pytest.fixture
def producer(broker: Broker) -> Iterator[Producer]:
    with broker.producer("test") as made:
        yield made


# ---- refusals: each its own class, nothing stored -------------------------------------------------------------------

Send = Callable[[Producer, str], object]
REFUSED: dict[str, tuple[type[Exception], Send]] = {
    "an empty body": (MessageIllegal, lambda p, t: p.send(Message(t, b""))),
    "a body of str": (MessageIllegal, lambda p, t: p.send(Message(t, "text"))),  # type: ignore[arg-type]
    "a body over the limit": (MessageTooLarge, lambda p, t: p.send(Message(t, bytes(MAX_MESSAGE + 1)))),
    "two tags": (MessageIllegal, lambda p, t: p.send(Message(t, b"x", tags="a || b"))),
    "the tag that means all": (MessageIllegal, lambda p, t: p.send(Message(t, b"x", tags="*"))),
    "a tag with outer blanks": (MessageIllegal, lambda p, t: p.send(Message(t, b"x", tags=" a"))),
    "tags over their length field": (PropertiesTooLarge, lambda p, t: p.send(Message(t, b"x", tags="a" * 32_768))),
    "a key with a blank": (MessageIllegal, lambda p, t: p.send(Message(t, b"x", keys=["a b"]))),
    "a key that is no str": (MessageIllegal, lambda p, t: p.send(Message(t, b"x", keys=[1]))),  # type: ignore[list-item]
    "keys over their length field": (PropertiesTooLarge, lambda p, t: p.send(Message(t, b"x", keys="k" * 32_768))),
    "a reserved property": (MessageIllegal, lambda p, t: p.send(Message(t, b"x", properties={"KEYS": "v"}))),
    "a timer's property": (MessageIllegal, lambda p, t: p.send(Message(t, b"x", properties={"TIMER_X": "v"}))),
    "a property without a name": (MessageIllegal, lambda p, t: p.send(Message(t, b"x", properties={"": "v"}))),
    "a separator in a property": (MessageIllegal, lambda p, t: p.send(Message(t, b"x", properties={"a": "\x01"}))),
    "a property that is no str": (
        MessageIllegal,
        lambda p, t: p.send(Message(t, b"x", properties={"a": 1})),  # type: ignore[dict-item]
    ),
    "properties over their length field": (
        PropertiesTooLarge,
        lambda p, t: p.send(Message(t, b"x", properties={"a": "v" * 32_768})),
    ),
    "text that is no Unicode": (MessageIllegal, lambda p, t: p.send(Message(t, b"x", properties={"a": "\ud800"}))),
    "a topic that does not exist": (TopicNotExist, lambda p, t: p.send(Message(f"{t}-other", b"x"))),
    "a queue past the last": (QueueNotExist, lambda p, t: p.send(Message(t, b"x"), queue_id=4)),
    "a negative queue": (QueueNotExist, lambda p, t: p.send(Message(t, b"x"), queue_id=-1)),
    "a queue by name": (QueueNotExist, lambda p, t: p.send(Message(t, b"x"), queue_id="0")),  # type: ignore[arg-type]
    "a selector's queue past the last": (
        QueueNotExist,
        lambda p, t: p.send(Message(t, b"x"), selector=lambda queues, _message, _argument: len(queues)),
    ),
    "two ways to choose a queue": (BadRequest, lambda p, t: p.send(Message(t, b"x"), queue_id=0, sharding_key="k")),
    "an empty dedup key": (BadRequest, lambda p, t: p.send(Message(t, b"x"), dedup_key="")),
    "a negative timeout": (BadRequest, lambda p, t: p.send(Message(t, b"x"), timeout=-1)),
    "something that is no message": (TypeError, lambda p, _: p.send(b"x")),  # type: ignore[arg-type]
    "an empty batch": (MessageIllegal, lambda p, _: p.send_batch([])),
    "a batch of two topics": (MessageIllegal, lambda p, t: p.send_batch([Message(t, b"x"), Message(f"{t}-2", b"x")])),
    "a batch of two kinds of waiting": (
        MessageIllegal,
        lambda p, t: p.send_batch([Message(t, b"x"), Message(t, b"x", wait_store_ok=False)]),
    ),
    "a batch with one bad message": (MessageIllegal, lambda p, t: p.send_batch([Message(t, b"x"), Message(t, b"")])),
    "a batch of too many": (MessageTooLarge, lambda p, t: p.send_batch([Message(t, b"x")] * 1025)),
    "a batch of too many bytes": (MessageTooLarge, lambda p, t: p.send_batch([Message(t, bytes(60_000))] * 5)),
    "a batch with something else in it": (
        TypeError,
        lambda p, t: p.send_batch([Message(t, b"x"), b"x"]),  # type: ignore[list-item]
    ),
    "a oneway without a body": (MessageIllegal, lambda p, t: p.send_oneway(Message(t, b""))),
    "an asynchronous one without a body": (MessageIllegal, lambda p, t: p.send_async(Message(t, b""))),
    "an asynchronous one to no queue": (QueueNotExist, lambda p, t: p.send_async(Message(t, b"x"), queue_id=9)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_sent_is_refused_with_nothing_stored(
    what: str, broker: Broker, producer: Producer, topic: str
) -> None:
    expected, send = REFUSED[what]
    with pytest.raises(expected) as refused:
        send(producer, topic)
    assert refused.type is expected
    assert all(
        queue["next_offset"] == 0 for known in broker.topics() if known["name"] == topic for queue in known["queues"]
    )
    assert producer.send(Message(topic, b"good")).status is SendStatus.SEND_OK
    assert bodies_of(broker, topic) == [b"good"]


def test_a_topic_is_never_created_under_an_illegal_name(tmp_path: Path) -> None:
    with running(tmp_path / "broker", **QUICK) as broker, broker.producer("test") as producer:
        for name in ("", "a b", "a/b", "x" * 128, "ü"):
            with pytest.raises(NameIllegal):
                producer.send(Message(name, b"x"))
        assert broker.topics() == []


@pytest.mark.parametrize("group", ["", "a b", "x" * 256])
def test_a_producer_group_has_a_legal_name(group: str, broker: Broker) -> None:
    with pytest.raises(NameIllegal):
        broker.producer(group)


def test_a_topic_without_the_write_permission_takes_nothing_until_it_has_it(
    broker: Broker, producer: Producer, topic: str
) -> None:
    producer.send(Message(topic, b"before"))
    broker.alter_topic(topic, permission=4)
    with pytest.raises(NoPermission):
        producer.send(Message(topic, b"never"))
    with pytest.raises(NoPermission):
        producer.send_batch([Message(topic, b"never")])
    broker.alter_topic(topic, permission=6)
    producer.send(Message(topic, b"after"))
    assert bodies_of(broker, topic) == [b"before", b"after"]


def test_a_deleted_topic_is_no_more_even_to_a_producer_that_knew_it(
    broker: Broker, producer: Producer, topic: str
) -> None:
    producer.send(Message(topic, b"x"))
    broker.delete_topic(topic)
    with pytest.raises(TopicNotExist):
        producer.send(Message(topic, b"y"))
    broker.create_topic(topic, queues=2)
    result = producer.send(Message(topic, b"z"))
    assert (result.queue_offset, bodies_of(broker, topic)) == (0, [b"z"])


def test_a_closed_producer_sends_nothing(broker: Broker, topic: str) -> None:
    producer = broker.producer("test")
    producer.close()
    producer.close()
    for send in (producer.send, producer.send_oneway, producer.send_async):
        with pytest.raises(BrokerClosed):
            send(Message(topic, b"x"))
    with pytest.raises(BrokerClosed):
        producer.send_batch([Message(topic, b"x")])
    assert bodies_of(broker, topic) == []


# ---- which queue -----------------------------------------------------------------------------------------------------


def test_queues_take_turns(producer: Producer, topic: str) -> None:
    chosen = [producer.send(Message(topic, b"x")).queue_id for _ in range(8)]
    assert chosen[:4] == chosen[4:]
    assert sorted(chosen[:4]) == [0, 1, 2, 3]
    assert all((one + 1) % 4 == two for one, two in itertools.pairwise(chosen))


def test_a_queue_added_to_the_topic_takes_its_turn(broker: Broker, producer: Producer, topic: str) -> None:
    producer.send(Message(topic, b"x"))
    broker.alter_topic(topic, queues=6)
    assert {producer.send(Message(topic, b"x")).queue_id for _ in range(6)} == set(range(6))


def test_a_queue_is_chosen_by_number(broker: Broker, producer: Producer, topic: str) -> None:
    for number in (3, 3, 0):
        assert producer.send(Message(topic, b"x"), queue_id=number).queue_id == number
    assert producer.send_batch([Message(topic, b"y")] * 2, queue_id=2).queue_id == 2
    producer.send_oneway(Message(topic, b"z"), queue_id=1)
    assert Counter(record.queue_id for record in records_of(broker, topic)) == {3: 2, 0: 1, 2: 2, 1: 1}


def test_a_selector_sees_queues_message_and_argument(producer: Producer, topic: str) -> None:
    seen: list[tuple[list[int], bytes, object]] = []

    def select(queues: Sequence[int], message: Message, argument: Any) -> int:
        seen.append((list(queues), message.body, argument))
        return queues[int(argument) % len(queues)]

    assert producer.send(Message(topic, b"x"), selector=select, argument=7).queue_id == 3
    assert producer.send_batch([Message(topic, b"y")], selector=select, argument=2).queue_id == 2
    assert seen == [([0, 1, 2, 3], b"x", 7), ([0, 1, 2, 3], b"y", 2)]


def test_a_selector_that_raises_raises(broker: Broker, producer: Producer, topic: str) -> None:
    def fail(_queues: Sequence[int], _message: Message, _argument: Any) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        producer.send(Message(topic, b"x"), selector=fail)
    assert bodies_of(broker, topic) == []


def test_a_sharding_key_means_the_same_queue_to_every_producer_and_process(broker: Broker, topic: str) -> None:
    keys = [f"order-{number}" for number in range(40)]
    with broker.producer("one") as one, broker.producer("two") as two:
        chosen = [one.send(Message(topic, b"x"), sharding_key=key).queue_id for key in keys]
        assert [two.send(Message(topic, b"x"), sharding_key=key.encode()).queue_id for key in keys] == chosen
    source = """
        import sys, shmbroker
        producer = shmbroker.open(sys.argv[1]).producer("three")
        send = lambda key: producer.send(shmbroker.Message(sys.argv[2], b"x"), sharding_key=key).queue_id
        print(*[send(key) for key in sys.argv[3:]])
    """
    with Child(source, broker.directory, topic, *keys) as child:
        assert [int(queue) for queue in child.read_line().split()] == chosen
    assert set(chosen) == {0, 1, 2, 3}


# ---- what is stored --------------------------------------------------------------------------------------------------


def test_a_message_is_stored_with_all_that_it_has(broker: Broker, producer: Producer, topic: str) -> None:
    before = time.time()
    message = Message(topic, b"body", tags="paid", keys=["a", "b"], properties={"é": "ü", "empty": ""})
    result = producer.send(message, queue_id=1)
    (record,) = records_of(broker, topic)
    assert (record.body, record.tags, record.keys) == (b"body", "paid", "a b")
    assert record.properties == {"é": "ü", "empty": ""}
    assert (record.position, record.queue_id, record.queue_offset) == (result.position, 1, 0)
    assert (record.message_id, record.position + record.padded) == (result.message_id, result.end_position)
    assert before <= record.born_ns / 1e9 <= time.time()
    assert (result.topic, result.status, result.duplicate) == (topic, SendStatus.SEND_OK, False)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4096, MAX_MESSAGE - 1, MAX_MESSAGE])
def test_bodies_of_any_size_come_back(size: int, broker: Broker, producer: Producer, topic: str) -> None:
    body = bytes(number * 31 % 256 for number in range(size))
    producer.send(Message(topic, body))
    producer.send_batch([Message(topic, body), Message(topic, body)])
    assert bodies_of(broker, topic) == [body] * 3


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_bytes_like_bodies_are_copied(kind: Any, broker: Broker, producer: Producer, topic: str) -> None:
    original = bytearray(b"before")
    message = Message(topic, kind(original))
    original[:] = b"behind"
    producer.send(message)
    assert bodies_of(broker, topic) == [b"before"]


def test_messages_cross_the_ends_of_ring_and_segment_whole(broker: Broker, producer: Producer, topic: str) -> None:
    sent: list[bytes] = []
    crossed, start = 0, broker.region.get("tail")
    while broker.region.get("tail") < start + 2 * SEGMENT:
        body = f"{len(sent)} ".encode() * (len(sent) * 1237 % 9000 + 1)
        result = producer.send(Message(topic, body[:MAX_MESSAGE]))
        sent.append(body[:MAX_MESSAGE])
        crossed += result.position // RING != (result.end_position - 1) // RING
        assert result.position // SEGMENT == (result.end_position - 1) // SEGMENT
        raw = broker.region.read_raw(result.position)
        assert raw is not None
        assert decode_record(raw, result.position).body == sent[-1]
    assert crossed >= 1
    assert bodies_of(broker, topic) == sent


def test_every_message_has_an_id_of_its_own(broker: Broker, topic: str) -> None:
    with broker.producer("one") as one, broker.producer("two") as two:
        results: list[SendResult] = [producer.send(Message(topic, b"x")) for producer in (one, two) for _ in range(5)]
        results += one.send_batch([Message(topic, b"x")] * 5)
    ids = [result.message_id for result in results]
    assert len(set(ids)) == 15
    assert all(len(one) == 32 for one in ids)
    assert sorted(ids) == sorted(record.message_id for record in records_of(broker, topic))


def test_a_oneway_is_stored_and_answers_nothing(broker: Broker, producer: Producer, topic: str) -> None:
    for number in range(10):
        assert producer.send_oneway(Message(topic, b"%d" % number), queue_id=0) is None  # type: ignore[func-returns-value]
    assert bodies_of(broker, topic) == [b"%d" % number for number in range(10)]


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_one_group_in_one_queue_with_a_result_for_each(
    broker: Broker, producer: Producer, topic: str
) -> None:
    results = producer.send_batch((Message(topic, b"%d" % number, tags="t") for number in range(100)), queue_id=3)
    records = records_of(broker, topic)
    assert [record.body for record in records] == [b"%d" % number for number in range(100)]
    assert records[0].group_bytes == sum(record.padded for record in records)
    assert len(results) == 100
    assert [result.position for result in results] == [record.position for record in records]
    assert [result.queue_offset for result in results] == list(range(100))
    assert [result.message_id for result in results] == [record.message_id for record in records]
    assert {result.queue_id for result in results} == {3}
    assert results[-1].message_id == results[99].message_id
    assert [result.queue_offset for result in results[10:20:3]] == [10, 13, 16, 19]
    for index in (100, -101):
        with pytest.raises(IndexError):
            results[index]
    assert results.status is results.confirm() is SendStatus.SEND_OK
    assert results.end_position == records[-1].position + records[-1].padded


def test_the_largest_batch_is_stored_whole(broker: Broker, producer: Producer, topic: str) -> None:
    assert len(producer.send_batch([Message(topic, b"x" * 100)] * 1024)) == 1024
    assert bodies_of(broker, topic) == [b"x" * 100] * 1024


def test_a_batch_that_finds_no_room_leaves_nothing(broker: Broker, producer: Producer, topic: str) -> None:
    with stopped_flusher(broker):
        sent = fill_ring(producer, topic)
        with pytest.raises(BrokerBusy):
            producer.send_batch([Message(topic, b"y" * 10_000)] * 20, timeout=0.05)
        assert count_of(broker, topic) == len(sent)
    assert bodies_of(broker, topic) == sent


# ---- a full ring -----------------------------------------------------------------------------------------------------


def test_a_full_ring_blocks_until_the_timeout_and_stores_nothing(
    broker: Broker, producer: Producer, topic: str
) -> None:
    with stopped_flusher(broker):
        sent = fill_ring(producer, topic)
        assert len(sent) > 10
        start = time.monotonic()
        with pytest.raises(BrokerBusy, match="ring stayed full"):
            producer.send(Message(topic, bytes(40_000)), timeout=0.3)
        assert time.monotonic() - start >= 0.3
        assert count_of(broker, topic) == len(sent)
    assert producer.send(Message(topic, b"after"), timeout=10).status is SendStatus.SEND_OK
    assert bodies_of(broker, topic) == [*sent, b"after"]


def test_a_send_that_waits_for_room_goes_on_when_there_is_some(broker: Broker, producer: Producer, topic: str) -> None:
    results: list[SendResult] = []
    with stopped_flusher(broker):
        sent = fill_ring(producer, topic)
        waiting = threading.Thread(
            target=lambda: results.append(producer.send(Message(topic, b"w" * 40_000), timeout=20))
        )
        waiting.start()
        wait_until(lambda: a_send_waits(broker), "the send waiting for room")
    waiting.join(20)
    assert [result.status for result in results] == [SendStatus.SEND_OK]
    assert bodies_of(broker, topic) == [*sent, b"w" * 40_000]


def test_ctrl_c_ends_a_send_that_waits_for_room(broker: Broker, producer: Producer, topic: str) -> None:
    source = """
        import sys, shmbroker
        producer = shmbroker.open(sys.argv[1]).producer("waits")
        print("ready")
        try:
            producer.send(shmbroker.Message(sys.argv[2], b"never" * 8000), timeout=50)
        except KeyboardInterrupt:
            print("interrupted")
    """
    with stopped_flusher(broker):
        sent = fill_ring(producer, topic)
        with Child(source, broker.directory, topic) as child:
            assert child.read_line() == "ready"
            wait_until(lambda: a_send_waits(broker), "a send waiting")
            os.kill(child.pid, signal.SIGINT)
            assert child.read_line() == "interrupted"
    assert bodies_of(broker, topic) == sent


# ---- durability ------------------------------------------------------------------------------------------------------


def test_what_timed_out_is_confirmed_later_without_a_second_copy(tmp_path: Path) -> None:
    settings = {**QUICK, "flush_disk_type": "SYNC_FLUSH", "sync_flush_timeout": 0.1}
    with running(tmp_path / "broker", **settings) as broker, broker.producer("test") as producer:
        told = Told()
        assert producer.send(Message("created-by-send", b"first")).status is SendStatus.SEND_OK
        with stopped_flusher(broker):
            result = producer.send(Message("created-by-send", b"second"))
            batch = producer.send_batch([Message("created-by-send", b"third")] * 2)
            hasty = producer.send(Message("created-by-send", b"fourth", wait_store_ok=False))
            producer.send_async(Message("created-by-send", b"fifth"), told)
            assert result.status is batch.status is SendStatus.FLUSH_DISK_TIMEOUT
            assert result.confirm(0.05) is SendStatus.FLUSH_DISK_TIMEOUT
            assert hasty.status is SendStatus.SEND_OK  # it asked for no more
            wait_until(lambda: told.outcomes, "the asynchronous send told")
            assert isinstance(told.outcomes[0], SendResult)
            assert told.outcomes[0].status is SendStatus.FLUSH_DISK_TIMEOUT
        assert result.confirm(10) is batch.confirm(10) is batch[1].confirm(10) is SendStatus.SEND_OK
        assert broker.region.get("flushed") >= batch.end_position
        assert bodies_of(broker, "created-by-send") == [b"first", b"second", b"third", b"third", b"fourth", b"fifth"]


# ---- ids and second copies -------------------------------------------------------------------------------------------


def test_a_dedup_key_is_stored_once_whoever_sends_it(broker: Broker, producer: Producer, topic: str) -> None:
    first = producer.send(Message(topic, b"42"), dedup_key="order-42")
    with broker.producer("other") as other:
        again = other.send(Message(topic, b"42"), dedup_key=b"order-42")
    assert (first.duplicate, again.duplicate) == (False, True)
    for name in ("message_id", "position", "end_position", "queue_id", "queue_offset"):
        assert getattr(again, name) == getattr(first, name)
    assert not producer.send(Message(topic, b"43"), dedup_key="order-43").duplicate
    assert bodies_of(broker, topic) == [b"42", b"43"]


def test_a_dedup_key_belongs_to_its_topic(broker: Broker, producer: Producer, topic: str) -> None:
    broker.create_topic(f"{topic}-other", queues=1)
    producer.send(Message(topic, b"x"), dedup_key="k")
    assert not producer.send(Message(f"{topic}-other", b"x"), dedup_key="k").duplicate


def test_a_dedup_key_is_known_after_the_ring_has_passed_it(tmp_path: Path) -> None:
    with running(tmp_path / "broker", **QUICK) as broker, broker.producer("test") as producer:
        first = producer.send(Message("orders", b"42"), dedup_key="order-42")
        while broker.region.get("write_limit") - first.position <= RING:
            producer.send(Message("orders", bytes(MAX_MESSAGE)))
        assert broker.region.read_raw(first.position) is None
        again = producer.send(Message("orders", b"42"), dedup_key="order-42")
        assert (again.duplicate, again.position, again.queue_id) == (True, first.position, first.queue_id)
        assert bodies_of(broker, "orders").count(b"42") == 1


# ---- threads and processes -------------------------------------------------------------------------------------------


def test_threads_share_a_producer(broker: Broker, producer: Producer, topic: str) -> None:
    errors: list[BaseException] = []

    def send(thread: int) -> None:
        try:
            for number in range(150):
                if number % 10:
                    producer.send(Message(topic, b"%d %d" % (thread, number)), sharding_key=str(thread))
                else:
                    batch = [Message(topic, b"%d %d %d" % (thread, number, part)) for part in range(3)]
                    producer.send_batch(batch, sharding_key=str(thread))
        except ShmBrokerError as error:
            errors.append(error)

    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    records = records_of(broker, topic)
    assert len({record.message_id for record in records}) == len(records) == 8 * (135 + 15 * 3)
    for thread_number in range(8):
        mine = [record.body.split()[1:] for record in records if record.body.split()[0] == b"%d" % thread_number]
        assert [[int(part) for part in parts] for parts in mine] == [
            part for n in range(150) for part in ([[n]] if n % 10 else [[n, 0], [n, 1], [n, 2]])
        ]


def test_a_fork_sends_under_an_identity_of_its_own(broker: Broker, topic: str) -> None:
    source = """
        import os, sys, shmbroker
        broker = shmbroker.open(sys.argv[1])
        producer = broker.producer("parent")
        send = lambda body: producer.send(shmbroker.Message(sys.argv[2], body), queue_id=0).message_id
        before = send(b"before")
        client = producer.client
        child = os.fork()
        if child == 0:
            try:
                client.wait_flushed(0, 0)
            except shmbroker.ForkedHandleError:
                print("refused")
            print(send(b"child"))
            producer = broker.producer("child")
            print(send(b"new"), flush=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print(send(b"after"))
        print(before)
    """
    with Child(source, broker.directory, topic) as child:
        assert child.read_line() == "refused"
        in_child, new_in_child, after, before = (child.read_line() for _ in range(4))
    assert before[:16] == after[:16]
    assert in_child[:16] == new_in_child[:16] != before[:16]
    records = records_of(broker, topic)
    assert [record.body for record in records] == [b"before", b"child", b"new", b"after"]
    assert [record.message_id for record in records] == [before, in_child, new_in_child, after]


def test_spawned_processes_send_side_by_side(broker: Broker, topic: str, tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(
        "import multiprocessing, sys, shmbroker\n"
        "def send(number):\n"
        "    with shmbroker.open(sys.argv[1]) as broker, broker.producer('spawned') as producer:\n"
        "        for part in range(50):\n"
        "            producer.send(shmbroker.Message(sys.argv[2], b'%d %d' % (number, part)))\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(2) as pool:\n"
        "        pool.map(send, range(4))\n"
    )
    done = subprocess.run([sys.executable, script, broker.directory, topic], capture_output=True, timeout=50)
    assert done.returncode == 0, done.stderr.decode()
    expected = {b"%d %d" % (number, part) for number in range(4) for part in range(50)}
    bodies = bodies_of(broker, topic)
    assert len(bodies) == 200
    assert set(bodies) == expected


def test_sends_are_counted_for_status(broker: Broker, topic: str) -> None:
    with shmbroker.open(broker.directory) as other, other.producer("counted") as producer:
        producer.send(Message(topic, b"x"))
        producer.send_batch([Message(topic, b"x")] * 9)
        sends = {client["slot"]: client["sends"] for client in broker.region.clients()}
        assert sends[producer.client.slot] == 10
