"""``ack = "durable"`` and ``attempts = "durable"`` of a push consumer: what the log knows when the memory is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from support.consuming import ALL, numbered
from support.processes import Child
from support.running import SELDOM, lose_memory

import shmbroker

# Sends ten messages durably and hears them in one thread. It answers five, then tells and waits.
SCRIPT: Final = """
    import sys, threading, shmbroker
    from shmbroker import ConsumeStatus, Message
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    sent = broker.producer("test").send_batch([Message("orders", b"%d" % i) for i in range(10)], queue_id=0)
    broker.attach().wait_flushed(sent.end_position, 10**10)
    def handle(message, context):
        if message.body == b"5":
            print("sixth")
            threading.Event().wait()
        return ConsumeStatus.CONSUME_SUCCESS
    broker.push_consumer("audit", handle, {"orders": "*"}, consume_thread_max=1, **eval(sys.argv[3]))
    sys.stdin.read()
"""


def after_power_cut(directory: Path, settings: str) -> dict[bytes, int]:
    """Body to attempt of what comes again."""
    with Child(SCRIPT, directory, SELDOM, settings) as child:
        assert child.read_line() == "sixth"
        lose_memory(directory)
    found: dict[bytes, int] = {}
    with shmbroker.open(directory, **SELDOM) as broker, broker.simple_consumer("audit", ALL) as consumer:
        while b"9" not in found and (received := consumer.receive(32, wait=10.0)):
            found |= {message.body: message.delivery_attempt for message in received}
    return found


@pytest.mark.crash
def test_a_delivery_that_was_begun_is_not_forgotten_and_what_was_prefetched_is_none(directory: Path) -> None:
    found = after_power_cut(directory, '{"attempts": "durable"}')
    # Each of the first five was acknowledged in memory, and the attempts of the next written behind that.
    assert found == {b"5": 2} | dict.fromkeys(numbered(4, 6), 1)


@pytest.mark.crash
def test_what_was_acknowledged_durably_does_not_come_again(directory: Path) -> None:
    found = after_power_cut(directory, '{"ack": "durable", "pull_batch_size": 5}')
    assert found == dict.fromkeys(numbered(5, 5), 1)


@pytest.mark.crash
def test_in_memory_a_power_cut_may_take_both_back(directory: Path) -> None:
    assert after_power_cut(directory, "{}") == dict.fromkeys(numbered(10), 1)
