"""Broadcasting: every member gets every message, and has a progress of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from support.command import shmbroker as shmbroker_command
from support.consuming import ALL, bodies_of, drain, numbered, send
from support.listening import Gate, Heard
from support.processes import Child, kill_all, stop_broker
from support.running import lose_memory, running
from support.served import SETTINGS, serving
from support.waiting import wait_until

import shmbroker
from shmbroker import ConsumeStatus
from shmbroker.broker import Broker
from shmbroker.tools.exit_codes import ExitCode

BROADCAST: Final[dict[str, Any]] = {"message_model": "BROADCASTING"}


def groups_of(broker: Broker) -> list[str]:
    return sorted(group["name"] for group in broker.groups())


def done_with(broker: Broker, group: str) -> int:
    return sum(int(table["base"]) for table in broker.region.progress() if table["group"] == group)


def test_every_member_gets_every_message_and_a_clustering_group_of_that_name_shares_its_own(broker: Broker) -> None:
    heard = [Heard(), Heard()]
    with (
        broker.push_consumer("cache", heard[0], ALL, **BROADCAST),
        broker.push_consumer("cache", heard[1], ALL, **BROADCAST),
        broker.simple_consumer("cache", ALL, **BROADCAST) as third,
        broker.simple_consumer("cache", ALL) as shared,
    ):
        send(broker, *numbered(100))
        assert sorted(drain(third, 100), key=int) == numbered(100)
        assert sorted(drain(shared, 100), key=int) == numbered(100)
        for one in heard:
            assert sorted(one.wait(100), key=int) == numbered(100)
    assert {attempt for one in heard for _, attempt in one.attempts} == {1}


def test_a_member_without_a_name_begins_with_what_comes_and_leaves_nothing(broker: Broker) -> None:
    send(broker, b"before")
    with broker.simple_consumer("cache", ALL, **BROADCAST) as member:
        assert member.receive(10) == []
        send(broker, b"from now on")
        assert bodies_of(member.receive(10)) == [b"from now on"]
        assert len(groups_of(broker)) == 1
    assert groups_of(broker) == []
    with broker.simple_consumer("cache", ALL, consume_from="first", **BROADCAST) as member:
        assert bodies_of(member.receive(10)) == [b"before", b"from now on"]


def test_a_member_with_a_name_goes_on_where_it_was(broker: Broker) -> None:
    with broker.simple_consumer("cache", ALL, member="worker-1", **BROADCAST) as member:
        send(broker, *numbered(5))
        assert drain(member, 3) == numbered(3)
    assert groups_of(broker) == ["%BROADCAST%cache%worker-1"]
    send(broker, *numbered(5, 5))
    with broker.simple_consumer("cache", ALL, member="worker-1", **BROADCAST) as member:
        assert bodies_of(member.receive(10)) == numbered(7, 3)
    with broker.simple_consumer("cache", ALL, member="worker-2", **BROADCAST) as other:
        assert other.receive(10) == []
    broker.delete_group("%BROADCAST%cache%worker-1")


def test_what_a_member_fails_with_is_logged_and_not_tried_again(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(message: Any, _context: object) -> Any:
        if message.body == b"1":
            raise RuntimeError("no")
        return ConsumeStatus.RECONSUME_LATER if message.body == b"2" else ConsumeStatus.CONSUME_SUCCESS

    heard = Heard(answer)
    with caplog.at_level(logging.WARNING), broker.push_consumer("cache", heard, ALL, member="a", **BROADCAST):
        send(broker, *numbered(4))
        heard.wait(4)
        wait_until(lambda: done_with(broker, "%BROADCAST%cache%a") == 4, "all of them done with")
    assert sorted(heard.bodies) == numbered(4)
    assert {topic["name"] for topic in broker.topics()} == {"orders"}, "neither retries nor dead letters"
    assert sum("is not tried again" in record.message for record in caplog.records) == 2


def test_a_member_that_is_slow_keeps_nobody_up_and_loses_nothing(broker: Broker) -> None:
    gate = Gate()
    slow, quick = Heard(gate), Heard()
    with (
        broker.push_consumer("cache", slow, ALL, consume_thread_max=1, **BROADCAST),
        broker.push_consumer("cache", quick, ALL, **BROADCAST),
    ):
        send(broker, *numbered(200))
        assert sorted(quick.wait(200), key=int) == numbered(200)
        assert len(slow.bodies) <= 1
        gate.let_go()
        assert slow.wait(200) == numbered(200)


MEMBER: Final = """
    import sys, shmbroker
    broker = shmbroker.open(sys.argv[1])
    named = broker.simple_consumer("cache", {"orders": "*"}, message_model="BROADCASTING", member="worker-1")
    nameless = broker.simple_consumer("cache", {"orders": "*"}, message_model="BROADCASTING")
    print("ready")
    sys.stdin.readline()
    for message in named.receive(5, wait=10.0):
        named.ack(message)
    print(len(named.receive(2)), len(nameless.receive(5)))
    sys.stdin.read()
