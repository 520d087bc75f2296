"""``shmbroker group set-retry`` and ``shmbroker dlq``: dead letters from the command line, compared by content."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import shmbroker, shmbroker_json
from support.consuming import ALL
from support.failing import GROUP, at_once
from support.processes import Child
from support.running import QUICK, running

from shmbroker import Message, ReceivedMessage, RetryPolicy
from shmbroker.broker import Broker
from shmbroker.retry import parse_policy
from shmbroker.send_back import SendBack
from shmbroker.tools.exit_codes import ExitCode


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with running(tmp_path / "broker", **QUICK) as opened:
        opened.create_topic("orders", queues=1)
        yield opened


def test_a_retry_policy_is_set_and_shown(broker: Broker) -> None:
    broker.create_group(GROUP, at_once(1))
    words = "group set-retry audit exponential --initial 1s --multiplier 3 --longest 10m --max 8".split()
    answer = shmbroker_json(broker.directory, *words)
    policy = RetryPolicy("exponential", 8, initial=1.0, multiplier=3.0, longest=600.0)
    assert parse_policy(broker.region.retry_text(GROUP)) == policy
    assert RetryPolicy(**answer["retry"]) == policy
    assert "8 retries after 1s, times 3, at most 10m" in shmbroker(broker.directory, "group", "show", GROUP).stdout
    shmbroker_json(broker.directory, "group", "set-retry", GROUP, "table", "--delays", "0s 1.5s 1m", "--max", "3")
    assert parse_policy(broker.region.retry_text(GROUP)) == RetryPolicy("table", 3, delays=(0.0, 1.5, 60.0))
    assert shmbroker_json(broker.directory, "group", "show", GROUP)["retry"]["delays"] == [0.0, 1.5, 60.0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["audit", "table"], "table: --delays says which, as in --delays '0s 5s 1m'"),
        (["audit", "levels", "--max", "251"], "max_retries = 251: an integer from 0 to 250"),
        (["audit", "exponential", "--initial", "5"], "delay '5': a number and ms, s, m, h or d"),
        (["nobody", "levels"], "group 'nobody' does not exist"),
    ],
)
def test_a_policy_that_cannot_be_meant_changes_nothing(broker: Broker, words: list[str], says: str) -> None:
    broker.create_group(GROUP, at_once(1))
    done = shmbroker(broker.directory, "group", "set-retry", *words)
    assert done.returncode == ExitCode.USAGE
    assert says in done.stderr
    assert parse_policy(broker.region.retry_text(GROUP)) == at_once(1)


def bury(broker: Broker, *bodies: bytes) -> list[str]:
    """Messages that the group could not deal with; their ids."""
    broker.create_group(GROUP, at_once(1))
    with broker.producer("test") as producer, broker.simple_consumer(GROUP, ALL) as consumer:
        send_back = SendBack(broker, consumer)
        ids = []
        for body in bodies:
            sent = producer.send(Message("orders", body, tags="paid", keys="k1", properties={"trace": "t1"}))
            ids.append(sent.message_id)
            for error in ("first", "last"):
                (message,) = consumer.receive(1, wait=10.0)
                send_back.later(message, error=f"{error} of {body.decode()}")
    return ids


def offsets(broker: Broker) -> list[int]:
    return [letter["offset"] for letter in shmbroker_json(broker.directory, "dlq", "list", GROUP)]


def test_dead_letters_are_listed_and_shown_with_their_origin(broker: Broker) -> None:
    assert shmbroker(broker.directory, "dlq", "list").stdout == "no dead letters\n"
    ids = bury(broker, b"1", b"2")
    assert shmbroker_json(broker.directory, "dlq", "list") == [{"group": GROUP, "letters": 2}]
    listed = shmbroker_json(broker.directory, "dlq", "list", GROUP)
    assert [(letter["offset"], letter["message_id"]) for letter in listed] == list(enumerate(ids))
    assert {(letter["topic"], letter["deliveries"]) for letter in listed} == {("orders", 2)}
    assert [letter["last_error"] for letter in listed] == ["last of 1", "last of 2"]
    for name in ("1", ids[1]):
        (letter,) = shmbroker_json(broker.directory, "dlq", "show", GROUP, name)
        assert (letter["body"], letter["first_error"], letter["last_error"]) == ("2", "first of 2", "last of 2")
        assert (letter["tags"], letter["keys"], letter["properties"]) == ("paid", "k1", {"trace": "t1"})
    assert "last of 1" in shmbroker(broker.directory, "dlq", "list", GROUP).stdout
    assert "last of 2" in shmbroker(broker.directory, "dlq", "show", GROUP, "1").stdout


def test_a_letter_sent_again_is_a_new_message_for_its_group_alone(broker: Broker) -> None:
    ids = bury(broker, b"1", b"2", b"3")
    with broker.simple_consumer("other", ALL) as consumer:
        consumer.ack(consumer.receive(3, wait=10.0))
        answer = shmbroker_json(broker.directory, "dlq", "resend", GROUP, "1", ids[2])
        assert answer == {"group": GROUP, "resent": 2, "to": None, "status": "SEND_OK"}
        assert offsets(broker) == [0]
        assert consumer.receive(1) == []
    with broker.simple_consumer(GROUP, ALL) as consumer:
        messages = consumer.receive(3, wait=10.0)
        assert [(m.body, m.message_id, m.delivery_attempt) for m in messages] == [(b"2", ids[1], 1), (b"3", ids[2], 1)]
        for message in messages:
            assert (message.topic, message.tags, message.keys) == ("orders", "paid", "k1")
            assert message.properties.keys() == {"trace", "RETRY_TOPIC", "ORIGIN_MESSAGE_ID"}
        SendBack(broker, consumer).later(messages[0])  # its deliveries are counted anew
        consumer.ack(messages[1])
        (again,) = consumer.receive(3, wait=10.0)
        assert (again.body, again.delivery_attempt) == (b"2", 2)


def test_letters_are_sent_to_another_topic_as_they_were_sent_first(broker: Broker) -> None:
    bury(broker, b"1", b"2")
    words = ["dlq", "resend", GROUP, "--all", "--to", "repaired"]
    refused = shmbroker(broker.directory, *words)
    assert (refused.returncode, offsets(broker)) == (ExitCode.USAGE, [0, 1])
    assert "topic 'repaired' does not exist" in refused.stderr
    broker.create_topic("repaired", queues=2)
    assert shmbroker_json(broker.directory, *words)["resent"] == 2
    with broker.simple_consumer("other", {"repaired": "paid"}) as consumer:
        messages: list[ReceivedMessage] = []
        while len(messages) < 2:
            messages += consumer.receive(2, wait=10.0)
    assert sorted(message.body for message in messages) == [b"1", b"2"]
    assert [message.properties for message in messages] == [{"trace": "t1"}] * 2


def test_letters_are_given_up_for_good(broker: Broker) -> None:
    ids = bury(broker, b"1", b"2", b"3")
    asked = shmbroker(broker.directory, "dlq", "purge", GROUP, "--all", stdin=b"n\n")
    assert (asked.returncode, offsets(broker)) == (ExitCode.FINDING, [0, 1, 2])
    assert shmbroker_json(broker.directory, "dlq", "purge", GROUP, ids[1], "--yes") == {"group": GROUP, "purged": 1}
    assert offsets(broker) == [0, 2]
    assert shmbroker(broker.directory, "dlq", "purge", GROUP, "1", "--yes").returncode == ExitCode.FINDING
    assert shmbroker_json(broker.directory, "dlq", "purge", GROUP, "--all", "--yes")["purged"] == 2
    assert offsets(broker) == []
    assert shmbroker_json(broker.directory, "dlq", "list") == []  # the group has none any more
    assert shmbroker_json(broker.directory, "dlq", "purge", GROUP, "--all", "--yes")["purged"] == 0


def test_letters_that_do_not_exist_are_named_and_the_others_dealt_with(broker: Broker) -> None:
    ids = bury(broker, b"1", b"2", b"3")
    unknown = "0" * 32
    for words, left in (
        (["show", "0", ids[1]], [0, 1, 2]),
        (["resend", "1"], [0, 2]),
        (["purge", "--yes", ids[0]], [2]),
        (["purge", "--yes"], [2]),
        (["resend"], [2]),
        (["show"], [2]),
    ):
        done = shmbroker(broker.directory, "dlq", words[0], GROUP, "99", *words[1:], unknown)
        assert (done.returncode, offsets(broker)) == (ExitCode.FINDING, left), (words, done.stderr)
        told = re.search(r"group audit has no such dead letter(?:, or another has it in hand)?: (.*)", done.stderr)
        assert told is not None, done.stderr
        assert told[1] == f"99, {unknown}"


def test_a_group_without_dead_letters_has_an_empty_list_of_them(broker: Broker) -> None:
    broker.create_group(GROUP)
    assert offsets(broker) == []
    listed = shmbroker(broker.directory, "dlq", "list", GROUP)
    assert (listed.returncode, listed.stdout) == (ExitCode.OK, f"no dead letters of {GROUP}\n")


def test_dead_letters_are_no_lag_of_their_group(broker: Broker) -> None:
    bury(broker, b"1", b"2")
    shmbroker_json(broker.directory, "dlq", "resend", GROUP, "0")
    (shown,) = shmbroker_json(broker.directory, "group", "list")
    assert (shown["lag_messages"], shown["in_flight"]) == (1, 0)  # the one that waits in %RETRY%


def test_group_show_does_not_say_that_a_group_no_longer_subscribes_to_its_own_retries(broker: Broker) -> None:
    """Its members read them without subscribing."""
    bury(broker, b"1")
    queues = shmbroker_json(broker.directory, "group", "show", GROUP)["queues"]
    assert {queue["topic"]: queue["subscribed"] for queue in queues} == {"orders": True, f"%RETRY%{GROUP}": True}
    assert "not subscribed" not in shmbroker(broker.directory, "group", "show", GROUP).stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["list", "nobody"], ExitCode.USAGE, "group 'nobody' does not exist"),
        (["resend", GROUP, "--all"], ExitCode.USAGE, "group 'audit' has never had a dead letter"),
        (["resend", GROUP], ExitCode.USAGE, "name letters by offset or message id, or give --all"),
        (["purge", GROUP, "1", "--all"], ExitCode.USAGE, "name letters by offset or message id, or give --all"),
        (["show", GROUP, "one"], ExitCode.USAGE, "'one' is neither an offset nor a message id"),
    ],
)
def test_what_is_not_there_or_not_said_is_refused(broker: Broker, words: list[str], code: int, says: str) -> None:
    done = shmbroker(broker.directory, "dlq", *words)
    assert (done.returncode, says in done.stderr) == (code, True), done.stderr


RESENDER = """
    import sys, shmbroker
    letters = shmbroker.open(sys.argv[1]).dead_letters("audit")
    print("ready")
    sys.stdin.readline()
    (message,) = letters.receive(1, wait=10.0)
    letters.resend(message)
