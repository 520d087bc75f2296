"""The janitor looks fifty times a second: what that costs, and that it misses nobody who comes or goes."""

from __future__ import annotations

import logging
import time

import pytest
from support.regions import memory

from shmbroker._native._core import Client, Region
from shmbroker.janitor import Janitor

pytestmark = pytest.mark.native

CROWD = 500
TURNS = 10
TRIES = 5


def watching(region: Region) -> Janitor:
    return Janitor(region, logging.getLogger("shmbroker.janitor"), kill_stopped_holder=False)


def processor_seconds(clients: int) -> float:
    """Of some turns of a janitor that knows so many clients, all of which sleep."""
    with memory(clients=CROWD) as region:
        attached = [Client(region, "sleeper") for _ in range(clients)]
        janitor = watching(region)
        try:
            janitor.turn()
            begin = time.thread_time()
            for _ in range(TURNS):
                janitor.turn()
            return time.thread_time() - begin
        finally:
            janitor.close()
            for client in attached:
                client.close()


def test_clients_that_sleep_cost_the_janitor_nothing() -> None:
    ratios: list[float] = []
    while not ratios or ratios[-1] > 3.0:
        assert len(ratios) < TRIES, f"a turn with {CROWD} clients costs {ratios} times one with a single client"
        ratios.append(processor_seconds(CROWD) / processor_seconds(1))


def test_whoever_comes_or_goes_between_two_turns_is_watched_or_forgotten() -> None:
    with memory() as region:
        janitor = watching(region)
        try:
            first = Client(region, "first")
            janitor.turn()
            second = Client(region, "second")
            janitor.turn()
            assert {client.name for client in janitor._watched.values()} == {"first", "second"}
            first.close()
            third = Client(region, "third")  # in the slot of the first
            janitor.turn()
            assert {client.name for client in janitor._watched.values()} == {"second", "third"}
            second.close()
            third.close()
            janitor.turn()
            assert not janitor._watched
        finally:
            janitor.close()
