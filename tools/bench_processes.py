"""The processes of a benchmark: started as a fleet, let go together, each answering with what it measured."""

from __future__ import annotations

import mmap
import multiprocessing
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import posix_ipc

import shmbroker
from shmbroker import Message, SendStatus
from shmbroker._native._core import set_process_name

TOPIC = "bench"
GROUP = "bench"
START_SECONDS = 60.0


class Role(Protocol):
    """What a process of the fleet runs: gets ready, calls ``gate`` and is held there until all are, then measures."""

    def __call__(self, gate: Callable[[], None], *arguments: Any) -> Any: ...


Work = tuple[Role, tuple[Any, ...]]  # of one process: its role and the arguments behind the gate


class Failed(Exception):
    """A process of the fleet did not answer."""


def run_fleet(work: Sequence[Work], *, seconds: float) -> list[Any]:
    """Run one process for each (role, arguments) and return their answers in that order.

    Raises Failed if one of them fails or takes longer than ``seconds`` after all were ready. No process is left behind.
    """
    context = multiprocessing.get_context("spawn")
    fleet = []
    try:
        for role, arguments in work:
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(theirs, role, arguments), daemon=True)
            process.start()
            theirs.close()
            fleet.append((process, ours))
        for process, pipe in fleet:
            _expect(process.name, pipe, START_SECONDS)
        for _, pipe in fleet:
            pipe.send("go")
        deadline = time.monotonic() + seconds
        return [_expect(process.name, pipe, deadline - time.monotonic()) for process, pipe in fleet]
    finally:
        for process, pipe in fleet:
            pipe.close()
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _expect(name: str, pipe: Connection, seconds: float) -> Any:
    if not pipe.poll(max(0.0, seconds)):
        raise Failed(f"{name} gave no answer within {seconds:.0f} s")
    try:
        failed, answer = pipe.recv()
    except EOFError:
        raise Failed(f"{name} died") from None
    if failed:
        raise Failed(f"{name}: {answer}")
    return answer


def _main(pipe: Connection, role: Role, arguments: tuple[Any, ...]) -> None:
    set_process_name("shmb-bench")

    def gate() -> None:
        pipe.send((False, "ready"))
        pipe.recv()

    with suppress(BrokenPipeError, EOFError, KeyboardInterrupt):  # the bench has gone: so do we
        try:
            answer = role(gate, *arguments)
        except Exception as error:  # handed to the bench, which raises it
            pipe.send((True, f"{type(error).__name__}: {error}"))
        else:
            pipe.send((False, answer))


def messages(count: int, body_bytes: int) -> list[Message]:
    """Distinct messages: a hundred references to one would flatter every cache."""
    return [Message(TOPIC, number.to_bytes(8, "little").ljust(body_bytes, b".")) for number in range(count)]


# ---- roles -----------------------------------------------------------------------------------------------------------


