"""Somebody empties the directory of a served broker under its clients: they read the new log then, from its start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.served import serving
from support.waiting import wait_until

import shmbroker
from shmbroker import Message

COUNT = 300
LARGE = 20_000  # bytes of a body: more than the ring holds of them


def fill(directory: Path, body: bytes) -> None:
    with shmbroker.open(directory) as broker, broker.producer("test") as producer:
        broker.create_topic("orders", queues=1)
        end = 0
        for number in range(COUNT):
            end = producer.send(Message("orders", b"%s %d " % (body, number) + bytes(LARGE))).end_position
        wait_until(lambda: broker.region.get("dispatched") >= end, "all is dispatched")


def test_consumers_that_lag_read_the_new_log_when_somebody_has_emptied_the_directory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RING_BYTES", "SEGMENT_BYTES"):
        monkeypatch.setenv(f"SHMBROKER_{name}", "4 MiB")
    with serving(directory):
        fill(directory, b"old")
        broker = shmbroker.open(directory)
        simple = broker.simple_consumer("simple", {"orders": "*"})
        pull = broker.pull_consumer("pull")
        pull.assign(["orders"])
        assert [message.body.split()[:2] for message in simple.receive(2)] == [[b"old", b"0"], [b"old", b"1"]]
        assert [message.body.split()[:2] for message in pull.poll(2)] == [[b"old", b"0"], [b"old", b"1"]]
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with serving(directory), broker:
        fill(directory, b"new")
        for got in (simple.receive(2, wait=10.0), pull.poll(2, wait=10.0)):
            assert [message.body.split()[:2] for message in got] == [[b"new", b"0"], [b"new", b"1"]]
