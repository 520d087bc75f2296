"""``consume_from`` an instant, and ``group reset``: where a group begins, and where it goes on if somebody says so."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytest
from support.command import shmbroker as command
from support.command import shmbroker_json
from support.consuming import ALL, asleep, bodies_of, drain, numbered, send
from support.listening import Gate, Heard
from support.processes import SMALL, Child, kill_all, stop_broker
from support.running import lose_memory
from support.served import SETTINGS, served, serving
from support.waiting import wait_until

import shmbroker
from shmbroker import Message
from shmbroker.broker import Broker
from shmbroker.send_back import SendBack
from shmbroker.tools.exit_codes import ExitCode

OVERFLOW: Final = int(SMALL["overflow_claims"])


def instant() -> float:
    """Now, with a moment before and behind it in which nothing is sent."""
    _pass_a_millisecond()
    now = time.time_ns()
    _pass_a_millisecond()
    return now / 1e9


def _pass_a_millisecond() -> None:
    begun = time.time_ns()
    wait_until(lambda: time.time_ns() > begun + 1_000_000, "a millisecond")


def base_of(broker: Broker, group: str = "audit", queue_id: int = 0) -> int:
    tables = [table for table in broker.region.progress() if table["group"] == group and table["topic"] == "orders"]
    return next(int(table["base"]) for table in tables if table["queue_id"] == queue_id)


def all_of(broker: Broker, group: str = "audit") -> list[bytes]:
    """What the group gets, sorted by number."""
    with broker.simple_consumer(group, ALL) as consumer:
        bodies: list[bytes] = []
        while messages := consumer.receive(100):
            bodies += bodies_of(messages)
            consumer.ack(messages)
    return sorted(bodies, key=int)


# ---- where a new group begins ----------------------------------------------------------------------------------


@pytest.mark.parametrize("as_datetime", [False, True])
def test_a_new_group_begins_with_what_was_sent_at_an_instant_or_later(broker: Broker, as_datetime: bool) -> None:
    for queue_id in range(4):
        send(broker, *numbered(10, 100 * queue_id), queue_id=queue_id)
    now = instant()
    for queue_id in range(3):
        send(broker, *numbered(10, 100 * queue_id + 10), queue_id=queue_id)
    start = datetime.fromtimestamp(now) if as_datetime else now  # noqa: DTZ006 - local time is what it means
    with broker.simple_consumer("audit", ALL, consume_from=start) as consumer:
        expected = sorted(numbered(10, 10) + numbered(10, 110) + numbered(10, 210))
        assert sorted(drain(consumer, 30)) == expected
        send(broker, b"and on", queue_id=3)
        assert bodies_of(consumer.receive(10)) == [b"and on"]
    assert base_of(broker, queue_id=3) == 10, "behind its last message, which was older"


def test_a_group_that_has_consumed_before_goes_on_where_it_was(broker: Broker) -> None:
    send(broker, *numbered(4))
    with broker.simple_consumer("audit", ALL) as consumer:
        assert drain(consumer, 1) == [b"0"]
    with broker.simple_consumer("audit", ALL, consume_from=instant()) as consumer:
        assert drain(consumer, 3) == numbered(3, 1)


def test_a_delayed_message_does_not_mislead_the_search(broker: Broker) -> None:
    send(broker, *numbered(8))
    with broker.producer("test") as producer:
        producer.send(Message("orders", b"8", delay=0.1), queue_id=0)
        now = instant()
        send(broker, *numbered(8, 10))
        region = broker.region
        wait_until(lambda: region.topics()[0]["queues"][0]["next_offset"] == 17, "the delayed message in its queue")
        send(broker, *numbered(8, 20))
    with broker.simple_consumer("audit", ALL, consume_from=now) as consumer:
        assert sorted(drain(consumer, 17), key=int) == [b"8", *numbered(8, 10), *numbered(8, 20)]
        assert consumer.receive(1) == []


@pytest.mark.parametrize("nonsense", ["yesterday", "", -1, True, None, [1], float("nan"), 10**12])
def test_what_is_no_instant_is_refused(broker: Broker, nonsense: Any) -> None:
    with pytest.raises(shmbroker.BadRequest, match="consume_from"):
        broker.simple_consumer("audit", ALL, consume_from=nonsense)
    with pytest.raises(shmbroker.BadRequest, match="lies in the future"):
        broker.simple_consumer("audit", ALL, consume_from=time.time_ns() / 1e9 + 60)
    assert broker.groups() == []


# ---- where a group goes on -------------------------------------------------------------------------------------


def test_a_group_gets_once_more_what_was_sent_since_an_instant_and_nothing_else(broker: Broker) -> None:
    send(broker, *numbered(10), queue_id=0)
    send(broker, *numbered(10, 10), queue_id=1)
    now = instant()
    send(broker, *numbered(10, 20), queue_id=1)
    send(broker, *numbered(5, 30), queue_id=0)
    assert all_of(broker) == numbered(35)
    done = broker.reset_group("audit", to_time=now)
    assert [tuple(queue) for queue in done] == [
        ("orders", 0, 15, 10), ("orders", 1, 20, 10), ("orders", 2, 0, 0), ("orders", 3, 0, 0),
    ]  # fmt: skip
    assert all_of(broker) == numbered(15, 20)
    broker.reset_group("audit", to_time=0.0)
    assert all_of(broker) == numbered(35)


def test_an_offset_is_of_one_queue_and_the_others_stay(broker: Broker) -> None:
    send(broker, *numbered(10), queue_id=0)
    send(broker, *numbered(10, 10), queue_id=1)
    with broker.simple_consumer("audit", ALL) as consumer:
        drain(consumer, 20)
    assert broker.reset_group("audit", to_offset=7, topic="orders", queue_id=1) == [("orders", 1, 10, 7)]
    assert all_of(broker) == numbered(3, 17)
    broker.reset_group("audit", to_offset=10, topic="orders", queue_id=1)  # the next one: legal, nothing comes
    assert all_of(broker) == []


def test_skipping_leaves_nothing_and_later_messages_come(broker: Broker) -> None:
    send(broker, *numbered(500))
    with broker.simple_consumer("audit", ALL) as consumer:
        held = consumer.receive(40)
        broker.reset_group("audit", skip=True)
        assert consumer.receive(10) == []
        send(broker, b"later")
        assert bodies_of(consumer.receive(10)) == [b"later"]
        with pytest.raises(shmbroker.ReceiptExpired) as refused:
            consumer.ack(held)
        assert refused.value.messages == held


def test_skipping_takes_the_retries_along_and_an_instant_does_not(broker: Broker) -> None:
    now = instant()
    send(broker, b"1")
    broker.create_group("audit", shmbroker.RetryPolicy("table", delays=(0.0,)))

    def fail_once() -> None:
        with broker.simple_consumer("audit", ALL) as consumer:
            (message,) = consumer.receive(1)
            SendBack(broker, consumer).later(message)

    fail_once()
    broker.reset_group("audit", to_time=now)
    with broker.simple_consumer("audit", ALL) as consumer:
        messages = consumer.receive(10)
        assert sorted(message.delivery_attempt for message in messages) == [1, 2]
    fail_once()
    broker.reset_group("audit", skip=True)
    assert all_of(broker) == []


def test_a_member_that_waits_gets_what_the_reset_brings_back(broker: Broker) -> None:
    send(broker, *numbered(3))
    found: list[bytes] = []
    with broker.simple_consumer("audit", ALL) as consumer:
        drain(consumer, 3)
        thread = threading.Thread(target=lambda: found.extend(bodies_of(consumer.receive(10, wait=20.0))))
        thread.start()
        wait_until(lambda: asleep(broker), "the member asleep")
        broker.reset_group("audit", to_offset=1, topic="orders", queue_id=0)
        thread.join(10.0)
        assert found == numbered(2, 1)


def test_a_push_consumer_goes_on_from_there_and_its_late_answers_are_refused(broker: Broker) -> None:
    send(broker, *numbered(4))
    gate = Gate()
    heard = Heard(gate)
    with broker.push_consumer("audit", heard, ALL, consume_thread_max=2) as consumer:
        heard.wait(2)
        broker.reset_group("audit", to_offset=0, topic="orders", queue_id=0)
        gate.let_go()
        assert heard.wait(6)[2:] == numbered(4)
        wait_until(lambda: base_of(broker) == 4, "everything acknowledged")
        wait_until(lambda: consumer.late == 2, "both answers were refused")  # either thread may come to it last


def test_an_orderly_consumer_goes_on_from_there_in_order(broker: Broker) -> None:
    send(broker, *numbered(20))
    gate = Gate(shmbroker.ConsumeOrderlyStatus.SUCCESS)
    heard = Heard(gate)
    with broker.push_consumer("audit", heard, ALL, orderly=True):
        gate.let_go(10)
        heard.wait(11)  # the last of them waits
        broker.reset_group("audit", to_offset=5, topic="orders", queue_id=0)
        gate.let_go()
        assert heard.wait(26) == numbered(11) + numbered(15, 5)
        wait_until(lambda: base_of(broker) == 20, "everything acknowledged")


def test_a_group_without_members_may_be_told_where_to_begin(broker: Broker) -> None:
    send(broker, *numbered(10))
    broker.create_group("audit")
    with pytest.raises(shmbroker.BadRequest, match="has not consumed a topic yet"):
        broker.reset_group("audit", skip=True)
    assert broker.reset_group("audit", to_offset=6, topic="orders", queue_id=0) == [("orders", 0, None, 6)]
    assert all_of(broker) == numbered(4, 6)


def test_what_lay_in_the_overflow_table_is_given_up_with_the_rest(broker: Broker) -> None:
    """Twice: else its room would be gone for everybody."""
    send(broker, *numbered(1000))
    with broker.simple_consumer("audit", ALL) as consumer:
        for _ in range(2):
            assert len(consumer.receive(200)) > OVERFLOW
            assert any(table["overflow"] for table in broker.region.progress())
            broker.reset_group("audit", to_offset=0, topic="orders", queue_id=0)
            assert not any(table["overflow"] for table in broker.region.progress())
        assert drain(consumer, 1000) == numbered(1000)


def test_nonsense_is_refused_and_nothing_moves(broker: Broker) -> None:
    send(broker, *numbered(3))
    assert all_of(broker) == numbered(3)
    before = broker.region.progress()
    place = {"topic": "orders", "queue_id": 0}
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, shmbroker.BadRequest, "give one of"),
        ({"skip": True, "to_time": 1.0}, shmbroker.BadRequest, "give one of"),
        ({"to_offset": 1}, shmbroker.BadRequest, "name topic and queue_id"),
        ({"skip": True, "queue_id": 0}, shmbroker.BadRequest, "name the topic"),
        ({"to_offset": 4, **place}, shmbroker.BadRequest, "offset 0 on, and the next one will be 3"),
        ({"to_offset": -1, **place}, shmbroker.BadRequest, "to_offset = -1"),
        ({"to_time": time.time_ns() / 1e9 + 60}, shmbroker.BadRequest, "future"),
        ({"skip": True, "topic": "orders", "queue_id": 4}, shmbroker.QueueNotExist, "4 queues"),
        ({"skip": True, "topic": "orders", "queue_id": -1}, shmbroker.QueueNotExist, "-1"),
        ({"skip": True, "topic": "nothing"}, shmbroker.TopicNotExist, "nothing"),
        ({"skip": True, "topic": "%DLQ%audit"}, shmbroker.BadRequest, "purged"),
    ]
    for arguments, error, text in refused:
        with pytest.raises(error, match=text):
            broker.reset_group("audit", **arguments)
    with pytest.raises(shmbroker.GroupNotExist):
        broker.reset_group("nobody", skip=True)
    assert broker.region.progress() == before


def test_without_a_free_claim_table_it_is_refused_and_nothing_moves(directory: Path) -> None:
    with shmbroker.open(directory, **(SMALL | {"claim_tables": 4})) as broker:
        send(broker, *numbered(3))
        assert all_of(broker) == numbered(3)
        with pytest.raises(shmbroker.LimitReached, match="free claim table"):
            broker.reset_group("audit", to_offset=0, topic="orders", queue_id=0)
        assert all_of(broker) == []


@pytest.mark.crash
@pytest.mark.parametrize(
    "end", [stop_broker, kill_all, lose_memory], ids=["clean-stop", "with-memory", "without-memory"]
)
def test_a_reset_outlives_the_broker_whatever_was_acknowledged_before(
    directory: Path, end: Callable[[Path], None]
) -> None:
    directory.mkdir()
    (directory / "broker.toml").write_text(SETTINGS)
    with serving(directory), shmbroker.open(directory) as broker:
        send(broker, *numbered(20))
        assert all_of(broker) == numbered(20)
        wait_until(lambda: broker.region.progress_records(only_changed=True) == [], "the progress in the log")
        broker.reset_group("audit", to_offset=12, topic="orders", queue_id=0)
        wait_until(lambda: broker.region.get("flushed") == broker.region.get("tail"), "the record on the disk")
        end(directory)
    with serving(directory), shmbroker.open(directory) as broker:
        assert all_of(broker) == numbered(8, 12)


RESET: Final = """
    import sys, shmbroker
    from shmbroker._native._core import failpoint_arm
    broker = shmbroker.open(sys.argv[1])
    failpoint_arm(sys.argv[2], "kill", int(sys.argv[3]))
    broker.reset_group("audit", to_offset=12, topic="orders", queue_id=0)
