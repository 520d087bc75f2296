"""What callers without a type checker may pass: refused in words that name the argument, and what it must be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.consuming import ALL, bodies_of
from support.running import QUICK, running

import shmbroker
from shmbroker import Broker, Message, MessageIllegal, NameIllegal, Producer, SimpleConsumer
from shmbroker.message import check_keys, check_tags


class Topic(StrEnum):
    ORDERS = "orders"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with running(tmp_path_factory.mktemp("arguments") / "broker", **QUICK) as opened:
        yield opened


@given(
    text=st.text(max_size=6) | st.text(st.characters(max_codepoint=127)) | st.sampled_from(["*", "a*", "a|b", "\x7f"])
)
def test_short_texts_are_taken_for_tags_and_keys_by_the_same_rules_as_all(text: str) -> None:
    """The native core asks no one about most of them."""

    def outcome(make: Callable[[], str]) -> str:
        try:
            return make()
        except MessageIllegal as error:
            return f"refused: {error}"

    assert outcome(lambda: Message("t", b"x", tags=text).tags) == outcome(lambda: check_tags(text))
    assert outcome(lambda: Message("t", b"x", keys=text).keys) == outcome(lambda: check_keys(text))


GOOD = Message("orders", b"good")
NO_MESSAGE = "must be a Message, not bytes: Message(topic, body) makes one"
SECONDS = "must be seconds, as a float or an int, not str"
NOT_RECEIVED = "message must be one that receive() returned, not str: that object carries the claim"

Call = Callable[[Any, Any], object]  # Any: these are the calls that a type checker refuses
WRONG_TYPES: dict[str, tuple[Call, str]] = {
    "send of no message": (lambda p, _: p.send(b"x"), f"message {NO_MESSAGE}"),
    "send_oneway of no message": (lambda p, _: p.send_oneway(b"x"), f"message {NO_MESSAGE}"),
    "send_async of no message": (lambda p, _: p.send_async(b"x"), f"message {NO_MESSAGE}"),
    "send of nothing": (lambda p, _: p.send(None), "message must be a Message, not NoneType"),
    "send_batch of one message": (
        lambda p, _: p.send_batch(GOOD),
        "messages must be a list of Message, or another iterable, not Message",
    ),
    "send_batch with no message in it": (lambda p, _: p.send_batch([GOOD, b"x"]), f"messages[1] {NO_MESSAGE}"),
    "send_batch of a body": (lambda p, _: p.send_batch(b"x"), "messages[0] must be a Message, not int"),
    "send with a str of seconds": (lambda p, _: p.send(GOOD, timeout="1"), f"timeout {SECONDS}"),
    "send_async with a str of seconds": (lambda p, _: p.send_async(GOOD, timeout="1"), f"timeout {SECONDS}"),
    "send_batch with a str of seconds": (lambda p, _: p.send_batch([GOOD], timeout="1"), f"timeout {SECONDS}"),
    "confirm with a str of seconds": (lambda p, _: p.send(GOOD).confirm("1"), f"timeout {SECONDS}"),
    "a number as sharding key": (
        lambda p, _: p.send(GOOD, sharding_key=7),
        "sharding_key must be a str or bytes, not int",
    ),
    "a number as dedup key": (lambda p, _: p.send(GOOD, dedup_key=7), "dedup_key must be a str or bytes, not int"),
    "a number as selector": (lambda p, _: p.send(GOOD, selector=7), "selector must be a function of the queues"),
    "receive of a str of messages": (lambda _, c: c.receive("1"), "max_messages must be an int, not str"),
    "receive of half a message": (lambda _, c: c.receive(0.5), "max_messages must be an int, not float"),
    "receive with a str of a wait": (lambda _, c: c.receive(1, wait="1"), f"wait {SECONDS}"),
    "receive with no invisible time": (
        lambda _, c: c.receive(1, invisible=None),
        "invisible must be seconds, as a float or an int, not NoneType",
    ),
    "ack of an id": (lambda _, c: c.ack("id"), NOT_RECEIVED),
    "ack of ids": (lambda _, c: c.ack(["id"], durable=True), NOT_RECEIVED),
    "ack of a number": (
        lambda _, c: c.ack(7),
        "messages must be one message that receive() returned, or an iterable of them, not int",
    ),
    "another time for an id": (lambda _, c: c.change_invisible_duration("id", 1.0), NOT_RECEIVED),
    "a str of another time": (lambda _, c: c.change_invisible_duration(GOOD, "1"), f"seconds {SECONDS}"),
}


@pytest.fixture
def producer(broker: Broker) -> Iterator[Producer]:
    with broker.producer("test") as made:
        yield made


@pytest.fixture
def consumer(broker: Broker) -> Iterator[SimpleConsumer]:
    with broker.simple_consumer("arguments", ALL) as made:
        yield made


@pytest.mark.parametrize("what", WRONG_TYPES)
def test_an_argument_of_the_wrong_type_is_named_with_what_it_must_be(
    what: str, producer: Producer, consumer: SimpleConsumer
) -> None:
    call, text = WRONG_TYPES[what]
    with pytest.raises(TypeError, match=re.escape(text)):
        call(producer, consumer)


def test_of_messages_with_a_wrong_one_among_them_none_is_acknowledged(broker: Broker, producer: Producer) -> None:
    producer.send_batch([Message("counted", b"%d" % i) for i in range(3)], queue_id=0)
    with broker.simple_consumer("counting", {"counted": "*"}) as consumer:
        first, second, third = consumer.receive(3)
        mixed: list[Any] = [first, second, "id", third]
        for durable in (False, True):
            with pytest.raises(TypeError, match="not str"):
                consumer.ack(mixed, durable=durable)
        (queue,) = [queue for queue in broker.region.progress() if queue["group"] == "counting" and queue["next"]]
        assert (queue["base"], queue["acked"], queue["held"]) == (0, [], 3)
        consumer.ack([first, second, third])


def test_as_many_messages_as_there_are_may_be_asked_for(broker: Broker, producer: Producer) -> None:
    producer.send(Message("many", b"one"))
    with broker.simple_consumer("many", {"many": "*"}) as consumer:
        received = consumer.receive(10**30, wait=5)
        assert bodies_of(received) == [b"one"]
        consumer.ack(iter(received))


def test_whole_seconds_and_subclasses_of_str_and_bytes_are_as_good_as_the_plain_ones(
    producer: Producer,
) -> None:
    class Body(bytes):
        pass

    message = Message(Topic.ORDERS, Body(b"x"), tags=Topic.ORDERS, keys=Topic.ORDERS, properties={"a": Topic.ORDERS})
    parts = (message.topic, message.body, message.tags, message.keys)
    assert parts == ("orders", b"x", "orders", "orders")
    assert [type(part) for part in parts] == [str, bytes, str, str]
    assert producer.send(message, timeout=1).topic == "orders"


@pytest.mark.parametrize("topic", ["", "a b", "a/b", "x" * 128, "%RETRY%" + "x" * 249, "ü", "nul\0", b"bytes", None])
def test_a_message_to_a_topic_of_an_illegal_name_cannot_be_made(topic: Any) -> None:
    with pytest.raises(NameIllegal, match="topic"):
        Message(topic, b"x")


@pytest.mark.parametrize("topic", ["a", "A-Z_0%|9", "x" * 127, "%RETRY%" + "g" * 120, "%DLQ%" + "g" * 250])
def test_a_message_to_a_topic_of_any_legal_name_can_be_made(topic: str) -> None:
    assert Message(topic, b"x").topic == topic


@pytest.mark.parametrize("body", [b"", bytearray(), memoryview(b"")])
def test_a_message_without_a_body_cannot_be_made(body: Any) -> None:
    with pytest.raises(MessageIllegal, match="the body is empty: a message has at least one byte"):
        Message("orders", body)


@pytest.mark.parametrize("tags", ["a | b", "*", " a", "a ", "a\nb"])
def test_what_is_no_tag_is_refused_with_the_rule(tags: str) -> None:
    rule = "one tag, of printable characters, without '|', not '*', with no blank before or behind"
    with pytest.raises(MessageIllegal, match=re.escape(f"tags = {tags!r}: {rule}")):
        Message("orders", b"x", tags=tags)


def test_a_tag_with_a_blank_inside_is_one_that_a_subscription_can_name(broker: Broker, producer: Producer) -> None:
    producer.send_batch([Message("tagged", b"paid", tags="paid late"), Message("tagged", b"other", tags="paid")])
    with broker.simple_consumer("tags", {"tagged": "refunded || paid late"}) as consumer:
        received = consumer.receive(8, wait=5.0)
        assert [(message.body, message.tags) for message in received] == [(b"paid", "paid late")]
        consumer.ack(received)


def test_properties_that_are_no_mapping_are_refused() -> None:
    names: Any = ["a"]
    with pytest.raises(MessageIllegal, match="properties must be a mapping of str to str, not list"):
        Message("orders", b"x", properties=names)


@pytest.mark.parametrize("timeout", ["1", None, -1, float("nan")])
def test_open_takes_a_timeout_in_seconds(tmp_path: Path, timeout: Any) -> None:
    with pytest.raises(shmbroker.BadRequest, match=re.escape(f"timeout = {timeout!r}: must be seconds, 0 or more")):
        shmbroker.open(tmp_path / "broker", timeout=timeout)
    assert not (tmp_path / "broker").exists()
