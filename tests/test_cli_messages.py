"""``shmbroker send`` and ``receive`` on a served broker: real processes, compared by content."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from support.command import COMMAND, TIMEOUT, environment, shmbroker, shmbroker_json
from support.served import SETTINGS, feed, lines, served, start, wait_for_the_end
from support.waiting import wait_until

from shmbroker.tools.exit_codes import ExitCode


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


@pytest.mark.parametrize("size", [1, 10_000], ids=["lines", "lines longer than the pipe"])
def test_what_the_reader_of_the_pipe_did_not_take_is_delivered_again(server: Path, size: int) -> None:
    """The reader takes one line and goes: that one is acknowledged and no other, although others were in the pipe."""
    sent = [f"{number} {'x' * size}" for number in range(50)]
    shmbroker_json(server, "send", "--topic", "t", stdin=feed(sent))
    printer = start(server, "receive", "--group", "g", "--topic", "t", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert printer.stdout is not None
    first = printer.stdout.readline().decode().rstrip("\n")
    wait_until(lambda: pending(printer.stdout) > 0, "the next line in the pipe")
    printer.stdout.close()
    _, complaint = printer.communicate(timeout=TIMEOUT)
    assert (printer.returncode, complaint) == (0, b"")
    rest = shmbroker(server, "receive", "--group", "g", "--topic", "t").stdout.splitlines()
    assert Counter([first, *rest]) == Counter(sent)


def pending(stream: IO[bytes] | None) -> int:
    """Bytes that lie in a pipe."""
    assert stream is not None
    return int.from_bytes(fcntl.ioctl(stream, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_reader_that_takes_nothing_gets_the_message_no_longer_than_its_time(server: Path) -> None:
    shmbroker_json(server, "send", "--topic", "t", stdin=b"only\n")
    arguments = ["receive", "--group", "g", "--topic", "t", "--invisible", "1"]
    printer = start(server, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert printer.wait(TIMEOUT) == ExitCode.RETRY_LATER
    _, complaint = printer.communicate()
    assert complaint == b"shmbroker: the reader of the pipe takes nothing; the message stays in the broker\n"
    assert shmbroker(server, "receive", "--group", "g", "--topic", "t").stdout == "only\n"


def test_a_batch_is_written_and_acknowledged_as_one(server: Path, tmp_path: Path) -> None:
    sent = lines(1000)
    shmbroker_json(server, "send", "--topic", "t", "--batch", "100", stdin=feed(sent))
    with (tmp_path / "out").open("wb") as out:
        arguments = ["receive", "--group", "g", "--topic", "t", "--batch", "300", "--max", "800", "--wait", "0"]
        assert start(server, *arguments, stdout=out.fileno()).wait(TIMEOUT) == 0
    rest = shmbroker(server, "receive", "--group", "g", "--topic", "t", "--batch", "64").stdout.splitlines()
    assert len(rest) == 200
    assert Counter((tmp_path / "out").read_text().splitlines() + rest) == Counter(sent)


def test_an_output_that_cannot_be_written_keeps_the_message(server: Path) -> None:
    shmbroker_json(server, "send", "--topic", "t", stdin=b"only\n")
    with Path("/dev/full").open("wb") as full:
        printer = start(server, "receive", "--group", "g", "--topic", "t", stdout=full.fileno(), stderr=subprocess.PIPE)
        _, complaint = printer.communicate(timeout=TIMEOUT)
    assert printer.returncode == ExitCode.OPERATOR
    assert complaint == b"shmbroker: standard output cannot be written to: No space left on device\n"
    assert shmbroker(server, "receive", "--group", "g", "--topic", "t").stdout == "only\n"


def test_without_acknowledging_the_same_messages_come_again(server: Path) -> None:
    shmbroker_json(server, "send", "--topic", "t", stdin=feed(lines(20)))
    for _ in range(2):
        shown = shmbroker(server, "receive", "--group", "g", "--topic", "t", "--no-ack", "--max", "15")
        assert len(set(shown.stdout.splitlines())) == 15
    received = shmbroker(server, "receive", "--group", "g", "--topic", "t").stdout.splitlines()
    assert Counter(received) == Counter(lines(20))


def test_receiving_from_a_mistyped_topic_makes_neither_topic_nor_group(server: Path) -> None:
    refused = shmbroker(server, "receive", "--group", "g", "--topic", "nosuch")
    assert refused.returncode == ExitCode.USAGE
    assert "topic 'nosuch' does not exist" in refused.stderr
    assert "`shmbroker topic list`" in refused.stderr
    assert (shmbroker_json(server, "topic", "list"), shmbroker_json(server, "group", "list")) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["send", "--topic", "t"], b"", ""),
        (["send", "--topic", "t"], b"\n\n", ""),
        (["send", "--topic", "a b"], b"x\n", "NameIllegal: topic 'a b': only letters, digits and % | _ - are allowed"),
        (["send", "--topic", "t", "--group", "a b"], b"x\n", "NameIllegal: group 'a b': only letters"),
        (["topic", "create", "a b"], b"", "NameIllegal: topic 'a b': only letters"),
        (["receive", "--group", "g", "--topic", "t"], b"", "is no broker's directory"),
    ],
    ids=["nothing", "empty lines", "topic", "group", "create", "receive"],
)
def test_a_command_that_does_nothing_makes_no_directory(
    tmp_path: Path, arguments: list[str], stdin: bytes, says: str
) -> None:
    done = shmbroker(tmp_path / "new", *arguments, stdin=stdin)
    assert says in done.stderr
    assert (done.returncode == 0) == (says == "")
    assert done.stderr.count("\n") == bool(says)
    assert not (tmp_path / "new").exists()


def test_the_code_of_a_send_is_that_of_the_send_also_if_nobody_reads_its_answer(server: Path) -> None:
    shmbroker_json(server, "topic", "create", "t")
    for permission, code, says in (("rw", 0, b""), ("r", ExitCode.USAGE, b"NoPermission.*; nothing was sent")):
        shmbroker_json(server, "topic", "alter", "t", "--permission", permission)
        pipe = subprocess.PIPE
        sender = start(server, "send", "--topic", "t", stdin=pipe, stdout=pipe, stderr=pipe)
        assert sender.stdout is not None
        sender.stdout.close()
        _, complaint = sender.communicate(feed(lines(3)), timeout=TIMEOUT)
        assert sender.returncode == code
        assert re.fullmatch(b"(.*%b.*\n)?" % says if says else b"", complaint), complaint
    (topic,) = shmbroker_json(server, "topic", "list")
    assert topic["sent"] == 3


def test_an_unusable_directory_is_seen_also_by_who_has_nothing_to_send(tmp_path: Path) -> None:
    for place, says in (
        (Path("/proc/nothing"), "DirectoryUnusable: /proc/nothing: No such file or directory: a directory there"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        done = shmbroker(place, "send", "--topic", "t")
        assert (done.returncode, done.stdout) == (ExitCode.OPERATOR, "")
        assert says in done.stderr
    assert shmbroker(tmp_path / "new" / "below", "send", "--topic", "t").stdout == "nothing sent\n"
    assert list(tmp_path.iterdir()) == [], "looking left nothing behind"


def test_an_interrupted_send_tells_how_far_it_came(server: Path) -> None:
    sender = start(
        server, "send", "--topic", "t", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert sender.stdin is not None
    sender.stdin.write(feed(lines(3)))
    sender.stdin.flush()
    wait_until(lambda: [t["sent"] for t in shmbroker_json(server, "topic", "list")] == [3], "three lines sent")
    sender.send_signal(signal.SIGINT)
    told, complaint = sender.communicate(timeout=TIMEOUT)
    assert sender.returncode == ExitCode.INTERRUPTED
    assert told.split() == b"status messages SEND_OK 3".split()
    assert complaint == b"stopped behind line 3: all before is sent\n", "it waited for a line: none was under way"


def test_a_line_that_is_refused_is_named_by_what_was_sent_before_it(server: Path) -> None:
    large = b"x" * 65_537
    for before, says in ((0, "; nothing was sent\n"), (3, "; stopped behind line 3: all before is sent\n")):
        done = shmbroker(server, "send", "--topic", "t", stdin=feed(lines(before)) + large + b"\n")
        assert done.returncode == ExitCode.USAGE
        assert re.fullmatch(r"shmbroker: MessageTooLarge: .*[^.]; (nothing|stopped).*\n", done.stderr), done.stderr
        assert done.stderr.endswith(says)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_follower_leaves_cleanly_and_holds_nothing(server: Path, number: signal.Signals, code: int) -> None:
    shmbroker_json(server, "topic", "create", "t")
    follower = start(server, "receive", "--group", "g", "--topic", "t", "--follow", stdout=subprocess.PIPE)
    try:
        shmbroker_json(server, "send", "--topic", "t", stdin=b"seen\n")
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"seen\n"
        wait_until(lambda: shmbroker_json(server, "group", "list")[0]["lag_messages"] == 0, "acknowledged")
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


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_command_that_makes_a_new_broker_says_where(tmp_path: Path, by_environment: bool) -> None:
    """A mistyped directory is a new one; so is the one that a forgotten variable of another project names."""
    for command in ("topic create t", "send --topic t"):
        made = tmp_path / command.split()[0]
        chosen = [] if by_environment else ["-d", made.name]
        named = {"SHMBROKER_DIRECTORY": made.name} if by_environment else {}
        told = [
            subprocess.run(
                [*COMMAND, *chosen, *command.split()],
                cwd=tmp_path,
                env=environment() | {"SHMBROKER_RING_BYTES": "1 MiB", "SHMBROKER_SEGMENT_BYTES": "1 MiB"} | named,
                input=b"line\n",
                stderr=subprocess.PIPE,
                timeout=TIMEOUT,
                check=True,
            ).stderr.decode()
            for _ in range(2)
        ]
        by = " (named by SHMBROKER_DIRECTORY)" if by_environment else ""
        assert told == [f"made a new broker in {made}{by}\n", ""], "and once only"
        wait_for_the_end(made)


def test_an_error_about_a_directory_shows_it_in_full_and_who_names_it(tmp_path: Path) -> None:
    for named, by in (([], " (named by SHMBROKER_DIRECTORY)"), (["-d", "typed"], "")):
        done = subprocess.run(
            [*COMMAND, *named, "status"],
            cwd=tmp_path,
            env=environment() | {"SHMBROKER_DIRECTORY": "other"},
            capture_output=True,
            timeout=TIMEOUT,
        )
        place = tmp_path / (named[-1] if named else "other")
        assert done.stderr.decode().startswith(f"shmbroker: {place}{by} is no broker's directory; ")
        assert done.returncode == ExitCode.NOT_SERVED
