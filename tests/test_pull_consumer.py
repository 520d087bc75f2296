"""PullConsumer: positions of its own, and commits that are its group's progress like everybody's."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from support.consuming import ALL, asleep, bodies_of, numbered, send
from support.processes import Child, kill_all, stop_broker
from support.running import lose_memory, wait_word
from support.served import SETTINGS, serving
from support.waiting import wait_until
from test_group_reset import instant

import shmbroker
from shmbroker import PullConsumer, ReceivedMessage
from shmbroker.broker import Broker

QUEUE: Final = [("orders", 0)]


def poll(consumer: PullConsumer, count: int) -> list[ReceivedMessage]:
    messages: list[ReceivedMessage] = []
    while len(messages) < count:
        found = consumer.poll(min(32, count - len(messages)), wait=10.0)
        assert found, f"only {len(messages)} of {count} came"
        messages += found
    return messages


def committed(consumer: PullConsumer) -> list[int]:
    return [queue.committed for queue in consumer.queues()]


def rest_of(broker: Broker, group: str = "audit") -> list[bytes]:
    with broker.simple_consumer(group, ALL) as consumer:
        return sorted(bodies_of(consumer.receive(100)), key=int)


# ---- reading and committing ------------------------------------------------------------------------------------


def test_it_reads_its_queues_in_order_and_the_group_has_done_what_was_committed(broker: Broker) -> None:
    send(broker, *numbered(50), queue_id=0)
    send(broker, *numbered(50, 100), queue_id=1)
    send(broker, b"1000", queue_id=2)
    with broker.pull_consumer("audit") as consumer:
        consumer.assign([("orders", 0), ("orders", 1)])
        messages = poll(consumer, 100)
        of_queue = {queue_id: [m.body for m in messages if m.queue_id == queue_id] for queue_id in (0, 1)}
        assert of_queue == {0: numbered(50), 1: numbered(50, 100)}
        assert consumer.poll() == [], "queue 2 is not assigned"
        assert {(m.delivery_attempt, m.group, m.topic) for m in messages} == {(0, "audit", "orders")}
        assert committed(consumer) == [0, 0], "to poll is not to commit"
        consumer.commit()
        assert committed(consumer) == [50, 50]
    assert rest_of(broker) == [b"1000"]


def test_the_next_one_reads_on_from_what_was_committed_and_reads_the_rest_again(broker: Broker) -> None:
    send(broker, *numbered(10))
    with broker.pull_consumer("audit") as first:
        first.assign(QUEUE)
        assert bodies_of(poll(first, 4)) == numbered(4)
        first.commit()
        assert bodies_of(poll(first, 3)) == numbered(3, 4)
    with broker.pull_consumer("audit") as second:
        second.assign(["orders"])
        assert bodies_of(poll(second, 6)) == numbered(6, 4)


def test_seeking_moves_the_position_and_nothing_else(broker: Broker) -> None:
    send(broker, *numbered(10))
    now = instant()
    send(broker, *numbered(10, 10))
    with broker.pull_consumer("audit") as consumer:
        consumer.assign(QUEUE)
        consumer.seek("orders", 0, 15)
        assert bodies_of(poll(consumer, 5)) == numbered(5, 15)
        consumer.seek_to_time(now)
        assert bodies_of(consumer.poll(3)) == numbered(3, 10)
        consumer.seek_to_begin("orders")
        assert bodies_of(consumer.poll(3)) == numbered(3)
        consumer.seek_to_end()
        assert consumer.poll() == []
        send(broker, b"20")
        assert bodies_of(consumer.poll()) == [b"20"]
        assert committed(consumer) == [0]
        consumer.seek("orders", 0, 12)
        consumer.commit()
        consumer.seek("orders", 0, 3)
        consumer.commit()
        assert committed(consumer) == [12], "progress never goes back"
        assert bodies_of(consumer.poll(1)) == [b"3"]


def test_committing_far_ahead_passes_over_more_than_any_window_holds(broker: Broker) -> None:
    send(broker, *numbered(3000))
    with broker.pull_consumer("audit") as consumer:
        consumer.assign(QUEUE)
        consumer.seek("orders", 0, 2990)
        consumer.commit()
        assert committed(consumer) == [2990]
        assert bodies_of(poll(consumer, 10)) == numbered(10, 2990)


def test_what_a_member_has_in_hand_stays_its_own(broker: Broker) -> None:
    send(broker, *numbered(10))
    with broker.simple_consumer("audit", ALL) as member, broker.pull_consumer("audit") as consumer:
        held = member.receive(2)
        consumer.assign(QUEUE)
        assert bodies_of(poll(consumer, 10)) == numbered(10)
        consumer.commit()
        assert committed(consumer) == [0], "the oldest is in somebody's hands"
        assert member.receive(10) == []
        member.ack(held)
        assert committed(consumer) == [10]


def test_queues_that_stay_assigned_keep_their_position(broker: Broker) -> None:
    send(broker, *numbered(5), queue_id=0)
    send(broker, *numbered(5, 10), queue_id=1)
    with broker.pull_consumer("audit") as consumer:
        consumer.assign(QUEUE)
        poll(consumer, 3)
        consumer.assign(["orders"])
        assert sorted(bodies_of(poll(consumer, 7)), key=int) == numbered(2, 3) + numbered(5, 10)
        consumer.assign([("orders", 1)])
        assert [(queue.queue_id, queue.position) for queue in consumer.queues()] == [(1, 5)]


def test_it_reads_only_what_its_expression_wants(broker: Broker) -> None:
    send(broker, b"1", tags="paid")
    send(broker, b"2", tags="refunded")
    send(broker, b"3", tags="paid")
    with broker.pull_consumer("audit") as consumer:
        consumer.assign(QUEUE, "paid")
        assert bodies_of(consumer.poll()) == [b"1", b"3"]
        consumer.commit()
        assert committed(consumer) == [3]
        consumer.seek_to_begin()
        consumer.assign(QUEUE, shmbroker.sql("TAGS = 'refunded'"))
        assert bodies_of(consumer.poll()) == [b"2"]


def test_a_new_group_begins_where_it_is_told(broker: Broker) -> None:
    send(broker, *numbered(5))
    now = instant()
    send(broker, b"5")
    for group, consume_from, expected in (("a", "first", 6), ("b", "last", 0), ("c", now, 1)):
        with broker.pull_consumer(group, consume_from=consume_from) as consumer:
            consumer.assign(QUEUE)
            assert bodies_of(consumer.poll()) == numbered(expected, 6 - expected)


# ---- waiting ---------------------------------------------------------------------------------------------------


def test_each_one_that_waits_is_woken_by_a_message_of_its_queue(broker: Broker) -> None:
    broker.create_topic("orders", 2)
    found: dict[int, list[bytes]] = {}
    consumers = {queue_id: broker.pull_consumer("audit") for queue_id in (0, 1)}

    def wait(queue_id: int) -> None:
        found[queue_id] = bodies_of(consumers[queue_id].poll(wait=20.0))

    threads = [threading.Thread(target=wait, args=(queue_id,)) for queue_id in consumers]
    for queue_id, consumer in consumers.items():
        consumer.assign([("orders", queue_id)])
    for thread in threads:
        thread.start()
    wait_until(lambda: len([w for w in broker.region.waiters() if w["kind"] == "message"]) == 2, "both waiting")
    send(broker, b"for 1", queue_id=1)
    threads[1].join(10.0)
    send(broker, b"for 0", queue_id=0)
    threads[0].join(10.0)
    assert found == {0: [b"for 0"], 1: [b"for 1"]}


def test_closing_ends_a_wait(broker: Broker) -> None:
    consumer = broker.pull_consumer("audit")
    consumer.assign(["orders"])
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            consumer.poll(wait=20.0)
        except shmbroker.BrokerClosed as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: asleep(broker), "it waits")
    consumer.close()
    thread.join(10.0)
    assert len(raised) == 1
    with pytest.raises(shmbroker.BrokerClosed):
        consumer.poll()


# ---- what happens to its group ---------------------------------------------------------------------------------


def test_a_paused_group_gets_nothing_and_a_reset_one_is_read_from_the_new_place(broker: Broker) -> None:
    send(broker, *numbered(10))
    with broker.pull_consumer("audit") as consumer:
        consumer.assign(QUEUE)
        poll(consumer, 10)
        consumer.commit()
        broker.pause_group("audit")
        broker.reset_group("audit", to_offset=7, topic="orders", queue_id=0)
        assert consumer.poll(wait=0.05) == []
        broker.resume_group("audit")
        assert bodies_of(consumer.poll()) == numbered(3, 7)
        broker.delete_group("audit")
        with pytest.raises(shmbroker.GroupNotExist):
            consumer.poll()


def test_nonsense_is_refused(broker: Broker) -> None:
    send(broker, *numbered(3))
    with broker.pull_consumer("audit") as consumer:
        with pytest.raises(shmbroker.BadRequest, match="assign some first"):
            consumer.poll()
        refused: list[tuple[Callable[..., Any], tuple[Any, ...], type[Exception], str]] = [
            (consumer.assign, ("orders",), shmbroker.BadRequest, "a list of topics"),
            (consumer.assign, ([],), shmbroker.BadRequest, "at least one"),
            (consumer.assign, ([("orders", 4)],), shmbroker.QueueNotExist, "4 queues"),
            (consumer.assign, ([("orders", -1)],), shmbroker.QueueNotExist, "-1"),
            (consumer.assign, (["no topic"],), shmbroker.NameIllegal, "no topic"),
        ]
        for call, arguments, error, text in refused:
            with pytest.raises(error, match=text):
                call(*arguments)
        consumer.assign(QUEUE)
        refused = [
            (consumer.seek, ("orders", 0, 4), shmbroker.BadRequest, "from offset 0 on, the next will be 3"),
            (consumer.seek, ("orders", 0, -1), shmbroker.BadRequest, "-1"),
            (consumer.seek, ("orders", "0", 1), shmbroker.BadRequest, "queue_id = '0': must be an int, not str"),
            (consumer.seek, (0, 0, 1), shmbroker.BadRequest, "topic = 0: must be a str, not int"),
            (consumer.seek, ("orders", 0, "1"), shmbroker.BadRequest, "offset = '1': must be an int, not str"),
            (consumer.seek, ("orders", 1, 0), shmbroker.BadRequest, "not assigned"),
            (consumer.seek_to_end, ("refunds",), shmbroker.BadRequest, "not assigned"),
            (consumer.seek_to_time, (2.0**40,), shmbroker.BadRequest, "1970"),
            (consumer.poll, (0,), shmbroker.BadRequest, "1 to 1024"),
            (consumer.poll, (1, -1.0), shmbroker.BadRequest, "negative"),
        ]
        for call, arguments, error, text in refused:
            with pytest.raises(error, match=text):
                call(*arguments)
    with pytest.raises(shmbroker.BadRequest, match="consume_from"):
        broker.pull_consumer("audit", consume_from="never")


def test_a_message_that_was_polled_cannot_be_acknowledged_by_a_member(broker: Broker) -> None:
    send(broker, b"0")
    with broker.pull_consumer("audit") as consumer, broker.simple_consumer("audit", ALL) as member:
        consumer.assign(QUEUE)
        (message,) = consumer.poll()
        with pytest.raises(shmbroker.ReceiptExpired):
            member.ack(message)
        assert bodies_of(member.receive()) == [b"0"]


# ---- lagging, dying, restarting --------------------------------------------------------------------------------


def test_one_that_lags_behind_the_ring_reads_the_files(broker: Broker) -> None:
    bodies = [b"%d " % i + b"x" * 20_000 for i in range(150)]
    for start in range(0, 150, 10):
        send(broker, *bodies[start : start + 10])
    wait_word(broker, "dispatched", broker.region.get("tail"))
    with broker.pull_consumer("audit") as consumer:
        consumer.assign(QUEUE)
        assert bodies_of(poll(consumer, 150)) == bodies


PULLER: Final = """
    import sys, shmbroker
    consumer = shmbroker.open(sys.argv[1]).pull_consumer("audit")
    consumer.assign([("orders", 0)])
    print(*(message.body.decode() for message in consumer.poll(5)))
    consumer.commit(durable=sys.argv[2] == "durable")
    print(*(message.body.decode() for message in consumer.poll(5)))
    sys.stdin.read()
