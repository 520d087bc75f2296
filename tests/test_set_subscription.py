"""``group set-subscription``: all members of a group switch at once, by a record of the log (R25)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from support.command import shmbroker as command
from support.command import shmbroker_json
from support.consuming import ALL, asleep, bodies_of, send
from support.processes import SMALL, Child, kill_all, stop_broker
from support.running import lose_memory, running
from support.served import SETTINGS, served, serving
from support.waiting import wait_until

import shmbroker
from shmbroker.broker import Broker
from shmbroker.tools.exit_codes import ExitCode

PAID: Final = {"orders": "paid"}

# A member that receives and acknowledges one message on each line, and says its body.
MEMBER: Final = """
    import sys, shmbroker
    consumer = shmbroker.open(sys.argv[1]).simple_consumer("audit", {"orders": "*"})
    print("ready")
    for line in sys.stdin:
        for message in consumer.receive(wait=10.0):
            consumer.ack(message)
            print(message.body.decode())
"""


def subscription_of(broker: Broker, group: str = "audit") -> tuple[str, bool]:
    return next(
        (known["subscription"], known["subscription_set"]) for known in broker.groups() if known["name"] == group
    )


def test_every_live_member_takes_it_over_at_its_next_receive(directory: Path) -> None:
    with (
        shmbroker.open(directory, **SMALL) as broker,
        Child(MEMBER, directory) as other,
        broker.simple_consumer("audit", ALL) as consumer,
    ):
        assert other.read_line() == "ready"
        send(broker, b"before", tags="refunded")
        assert bodies_of(consumer.receive()) == [b"before"]
        broker.set_subscription("audit", PAID)
        send(broker, b"skipped", tags="refunded")
        send(broker, b"first", tags="paid")
        send(broker, b"skipped, too", tags="refunded")
        send(broker, b"second", tags="paid")
        other.write_line()
        assert other.read_line() == "first"
        (message,) = consumer.receive(10)
        assert message.body == b"second"
        consumer.ack(message)


def test_a_member_that_waits_takes_it_over_as_well(broker: Broker) -> None:
    found: list[bytes] = []
    with broker.simple_consumer("audit", ALL) as consumer:
        thread = threading.Thread(target=lambda: found.extend(bodies_of(consumer.receive(wait=20.0))))
        thread.start()
        wait_until(lambda: asleep(broker), "the member asleep")
        broker.set_subscription("audit", {"refunds": "*"})
        with broker.producer("test") as producer:
            producer.send(shmbroker.Message("orders", b"no more"))
            producer.send(shmbroker.Message("refunds", b"from now on"))
        thread.join(10.0)
        assert found == [b"from now on"]


def test_what_was_received_before_can_still_be_acknowledged(broker: Broker) -> None:
    send(broker, b"old", b"older")
    with broker.simple_consumer("audit", ALL) as consumer:
        old = consumer.receive(2)
        broker.set_subscription("audit", {"refunds": "*"})
        assert consumer.receive() == []
        consumer.ack(old)
        assert sum(table["base"] for table in broker.region.progress() if table["topic"] == "orders") == 2


def test_whoever_subscribes_differently_is_refused_from_then_on_with_and_without_live_members(broker: Broker) -> None:
    with broker.simple_consumer("audit", ALL):
        broker.set_subscription("audit", PAID)
        with pytest.raises(
            shmbroker.SubscriptionConflict, match=r'set to subscribe to \{"orders":"paid"\}.*"orders":"\*"'
        ):
            broker.simple_consumer("audit", ALL)
        broker.simple_consumer("audit", PAID).close()
    with pytest.raises(shmbroker.SubscriptionConflict, match="set-subscription audit"):
        broker.simple_consumer("audit", ALL)
    broker.set_subscription("audit", ALL)
    broker.simple_consumer("audit", ALL).close()


@pytest.mark.crash
@pytest.mark.parametrize(
    "end", [stop_broker, kill_all, lose_memory], ids=["clean-stop", "with-memory", "without-memory"]
)
def test_it_outlives_the_broker_and_members_that_had_not_noticed_follow(
    directory: Path, end: Callable[[Path], None]
) -> None:
    directory.mkdir()
    (directory / "broker.toml").write_text(SETTINGS)
    with ExitStack() as stack:
        with serving(directory):
            broker = stack.enter_context(shmbroker.open(directory))
            consumer = stack.enter_context(broker.simple_consumer("audit", ALL))
            broker.set_subscription("audit", {"orders": "refunded"})
            broker.set_subscription("audit", PAID)
            wait_until(lambda: broker.region.get("flushed") == broker.region.get("tail"), "the record on the disk")
            end(directory)
        with serving(directory):
            assert subscription_of(broker) == ('{"orders":"paid"}', True)
            with pytest.raises(shmbroker.SubscriptionConflict):
                broker.simple_consumer("audit", ALL)
            send(broker, b"skipped", tags="refunded")
            send(broker, b"wanted", tags="paid")
            messages = consumer.receive(wait=10.0)
            assert bodies_of(messages) == [b"wanted"]
            consumer.ack(messages)
            stack.close()


@pytest.mark.crash
@pytest.mark.parametrize(
    ("failpoint", "wanted"),
    [("append.copied", ("*", False)), ("append.effects", ("*", False)), ("append.published", ("paid", True))],
)
def test_whoever_sets_it_and_is_killed_has_set_it_or_not(
    directory: Path, failpoint: str, wanted: tuple[str, bool]
) -> None:
    source = """
        import sys, shmbroker
        from shmbroker._native._core import failpoint_arm
        broker = shmbroker.open(sys.argv[1])
        failpoint_arm(sys.argv[2], "kill", 1)
        broker.set_subscription("audit", {"orders": "paid"})
    """
    with running(directory) as broker, broker.simple_consumer("audit", ALL) as consumer:
        with Child(source, directory, failpoint) as child:
            assert child.wait() == -signal.SIGKILL
        send(broker, b"one", tags="refunded")
        send(broker, b"two", tags="paid")
        tags, was_set = wanted
        assert bodies_of(consumer.receive(2)) == ([b"two"] if was_set else [b"one", b"two"])
        assert subscription_of(broker) == (f'{{"orders":"{tags}"}}', was_set)


def test_nonsense_is_refused_and_nothing_is_set(broker: Broker) -> None:
    with broker.simple_consumer("audit", ALL):
        before = broker.groups()
        refused: list[tuple[str, Any, type[Exception]]] = [
            ("nobody", PAID, shmbroker.GroupNotExist),
            ("audit", {}, shmbroker.BadRequest),
            ("audit", {"orders": "a | b"}, shmbroker.BadRequest),
            ("audit", {"no topic": "*"}, shmbroker.NameIllegal),
            ("audit", {"orders": " || ".join(f"t{i}" for i in range(65))}, shmbroker.BadRequest),
            ("audit", {f"topic-{i}" * 10: "*" for i in range(30)}, shmbroker.BadRequest),
        ]
        for group, subscriptions, error in refused:
            with pytest.raises(error):
                broker.set_subscription(group, subscriptions)
        assert broker.groups() == before


def test_the_command_sets_one_expression_for_all_topics_or_one_for_each(tmp_path: Path) -> None:
    directory = tmp_path / "broker"
    with served(directory):
        assert command(directory, "group", "set-subscription", "audit", "-t", "orders").returncode == ExitCode.USAGE
        command(directory, "topic", "create", "orders")
        command(directory, "receive", "-g", "audit", "-t", "orders", "--wait", "0")
        done = command(directory, "group", "set-subscription", "audit", "--topic", "orders", "--tags", "b||a")
        assert (done.returncode, done.stdout) == (0, "audit subscribes to orders: b||a now\n")
        assert shmbroker_json(directory, "group", "show", "audit")["subscription"] == {"orders": "a || b"}
        several = ("-t", "orders", "-t", "refunds")
        shmbroker_json(directory, "group", "set-subscription", "audit", *several, "--tags", "x")
        assert shmbroker_json(directory, "group", "show", "audit")["subscription"] == {"orders": "x", "refunds": "x"}
        shmbroker_json(directory, "group", "set-subscription", "audit", *several, "--tags", "x", "--tags", "*")
        assert shmbroker_json(directory, "group", "show", "audit")["subscription"] == {"orders": "x", "refunds": "*"}
        three = command(directory, "group", "set-subscription", "audit", *several, *("--tags", "x") * 3)
        assert (three.returncode, "one for all" in three.stderr) == (ExitCode.USAGE, True)
