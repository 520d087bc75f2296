"""A broker handle that nobody closes: given back when it is dropped, with the warning that files give."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from support.processes import Child
from support.waiting import wait_until

import shmbroker
from shmbroker import Message
from shmbroker.broker import Broker


def watchers() -> int:
    return sum(thread.name == "shmbroker-watch" for thread in threading.enumerate())


def test_dropped_handles_keep_no_slot_and_no_thread(broker: Broker, directory: Path) -> None:
    before = watchers()
    for _ in range(3 * 16):  # three times as many as max_clients
        with pytest.warns(ResourceWarning, match=f"unclosed broker of {directory}: close it"):
            shmbroker.open(directory)
    wait_until(lambda: watchers() == before, "no thread watches for a handle that is gone")
    assert len(broker.region.clients()) == 1


def test_a_handle_lives_as_long_as_what_was_made_through_it(broker: Broker, directory: Path) -> None:
    producer = shmbroker.open(directory).producer("test")
    consumer = shmbroker.open(directory).simple_consumer("audit", {"orders": "*"})
    producer.send(Message("orders", b"42"))
    (message,) = consumer.receive(wait=10.0)
    consumer.ack(message)
    assert len(broker.region.clients()) == 3
    with pytest.warns(ResourceWarning):
        del producer
    assert (message.body, len(broker.region.clients())) == (b"42", 2)
    consumer.close()
    with pytest.warns(ResourceWarning):
        del consumer
    assert len(broker.region.clients()) == 1


def test_a_forked_child_that_drops_its_parents_handle_takes_nothing_from_it(directory: Path) -> None:
    source = """
        import os, sys, warnings, shmbroker
        warnings.simplefilter("error")
        broker = shmbroker.open(sys.argv[1])
        if (child := os.fork()) == 0:
            del broker
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(broker.region.clients()))
        broker.close()
    """
    with Child(source, directory) as child:
        assert child.read_line() == "0 1"


def test_a_handle_that_is_open_at_the_end_of_a_program_does_not_hold_it_up(broker: Broker, directory: Path) -> None:
    source = """
        import sys, shmbroker
        broker = shmbroker.open(sys.argv[1])
        producer = broker.producer("test")
        producer.send_async(shmbroker.Message("orders", b"42"))
    """
    with Child(source, directory) as child:
        assert child.wait() == 0
    wait_until(lambda: len(broker.region.clients()) == 1, "its slot free")
