"""The demo's fleet: starts the processes, kills some of them on the way, replaces them, and leaves none behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.progress import Progress

from shmbroker.tools import demo_processes as processes
from shmbroker.tools import inside
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Failure

STALLED_SECONDS = 60.0
TICK_SECONDS = 0.02
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_deferred() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM, however many, take effect where the function given is called, and when the block is left.

    Only there, so that nothing that is to be left in order is cut short. Blocking them would not do: another thread may
    take them.
    """
    came: list[int] = []
    handlers: dict[int, Any] = {number: signal.signal(number, lambda got, _: came.append(got)) for number in SIGNALS}

    def heed() -> None:
        if came and callable(handler := handlers[came[0]]):
            handler(came[0], None)

    try:
        yield heed
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@dataclass(frozen=True, slots=True)
class Kill:
    """kill -9 of ``what`` once this share of all lines is sent."""

    what: str
    at_share: float


KILLS = (Kill("sender", 0.25), Kill("receiver", 0.45), Kill("flusher", 0.65))


@dataclass(slots=True)
class Killed:
    what: str
    pid: int
    sent: int  # lines, when it was killed
    received: int


@dataclass(slots=True)
class Member:
    """A place in the fleet; its process changes with each life."""

    name: str
    target: Any
    arguments: tuple[Any, ...]  # before and after the number of its life
    rest: tuple[Any, ...]
    process: BaseProcess | None = None
    lives: int = 0
    killed: bool = False
    done: bool = False

    def start(self) -> None:
        self.lives += 1
        self.killed = False
        arguments = (*self.arguments, self.name, self.lives, *self.rest)
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=self.target, args=arguments, name=self.name, daemon=True)
        resource_tracker.ensure_running()  # here, because whoever starts it unblocks what is blocked next
        # Stays so over the exec: they are the parent's affair.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def kill(self) -> int:
        """The pid of what was killed."""
        assert self.process is not None
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.killed = True
        return self.process.pid

    def look_after(self) -> None:
        """Replace the process if it was killed. Raises Failure if it failed by itself."""
        assert self.process is not None
        if self.done or self.process.exitcode is None:
            return
        if self.killed:
            self.start()
        elif self.process.exitcode == 0:
            self.done = True
        else:
            raise Failure(f"{self.name} ended with exit code {self.process.exitcode}", ExitCode.INTERNAL)

    def stop(self) -> None:
        if self.process is not None and self.process.pid is not None:
            self.process.kill()
            self.process.join()


@dataclass(slots=True)
class Fleet:
    """The processes of one run, the kills that are still due, and those made."""

    directory: Path
    histories: Path
    input: Path
    at_least: int
    lines: int
    senders: int
    receivers: int
    due: list[Kill] = field(default_factory=lambda: list(KILLS))
    made: list[Killed] = field(default_factory=list)

    def run(self, progress: Progress, heed: Callable[[], None]) -> None:
        """``heed``: see ``signals_deferred``, which must surround this: who is started must be known, to be stopped."""
        counters = multiprocessing.get_context("spawn").RawArray(
            "q", processes.WORDS + processes.COUNTERS * max(self.senders, self.receivers)
        )
        senders = [
            Member(
                f"sender-{index}",
                processes.send_lines,
                (self.directory, self.histories),
                (self.input, self.at_least, (index, self.senders), counters),
            )
            for index in range(self.senders)
        ]
        receivers = [
            Member(f"receiver-{index}", processes.receive_lines, (self.directory, self.histories), (index, counters))
            for index in range(self.receivers)
        ]
        members = receivers + senders
        sending = progress.add_task("sent", total=self.lines)
        receiving = progress.add_task("received", total=self.lines)
        try:
            for member in members:
                heed()
                member.start()
            moved, seen = time.monotonic(), (0, 0)
            while not all(member.done for member in members):
                heed()
                wait([m.process.sentinel for m in members if m.process and not m.done], timeout=TICK_SECONDS)
                sent, received = (processes.total(counters, kind) for kind in (processes.SENT, processes.RECEIVED))
                progress.update(sending, completed=min(sent, self.lines))
                progress.update(receiving, completed=min(received, self.lines))
                self._kill_who_is_due(sent, received, senders[0], receivers[0], counters)
                for member in members:
                    member.look_after()
                if all(member.done for member in senders):
                    counters[processes.CLOSING] = 1
                if (sent, received) != seen:
                    moved, seen = time.monotonic(), (sent, received)
                elif time.monotonic() - moved > STALLED_SECONDS:
                    raise Failure(
                        f"nothing moved for {STALLED_SECONDS:.0f} s: sent {sent}, received {received}", ExitCode.FINDING
                    )
            for task in (sending, receiving):
                progress.update(task, completed=self.lines)
        finally:
            for member in members:
                member.stop()

    def _kill_who_is_due(self, sent: int, received: int, sender: Member, receiver: Member, counters: Any) -> None:
        while self.due and sent >= self.due[0].at_share * self.lines:
            kill = self.due[0]
            if kill.what == "receiver":
                counters[processes.VICTIM] = 1
                if not processes.total(counters, processes.HOLDING):
                    return  # until it holds what it has not acknowledged: that must come again, at another
                counters[processes.VICTIM] = 0
            self.due.pop(0)
            if kill.what == "flusher":
                with inside.attached(self.directory) as region:
                    pid = inside.worker_pids(region)["flusher"]
                os.kill(pid, signal.SIGKILL)
            else:
                member = sender if kill.what == "sender" else receiver
                if member.process is None or member.process.exitcode is not None:
                    continue  # it was faster; the report shows that this kill is missing
                pid = member.kill()
            self.made.append(Killed(kill.what, pid, sent, received))
