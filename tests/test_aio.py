"""shmbroker.aio: producers and consumers of coroutines. Who waits costs the loop nothing, and no thread."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.consuming import ALL, asleep, bodies_of, numbered
from support.looping import FAR, opened, stopped, take, until, waiting
from support.served import served
from support.waiting import assert_in_time

import shmbroker
from shmbroker import BadRequest, BrokerClosed, Message, ReceiptExpired, ReceivedMessage, SendStatus, aio
from shmbroker.aio import consumer as aio_consumer
from shmbroker.aio import waits

# ---- messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", ["ASYNC_FLUSH", "SYNC_FLUSH"])
def test_what_coroutines_send_is_received_by_others_each_message_once(directory: Path, flush: str) -> None:
    async def main() -> None:
        async with (
            opened(directory, flush_disk_type=flush) as broker,
            broker.producer("test") as producer,
            broker.simple_consumer("audit", ALL) as one,
            broker.simple_consumer("audit", ALL) as other,
        ):
            received = [asyncio.create_task(take(one, 100)), asyncio.create_task(take(other, 100))]
            sent = await asyncio.gather(*(producer.send(Message("orders", body)) for body in numbered(150)))
            batch = await producer.send_batch([Message("orders", body) for body in numbered(50, 150)])
            assert {*(result.status for result in sent), batch.status} == {SendStatus.SEND_OK}
            bodies = [body for taken in received for body in await taken]
            assert sorted(bodies) == sorted(numbered(200))
            assert await one.receive(1) == []

    asyncio.run(main())


def test_messages_of_one_queue_come_in_order_and_queues_are_chosen_as_ever(directory: Path) -> None:
    async def main() -> None:
        async with opened(directory) as broker, broker.producer("test") as producer:
            for body in numbered(50):
                await producer.send(Message("orders", body), sharding_key="customer-7")
            again = await producer.send(Message("orders", b"paid"), dedup_key="payment-17")
            assert (await producer.send(Message("orders", b"paid"), dedup_key="payment-17")).duplicate
            async with broker.simple_consumer("audit", ALL) as consumer:
                messages = await consumer.receive(100)
                in_order = [message.body for message in messages if message.message_id != again.message_id]
                assert in_order == numbered(50)
                await consumer.ack(messages)

    asyncio.run(main())


def test_errors_are_those_of_the_plain_broker(directory: Path) -> None:
    async def main() -> None:
        async with opened(directory, auto_create_topics=False) as broker, broker.producer("test") as producer:
            with pytest.raises(shmbroker.TopicNotExist):
                await producer.send(Message("nowhere", b"1"))
            await asyncio.to_thread(broker.plain.create_topic, "orders")
            await producer.send(Message("orders", b"1"))
            with pytest.raises(BadRequest, match="spin"):
                await broker.simple_consumer("audit", ALL, spin=True)
            async with broker.simple_consumer("audit", ALL) as consumer:
                with pytest.raises(BadRequest, match="wait"):
                    await consumer.receive(1, wait=-1.0)
                (message,) = await consumer.receive(1, wait=FAR)
                await consumer.change_invisible_duration(message, 0.0)
                with pytest.raises(ReceiptExpired):
                    await consumer.ack(message)
            with pytest.raises(BrokerClosed):
                await consumer.receive(1)
        with pytest.raises(BrokerClosed):
            await producer.send(Message("orders", b"2"))

    asyncio.run(main())


# ---- waiting -----------------------------------------------------------------------------------------------------


def test_a_coroutine_that_waits_is_woken_by_the_message(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "LOOK_SECONDS", FAR)  # nobody looks by himself

    async def main() -> None:
        async with (
            opened(directory) as broker,
            broker.producer("test") as producer,
            broker.simple_consumer("audit", ALL) as consumer,
        ):

            async def wake() -> float:
                receiving = asyncio.create_task(consumer.receive(1, wait=FAR))
                await until(lambda: asleep(broker.plain), "it sleeps")
                begun = time.monotonic()
                await producer.send(Message("orders", b"1"))
                await consumer.ack(await receiving)
                return time.monotonic() - begun

            taken = [await wake() for _ in range(5)]
            assert_in_time(taken.pop, 0.1)

    asyncio.run(main())


def test_many_coroutines_wait_with_one_thread(directory: Path) -> None:
    async def main() -> None:
        async with (
            opened(directory) as broker,
            broker.producer("test") as producer,
            broker.simple_consumer("audit", ALL) as consumer,
        ):
            await consumer.receive(1, wait=0.001)  # the loop has its thread
            before = threading.active_count()
            receiving = [asyncio.create_task(consumer.receive(1, wait=FAR)) for _ in range(16)]
            await until(lambda: waiting(broker) == 16, "all of them sleep")
            assert threading.active_count() == before
            await producer.send_batch([Message("orders", body) for body in numbered(16)])
            messages = [message for task in receiving for message in await task]
            assert sorted(bodies_of(messages)) == sorted(numbered(16))
            await consumer.ack(messages)

    asyncio.run(main())


def test_those_who_wait_in_a_paused_group_do_not_wake_each_other_for_what_none_of_them_gets(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    receive = aio_consumer.Core.receive

    def counted(core: aio_consumer.Core, *arguments: Any) -> list[ReceivedMessage]:
        looks.append(arguments)
        return receive(core, *arguments)

    monkeypatch.setattr(aio_consumer.Core, "receive", counted)

    async def main() -> None:
        async with opened(directory) as broker, broker.simple_consumer("audit", ALL) as consumer:
            receiving = [asyncio.create_task(consumer.receive(1, wait=FAR)) for _ in range(4)]
            await until(lambda: waiting(broker) == 4, "all of them sleep")
            broker.plain.pause_group("audit")
            with broker.plain.producer("test") as producer:
                producer.send_batch([Message("orders", body) for body in numbered(4)])
            await asyncio.wait(receiving, timeout=0.3)
            assert len(looks) < 40
            broker.plain.resume_group("audit")
            messages = [message for task in receiving for message in await task]
            assert sorted(bodies_of(messages)) == numbered(4)
            await consumer.ack(messages)

    asyncio.run(main())


def test_more_coroutines_wait_than_the_broker_has_places_for(directory: Path) -> None:
    async def main() -> None:
        async with (
            opened(directory, max_waiters=8) as broker,
            broker.producer("test") as producer,
            broker.simple_consumer("audit", ALL) as consumer,
        ):
            receiving = [asyncio.create_task(consumer.receive(1, wait=FAR)) for _ in range(20)]
            await until(lambda: waiting(broker) >= 6, "all places taken")
            await producer.send_batch([Message("orders", body) for body in numbered(20)])
            messages = [message for task in receiving for message in await task]
            assert sorted(bodies_of(messages)) == sorted(numbered(20))
            await consumer.ack(messages)

    asyncio.run(main())


def test_sends_wait_for_the_disk_together_and_the_loop_goes_on(directory: Path) -> None:
    async def main() -> None:
        async with opened(directory, flush_disk_type="SYNC_FLUSH") as broker, broker.producer("test") as producer:
            await producer.send(Message("orders", b"first"))
            before = threading.active_count()
            with stopped(broker, "flusher"):
                sending = [asyncio.create_task(producer.send(Message("orders", body))) for body in numbered(50)]
                _, pending = await asyncio.wait(sending, timeout=0.1)  # one that held the loop up would be over by then
                assert len(pending) == 50
                assert threading.active_count() == before
            assert {(await task).status for task in sending} == {SendStatus.SEND_OK}

    asyncio.run(main())


def test_a_send_that_the_disk_does_not_confirm_in_time_says_so_and_can_be_confirmed_later(directory: Path) -> None:
    async def main() -> None:
        settings = {"flush_disk_type": "SYNC_FLUSH", "sync_flush_timeout": 0.1}
        async with opened(directory, **settings) as broker, broker.producer("test") as producer:
            await producer.send(Message("orders", b"first"))
            with stopped(broker, "flusher"):
                late = await producer.send(Message("orders", b"late"))
                batch = await producer.send_batch([Message("orders", b"later")])
                assert late.status is batch.status is SendStatus.FLUSH_DISK_TIMEOUT
                assert await producer.confirm(late, 0.05) is SendStatus.FLUSH_DISK_TIMEOUT
            assert await producer.confirm(late, FAR) is SendStatus.SEND_OK
            assert await producer.confirm(batch, FAR) is SendStatus.SEND_OK

    asyncio.run(main())


def test_a_send_waits_for_room_in_the_ring_off_the_loop(directory: Path) -> None:
    bodies = [b"%d " % number + bytes(20_000) for number in range(100)]  # twice what the ring holds
    stored: list[bytes] = []

    async def fill(producer: aio.Producer) -> None:
        for body in bodies:
            await producer.send(Message("orders", body))
            stored.append(body)

    async def main() -> None:
        async with (
            opened(directory, send_timeout=10.0) as broker,
            broker.producer("test") as producer,
            broker.simple_consumer("audit", ALL) as consumer,
        ):
            await producer.send(Message("orders", b"first"))
            assert await take(consumer, 1) == [b"first"]
            with stopped(broker, "flusher"):
                sending = asyncio.create_task(fill(producer))
                await until(lambda: len(stored) > 5, "the ring fills")
                _, pending = await asyncio.wait([sending], timeout=0.1)
                assert pending
                assert len(stored) < 100
            await sending
            assert sorted(await take(consumer, 100)) == sorted(bodies)

    asyncio.run(main())


# ---- durability and life -----------------------------------------------------------------------------------------


def test_durable_acknowledgements_and_attempts_are_on_the_disk_when_they_return(directory: Path) -> None:
    async def main() -> None:
        settings = {"ack": "durable", "attempts": "durable"}
        async with (
            opened(directory) as broker,
            broker.producer("test") as producer,
            broker.simple_consumer("audit", ALL, **settings) as consumer,
        ):
            await producer.send(Message("orders", b"1"))
            region = broker.plain.region
            flushed = region.get("flushed")
            (message,) = await consumer.receive(1, wait=FAR)
            assert region.get("flushed") > flushed
            with stopped(broker, "flusher"):
                flushed = region.get("flushed")
                acking = asyncio.create_task(consumer.ack(message))
                _, pending = await asyncio.wait([acking], timeout=0.1)
                assert pending
            await acking
            assert region.get("flushed") > flushed

    asyncio.run(main())


def test_closing_a_consumer_ends_those_who_wait_in_it(directory: Path) -> None:
    async def main() -> None:
        async with opened(directory) as broker:
            consumer = await broker.simple_consumer("audit", ALL)
            receiving = asyncio.create_task(consumer.receive(1, wait=FAR))
            iterating = asyncio.create_task(take(consumer, 1))
            await until(lambda: waiting(broker) == 2, "both sleep")
            await consumer.close()
            with pytest.raises(BrokerClosed):
                await receiving
            assert await iterating == []
            assert broker.plain.groups()[0]["members"] == []

    asyncio.run(main())


def test_closing_the_broker_ends_everything_and_leaves_no_thread(directory: Path) -> None:
    async def main() -> None:
        async with opened(directory) as broker:
            producer = await broker.producer("test")
            consumer = await broker.simple_consumer("audit", ALL)
            receiving = asyncio.create_task(consumer.receive(1, wait=FAR))
            await until(lambda: waiting(broker) == 1, "it sleeps")
        with pytest.raises(BrokerClosed):
            await receiving
        with pytest.raises(BrokerClosed):
            await producer.send(Message("orders", b"1"))
        await until(
            lambda: "shmbroker-loop" not in {thread.name for thread in threading.enumerate()}, "its thread gone"
        )

    asyncio.run(main())


def test_senders_and_receivers_wait_out_a_restart_of_the_broker(directory: Path) -> None:
    async def main() -> None:
        broker = await aio.open(directory)
        producer = await broker.producer("test")
        consumer = await broker.simple_consumer("audit", ALL)
        await producer.send(Message("orders", b"1"))
        assert await take(consumer, 1) == [b"1"]
        receiving = asyncio.create_task(take(consumer, 1))
        await until(lambda: waiting(broker) == 1, "it sleeps")
        first.__exit__(None, None, None)
        with served(directory):
            assert (await producer.send(Message("orders", b"2"))).status is SendStatus.SEND_OK
            assert await receiving == [b"2"]
            await broker.close()

    first = served(directory)
    first.__enter__()
    asyncio.run(main())
