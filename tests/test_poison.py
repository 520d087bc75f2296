"""Messages that kill whatever process they meet: each is a dead letter after exactly its deliveries, and it alone."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Final

import pytest
from support.consuming import ALL, send
from support.failing import GROUP, at_once, dead_letters
from support.listening import all_done
from support.processes import Child
from support.running import QUICK, running
from support.waiting import wait_until

pytestmark = pytest.mark.crash

POISONS: Final = 100
NEIGHBOURS: Final = 300
DELIVERIES: Final = 17  # by default

# A process that keeps some push consumers alive, each in a child of its own, until it is killed itself. They note each
# call of the listener in a file before anything else happens; a poison then kills them.
FLEET: Final = """
    import os, signal, sys
    import shmbroker, shmbroker.broker, shmbroker.push_consumer  # once for all children
    from shmbroker import ConsumeStatus
    directory, history, processes, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    noted = os.open(history, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    alive, kept = os.pipe()  # which ends with the fleet
    def handle(message, context):
        os.write(noted, b"%s %d\\n" % (message.body, message.delivery_attempt))
        if message.body.startswith(b"poison"):
            os.kill(os.getpid(), signal.SIGKILL)
        return ConsumeStatus.CONSUME_SUCCESS
    def consume():
        if os.fork() == 0:
            os.close(kept)
            try:
                broker = shmbroker.open(directory)
                broker.push_consumer("audit", handle, {"orders": "*"}, consume_thread_max=threads)
                os.read(alive, 1)
            finally:
                os._exit(1)
    for _ in range(processes):
        consume()
    while True:
        os.wait()
        consume()
"""


def bodies() -> list[bytes]:
    """Each poison among its neighbours."""
    return [b"poison %d" % (i // 4) if i % 4 == 1 else b"innocent %d" % i for i in range(POISONS + NEIGHBOURS)]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 4])
def test_each_of_a_hundred_poisons_is_a_dead_letter_after_exactly_17_deliveries_and_no_neighbour_is(
    threads: int, tmp_path: Path
) -> None:
    history = tmp_path / "history"
    with running(tmp_path / "broker", **(QUICK | {"max_clients": 64})) as broker:
        broker.create_topic("orders", queues=2)
        broker.create_group(GROUP, at_once(DELIVERIES - 1))
        half = len(bodies()) // 2
        for queue in range(2):
            send(broker, *bodies()[queue * half : (queue + 1) * half], queue_id=queue)
        with Child(FLEET, broker.directory, history, 2, threads):
            wait_until(lambda: all_done(broker, GROUP, "orders", len(bodies())), "all done with", 100.0)
        letters = dead_letters(broker)
        with broker.simple_consumer(GROUP, ALL) as consumer:
            assert consumer.receive(32) == []
    assert sorted(letter.body for letter in letters) == sorted(b"poison %d" % i for i in range(POISONS))
    assert {letter.attempts for letter in letters} == {DELIVERIES}
    seen: dict[bytes, list[int]] = defaultdict(list)
    for line in history.read_bytes().splitlines():
        body, _, attempt = line.rpartition(b" ")
        seen[body].append(int(attempt))
    assert seen.keys() == set(bodies())
    for body, attempts in seen.items():
        assert attempts == sorted(set(attempts)), (body, attempts)
        if body.startswith(b"innocent"):
            assert attempts[-1] <= 2, f"{body!r}: charged more than once for another's kill"
        elif threads == 1:
            assert attempts == list(range(1, DELIVERIES + 1)), body
        else:  # struck once by another before its own listener ran; from then on it runs alone
            assert attempts in (list(range(1, DELIVERIES + 1)), list(range(2, DELIVERIES + 1))), body
