"""Several processes open the same new directory at once, and one of them is killed on the way."""

from __future__ import annotations

import os
import random
import select
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import objects_of
from support.consuming import ALL, drain
from support.processes import SMALL, Child, processes_of, supervisor_of
from support.waiting import wait_until

import shmbroker

OPENERS = 4
LATEST_KILL_SECONDS = {"an opener": 0.3, "a supervisor": 0.15}  # it begins to open, or holds the lock: and has done it

OPENER = """
    import sys, shmbroker
    from shmbroker import Message
    print("ready")
    sys.stdin.readline()
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    result = broker.producer("test").send(Message("orders", sys.argv[3].encode()))
    print(result.status)
    sys.stdin.readline()
    broker.close()
"""


@pytest.mark.crash
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("victim", LATEST_KILL_SECONDS)
def test_all_but_the_killed_one_get_the_same_working_broker(directory: Path, victim: str, seed: int) -> None:
    chance = random.Random(f"{victim} {seed}")
    delay = chance.uniform(0.0, LATEST_KILL_SECONDS[victim])
    with ExitStack() as stack:
        openers = [stack.enter_context(Child(OPENER, directory, SMALL, name)) for name in range(OPENERS)]
        assert [opener.read_line() for opener in openers] == ["ready"] * OPENERS
        begun = threading.Event()
        killer = threading.Thread(target=kill_one, args=(directory, victim, chance.choice(openers), delay, begun))
        killer.start()
        begun.wait()
        for opener in openers:
            opener.write_line()
        killer.join()
        answers = [opener.read_line(deadline=30.0) for opener in openers]
        assert sorted(answers)[1:] == ["SEND_OK"] * (OPENERS - 1), answers
        assert victim == "an opener" or answers.count("SEND_OK") == OPENERS
        sent = {b"%d" % name for name, answer in enumerate(answers) if answer == "SEND_OK"}
        with shmbroker.open(directory) as broker, broker.simple_consumer("audit", ALL) as consumer:
            received = {*drain(consumer, len(sent)), *(message.body for message in consumer.receive(OPENERS))}
            assert sent <= received, "the killed one may have sent, too"
        for opener, answer in zip(openers, answers, strict=True):
            if answer:
                opener.write_line()
                assert opener.wait() == 0
    wait_until(lambda: not processes_of(directory), "the broker gone")
    assert objects_of(directory) == []


def kill_one(directory: Path, victim: str, opener: Child, delay: float, begun: threading.Event) -> None:
    """Kill the opener ``delay`` seconds from now, or the first supervisor, that long after it has taken the lock."""
    begun.set()
    supervisor = wait_until(lambda: supervisor_of(directory), "a supervisor") if victim == "a supervisor" else 0
    select.select([], [], [], delay)
    if victim == "an opener":
        opener.kill()
    else:
        os.kill(supervisor, signal.SIGKILL)
