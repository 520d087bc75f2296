"""The wall clock is set while messages are delayed: nothing fires earlier than the step explains, and nothing hangs.

The scheduler's CLOCK_REALTIME is set by a preloaded library; clients, and every other clock, stay as they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.consuming import ALL, bodies_of
from support.processes import processes_of
from support.running import running
from support.waiting import wait_until

from shmbroker import Message
from shmbroker.broker import Broker

SOURCE = Path(__file__).parent / "native" / "clock_step.c"
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]
HOUR = 3600.0
SOON = 0.25 + 0.75  # of the scheduler's look, and of a busy machine
Step = Callable[[float], None]

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C compiler ({COMPILER})"),
]


@pytest.fixture
def stepped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Broker, Step]]:
    """A broker, and how to set the clock of its workers by so many seconds from the true time."""
    library, offset = tmp_path / "clock_step.so", tmp_path / "offset"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, SOURCE], check=True)
    offset.write_bytes(bytes(8))
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("CLOCK_STEP_FILE", str(offset))

    def step(seconds: float) -> None:
        fd = os.open(offset, os.O_WRONLY)
        os.pwrite(fd, int(seconds * 1e9).to_bytes(8, "little", signed=True), 0)
        os.close(fd)

    with running(tmp_path / "data") as broker:
        monkeypatch.undo()
        wait_until(lambda: broker.region.get("timers_kept") > 0, "the scheduler at work")
        maps = Path(f"/proc/{processes_of(tmp_path / 'data')[0].pid}/maps").read_text()
        assert "clock_step.so" in maps
        yield broker, step


def test_a_step_forward_fires_what_it_has_made_due_and_no_more(stepped: tuple[Broker, Step]) -> None:
    broker, step = stepped
    with broker.producer("billing") as producer, broker.simple_consumer("audit", ALL) as consumer:
        sent = time.time()
        producer.send(Message("orders", b"in an hour", delay=HOUR))
        producer.send(Message("orders", b"in an hour and 1.5 s", delay=HOUR + 1.5))
        producer.send(Message("orders", b"tomorrow", delay=24 * HOUR))
        assert consumer.receive(32, wait=0.3) == []
        begun = time.monotonic()
        step(HOUR)
        assert bodies_of(consumer.receive(32, wait=10.0)) == [b"in an hour"]
        assert time.monotonic() - begun < SOON
        assert bodies_of(consumer.receive(32, wait=10.0)) == [b"in an hour and 1.5 s"]
        assert time.time() - sent >= 1.5, "early by more than the step"
        assert consumer.receive(32, wait=0.3) == []


def test_a_step_back_delays_by_the_step_and_the_next_message_is_on_time(stepped: tuple[Broker, Step]) -> None:
    broker, step = stepped
    with broker.producer("billing") as producer, broker.simple_consumer("audit", ALL) as consumer:
        producer.send(Message("orders", b"soon", delay=0.5))
        step(-HOUR)
        producer.send(Message("orders", b"due by the new clock", deliver_at=time.time() - HOUR + 0.5 + 2 * HOUR))
        assert consumer.receive(32, wait=1.5) == []
        begun = time.monotonic()
        step(0)
        assert bodies_of(consumer.receive(32, wait=10.0)) == [b"soon"]
        assert time.monotonic() - begun < SOON
        step(HOUR)
        assert bodies_of(consumer.receive(32, wait=10.0)) == [b"due by the new clock"]


def test_a_clock_that_jumps_to_and_fro_fires_each_message_once(stepped: tuple[Broker, Step]) -> None:
    broker, step = stepped
    bodies = [b"%d" % number for number in range(40)]
    with broker.producer("billing") as producer, broker.simple_consumer("audit", ALL) as consumer:
        for number, body in enumerate(bodies):
            producer.send(Message("orders", body, delay=0.1 + number / 40))
        found: list[bytes] = []
        for seconds in (-1.0, 0.5, -0.5, 0.7, -2.0, 0.0):
            step(seconds)
            messages = consumer.receive(32, wait=0.2)
            consumer.ack(messages)
            found += bodies_of(messages)
        while messages := consumer.receive(32, wait=1.5):
            consumer.ack(messages)
            found += bodies_of(messages)
    assert sorted(found) == sorted(bodies)
