"""Members of a group in processes of their own that do what they are told, line by line, and answer in JSON."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from support.failing import dead_letters
from support.processes import Child
from support.waiting import DEADLINE

import shmbroker
from shmbroker import ConsumeContext, ConsumeStatus, Message, ReceiptExpired, ReceivedMessage, process
from shmbroker.send_back import SendBack

GROUP: Final = "audit"
TOPIC: Final = "orders"
WANTED: Final = {TOPIC: "*"}
ANSWERS: Final = ("ok", "later", "ok", "dead", "raise", "ok")
WAIT: Final = 20.0

# Forks an actor for each connection: one costs milliseconds, and none has the broker's directory in its command line.
NURSERY: Final = """
    import logging, os, signal, socket, sys
    import shmbroker.broker, shmbroker.push_consumer, shmbroker.dead_letters
    from support.actor import Actor
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    logging.disable()  # listeners fail on purpose
    with socket.create_server("\\0" + sys.argv[1], family=socket.AF_UNIX) as server:
        print("ready")
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                try:
                    Actor(connection).serve()
                finally:
                    os._exit(0)
            connection.close()
"""


class Nursery(Child):
    """Where actors come from. Killing it kills none of them."""

    def __init__(self) -> None:
        self._name = f"shmbroker-test-{secrets.token_hex(8)}"
        super().__init__(NURSERY, self._name, environment={"PYTHONPATH": str(Path(__file__).parents[1])})
        assert self.read_line() == "ready"

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(2 * WAIT)
        connection.connect(f"\0{self._name}")
        return connection


class Told:
    """An actor as its director sees it."""

    def __init__(self, nursery: Nursery, directory: Path, settings: dict[str, Any], modes: dict[str, str]) -> None:
        self._connection = nursery.connect()
        self._lines = self._connection.makefile("rw")
        self._pidfd = os.pidfd_open(self.ask(str(directory), settings, modes))

    def ask(self, what: str, *arguments: Any) -> Any:
        print(json.dumps([what, *arguments]), file=self._lines, flush=True)
        return json.loads(self._lines.readline())

    def stop(self) -> None:
        """SIGSTOP: until it is killed, it notices nothing."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)

    def kill(self) -> None:
        """SIGKILL, and gone."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            assert process.wait_ended(self._pidfd, DEADLINE)
            os.close(self._pidfd)
            self._pidfd = -1
            self._lines.close()
            self._connection.close()


def answer_to(body: str, attempt: int, salt: int) -> str:
    """How the listener of a ``push`` answers this delivery: the same for the actor and for its director."""
    return ANSWERS[zlib.crc32(f"{body} {attempt} {salt}".encode()) % len(ANSWERS)] if salt else "ok"


class Actor:
    """The actor as it is. It keeps every message that it has received, also those that are no longer its own."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("rw")
        directory, settings, self.modes = json.loads(self._lines.readline())
        self.broker = shmbroker.open(directory, **settings)
        self._answer(os.getpid())
        self.producer = self.broker.producer("test")
        self.consumer = self.broker.simple_consumer(GROUP, WANTED, **self.modes)
        self.kept: dict[str, ReceivedMessage] = {}

    def serve(self) -> None:
        for line in self._lines:
            what, *arguments = json.loads(line)
            do: Callable[..., Any] = getattr(self, what)
            self._answer(do(*arguments))

    # ---- what it can be told

    def send(self, bodies: list[str], queue_id: int) -> str:
        batch = [Message(TOPIC, body.encode()) for body in bodies]
        return str(self.producer.send_batch(batch, queue_id=queue_id).status.name)

    def send_delayed(self, body: str, delay: float) -> str | None:
        return self.producer.send(Message(TOPIC, body.encode(), delay=delay)).recall_handle

    def recall(self, handle: str) -> bool:
        return self.broker.recall(handle)

    def receive(self, count: int, wait: float, invisible: float) -> list[tuple[str, int, int, int]]:
        messages = self.consumer.receive(count, wait, invisible)
        self.kept |= {message.body.decode(): message for message in messages}
        return [
            (message.body.decode(), message.delivery_attempt, message.queue_id, message.queue_offset)
            for message in messages
        ]

    def receive_elsewhere(self, group: str, count: int) -> list[tuple[str, int]]:
        """All that another group gets, acknowledged."""
        found: list[tuple[str, int]] = []
        with self.broker.simple_consumer(group, WANTED) as consumer:
            while messages := consumer.receive(32, WAIT if len(found) < count else 0.0):
                found += [(message.body.decode(), message.queue_id) for message in messages]
                consumer.ack(messages)
        return found

    def ack(self, bodies: list[str]) -> list[str]:
        """Which were refused."""
        messages = {body: self.kept[body] for body in bodies}
        try:
            self.consumer.ack(messages.values())
        except ReceiptExpired as refused:
            return [body for body, message in messages.items() if message in refused.messages]
        return []

    def renew(self, body: str, seconds: float) -> bool:
        return self._held(lambda: self.consumer.change_invisible_duration(self.kept[body], seconds))

    def send_back(self, body: str, level: int) -> bool:
        sender = SendBack(self.broker, self.consumer)
        return self._held(lambda: sender.later(self.kept[body], level=level, error=f"failed with {body}"))

    def push(self, threads: int, salt: int, calls: int) -> list[tuple[str, int]]:
        """Consume until the listener has answered so often; all of its calls."""
        heard: list[tuple[str, int]] = []
        changed = threading.Condition()

        def listen(message: ReceivedMessage, context: ConsumeContext) -> ConsumeStatus:
            body, attempt = message.body.decode(), message.delivery_attempt
            with changed:
                heard.append((body, attempt))
                changed.notify_all()
            match answer_to(body, attempt, salt):
                case "raise":
                    raise ValueError(f"failed with {body}")
                case "dead":
                    context.delay_level_when_next_consume = -1
                case "ok":
                    return ConsumeStatus.CONSUME_SUCCESS
            return ConsumeStatus.RECONSUME_LATER

        with self.broker.push_consumer(GROUP, listen, WANTED, consume_thread_max=threads, **self.modes) as consumer:
            with changed:
                changed.wait_for(lambda: len(heard) >= calls, WAIT)
            assert consumer.shutdown()
        return heard

    def push_and_hang(self) -> tuple[str, int]:
        """Begin one message and never answer; others are only prefetched."""
        heard: list[tuple[str, int]] = []
        begun = threading.Event()

        def listen(message: ReceivedMessage, _context: ConsumeContext) -> ConsumeStatus:
            heard.append((message.body.decode(), message.delivery_attempt))
            begun.set()
            threading.Event().wait()
            raise AssertionError

        self.broker.push_consumer(GROUP, listen, WANTED, consume_thread_max=1, pull_batch_size=4, **self.modes)
        assert begun.wait(WAIT)
        return heard[0]

    def resend(self, body: str) -> bool:
        """Whether the dead letter was there to be sent again."""
        found: dict[str, ReceivedMessage] = {}
        with self.broker.dead_letters(GROUP) as letters:
            while body not in found and (received := letters.receive(100, WAIT)):
                found |= {letter.body.decode(): letter for letter in received}
            wanted = found.pop(body, None)
            for letter in found.values():
                letters.change_invisible_duration(letter, 0.0)
            if wanted is not None:
                letters.settled(letters.resend(wanted))
        return wanted is not None

    def pause_group(self, paused: bool) -> None:
        (self.broker.pause_group if paused else self.broker.resume_group)(GROUP)
        self._settle()

    def skip_all(self) -> None:
        self.broker.reset_group(GROUP, skip=True)
        self._settle()

    def held(self) -> int:
        """How many messages the group holds."""
        return sum(table["held"] for table in self.broker.region.progress() if table["group"] == GROUP)

    def letters(self) -> list[tuple[str, int]]:
        """All that ever were dead letters, with their deliveries."""
        return [(record.body.decode(), record.attempts) for record in dead_letters(self.broker)]

    def leave(self) -> None:
        self.consumer.close()
        self.broker.close()

    def _settle(self) -> None:
        """Have on the disk what there is."""
        region = self.broker.region
        assert region.wait_for("flushed", region.get("tail"), int(WAIT * 1e9))

    def _answer(self, answer: object) -> None:
        print(json.dumps(answer), file=self._lines, flush=True)

    def _held(self, do: Callable[[], object]) -> bool:
        try:
            do()
        except ReceiptExpired:
            return False
        return True
