"""``group pause`` and ``resume``: a group that gets nothing for a while, and misses nothing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from support.command import shmbroker as command
from support.command import shmbroker_json
from support.consuming import ALL, asleep, bodies_of, drain, numbered, send
from support.listening import Gate, Heard, held
from support.processes import Child, kill_all, stop_broker
from support.running import lose_memory
from support.served import SETTINGS, served, serving
from support.waiting import wait_until

import shmbroker
from shmbroker.broker import Broker


def is_paused(broker: Broker) -> bool:
    return next(bool(group["paused"]) for group in broker.groups() if group["name"] == "audit")


def test_members_get_nothing_until_they_are_resumed_and_then_everything(broker: Broker) -> None:
    send(broker, *numbered(3))
    with broker.simple_consumer("audit", ALL) as consumer, broker.simple_consumer("another", ALL) as other:
        (first,) = consumer.receive()
        broker.pause_group("audit")
        broker.pause_group("audit")  # once more as it stands
        assert consumer.receive(10) == []
        assert consumer.receive(10, wait=0.05) == []
        assert drain(other, 3) == numbered(3), "another group has nothing to do with it"
        consumer.ack(first)  # what it has in hand it may finish
        with broker.simple_consumer("audit", ALL) as late_comer:
            assert late_comer.receive(10) == []
        send(broker, b"3")
        broker.resume_group("audit")
        assert drain(consumer, 3) == numbered(3, 1)


def test_a_member_that_waits_in_a_paused_group_is_woken_by_the_resume_and_by_nothing_before(broker: Broker) -> None:
    found: list[bytes] = []
    with broker.simple_consumer("audit", ALL) as consumer:
        broker.pause_group("audit")
        thread = threading.Thread(target=lambda: found.extend(bodies_of(consumer.receive(10, wait=20.0))))
        thread.start()
        wait_until(lambda: asleep(broker), "the member asleep")
        (waiter,) = [waiter["slot"] for waiter in broker.region.waiters() if waiter["kind"] == "message"]
        send(broker, b"one")
        send(broker, b"two")
        wait_until(lambda: broker.region.get("flushed") == broker.region.get("tail"), "the flusher's look, too")
        states = {entry["slot"]: entry["state"] for entry in broker.region.waiters()}
        assert (states[waiter], thread.is_alive(), found) == ("waiting", True, [])
        broker.resume_group("audit")
        thread.join(10.0)
        assert found == [b"one", b"two"]


def test_what_expires_or_is_given_back_meanwhile_waits_for_the_resume(broker: Broker) -> None:
    send(broker, *numbered(2))
    with broker.simple_consumer("audit", ALL) as consumer:
        first, second = consumer.receive(2, invisible=0.05)
        broker.pause_group("audit")
        consumer.change_invisible_duration(second, 0.0)
        wait_until(lambda: held(broker) == 0, "both claims over")
        assert consumer.receive(10) == []
        broker.resume_group("audit")
        assert [message.delivery_attempt for message in consumer.receive(10)] == [2, 2]
        with pytest.raises(shmbroker.ReceiptExpired):
            consumer.ack(first)


def test_a_push_consumer_finishes_what_runs_and_gives_back_the_rest(broker: Broker) -> None:
    send(broker, *numbered(20))
    gate = Gate()
    heard = Heard(gate)
    with broker.push_consumer("audit", heard, ALL, consume_thread_max=2):
        heard.wait(2)
        broker.pause_group("audit")
        gate.let_go()
        wait_until(lambda: held(broker) == 0, "nothing in hand any more")
        assert len(heard.bodies) == 2
        send(broker, *numbered(2, 20))
        broker.resume_group("audit")
        assert sorted(heard.wait(22), key=int) == numbered(22)
    assert {attempt for _, attempt in heard.attempts} == {1}, "what was only prefetched was not delivered"


def test_an_orderly_consumer_stands_still_as_well(broker: Broker) -> None:
    send(broker, *numbered(20))
    gate = Gate(shmbroker.ConsumeOrderlyStatus.SUCCESS)
    heard = Heard(gate)
    with broker.push_consumer("audit", heard, ALL, orderly=True):
        heard.wait(1)
        broker.pause_group("audit")
        gate.let_go()
        wait_until(lambda: held(broker) == 0, "nothing in hand any more")
        assert heard.bodies == [b"0"]
        broker.resume_group("audit")
        assert heard.wait(20) == numbered(20)


def test_dead_letters_are_looked_after_while_the_group_is_paused(broker: Broker) -> None:
    send(broker, b"poison")
    broker.create_group("audit", shmbroker.RetryPolicy("table", max_retries=0, delays=(0.0,)))
    with broker.simple_consumer("audit", ALL) as consumer:
        (message,) = consumer.receive()
        consumer.change_invisible_duration(message, 0.0)
        assert consumer.receive() == [], "it had its one delivery, and went to the dead letters"
        broker.pause_group("audit")
        letters = broker.dead_letters("audit")
        (letter,) = letters.receive(10)
        letters.resend(letter)
        broker.resume_group("audit")
        assert bodies_of(consumer.receive(wait=10.0)) == [b"poison"]


def test_a_group_that_does_not_exist_is_not_paused_and_a_new_one_of_that_name_is_not_either(broker: Broker) -> None:
    for call in (broker.pause_group, broker.resume_group):
        with pytest.raises(shmbroker.GroupNotExist, match="nobody"):
            call("nobody")
    broker.create_group("audit")
    broker.pause_group("audit")
    assert is_paused(broker)
    broker.delete_group("audit")
    broker.create_group("audit")
    assert not is_paused(broker)


@pytest.mark.crash
@pytest.mark.parametrize("paused", [True, False], ids=["paused", "resumed"])
@pytest.mark.parametrize(
    "end", [stop_broker, kill_all, lose_memory], ids=["clean-stop", "with-memory", "without-memory"]
)
def test_it_outlives_the_broker(directory: Path, end: Callable[[Path], None], paused: bool) -> None:
    directory.mkdir()
    (directory / "broker.toml").write_text(SETTINGS)
    with serving(directory), shmbroker.open(directory) as broker:
        send(broker, *numbered(3))
        broker.create_group("audit", shmbroker.RetryPolicy("table", delays=(1.0,)))
        broker.pause_group("audit")
        broker.set_subscription("audit", ALL)  # another record of the group
        if not paused:
            broker.resume_group("audit")
        wait_until(lambda: broker.region.get("flushed") == broker.region.get("tail"), "the records on the disk")
        end(directory)
    with serving(directory), shmbroker.open(directory) as broker, broker.simple_consumer("audit", ALL) as consumer:
        assert is_paused(broker) is paused
        assert bodies_of(consumer.receive(10)) == ([] if paused else numbered(3))
        broker.resume_group("audit")
        assert bodies_of(consumer.receive(10)) == (numbered(3) if paused else [])


PAUSE: Final = """
    import sys, shmbroker
    from shmbroker._native._core import failpoint_arm
    broker = shmbroker.open(sys.argv[1])
    failpoint_arm(sys.argv[2], "kill", 1)
    broker.pause_group("audit")
