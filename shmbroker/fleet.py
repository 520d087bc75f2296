"""The worker processes of one supervisor: started, restarted when they die, told to leave, waited for."""

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
from shmbroker.failpoint import ENVIRONMENT_KEY
from shmbroker.naming import BrokerPaths

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
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=DEATHS_BEFORE_BACKOFF))


class Fleet:
    """The workers, by role. One thread uses it."""

    def __init__(self, paths: BrokerPaths, log: logging.Logger) -> None:
        self._paths = paths
        self._log = log
        self._members: dict[str, _Member] = {}
        self._poll = select.poll()

    def start(self, roles: Sequence[str]) -> None:
        """Start a worker for each role and keep it running until ``stop``."""
        for role in roles:
            self._members[role] = member = _Member(role)
            self._spawn(member)

    def tend(self, timeout: float, extra_fd: int = -1) -> None:
        """Restart workers that have died; return after ``timeout`` seconds, or when ``extra_fd`` is readable."""
        now = time.monotonic()
        due = [member.due for member in self._members.values() if member.process is None]
        timeout = max(0.0, min([timeout, *(at - now for at in due)]))
        if extra_fd >= 0:
            self._poll.register(extra_fd, select.POLLIN)
        self._poll.poll(timeout * 1000)
        for member in self._members.values():
            if member.process is not None and process.has_ended(member.pidfd):
                self._bury(member, member.process)
            if member.process is None and member.due <= time.monotonic():
                self._spawn(member)

    def stop(self, role: str, timeout: float) -> bool:
        """Tell the worker of a role to finish and leave. False: it failed, or was killed after ``timeout`` seconds."""
        member = self._members.pop(role, None)
        if member is None:
            return True
        if member.process is None:
            return False
        signal.pidfd_send_signal(member.pidfd, signal.SIGTERM)
        if not process.wait_ended(member.pidfd, timeout):
            self._log.error("%s did not leave within %.1f s: killed", role, timeout)
            signal.pidfd_send_signal(member.pidfd, signal.SIGKILL)
        return self._bury(member, member.process) == 0

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

    def _spawn(self, member: _Member) -> None:
        environment = {**interpreter.environment(), process.SUPERVISOR_KEY: str(os.getpid())}
        if member.starts:
            environment.pop(ENVIRONMENT_KEY, None)  # a crash under test happens once: see failpoint.py
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        log_fd = os.open(self._paths.worker_log(member.role), flags, access.file_mode())
        # Blocked signals stay blocked over an exec: a worker told to leave while its interpreter is still starting
        # hears of it once it can finish properly (leave_on_signals).
        held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        try:
            member.process = subprocess.Popen(
                interpreter.command(f"shmbroker.workers.{member.role}", str(self._paths.directory)),
                stdin=subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                cwd="/",
                env=environment,
                start_new_session=True,  # a Ctrl-C at the terminal is the supervisor's affair
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            os.close(log_fd)
        member.pidfd = os.pidfd_open(member.process.pid)
        member.starts += 1
        self._poll.register(member.pidfd, select.POLLIN)
        self._log.info("%s started, pid %d", member.role, member.process.pid)

    def _bury(self, member: _Member, dead: subprocess.Popen[bytes]) -> int:
        code = dead.wait()
        self._poll.unregister(member.pidfd)
        os.close(member.pidfd)
        now = time.monotonic()
        member.process, member.pidfd = None, -1
        member.deaths.append(now)
        hasty = len(member.deaths) == DEATHS_BEFORE_BACKOFF and now - member.deaths[0] < DEATHS_WINDOW_SECONDS
        member.due = now + BACKOFF_SECONDS if hasty else now
        if member.role in self._members:
            self._log.warning("%s died, exit code %d, start no. %d", member.role, code, member.starts)
        return code