"""


@pytest.mark.crash
@pytest.mark.parametrize(
    ("edge", "sent"), [("append.copied", False), ("append.published", True), ("retry.moved", True)]
)
def test_a_kill_while_a_letter_is_sent_again_leaves_the_letter_or_the_message(
    broker: Broker, edge: str, sent: bool
) -> None:
    bury(broker, b"1")
    broker.dead_letters(GROUP).close()  # their own group is there
    failpoint = {"SHMBROKER_FAILPOINTS": f"client/{edge}=kill"}
    with Child(RESENDER, broker.directory, environment=failpoint) as child:
        assert child.read_line() == "ready"
        child.write_line()
        assert child.wait() == -signal.SIGKILL
    assert offsets(broker) == ([] if sent else [0])
    with broker.simple_consumer(GROUP, ALL) as consumer:
        assert [message.body for message in consumer.receive(2)] == ([b"1"] if sent else [])


def test_dead_letters_that_are_done_with_stay_so_when_their_group_is_deleted(broker: Broker) -> None:
    bury(broker, b"sent again", b"given up", b"kept")
    shmbroker_json(broker.directory, "dlq", "resend", GROUP, "0")
    shmbroker_json(broker.directory, "dlq", "purge", GROUP, "1", "--yes")
    broker.delete_group(GROUP)
    assert offsets(broker) == [2]
    with broker.dead_letters(GROUP) as letters:
        assert [message.body for message in letters.receive(9)] == [b"kept"]
    assert [group["name"] for group in broker.groups()] == ["%DLQ%" + GROUP]
    assert shmbroker_json(broker.directory, "group", "list") == []
