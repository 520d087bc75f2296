"""How a broker ends when something is wrong: a worker that cannot finish, memory unlinked, a directory just removed."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHM, objects_of
from support.consuming import ALL, drain, numbered, send
from support.processes import SMALL, supervisor_of, wait_for_workers, wait_gone, workers_of
from support.waiting import wait_until

import shmbroker
from shmbroker import process
from shmbroker.descriptor import read_descriptor
from shmbroker.naming import BrokerPaths

SLOW: dict[str, Any] = {**SMALL, "flush_interval": 3000.0, "flush_least_bytes": 1 << 20}  # only in memory, for long


def objects(directory: Path) -> list[Path]:
    """Both memory objects of a running broker."""
    descriptor = read_descriptor(BrokerPaths(directory))
    assert descriptor is not None
    return [Path(f"{SHM}{name}") for name in (descriptor.control, descriptor.ring)]


def wait_unlinked(*paths: Path) -> None:
    wait_until(lambda: not any(path.exists() for path in paths), "the memory objects gone")


def remove(directory: Path) -> None:
    """rm -rf, as often as it takes: a worker may just have been making a file."""

    def is_removed() -> bool:
        shutil.rmtree(directory, ignore_errors=True)
        return not directory.exists()

    wait_until(is_removed, "the directory removed")


@pytest.mark.crash
@pytest.mark.parametrize("failpoint", ["dispatcher/checkpoint.half_written", "flusher/flusher.after_pwrite"])
def test_a_worker_that_dies_while_it_finishes_is_followed_by_another(
    directory: Path, monkeypatch: pytest.MonkeyPatch, failpoint: str
) -> None:
    monkeypatch.setenv("SHMBROKER_FAILPOINTS", f"{failpoint}=kill")
    with shmbroker.open(directory, **SLOW) as broker:
        monkeypatch.delenv("SHMBROKER_FAILPOINTS")
        wait_for_workers(directory)
        memory = objects(directory)
        send(broker, *numbered(50))
    wait_unlinked(*memory)
    wait_gone(directory)
    log = BrokerPaths(directory).worker_log("supervisor").read_text()
    assert "exit code -9" in log
    with shmbroker.open(directory, **SMALL) as broker, broker.simple_consumer("audit", ALL) as consumer:
        assert sorted(drain(consumer, 50)) == sorted(numbered(50))


@pytest.fixture
def obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that keeps workers of the test's broker from starting once it is written."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(modules))
    return modules / "posix_ipc.py"


@pytest.mark.crash
@pytest.mark.parametrize("unlink", [False, True], ids=["no worker can be started", "nobody finds the memory any more"])
def test_what_no_worker_can_finish_the_supervisor_finishes(directory: Path, obstacle: Path, unlink: bool) -> None:
    with shmbroker.open(directory, **SLOW) as broker:
        workers = wait_for_workers(directory)
        memory = objects(directory)
        send(broker, *numbered(50))
        with broker.simple_consumer("audit", ALL) as consumer:
            acked = consumer.receive(20)
            consumer.ack(acked)
        assert broker.region.get("flushed") < broker.region.get("tail")
        os.kill(workers["supervisor"], signal.SIGSTOP)
        if unlink:
            for path in memory:
                path.unlink()
        else:
            obstacle.write_text("raise SystemExit(9)")
        for role in ("flusher", "dispatcher"):
            os.kill(workers[role], signal.SIGKILL)
        os.kill(workers["supervisor"], signal.SIGCONT)
        if unlink:
            wait_until(lambda: set(objects_of(directory)) - {path.name for path in memory}, "new memory")
    if not unlink:
        wait_unlinked(*memory)
        obstacle.unlink()
    with shmbroker.open(directory, **SMALL) as broker, broker.simple_consumer("audit", ALL) as consumer:
        rest = {*numbered(50)} - {message.body for message in acked}
        assert {*drain(consumer, 30)} == rest
        assert consumer.receive(1) == []


@pytest.mark.crash
def test_a_broker_whose_worker_cannot_be_started_for_now_starts_it_later(directory: Path, obstacle: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker:
        janitor = wait_for_workers(directory)["janitor"]
        obstacle.write_text("raise SystemExit(9)")
        os.kill(janitor, signal.SIGKILL)
        log = BrokerPaths(directory).worker_log("supervisor")
        wait_until(lambda: log.read_text().count("janitor died, exit code 9") > 1, "failed starts")
        obstacle.unlink()
        wait_until(lambda: workers_of(directory).get("janitor", janitor) != janitor, "another janitor")
        send(broker, b"goes on")


@pytest.mark.parametrize("moment", ["grace", "draining", "drained"])
def test_a_directory_removed_after_the_last_close_leaves_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    if moment != "grace":
        monkeypatch.setenv("SHMBROKER_FAILPOINTS", f"supervisor/supervisor.{moment}=stop")
    with tempfile.TemporaryDirectory(dir=tmp_path, ignore_cleanup_errors=True) as name:
        directory = Path(name, "broker")
        with shmbroker.open(directory, **SLOW | {"embed_grace": 0.3 if moment == "grace" else 0.0}) as broker:
            send(broker, *numbered(50))
            supervisor = wait_for_workers(directory)["supervisor"]
            memory = objects(directory)
        if moment != "grace":
            wait_until(lambda: is_stopped(supervisor), "the supervisor at the failpoint")
        remove(directory)
    if moment != "grace":
        os.kill(supervisor, signal.SIGCONT)
    wait_unlinked(*memory)
    wait_gone(directory)
    assert not directory.exists()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def contents_only(directory: Path) -> None:
    """rm -rf directory/*: the directory itself stays."""
    for path in directory.iterdir():
        shutil.rmtree(path, ignore_errors=True)
        if path.is_file():
            path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("take_away", "moment"),
    [(remove, "grace"), (remove, "draining"), (remove, "drained"), (contents_only, "grace")],
    ids=["rm -rf data", "rm -rf data while it stops", "rm -rf data when it has stopped", "rm -rf data/*"],
)
def test_an_old_broker_leaves_the_one_alone_that_is_started_in_its_place(
    directory: Path, monkeypatch: pytest.MonkeyPatch, take_away: Callable[[Path], None], moment: str
) -> None:
    if moment != "grace":
        monkeypatch.setenv("SHMBROKER_FAILPOINTS", f"supervisor/supervisor.{moment}=stop")
    with shmbroker.open(directory, **SMALL | {"embed_grace": 1.5 if moment == "grace" else 0.0}) as broker:
        monkeypatch.delenv("SHMBROKER_FAILPOINTS", raising=False)
        send(broker, b"old")
        old = wait_for_workers(directory)
        memory = objects(directory)
    if moment != "grace":
        wait_until(lambda: is_stopped(old["supervisor"]), "the old supervisor at the failpoint")
    take_away(directory)
    sent: list[bytes] = []
    with shmbroker.open(directory, **SMALL) as broker, broker.producer("test") as producer:

        def send_while_the_old_one_lives() -> bool:  # it has new queues to make all the time, if it reaches ours
            sent.append(b"%d" % len(sent))
            producer.send(shmbroker.Message(f"topic-{len(sent) % 4}", sent[-1]))
            return not any(process.exists(pid) for pid in old.values())

        if moment != "grace":
            os.kill(old["supervisor"], signal.SIGCONT)
        wait_until(send_while_the_old_one_lives, "the old broker gone")
        wait_unlinked(*memory)
        with shmbroker.open(directory, timeout=5.0) as other:
            assert other.region.header["instance"] == broker.region.header["instance"]
    wait_gone(directory)
    with shmbroker.open(directory, **SMALL) as broker:
        subscriptions = {f"topic-{number}": "*" for number in range(4)}
        with broker.simple_consumer("audit", subscriptions) as consumer:
            assert sorted(drain(consumer, len(sent))) == sorted(sent)


def test_what_is_left_of_a_queue_without_its_log_hinders_nobody(directory: Path) -> None:
    """rm -rf has met a worker at work and given up half-way."""
    with shmbroker.open(directory, **SMALL) as broker, broker.simple_consumer("audit", ALL) as consumer:
        send(broker, *numbered(50))
        drain(consumer, 50)
        region = broker.region
        wait_until(lambda: region.get("dispatched") == region.get("tail"), "the queue in its file")
    wait_gone(directory)
    paths = BrokerPaths(directory)
    shutil.rmtree(paths.log)
    shutil.rmtree(paths.run)
    paths.checkpoint.unlink()
    with shmbroker.open(directory, **SMALL) as broker, broker.simple_consumer("audit", ALL) as consumer:
        send(broker, b"first")
        assert drain(consumer, 1) == [b"first"]
        wait_until(lambda: broker.region.get("dispatched") == broker.region.get("tail"), "the queue in its file")


def test_what_stands_only_in_memory_survives_the_loss_of_a_part_of_the_directory(directory: Path) -> None:
    with shmbroker.open(directory, **SLOW) as broker, broker.simple_consumer("audit", ALL) as consumer:
        send(broker, *numbered(50))
        wait_for_workers(directory)
        memory = objects(directory)
        assert broker.region.get("flushed") < broker.region.get("tail")
        shutil.rmtree(BrokerPaths(directory).run, ignore_errors=True)
        wait_unlinked(*memory)
        assert sorted(drain(consumer, 50)) == sorted(numbered(50))
        assert supervisor_of(directory) > 0
