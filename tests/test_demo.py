"""The main job for real, and the proof that its verdict sees what it must see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.processes import wait_ended
from support.waiting import wait_until

from shmbroker.tools.demo_history import History, acked_line, body_of, judge, received_line, sent_line
from shmbroker.tools.exit_codes import ExitCode

FLEET = 4  # processes of a demo that is interrupted
LINES = [b"to be", b"or not", b"", b"to be"]


def write_sends(directory: Path) -> None:
    with History(directory / "sender-0-1.sent") as history:
        for number in range(len(LINES)):
            history.note(sent_line(1000 + number, number, "SEND_OK", False, 500))


def write_deliveries(
    directory: Path, name: str, numbers: list[int], *, received: int, acked: int | None, attempt: int = 1
) -> None:
    with History(directory / f"{name}.got") as history:
        for number in numbers:
            history.note(received_line(received, f"id-{number}", attempt, 900, body_of(number, LINES[number])))
        if acked is not None:
            history.note(acked_line(acked, len(numbers)))


def test_every_line_delivered_and_acked_once_is_good(tmp_path: Path) -> None:
    write_sends(tmp_path)
    write_deliveries(tmp_path, "receiver-0-1", [0, 2], received=2000, acked=2100)
    write_deliveries(tmp_path, "receiver-1-1", [1, 3], received=2000, acked=2200)
    verdict = judge(LINES, tmp_path)
    assert verdict.good
    assert (verdict.sent["SEND_OK"], verdict.delivered, verdict.deliveries) == (4, 4, 4)
    assert (verdict.began_ns, verdict.ended_ns) == (1000, 2200)


def test_a_line_that_never_arrived_is_lost_although_its_sender_was_told_ok(tmp_path: Path) -> None:
    write_sends(tmp_path)
    write_deliveries(tmp_path, "receiver-0-1", [0, 1, 2], received=2000, acked=2100)
    verdict = judge(LINES, tmp_path)
    assert not verdict.good
    assert (verdict.lost, verdict.examples["lost"]) == (1, [3])


def test_a_line_that_nobody_acked_is_lost_although_somebody_had_it_when_he_died(tmp_path: Path) -> None:
    write_sends(tmp_path)
    write_deliveries(tmp_path, "receiver-0-1", [0, 1, 2], received=2000, acked=2100)
    write_deliveries(tmp_path, "receiver-1-1", [3], received=2000, acked=None)
    verdict = judge(LINES, tmp_path)
    assert not verdict.good
    assert (verdict.lost, verdict.delivered, verdict.examples["lost"]) == (1, 3, [3])


def test_a_delivery_after_an_ack_is_a_duplicate(tmp_path: Path) -> None:
    write_sends(tmp_path)
    write_deliveries(tmp_path, "receiver-0-1", [0, 1, 2, 3], received=2000, acked=2100)
    write_deliveries(tmp_path, "receiver-1-1", [1], received=2101, acked=None, attempt=2)
    verdict = judge(LINES, tmp_path)
    assert not verdict.good
    assert (verdict.duplicated, verdict.examples["duplicated"]) == (1, [1])


def test_two_successful_acks_of_one_line_are_a_duplicate(tmp_path: Path) -> None:
    write_sends(tmp_path)
    write_deliveries(tmp_path, "receiver-0-1", [0, 1, 2, 3], received=2000, acked=2100)
    write_deliveries(tmp_path, "receiver-1-1", [1], received=2000, acked=2100)
    assert judge(LINES, tmp_path).duplicated == 1


def test_a_line_stored_twice_is_a_duplicate_even_if_nobody_acked_it(tmp_path: Path) -> None:
    write_sends(tmp_path)
    write_deliveries(tmp_path, "receiver-0-1", [0, 1, 2], received=2000, acked=2100)
    with History(tmp_path / "receiver-1-1.got") as history:
        for message_id in ("first", "second"):
            history.note(received_line(2000, message_id, 1, 900, body_of(3, LINES[3])))
    assert judge(LINES, tmp_path).duplicated == 1


def test_a_redelivery_after_a_death_before_the_ack_is_no_duplicate(tmp_path: Path) -> None:
    write_sends(tmp_path)
    write_deliveries(tmp_path, "receiver-0-1", [0, 1], received=2000, acked=None)
    write_deliveries(tmp_path, "receiver-0-2", [0, 1, 2, 3], received=2500, acked=2600, attempt=2)
    verdict = judge(LINES, tmp_path)
    assert verdict.good
    assert (verdict.redelivered, verdict.deliveries) == (4, 6)


def test_an_altered_body_is_seen_and_its_line_is_lost(tmp_path: Path) -> None:
    write_sends(tmp_path)
    write_deliveries(tmp_path, "receiver-0-1", [0, 1, 2], received=2000, acked=2100)
    with History(tmp_path / "receiver-1-1.got") as history:
        history.note(received_line(2000, "id-3", 1, 900, b"3 to bE"))
    verdict = judge(LINES, tmp_path)
    assert (verdict.altered, verdict.lost) == (1, 1)


def test_a_history_cut_within_its_last_line_is_read_up_to_there(tmp_path: Path) -> None:
    write_sends(tmp_path)
    write_deliveries(tmp_path, "receiver-0-1", [0, 1, 2, 3], received=2000, acked=2100)
    with (tmp_path / "receiver-0-1.got").open("r+b") as stream:
        stream.truncate(stream.seek(0, 2) - 1)  # killed before the ack's line was whole: the ack is not known
    write_deliveries(tmp_path, "receiver-1-1", [0, 1, 2, 3], received=2500, acked=2600, attempt=2)
    verdict = judge(LINES, tmp_path)
    assert verdict.good
    assert verdict.ended_ns == 2600


@pytest.mark.slow
def test_the_demo_loses_and_doubles_nothing_while_three_processes_are_killed(tmp_path: Path) -> None:
    text = tmp_path / "input.txt"
    text.write_bytes(b"".join(b"line %d of the input\n" % number for number in range(1000)) + "ä ö ü\n\n".encode())
    arguments = ["--input", str(text), "--lines", "80000", "--producers", "2", "--consumers", "2", "--json"]
    command = [sys.executable, "-m", "shmbroker.tools.demo", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["input"] == str(text)
    assert told["lines"] == told["delivered"] == 80 * 1002
    assert [kill["what"] for kill in told["kills"]] == ["sender", "receiver", "flusher"]
    assert (told["lost"], told["altered"], told["duplicated_after_ack"], told["group_lag"]) == (0, 0, 0, 0)
    assert told["redelivered"] > 0, "the receiver was killed with messages in its hands"
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"], "the demo leaves nothing behind"


def directory_in(place: Path) -> bool:
    """The broker is just starting, or is about to."""
    return any(place.iterdir())


def deliveries_in(place: Path) -> bool:
    return any(path.stat().st_size for path in place.glob("*/histories/*.got"))


def processes_in(place: Path) -> bool:
    """Just started: most of them are still loading what they need."""
    return any(place.glob("*/histories")) and len(psutil.Process().children(recursive=True)) > FLEET


def press_ctrl_c(running: subprocess.Popen[bytes]) -> None:
    """Again and again, as people do: what cleans up must not be cut short."""

    def pressed_until_it_ends() -> bool:
        ended = running.poll() is not None
        if not ended:
            os.killpg(running.pid, signal.SIGINT)
        return ended

    wait_until(pressed_until_it_ends, "it has ended")


@pytest.mark.slow
@pytest.mark.parametrize("everybody", [True, False], ids=["Ctrl-C reaches the whole fleet", "SIGTERM the parent alone"])
@pytest.mark.parametrize(
    "begun", [directory_in, processes_in, deliveries_in], ids=["before its start", "at its start", "at work"]
)
def test_an_interrupted_demo_leaves_nothing_behind(
    tmp_path: Path, everybody: bool, begun: Callable[[Path], bool]
) -> None:
    sizes = ["--producers", "2", "--consumers", str(FLEET - 2)]
    command = [sys.executable, "-m", "shmbroker.tools.demo", "--lines", "5000000", *sizes]
    running = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        wait_until(lambda: begun(tmp_path), "it has come so far")
        fleet = psutil.Process(running.pid).children(recursive=True)
        if everybody:
            press_ctrl_c(running)
        else:
            running.terminate()
        told = running.communicate(timeout=30)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == (ExitCode.INTERRUPTED if everybody else ExitCode.TERMINATED)
    assert [text.strip() for text in told] == [b"", b""], "no traceback, of nobody"
    assert wait_ended(fleet), "no process of the fleet is left"
    assert list(tmp_path.iterdir()) == []