"""


@pytest.mark.crash
@pytest.mark.parametrize(
    ("failpoint", "paused"), [("append.copied", False), ("append.effects", False), ("append.published", True)]
)
def test_whoever_pauses_and_is_killed_has_paused_it_or_not(directory: Path, failpoint: str, paused: bool) -> None:
    directory.mkdir()
    (directory / "broker.toml").write_text(SETTINGS)
    with serving(directory), shmbroker.open(directory) as broker, broker.simple_consumer("audit", ALL) as consumer:
        with Child(PAUSE, directory, failpoint) as child:
            assert child.wait() == -signal.SIGKILL
        send(broker, b"one")
        assert bodies_of(consumer.receive()) == ([] if paused else [b"one"])
        assert is_paused(broker) is paused


def test_the_commands_pause_and_resume_and_everybody_sees_it(tmp_path: Path) -> None:
    directory = tmp_path / "broker"
    with served(directory):
        command(directory, "send", "--topic", "orders", stdin=b"one\n")
        command(directory, "receive", "-g", "audit", "-t", "orders", "--wait", "0", "--no-ack")
        assert command(directory, "group", "pause", "audit").stdout == "audit is paused\n"
        assert "audit (paused)" in command(directory, "status").stdout
        assert "audit (paused)" in command(directory, "group", "list").stdout
        assert "group resume" in command(directory, "group", "show", "audit").stdout
        assert shmbroker_json(directory, "status")["group_lag"][0]["paused"] is True
        assert command(directory, "receive", "-g", "audit", "-t", "orders", "--wait", "0").stdout == ""
        assert shmbroker_json(directory, "group", "resume", "audit") == {"group": "audit", "paused": False}
        assert command(directory, "receive", "-g", "audit", "-t", "orders", "--wait", "0").stdout == "one\n"
        assert "(paused)" not in command(directory, "status").stdout
