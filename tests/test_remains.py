"""What dead brokers left in /dev/shm: what goes when another broker starts, and what is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SHM, objects_of
from support.consuming import ALL, drain, numbered, send
from support.processes import SMALL, Child, kill_all, wait_for_workers
from support.waiting import wait_until

import shmbroker
from shmbroker import memory, remains
from shmbroker.config import Config
from shmbroker.descriptor import read_descriptor
from shmbroker.naming import BrokerPaths, object_names

LAYOUT = {key: value for key, value in SMALL.items() if key != "embed_grace"}
CONFIG = Config.of({**LAYOUT, "ring_bytes": 1 << 20, "segment_bytes": 1 << 20})

# Does what it is told and stays.
SENDER = """
    import sys, shmbroker
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    producer = broker.producer("p")
    for line in sys.stdin:
        exec(line)
        print("done")
"""


@pytest.fixture
def paths(tmp_path: Path) -> BrokerPaths:
    made = BrokerPaths(tmp_path / "broker")
    made.make()
    return made


@pytest.fixture
def dead(paths: BrokerPaths) -> Iterator[list[Path]]:
    """The memory of a broker whose supervisor was killed before anybody sent anything: control object, ring.

    A test ages it when it is to be found: any broker that starts meanwhile, for other tests, too, clears it away then.
    """
    held = memory.create(paths, CONFIG, store=bytes(16), tail=0, epoch=1)
    held.close()
    found = [Path(f"{SHM}{name}") for name in (held.descriptor.control, held.descriptor.ring)]
    yield found
    for path in found:
        path.unlink(missing_ok=True)


def age(path: Path) -> None:
    """As if nobody had changed it for long."""
    os.utime(path, (0, 0))


def age_both(memory: list[Path]) -> None:
    """The ring first: alone it is not looked at, while its control object is there."""
    for path in reversed(memory):
        age(path)


def clear_away(memory: list[Path]) -> None:
    """By us, or by a broker that starts for another test and is at it just now: then we leave it alone."""
    remains.clear()
    wait_until(lambda: not any(path.exists() for path in memory), "the memory cleared away")


def test_memory_that_holds_nothing_goes_when_another_broker_starts(
    dead: list[Path], paths: BrokerPaths, directory: Path
) -> None:
    shutil.rmtree(paths.directory)
    age_both(dead)
    with shmbroker.open(directory, **SMALL):
        assert [path for path in dead if path.exists()] == []
        assert set(objects_of(directory)).isdisjoint(path.name for path in dead)


def test_memory_just_used_is_left_alone(dead: list[Path]) -> None:
    age(dead[1])
    remains.clear()
    assert all(path.exists() for path in dead)


def test_memory_that_somebody_leads_is_left_alone_whoever_it_is(paths: BrokerPaths) -> None:
    held = memory.create(paths, CONFIG, store=bytes(16), tail=0, epoch=1)
    control, ring = (Path(f"{SHM}{name}") for name in (held.descriptor.control, held.descriptor.ring))
    age(control)
    remains.clear()
    assert (control.exists(), ring.exists()) == (True, True)
    held.close()
    clear_away([control, ring])


def test_who_takes_memory_over_that_was_just_cleared_away_finds_none(dead: list[Path], paths: BrokerPaths) -> None:
    taken = memory.take_over(paths)
    assert taken is not None
    age_both(dead)
    remains.clear()
    assert all(path.exists() for path in dead)
    taken.close()
    clear_away(dead)
    assert memory.take_over(paths) is None


@pytest.mark.parametrize("half", ["only the control object", "control object and ring", "only the ring"])
def test_memory_whose_maker_was_killed_goes(half: str) -> None:
    control, ring = (Path(f"{SHM}{name}") for name in object_names())
    made = {"only the control object": [control], "only the ring": [ring]}.get(half, [control, ring])
    for path in made:
        path.touch(mode=0o600)
        os.truncate(path, 1 << 20)
        age(path)
    clear_away(made)


def test_memory_of_another_layout_or_namespace_is_left_alone(dead: list[Path]) -> None:
    for at in (16, 96):  # fingerprint, pid namespace
        with dead[0].open("r+b") as control:
            control.seek(at)
            kept = control.read(8)
            control.seek(at)
            control.write(b"\xff" * 8)
        age_both(dead)
        remains.clear()
        assert all(path.exists() for path in dead)
        with dead[0].open("r+b") as control:
            control.seek(at)
            control.write(kept)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user")
def test_memory_of_another_user_is_left_alone(dead: list[Path]) -> None:
    os.chown(dead[0], 65534, 65534)
    age_both(dead)
    remains.clear()
    assert all(path.exists() for path in dead)


@pytest.mark.crash
@pytest.mark.parametrize("left", ["an unflushed message", "an unrecorded acknowledgement", "nothing"])
def test_memory_goes_only_if_its_log_has_all_of_it(directory: Path, left: str) -> None:
    settings = {**SMALL, "progress_interval": 3000.0, "flush_interval": 3000.0, "flush_least_bytes": 1 << 20}
    if left != "an unflushed message":
        settings |= {"flush_disk_type": "SYNC_FLUSH"}
    with Child(SENDER, directory, settings) as child:
        child.write_line("producer.send_batch([shmbroker.Message('orders', b'%d' % i) for i in range(9)], queue_id=0)")
        assert child.read_line() == "done"
        os.kill(wait_for_workers(directory)["dispatcher"], signal.SIGSTOP)  # writes down no progress any more
        if left == "an unrecorded acknowledgement":
            child.write_line("c = broker.simple_consumer('audit', {'orders': '*'}); c.ack(c.receive(5))")
            assert child.read_line() == "done"
        attached = memory.attach(BrokerPaths(directory))
        assert attached is not None
        if left != "an unflushed message":
            wait_until(lambda: attached[0].get("flushed") == attached[0].get("tail"), "all on the disk")
        os.kill(child.pid, signal.SIGSTOP)  # or it would start another supervisor
        kill_all(directory)
    descriptor = read_descriptor(BrokerPaths(directory))
    assert descriptor is not None
    control = Path(f"{SHM}{descriptor.control}")
    age(control)
    if left == "nothing":
        clear_away([control])
    else:
        remains.clear()
        assert control.exists()
    with shmbroker.open(directory, **SMALL) as broker, broker.simple_consumer("audit", ALL) as consumer:
        first = 5 if left == "an unrecorded acknowledgement" else 0
        assert drain(consumer, 9 - first) == numbered(9 - first, first)
        assert consumer.receive(1) == []


@pytest.mark.crash
def test_memory_with_a_living_client_is_left_alone(directory: Path) -> None:
    directory.mkdir()
    service = subprocess.Popen([sys.executable, "-m", "shmbroker.workers.supervisor", str(directory)])
    wait_for_workers(directory)
    with shmbroker.open(directory) as broker:
        send(broker, b"flushed")
        wait_until(lambda: broker.region.get("flushed") == broker.region.get("tail"), "all on the disk")
        kill_all(directory)
        service.wait()
        descriptor = read_descriptor(BrokerPaths(directory))
        assert descriptor is not None
        control = Path(f"{SHM}{descriptor.control}")
        age(control)
        remains.clear()
        assert control.exists()
    age(control)
    clear_away([control])
