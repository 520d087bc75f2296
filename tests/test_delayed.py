"""Delayed messages as a producer sends them and a consumer gets them (RocketMQ's rows 42, 46 and 47)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.consuming import ALL, bodies_of
from support.producing import stopped_flusher
from support.running import log_records, running
from support.waiting import wait_until

from shmbroker import Message, SendResult, SendStatus
from shmbroker.broker import Broker
from shmbroker.config import Config
from shmbroker.errors import ConfigError, MessageIllegal, MessageTooLarge
from shmbroker.naming import BrokerPaths
from shmbroker.record import RecordKind
from shmbroker.tools.stored_messages import StoredMessages

HOUR = 3600.0


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with running(tmp_path / "data", message_delay_level="1s 5m 2h 3d") as opened:
        yield opened


def due_of(broker: Broker, result: SendResult) -> float:
    """Seconds between the send of a delayed message and the time at which its record says it is due."""
    from shmbroker.record import decode_record

    raw = broker.region.read_raw(result.position)
    assert raw is not None
    record = decode_record(raw, result.position)
    assert record.kind == RecordKind.TIMER
    return (record.queue_offset - record.born_ns) / 1e9


def wait_indexed(broker: Broker, *, wanted: bool) -> None:
    end = broker.region.get("tail")
    wait_until(lambda: not wanted or broker.region.get("indexed") >= end, "the key index")


@pytest.mark.parametrize("how", ["delay", "timedelta", "deliver_at", "datetime", "local datetime", "level"])
def test_a_delayed_message_comes_when_it_is_due_and_not_before(broker: Broker, how: str) -> None:
    now = time.time()
    at = now + 1
    local = datetime.fromtimestamp(at)  # noqa: DTZ006 - a datetime without a time zone is local time
    delayed: dict[str, dict[str, Any]] = {
        "delay": {"delay": 1.0},
        "timedelta": {"delay": timedelta(seconds=1)},
        "deliver_at": {"deliver_at": at},
        "datetime": {"deliver_at": datetime.fromtimestamp(at, UTC)},
        "local datetime": {"deliver_at": local},
        "level": {"delay_level": 1},
    }
    with broker.producer("billing") as producer, broker.simple_consumer("audit", ALL) as consumer:
        message = Message("orders", b"later", tags="paid", keys="k1 k2", properties={"a": "b"}, **delayed[how])
        sent = producer.send(message)
        producer.send(Message("orders", b"now"))
        assert sent.status is SendStatus.SEND_OK
        assert bodies_of(consumer.receive(32, wait=0.5)) == [b"now"]
        [received] = consumer.receive(32, wait=10.0)
        came = time.time()
        assert (received.body, received.tags, received.keys) == (b"later", "paid", "k1 k2")
        assert (received.properties, received.message_id) == ({"a": "b"}, sent.message_id)
        assert (received.queue_id, received.delivery_attempt) == (sent.queue_id, 1)
        assert abs(received.born_timestamp - now) < 1
        assert came >= at - 1e-6  # rounding of a datetime
        consumer.ack(received)


def test_delay_levels_are_those_of_the_setting(broker: Broker) -> None:
    with broker.producer("billing") as producer:
        levels = [due_of(broker, producer.send(Message("orders", b"x", delay_level=n))) for n in (1, 2, 3, 4)]
        assert levels == [1, 300, 7200, 3 * 86_400]
        with pytest.raises(MessageIllegal, match="delay_level = 5: message_delay_level of this broker has 4 levels"):
            producer.send(Message("orders", b"x", delay_level=5))


def test_rocketmqs_18_levels_are_the_default() -> None:
    assert Config().runtime.delay_levels == (
        1.0, 5, 10, 30, 60, 120, 180, 240, 300, 360, 420, 480, 540, 600, 1200, 1800, 3600, 7200,
    )  # fmt: skip


@pytest.mark.parametrize("levels", ["", "5", "1s soon", "41d", "1s,2s", "-1s"])
def test_a_setting_that_names_no_delays_is_refused(levels: str) -> None:
    with pytest.raises(ConfigError, match="message_delay_level"):
        Config.of({"message_delay_level": levels})


@pytest.mark.parametrize(
    "delayed",
    [{"delay": 0}, {"delay_level": 0}, {"deliver_at": 1.0}, {"deliver_at": datetime(2020, 1, 1, tzinfo=UTC)}],
)
def test_what_is_due_already_is_an_ordinary_message(broker: Broker, delayed: dict[str, Any]) -> None:
    with broker.producer("billing") as producer, broker.simple_consumer("audit", ALL) as consumer:
        sent = producer.send(Message("orders", b"now", **delayed))
        assert bodies_of(consumer.receive(wait=0.0)) == [b"now"]
        assert (sent.recall_handle, sent.recall()) == (None, False)


@pytest.mark.parametrize(
    ("delayed", "why"),
    [
        ({"delay": -1}, "delay = -1"),
        ({"delay": float("nan")}, "delay = nan"),
        ({"delay": True}, "delay = True"),
        ({"delay": "1s"}, "delay = '1s'"),
        ({"delay": timedelta(seconds=-1)}, "delay = -1.0"),
        ({"delay_level": -1}, "delay_level = -1"),
        ({"delay_level": 1.0}, "delay_level = 1.0"),
        ({"deliver_at": "tomorrow"}, "deliver_at = 'tomorrow'"),
        ({"deliver_at": float("inf")}, "deliver_at = inf"),
        ({"delay": 1, "delay_level": 1}, "give one of delay_level, delay and deliver_at"),
    ],
)
def test_a_senseless_delay_is_refused_where_the_message_is_made(delayed: dict[str, Any], why: str) -> None:
    with pytest.raises(MessageIllegal) as refusal:
        Message("orders", b"x", **delayed)
    assert why in str(refusal.value)


def test_more_than_40_days_are_refused_by_the_send(broker: Broker) -> None:
    days = 86_400.0
    with broker.producer("billing") as producer:
        assert due_of(broker, producer.send(Message("orders", b"x", delay=40 * days))) == 40 * days
        for late in ({"delay": 40 * days + 1}, {"deliver_at": time.time() + 41 * days}):
            with pytest.raises(MessageIllegal, match="by 40d, not by more"):
                producer.send(Message("orders", b"x", **late))  # type: ignore[arg-type]


def test_a_batch_takes_no_delayed_message(broker: Broker) -> None:
    with broker.producer("billing") as producer:
        tail = broker.region.get("tail")
        with pytest.raises(MessageIllegal, match="a delayed message cannot be sent in a batch"):
            producer.send_batch([Message("orders", b"1"), Message("orders", b"2", delay=1)])
        assert broker.region.get("tail") <= tail + 1024  # at most the topic's definition


def test_a_message_as_large_as_can_be_sent_can_be_delayed_and_no_larger_one(broker: Broker) -> None:
    room = broker.region.ring_bytes // 4
    with broker.producer("billing") as producer, broker.simple_consumer("audit", ALL) as consumer:
        producer.send(Message("orders", bytes(room - 80), delay=0.2))
        assert [len(body) for body in bodies_of(consumer.receive(wait=10.0))] == [room - 80]
        for delayed in ({}, {"delay": HOUR}):
            with pytest.raises(MessageTooLarge):
                producer.send(Message("orders", bytes(room - 80), tags="x", **delayed))  # type: ignore[arg-type]


def test_every_kind_of_send_delays(broker: Broker) -> None:
    class Callback:
        results: list[SendResult] = []  # noqa: RUF012 - one test, one list

        def on_success(self, result: SendResult) -> None:
            self.results.append(result)

        def on_exception(self, error: Exception) -> None:
            raise error

    with broker.simple_consumer("audit", ALL) as consumer:
        with broker.producer("billing") as producer:
            producer.send_async(Message("orders", b"async", delay=0.4), Callback())
            producer.send_oneway(Message("orders", b"oneway", delay=0.6))
        assert [result.status for result in Callback.results] == [SendStatus.SEND_OK]
        assert Callback.results[0].recall_handle is not None
        came = [bodies_of(consumer.receive(wait=10.0)), bodies_of(consumer.receive(wait=10.0))]
        assert came == [[b"async"], [b"oneway"]]


def test_a_delayed_send_under_sync_flush_tells_the_truth_about_the_disk(tmp_path: Path) -> None:
    with (
        running(tmp_path / "data", flush_disk_type="SYNC_FLUSH", sync_flush_timeout=0.2) as broker,
        broker.producer("billing") as producer,
        broker.simple_consumer("audit", ALL) as consumer,
    ):
        assert producer.send(Message("orders", b"first", delay=0.1)).status is SendStatus.SEND_OK
        assert bodies_of(consumer.receive(wait=10.0)) == [b"first"]
        with stopped_flusher(broker):
            late = producer.send(Message("orders", b"second", delay=0.1))
            assert late.status is SendStatus.FLUSH_DISK_TIMEOUT
            tail = broker.region.get("tail")
            assert consumer.receive(wait=0.3) == []
            assert broker.region.get("tail") == tail, "it has fired before it was as durable as consumers want it"
        assert late.confirm(10.0) is SendStatus.SEND_OK
        assert bodies_of(consumer.receive(wait=10.0)) == [b"second"]


def test_a_dedup_key_holds_for_a_delayed_message_before_and_after_it_fires(broker: Broker) -> None:
    with broker.producer("billing") as producer, broker.simple_consumer("audit", ALL) as consumer:
        first = producer.send(Message("orders", b"1", delay=0.3), dedup_key="once")
        again = producer.send(Message("orders", b"1", delay=0.3), dedup_key="once")
        assert (again.duplicate, again.position, again.recall_handle) == (True, first.position, first.recall_handle)
        assert bodies_of(consumer.receive(wait=10.0)) == [b"1"]
        late = producer.send(Message("orders", b"1"), dedup_key="once")
        assert (late.duplicate, late.message_id) == (True, first.message_id)
        assert consumer.receive(wait=0.0) == []


def test_a_message_of_a_deleted_topic_never_fires_and_holds_nothing_up(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker, broker.producer("billing") as producer:
        producer.send(Message("gone", b"1", delay=0.3))
        producer.send(Message("orders", b"2", delay=0.31))
        broker.delete_topic("gone")
        with broker.simple_consumer("audit", ALL) as consumer:
            assert bodies_of(consumer.receive(wait=10.0)) == [b"2"]
    records = log_records(tmp_path / "data")
    assert sum(len(record.body) for record in records if record.kind == RecordKind.FIRED) == 48
    assert [record.body for record in records if record.kind == RecordKind.MESSAGE] == [b"2"]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_delayed_message_is_found_by_its_id_before_and_after_it_fires_and_by_its_key_after(
    tmp_path: Path, indexed: bool
) -> None:
    with running(tmp_path / "data") as broker, broker.producer("billing") as producer:
        sent = [producer.send(Message("orders", b"%d" % n, keys="k", delay=1.0 + n)) for n in range(2)]
        ids = [(int(result.message_id[:16], 16), int(result.message_id[16:], 16)) for result in sent]
        producer.send_batch([Message("orders", b"x") for _ in range(1000)])
        wait_indexed(broker, wanted=indexed)
        with broker.simple_consumer("audit", ALL) as consumer:
            while b"1" not in bodies_of(messages := consumer.receive(512, wait=10.0)):
                consumer.ack(messages)
        producer.send(Message("orders", b"later", keys="k", delay=3600.0))
        wait_indexed(broker, wanted=indexed)
        with StoredMessages(BrokerPaths(tmp_path / "data"), broker.region) as stored:
            found = [stored.by_id(*identity) for identity in ids]
            if indexed:  # else the TIMER record is met first
                assert [record is not None and record.kind for record in found] == [RecordKind.MESSAGE] * 2
            assert [record is not None and record.body for record in found] == [b"0", b"1"]
            by_key = stored.by_key(stored.topic_id("orders"), "k", 10)
            assert [(record.kind, record.body) for record in by_key] == [
                (RecordKind.MESSAGE, b"1"),
                (RecordKind.MESSAGE, b"0"),
            ]
            pending = stored.by_id(ids[0][0], 1003)
            assert pending is not None
            assert (pending.kind, pending.body) == (RecordKind.TIMER, b"later")
