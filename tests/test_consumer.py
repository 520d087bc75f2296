"""SimpleConsumer against a real broker: who gets which message, when it comes again, and what is refused."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from random import Random

import pytest
from support.processes import SMALL, Child, kill_all
from support.waiting import wait_until

import shmbroker
from shmbroker import Message, ReceivedMessage, SimpleConsumer
from shmbroker._native._core import decode_record, encode_record
from shmbroker.broker import Broker
from shmbroker.consumer import format_subscription, parse_tags
from shmbroker.record import RecordKind

WINDOW = int(str(SMALL["claim_window"]))
OVERFLOW = int(str(SMALL["overflow_claims"]))
ALL = {"orders": "*"}

CONSUMER = """
    import sys, shmbroker
    broker = shmbroker.open(sys.argv[1])
    consumer = broker.simple_consumer("audit", {"orders": "*"})
    print("ready")
    for line in sys.stdin:
        command, count = line.split()
        messages = consumer.receive(int(count), wait=10.0)
        if command == "ack":
            consumer.ack(messages)
        print(*(message.body.decode() for message in messages))
"""


def send(broker: Broker, *bodies: bytes, tags: str | None = None, queue_id: int | None = 0) -> None:
    with broker.producer("test") as producer:
        for start in range(0, len(bodies), 100):
            batch = [Message("orders", body, tags=tags) for body in bodies[start : start + 100]]
            producer.send_batch(batch, queue_id=queue_id)


def numbered(count: int, first: int = 0) -> list[bytes]:
    return [b"%d" % i for i in range(first, first + count)]


def drain(consumer: SimpleConsumer, count: int, *, batch: int = 32) -> list[bytes]:
    """Receive and acknowledge until there were ``count``."""
    bodies: list[bytes] = []
    while len(bodies) < count:
        messages = consumer.receive(min(batch, count - len(bodies)), wait=10.0)
        assert messages, f"only {len(bodies)} of {count} came"
        bodies += [message.body for message in messages]
        consumer.ack(messages)
    return bodies


def asleep(broker: Broker) -> bool:
    """Whether some consumer sleeps."""
    return any(waiter["kind"] == "message" and waiter["state"] == "waiting" for waiter in broker.region.waiters())


def bodies_of(messages: list[ReceivedMessage]) -> list[bytes]:
    return [message.body for message in messages]


# ---- one consumer ----------------------------------------------------------------------------------------------


def test_a_message_arrives_with_all_that_was_sent(broker: Broker) -> None:
    before = time.time()
    with broker.producer("test") as producer:
        sent = producer.send(
            Message("orders", b"\0body\xff", tags="paid", keys=["k-1", "k-2"], properties={"colour": "blå"})
        )
    with broker.simple_consumer("audit", ALL) as consumer:
        (message,) = consumer.receive(wait=5.0)
        assert (message.topic, message.group) == ("orders", "audit")
        assert (message.queue_id, message.queue_offset) == (sent.queue_id, sent.queue_offset)
        assert (message.position, message.message_id) == (sent.position, sent.message_id)
        assert (message.tags, message.keys, message.properties) == ("paid", "k-1 k-2", {"colour": "blå"})
        assert (message.body, message.delivery_attempt) == (b"\0body\xff", 1)
        assert before <= message.born_timestamp <= time.time()


def test_the_messages_of_a_queue_come_once_each_and_in_order(broker: Broker) -> None:
    send(broker, *numbered(500))
    with broker.simple_consumer("audit", ALL) as consumer:
        assert drain(consumer, 500) == numbered(500)
        assert consumer.receive(100) == []


def test_every_queue_has_its_turn(broker: Broker) -> None:
    broker.create_topic("orders", queues=4)
    for queue in range(4):
        send(broker, *numbered(20), queue_id=queue)
    with broker.simple_consumer("audit", ALL) as consumer:
        assert {consumer.receive()[0].queue_id for _ in range(4)} == {0, 1, 2, 3}


def test_queues_added_later_are_received_from(broker: Broker) -> None:
    broker.create_topic("orders", queues=1)
    with broker.simple_consumer("audit", ALL) as consumer:
        assert consumer.receive() == []
        broker.alter_topic("orders", queues=3)
        send(broker, b"new", queue_id=2)
        assert bodies_of(consumer.receive(wait=5.0)) == [b"new"]


def test_a_new_group_begins_at_the_first_message_or_behind_the_last_as_asked(broker: Broker) -> None:
    broker.create_topic("orders", queues=1)
    send(broker, *numbered(5))
    with (
        broker.simple_consumer("all", ALL) as first,
        broker.simple_consumer("news", ALL, consume_from="last") as last,
    ):
        send(broker, b"later")
        assert bodies_of(first.receive(100)) == [*numbered(5), b"later"]
        assert bodies_of(last.receive(100)) == [b"later"]


@pytest.mark.parametrize("spin", [False, True])
def test_a_waiting_consumer_is_woken_by_a_send(broker: Broker, spin: bool) -> None:
    broker.create_topic("orders", queues=1)
    with broker.simple_consumer("audit", ALL, spin=spin) as consumer:
        found: list[tuple[list[bytes], float]] = []

        def wait() -> None:
            bodies = bodies_of(consumer.receive(wait=20.0))
            found.append((bodies, time.monotonic()))

        thread = threading.Thread(target=wait)
        thread.start()
        if not spin:
            wait_until(lambda: asleep(broker), "the consumer asleep")
        sent = time.monotonic()
        send(broker, b"wake up")
        thread.join(10.0)
        assert found[0][0] == [b"wake up"]
        assert found[0][1] - sent < 1.0


def test_receive_waits_as_long_as_it_was_told_and_no_longer(broker: Broker) -> None:
    with broker.simple_consumer("audit", ALL) as consumer:
        begun = time.monotonic()
        assert consumer.receive(wait=0.25) == []
        assert 0.25 <= time.monotonic() - begun < 1.0


def test_ctrl_c_ends_a_long_wait(directory: Path) -> None:
    source = """
        import sys, shmbroker
        with shmbroker.open(sys.argv[1]) as broker, broker.simple_consumer("audit", {"orders": "*"}) as consumer:
            try:
                consumer.receive(wait=600.0)
            except KeyboardInterrupt:
                print("interrupted")
    """
    with shmbroker.open(directory, **SMALL) as broker, Child(source, directory) as child:
        wait_until(lambda: asleep(broker), "the consumer asleep")
        os.kill(child.pid, signal.SIGINT)
        assert child.read_line() == "interrupted"
        assert child.wait() == 0


# ---- delivered again -------------------------------------------------------------------------------------------


def test_what_is_not_acknowledged_comes_again_when_its_time_is_over_and_not_before(broker: Broker) -> None:
    send(broker, b"slow")
    with broker.simple_consumer("audit", ALL) as consumer:
        begun = time.monotonic()
        (first,) = consumer.receive(invisible=0.4)
        (again,) = consumer.receive(wait=10.0)
        assert 0.4 <= time.monotonic() - begun < 0.7
        assert (again.body, again.delivery_attempt, first.delivery_attempt) == (b"slow", 2, 1)
        consumer.ack(again)
        assert consumer.receive(wait=0.5) == []


def test_a_late_ack_is_refused_by_name_and_the_others_stand(broker: Broker) -> None:
    send(broker, *numbered(3))
    with broker.simple_consumer("audit", ALL) as consumer:
        late, *_ = consumer.receive(1, invisible=0.05)
        others = consumer.receive(2)
        (again,) = consumer.receive(wait=10.0)
        assert again.queue_offset == late.queue_offset
        with pytest.raises(shmbroker.ReceiptExpired, match=r"orders\[0\] offset 0") as refused:
            consumer.ack([late, *others])
        assert refused.value.messages == [late]
        consumer.ack(again)
        assert [table["base"] for table in broker.region.progress() if table["queue_id"] == 0] == [3]


def test_the_invisible_time_can_be_made_longer_or_end_at_once(broker: Broker) -> None:
    send(broker, b"work")
    with broker.simple_consumer("audit", ALL) as consumer:
        (message,) = consumer.receive(invisible=0.1)
        consumer.change_invisible_duration(message, 30.0)
        assert consumer.receive(wait=0.3) == []
        consumer.change_invisible_duration(message, 0.0)
        (again,) = consumer.receive()
        assert again.delivery_attempt == 2
        with pytest.raises(shmbroker.ReceiptExpired):
            consumer.ack(message)
        consumer.ack(again)


def test_giving_a_message_back_wakes_a_waiting_member(broker: Broker) -> None:
    send(broker, b"work")
    with broker.simple_consumer("audit", ALL) as consumer, broker.simple_consumer("audit", ALL) as other:
        (message,) = consumer.receive(invisible=60.0)
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.extend(bodies_of(other.receive(wait=20.0))))
        thread.start()
        wait_until(lambda: asleep(broker), "the other asleep")
        consumer.change_invisible_duration(message, 0.0)
        thread.join(10.0)
        assert found == [b"work"]


# ---- several consumers -----------------------------------------------------------------------------------------


def test_two_processes_never_get_the_same_message(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker:
        send(broker, *numbered(2000))
        with Child(CONSUMER, directory) as first, Child(CONSUMER, directory) as second:
            children = (first, second)
            assert [child.read_line() for child in children] == ["ready", "ready"]
            got: dict[Child, list[int]] = {first: [], second: []}
            while sum(map(len, got.values())) < 2000:
                for child in children:
                    child.write_line("ack 20")
                for child in children:
                    if sum(map(len, got.values())) < 2000:
                        got[child] += [int(word) for word in child.read_line().split()]
        everything = got[first] + got[second]
        assert sorted(everything) == list(range(2000))
        assert min(len(got[first]), len(got[second])) > 100


def test_a_killed_consumer_gives_exactly_what_it_had_not_acknowledged_to_the_others(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker:
        send(broker, *numbered(30))
        with Child(CONSUMER, directory) as victim:
            assert victim.read_line() == "ready"
            victim.write_line("ack 10")
            assert victim.read_line().split() == [str(i) for i in range(10)]
            victim.write_line("hold 5")
            assert victim.read_line().split() == [str(i) for i in range(10, 15)]
            with broker.simple_consumer("audit", ALL) as consumer:
                fresh = consumer.receive(100)
                assert bodies_of(fresh) == numbered(15, 15)
                victim.kill()
                died = time.monotonic()
                again = consumer.receive(100, wait=10.0)
                assert time.monotonic() - died < 0.5
                while len(again) < 5:  # the janitor gives them back one by one
                    again += consumer.receive(100, wait=10.0)
                assert bodies_of(again) == numbered(5, 10)
                assert {message.delivery_attempt for message in again} == {2}
                assert {message.delivery_attempt for message in fresh} == {1}
                consumer.ack(fresh + again)
                assert consumer.receive(100) == []


def test_members_of_a_group_subscribe_alike(broker: Broker) -> None:
    with broker.simple_consumer("audit", {"orders": "paid || refunded"}):
        with broker.simple_consumer("audit", {"orders": "refunded||paid"}):
            pass
        with pytest.raises(shmbroker.SubscriptionConflict, match=r'"paid \|\| refunded".*"orders":"\*"'):
            broker.simple_consumer("audit", ALL)
        with broker.simple_consumer("another", ALL):
            pass
    with broker.simple_consumer("audit", ALL):  # no member is left that could mind
        pass


def test_a_killed_member_no_longer_binds_the_group(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker:
        with Child(CONSUMER, directory) as member:
            assert member.read_line() == "ready"
            with pytest.raises(shmbroker.SubscriptionConflict):
                broker.simple_consumer("audit", {"orders": "paid"})
        broker.simple_consumer("audit", {"orders": "paid"}).close()


# ---- filters ---------------------------------------------------------------------------------------------------


def test_only_messages_with_a_subscribed_tag_are_delivered(broker: Broker) -> None:
    for i in range(300):
        send(broker, b"%d" % i, tags=("paid", "open", "refunded")[i % 3])
    send(broker, b"untagged")
    with broker.simple_consumer("audit", {"orders": "paid || refunded"}) as consumer:
        assert drain(consumer, 200) == [b"%d" % i for i in range(300) if i % 3 != 1]
        assert consumer.receive(100) == []
    (table,) = [table for table in broker.region.progress() if table["queue_id"] == 0]
    assert (table["base"], table["delivered"]) == (301, 200)


def test_tags_with_the_same_hash_are_told_apart(broker: Broker) -> None:
    random, seen = Random(20261121), dict[int, str]()
    while True:  # two of a hundred thousand random tags have the same 32 bits
        alike = f"{random.getrandbits(64):016x}"
        raw = encode_record(position=0, epoch=1, flushed=0, kind=RecordKind.MESSAGE, body=b"", tags=alike)
        wanted = seen.setdefault(decode_record(raw).tag_hash, alike)
        if wanted != alike:
            break
    send(broker, b"alike", tags=alike)
    send(broker, b"wanted", tags=wanted)
    with broker.simple_consumer("audit", {"orders": wanted}) as consumer:
        assert drain(consumer, 1) == [b"wanted"]
        assert consumer.receive(10) == []


@pytest.mark.parametrize(
    ("expression", "tags"), [("*", None), ("", None), ("a", ("a",)), ("b || a", ("a", "b")), (" a||a ", ("a",))]
)
def test_tag_expressions(expression: str, tags: tuple[str, ...] | None) -> None:
    assert parse_tags(expression) == tags


@pytest.mark.parametrize("expression", ["a ||", "a || *", "a | b", "|| a"])
def test_what_is_no_tag_expression_is_refused(expression: str) -> None:
    with pytest.raises(shmbroker.BadRequest, match="tag expression"):
        parse_tags(expression)


def test_a_subscription_too_long_to_compare_is_refused() -> None:
    with pytest.raises(shmbroker.BadRequest, match="at most 511"):
        format_subscription({"t" * 100 + str(i): None for i in range(5)})


# ---- windows and files -----------------------------------------------------------------------------------------


def test_a_message_held_for_long_does_not_stop_its_queue(broker: Broker) -> None:
    broker.create_topic("orders", queues=1)
    send(broker, *numbered(10 * WINDOW))
    with broker.simple_consumer("audit", ALL) as consumer:
        held = consumer.receive(3)
        assert drain(consumer, 10 * WINDOW - 3) == numbered(10 * WINDOW - 3, 3)
        (table,) = broker.region.progress()
        assert table["overflow"] == [0, 1, 2]
        consumer.ack(held)
        (table,) = broker.region.progress()
        assert (table["base"], table["overflow"]) == (10 * WINDOW, [])


def test_when_a_group_holds_more_than_there_is_room_for_receive_rests_and_progress_names_the_holder(
    broker: Broker,
) -> None:
    broker.create_topic("orders", queues=1)
    send(broker, *numbered(2 * (WINDOW + OVERFLOW)))
    with broker.simple_consumer("audit", ALL) as consumer:
        held: list[ReceivedMessage] = []
        while messages := consumer.receive(50):
            held += messages
        assert bodies_of(held) == numbered(WINDOW + OVERFLOW)
        (table,) = broker.region.progress()
        assert (table["held"], table["oldest_held"]) == (WINDOW + OVERFLOW, 0)
        assert table["oldest_holder"] == broker.attach().slot
        assert table["refused"] > 0
        consumer.ack(held)
        assert drain(consumer, WINDOW + OVERFLOW) == numbered(WINDOW + OVERFLOW, WINDOW + OVERFLOW)


def test_a_consumer_that_lags_behind_the_ring_reads_the_files(broker: Broker) -> None:
    """Four times the ring: the index and the ring have long passed the first messages."""
    broker.create_topic("orders", queues=2)
    count = 4 * int(broker.region.ring_bytes) // 1024
    bodies = [b"%d:" % i + b"x" * 900 for i in range(count)]
    with broker.producer("test") as producer:
        for i, body in enumerate(bodies):
            producer.send(Message("orders", body), timeout=30.0, queue_id=i % 2)
    with broker.simple_consumer("audit", ALL) as consumer:
        got: dict[int, list[bytes]] = {0: [], 1: []}
        while sum(map(len, got.values())) < count:
            messages = consumer.receive(50, wait=10.0)
            assert messages
            for message in messages:
                got[message.queue_id].append(message.body)
            consumer.ack(messages)
        assert got[0] == bodies[::2]
        assert got[1] == bodies[1::2]
        assert consumer.lost == 0


def test_a_lagging_consumer_filters_too(broker: Broker) -> None:
    broker.create_topic("orders", queues=1)
    count = 2 * int(broker.region.ring_bytes) // 1024
    with broker.producer("test") as producer:
        for i in range(count):
            tags = "odd" if i % 2 else "even"
            producer.send(Message("orders", b"%d:" % i + b"x" * 900, tags=tags), timeout=30.0)
    with broker.simple_consumer("audit", {"orders": "odd"}) as consumer:
        got = [int(body.split(b":")[0]) for body in drain(consumer, count // 2)]
        assert got == list(range(1, count, 2))
        assert consumer.receive(10) == []


# ---- restarts --------------------------------------------------------------------------------------------------


def test_progress_survives_a_clean_restart(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker:
        broker.create_topic("orders", queues=1)
        send(broker, *numbered(20))
        with broker.simple_consumer("audit", ALL) as consumer:
            messages = consumer.receive(10)
            consumer.ack(messages[:3] + messages[5:7])
    with shmbroker.open(directory, **SMALL) as broker, broker.simple_consumer("audit", ALL) as consumer:
        messages = consumer.receive(100)
        assert [int(body) for body in bodies_of(messages)] == [3, 4, 7, 8, 9, *range(10, 20)]
        assert [message.delivery_attempt for message in messages] == [2] * 5 + [1] * 10


def test_progress_survives_the_death_of_every_process_of_the_broker(directory: Path) -> None:
    """The memory stays: not even the last millisecond of acknowledgements is lost."""
    source = """
        import sys, shmbroker
        from shmbroker import Message
        broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
        broker.create_topic("orders", queues=1)
        broker.producer("test").send_batch([Message("orders", b"%d" % i) for i in range(20)])
        consumer = broker.simple_consumer("audit", {"orders": "*"})
        consumer.ack(consumer.receive(10))
        print(len(consumer.receive(3)))
        sys.stdin.read()
    """
    with Child(source, directory, SMALL) as child:
        assert child.read_line() == "3"
        kill_all(directory)
    with shmbroker.open(directory, **SMALL) as broker, broker.simple_consumer("audit", ALL) as consumer:
        messages = [message for _ in range(10) for message in consumer.receive(1, wait=10.0)]
        assert sorted(int(body) for body in bodies_of(messages)) == list(range(10, 20))
        assert {m.queue_offset: m.delivery_attempt for m in messages} == {i: 1 + (i < 13) for i in range(10, 20)}


# ---- refused ---------------------------------------------------------------------------------------------------


def test_after_a_fork_consumer_and_messages_are_the_parents(broker: Broker) -> None:
    send(broker, b"mine")
    with broker.simple_consumer("audit", ALL) as consumer:
        (message,) = consumer.receive()
        pid = os.fork()
        if pid == 0:
            refused = 0
            for use in (lambda: message.body, lambda: consumer.ack(message), consumer.receive):
                try:
                    use()
                except shmbroker.ForkedHandleError:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        consumer.ack(message)


def test_nonsense_is_refused(broker: Broker) -> None:
    with broker.simple_consumer("audit", ALL) as consumer:
        for bad in (
            {"max_messages": 0},
            {"wait": -1.0},
            {"wait": float("nan")},
            {"invisible": 0.0},
            {"invisible": 43201.0},
        ):
            with pytest.raises(shmbroker.BadRequest):
                consumer.receive(**bad)
        with pytest.raises(TypeError):
            consumer.ack([b"no message"])  # type: ignore[list-item]
    with pytest.raises(shmbroker.BadRequest, match="at least one topic"):
        broker.simple_consumer("audit", {})
    with pytest.raises(shmbroker.BadRequest, match="consume_from"):
        broker.simple_consumer("audit", ALL, consume_from="yesterday")
    with pytest.raises(shmbroker.NameIllegal):
        broker.simple_consumer("audit", {"no topic": "*"})


def test_a_topic_without_the_read_permission_is_not_consumed(broker: Broker) -> None:
    broker.create_topic("orders", queues=1, permission=2)
    with pytest.raises(shmbroker.NoPermission):
        broker.simple_consumer("audit", ALL)


def test_a_closed_consumer_says_so(broker: Broker) -> None:
    send(broker, b"left")
    consumer = broker.simple_consumer("audit", ALL)
    (message,) = consumer.receive()
    consumer.close()
    consumer.close()
    for use in (consumer.receive, lambda: consumer.ack(message)):
        with pytest.raises(shmbroker.BrokerClosed, match="closed"):
            use()


def test_a_deleted_topic_takes_its_receipts_with_it(broker: Broker) -> None:
    send(broker, b"gone")
    with broker.simple_consumer("audit", ALL) as consumer:
        (message,) = consumer.receive()
        broker.delete_topic("orders")
        with pytest.raises(shmbroker.ReceiptExpired):
            consumer.ack(message)
        assert consumer.receive() == []
