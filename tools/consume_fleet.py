"""The processes of ``shmbroker consume``: started, started again when they die, told to finish, waited for.

This process opens no broker and runs nothing of the user's: whatever that does, it cannot take the fleet with it. A
consumer process that outlives it notices, and finishes by itself (``consume_process.py``).
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

from shmbroker import interpreter
from shmbroker.errors import ConfigError
from shmbroker.tools.exit_codes import ExitCode

# A process that died is started again at once; one that keeps dying waits, each time longer.
PAUSES: Final = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SOUND_SECONDS: Final = 30.0  # who has lived for so long begins at the first pause again
KILL_SECONDS: Final = 5.0  # beyond await_termination, until a process is killed that does not end
HOPELESS: Final = (ExitCode.USAGE, ExitCode.REFUSED)  # no second try changes it

log = logging.getLogger("shmbroker.consume")


@dataclass(slots=True)
class _Member:
    number: int
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    started: float = 0.0
    deaths: int = 0  # in a row
    due: float = 0.0  # monotonic time of the next start


class Fleet:
    """Runs in the main thread of a process that does nothing else."""

    def __init__(self, settings: Mapping[str, Any], processes: int, await_termination: float) -> None:
        self._argument = json.dumps({**settings, "fleet": os.getpid()})
        self._members = [_Member(number) for number in range(1, processes + 1)]
        self._patience = await_termination + KILL_SECONDS
        self._told = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def run(self) -> int:
        """Until a signal says so, or no process can do its work. The exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._tell)
        code = 0
        try:
            while not self._told and not code:
                code = self._keep_running()
                self._wait(self._until_due())
        finally:
            unfinished = self._finish()
            os.close(self._wake)
        return code or (ExitCode.FINDING if unfinished else ExitCode.OK)

    def _tell(self, _signum: int, _frame: FrameType | None) -> None:
        self._told = True
        os.eventfd_write(self._wake, 1)

    def _keep_running(self) -> int:
        """Start who is due. Not 0: one has ended with this code, which is no use to try again."""
        for member in self._members:
            if member.process is not None and (code := member.process.poll()) is not None:
                self._bury(member)
                if code in HOPELESS:
                    log.error("consumer %d has ended with code %d: no second try would help", member.number, code)
                    return code
                log.warning("consumer %d %s: started again", member.number, _ending(code))
            if member.process is None and member.due <= time.monotonic():
                try:
                    self._spawn(member)
                except (OSError, ConfigError) as error:
                    log.warning("consumer %d cannot be started, trying again: %s", member.number, error)
                    self._pause(member)
        return 0

    def _spawn(self, member: _Member) -> None:
        member.process = subprocess.Popen(
            interpreter.command("shmbroker.tools.consume_process", self._argument),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C at the terminal is this process's affair
        )
        member.pidfd = os.pidfd_open(member.process.pid)
        member.started = time.monotonic()
        log.info("consumer %d started, pid %d", member.number, member.process.pid)

    def _bury(self, member: _Member) -> None:
        os.close(member.pidfd)
        member.process, member.pidfd = None, -1
        if time.monotonic() - member.started > SOUND_SECONDS:
            member.deaths = 0
        self._pause(member)

    def _pause(self, member: _Member) -> None:
        member.due = time.monotonic() + PAUSES[min(member.deaths, len(PAUSES) - 1)]
        member.deaths += 1

    def _until_due(self) -> float | None:
        due = [member.due for member in self._members if member.process is None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _wait(self, seconds: float | None) -> None:
        """Until a process has died or we are told to stop, at most so long."""
        poll = select.poll()
        if not self._told:
            poll.register(self._wake, select.POLLIN)
        for member in self._members:
            if member.process is not None:
                poll.register(member.pidfd, select.POLLIN)
        poll.poll(None if seconds is None else seconds * 1000)

    def _finish(self) -> int:
        """Tell all to finish, and wait for them. How many left something unfinished."""
        deadline = time.monotonic() + self._patience
        for member in self._members:
            if member.process is not None:
                member.process.terminate()
        unfinished = 0
        while left := [member for member in self._members if member.process is not None]:
            self._told = True
            seconds = deadline - time.monotonic()
            if seconds > 0:
                self._wait(seconds)
            for member in left:
                assert member.process is not None
                if seconds <= 0:
                    log.warning("consumer %d does not end: killed", member.number)
                    member.process.kill()
                    member.process.wait()
                if (code := member.process.poll()) is not None:
                    unfinished += code not in (ExitCode.OK, -signal.SIGTERM)  # told before it had begun anything
                    self._bury(member)
        return unfinished


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with code {code}"
