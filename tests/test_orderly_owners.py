"""Who owns the queues of a group that consumes in order, when members come, go, are killed and are stopped."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.consuming import ALL, asleep, bodies_of, numbered, send
from support.listening import Gate, Heard, attempts, done_with, held
from support.orderly import DONE, Log, member, owners, shares
from support.processes import SMALL
from support.waiting import wait_until

import shmbroker
from shmbroker import RetryPolicy
from shmbroker.broker import Broker
from shmbroker.janitor import is_stopped

pytestmark = pytest.mark.crash

QUEUES = 8


@pytest.fixture
def eight(directory: Path) -> Iterator[Broker]:
    with shmbroker.open(directory, **SMALL) as broker:
        broker.create_topic("orders", queues=QUEUES)
        yield broker


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "heard")


def send_everywhere(broker: Broker, count: int) -> dict[int, list[bytes]]:
    """So many to each queue."""
    sent = {queue: [b"%d.%d" % (queue, i) for i in range(count)] for queue in range(QUEUES)}
    for start in range(0, count, 50):
        for queue, bodies in sent.items():
            send(broker, *bodies[start : start + 50], queue_id=queue)
    return sent


def test_rebalance_queues_are_spread_evenly_whoever_joins_and_leaves(eight: Broker, directory: Path, log: Log) -> None:
    """Rows 67 and 68: from one member to three and back, with nothing to do and in the middle of work."""
    with member(directory, log):
        wait_until(lambda: shares(eight) == [8], "all with the only one")
        with member(directory, log):
            wait_until(lambda: shares(eight) == [4, 4], "halved")
            sent = send_everywhere(eight, 200)
            with member(directory, log) as third:
                wait_until(lambda: shares(eight) == [3, 3, 2], "a third each")
                log.wait_done(QUEUES * 200)
                third.write_line("end")
                assert third.read_line() == "ended True"
                wait_until(lambda: shares(eight) == [4, 4], "halved again")
        wait_until(lambda: shares(eight) == [8], "all with the last one")
    log.check_order(sent, killed=set())


def test_consumer_crash_of_an_owner_gives_its_queues_to_others_within_50_ms(
    eight: Broker, directory: Path, log: Log
) -> None:
    """Row 69 and 72: no lock that has to expire. The message that ran comes first, what is behind it after it."""
    arrived: list[float] = []

    def listen(*_: object) -> object:
        arrived.append(time.monotonic())
        return DONE

    with member(directory, log) as victim:
        wait_until(lambda: shares(eight) == [8], "all with the victim")
        send(eight, b"slow", *numbered(9), queue_id=7)  # the last that others ask for
        wait_until(log.began, "began")
        heard = Heard(listen)
        with eight.push_consumer("audit", heard, ALL, orderly=True):
            wait_until(lambda: shares(eight) == [4, 4] and asleep(eight), "halved")
            assert owners(eight)[7] == victim.pid
            died = time.monotonic()
            victim.kill()
            assert heard.wait(10) == [b"slow", *numbered(9)]

            assert arrived[0] - died < 0.05
            assert heard.attempts == [(b"slow", 2), *((body, 1) for body in numbered(9))]
            wait_until(lambda: shares(eight) == [8], "all with the survivor")


def test_a_stopped_owner_keeps_its_queues_and_goes_on_where_it_was(eight: Broker, directory: Path, log: Log) -> None:
    with member(directory, log) as stopped, member(directory, log) as other:
        wait_until(lambda: shares(eight) == [4, 4], "halved")
        before = owners(eight)
        os.kill(stopped.pid, signal.SIGSTOP)
        wait_until(lambda: is_stopped(stopped.pid), "stopped")
        sent = send_everywhere(eight, 20)
        log.wait_done(4 * 20)
        assert {call.pid for call in log.calls} == {other.pid}
        assert owners(eight) == before
        other.write_line("end")  # even if nobody else is left
        assert other.read_line() == "ended True"
        with member(directory, log):
            wait_until(lambda: shares(eight) == [4, 4], "the other half with the new one")
            assert {queue for queue, pid in owners(eight).items() if pid == stopped.pid} == {
                queue for queue, pid in before.items() if pid == stopped.pid
            }
            assert len(log.done()) == 4 * 20
            os.kill(stopped.pid, signal.SIGCONT)
            log.wait_done(8 * 20)
        log.check_order(sent, killed=set())
        assert max(call.attempt for call in log.calls) == 1


def test_a_member_that_is_stopped_before_it_names_itself_and_whose_table_begins_anew_holds_nothing_up(
    directory: Path, log: Log
) -> None:
    armed = {"SHMBROKER_FAILPOINTS": "client/queue.taken=stop"}
    heard = Heard(lambda *_: DONE)
    with shmbroker.open(directory, **SMALL) as broker:
        broker.create_topic("orders", queues=1)
        with member(directory, log, doomed=True, environment=armed) as stopped:
            wait_until(lambda: is_stopped(stopped.pid), "stopped")
            broker.reset_group("audit", skip=True, topic="orders")
            broker.reset_group("audit", skip=True, topic="orders")  # by now in the table that it was about to take
            os.kill(stopped.pid, signal.SIGCONT)
            wait_until(lambda: shares(broker) == [1], "owned")
            with broker.push_consumer("audit", heard, ALL, orderly=True):
                send(broker, *numbered(3))
                wait_until(lambda: done_with(broker) == 3, "acknowledged by whoever owns it")


def test_a_member_beside_a_busy_sibling_of_its_process_sleeps(directory: Path) -> None:
    gate, heard = Gate(DONE), Heard(lambda *_: DONE)
    with shmbroker.open(directory, **SMALL) as broker:
        broker.create_topic("orders", queues=2)
        busy = Heard(gate)
        with broker.push_consumer("audit", busy, ALL, orderly=True, consume_thread_max=1):
            wait_until(lambda: shares(broker) == [2], "all with the first")
            with broker.push_consumer("audit", heard, ALL, orderly=True):
                send(broker, b"slow", queue_id=0)
                busy.wait(1)
                send(broker, b"behind", queue_id=1)
                begun, used = time.monotonic(), time.process_time()
                wait_until(lambda: time.monotonic() - begun > 1, "a second of it")
                assert time.process_time() - used < 0.5
                gate.let_go()
                assert busy.wait(2) == [b"slow", b"behind"]


def test_a_member_that_is_stopped_while_it_asks_holds_nothing_up(eight: Broker, directory: Path, log: Log) -> None:
    armed = {"SHMBROKER_FAILPOINTS": "client/wake.claimed=stop"}  # it has asked for one, and is about to wake the owner
    with member(directory, log), member(directory, log, doomed=True, environment=armed) as asking:
        wait_until(lambda: is_stopped(asking.pid), "stopped")
        sent = send_everywhere(eight, 20)
        log.wait_done(QUEUES * 20)
        os.kill(asking.pid, signal.SIGCONT)
        wait_until(lambda: shares(eight) == [4, 4], "halved after all")
    log.check_order(sent, killed=set())


def test_order_per_queue_stands_through_owners_that_are_killed_again_and_again(
    eight: Broker, directory: Path, log: Log
) -> None:
    chance = random.Random(23)
    count = 400
    killed: set[int] = set()
    with ExitStack() as stack:
        members = [stack.enter_context(member(directory, log, '{"consume_thread_max": 3}')) for _ in range(3)]
        sent = send_everywhere(eight, count)
        for round_number in range(1, 13):
            log.wait_done(round_number * QUEUES * count // 16)
            victim = members.pop(chance.randrange(len(members)))
            killed.add(victim.pid)
            victim.kill()
            members.append(stack.enter_context(member(directory, log, '{"consume_thread_max": 3}')))
        log.wait_done(QUEUES * count)
        wait_until(lambda: done_with(eight) == QUEUES * count, "everything acknowledged")
        log.check_order(sent, killed)
        assert max(call.attempt for call in log.calls) <= 1 + len(killed)
        wait_until(lambda: shares(eight) == [3, 3, 2], "spread evenly in the end")


@pytest.mark.parametrize(
    "edge",
    ["queue.taken", "queue.owned", "queue.nameless", "queue.freed", "claim.taken", "claim.started", "claim.acked"],
)
def test_a_kill_at_each_edge_of_an_owners_way_loses_nothing_and_keeps_the_order(
    eight: Broker, directory: Path, log: Log, edge: str
) -> None:
    armed = {"SHMBROKER_FAILPOINTS": f"client/{edge}=kill@3"}
    sent = send_everywhere(eight, 20)
    with member(directory, log, '{"consume_thread_max": 2}', doomed=True, environment=armed) as victim:
        if edge not in ("queue.nameless", "queue.freed"):  # which it comes to when it gives up half of them
            assert victim.wait() == -signal.SIGKILL
        else:
            wait_until(lambda: shares(eight) == [8], "all with the victim")
        with member(directory, log):
            assert victim.wait() == -signal.SIGKILL
            log.wait_done(QUEUES * 20)
            wait_until(lambda: done_with(eight) == QUEUES * 20 and held(eight) == 0, "everything acknowledged")
            wait_until(lambda: shares(eight) == [8], "all with the survivor")
    log.check_order(sent, killed={victim.pid})
    assert max(call.attempt for call in log.calls) <= 2


def test_a_message_that_kills_its_owners_is_a_dead_letter_after_its_last_delivery_and_its_queue_goes_on(
    eight: Broker, directory: Path, log: Log
) -> None:
    eight.create_group("audit", RetryPolicy("table", max_retries=4, delays=(0.0,)))
    send(eight, b"first", b"poison", b"last")
    send(eight, *numbered(10), queue_id=1)
    for _ in range(5):
        with member(directory, log, doomed=True) as victim:
            assert victim.wait() == -signal.SIGKILL
        wait_until(lambda: held(eight) == 0, "given back")
    with member(directory, log):
        wait_until(lambda: done_with(eight) == 13, "everything done with")
    of_queue_0 = [(call.body, call.attempt) for call in log.began() if call.queue_id == 0]
    assert of_queue_0 == [("first", 1), *(("poison", n) for n in range(1, 6)), ("last", 1)]
    assert max(call.attempt for call in log.began() if call.queue_id == 1) <= 2  # ran beside the poison once, at most
    with eight.dead_letters("audit") as letters:
        assert bodies_of(letters.receive(10)) == [b"poison"]


def test_after_a_restart_without_memory_attempts_and_place_are_what_they_were(directory: Path, log: Log) -> None:
    with shmbroker.open(directory, **SMALL) as broker:
        send(broker, *numbered(3), b"poison", *numbered(3, 3))
        for _ in range(2):
            with member(directory, log, doomed=True) as victim:
                assert victim.wait() == -signal.SIGKILL
        wait_until(lambda: attempts(broker) == {3: 2}, "counted")
    with shmbroker.open(directory, **SMALL) as broker:
        heard = Heard(lambda *_: DONE)
        with broker.push_consumer("audit", heard, ALL, orderly=True):
            heard.wait(4)
        assert heard.attempts == [(b"poison", 3), *((body, 1) for body in numbered(3, 3))]