"""


@pytest.mark.crash
def test_a_killed_member_with_a_name_gets_the_rest_and_of_one_without_nothing_is_left(directory: Path) -> None:
    with running(directory) as broker:
        with Child(MEMBER, directory) as child:
            assert child.read_line() == "ready"
            send(broker, *numbered(10))
            child.write_line()
            assert child.read_line() == "2 5"
            assert len(groups_of(broker)) == 2
            child.kill()
        with broker.simple_consumer("cache", ALL, member="worker-1", **BROADCAST) as member:
            messages = member.receive(10, wait=10.0)
            assert bodies_of(messages) == numbered(5, 5)
            assert [message.delivery_attempt for message in messages] == [2, 2, 1, 1, 1]
        wait_until(lambda: groups_of(broker) == ["%BROADCAST%cache%worker-1"], "the nameless one given up", 30.0)


@pytest.mark.crash
@pytest.mark.parametrize(
    "end", [stop_broker, kill_all, lose_memory], ids=["clean-stop", "with-memory", "without-memory"]
)
def test_members_go_on_with_the_next_life_of_the_broker(directory: Path, end: Callable[[Path], None]) -> None:
    directory.mkdir()
    (directory / "broker.toml").write_text(SETTINGS)
    with serving(directory):
        broker = shmbroker.open(directory)
        members = [
            broker.simple_consumer("cache", ALL, member="worker-1", **BROADCAST),
            broker.simple_consumer("cache", ALL, **BROADCAST),
        ]
        send(broker, *numbered(10))
        for member in members:
            member.ack(member.receive(4), durable=True)
        wait_until(lambda: broker.region.get("flushed") == broker.region.get("tail"), "all of it on the disk")
        end(directory)
    with serving(directory):
        for member in members:
            assert drain(member, 6) == numbered(6, 4)
        broker.close()


def test_of_a_broadcasting_group_that_is_none_itself_the_members_are_named(broker: Broker) -> None:
    calls: list[Callable[[str], object]] = [
        broker.pause_group,
        broker.resume_group,
        lambda name: broker.reset_group(name, skip=True),
    ]
    with (
        broker.simple_consumer("cache", ALL, **BROADCAST, member="worker-1") as named,
        broker.simple_consumer("cache", ALL, **BROADCAST) as passing,
        broker.simple_consumer("cached", ALL, **BROADCAST, member="worker-1"),
    ):
        members = ", ".join(sorted([named.group, passing.group]))
        assert named.group == "%BROADCAST%cache%worker-1"
        for call in calls:
            with pytest.raises(shmbroker.GroupNotExist) as refused:
                call("cache")
            told = f"group 'cache' does not exist; it is broadcasting, and each member a group: {members}"
            assert str(refused.value) == told
            with pytest.raises(shmbroker.GroupNotExist, match=r"group 'nobody' does not exist$"):
                call("nobody")
        shown = shmbroker_command(broker.directory, "group", "show", "cache")
        assert (shown.returncode, members in shown.stderr) == (ExitCode.USAGE, True)


def test_nonsense_is_refused(broker: Broker) -> None:
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"message_model": "broadcast"}, shmbroker.BadRequest, "'CLUSTERING' or 'BROADCASTING'"),
        ({"member": "worker-1"}, shmbroker.BadRequest, "only members of a BROADCASTING"),
        ({**BROADCAST, "member": "a b"}, shmbroker.NameIllegal, "letters, digits"),
        ({**BROADCAST, "member": ""}, shmbroker.NameIllegal, "1 to 64"),
        ({**BROADCAST, "member": 7}, shmbroker.NameIllegal, "member 7"),
    ]
    for settings, error, text in refused:
        with pytest.raises(error, match=text):
            broker.simple_consumer("cache", ALL, **settings)
        with pytest.raises(error, match=text):
            broker.push_consumer("cache", Heard(), ALL, **settings)
    with pytest.raises(shmbroker.BadRequest, match="orderly"):
        broker.push_consumer("cache", Heard(), ALL, orderly=True, **BROADCAST)
    with pytest.raises(shmbroker.BadRequest, match="orderly"):
        broker.push_consumer("cache", Heard(), ALL, orderly=True, member="worker-1")
    with pytest.raises(shmbroker.NameIllegal):
        broker.simple_consumer("g" * 110, ALL, **BROADCAST)
    assert broker.groups() == []
