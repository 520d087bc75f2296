"""Real processes for tests: children with a conversation, a broker's workers, signals."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psutil
from support.waiting import DEADLINE, wait_until

from shmbroker import memory, process
from shmbroker.health import EXPECTED_ROLES
from shmbroker.naming import BrokerPaths

# Small tables, so that many brokers fit beside each other and starts are quick.
SMALL: Final[dict[str, Any]] = {
    "ring_bytes": "1 MiB",
    "segment_bytes": "1 MiB",
    "max_topics": 16,
    "max_queues": 64,
    "max_groups": 8,
    "max_clients": 16,
    "max_waiters": 32,
    "claim_tables": 16,
    "claim_window": 64,
    "overflow_claims": 64,
    "id_window": 1024,
    "embed_grace": 0.1,
}


class Child:
    """A Python process that runs ``source`` with ``arguments`` and talks in lines. Killed when the test leaves it."""

    def __init__(
        self,
        source: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        wrapper: tuple[str, ...] = (),
    ) -> None:
        self._process = subprocess.Popen(
            [*wrapper, sys.executable, "-u", "-c", textwrap.dedent(source), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
        )
        self.pid = self._process.pid

    def read_line(self, deadline: float = DEADLINE) -> str:
        """The next line it prints, without the end of line; "" if it has ended."""
        assert self._process.stdout is not None
        end = time.monotonic() + deadline
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"the child said nothing for {deadline:g} s after {line!r}")
            piece = os.read(self._process.stdout.fileno(), 1)
            if not piece:
                break
            line += piece
        return line.decode().rstrip("\n")

    def write_line(self, line: str = "") -> None:
        """One line to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def wait(self, deadline: float = DEADLINE) -> int:
        """Its exit code; negative for a signal."""
        return self._process.wait(deadline)

    def kill(self) -> None:
        """SIGKILL, and gone."""
        self._process.kill()
        self._process.wait(DEADLINE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def supervisor_of(directory: Path) -> int:
    """Pid of the process that holds the directory's lock; 0 if nobody does."""
    return process.lock_holder(BrokerPaths(directory).lock)


def workers_of(directory: Path) -> dict[str, int]:
    """Pid by role of the living workers of a broker, the supervisor included."""
    found = memory.attach(BrokerPaths(directory))
    if found is None:
        return {}
    return {
        str(worker["role"]): int(worker["pid"])
        for worker in found[0].workers()
        if process.is_alive(process.Identity(worker["pid"], worker["start_ticks"]))
    }


def wait_for_workers(directory: Path) -> dict[str, int]:
    """The same, once all of them are at work."""

    def everybody() -> dict[str, int] | None:
        found = workers_of(directory)
        return found if found.keys() == set(EXPECTED_ROLES) else None

    found = wait_until(everybody, "supervisor and all workers at work")
    assert found is not None
    return found


def processes_of(directory: Path) -> list[psutil.Process]:
    """Every process whose command line names the directory."""
    return [
        candidate
        for candidate in psutil.process_iter(["cmdline"])
        if str(directory) in (candidate.info["cmdline"] or []) and candidate.pid != os.getpid()
    ]


@contextmanager
def pidfds_of(processes: Iterable[psutil.Process]) -> Iterator[list[int]]:
    """One for each that lives. It tells of a death at once; the pid of an orphan stays until init has looked for it."""
    with ExitStack() as opened:
        pidfds = []
        for one in processes:
            with suppress(ProcessLookupError):
                pidfds.append(os.pidfd_open(one.pid))
                opened.callback(os.close, pidfds[-1])
        yield pidfds


def wait_ended(processes: Iterable[psutil.Process], deadline: float = DEADLINE) -> bool:
    """Wait until all of them are dead: nothing is theirs any more, neither memory nor locks nor files."""
    end = time.monotonic() + deadline
    with pidfds_of(processes) as pidfds:
        return all(process.wait_ended(pidfd, max(0.0, end - time.monotonic())) for pidfd in pidfds)


def wait_gone(directory: Path, deadline: float = DEADLINE) -> None:
    """Wait until no process of the broker is left, also none that was started meanwhile."""
    end = time.monotonic() + deadline
    while found := processes_of(directory):
        assert wait_ended(found, end - time.monotonic()), f"did not leave within {deadline:g} s: {found}"


def kill_all(directory: Path) -> None:
    """kill -9 of supervisor and workers, the supervisor first, all stopped before so that none sees another die.

    When it returns they are dead for everybody.
    """
    with pidfds_of(processes_of(directory)) as pidfds:
        for signum in (signal.SIGSTOP, signal.SIGKILL):
            for pidfd in pidfds:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signum)
        assert all(process.wait_ended(pidfd, DEADLINE) for pidfd in pidfds)
    wait_gone(directory)


def stop_broker(directory: Path) -> None:
    """SIGTERM to the supervisor; return when it has stopped the broker cleanly."""
    supervisor = supervisor_of(directory)
    if supervisor > 0:
        os.kill(supervisor, signal.SIGCONT)
        os.kill(supervisor, signal.SIGTERM)
    wait_gone(directory)
    assert supervisor_of(directory) == 0
