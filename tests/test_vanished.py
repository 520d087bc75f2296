"""What a running broker stands on is taken away: its directory, or its memory objects."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import objects_of
from support.consuming import ALL, drain, numbered, send
from support.processes import SMALL, stop_broker, wait_for_workers, wait_gone
from support.waiting import wait_until

import shmbroker

SLOW: dict[str, Any] = {**SMALL, "flush_interval": 3000.0, "flush_least_bytes": 1 << 20}  # only in memory, for long
SHM = Path("/dev/shm")


def test_a_removed_directory_ends_the_broker_and_leaves_no_memory(directory: Path) -> None:
    with shmbroker.open(directory, **SLOW) as broker:
        producer = broker.producer("test")
        producer.send(shmbroker.Message("orders", b"lost"))
        wait_for_workers(directory)
        objects = objects_of(directory)
        assert len(objects) == 2
        wait_until(lambda: _is_removed(directory), "the directory removed, whatever the workers put into it meanwhile")
        wait_until(lambda: not any((SHM / name).exists() for name in objects), "no memory left")
        wait_gone(directory)
        with pytest.raises(shmbroker.BrokerClosed, match="was removed or moved while it was open"):
            producer.send(shmbroker.Message("orders", b"nowhere"))
    assert not directory.exists()
    with shmbroker.open(directory, **SMALL) as broker:
        assert broker.topics() == []


def test_a_moved_directory_keeps_its_memory_and_its_clients_for_who_opens_it_there(directory: Path) -> None:
    moved = directory.with_name("moved")
    with shmbroker.open(directory, **SLOW) as broker:
        producer = broker.producer("test")
        send(broker, *numbered(50))
        wait_for_workers(directory)
        assert broker.region.get("flushed") < broker.region.get("tail")
        directory.rename(moved)
        wait_gone(directory)
        with shmbroker.open(moved) as there, there.simple_consumer("audit", ALL) as consumer:
            assert drain(consumer, 50) == numbered(50)
            producer.send(shmbroker.Message("orders", b"into the same memory"))
            assert drain(consumer, 1) == [b"into the same memory"]
    wait_gone(moved)
    assert objects_of(moved) == []
    assert not directory.exists()


@pytest.mark.parametrize("served", [False, True], ids=["embedded", "served"])
def test_unlinked_memory_is_flushed_and_made_anew_and_clients_go_on(directory: Path, served: bool) -> None:
    service = None
    if served:
        directory.mkdir()
        service = subprocess.Popen([sys.executable, "-m", "shmbroker.workers.supervisor", str(directory)])
        wait_for_workers(directory)
        settings: dict[str, Any] = {}
    else:
        settings = SLOW
    with shmbroker.open(directory, **settings) as broker, broker.simple_consumer("audit", ALL) as consumer:
        send(broker, *numbered(50))
        consumer.ack(consumer.receive(10))
        wait_for_workers(directory)
        old = objects_of(directory)
        for name in old:
            (SHM / name).unlink()
        wait_until(lambda: len(objects_of(directory)) == 2, "new memory", deadline=15.0)
        assert set(objects_of(directory)).isdisjoint(old)
        send(broker, b"after")
        assert sorted(drain(consumer, 41)) == sorted([*numbered(40, 10), b"after"])
    if service is not None:
        stop_broker(directory)
        assert service.wait(15.0) == os.EX_OK


def _is_removed(directory: Path) -> bool:
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()
