"""The broker's handle: topics and groups are made, altered and deleted; what cannot work is refused with the reason."""

from __future__ import annotations

import json
import pickle
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from support.consuming import ALL, CONSUMER, drain, numbered, send
from support.listening import Heard
from support.processes import Child, kill_all, wait_gone
from support.running import QUICK, lose_memory, running
from support.waiting import wait_until

import shmbroker
from shmbroker import BadRequest, Broker, ConfigError, GroupInUse, GroupNotExist, Message, MessageTooLarge
from shmbroker.send_back import SendBack

SEGMENT = 1 << 20  # QUICK's


def names_of(broker: Broker) -> list[str]:
    return [group["name"] for group in broker.groups()]


def test_an_empty_path_makes_no_broker_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="name one"):
        shmbroker.open("")
    assert list(tmp_path.iterdir()) == []


def test_a_handle_shows_where_it_works_for_whom_and_whether_it_is_closed(directory: Path) -> None:
    place = repr(str(directory))
    with shmbroker.open(directory, **QUICK) as broker:
        producer, consumer = broker.producer("p"), broker.simple_consumer("g", {"t": "a || b"})
        assert repr(broker) == f"<Broker of {place}, open>"
        assert repr(producer) == f"<Producer of group 'p' in {place}, open>"
        assert repr(consumer) == f'<SimpleConsumer of group \'g\' for {{"t":"a || b"}} in {place}, open>'
    assert [repr(handle)[-8:] for handle in (broker, producer, consumer)] == [" closed>"] * 3


# ---- groups


DELETE: Final = """
    import json, sys, shmbroker
    broker = shmbroker.open(sys.argv[1], **json.loads(sys.argv[2]))
    broker.delete_group("oudit")
    assert broker.region.wait_for("flushed", broker.region.get("tail"), 10_000_000_000)
    print("deleted")
    sys.stdin.readline()
"""


def stop(directory: Path, child: Child) -> None:
    child.write_line()
    child.wait()
    wait_gone(directory)


def kill(directory: Path, _child: Child) -> None:
    kill_all(directory)


def cut_power(directory: Path, _child: Child) -> None:
    lose_memory(directory)


@pytest.mark.parametrize("end", [stop, kill, cut_power], ids=["stopped", "killed", "killed, and the memory is lost"])
def test_a_deleted_group_stays_deleted_and_begins_anew_under_its_name(
    directory: Path, end: Callable[[Path, Child], None]
) -> None:
    with running(directory) as broker:
        send(broker, *numbered(20))
        for group in ("audit", "oudit"):
            with broker.simple_consumer(group, ALL) as consumer:
                drain(consumer, 10)
    with Child(DELETE, directory, json.dumps(QUICK)) as child:
        assert child.read_line() == "deleted"
        end(directory, child)
    with running(directory) as broker:
        assert names_of(broker) == ["audit"]
        assert {table["group"] for table in broker.region.progress()} == {"audit"}
        with broker.simple_consumer("oudit", ALL) as consumer:
            assert drain(consumer, 20) == numbered(20)


@pytest.mark.crash
@pytest.mark.parametrize(("name", "gone"), [("copied", False), ("published", True), ("disarmed", True)])
def test_a_group_whose_deleter_is_killed_on_the_way_is_whole_or_gone(directory: Path, name: str, gone: bool) -> None:
    """With its retries. Killed behind its records, the deleter leaves the group's claims; the janitor frees them."""
    with running(directory) as broker:
        send(broker, *numbered(20))
        with broker.simple_consumer("oudit", ALL) as consumer:
            drain(consumer, 10)
            (failed,) = consumer.receive(1, wait=10.0)
            SendBack(broker, consumer).later(failed, level=1)
        armed = {"SHMBROKER_FAILPOINTS": f"client/append.{name}=kill"}
        with Child(DELETE, directory, "{}", environment=armed) as child:
            assert child.wait() == -signal.SIGKILL
        wait_until(lambda: bool(broker.region.progress()) == (not gone), "its claims freed, or not")
        left = {"group": names_of(broker), "topics": [topic["name"] for topic in broker.topics()]}
        assert left == {
            "group": [] if gone else ["oudit"],
            "topics": ["orders"] if gone else ["orders", "%RETRY%oudit"],
        }
    with running(directory) as broker:  # by the log alone
        assert left == {"group": names_of(broker), "topics": [topic["name"] for topic in broker.topics()]}
        with broker.simple_consumer("oudit", ALL) as consumer:
            again = drain(consumer, 20 if gone else 10)
            assert again == (numbered(20) if gone else [*numbered(9, 11), b"10"])


def test_a_group_with_live_members_is_not_deleted_and_they_are_named(broker: Broker) -> None:
    send(broker, *numbered(5))
    with Child(CONSUMER, broker.directory) as member:
        assert member.read_line() == "ready"
        with pytest.raises(GroupInUse, match=rf"group 'audit'.*: {member.pid} \(") as refused:
            broker.delete_group("audit")
        assert "stop them first" in str(refused.value)
        member.write_line("ack 5")
        assert member.read_line() == "0 1 2 3 4", "it goes on undisturbed"
    broker.delete_group("audit")  # killed: whether the janitor has met the death yet does not matter
    assert names_of(broker) == []


