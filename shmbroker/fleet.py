"""The worker processes of one supervisor: started, restarted when they die, told to finish, waited for."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from shmbroker import access, interpreter, process
from shmbroker.errors import ConfigError
from shmbroker.failpoint import ENVIRONMENT_KEY
from shmbroker.naming import BrokerPaths

WORKERS: Final = ("flusher", "dispatcher", "janitor", "scheduler")  # in the order in which they are needed
# A worker that died is restarted at once; one that keeps dying waits, so that a broken disk does not burn a core.
DEATHS_BEFORE_BACKOFF: Final = 5
DEATHS_WINDOW_SECONDS: Final = 10.0
BACKOFF_SECONDS: Final = 1.0


@dataclass(slots=True)
class _Member:
    role: str
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    starts: int = 0
    due: float = 0.0  # monotonic time of the next start
    finishing: bool = False  # told to; started anew only by another ``finish``
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=DEATHS_BEFORE_BACKOFF))


class Fleet:
    """The workers, by role. One thread uses it."""

    def __init__(self, paths: BrokerPaths, roles: Sequence[str], log: logging.Logger) -> None:
        self._paths = paths
        self._log = log
        self._members: dict[str, _Member] = {}
        self._poll = select.poll()
        # Opened once: whoever removes the directory does not meet a file that comes anew.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._logs = {role: os.open(paths.worker_log(role), flags, access.file_mode()) for role in roles}

    def start(self, roles: Sequence[str]) -> None:
        """Start a worker for each role; ``restart_dead`` keeps it running until ``finish`` or ``kill``."""
        for role in roles:
            self._members[role] = member = _Member(role)
            self._spawn(member)

    def wait(self, timeout: float, extra_fd: int = -1) -> None:
        """At most ``timeout`` seconds: until a worker has died or is due to start, or ``extra_fd`` is readable."""
        now = time.monotonic()
        due = [member.due for member in self._members.values() if member.process is None and not member.finishing]
        if extra_fd >= 0:
            self._poll.register(extra_fd, select.POLLIN)
        self._poll.poll(max(0.0, min([timeout, *(at - now for at in due)])) * 1000)
        if extra_fd >= 0:
            self._poll.unregister(extra_fd)

    def restart_dead(self) -> None:
        """Start those anew that have died. Where that is not possible for now, it is tried again later."""
        for member in self._members.values():
            if member.finishing:
                continue
            if member.process is not None and process.has_ended(member.pidfd):
                self._bury(member, member.process)
            if member.process is None and member.due <= time.monotonic():
                try:
                    self._spawn(member)
                except (OSError, ConfigError) as error:
                    self._log.warning("no %s can be started, trying again: %s", member.role, error)
                    member.due = time.monotonic() + BACKOFF_SECONDS

    def finish(self, role: str, timeout: float) -> bool:
        """Have a worker of that role finish and leave: the one that runs, or a new one. The others are kept running.

        False: it failed, was killed after ``timeout`` seconds, or could not be started; another may try.
        """
        deadline = time.monotonic() + timeout
        member = self._members.setdefault(role, _Member(role))
        member.finishing = True
        if member.process is None:
            try:
                self._spawn(member)
            except (OSError, ConfigError) as error:
                self._log.warning("no %s can be started: %s", role, error)
                return False
        assert member.process is not None
        signal.pidfd_send_signal(member.pidfd, signal.SIGTERM)
        while not process.has_ended(member.pidfd) and time.monotonic() < deadline:
            self.wait(deadline - time.monotonic())
            self.restart_dead()
        if not process.has_ended(member.pidfd):
            self._log.error("%s did not leave within %.1f s: killed", role, timeout)
            signal.pidfd_send_signal(member.pidfd, signal.SIGKILL)
        if self._bury(member, member.process) != 0:
            return False
        del self._members[role]
        return True

    def pid(self, role: str) -> int:
        """The process that was started for a role; 0 if there is none at the moment."""
        member = self._members.get(role)
        return 0 if member is None or member.process is None else member.process.pid

    def kill(self, role: str) -> None:
        """End a worker that has nothing worth finishing, and start it no more."""
        member = self._members.pop(role, None)
        if member is not None and member.process is not None:
            signal.pidfd_send_signal(member.pidfd, signal.SIGKILL)
            self._bury(member, member.process)

    def close(self) -> None:
        """After the last worker has left."""
        for fd in self._logs.values():
            os.close(fd)

    def _spawn(self, member: _Member) -> None:
        environment = {**interpreter.environment(), process.SUPERVISOR_KEY: str(os.getpid())}
        if member.starts:
            environment.pop(ENVIRONMENT_KEY, None)  # a crash under test happens once: see failpoint.py
        # Blocked signals stay blocked over an exec: a worker told to leave while its interpreter is still starting
        # hears of it once it can finish properly (leave_on_signals).
        held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        try:
            started = subprocess.Popen(
                interpreter.command(f"shmbroker.workers.{member.role}", str(self._paths.directory)),
                stdin=subprocess.DEVNULL,
                stdout=self._logs[member.role],
                stderr=self._logs[member.role],
                env=environment,
                start_new_session=True,  # a Ctrl-C at the terminal is the supervisor's affair
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        try:
            member.pidfd = os.pidfd_open(started.pid)
        except OSError:
            started.kill()
            started.wait()
            raise
        member.process = started
        member.starts += 1
        self._poll.register(member.pidfd, select.POLLIN)
        self._log.info("%s started, pid %d", member.role, started.pid)

    def _bury(self, member: _Member, dead: subprocess.Popen[bytes]) -> int:
        """Take note of its end, whose exit code is returned."""
        code = dead.wait()
        self._poll.unregister(member.pidfd)
        os.close(member.pidfd)
        now = time.monotonic()
        member.process, member.pidfd = None, -1
        member.deaths.append(now)
        hasty = len(member.deaths) == DEATHS_BEFORE_BACKOFF and now - member.deaths[0] < DEATHS_WINDOW_SECONDS
        member.due = now + BACKOFF_SECONDS if hasty else now
        if code != 0 and member.role in self._members:
            self._log.warning("%s died, exit code %d, start no. %d", member.role, code, member.starts)
        return code
