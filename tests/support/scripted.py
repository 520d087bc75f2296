"""A listener whose answers stand in the messages, and whose calls stand in a file that outlives a kill."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shmbroker import ConsumeContext, ConsumeStatus, PushConsumer, ReceivedMessage

MAX_RETRIES: Final = 2

# What a body begins with: the deliveries that end in an answer, and whether it is a dead letter behind them.
KINDS: Final = {
    "ok": (1, False),
    "once": (2, False),  # fails once
    "fail": (1 + MAX_RETRIES, True),
    "dead": (1, True),  # asks for the dead letters at once
    "slow": (1, False),  # answers when `patience` others have begun
    "pause": (1, False),  # pauses its consumer for a moment, so that what was prefetched goes back
}


def script(count: int) -> list[bytes]:
    """A slow message, and behind it ``count`` of all other kinds, most of them plain."""
    kinds = ["ok", "once", "fail", "dead", "ok", "ok", "pause", "ok", "ok", "ok"]
    return [b"slow 0", *(b"%s %d" % (kinds[i % len(kinds)].encode(), i) for i in range(1, count + 1))]


def kind_of(body: str) -> str:
    return body.split(maxsplit=1)[0]


class Scripted:
    """Called with single messages. ``note`` is called when a call has begun and been noted."""

    def __init__(self, history: Path, patience: int = 0, note: Callable[[bytes], None] = lambda _body: None) -> None:
        self._history = os.open(history, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._patience = patience
        self._note = note
        self._begun = threading.Semaphore(0)
        self._consumer: PushConsumer | None = None
        self._known = threading.Event()

    def belongs_to(self, consumer: PushConsumer) -> None:
        self._consumer = consumer
        self._known.set()

    def close(self) -> None:
        os.close(self._history)

    def __call__(self, message: ReceivedMessage, context: ConsumeContext) -> ConsumeStatus:
        body, attempt = message.body.decode(), message.delivery_attempt
        self._write("began", body, attempt)
        self._note(message.body)
        self._begun.release()
        kind = kind_of(body)
        if kind == "slow":
            for _ in range(self._patience):
                self._begun.acquire()
        elif kind == "pause":
            self._known.wait()
            assert self._consumer is not None
            self._consumer.pause()
            self._consumer.resume()
        elif kind == "dead":
            context.delay_level_when_next_consume = -1
        self._write("answered", body, attempt)
        fails = kind in ("fail", "dead") or (kind == "once" and attempt == 1)
        return ConsumeStatus.RECONSUME_LATER if fails else ConsumeStatus.CONSUME_SUCCESS

    def _write(self, word: str, body: str, attempt: int) -> None:
        line = f"{word}|{body}|{attempt}|{os.getpid()}|{threading.get_ident()}\n"
        os.write(self._history, line.encode())  # one write to the end of a file is whole, also beside other processes


@dataclass(frozen=True)
class History:
    """What the calls of one or more processes have left, in their order."""

    begun: dict[str, list[int]]  # body to attempts
    answered: dict[str, list[int]]
    last: dict[int, set[str]]  # pid to the last body that each of its threads has begun

    @classmethod
    def read(cls, files: Iterable[Path]) -> History:
        begun: dict[str, list[int]] = defaultdict(list)
        answered: dict[str, list[int]] = defaultdict(list)
        last: dict[tuple[int, int], str] = {}
        for path in files:
            for line in path.read_text().splitlines():
                word, body, attempt, pid, thread = line.split("|")
                (begun if word == "began" else answered)[body].append(int(attempt))
                if word == "began":
                    last[int(pid), int(thread)] = body
        ends: dict[int, set[str]] = defaultdict(set)
        for (process, _), body in last.items():
            ends[process].add(body)
        return cls(begun, answered, ends)


def judge(history: History, bodies: list[bytes], dead: dict[str, int], *, charged: int, killed: int = 0) -> int:
    """Compare every delivery with the script. Returns how many were charged to messages that did not run at the kill.

    ``dead``: body to the deliveries of its dead letter; ``killed``: the pid of a consumer that was, which may have
    charged one more delivery to ``charged`` messages at most.
    """
    repeated = set()
    for body in map(bytes.decode, bodies):
        deliveries, ends_dead = KINDS[kind_of(body)]
        spent = kind_of(body) == "fail"  # its deliveries end where the policy ends, whoever is killed
        attempts = history.begun[body]
        last = attempts[-1]
        assert attempts == sorted(set(attempts)), f"{body}: no attempt twice, each higher than the last: {attempts}"
        assert last - len(attempts) in (0, 1), f"{body}: charged for deliveries that nobody saw: {attempts}"
        assert deliveries - spent <= last <= deliveries + (not spent), f"{body}: {attempts}"
        if last > deliveries or len(history.answered[body]) < last:
            repeated.add(body)
        assert (body in dead) == ends_dead, body
        assert dead.get(body, 0) == ends_dead * (deliveries if spent else last), body
    assert len(repeated) <= charged, repeated
    return len(repeated - history.last.get(killed, set()))
