"""``shmbroker serve`` beside brokers that somebody embeds, after a kill, and what a restart means for its clients."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import served
from support.command import COMMAND, TIMEOUT, shmbroker, shmbroker_json
from support.processes import SMALL, Child, kill_all, supervisor_of, wait_for_workers
from support.waiting import wait_until

import shmbroker as api
from shmbroker import Message, SendResult, SendStatus
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.workers.common import Exit

EMBEDS = """
    import sys, shmbroker
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    print("open")
    sys.stdin.readline()
"""


@pytest.fixture
def place(directory: Path) -> Path:
    directory.mkdir()
    (directory / "broker.toml").write_text(served.SETTINGS + "send_timeout_ms = 15000\n")
    return directory


def serve(place: Path, stderr: int | None = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    return served.start(place, "serve", stderr=stderr)


def wait_served(place: Path, server: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: supervisor_of(place) == server.pid and served.runs(place), "this one serves")
    wait_for_workers(place)


def stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    assert server.wait(TIMEOUT) == Exit.OK


def line_of(server: subprocess.Popen[bytes]) -> str:
    assert server.stderr is not None
    return server.stderr.readline().decode()


def test_serve_waits_for_the_grace_of_the_command_before_it(place: Path) -> None:
    """Its settings are the file's: the last second's command embeds with a grace of one."""
    shmbroker_json(place, "send", "--topic", "t", stdin=b"sent\n")
    server = serve(place)
    wait_served(place, server)
    assert shmbroker(place, "receive", "--group", "g", "--topic", "t").stdout == "sent\n"
    stop(server)


def test_serve_names_who_embeds_the_broker_and_serves_when_it_ends(place: Path) -> None:
    with Child(EMBEDS, place, {"embed_grace": 0.1}) as program:
        assert program.read_line() == "open"
        server = serve(place, stderr=subprocess.PIPE)
        assert re.search(rf"embedded in these processes: {program.pid} \(.*\); end them, and start", line_of(server))
        assert supervisor_of(place) != server.pid
        program.write_line()
        wait_served(place, server)
    stop(server)
    server.stderr.close()  # type: ignore[union-attr]


def test_who_embedded_a_broker_that_serve_has_taken_over_leaves_its_restart_to_others(place: Path) -> None:
    with api.open(place) as broker:
        assert broker._may_start(broker._attached)
        broker.region.set("embedded", 0)  # as serve does in the place of a supervisor that was killed
        assert not broker._may_start(broker._attached)
        broker.region.set("embedded", 1)


def test_serve_that_is_told_to_stop_while_it_waits_leaves_at_once(place: Path) -> None:
    with api.open(place):
        server = serve(place, stderr=subprocess.PIPE)
        assert f"embedded in these processes: {os.getpid()} " in line_of(server)
        stop(server)
        server.stderr.close()  # type: ignore[union-attr]


def test_a_second_serve_leaves_with_the_code_and_the_name_of_the_first(place: Path) -> None:
    server = serve(place)
    wait_served(place, server)
    second = shmbroker(place, "serve")
    assert (second.returncode, second.stderr) == (
        Exit.TAKEN,
        f"shmbroker: process {server.pid} serves {place} already: to replace it, stop it first (kill {server.pid})\n",
    )
    stop(server)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("serve", "--bogus"), Exit.USAGE),
        (("serve", "--config", "nowhere.toml"), Exit.USAGE),
        (("worker", "boss"), Exit.USAGE),
        (("worker", "flusher"), Exit.NO_BROKER),
        (("--bogus", "serve"), ExitCode.USAGE),
    ],
)
def test_serve_and_worker_refuse_what_cannot_work_with_the_codes_of_workers(
    tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    assert shmbroker(tmp_path / "none", *words).returncode == code


@pytest.mark.crash
def test_status_says_that_nobody_restarts_a_served_broker_whose_supervisor_was_killed(place: Path) -> None:
    server = serve(place)
    wait_served(place, server)
    with api.open(place) as broker, broker.producer("p") as producer:
        server.kill()
        server.wait(TIMEOUT)
        answer = shmbroker_json(place, "status", code=ExitCode.NOT_SERVED)
        assert answer["state"] == "abandoned"
        (finding,) = answer["findings"]
        assert f"`shmbroker serve -d {place}`" in finding
        assert producer.send(Message("orders", b"kept")).status is SendStatus.SEND_OK
        server = serve(place)
        wait_served(place, server)
        assert shmbroker_json(place, "status")["state"] == "running"
        with broker.simple_consumer("g", {"orders": "*"}) as consumer:
            assert [message.body for message in consumer.receive(9, wait=10.0)] == [b"kept"]
    stop(server)


class Outcomes:
    """A callback that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_success(self, result: SendResult) -> None:
        self.told.append(result.status)

    def on_exception(self, error: Exception) -> None:
        self.told.append(error)