def send_counted(gate: Callable[[], None], directory: Path, count: int, body_bytes: int, batch: int) -> int:
    """Send ``count`` messages, one by one or in batches. Answers the monotonic time of the first send in ns."""
    with shmbroker.open(directory) as broker, broker.producer(GROUP) as producer:
        pool = messages(10_000, body_bytes)
        batches = [pool[at : at + batch] for at in range(0, len(pool), batch)]
        gate()
        begin = time.monotonic_ns()
        if batch == 1:
            send = producer.send
            for _ in range(count // len(pool)):
                for message in pool:
                    send(message)
        else:
            send_batch = producer.send_batch
            for _ in range(count // len(pool)):
                for some in batches:
                    send_batch(some)
        return begin


def receive_counted(gate: Callable[[], None], directory: Path, count: int, batch: int) -> int:
    """Receive and acknowledge ``count`` messages. Answers the monotonic time of the last ack in ns."""
    with shmbroker.open(directory) as broker, broker.simple_consumer(GROUP, {TOPIC: "*"}) as consumer:
        gate()
        receive, ack = consumer.receive, consumer.ack
        left = count
        while left:
            received = receive(max_messages=batch, wait=10.0)
            if not received:
                raise Failed(f"{left} of {count} messages did not come")
            if batch == 1:
                ack(received[0])
            else:
                ack(received)
            left -= len(received)
        return time.monotonic_ns()


def send_durably(gate: Callable[[], None], directory: Path, seconds: float, body_bytes: int) -> tuple[float, list[int]]:
    """Send one by one under SYNC_FLUSH for ``seconds``. Answers (sends per second, nanoseconds of each)."""
    with shmbroker.open(directory) as broker, broker.producer(GROUP) as producer:
        pool = messages(1000, body_bytes)
        producer.send(pool[0])
        gate()
        latencies: list[int] = []
        clock, send, note, good = time.monotonic_ns, producer.send, latencies.append, SendStatus.SEND_OK
        begin = last = clock()
        end = begin + int(seconds * 1e9)
        while last < end:
            for message in pool:
                started = clock()
                result = send(message)
                last = clock()
                if result.status is not good:
                    raise Failed(f"send answered {result.status}")
                note(last - started)
                if last >= end:
                    break
        return len(latencies) / (last - begin) * 1e9, latencies


def send_paced(gate: Callable[[], None], directory: Path, rate: int, count: int, body_bytes: int) -> None:
    """Send ``count`` messages, ``rate`` a second, each stamped with the monotonic clock right before its send."""
    with shmbroker.open(directory) as broker, broker.producer(GROUP) as producer:
        padding = bytes(body_bytes - 8)
        gate()
        clock, send = time.monotonic_ns, producer.send
        for _ in paced(rate, count):
            send(Message(TOPIC, clock().to_bytes(8, "little") + padding))


def paced(rate: int, count: int) -> Iterator[None]:
    """Come back ``rate`` times a second. Sleeps in between, as a program with little to do does."""
    clock, sleep = time.monotonic_ns, time.sleep
    due = clock() + 100_000_000
    for _ in range(count):
        if (left := due - clock()) > 0:
            sleep(left / 1e9)
        due += 1_000_000_000 // rate
        yield


def receive_stamped(gate: Callable[[], None], directory: Path, count: int, spin: bool) -> list[int]:
    """Receive ``count`` stamped messages one by one. Answers how many ns each was under way, its ack left out."""
    with (
        shmbroker.open(directory) as broker,
        broker.simple_consumer(GROUP, {TOPIC: "*"}, spin=spin) as consumer,
    ):
        gate()
        latencies: list[int] = []
        clock = time.monotonic_ns
        while len(latencies) < count:
            for message in consumer.receive(max_messages=1, wait=10.0):
                arrived = clock()
                latencies.append(arrived - int.from_bytes(message.body[:8], "little"))
                consumer.ack(message)
        return latencies


# ---- the floor of one way: the same two programs with a bare semaphore between them ---------------------------------


def post_paced(gate: Callable[[], None], name: str, rate: int, count: int) -> None:
    """Put a stamp into shared memory and post the semaphore beside it, ``rate`` times a second."""
    semaphore, stamp = _bare_semaphore(name)
    gate()
    clock = time.monotonic_ns
    for _ in paced(rate, count):
        stamp[0] = clock()
        semaphore.release()


def wait_stamped(gate: Callable[[], None], name: str, count: int) -> list[int]:
    """Wait for the semaphore ``count`` times. Answers how many ns each stamp was under way."""
    semaphore, stamp = _bare_semaphore(name)
    gate()
    latencies: list[int] = []
    clock = time.monotonic_ns
    for _ in range(count):
        semaphore.acquire()
        latencies.append(clock() - stamp[0])
    return latencies


@contextmanager
def bare_semaphore() -> Iterator[str]:
    """Make what the two share. Yields its name."""
    name = f"/shmbroker-bench-{secrets.token_hex(8)}"
    posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600).close()
    posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=mmap.PAGESIZE).close_fd()
    try:
        yield name
    finally:
        posix_ipc.unlink_semaphore(name)
        posix_ipc.unlink_shared_memory(name)


def _bare_semaphore(name: str) -> tuple[Any, memoryview]:
    memory = posix_ipc.SharedMemory(name)
    words = memoryview(mmap.mmap(memory.fd, mmap.PAGESIZE)).cast("q")
    memory.close_fd()
    return posix_ipc.Semaphore(name), words