"""


@pytest.mark.crash
@pytest.mark.parametrize(
    ("end", "how"),
    [(None, "memory"), (stop_broker, "memory"), (kill_all, "memory"), (lose_memory, "durable")],
    ids=["its-process", "clean-stop", "with-memory", "without-memory"],
)
def test_what_was_committed_outlives_whoever_dies(
    directory: Path, end: Callable[[Path], None] | None, how: str
) -> None:
    directory.mkdir()
    (directory / "broker.toml").write_text(SETTINGS)
    with serving(directory), shmbroker.open(directory) as broker:
        send(broker, *numbered(20))
        with Child(PULLER, directory, how) as child:
            assert [child.read_line().split(), child.read_line().split()] == [
                [str(i) for i in range(5)], [str(i) for i in range(5, 10)],
            ]  # fmt: skip
            child.kill()
        if end is None:
            assert rest_of(broker) == numbered(15, 5)
            return
        end(directory)
    with serving(directory), shmbroker.open(directory) as broker:
        assert rest_of(broker) == numbered(15, 5)


@pytest.mark.crash
def test_it_reads_on_with_the_next_life_of_the_broker(directory: Path) -> None:
    directory.mkdir()
    (directory / "broker.toml").write_text(SETTINGS)
    with serving(directory):
        broker = shmbroker.open(directory)
        consumer = broker.pull_consumer("audit")
        consumer.assign(QUEUE)
        send(broker, *numbered(10))
        poll(consumer, 6)
        stop_broker(directory)
    with serving(directory):
        assert bodies_of(poll(consumer, 4)) == numbered(4, 6), "what was polled is not read again by the same consumer"
        consumer.commit()
        assert committed(consumer) == [10]
        broker.close()


def test_a_forked_child_is_told_to_make_its_own(broker: Broker) -> None:
    send(broker, b"0")
    with broker.pull_consumer("audit") as consumer:
        consumer.assign(QUEUE)
        pid = os.fork()
        if pid == 0:
            try:
                consumer.poll()
            except shmbroker.ForkedHandleError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert bodies_of(consumer.poll()) == [b"0"]
