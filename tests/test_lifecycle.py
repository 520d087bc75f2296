"""A broker from open to clean stop, and everything that can be killed on the way."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import served
from support.processes import (
    SMALL,
    Child,
    kill_all,
    stop_broker,
    supervisor_of,
    wait_for_workers,
    wait_gone,
    workers_of,
)
from support.waiting import wait_until

import shmbroker
from shmbroker import Message, SendStatus, memory, process
from shmbroker._native._core import start_ticks
from shmbroker.attachment import start_supervisor
from shmbroker.broker import Broker
from shmbroker.descriptor import read_descriptor
from shmbroker.naming import BrokerPaths

KILLED = "the supervisor of {} was killed while it started: starting another"  # what an opener logs
SENDER = """
    import sys, shmbroker
    from shmbroker import Message
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    producer = broker.producer("test")
    print("open")
    for line in sys.stdin:
        result = producer.send(Message("orders", line.rstrip("\\n").encode()))
        print(result.status.name, result.position)
"""


def open_small(directory: Path, **settings: Any) -> Broker:
    return shmbroker.open(directory, **{**SMALL, **settings})


def send(broker: Broker, body: bytes) -> int:
    """Send a message; the position of its record."""
    with broker.producer("test") as producer:
        result = producer.send(Message("orders", body))
    assert result.status is SendStatus.SEND_OK
    return int(result.position)


def body_at(broker: Broker, position: int) -> bytes:
    """The body of the record at ``position``, from the log's files, once it is there."""
    region = broker.region
    wait_until(lambda: region.get("flushed") > position, "the message on the disk")
    from shmbroker.record import decode_record

    return bytes(decode_record(broker.files.read_log(position)).body)


def test_the_last_client_leaves_and_the_broker_stops_cleanly(directory: Path) -> None:
    with open_small(directory) as broker:
        position = send(broker, b"42")
        assert BrokerPaths(directory).descriptor.exists()
    wait_gone(directory)
    assert not BrokerPaths(directory).descriptor.exists()
    with open_small(directory) as broker:
        assert body_at(broker, position) == b"42"


def test_a_second_process_attaches_to_the_same_broker(broker: Broker, directory: Path) -> None:
    with Child(SENDER, directory, SMALL) as child:
        assert child.read_line() == "open"
        child.write_line("from another process")
        status, position = child.read_line().split()
    assert status == "SEND_OK"
    assert body_at(broker, int(position)) == b"from another process"


def test_a_killed_client_gives_its_slot_back_at_once(broker: Broker, directory: Path) -> None:
    wait_for_workers(directory)
    with Child(SENDER, directory, SMALL) as child:
        assert child.read_line() == "open"
        assert len(broker.region.clients()) == 2
        child.kill()
        wait_until(lambda: len(broker.region.clients()) == 1, "the dead client's slot free")


