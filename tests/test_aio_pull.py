"""shmbroker.aio.PullConsumer: positions of its own, and a poll that can be cancelled anywhere."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.consuming import bodies_of, numbered, send
from support.looping import FAR, opened, until, waiting

from shmbroker import BadRequest, BrokerClosed, Message


def test_it_reads_seeks_and_commits_as_the_plain_one(directory: Path) -> None:
    async def main() -> None:
        async with opened(directory) as broker, broker.pull_consumer("audit") as consumer:
            send(broker.plain, *numbered(20))
            with pytest.raises(BadRequest, match="assign"):
                await consumer.poll()
            await consumer.assign([("orders", 0)])
            with pytest.raises(BadRequest, match="poll"):
                await consumer.poll(0)
            assert bodies_of(await consumer.poll(12)) == numbered(12)
            await consumer.seek("orders", 0, 10)
            assert bodies_of(await consumer.poll(32)) == numbered(10, 10)
            await consumer.commit(durable=True)
            (queue,) = await consumer.queues()
            assert (queue.position, queue.committed) == (20, 20)
            await consumer.seek_to_begin()
            assert bodies_of(await consumer.poll(1)) == [b"0"]
            await consumer.seek_to_end("orders")
            assert await consumer.poll() == []
            await consumer.seek_to_time(0.0)
            assert bodies_of(await consumer.poll(1)) == [b"0"]

    asyncio.run(main())


def test_a_poll_sleeps_until_there_is_something_and_lets_others_by(directory: Path) -> None:
    async def main() -> None:
        async with (
            opened(directory) as broker,
            broker.producer("test") as producer,
            broker.pull_consumer("audit") as consumer,
        ):
            await consumer.assign(["orders"])
            polling = asyncio.create_task(consumer.poll(1, wait=FAR))
            await until(lambda: waiting(broker), "it sleeps")
            assert {queue.position for queue in await consumer.queues()} == {0}
            await producer.send(Message("orders", b"1"))
            assert bodies_of(await polling) == [b"1"]
            polling = asyncio.create_task(consumer.poll(1, wait=FAR))
            await until(lambda: waiting(broker), "it sleeps again")
            await consumer.close()
            with pytest.raises(BrokerClosed):
                await polling

    asyncio.run(main())


def test_a_poll_that_is_cancelled_has_moved_no_position(directory: Path) -> None:
    async def main() -> None:
        async with (
            opened(directory) as broker,
            broker.producer("test") as producer,
            broker.pull_consumer("audit") as consumer,
        ):
            await consumer.assign(["orders"])
            bodies: list[bytes] = []
            for number, body in enumerate(numbered(200)):
                polling = asyncio.create_task(consumer.poll(1, wait=FAR))
                for _ in range(number % 3):
                    await asyncio.sleep(0)
                await producer.send(Message("orders", body), queue_id=0)
                for _ in range(number % 7):
                    await asyncio.sleep(0.0001 if number % 2 else 0)
                polling.cancel()
                for result in await asyncio.gather(polling, return_exceptions=True):
                    bodies += bodies_of(result) if isinstance(result, list) else []
            while messages := await consumer.poll(32, wait=0.1):
                bodies += bodies_of(messages)
            assert bodies == numbered(200)

    asyncio.run(main())
