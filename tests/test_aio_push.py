"""shmbroker.aio.PushConsumer: listeners that are coroutines, on one loop, as many at a time as there are threads."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from support.consuming import ALL, numbered, send
from support.listening import SUCCESS, done_with
from support.looping import opened, until
from support.processes import SMALL, Child

import shmbroker
from shmbroker import BadRequest, ConsumeContext, ConsumeStatus, ReceivedMessage, RetryPolicy


class Coroutine:
    """A listener that keeps what it heard, and answers when the test lets it go."""

    def __init__(self, *, open_at_once: bool = True, answer: ConsumeStatus = SUCCESS) -> None:
        self.gate = asyncio.Event()
        self._answer = answer
        self.heard: list[tuple[bytes, int]] = []
        self.threads: set[int] = set()
        self.running = self.most_running = self.cancelled = 0
        if open_at_once:
            self.gate.set()

    async def __call__(self, message: ReceivedMessage, _context: ConsumeContext) -> ConsumeStatus:
        self.heard.append((message.body, message.delivery_attempt))
        self.threads.add(threading.get_ident())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return self._answer


async def coroutine_function(_message: Any, _context: Any) -> None: ...


def plain_function(_message: Any, _context: Any) -> None: ...


def test_either_consumer_refuses_the_listeners_of_the_other_at_once_and_names_it(directory: Path) -> None:
    async def main() -> None:
        async with opened(directory) as broker:
            coroutines: list[Any] = [coroutine_function, partial(coroutine_function), Coroutine(), partial(Coroutine())]
            for listener in coroutines:
                with pytest.raises(BadRequest, match=r"is a coroutine function.*shmbroker\.aio has the push_consumer"):
                    broker.plain.push_consumer("audit", listener, ALL)
                await broker.push_consumer("taken", listener, ALL)
            plain: list[Any] = [plain_function, partial(plain_function), lambda message, _context: message]
            for listener in plain:
                text = r"must be a coroutine function \(async def\).*shmbroker\.open\(\) gives the push_consumer"
                with pytest.raises(BadRequest, match=text):
                    await broker.push_consumer("audit", listener, ALL)
                await asyncio.to_thread(broker.plain.push_consumer, "plain", listener, ALL)
            assert "audit" not in [group["name"] for group in broker.plain.groups()]

    asyncio.run(main())


def test_a_coroutine_hears_each_message_once_on_the_loop_and_others_meanwhile(directory: Path) -> None:
    async def main() -> None:
        listener = Coroutine(open_at_once=False)
        async with opened(directory) as broker:
            send(broker.plain, *numbered(20))
            async with broker.push_consumer("audit", listener, ALL, consume_thread_max=8) as consumer:
                await until(lambda: listener.running == 8, "eight at a time")
                assert not consumer.paused
                listener.gate.set()
                await until(lambda: done_with(broker.plain) == 20, "all of them done")
            assert sorted(listener.heard) == sorted((body, 1) for body in numbered(20))
            assert listener.most_running == 8
            assert listener.threads == {threading.get_ident()}

    asyncio.run(main())


def test_a_list_is_awaited_as_a_list_and_its_failures_come_again(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        calls: list[list[tuple[bytes, int]]] = []

        async def listen(messages: list[ReceivedMessage], context: ConsumeContext) -> ConsumeStatus:
            calls.append([(message.body, message.delivery_attempt) for message in messages])
            if len(calls) == 1:
                raise RuntimeError("not today")
            context.ack_index = 0 if len(calls) == 2 else len(messages)
            return SUCCESS

        async with opened(directory) as broker:
            broker.plain.create_group("audit", RetryPolicy("table", delays=(0.0,)))
            send(broker.plain, *numbered(4))
            settings = {"consume_thread_max": 1, "consume_message_batch_max_size": 4}
            async with broker.push_consumer("audit", listen, ALL, **settings):
                await until(lambda: sum(map(len, calls)) >= 11, "four, four again, and three a third time")
            assert calls[0] == [(body, 1) for body in numbered(4)]
            heard = [message for call in calls for message in call]
            assert sorted(heard) == sorted(
                [(body, attempt) for body in numbered(4) for attempt in (1, 2)] + [m for m in heard if m[1] == 3]
            )
            assert len({m for m in heard if m[1] == 3}) == 3
            assert len([record for record in caplog.records if "the listener failed" in record.message]) == 1

    asyncio.run(main())


def test_a_paused_consumer_awaits_nothing_until_it_is_resumed(directory: Path) -> None:
    async def main() -> None:
        listener = Coroutine()
        async with opened(directory) as broker, broker.push_consumer("audit", listener, ALL) as consumer:
            consumer.pause()
            assert consumer.paused
            send(broker.plain, b"1")
            async with broker.simple_consumer("audit", ALL) as other:
                (message,) = await other.receive(1, wait=10.0)  # nobody else takes it
                await other.change_invisible_duration(message, 0.0)
            assert listener.heard == []
            consumer.resume()
            await until(lambda: listener.heard == [(b"1", 2)], "heard")

    asyncio.run(main())


def test_what_outlasts_await_termination_is_cancelled_and_delivered_again(directory: Path) -> None:
    async def main() -> None:
        listener = Coroutine(open_at_once=False)
        async with opened(directory) as broker:
            send(broker.plain, b"slow")
            consumer = await broker.push_consumer("audit", listener, ALL, await_termination=0.05)
            await until(lambda: listener.running, "it runs")
            assert await consumer.shutdown() is False
            await until(lambda: listener.cancelled == 1, "cancelled")
            await until(lambda: consumer.late == 1, "its answer refused")
            async with broker.simple_consumer("audit", ALL) as other:
                (again,) = await other.receive(1, wait=10.0)
                assert (again.body, again.delivery_attempt) == (b"slow", 2)
                await other.ack(again)

    asyncio.run(main())


def test_run_is_cancelled_with_its_task_and_leaves_the_group(directory: Path) -> None:
    async def main() -> None:
        listener = Coroutine(open_at_once=False)
        async with opened(directory) as broker:
            send(broker.plain, b"1")
            consumer = await broker.push_consumer("audit", listener, ALL)
            running = asyncio.create_task(consumer.run())
            await until(lambda: listener.running, "a listener runs")
            await until(lambda: signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "and the consumer waits")
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await until(lambda: broker.plain.groups()[0]["members"] == [], "it has left")
            assert listener.cancelled == 1
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    asyncio.run(main())


def test_a_listener_that_is_no_function_is_refused(directory: Path) -> None:
    async def main() -> None:
        async with opened(directory) as broker:
            with pytest.raises(BadRequest, match="listener"):
                await broker.push_consumer("audit", "listener", ALL)  # type: ignore[arg-type]

    asyncio.run(main())


# ---- in a process of its own ---------------------------------------------------------------------------------------

PUSHER: Final = """
    import asyncio, sys, shmbroker.aio
    async def handle(message, context):
        print("began", message.body.decode(), flush=True)
        await asyncio.sleep(float(message.body))
        print("ended", message.body.decode(), flush=True)
        return shmbroker.ConsumeStatus.CONSUME_SUCCESS
    async def main():
        broker = await shmbroker.aio.open(sys.argv[1])
        consumer = await broker.push_consumer("audit", handle, {"orders": "*"})
        print("ready", flush=True)
        if sys.argv[2] == "run":
            print("drained", await consumer.run(), flush=True)
            await broker.close()
        else:
            await asyncio.to_thread(sys.stdin.readline)
        return broker
    kept = asyncio.run(main())
    print("over", flush=True)
"""


def test_sigterm_lets_the_coroutines_that_run_come_to_their_end(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker, Child(PUSHER, directory, "run") as child:
        assert child.read_line() == "ready"
        send(broker, b"0.2")
        assert child.read_line() == "began 0.2"
        os.kill(child.pid, signal.SIGTERM)
        assert child.read_line() == "ended 0.2"
        assert child.read_line() == "drained True"
        assert child.read_line() == "over"
        assert child.wait() == 0
        assert done_with(broker) == 1


def test_a_program_may_leave_its_loop_without_closing_anything(directory: Path) -> None:
    """What ran is cancelled with the loop and sent back; what comes then is for others. Nothing hangs."""
    with shmbroker.open(directory, **SMALL) as broker:
        broker.create_group("audit", RetryPolicy("table", delays=(0.0,)))
        with Child(PUSHER, directory, "leave") as child:
            assert child.read_line() == "ready"
            send(broker, b"100")
            assert child.read_line() == "began 100"
            child.write_line()
            while child.read_line() != "over":
                pass
            assert child.wait() == 0
        with broker.simple_consumer("audit", ALL) as other:
            (again,) = other.receive(1, wait=10.0)
            assert again.body == b"100"
            other.ack(again)
