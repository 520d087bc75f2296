"""A broker served by the real ``shmbroker serve``, and what the tests of the command line send to it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.command import COMMAND, TIMEOUT, environment
from support.processes import processes_of, wait_for_workers, wait_gone
from support.waiting import DEADLINE, wait_until

from shmbroker import memory
from shmbroker.naming import BrokerPaths

SETTINGS = """
ring_bytes = "1 MiB"
segment_bytes = "1 MiB"
max_message_bytes = "64 KiB"
claim_tables = 16
default_topic_queues = 2
"""


def start(
    directory: Path,
    *arguments: str,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    failpoints: str = "",
) -> subprocess.Popen[bytes]:
    """A command that stays; the caller ends it."""
    command = [*COMMAND, "-d", str(directory), *arguments]
    armed = {"SHMBROKER_FAILPOINTS": failpoints} if failpoints else {}
    return subprocess.Popen(command, env=environment() | armed, stdin=stdin, stdout=stdout, stderr=stderr)


@contextmanager
def served(directory: Path) -> Iterator[None]:
    """``shmbroker serve`` on ``directory``; at the end it stops cleanly and leaves nothing."""
    directory.mkdir(exist_ok=True)
    (directory / "broker.toml").write_text(SETTINGS)
    process = start(directory, "serve")
    try:
        wait_until(lambda: runs(directory), "the broker runs")
        wait_for_workers(directory)
        yield
        process.terminate()
        assert process.wait(TIMEOUT) == 0
        assert_nothing_left(directory)
    finally:
        process.kill()
        process.wait()


@contextmanager
def serving(directory: Path) -> Iterator[None]:
    """``shmbroker serve``, for clients that do not start a broker by themselves."""
    server = start(directory, "serve")
    try:
        wait_for_workers(directory)
        wait_until(lambda: runs(directory), "the broker runs")
        yield
    finally:
        server.terminate()
        server.wait(DEADLINE)


def runs(directory: Path) -> bool:
    paths = BrokerPaths(directory)
    found = memory.attach(paths) if paths.descriptor.exists() else None
    return found is not None and found[0].get("state") == memory.STATE_RUNNING


def assert_nothing_left(directory: Path) -> None:
    """Neither a process nor memory; memory without a descriptor would show in ``ipc list`` as dead."""
    assert not BrokerPaths(directory).descriptor.exists()
    assert processes_of(directory) == []


def wait_for_the_end(directory: Path) -> None:
    """An embedded broker goes when its last client has gone."""
    wait_gone(directory)
    assert_nothing_left(directory)


def lines(count: int) -> list[str]:
    return [f"line {number} {'.' * (number % 50)}" for number in range(count)]


def feed(text: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in text).encode()
