"""Push consumers that are killed or stopped: what comes again, to whom, how soon, and whose attempts it counts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.consuming import ALL, asleep, bodies_of, numbered, send
from support.listening import PUSHER, SUCCESS, Gate, Heard, attempts, done_with, held
from support.processes import SMALL, Child
from support.waiting import wait_until

import shmbroker
from shmbroker import ConsumeContext, ReceivedMessage
from shmbroker.broker import Broker

pytestmark = pytest.mark.crash

ONE_THREAD = '{"consume_thread_max": 1}'


def said(child: Child, count: int) -> list[tuple[str, int]]:
    """Body and attempt of the next messages that a PUSHER has begun."""
    words = [child.read_line().split() for _ in range(count)]
    assert {word for word, *_ in words} <= {"began"}
    return [(body, int(attempt)) for _, body, attempt in words]


def test_consumer_crash_gives_what_it_had_to_others_within_50_ms_and_counts_only_what_was_begun(
    directory: Path,
) -> None:
    with shmbroker.open(directory, **SMALL) as broker, Child(PUSHER, directory, ONE_THREAD) as victim:
        assert victim.read_line() == "ready"
        send(broker, b"slow", *numbered(9))
        assert said(victim, 1) == [("slow", 1)]
        wait_until(lambda: held(broker) == 10, "the rest prefetched")
        arrived: list[float] = []

        def listen(_message: ReceivedMessage, _context: ConsumeContext) -> Any:
            arrived.append(time.monotonic())
            return SUCCESS

        heard = Heard(listen)
        with broker.push_consumer("audit", heard, ALL, consume_thread_max=1):
            heard.wait(9)  # being idle it takes over what was prefetched
            wait_until(lambda: asleep(broker), "nothing left to do")
            died = time.monotonic()
            victim.kill()
            heard.wait(10)
            assert arrived[-1] - died < 0.05
            assert sorted(heard.attempts) == sorted([(body, 1) for body in numbered(9)] + [(b"slow", 2)])
            wait_until(lambda: done_with(broker) == 10, "everything acknowledged")


def test_redelivery_after_a_crash_repeats_nothing_that_was_acknowledged(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker, Child(PUSHER, directory, ONE_THREAD) as victim:
        assert victim.read_line() == "ready"
        send(broker, *numbered(40), b"slow", *numbered(20, 40))
        first = said(victim, 41)
        assert first[-1] == ("slow", 1)
        victim.kill()
        heard = Heard()
        with broker.push_consumer("audit", heard, ALL):
            heard.wait(21)
            wait_until(lambda: done_with(broker) == 61, "everything acknowledged")
        assert sorted(heard.attempts) == sorted([(body, 1) for body in numbered(20, 40)] + [(b"slow", 2)])


@pytest.mark.parametrize("edge", ["claim.taken", "claim.started", "claim.acked"])
def test_a_kill_between_claim_and_answer_loses_nothing_and_charges_at_most_what_was_begun(
    directory: Path, edge: str
) -> None:
    """At each edge between the claim and the acknowledgement; pass 7 of it, so that messages stand on both sides."""
    with shmbroker.open(directory, **SMALL) as broker:
        armed = {"SHMBROKER_FAILPOINTS": f"client/{edge}=kill@7"}
        with Child(PUSHER, directory, ONE_THREAD, environment=armed) as victim:
            assert victim.read_line() == "ready"
            send(broker, *numbered(20))
            begun = []
            while line := victim.read_line():
                begun.append(line.split()[1])
            assert victim.wait() == -signal.SIGKILL
        heard = Heard()
        with broker.push_consumer("audit", heard, ALL):
            wait_until(lambda: done_with(broker) == 20, "everything acknowledged")
        acknowledged = set(begun[:7]) if edge == "claim.acked" else set(begun)
        assert sorted([*acknowledged, *(body.decode() for body in heard.bodies)]) == sorted(map(str, range(20)))
        again = [int(body) for body, attempt in heard.attempts if attempt == 2]
        assert again == ([6] if edge == "claim.started" else [])
        assert max(attempt for _, attempt in heard.attempts) <= 2


def test_a_process_that_was_stopped_begins_nothing_that_others_have_taken_over(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker, Child(PUSHER, directory, ONE_THREAD) as stopped:
        assert stopped.read_line() == "ready"
        send(broker, b"slow", *numbered(9))
        assert said(stopped, 1) == [("slow", 1)]
        wait_until(lambda: held(broker) == 10, "the rest prefetched")
        os.kill(stopped.pid, signal.SIGSTOP)
        heard = Heard()
        with broker.push_consumer("audit", heard, ALL):
            assert sorted(heard.wait(9)) == numbered(9)
            os.kill(stopped.pid, signal.SIGCONT)
            stopped.write_line()  # the slow one may end
            wait_until(lambda: done_with(broker) == 10, "everything acknowledged")
            stopped.write_line("end")
            assert stopped.read_line() == "ended True"  # it has begun nothing else
        assert heard.most_running >= 1
        assert len(heard.bodies) == 9


def test_a_message_with_a_crash_on_its_record_runs_alone_in_its_process(broker: Broker) -> None:
    together: list[tuple[bytes, int]] = []
    running = 0
    changed = threading.Condition()

    def listen(message: ReceivedMessage, _context: ConsumeContext) -> Any:
        nonlocal running
        with changed:
            running += 1
            changed.notify_all()
            changed.wait_for(lambda: running > 1, 0.05)  # others have the time to begin
            together.append((message.body, running))
            running -= 1
        return SUCCESS

    with broker.simple_consumer("audit", ALL) as consumer:
        send(broker, *[b"suspect %d" % i for i in range(3)])
        for message in consumer.receive(3):
            consumer.change_invisible_duration(message, 0.0)
    send(broker, *numbered(60), queue_id=None)
    heard = Heard(listen)
    with broker.push_consumer("audit", heard, ALL, consume_thread_max=6, pull_batch_size=4):
        assert sorted(heard.wait(63)) == sorted([*numbered(60), *[b"suspect %d" % i for i in range(3)]])
        wait_until(lambda: done_with(broker) == 63, "everything acknowledged")
    assert {count for body, count in together if body.startswith(b"suspect")} == {1}
    assert max(count for body, count in together if body.isdigit()) > 1


def test_a_listener_that_never_returns_keeps_no_suspect_waiting_once_its_time_is_over(broker: Broker) -> None:
    gate = Gate()

    def listen(message: ReceivedMessage, context: ConsumeContext) -> Any:
        return gate(message, context) if message.delivery_attempt == 1 else SUCCESS

    heard = Heard(listen)
    settings = {"consume_thread_max": 2, "consume_timeout": 0.3, "max_renewals": 0}
    with broker.push_consumer("audit", heard, ALL, **settings) as consumer:
        send(broker, b"stuck")
        heard.wait(2)
        assert heard.attempts == [(b"stuck", 1), (b"stuck", 2)]
        wait_until(lambda: done_with(broker) == 1, "acknowledged by the second")
        assert heard.running == 1
        gate.let_go()
        wait_until(lambda: consumer.late == 1, "the late answer refused")


def test_the_neighbours_of_a_message_that_kills_its_process_are_charged_once_at_most(directory: Path) -> None:
    """Those that ran beside it when it struck first. From then on it dies alone."""
    deaths = 5
    with shmbroker.open(directory, **SMALL) as broker:
        send(broker, *numbered(10), b"poison", *numbered(10, 10))
        poisonings = 0
        while poisonings < deaths:
            with Child(PUSHER, directory, '{"consume_thread_max": 4}') as victim:
                assert victim.wait() == -signal.SIGKILL
            poisonings += 1
            wait_until(lambda: held(broker) == 0, "given back")
            assert attempts(broker)[10] == poisonings
            others = {offset: count for offset, count in attempts(broker).items() if offset != 10}
            assert set(others.values()) <= {1}
        heard = Heard()
        with broker.push_consumer("audit", heard, ALL):
            wait_until(lambda: done_with(broker) == 21, "everything acknowledged")
        assert dict(heard.attempts)[b"poison"] == deaths + 1
        assert max((attempt for body, attempt in heard.attempts if body != b"poison"), default=1) <= 2


def test_rebalance_members_share_at_once_what_comes_when_they_join_and_leave(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker:
        heard = Heard()
        with broker.push_consumer("audit", heard, ALL):
            send(broker, *numbered(20))
            heard.wait(20)
            with Child(PUSHER, directory) as joined:
                assert joined.read_line() == "ready"
                gate = Gate()
                heard._answer = gate  # this process is busy: the other one does all the rest
                send(broker, *numbered(40, 20))
                wait_until(lambda: done_with(broker) + heard.running >= 60, "shared")
                joined.write_line("end")
                others = []
                while (line := joined.read_line()) != "ended True":
                    others.append(int(line.split()[1]))
                gate.let_go()
            send(broker, *numbered(20, 60))
            gate.let_go()
            wait_until(lambda: done_with(broker) == 80, "everything acknowledged")
        counts = Counter([*map(int, heard.bodies), *others])
        assert counts == Counter(range(80))
        assert others


def test_a_simple_consumer_is_a_member_like_any_other(broker: Broker) -> None:
    gate = Gate()
    heard = Heard(gate)
    send(broker, *numbered(10))
    with broker.push_consumer("audit", heard, ALL, consume_thread_max=1, pull_batch_size=4):
        wait_until(lambda: held(broker) == 4, "prefetched")
        with broker.simple_consumer("audit", ALL) as other:
            received = [other.receive(4), other.receive(4), other.receive(4), other.receive(4)]
            # What is fresh comes first, then what the push consumer has not begun.
            assert [bodies_of(each) for each in received] == [numbered(4, 4), numbered(2, 8), numbered(3, 1), []]
            other.ack([message for each in received for message in each])
        gate.let_go()
        wait_until(lambda: done_with(broker) == 10, "everything acknowledged")