"""


@pytest.mark.crash
@pytest.mark.parametrize("memory", [True, False], ids=["with-memory", "without-memory"])
@pytest.mark.parametrize(
    ("failpoint", "done"),
    [
        ("claim.remade", False), ("append.copied", False), ("append.effects", False), ("append.published", True),
        ("append.final", True), ("append.unlocked", True), ("claim.begun_anew", True),
    ],
)  # fmt: skip
def test_whoever_resets_and_is_killed_has_done_it_or_not(
    directory: Path, failpoint: str, done: bool, memory: bool
) -> None:
    directory.mkdir()
    (directory / "broker.toml").write_text(SETTINGS)
    with serving(directory), shmbroker.open(directory) as broker:
        send(broker, *numbered(20))
        assert all_of(broker) == numbered(20)
        with Child(RESET, directory, failpoint, 1) as child:
            assert child.wait() == -signal.SIGKILL
        if memory:
            assert all_of(broker) == (numbered(8, 12) if done else [])
            assert broker.reset_group("audit", to_offset=5, topic="orders", queue_id=0)[0].after == 5
            assert all_of(broker) == numbered(15, 5)
            return
        send(broker, b"20")  # whoever appends next brings to an end what the dead has left
        wait_until(lambda: not broker.region.progress_records(only_changed=True), "what was acknowledged recorded")
        wait_until(lambda: broker.region.get("flushed") == broker.region.get("tail"), "all of it on the disk")
        lose_memory(directory)
    with serving(directory), shmbroker.open(directory) as broker:
        assert all_of(broker) == (numbered(9, 12) if done else [b"20"])


@pytest.mark.crash
@pytest.mark.parametrize("stored", [1, 2, 3])
def test_a_member_that_meets_a_half_stored_reset_goes_on_from_the_new_place(directory: Path, stored: int) -> None:
    """It looks for its queues again, and so ends the reset itself: what it knew of them before that is over."""
    directory.mkdir()
    (directory / "broker.toml").write_text(SETTINGS)
    with serving(directory), shmbroker.open(directory) as broker, broker.simple_consumer("audit", ALL) as consumer:
        send(broker, *numbered(20))
        assert sorted(drain(consumer, 20), key=int) == numbered(20)
        with Child(RESET, directory, "effect.stored", stored) as child:
            assert child.wait() == -signal.SIGKILL
        assert sorted(drain(consumer, 8), key=int) == numbered(8, 12)


# ---- the command -----------------------------------------------------------------------------------------------


def test_the_command_says_what_it_does_and_asks_before(tmp_path: Path) -> None:
    directory = tmp_path / "broker"
    lines = "".join(f"{i}\n" for i in range(10)).encode()
    with served(directory):
        command(directory, "topic", "create", "orders", "--queues", "1")
        command(directory, "send", "--topic", "orders", stdin=lines)
        take = ("receive", "-g", "audit", "-t", "orders", "--wait", "0")
        assert command(directory, *take).stdout.split() == [str(i) for i in range(10)]
        reset = ("group", "reset", "audit")
        assert command(directory, *reset, "--skip", stdin=b"n\n").returncode == ExitCode.FINDING
        assert command(directory, *reset, "--yes").returncode == ExitCode.USAGE
        asked = command(directory, *reset, "--to-time", "1h", stdin=b"y\n")
        assert (asked.returncode, asked.stdout.split()[-4:]) == (0, ["orders", "0", "10", "0"])
        assert command(directory, *take).stdout.split() == [str(i) for i in range(10)]
        to_offset = (*reset, "--to-offset", "8", "--topic", "orders", "--queue", "0", "--yes")
        answer = shmbroker_json(directory, *to_offset)
        assert answer == [{"topic": "orders", "queue_id": 0, "before": 10, "after": 8}]
        assert command(directory, *take).stdout.split() == ["8", "9"]
        shmbroker_json(directory, *reset, "--to-time", "1970-01-02", "--yes")
        shmbroker_json(directory, *reset, "--skip", "--yes")
        assert command(directory, *take).stdout == ""
        wrong = command(directory, *reset, "--to-time", "tomorrow", "--yes")
        assert (wrong.returncode, "2026-11-21T10:00" in wrong.stderr) == (ExitCode.USAGE, True)
        future = f"{datetime.now().year + 1}-01-01"  # noqa: DTZ005 - local time, as on the command line
        wrong = command(directory, *reset, "--to-time", future, "--yes")
        assert (wrong.returncode, f"'{future}': lies in the future" in wrong.stderr) == (ExitCode.USAGE, True)