@pytest.mark.crash
@pytest.mark.parametrize("kind", ["send", "send_batch", "send_async", "send_oneway"])
@pytest.mark.parametrize("moment", ["stopping", "stopped"])
def test_every_kind_of_send_waits_out_a_restart_of_serve(place: Path, kind: str, moment: str) -> None:
    """Also of a producer that sends in no other way."""
    failpoint = "supervisor.draining=stop" if moment == "stopping" else ""
    first = served.start(place, "serve", failpoints=failpoint, stderr=subprocess.DEVNULL)
    wait_served(place, first)
    outcomes = Outcomes()
    with api.open(place) as broker, broker.producer("p") as producer:
        first.terminate()
        if moment == "stopping":
            os.waitid(os.P_PID, first.pid, os.WSTOPPED)
            with pytest.raises(api.NotReady, match=f"process {first.pid} is starting or stopping the broker of"):
                producer.send(Message("orders", b"too early"), timeout=0.1)
            first.send_signal(signal.SIGCONT)
        else:
            assert first.wait(TIMEOUT) == Exit.OK
            with pytest.raises(api.NotReady, match=f"nobody serves {place}.* start `shmbroker serve -d {place}` again"):
                producer.send(Message("orders", b"too early"), timeout=0.1)
        second = serve(place)  # waits for the first
        message = Message("orders", b"patient")
        match kind:
            case "send":
                producer.send(message)
            case "send_batch":
                producer.send_batch([message])
            case "send_async":
                producer.send_async(message, outcomes)
                wait_until(lambda: outcomes.told == [SendStatus.SEND_OK], "the callback called")
            case "send_oneway":
                producer.send_oneway(message)
        with broker.simple_consumer("g", {"orders": "*"}) as consumer:
            assert [message.body for message in consumer.receive(9, wait=10.0)] == [b"patient"]
    assert first.wait(TIMEOUT) == Exit.OK
    stop(second)


def test_a_directory_that_cannot_be_used_is_named_with_the_remedy_and_nobody_is_told_to_try_again(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    for place, remedy in (
        (Path("/proc/nothing"), "No such file or directory.* cannot be made; name another"),
        (tmp_path / "file", "(File exists|Not a directory).* is no directory; name another"),
        (tmp_path / "file" / "below", "Not a directory.* name another"),
        (tmp_path / "link", "Too many levels of symbolic links.* remove the link"),
        (tmp_path / ("x" * 300), "File name too long.* name another"),
    ):
        with pytest.raises(api.DirectoryUnusable, match=f"^{re.escape(str(place))}: {remedy}"):
            api.open(place, timeout=5.0)
        for command, codes in (  # some are seen to be wrong at once
            (("send", "--topic", "t"), (ExitCode.OPERATOR, ExitCode.USAGE)),
            (("serve",), (Exit.STORE, Exit.USAGE, ExitCode.USAGE)),  # the last for what stands before the command
        ):
            done = shmbroker(place, *command, stdin=b"x\n")
            assert done.returncode in codes, done.stderr
            assert str(place)[-60:] in done.stderr.replace("\n", "")
            assert not re.search("try again|Traceback", done.stderr), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts")
def test_a_read_only_file_system_is_told_as_such(tmp_path: Path) -> None:
    with Child(EMBEDS, tmp_path / "broker", SMALL) as program:
        assert program.read_line() == "open"
        with api.open(tmp_path / "broker") as broker, broker.producer("p") as producer:
            producer.send(Message("orders", b"x"))
    kill_all(tmp_path / "broker")  # the program is dead already: nobody is left who would start it again
    code = "import shmbroker, sys\ntry: shmbroker.open(sys.argv[1], timeout=5.0)\nexcept Exception as e: print(repr(e))"
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", str(tmp_path), COMMAND[0], "-c", code]
    for place in ("broker", "new"):
        done = subprocess.run([*command, str(tmp_path / place)], capture_output=True, text=True, timeout=30)
        assert re.search(r"DirectoryUnusable.*Read-only file system.*mount it writable", done.stdout), done
    with api.open(tmp_path / "broker", **SMALL) as broker, broker.simple_consumer("g", {"orders": "*"}) as consumer:
        assert [message.body for message in consumer.receive(9, wait=10.0)] == [b"x"]
