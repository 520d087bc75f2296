"""``shmbroker send`` and ``receive`` on a served broker: real processes, compared by content."""

from __future__ import annotations

import json
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import TIMEOUT, shmbroker, shmbroker_json
from support.served import SETTINGS, feed, lines, served, start, wait_for_the_end


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    with served(tmp_path / "broker"):
        yield tmp_path / "broker"


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
