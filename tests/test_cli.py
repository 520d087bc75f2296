"""The ``shmbroker`` command on a real, served broker: each command a process of its own, compared by content."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import psutil
import pytest
from support.command import COMMAND, TIMEOUT, environment, shmbroker, shmbroker_json
from support.processes import processes_of, wait_for_workers
from support.waiting import wait_until

import shmbroker as api
from shmbroker import memory
from shmbroker.naming import BrokerPaths
from shmbroker.tools.cli import COMMANDS, cli
from shmbroker.tools.exit_codes import ExitCode

SETTINGS = """
ring_bytes = "1 MiB"
segment_bytes = "1 MiB"
max_message_bytes = "64 KiB"
claim_tables = 16
default_topic_queues = 2
"""


def start(
    directory: Path, *arguments: str, stdout: int | None = None, stderr: int | None = None
) -> subprocess.Popen[bytes]:
    """A command that stays; the caller ends it."""
    command = [*COMMAND, "-d", str(directory), *arguments]
    return subprocess.Popen(command, env=environment(), stdout=stdout, stderr=stderr)


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
    wait_until(lambda: not processes_of(directory), "the embedded broker has gone")
    assert_nothing_left(directory)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    with served(tmp_path / "broker"):
        yield tmp_path / "broker"


def lines(count: int) -> list[str]:
    return [f"line {number} {'.' * (number % 50)}" for number in range(count)]


def feed(text: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in text).encode()


# ---- send and receive -----------------------------------------------------------------------------------------------


def test_lines_sent_come_back_as_the_same_lines_and_only_once(server: Path) -> None:
    sent = lines(300)
    answer = shmbroker_json(server, "send", "--topic", "t", stdin=feed(sent))
    assert (answer["sent"], answer["statuses"]) == (300, {"SEND_OK": 300})
    received = shmbroker(server, "receive", "--group", "g", "--topic", "t")
    assert received.returncode == 0, received.stderr
    assert Counter(received.stdout.splitlines()) == Counter(sent)
    again = shmbroker(server, "receive", "--group", "g", "--topic", "t", "--wait", "0.2")
    assert (again.returncode, again.stdout) == (1, "")


def test_a_file_is_sent_in_batches_and_empty_lines_are_counted(server: Path, tmp_path: Path) -> None:
    sent = lines(250)
    source = tmp_path / "input.txt"
    source.write_bytes(feed(sent) + b"\n\nthe last one has no newline")
    answer = shmbroker_json(server, "send", "--topic", "t", "--input", str(source), "--batch", "100")
    assert (answer["sent"], answer["statuses"], answer["empty_lines"]) == (251, {"SEND_OK": 251}, 2)
    received = shmbroker(server, "receive", "--group", "g", "--topic", "t")
    assert Counter(received.stdout.splitlines()) == Counter([*sent, "the last one has no newline"])


def test_tags_and_keys_are_sent_filtered_by_and_shown(server: Path) -> None:
    shmbroker_json(server, "send", "--topic", "t", "--tag", "paid", "--key", "k1", "--key", "k2", stdin=b"one\n")
    shmbroker_json(server, "send", "--topic", "t", "--tag", "open", stdin=b"two\n")
    done = shmbroker(server, "--json", "receive", "--group", "g", "--topic", "t", "--tags", "paid || refunded")
    (message,) = map(json.loads, done.stdout.splitlines())
    assert (message["body"], message["tags"], message["keys"].split()) == ("one", "paid", ["k1", "k2"])
    assert (message["topic"], message["delivery_attempt"]) == ("t", 1)


def test_max_leaves_the_rest_for_the_next_one(server: Path) -> None:
    sent = lines(20)
    shmbroker_json(server, "send", "--topic", "t", stdin=feed(sent))
    first = shmbroker(server, "receive", "--group", "g", "--topic", "t", "--max", "7").stdout.splitlines()
    second = shmbroker(server, "receive", "--group", "g", "--topic", "t").stdout.splitlines()
    assert len(first) == 7
    assert Counter(first + second) == Counter(sent)


def test_what_could_not_be_printed_is_delivered_again(server: Path) -> None:
    """The reader takes one line and goes; nothing of the rest is lost, nothing is said about the broken pipe."""
    sent = [f"{number} {'x' * 2000}" for number in range(100)]
    shmbroker_json(server, "send", "--topic", "t", stdin=feed(sent))
    printer = start(server, "receive", "--group", "g", "--topic", "t", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert printer.stdout is not None
    first = printer.stdout.readline().decode().rstrip("\n")
    printer.stdout.close()
    _, complaint = printer.communicate(timeout=TIMEOUT)
    assert (printer.returncode, complaint) == (0, b"")
    rest = shmbroker(server, "receive", "--group", "g", "--topic", "t").stdout.splitlines()
    assert set(sent) - {first} <= set(rest) <= set(sent)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_follower_leaves_cleanly_and_holds_nothing(server: Path, number: signal.Signals, code: int) -> None:
    follower = start(server, "receive", "--group", "g", "--topic", "t", "--follow", stdout=subprocess.PIPE)
    try:
        shmbroker_json(server, "send", "--topic", "t", stdin=b"seen\n")
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"seen\n"
        follower.send_signal(number)
        assert follower.wait(TIMEOUT) == code
        follower.stdout.close()
    finally:
        follower.kill()
        follower.wait()
    shmbroker_json(server, "send", "--topic", "t", stdin=b"next\n")
    assert shmbroker(server, "receive", "--group", "g", "--topic", "t", "--max", "1").stdout == "next\n"


def test_without_a_running_broker_send_starts_one_and_it_goes_again(tmp_path: Path) -> None:
    directory = tmp_path / "embedded"
    directory.mkdir()
    (directory / "broker.toml").write_text(SETTINGS + "embed_grace_ms = 100\n")
    assert shmbroker_json(directory, "send", "--topic", "t", stdin=b"kept\n")["sent"] == 1
    wait_for_the_end(directory)
    assert shmbroker(directory, "receive", "--group", "g", "--topic", "t", "--max", "1").stdout == "kept\n"
    wait_for_the_end(directory)


# ---- looking ---------------------------------------------------------------------------------------------------------


def test_status_of_a_well_broker_shows_its_workers_and_finds_nothing(server: Path) -> None:
    shmbroker_json(server, "send", "--topic", "t", stdin=feed(lines(10)))
    health = shmbroker_json(server, "status")
    assert (health["state"], health["findings"], health["topics"]) == ("running", [], 1)
    assert {worker["role"] for worker in health["workers"]} == {"supervisor", "flusher", "dispatcher", "janitor"}
    assert all(psutil.pid_exists(worker["pid"]) for worker in health["workers"])
    assert health["positions"]["tail"] >= health["positions"]["flushed"] >= 0
    assert health["positions"]["tail"] > 10 * len("line 0")
    text = shmbroker(server, "status").stdout
    assert re.search(r"^ *state +running, epoch 1, served", text, flags=re.MULTILINE)


def test_status_names_a_stopped_worker_and_the_remedy(server: Path) -> None:
    (flusher,) = (w for w in shmbroker_json(server, "status")["workers"] if w["role"] == "flusher")
    os.kill(flusher["pid"], signal.SIGSTOP)
    try:
        wait_until(lambda: psutil.Process(flusher["pid"]).status() == psutil.STATUS_STOPPED, "it has stopped")
        done = shmbroker(server, "status")
        assert done.returncode == 1
        assert f"the flusher is stopped: kill -CONT {flusher['pid']}" in done.stdout
    finally:
        os.kill(flusher["pid"], signal.SIGCONT)


def test_status_without_a_broker_leaves_with_its_own_code(tmp_path: Path) -> None:
    with served(tmp_path / "broker"):
        pass
    answer = shmbroker_json(tmp_path / "broker", "status", code=ExitCode.NOT_SERVED)
    assert answer["state"] == "not running"


def test_worker_processes_show_role_and_directory_in_ps(server: Path) -> None:
    for worker in shmbroker_json(server, "status")["workers"]:
        words = psutil.Process(worker["pid"]).cmdline()
        assert f"shmbroker.workers.{worker['role']}" in words
        assert str(server) in words


def test_group_show_counts_the_lag_and_names_who_holds_the_oldest(server: Path) -> None:
    shmbroker_json(server, "topic", "create", "t", "--queues", "1")
    shmbroker_json(server, "send", "--topic", "t", stdin=feed(lines(10)))
    with api.open(server) as handle, handle.simple_consumer("g", {"t": "*"}) as consumer:
        messages = consumer.receive(max_messages=4, wait=5.0, invisible=60.0)
        consumer.ack(messages[1:])
        wait_until(lambda: shmbroker_json(server, "group", "show", "g")["lag_bytes"] > 0, "dispatched")
        lag = shmbroker_json(server, "group", "show", "g")
        assert (lag["lag_messages"], lag["in_flight"], lag["delivered"]) == (7, 1, 4)
        (queue,) = lag["queues"]
        assert queue["oldest"]["message_id"] == messages[0].message_id
        assert (queue["oldest"]["pid"], queue["oldest"]["attempts"]) == (os.getpid(), 1)
        assert lag["held_back_bytes"] > 0
        consumer.ack(messages[0])
    assert shmbroker_json(server, "group", "list")[0]["lag_messages"] == 6
    assert len(shmbroker(server, "receive", "--group", "g", "--topic", "t").stdout.splitlines()) == 6
    assert shmbroker_json(server, "group", "show", "g")["lag_messages"] == 0
    assert shmbroker(server, "group", "show", "other").returncode == ExitCode.USAGE


def test_a_message_is_found_by_its_id_and_by_its_key(server: Path) -> None:
    with api.open(server) as handle, handle.producer("p") as producer:
        for number in range(50):
            producer.send(api.Message("t", b"%d" % number, keys=f"all key-{number}"))
        wanted = producer.send(api.Message("t", b"wanted", tags="x", keys="needle", properties={"colour": "blue"}))
        (by_id,) = shmbroker_json(server, "message", "show", wanted.message_id)
        (by_key,) = shmbroker_json(server, "message", "show", "--key", "needle", "--topic", "t")
        assert by_id == by_key
        assert (by_id["body"], by_id["position"], by_id["properties"]) == (
            "wanted",
            wanted.position,
            {"colour": "blue"},
        )
        newest = shmbroker_json(server, "message", "show", "--key", "all", "--topic", "t", "--limit", "3")
        assert [message["body"] for message in newest] == ["49", "48", "47"]
    assert shmbroker(server, "message", "show", "0" * 32).returncode == ExitCode.FINDING
    assert shmbroker(server, "message", "show", "xyz").returncode == ExitCode.USAGE


def test_the_log_of_a_running_broker_is_sound_and_holds_what_was_sent(server: Path) -> None:
    sent = lines(500)
    shmbroker_json(server, "send", "--topic", "t", "--batch", "50", stdin=feed(sent))
    region = memory.attach(BrokerPaths(server))
    assert region is not None
    assert region[0].wait_for("flushed", region[0].get("tail"), int(TIMEOUT * 1e9))
    verdict = shmbroker_json(server, "log", "verify")
    assert (verdict["sound"], verdict["messages"]) == (True, 500)
    dumped = shmbroker(server, "--json", "log", "dump", "--kind", "message", "--body").stdout.splitlines()
    assert [json.loads(line)["body"] for line in dumped] == sent


# ---- changing --------------------------------------------------------------------------------------------------------


def test_topics_are_created_listed_altered_and_deleted(server: Path) -> None:
    shmbroker_json(server, "topic", "create", "orders", "--queues", "3")
    shmbroker_json(server, "topic", "create", "orders", "--queues", "3")
    shmbroker_json(server, "topic", "alter", "orders", "--queues", "5", "--permission", "r")
    (topic,) = shmbroker_json(server, "topic", "list")
    assert (topic["name"], len(topic["queues"]), topic["permission"]) == ("orders", 5, "r")
    refused = shmbroker(server, "send", "--topic", "orders", stdin=b"x\n")
    assert refused.returncode == ExitCode.USAGE
    assert "NoPermission" in refused.stderr
    shmbroker_json(server, "topic", "delete", "orders", "--yes")
    assert shmbroker_json(server, "topic", "list") == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["topic", "create", "not a name"], 2, "only letters, digits"),
        (["topic", "alter", "missing", "--queues", "2"], 2, "does not exist"),
        (["topic", "alter", "missing"], 2, "--queues or --permission"),
        (["topic", "create"], 2, "NAME"),
        (["no-such-command"], 2, "no-such-command"),
        (["receive", "--topic", "t"], 2, "--group"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_name_the_cause_and_have_their_code(server: Path, arguments: list[str], code: int, says: str) -> None:
    done = shmbroker(server, *arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_server_is_refused(server: Path) -> None:
    second = shmbroker(server, "serve")
    assert second.returncode != 0
    assert runs(server)


def test_a_backup_holds_everything_sent_before_it_and_opens_as_a_broker(server: Path, tmp_path: Path) -> None:
    sent = [f"{number} {'x' * 3000}" for number in range(1000)]  # about three segments
    shmbroker_json(server, "send", "--topic", "t", "--batch", "50", stdin=feed(sent))
    copy = tmp_path / "copy"
    answer = shmbroker_json(server, "backup", str(copy))
    assert answer["messages"] == 1000
    shmbroker_json(server, "send", "--topic", "t", stdin=b"after the backup\n")
    manifest = json.loads((copy / "backup.json").read_text())
    assert manifest["end"] == answer["end"]
    assert len(manifest["files"]) >= 3
    assert shmbroker_json(copy, "log", "verify")["messages"] == 1000
    received = shmbroker(copy, "receive", "--group", "g", "--topic", "t")
    assert Counter(received.stdout.splitlines()) == Counter(sent)
    wait_for_the_end(copy)
    assert shmbroker(server, "backup", str(copy)).returncode == ExitCode.USAGE


# ---- help ------------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", found) for sub, found in command.commands.items())


def test_the_help_of_every_command_teaches_by_example() -> None:
    without = [name for name, command in commands() if f"shmbroker {name}".split()[1] not in (command.help or "")]
    assert without == []
    assert [name for name, command in commands() if "shmbroker " not in (command.help or "")] == []


def test_help_is_fast_because_it_loads_no_command() -> None:
    code = (
        "import sys, shmbroker.tools.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit as leaving: assert leaving.code == 0\n"
        "print(*{'rich', 'lmdb', 'psutil', 'posix_ipc', 'shmbroker._native._core'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == []
    assert all(name in done.stdout for name in COMMANDS)


def test_the_exit_codes_are_those_of_the_documents() -> None:
    text = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    documented = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \|", text, flags=re.MULTILINE) for code in row.split(",")
    }
    assert documented == {int(code) for code in ExitCode}
