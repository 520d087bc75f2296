"""What is cancelled under ``shmbroker.aio`` loses nothing, wherever it was."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.consuming import ALL, numbered
from support.looping import FAR, opened, stopped, take, until, waiting

from shmbroker import Message, ReceivedMessage
from shmbroker.aio import waits


def test_a_receive_that_is_cancelled_loses_nothing(directory: Path) -> None:
    """Wherever it was: nothing is claimed by nobody, and no delivery was counted that nobody saw."""

    async def main() -> None:
        async with (
            opened(directory) as broker,
            broker.producer("test") as producer,
            broker.simple_consumer("audit", ALL) as consumer,
        ):
            received: list[tuple[bytes, int]] = []

            async def done(messages: list[ReceivedMessage]) -> None:
                received.extend((message.body, message.delivery_attempt) for message in messages)
                await consumer.ack(messages)

            for number, body in enumerate(numbered(300)):
                receiving = asyncio.create_task(consumer.receive(1, wait=FAR))
                for _ in range(number % 3):
                    await asyncio.sleep(0)
                await producer.send(Message("orders", body))
                for _ in range(number % 7):
                    await asyncio.sleep(0.0001 if number % 2 else 0)
                receiving.cancel()
                for result in await asyncio.gather(receiving, return_exceptions=True):
                    await done(result if isinstance(result, list) else [])
            while messages := await consumer.receive(32, wait=0.1):
                await done(messages)
            assert sorted(received) == sorted((body, 1) for body in numbered(300))
            assert waiting(broker) == 0

    asyncio.run(main())


def test_a_wake_up_that_meets_a_cancelled_receive_goes_on_to_the_next(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "LOOK_SECONDS", FAR)

    async def main() -> None:
        async with opened(directory) as broker, broker.simple_consumer("audit", ALL) as consumer:
            with stopped(broker, "janitor"), broker.plain.producer("test") as plain:
                for turn in range(2):
                    receiving = [asyncio.create_task(consumer.receive(1, wait=FAR)) for _ in range(2)]
                    await until(lambda: waiting(broker) == 2, "both sleep")
                    plain.send(Message("orders", b"1"))  # one of the two is woken, and the loop has not run since
                    receiving[turn].cancel()
                    (message,) = await asyncio.wait_for(receiving[1 - turn], 10.0)
                    await consumer.ack(message)

    asyncio.run(main())


def test_a_receive_cancelled_while_its_attempts_are_written_gives_back_what_it_had(directory: Path) -> None:
    async def main() -> None:
        async with (
            opened(directory) as broker,
            broker.producer("test") as producer,
            broker.simple_consumer("audit", ALL, attempts="durable") as consumer,
        ):
            await producer.send(Message("orders", b"1"))
            with stopped(broker, "flusher"):
                receiving = asyncio.create_task(consumer.receive(1, wait=FAR))
                await until(lambda: any(table["held"] for table in broker.plain.region.progress()), "claimed")
                receiving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await receiving
            (message,) = await consumer.receive(1, wait=10.0)
            assert message.body == b"1"
            await consumer.ack(message)

    asyncio.run(main())


def test_a_send_cancelled_while_it_waits_for_the_disk_is_stored_and_found_by_its_key(directory: Path) -> None:
    async def main() -> None:
        async with opened(directory, flush_disk_type="SYNC_FLUSH") as broker, broker.producer("test") as producer:
            await producer.send(Message("orders", b"first"))
            with stopped(broker, "flusher"):
                sending = asyncio.create_task(producer.send(Message("orders", b"paid"), dedup_key="17"))
                await asyncio.wait([sending], timeout=0.05)
                sending.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await sending
            assert (await producer.send(Message("orders", b"paid"), dedup_key="17")).duplicate
            async with broker.simple_consumer("audit", ALL) as consumer:
                assert sorted(await take(consumer, 2)) == [b"first", b"paid"]
                assert await consumer.receive(1) == []

    asyncio.run(main())
