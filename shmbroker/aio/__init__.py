"""shmbroker for asyncio: the same broker, with waits that leave the event loop free.

    import shmbroker.aio
    from shmbroker import Message

    async with shmbroker.aio.open("data/orders") as broker:
        async with broker.producer("billing") as producer:
            await producer.send(Message("orders", b"42"))
        async with broker.simple_consumer("audit", {"orders": "*"}) as consumer:
            async for message in consumer:
                await consumer.ack(message)

Messages, results, statuses and errors are those of ``shmbroker``.
"""

from __future__ import annotations

from shmbroker.aio.broker import Broker, open  # noqa: A004 - as shmbroker.open
from shmbroker.aio.consumer import SimpleConsumer
from shmbroker.aio.producer import Producer
from shmbroker.aio.pull_consumer import PullConsumer
from shmbroker.aio.push_consumer import PushConsumer

__all__ = ["open", "Broker", "Producer", "SimpleConsumer", "PushConsumer", "PullConsumer"]
