"""Members of a group that consumes in order, and what is to be true of what they heard."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from support.processes import Child
from support.waiting import wait_until

from shmbroker import ConsumeOrderlyStatus
from shmbroker.broker import Broker

DONE: Final = ConsumeOrderlyStatus.SUCCESS
SUSPEND: Final = ConsumeOrderlyStatus.SUSPEND_CURRENT_QUEUE_A_MOMENT

# A member of the group "audit" in a process of its own; settings of the consumer, and of the broker, as keyword
# arguments. It writes to a file of all members, in one order for all: "began QUEUE OFFSET ATTEMPT PID BODY", and "done"
# likewise when its listener has come to its end. A body "slow" waits for a line of stdin, "poison" kills the process.
MEMBER: Final = """
    import os, signal, sys, threading, shmbroker
    lines = threading.Semaphore(0)
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    def note(word, message):
        place = f"{message.queue_id} {message.queue_offset} {message.delivery_attempt} {os.getpid()}"
        os.write(log, f"{word} {place} {message.body.decode()}\\n".encode())
    def handle(message, context):
        note("began", message)
        if message.body == b"poison":
            os.kill(os.getpid(), signal.SIGKILL)
        if message.body == b"slow":
            lines.acquire()
        note("done", message)
        return shmbroker.ConsumeOrderlyStatus.SUCCESS
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[4] if sys.argv[4:] else "{}"))
    settings = eval(sys.argv[3] if sys.argv[3:] else "{}")
    consumer = broker.push_consumer("audit", handle, {"orders": "*"}, orderly=True, **settings)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        lines.release()
    print("ended", consumer.shutdown(), flush=True)
    broker.close()
"""


class Call(NamedTuple):
    word: str
    queue_id: int
    offset: int
    attempt: int
    pid: int
    body: str


class Log:
    """What all members wrote, in the order in which they did."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def calls(self) -> list[Call]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        words = (line.split(" ", 5) for line in lines)
        return [Call(word, int(queue), int(offset), int(attempt), int(pid), body)
                for word, queue, offset, attempt, pid, body in words]  # fmt: skip

    def began(self, pid: int | None = None) -> list[Call]:
        return [call for call in self.calls if call.word == "began" and pid in (None, call.pid)]

    def done(self) -> set[tuple[int, int]]:
        """Queue and offset of what a listener has come to an end with."""
        return {(call.queue_id, call.offset) for call in self.calls if call.word == "done"}

    def wait_done(self, count: int, deadline: float = 30.0) -> None:
        wait_until(lambda: len(self.done()) >= count, f"{count} messages done", deadline)

    def check_order(self, sent: dict[int, list[bytes]], killed: set[int]) -> None:
        """Nothing began before its predecessor was done with, or while another process had something of its queue, but
        for processes that were killed; and in the end everything was heard."""
        done = dict.fromkeys(sent, -1)
        running: dict[int, Call] = {}
        for call in self.calls:
            before = running.pop(call.queue_id, None)
            if call.word == "done":
                assert before is not None
                assert before[1:4] == call[1:4]
                done[call.queue_id] = max(done[call.queue_id], call.offset)
                continue
            assert before is None or before.pid in killed, f"{call} while {before} ran"
            assert call.offset <= done[call.queue_id] + 1, f"{call} before its predecessor"
            assert call.body == sent[call.queue_id][call.offset].decode()
            running[call.queue_id] = call
        assert done == {queue_id: len(bodies) - 1 for queue_id, bodies in sent.items()}


@contextmanager
def member(
    directory: Path, log: Log, settings: str = "{}", *, doomed: bool = False, **arguments: Any
) -> Iterator[Child]:
    """One that has joined, unless it is to die before."""
    with Child(MEMBER, directory, log.path, settings, **arguments) as child:
        assert doomed or child.read_line() == "ready"
        yield child


def owners(broker: Broker, group: str = "audit") -> dict[int, int]:
    """Queue of the topic to pid of its owner, as far as there is one."""
    pids = {client["slot"]: client["pid"] for client in broker.region.clients()}
    tables = [table for table in broker.region.progress() if table["group"] == group and table["topic"] == "orders"]
    return {table["queue_id"]: pids.get(table["owner"], 0) for table in tables if table["owner"] is not None}


def shares(broker: Broker) -> list[int]:
    """How many queues each owner has, most first."""
    found = list(owners(broker).values())
    return sorted((found.count(pid) for pid in set(found)), reverse=True)


def semaphore_sets(uid: int | None = None) -> set[int]:
    """Ids of the sets of a user, by default this one."""
    uid = os.geteuid() if uid is None else uid
    lines = Path("/proc/sysvipc/sem").read_text().splitlines()[1:]
    return {int(line.split()[1]) for line in lines if int(line.split()[4]) == uid}


def remove_semaphores(found: int) -> None:
    subprocess.run(["ipcrm", "-s", str(found)], check=True)
