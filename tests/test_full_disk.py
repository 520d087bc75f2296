"""A start on a disk without a free block: what is there is delivered and acknowledged, sends wait for room.

The disk is filled to its last byte after the broker has gone, and stays so over a second restart. What of the log's
derived files is missing by then has no place to be made: consume queues, when the dispatcher was behind, and key index.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from support.processes import Child, kill_all, wait_gone
from support.running import QUICK, log_bodies, lose_memory, running, wait_word
from support.waiting import wait_until

import shmbroker
from shmbroker import Message, SendStatus
from shmbroker.broker import Broker
from shmbroker.naming import BrokerPaths
from shmbroker.store.key_index import KeyIndex
from shmbroker.store.segment import list_segments

pytestmark = pytest.mark.crash

SETTINGS: Final[dict[str, Any]] = {**QUICK, "send_timeout": 0.5, "claim_window": 8192}
COUNT: Final = 3000
PADDING: Final = bytes(1000)

# Sends and waits; with "behind", the dispatcher does nothing from the first message on.
SENDER = """
    import os, signal, sys, shmbroker
    from shmbroker import Message
    from support.running import worker_pid
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    broker.simple_consumer("audit", {"orders": "*"}).close()
    producer = broker.producer("test")
    if sys.argv[3] == "behind":
        os.kill(worker_pid(broker, "dispatcher"), signal.SIGSTOP)
    for number in range(int(sys.argv[4])):
        sent = producer.send(Message("orders", b"%d " % number + bytes(1000)))
    broker.attach().wait_flushed(sent.end_position, 10**10)
    print("sent")
    sys.stdin.readline()
    broker.close()
"""


def fill(disk: Path) -> None:
    """To the last byte."""
    with (disk / "ballast").open("ab", buffering=0) as ballast:
        for size in (1 << 20, 4096, 1):
            try:
                while ballast.write(bytes(size)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017 - it always comes
    assert os.statvfs(disk).f_bavail == 0


def lose_memory_and_prepared_segments(directory: Path) -> None:
    """The worst: recovery would take the blocks of the segments that stood ready behind the log."""
    lose_memory(directory)
    log = BrokerPaths(directory).log
    for base in list_segments(log)[4:]:
        (log / f"{base:020d}").unlink()


def receive_all(broker: Broker) -> list[int]:
    """The group's messages, acknowledged, as long as there are more."""
    numbers: list[int] = []
    with broker.simple_consumer("audit", {"orders": "*"}) as consumer:
        while messages := consumer.receive(100, wait=0.5):
            consumer.ack(messages)
            numbers += [int(message.body.split()[0]) for message in messages]
    return numbers


def send_until_refused(broker: Broker, number: int) -> int:
    """Returns the number of the first message that the full disk refuses."""
    with broker.producer("test") as producer:
        try:
            while True:
                producer.send(Message("orders", b"%d " % number + PADDING))
                number += 1
        except shmbroker.StoreFull:
            return number


def accepts(broker: Broker, number: int) -> bool:
    with broker.producer("test") as producer:
        try:
            return producer.send(Message("orders", b"%d " % number)).status is SendStatus.SEND_OK
        except (shmbroker.StoreFull, shmbroker.BrokerBusy):
            return False


@pytest.mark.parametrize(
    ("dispatcher", "end"),
    [
        ("at work", None),
        ("at work", kill_all),
        ("at work", lose_memory),
        ("behind", kill_all),
        ("behind", lose_memory_and_prepared_segments),
    ],
    ids=["clean-stop", "with-memory", "without-memory", "behind-with-memory", "behind-without-memory"],
)
def test_a_broker_starts_on_a_full_disk_delivers_what_is_there_and_sends_again_when_there_is_room(
    small_disk: Path, dispatcher: str, end: Callable[[Path], None] | None
) -> None:
    directory = small_disk / "b"
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    with Child(SENDER, directory, SETTINGS, dispatcher, COUNT, environment=here) as child:
        assert child.read_line() == "sent"
        if end is None:
            child.write_line()
            assert child.wait() == 0
        else:
            end(directory)
    wait_gone(directory)
    if end is lose_memory_and_prepared_segments:
        for file in BrokerPaths(directory).index.iterdir():
            file.unlink()
    fill(small_disk)
    with running(directory, **SETTINGS) as broker:
        assert sorted(receive_all(broker)) == list(range(COUNT))
        fill(small_disk)
        sent = send_until_refused(broker, COUNT)
        fill(small_disk)
    with running(directory, **SETTINGS) as broker:
        fill(small_disk)
        assert sorted(receive_all(broker)) == list(range(COUNT, sent)), "what was acknowledged does not come again"
        sent = send_until_refused(broker, sent)
        (small_disk / "ballast").unlink()
        wait_until(lambda: accepts(broker, sent), "sends accepted again")
        receive_all(broker)
        tail = broker.region.get("tail")
        wait_word(broker, "dispatched", tail)
        wait_word(broker, "indexed", tail)
        wait_until(lambda: broker.status()["store"]["state"] == "ok", "the store well again")
    kept = [int(body.split()[0]) for body in log_bodies(directory)]
    assert kept == list(range(sent + 1 - len(kept), sent + 1)), "retention takes from the front, all if it must"


def test_an_index_is_not_begun_on_a_full_disk(small_disk: Path) -> None:
    """LMDB would write its lock file through a mapping: SIGBUS."""
    (small_disk / "index").mkdir()
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        KeyIndex(small_disk / "index", bytes(16), writable=True)
    (small_disk / "ballast").unlink()
    KeyIndex(small_disk / "index", bytes(16), writable=True).close()
    shutil.rmtree(small_disk / "index")
