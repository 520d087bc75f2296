"""Consumers that subscribe with SQL expressions, against a real broker: from ring and files, in groups, by commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.command import shmbroker as command
from support.command import shmbroker_json
from support.consuming import bodies_of, drain, numbered
from support.failing import at_once
from support.listening import Heard
from support.served import served
from support.waiting import wait_until

import shmbroker
from shmbroker import Message, sql
from shmbroker.broker import Broker
from shmbroker.send_back import SendBack
from shmbroker.tools.exit_codes import ExitCode

LARGE = "amount >= 90 AND region = 'EU'"


def send_amounts(broker: Broker, count: int, *, padding: int = 0) -> None:
    """Messages with amounts from 0 to 99 again and again, every second one of them from the EU."""
    messages = [
        Message(
            "orders",
            b"%d" % i + b"." * padding,
            tags="paid",
            keys=f"order-{i}",
            properties={"note": "'\\" + "x" * (i % 50), "amount": str(i % 100), "region": "EU" if i % 2 else "US"},
        )
        for i in range(count)
    ]
    with broker.producer("test") as producer:
        for start in range(0, count, 50):
            producer.send_batch(messages[start : start + 50], queue_id=0)


def large(count: int) -> list[bytes]:
    return [b"%d" % i for i in range(count) if i % 100 >= 90 and i % 2]


def base_of(broker: Broker, group: str) -> int:
    (base,) = (table["base"] for table in broker.region.progress() if table["group"] == group and not table["queue_id"])
    return int(base)


def test_only_what_the_expression_accepts_is_delivered_and_the_rest_is_done_with(broker: Broker) -> None:
    send_amounts(broker, 1000)
    with broker.simple_consumer("audit", {"orders": sql(LARGE)}) as consumer:
        assert drain(consumer, 50) == large(1000)
        assert consumer.receive(10) == []
        assert base_of(broker, "audit") == 1000
    with broker.simple_consumer("audit", {"orders": sql(LARGE)}) as consumer:
        assert consumer.receive(10) == []


def test_what_was_filtered_out_never_counts_as_delivered(broker: Broker) -> None:
    send_amounts(broker, 100)
    with broker.simple_consumer("audit", {"orders": sql(LARGE)}) as consumer:
        held = consumer.receive(100)
        assert bodies_of(held) == large(100)
        (table,) = [t for t in broker.region.progress() if t["group"] == "audit" and t["queue_id"] == 0]
        assert table["held"] == len(held)
        consumer.change_invisible_duration(held[0], 0)
        (again,) = consumer.receive(10)
        assert (again.body, again.delivery_attempt) == (held[0].body, 2)


def test_a_consumer_behind_the_ring_filters_what_the_files_have(broker: Broker) -> None:
    ring = broker.config.layout.ring_bytes
    count = 2 * ring // 1024 // 50 * 50
    send_amounts(broker, count, padding=1024)
    wait_until(lambda: broker.region.get("dispatched") > ring, "the files have what the ring has not")
    with broker.simple_consumer("audit", {"orders": sql(LARGE)}) as consumer:
        expected = large(count)
        assert [body.rstrip(b".") for body in drain(consumer, len(expected))] == expected
        assert consumer.receive(10) == []
        assert base_of(broker, "audit") == count


def test_tags_keys_and_properties_are_asked_together(broker: Broker) -> None:
    send_amounts(broker, 20)
    with broker.simple_consumer("audit", {"orders": sql("TAGS = 'paid' AND KEYS ENDSWITH '-7' AND amount = 7")}) as one:
        assert drain(one, 1) == [b"7"]
        assert one.receive(10) == []


def test_a_message_without_properties_is_judged_too(broker: Broker) -> None:
    with broker.producer("test") as producer:
        producer.send_batch([Message("orders", body) for body in numbered(3)], queue_id=0)
    with broker.simple_consumer("none", {"orders": sql("amount IS NULL")}) as consumer:
        assert drain(consumer, 3) == numbered(3)
    with broker.simple_consumer("some", {"orders": sql("amount > 0")}) as consumer:
        assert consumer.receive(10) == []
        assert base_of(broker, "some") == 3


def test_one_topic_by_tags_and_another_by_an_expression(broker: Broker) -> None:
    send_amounts(broker, 100)
    with broker.producer("test") as producer:
        producer.send(Message("refunds", b"refund", tags="bank"))
        producer.send(Message("refunds", b"not this", tags="cash"))
    with broker.simple_consumer("audit", {"orders": sql(LARGE), "refunds": "bank"}) as consumer:
        assert sorted(drain(consumer, 6)) == sorted([*large(100), b"refund"])
        assert consumer.receive(10) == []


def test_a_push_consumer_selects_alike(broker: Broker) -> None:
    heard = Heard()
    with broker.push_consumer("audit", heard, {"orders": sql(LARGE)}):
        send_amounts(broker, 500)
        assert sorted(heard.wait(25)) == sorted(large(500))
        wait_until(lambda: base_of(broker, "audit") == 500, "everything else passed over")


def test_a_retry_is_not_filtered_again(broker: Broker) -> None:
    broker.create_group("audit", at_once(5))
    once = sql("amount = 7 AND RETRY_TOPIC IS NULL")  # a property that the retry has
    with broker.simple_consumer("audit", {"orders": once}) as consumer:
        send_amounts(broker, 20)
        (message,) = consumer.receive(10, wait=5.0)
        SendBack(broker, consumer).later(message)
        (again,) = consumer.receive(10, wait=5.0)
        assert (again.body, again.delivery_attempt) == (b"7", 2)
        assert (once.accepts(message), once.accepts(again)) == (True, False)


# ---- groups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [sql("amount > 90"), "*", "amount >= 90 AND region = 'EU'"])
def test_members_with_different_expressions_are_refused(broker: Broker, other: Any) -> None:
    with (
        broker.simple_consumer("audit", {"orders": sql(LARGE)}),
        pytest.raises(shmbroker.SubscriptionConflict, match=r"amount >= 90 AND region = 'EU'"),
    ):
        broker.simple_consumer("audit", {"orders": other})


def test_members_whose_expressions_differ_in_layout_only_are_alike(broker: Broker) -> None:
    with (
        broker.simple_consumer("audit", {"orders": sql(LARGE)}),
        broker.simple_consumer("audit", {"orders": sql("amount>=90 -- much\n and region='EU'")}) as second,
    ):
        send_amounts(broker, 100)
        assert drain(second, 5) == large(100)


def test_a_live_member_takes_an_expression_over_and_gives_it_up_again(broker: Broker) -> None:
    with broker.simple_consumer("audit", {"orders": "*"}) as consumer:
        broker.set_subscription("audit", {"orders": sql(LARGE)})
        send_amounts(broker, 100)
        assert drain(consumer, 5) == large(100)
        assert consumer.receive(10) == []
        broker.set_subscription("audit", {"orders": "*"})
        send_amounts(broker, 10)
        assert drain(consumer, 10) == numbered(10)


def test_an_expression_that_was_set_stands_after_a_restart(tmp_path: Path) -> None:
    with shmbroker.open(tmp_path / "broker") as broker, broker.simple_consumer("audit", {"orders": "*"}):
        broker.set_subscription("audit", {"orders": sql(LARGE)})
    with shmbroker.open(tmp_path / "broker") as broker:
        (group,) = broker.groups()
        assert group["subscription"] == json.dumps({"orders": {"sql": LARGE}}, separators=(",", ":"))
        with pytest.raises(shmbroker.SubscriptionConflict, match="was set to subscribe"):
            broker.simple_consumer("audit", {"orders": "*"})
        broker.simple_consumer("audit", {"orders": sql(LARGE)}).close()


def test_an_expression_too_long_for_a_group_is_refused_with_its_length(broker: Broker) -> None:
    longest = sql(f"a = '{'x' * 2000}'")
    broker.simple_consumer("audit", {"orders": longest}).close()
    with pytest.raises(shmbroker.BadRequest, match="takes 2073 bytes as JSON, at most 2047 fit"):
        broker.simple_consumer("audit", {"orders": sql(f"a = '{'x' * 2046}'")})


def test_what_is_neither_tags_nor_an_expression_is_refused(broker: Broker) -> None:
    wrong: Any = {"orders": {"sql": "a = 1"}}
    with pytest.raises(shmbroker.BadRequest, match=r"by a tag expression or by shmbroker.sql"):
        broker.simple_consumer("audit", wrong)


# ---- commands --------------------------------------------------------------------------------------------------


def test_the_commands_take_an_expression(tmp_path: Path) -> None:
    directory = tmp_path / "broker"
    with served(directory):
        with shmbroker.open(directory) as broker:
            send_amounts(broker, 100)
        receive = ("receive", "-g", "audit", "-t", "orders", "--wait", "0")
        done = command(directory, *receive, "--sql", LARGE, "--batch", "10")
        assert done.stdout.encode().split() == large(100)
        wrong = command(directory, *receive, "--sql", "amount == 5")
        assert (wrong.returncode, "column 9" in wrong.stderr) == (ExitCode.USAGE, True), wrong.stderr
        assert command(directory, *receive, "--sql", LARGE, "--tags", "x").returncode == ExitCode.USAGE
        set_to = command(directory, "group", "set-subscription", "audit", "-t", "orders", "--sql", "amount=  5")
        assert (set_to.returncode, set_to.stdout) == (0, "audit subscribes to orders: SQL amount = 5 now\n")
        shown = shmbroker_json(directory, "group", "show", "audit")["subscription"]
        assert shown == {"orders": {"sql": "amount = 5"}}
        assert "orders: SQL amount = 5" in command(directory, "group", "show", "audit").stdout
