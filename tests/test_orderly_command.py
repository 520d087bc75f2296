"""``shmbroker consume --orderly``, and what ``group show`` and ``status`` say of who owns a queue."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from support.command import COMMAND, TIMEOUT, environment, shmbroker, shmbroker_json
from support.consuming import ALL, numbered, send
from support.listening import done_with
from support.orderly import DONE, owners, shares
from support.processes import SMALL
from support.waiting import wait_until

import shmbroker as api
from shmbroker.broker import Broker
from shmbroker.tools.exit_codes import ExitCode

LISTENER = """
import os
from shmbroker import ConsumeOrderlyStatus

def handle(message, context):
    with open(os.environ["HEARD"], "ab", buffering=0) as out:
        out.write(b"%d %s %d\\n" % (message.queue_id, message.body, message.delivery_attempt))
    if message.body == b"3" and message.delivery_attempt == 1:
        return ConsumeOrderlyStatus.SUSPEND_CURRENT_QUEUE_A_MOMENT
    return ConsumeOrderlyStatus.SUCCESS
"""


@contextmanager
def fleet(broker: Broker, place: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    (place / "app.py").write_text(LISTENER)
    command = [
        *COMMAND,
        "-d",
        str(broker.directory),
        "consume",
        "app:handle",
        "-g",
        "audit",
        "-t",
        "orders",
        *arguments,
    ]
    with (place / "log").open("wb") as out:
        process = subprocess.Popen(
            command, cwd=place, stderr=out, env=environment() | {"HEARD": str(place / "heard")}
        )  # fmt: skip
        children = []
        try:
            yield process
            children = psutil.Process(process.pid).children()
            process.terminate()
            assert process.wait(TIMEOUT) == ExitCode.OK
        finally:
            process.kill()
            process.wait()
            assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.fixture
def four(directory: Path) -> Iterator[Broker]:
    with api.open(directory, **SMALL) as broker:
        broker.create_topic("orders", queues=4)
        yield broker


def test_a_fleet_consumes_each_queue_in_order(four: Broker, tmp_path: Path) -> None:
    with fleet(four, tmp_path, "--orderly", "--processes", "2", "--suspend", "0.05"):
        wait_until(lambda: shares(four) == [2, 2], "two owners", deadline=30.0)
        for queue in range(4):
            send(four, *numbered(50), queue_id=queue)
        wait_until(lambda: done_with(four) == 200, "everything acknowledged", deadline=30.0)
    words = [line.split() for line in (tmp_path / "heard").read_bytes().splitlines()]
    expected = [(body, b"1") for body in numbered(50)]
    expected.insert(4, (b"3", b"2"))
    for queue in range(4):
        assert [(body, attempt) for where, body, attempt in words if int(where) == queue] == expected


def test_group_show_and_status_name_the_owners(four: Broker) -> None:
    with four.push_consumer("audit", lambda *_: DONE, ALL, orderly=True):
        wait_until(lambda: len(owners(four)) == 4, "all queues owned")
        shown = shmbroker_json(four.directory, "group", "show", "audit")
        assert [queue["owner"]["pid"] for queue in shown["queues"]] == [os.getpid()] * 4
        text = shmbroker(four.directory, "group", "show", "audit").stdout
        assert "owner" in text
        assert text.count(str(os.getpid())) >= 4
        status = shmbroker_json(four.directory, "status", code=None)
        (group,) = [group for group in status["group_lag"] if group["group"] == "audit"]
        assert group["owners"] == [{"topic": "orders", "queue_id": i, "pid": os.getpid()} for i in range(4)]
        assert f"4 by {os.getpid()}" in shmbroker(four.directory, "status").stdout
    shown = shmbroker_json(four.directory, "group", "show", "audit")
    assert [queue["owner"] for queue in shown["queues"]] == [None] * 4
