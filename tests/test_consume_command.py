"""``shmbroker consume``: a fleet of consumer processes under one foreground program."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from support.command import COMMAND, TIMEOUT, environment, shmbroker
from support.consuming import numbered, send
from support.listening import attempts, done_with, held
from support.processes import SMALL
from support.waiting import wait_until

import shmbroker as api
from shmbroker.broker import Broker
from shmbroker.tools.consume_fleet import PAUSES
from shmbroker.tools.exit_codes import ExitCode

# Writes a line per call to a file, and then does what the body says.
LISTENER = """
import os, signal, threading
from shmbroker import ConsumeStatus

def handle(message, context):
    with open(os.environ["HEARD"], "ab", buffering=0) as out:
        out.write(b"%s %d %d\\n" % (message.body, message.delivery_attempt, os.getpid()))
    if message.body == b"slow":
        while not os.path.exists(os.environ["HEARD"] + ".go"):
            threading.Event().wait(0.01)
    if message.body == b"die once" and message.delivery_attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return ConsumeStatus.CONSUME_SUCCESS

nothing = None
"""


class Stage:
    """A broker, a module with a listener, and what it heard."""

    def __init__(self, broker: Broker, place: Path) -> None:
        self.broker = broker
        self.place = place
        (place / "app.py").write_text(LISTENER)
        self.file = place / "heard"

    @property
    def heard(self) -> list[tuple[bytes, int, int]]:
        """Body, attempt, pid of each call."""
        lines = self.file.read_bytes().splitlines() if self.file.exists() else []
        return [(body, int(attempt), int(pid)) for body, attempt, pid in (line.rsplit(b" ", 2) for line in lines)]

    def wait(self, count: int) -> list[tuple[bytes, int, int]]:
        return wait_until(lambda: self.heard if len(self.heard) >= count else [], f"{count} calls")

    def wait_done(self, count: int) -> None:
        wait_until(lambda: done_with(self.broker) >= count, f"{count} messages acknowledged", deadline=40.0)

    def let_go(self) -> None:
        (self.place / "heard.go").write_bytes(b"")

    @contextmanager
    def fleet(self, *arguments: str, listener: str = "app:handle") -> Iterator[subprocess.Popen[bytes]]:
        command = [*COMMAND, "-d", str(self.broker.directory), "consume", listener, "-g", "audit", "-t", "orders"]
        with (self.place / "log").open("wb") as out:
            process = subprocess.Popen(
                [*command, *arguments], cwd=self.place, stderr=out, env=environment() | {"HEARD": str(self.file)}
            )
            try:
                yield process
            finally:
                children = members(process)
                process.kill()
                process.wait()
                _, alive = psutil.wait_procs(children, timeout=10)
                assert not alive, "they end with their fleet"

    @property
    def log(self) -> str:
        return (self.place / "log").read_text()


def members(fleet: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(fleet.pid).children() if fleet.poll() is None else []


@pytest.fixture
def stage(directory: Path, tmp_path: Path) -> Iterator[Stage]:
    with api.open(directory, **SMALL) as broker:
        broker.create_topic("orders", queues=1)
        yield Stage(broker, tmp_path)


def test_every_message_meets_the_listener_in_one_of_the_processes(stage: Stage) -> None:
    with stage.fleet("--processes", "2", "--threads", "2") as fleet:
        wait_until(lambda: len(members(fleet)) == 2, "two processes")
        send(stage.broker, *numbered(100))
        heard = stage.wait(100)
        wait_until(lambda: done_with(stage.broker) == 100, "everything acknowledged")
        assert sorted(int(body) for body, *_ in heard) == list(range(100))
        assert {attempt for _, attempt, _ in heard} == {1}
        fleet.terminate()
        assert fleet.wait(TIMEOUT) == ExitCode.OK
    assert "Traceback" not in stage.log


def test_the_processes_get_what_an_sql_expression_accepts(stage: Stage) -> None:
    with stage.broker.producer("test") as producer:
        bodies = [(b"%d" % i, {"amount": str(i)}) for i in range(20)]
        producer.send_batch([api.Message("orders", body, properties=amount) for body, amount in bodies])
    with stage.fleet("--processes", "2", "--sql", "amount BETWEEN 5 AND 7"):
        wait_until(lambda: done_with(stage.broker) == 20, "all acknowledged or passed over")
        assert sorted(body for body, *_ in stage.heard) == [b"5", b"6", b"7"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stop_lets_finish_what_runs_and_gives_back_the_rest(stage: Stage, number: signal.Signals) -> None:
    send(stage.broker, b"slow", *numbered(5))
    with stage.fleet("--threads", "1") as fleet:
        stage.wait(1)
        fleet.send_signal(number)
        wait_until(lambda: held(stage.broker) == 1, "the rest given back")
        stage.let_go()
        assert fleet.wait(TIMEOUT) == ExitCode.OK
    assert [body for body, *_ in stage.heard] == [b"slow"]
    assert (done_with(stage.broker), attempts(stage.broker)) == (1, {})


def test_a_stop_that_has_to_leave_something_unfinished_says_so(stage: Stage) -> None:
    send(stage.broker, b"slow")
    with stage.fleet("--await-termination", "0.1") as fleet:
        stage.wait(1)
        fleet.terminate()
        assert fleet.wait(TIMEOUT) == ExitCode.FINDING
    assert "still run" in stage.log
    wait_until(lambda: held(stage.broker) == 0, "given back")
    assert attempts(stage.broker) == {0: 1}


@pytest.mark.crash
def test_a_process_that_dies_is_started_again_and_its_message_delivered_again(stage: Stage) -> None:
    with stage.fleet() as fleet:
        send(stage.broker, b"die once", *numbered(20))
        wait_until(lambda: done_with(stage.broker) == 21, "everything acknowledged")
        assert "was killed by SIGKILL: started again" in stage.log
        heard = stage.heard
        assert [attempt for body, attempt, _ in heard if body == b"die once"] == [1, 2]
        assert len({pid for *_, pid in heard}) == 2
        fleet.terminate()
        assert fleet.wait(TIMEOUT) == ExitCode.OK


@pytest.mark.crash
@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing_and_repeat_only_what_was_running(stage: Stage) -> None:
    messages, kills, threads = 3000, 12, 3
    chance = random.Random(20261121)
    with stage.fleet("--processes", "3", "--threads", str(threads)) as fleet:
        wait_until(lambda: len(members(fleet)) == 3, "three processes")
        send(stage.broker, *numbered(messages // 2))
        for kill in range(kills):
            if kill == kills // 2:
                send(stage.broker, *numbered(messages - messages // 2, messages // 2))
            target = kill * messages // (2 * kills) + chance.randrange(50)
            stage.wait_done(target)
            with suppress(psutil.NoSuchProcess):
                chance.choice(wait_until(lambda: members(fleet), "a process")).kill()
        stage.wait_done(messages)
        heard = stage.heard
        fleet.terminate()
        assert fleet.wait(TIMEOUT) == ExitCode.OK
    attempts_of: dict[int, list[int]] = {}
    for body, attempt, _ in heard:
        attempts_of.setdefault(int(body), []).append(attempt)
    assert sorted(attempts_of) == list(range(messages))
    assert sum(len(calls) - 1 for calls in attempts_of.values()) <= kills * threads
    # One whose process died between count and call was not heard that time: numbers may be missing, never equal.
    assert all(calls == sorted(set(calls)) for calls in attempts_of.values())


@pytest.mark.crash
def test_processes_whose_fleet_was_killed_finish_and_leave(stage: Stage) -> None:
    send(stage.broker, b"slow", *numbered(5))
    with stage.fleet("--threads", "1") as fleet:
        stage.wait(1)
        (child,) = members(fleet)
        fleet.kill()
        wait_until(lambda: held(stage.broker) == 1, "the rest given back")
        stage.let_go()
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running()
    assert done_with(stage.broker) == 1


@pytest.mark.crash
def test_a_process_whose_fleet_was_killed_before_it_ran_leaves_at_once(stage: Stage) -> None:
    settings = {"directory": str(stage.broker.directory), "app_dir": str(stage.place), "listener": "app:handle",
                "group": "audit", "subscriptions": {"orders": "*"}, "settings": {}, "fleet": 2**22 + 1}  # fmt: skip
    command = [sys.executable, "-P", "-m", "shmbroker.tools.consume_process", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("listener", "why"),
    [
        ("app", "expected MODULE:LISTENER"),
        ("nowhere:handle", "No module named 'nowhere'; --app-dir says where its module is"),
        ("app.py:handle", "listener 'app.py:handle': names a file, not a module: app:handle"),
        ("sub/app.py:handle", "names a file, not a module: app:handle --app-dir sub"),
        ("app:missing", "has no attribute 'missing'"),
        ("app:nothing", "is None, and not callable"),
    ],
)
def test_a_listener_that_is_none_ends_the_fleet_at_once_and_says_why(stage: Stage, listener: str, why: str) -> None:
    with stage.fleet("--processes", "2", listener=listener) as fleet:
        assert fleet.wait(TIMEOUT) == ExitCode.USAGE
    assert why in stage.log
    assert "started again" not in stage.log


def test_a_group_that_subscribes_differently_ends_the_fleet_at_once(stage: Stage) -> None:
    with stage.broker.simple_consumer("audit", {"orders": "paid"}), stage.fleet() as fleet:
        assert fleet.wait(TIMEOUT) == ExitCode.REFUSED
    assert "SubscriptionConflict" in stage.log


def test_one_that_keeps_dying_is_started_less_and_less_often(stage: Stage) -> None:
    (stage.place / "app.py").write_text("import os\nos._exit(9)\n")
    with stage.fleet() as fleet:
        wait_until(lambda: "consumer 1 started" in stage.log, "the first start")
        begun = time.monotonic()
        wait_until(lambda: stage.log.count("consumer 1 started") >= 5, "the fifth")
        assert time.monotonic() - begun > sum(PAUSES[:4]) - 0.1
        fleet.terminate()
        assert fleet.wait(TIMEOUT) == ExitCode.OK


def test_a_directory_without_a_broker_is_not_made(tmp_path: Path) -> None:
    done = shmbroker(tmp_path / "none", "consume", "app:handle", "-g", "g", "-t", "t")
    assert done.returncode == ExitCode.NOT_SERVED
    assert not (tmp_path / "none").exists()
    assert list(tmp_path.iterdir()) == []