def test_a_dead_process_exists_no_more_though_nobody_has_waited_for_it() -> None:
    """Else a client that was killed while it attached would keep an embedded broker for as long as init is idle."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert process.exists(child.pid)
        child.kill()
        wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, "the child dead")
        assert not process.exists(child.pid)
    assert not process.exists(child.pid)


def test_a_pid_that_has_come_round_as_the_id_of_a_thread_is_no_process() -> None:
    """Else whoever looks at what a dead process has left fails: clients, janitor, `shmbroker ipc`."""
    with ThreadPoolExecutor(1) as threads:
        thread = threads.submit(threading.get_native_id).result()
        assert not process.exists(thread)
        assert not process.is_alive(process.Identity(thread, start_ticks(thread)))


@pytest.mark.crash
@pytest.mark.parametrize("name", ["janitor.death_seen", "janitor.reaped"])
def test_a_janitor_killed_while_it_clears_up_after_a_client_is_followed_by_one_that_finishes(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("SHMBROKER_FAILPOINTS", f"janitor/{name}=kill")
    with open_small(directory) as broker:
        monkeypatch.delenv("SHMBROKER_FAILPOINTS")
        first = wait_for_workers(directory)["janitor"]
        with Child(SENDER, directory, SMALL) as child:
            assert child.read_line() == "open"
            child.kill()
        wait_until(lambda: workers_of(directory).get("janitor", first) != first, "another janitor")
        wait_until(lambda: len(broker.region.clients()) == 1, "the dead client's slot free")


@pytest.mark.crash
@pytest.mark.parametrize("role", ["flusher", "dispatcher", "janitor", "scheduler"])
def test_a_killed_worker_is_restarted_and_nothing_is_lost(broker: Broker, directory: Path, role: str) -> None:
    before = wait_for_workers(directory)
    positions = {send(broker, b"before"): b"before"}
    os.kill(before[role], signal.SIGKILL)
    positions[send(broker, b"during")] = b"during"
    wait_until(lambda: workers_of(directory).get(role, before[role]) != before[role], f"another {role}")
    positions[send(broker, b"after")] = b"after"
    assert {position: body_at(broker, position) for position in positions} == positions
    after = wait_for_workers(directory)
    assert {other for other in before if before[other] != after[other]} == {role}


@pytest.mark.crash
def test_a_killed_supervisor_is_replaced_and_the_memory_stays(broker: Broker, directory: Path) -> None:
    before = wait_for_workers(directory)
    descriptor = read_descriptor(BrokerPaths(directory))
    position = send(broker, b"before")
    os.kill(before["supervisor"], signal.SIGKILL)
    wait_until(
        lambda: workers_of(directory).get("supervisor", before["supervisor"]) != before["supervisor"], "a successor"
    )
    after = wait_for_workers(directory)
    assert not set(before.values()) & set(after.values()), "the orphans have left"
    assert read_descriptor(BrokerPaths(directory)) == descriptor
    assert body_at(broker, position) == b"before"
    assert body_at(broker, send(broker, b"after")) == b"after"


@pytest.mark.crash
def test_what_was_sent_while_no_supervisor_can_start_is_kept_for_the_one_that_can(directory: Path) -> None:
    descriptor = BrokerPaths(directory).descriptor
    obstacle = descriptor.with_suffix(".tmp")  # as a full disk: the descriptor cannot be written
    with Child(SENDER, directory, SMALL) as child:
        assert child.read_line() == "open"
        workers = wait_for_workers(directory)
        attached = memory.attach(BrokerPaths(directory))
        assert attached is not None
        obstacle.mkdir()
        other = descriptor.read_text().replace('"worker_tick_ms": 5', '"worker_tick_ms": 6')
        descriptor.write_text(other)  # what says the same would not be written anew
        os.kill(workers["flusher"], signal.SIGSTOP)
        os.kill(workers["supervisor"], signal.SIGKILL)
        os.kill(workers["flusher"], signal.SIGKILL)
        wait_until(
            lambda: "cannot serve" in BrokerPaths(directory).worker_log("supervisor").read_text(), "a failed start"
        )
        child.write_line("while nobody serves")
        status, position = child.read_line().split()
        assert status == "SEND_OK"
        assert attached[0].get("flushed") <= int(position)
        os.kill(child.pid, signal.SIGSTOP)
        kill_all(directory)
    obstacle.rmdir()
    with open_small(directory) as broker:
        assert body_at(broker, int(position)) == b"while nobody serves"


@pytest.mark.crash
def test_a_client_that_cannot_start_a_supervisor_for_now_does_so_later(
    broker: Broker, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = wait_for_workers(directory)
    position = send(broker, b"before")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        os.kill(before["supervisor"], signal.SIGKILL)
        wait_until(lambda: "cannot be restarted, trying again: " in caplog.text, "a failed try")
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    wait_until(
        lambda: workers_of(directory).get("supervisor", before["supervisor"]) != before["supervisor"], "a successor"
    )
    assert body_at(broker, position) == b"before"
    assert body_at(broker, send(broker, b"after")) == b"after"


@pytest.mark.crash
@pytest.mark.parametrize("failpoint", ["supervisor.draining=stop", "supervisor.draining=kill"])
def test_clients_of_a_served_broker_wait_out_its_restart(directory: Path, failpoint: str) -> None:
    """It stops and is started anew, or is killed while it stops: its successor goes on with the same memory then."""
    bodies: list[bytes] = []
    received: set[bytes] = set()
    failures: list[Exception] = []
    done = threading.Event()

    def keep(work: Callable[[], None]) -> None:
        while not done.is_set():
            try:
                work()
            except Exception as error:
                failures.append(error)
                return

    def send_one() -> None:
        body = b"%d" % len(bodies)
        producer.send(Message("orders", body), timeout=15.0)
        bodies.append(body)

    def receive_some() -> None:
        messages = consumer.receive(32, wait=0.1)
        received.update(message.body for message in messages)
        with suppress(shmbroker.BrokerClosed):  # not recorded: they come again
            consumer.ack(messages)

    directory.mkdir(exist_ok=True)
    (directory / "broker.toml").write_text(served.SETTINGS + "send_timeout_ms = 15000\n")
    first = served.start(directory, "serve", failpoints=failpoint)
    wait_until(lambda: served.runs(directory), "the broker runs")
    wait_for_workers(directory)
    with shmbroker.open(directory) as broker:
        producer, consumer = broker.producer("p"), broker.simple_consumer("g", {"orders": "*"})
        threads = [threading.Thread(target=keep, args=(work,)) for work in (send_one, receive_some)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(received) > 10, "some messages received")
        first.terminate()
        if failpoint.endswith("stop"):
            wait_until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED, "the broker draining")
            first.send_signal(signal.SIGCONT)
        assert first.wait(20) == (-signal.SIGKILL if failpoint.endswith("kill") else 0)
        second = served.start(directory, "serve")
        sent = len(bodies)
        wait_until(lambda: failures or len(bodies) > sent + 10, "sends go on")
        done.set()
        for thread in threads:
            thread.join(20)
        while messages := consumer.receive(32, wait=1.0):
            received.update(message.body for message in messages)
            consumer.ack(messages)
    second.terminate()
    assert second.wait(20) == 0
    assert failures == []
    assert received == set(bodies)


@pytest.mark.crash
def test_what_was_not_flushed_when_everything_was_killed_is_flushed_by_the_next_broker(directory: Path) -> None:
    with Child(SENDER, directory, SMALL) as child:
        assert child.read_line() == "open"
        os.kill(wait_for_workers(directory)["flusher"], signal.SIGSTOP)
        sent = {}
        for number in range(100):
            child.write_line(f"message {number}")
            status, position = child.read_line().split()
            assert status == "SEND_OK"
            sent[int(position)] = f"message {number}".encode()
        os.kill(child.pid, signal.SIGSTOP)  # or it would start another supervisor
        kill_all(directory)
    with open_small(directory) as broker:
        assert {position: body_at(broker, position) for position in sent} == sent


@pytest.mark.crash
def test_memory_of_another_version_is_flushed_before_it_is_given_up(directory: Path) -> None:
    with Child(SENDER, directory, SMALL) as child:
        assert child.read_line() == "open"
        os.kill(wait_for_workers(directory)["flusher"], signal.SIGSTOP)
        sent = {}
        for number in range(100):
            child.write_line(f"message {number}")
            sent[int(child.read_line().split()[1])] = f"message {number}".encode()
        attached = memory.attach(BrokerPaths(directory))
        assert attached is not None
        region, descriptor = attached
        assert region.get("flushed") <= min(sent)
        epoch = region.get("epoch")
        os.kill(child.pid, signal.SIGSTOP)
        kill_all(directory)
    with Path("/dev/shm" + descriptor.control).open("r+b") as control:
        control.seek(16)  # fingerprint
        control.write(b"\xff" * 8)
    with open_small(directory) as broker:
        assert {position: body_at(broker, position) for position in sent} == sent
        assert broker.region.get("epoch") == epoch + 1


@pytest.mark.crash
@pytest.mark.parametrize("failpoint", ["", "supervisor/supervisor.sealed=kill"])
def test_a_client_of_another_version_is_never_told_that_given_up_memory_has_stored_its_message(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failpoint: str
) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "broker.toml").write_text(served.SETTINGS)
    server = served.start(directory, "serve")
    wait_until(lambda: served.runs(directory), "the broker runs")
    workers = wait_for_workers(directory)
    with Child(SENDER, directory, {}) as child:
        assert child.read_line() == "open"
        os.kill(workers["flusher"], signal.SIGSTOP)
        child.write_line("in time")
        status, position = child.read_line().split()
        assert status == "SEND_OK"
        server.kill()
        server.wait(20)
        for pid in set(workers.values()) - {server.pid}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        descriptor = read_descriptor(BrokerPaths(directory))
        assert descriptor is not None
        with Path("/dev/shm" + descriptor.control).open("r+b") as control:
            control.seek(16)  # fingerprint
            control.write(b"\xff" * 8)
        if failpoint:
            monkeypatch.setenv("SHMBROKER_FAILPOINTS", failpoint)
        with shmbroker.open(directory) as broker:
            assert KILLED.format(directory) in caplog.text or not failpoint
            assert body_at(broker, int(position)) == b"in time"
            child.write_line("too late")
            assert child.read_line() == "", "it raised"


@pytest.mark.crash
def test_a_broker_that_lost_its_memory_recovers_from_the_log_in_a_new_epoch(directory: Path) -> None:
    with Child(SENDER, directory, SMALL) as child:
        assert child.read_line() == "open"
        child.write_line("kept")
        position = int(child.read_line().split()[1])
        attached = memory.attach(BrokerPaths(directory))
        assert attached is not None
        region, descriptor = attached
        wait_until(lambda: region.get("flushed") > position, "the message on the disk")
        epoch = region.get("epoch")
        os.kill(child.pid, signal.SIGSTOP)
        kill_all(directory)
    for name in (descriptor.control, descriptor.ring):
        Path("/dev/shm" + name).unlink()
    with open_small(directory) as broker:
        assert body_at(broker, position) == b"kept"
        assert broker.region.get("epoch") == epoch + 1
        (topic,) = broker.topics()
        assert sum(queue["next_offset"] for queue in topic["queues"]) == 1


def test_to_lose_the_race_for_a_directory_is_no_error_for_the_opener(broker: Broker, directory: Path) -> None:
    first = supervisor_of(directory)
    start_supervisor(BrokerPaths(directory), broker.config, time.monotonic() + 15.0)  # it saw nobody hold the lock
    assert supervisor_of(directory) == first


def test_the_workers_leave_when_the_embedding_process_is_killed(directory: Path) -> None:
    with Child(SENDER, directory, SMALL) as child:
        assert child.read_line() == "open"
        wait_for_workers(directory)
        child.write_line("left behind")
        position = int(child.read_line().split()[1])
        child.kill()
    wait_gone(directory)
    assert not BrokerPaths(directory).descriptor.exists(), "it was a clean stop"
    with open_small(directory) as broker:
        assert body_at(broker, position) == b"left behind"


def test_workers_leave_when_everything_else_is_killed(directory: Path) -> None:
    with Child(SENDER, directory, SMALL) as child:
        assert child.read_line() == "open"
        workers = wait_for_workers(directory)
        os.kill(child.pid, signal.SIGSTOP)
        os.kill(workers["supervisor"], signal.SIGKILL)
        child.kill()
    wait_gone(directory)
    with open_small(directory) as broker:
        assert body_at(broker, send(broker, b"taken over")) == b"taken over"


def test_an_opener_waits_for_a_broker_that_is_stopping_and_starts_the_next(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMBROKER_FAILPOINTS", "supervisor.draining=stop")
    first = open_small(directory)
    epoch = first.region.get("epoch")
    supervisor = supervisor_of(directory)
    monkeypatch.delenv("SHMBROKER_FAILPOINTS")
    region = first.region
    state = memory.attach(BrokerPaths(directory))
    assert state is not None
    first.close()
    del region
    wait_until(lambda: psutil.Process(supervisor).status() == psutil.STATUS_STOPPED, "the broker draining")
    opened: list[Broker] = []
    opener = threading.Thread(target=lambda: opened.append(open_small(directory)))
    opener.start()
    assert state[0].get("state") == memory.STATE_DRAINING
    os.kill(supervisor, signal.SIGCONT)
    opener.join(20.0)
    with opened[0] as broker:
        assert broker.region.get("epoch") == epoch + 1
        assert supervisor_of(directory) != supervisor


def test_a_copy_of_a_running_brokers_directory_gets_memory_of_its_own(broker: Broker, directory: Path) -> None:
    position = send(broker, b"original")
    assert body_at(broker, position) == b"original"
    copy = directory.with_name("copy")
    shutil.copytree(directory, copy)
    with open_small(copy) as other:
        mine, theirs = read_descriptor(BrokerPaths(directory)), read_descriptor(BrokerPaths(copy))
        assert mine is not None
        assert theirs is not None
        assert {mine.control, mine.ring}.isdisjoint({theirs.control, theirs.ring})
        assert body_at(other, position) == b"original"
        send(other, b"only in the copy")
    assert broker.region.get("tail") == broker.region.get("flushed") or body_at(broker, send(broker, b"on")) == b"on"
    stop_broker(copy)


def test_a_setting_that_the_running_broker_does_not_have_is_refused(broker: Broker, directory: Path) -> None:
    assert broker.config.runtime.flush_disk_type == "ASYNC_FLUSH"
    with pytest.raises(shmbroker.ConfigConflict, match=r"flush_disk_type = 'SYNC_FLUSH': .* 'ASYNC_FLUSH'"):
        shmbroker.open(directory, flush_disk_type="SYNC_FLUSH")
    with shmbroker.open(directory, flush_disk_type="ASYNC_FLUSH"):
        pass


def test_what_the_supervisor_meets_is_raised_by_open(directory: Path) -> None:
    with pytest.raises(shmbroker.NotEnoughMemory, match=r"needs \d{5}\.\d MiB of /dev/shm, .* --shm-size="):
        shmbroker.open(directory, ring_bytes="2 GiB", claim_window=65_536, claim_tables=65_535)
    wait_gone(directory)


@pytest.mark.crash
@pytest.mark.parametrize(
    "name",
    [
        "supervisor.locked",
        "memory.descriptor_written",
        "memory.descriptor_renamed",
        "memory.objects_created",
        "memory.allocated",
        "memory.formatted",
        "supervisor.restored",
        "supervisor.epoch_written",
        "supervisor.running",
    ],
)
def test_a_supervisor_killed_while_it_starts_hinders_nothing_and_the_opener_starts_another(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setenv("SHMBROKER_FAILPOINTS", f"supervisor/{name}=kill")
    with open_small(directory) as broker:
        assert KILLED.format(directory) in caplog.text
        assert body_at(broker, send(broker, b"first")) == b"first"


def test_an_open_all_of_whose_supervisors_are_killed_says_so_when_its_time_is_over(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python-that-is-killed"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setenv("SHMBROKER_PYTHON", str(python))
    with pytest.raises(shmbroker.NotReady, match=r"[2-9] supervisors were killed .* within 0\.5 s: the kernel"):
        shmbroker.open(directory, timeout=0.5)


def test_a_ctrl_c_that_meets_a_supervisor_before_it_has_its_own_session_is_not_worth_a_word(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    met = tmp_path / "met"
    python = tmp_path / "python-that-meets-ctrl-c"
    python.write_text(f'#!/bin/sh\n[ -e {met} ] || {{ : > {met}; kill -INT $$; }}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("SHMBROKER_PYTHON", str(python))
    with open_small(directory) as broker:
        assert met.exists()
        assert caplog.text == ""
        assert body_at(broker, send(broker, b"first")) == b"first"


@pytest.mark.crash
@pytest.mark.parametrize(
    "name", ["supervisor.draining", "supervisor.drained", "memory.ring_unlinked", "memory.unlinked"]
)
def test_a_supervisor_killed_while_it_stops_loses_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("SHMBROKER_FAILPOINTS", f"supervisor/{name}=kill")
    with open_small(directory) as broker:
        wait_for_workers(directory)
        position = send(broker, b"kept")
    monkeypatch.delenv("SHMBROKER_FAILPOINTS")
    wait_gone(directory)
    with open_small(directory) as broker:
        assert body_at(broker, position) == b"kept"


def test_after_a_fork_the_childs_broker_registers_anew(broker: Broker) -> None:
    with broker.producer("parent") as producer:
        producer.send(Message("orders", b"parent"))
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover - another process
            try:
                with broker.producer("child") as own:
                    result = own.send(Message("orders", b"child"))
                os.write(write_end, f"{result.position} {broker.attach().slot}".encode())
            finally:
                os._exit(0)
        os.close(write_end)
        os.waitpid(child, 0)
        position, slot = map(int, os.read(read_end, 100).split())
        os.close(read_end)
        assert slot != broker.attach().slot
        assert body_at(broker, position) == b"child"
        assert producer.send(Message("orders", b"parent again")).status is SendStatus.SEND_OK


@pytest.mark.crash
def test_a_stopped_holder_of_the_append_lock_is_killed_if_the_broker_is_told_so(directory: Path) -> None:
    with open_small(directory, stopped_lock_holder="kill", send_timeout=10.0) as broker:
        send(broker, b"first")
        wait_for_workers(directory)
        with Child(SENDER, directory, {}, environment={"SHMBROKER_FAILPOINTS": "client/append.copied=stop"}) as child:
            assert child.read_line() == "open"
            child.write_line("never published")
            assert child.wait() == -signal.SIGKILL
        assert body_at(broker, send(broker, b"second")) == b"second"
