"""Consumers of one group: who gets which message, when it comes again, what outlives whom."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from support.consuming import ALL, CONSUMER, asleep, bodies_of, drain, numbered, send
from support.processes import SMALL, Child, kill_all
from support.waiting import DEADLINE, assert_in_time, wait_until

import shmbroker
from shmbroker import Message, ReceivedMessage
from shmbroker.broker import Broker

WINDOW = int(str(SMALL["claim_window"]))
OVERFLOW = int(str(SMALL["overflow_claims"]))


# ---- delivered again -------------------------------------------------------------------------------------------


def test_what_is_not_acknowledged_comes_again_when_its_time_is_over_and_not_before(broker: Broker) -> None:
    with broker.simple_consumer("audit", ALL) as consumer:

        def attempt() -> float:
            send(broker, b"slow")
            begun = time.monotonic()
            (first,) = consumer.receive(invisible=0.4)
            (again,) = consumer.receive(wait=DEADLINE)
            took = time.monotonic() - begun
            assert took >= 0.4
            assert (again.body, again.delivery_attempt, first.delivery_attempt) == (b"slow", 2, 1)
            consumer.ack(again)
            return took

        assert_in_time(attempt, 0.7)
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


def test_a_closed_consumer_gives_back_what_it_did_not_acknowledge_and_wakes_another(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker, Child(CONSUMER, directory) as other:
        assert other.read_line() == "ready"
        send(broker, *numbered(5))
        with broker.simple_consumer("audit", ALL) as consumer:
            messages = consumer.receive(5)
            consumer.ack(messages[:2])
            other.write_line("ack 5")
            wait_until(lambda: asleep(broker), "the other asleep")
        assert other.read_line().split() == ["2", "3", "4"]
        assert {table["held"] for table in broker.region.progress()} == {0}
        with pytest.raises(shmbroker.BrokerClosed):
            consumer.ack(messages[2])


def test_what_one_of_a_processs_consumers_holds_goes_back_with_the_last_of_them(broker: Broker) -> None:
    send(broker, *numbered(4))
    last = broker.simple_consumer("audit", ALL)
    first = broker.simple_consumer("audit", ALL)
    kept = last.receive(1)
    assert bodies_of(first.receive(2)) == numbered(2, 1)
    first.close()
    assert bodies_of(last.receive(4)) == numbered(1, 3)
    last.ack(kept)
    last.close()
    with broker.simple_consumer("audit", ALL) as consumer, broker.simple_consumer("another", ALL) as stranger:
        held = stranger.receive(2)
        again = consumer.receive(4)
        assert {int(m.body): m.delivery_attempt for m in again} == {1: 2, 2: 2, 3: 2}
        consumer.close()
        stranger.ack(held)  # of another group: not given back


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

        def attempt() -> float:
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
                    again = consumer.receive(100, wait=DEADLINE)
                    took = time.monotonic() - died
                    while len(again) < 5:  # the janitor gives them back one by one
                        again += consumer.receive(100, wait=DEADLINE)
                    assert bodies_of(again) == numbered(5, 10)
                    assert {message.delivery_attempt for message in again} == {2}
                    assert {message.delivery_attempt for message in fresh} == {1}
                    consumer.ack(fresh + again)
                    assert consumer.receive(100) == []
            return took

        assert_in_time(attempt, 0.5)


@pytest.mark.crash
@pytest.mark.parametrize("edge", ["claim.taken", "wait.flagged"])
def test_a_consumer_killed_on_its_way_to_a_message_holds_up_nobody(directory: Path, edge: str) -> None:
    """Woken and killed before it returns, or killed as it goes to sleep: another one has the message in no time."""
    source = """
        import sys, shmbroker
        from shmbroker._native._core import failpoint_arm
        consumer = shmbroker.open(sys.argv[1]).simple_consumer("audit", {"orders": "*"})
        failpoint_arm(sys.argv[2], "kill", 1)
        consumer.receive(wait=600.0)
    """
    with shmbroker.open(directory, **SMALL) as broker, broker.simple_consumer("audit", ALL) as consumer:

        def attempt() -> float:
            with Child(source, directory, edge) as victim:
                if edge == "claim.taken":
                    wait_until(lambda: asleep(broker), "the victim asleep")
                    send(broker, b"first")
                    assert victim.wait() == -9
                else:
                    assert victim.wait() == -9
                    send(broker, b"first")
                begun = time.monotonic()
                (message,) = consumer.receive(wait=DEADLINE)
                took = time.monotonic() - begun
            assert (message.body, message.delivery_attempt) == (b"first", 2 if edge == "claim.taken" else 1)
            consumer.ack(message)
            return took

        assert_in_time(attempt, 0.5)


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