def test_a_consumer_that_was_closed_does_not_keep_its_group(broker: Broker) -> None:
    broker.simple_consumer("audit", ALL).close()
    broker.delete_group("audit")
    with pytest.raises(GroupNotExist, match="group 'audit' does not exist"):
        broker.delete_group("audit")


def test_a_deleted_group_no_longer_keeps_log_from_being_deleted(directory: Path) -> None:
    with running(directory, retention_bytes=1) as broker:
        broker.simple_consumer("oudit", ALL).close()
        with broker.simple_consumer("audit", ALL) as consumer:
            for _ in range(20):
                send(broker, *[bytes(SEGMENT // 512)] * 100)
                drain(consumer, 100)
            assert broker.region.get("kept") == 0, "the mistyped group holds everything"
            broker.delete_group("oudit")
            wait_until(lambda: broker.region.get("kept") > 0, "the consumed log deleted")


# ---- topics


@pytest.mark.parametrize(("given", "bits"), [("r", 4), ("w", 2), ("rw", 6), (4, 4), (2, 2), (6, 6)])
def test_permissions_are_given_in_letters_or_in_rocketmqs_numbers(broker: Broker, given: Any, bits: int) -> None:
    broker.create_topic("made", permission=given)
    broker.create_topic("altered")
    broker.alter_topic("altered", permission=given)
    assert [topic["permission"] for topic in broker.topics()] == [bits, bits]


def test_errors_show_permissions_in_letters(broker: Broker) -> None:
    broker.create_topic("orders", queues=1, permission="r")
    with pytest.raises(shmbroker.NoPermission, match="'orders' has permission r: nobody may send"):
        send(broker, b"x")
    with pytest.raises(BadRequest, match="exists, with 1 queues and permission r: alter it"):
        broker.create_topic("orders", queues=1)
    broker.alter_topic("orders", permission="w")
    with pytest.raises(shmbroker.NoPermission, match="'orders' has permission w: nobody may consume"):
        broker.simple_consumer("audit", ALL)
    for wrong in ("x", 0, 7, None):
        with pytest.raises(BadRequest, match=r"must be 'r' \(read\), 'w' \(write\) or 'rw'"):
            broker.create_topic("more", permission=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("queues", [0, 1025, "4", 1.0, True])
def test_a_wrong_number_of_queues_is_refused(broker: Broker, queues: Any) -> None:
    with pytest.raises(BadRequest, match="must be an integer from 1 to 1024"):
        broker.create_topic("orders", queues=queues)


# ---- what cannot work


@pytest.mark.parametrize("subscriptions", ["orders", {}, ["orders"], None])
def test_subscriptions_that_are_no_mapping_are_refused_with_an_example(broker: Broker, subscriptions: Any) -> None:
    with pytest.raises(BadRequest, match=r'must map at least one topic to a tag expression, as in \{"orders": "\*"\}'):
        broker.simple_consumer("audit", subscriptions)


def test_handles_are_not_pickled_and_say_what_to_do_instead(broker: Broker) -> None:
    message = Message("orders", b"x", tags="paid", keys="k", properties={"a": "b"})
    with (
        broker.producer("test") as producer,
        broker.simple_consumer("audit", ALL) as consumer,
        broker.push_consumer("other", Heard(), ALL) as listening,
    ):
        result = producer.send(message)
        (received,) = consumer.receive(wait=5.0)
        instead = {
            broker: rf"shmbroker.open\('{broker.directory}'\) in the other process",
            producer: "open the broker in the other process",
            consumer: "open the broker in the other process",
            listening: "open the broker in the other process",
            result: "pass its message_id",
            received: "pass what is needed, as its body",
        }
        for handle, says in instead.items():
            with pytest.raises(TypeError, match=f"cannot be pickled: .*{says}"):
                pickle.dumps(handle)
    copy = pickle.loads(pickle.dumps(message))
    assert (copy.body, copy.tags, copy.keys, copy.properties) == (b"x", "paid", "k", {"a": "b"})


@pytest.mark.parametrize("settings", [{}, {"ring_bytes": "64 KiB", "segment_bytes": "64 KiB"}], ids=["1 MiB", "64 KiB"])
def test_a_body_of_the_documented_limit_can_be_sent_and_one_byte_more_cannot(
    directory: Path, settings: dict[str, Any]
) -> None:
    """The ring is so small that its quarter, not max_message_bytes, is the limit."""
    with running(directory, **settings) as broker, broker.producer("test") as producer:
        limit = broker.config.layout.max_message_bytes
        assert limit == broker.region.ring_bytes // 4 - 80
        for number in range(5):
            producer.send(Message("orders", bytes([number]) * limit))
        bounds = f"max_message_bytes is {limit}. That can be at most a quarter of ring_bytes ("
        with pytest.raises(MessageTooLarge, match=re.escape(bounds)):
            producer.send(Message("orders", bytes(limit + 1)))
        with broker.simple_consumer("audit", ALL) as consumer:
            assert sorted(drain(consumer, 5)) == [bytes([number]) * limit for number in range(5)]
