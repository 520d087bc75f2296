"""kill -9 of a sender at each step of its append, while others send. What each had written into its own history before
and after a send is compared with what the log holds: acknowledged messages are there once, the one in doubt at most
once, and of a batch all or none."""

from __future__ import annotations

import os
import signal
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.processes import Child
from support.running import QUICK, log_records, running
from support.waiting import wait_until

import shmbroker
from shmbroker import BrokerBusy, Message, SendStatus
from shmbroker._native._core import failpoint_names
from shmbroker.record import RecordKind

pytestmark = pytest.mark.crash

# Sends until told to stop; "try" goes into the history before each send, "ok" behind it. Every fifth append is a batch,
# every fourth carries a dedup key.
SENDER = """
    import os, select, sys, zlib, shmbroker
    from shmbroker import Message

    directory, name, topic = sys.argv[1:4]
    history = os.open(sys.argv[4], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    producer = shmbroker.open(directory).producer("crash")

    def message(number):
        text = f"{name} {number} " + "x" * (number * 7919 % 1500)
        return Message(topic, f"{text} {zlib.crc32(text.encode())}".encode())

    number = step = 0
    print("ready")
    while not select.select([sys.stdin], [], [], 0)[0]:
        step += 1
        count = 7 if step % 5 == 0 else 1
        os.write(history, f"try {number} {count}\\n".encode())
        if count > 1:
            producer.send_batch([message(number + i) for i in range(count)], timeout=20)
        else:
            producer.send(message(number), timeout=20, dedup_key=f"{name}-{number}" if step % 4 == 0 else None)
        os.write(history, f"ok {number} {count}\\n".encode())
        number += count
    print("stopped", number)
"""

# Sends one message under a dedup key.
KEYED_SENDER = """
    import sys, shmbroker
    from shmbroker import Message
    producer = shmbroker.open(sys.argv[1]).producer("crash")
    print("ready")
    sys.stdin.readline()
    result = producer.send(Message(sys.argv[2], sys.argv[3].encode()), dedup_key=sys.argv[3])
    print(result.status.name, result.position)
"""

# A pass of the failpoint that is reached after some sends; some are passed many times in one append.
PASSES = {"append.undo_written": 700, "append.armed": 701}
APPEND_FAILPOINTS = [name for name in failpoint_names() if name.startswith("append.")]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[shmbroker.Broker]:
    """One broker for all kills: each leaves it as good as new."""
    with running(tmp_path_factory.mktemp("crash") / "broker", **QUICK) as opened:
        yield opened


def attempts(history: Path) -> tuple[set[int], set[int]]:
    """(numbers acknowledged, numbers in doubt)."""
    tried: set[int] = set()
    acked: set[int] = set()
    for line in history.read_text().splitlines():
        what, number, count = line.split()
        (tried if what == "try" else acked).update(range(int(number), int(number) + int(count)))
    return acked, tried - acked


def stored(broker: shmbroker.Broker, topic: str) -> dict[str, Counter[int]]:
    """How often the log holds each number of each sender; every body is checked by its own sum, every queue's order."""
    region = broker.region
    tail = region.get("tail")
    wait_until(lambda: region.get("flushed") >= tail, "everything on the disk")
    topic_id = next(known["topic_id"] for known in broker.topics() if known["name"] == topic)
    found: dict[str, Counter[int]] = {}
    last: dict[tuple[str, int], int] = {}
    offsets: Counter[int] = Counter()
    for record in log_records(broker.directory, tail):
        if record.kind != RecordKind.MESSAGE or record.topic_id != topic_id:
            continue
        text, _, checksum = record.body.rpartition(b" ")
        assert zlib.crc32(text) == int(checksum)
        name, number = text.split()[:2]
        sender = name.decode()
        found.setdefault(sender, Counter())[int(number)] += 1
        assert last.get((sender, record.queue_id), -1) < int(number)
        last[sender, record.queue_id] = int(number)
        assert record.queue_offset == offsets[record.queue_id]
        offsets[record.queue_id] += 1
    return found


@pytest.mark.parametrize("name", APPEND_FAILPOINTS)
def test_a_sender_killed_while_others_send_loses_nothing_and_doubles_nothing(
    name: str, broker: shmbroker.Broker, tmp_path: Path
) -> None:
    topic = name.replace(".", "-")
    broker.create_topic(topic, queues=3)
    names = ["victim", "first", "second"]
    with (
        Child(
            SENDER, broker.directory, "victim", topic, tmp_path / "victim",
            environment={"SHMBROKER_FAILPOINTS": f"client/{name}=kill@{PASSES.get(name, 60)}"},
        ) as victim,
        Child(SENDER, broker.directory, "first", topic, tmp_path / "first") as first,
        Child(SENDER, broker.directory, "second", topic, tmp_path / "second") as second,
    ):  # fmt: skip
        assert victim.wait() == -signal.SIGKILL
        assert victim.read_line() == "ready"
        wait_until(
            lambda: victim.pid not in {client["pid"] for client in broker.region.clients()}, "the victim's slot free"
        )
        wait_until(lambda: all((tmp_path / other).exists() for other in names[1:]), "the others at work")
        sizes = [(tmp_path / other).stat().st_size for other in names[1:]]
        wait_until(
            lambda: all((tmp_path / other).stat().st_size > size for other, size in zip(names[1:], sizes, strict=True)),
            "the others going on",
        )
        for child in (first, second):
            child.write_line("stop")
            assert child.read_line() == "ready"
            assert child.read_line().startswith("stopped")
            assert child.wait() == 0
    found = stored(broker, topic)
    for sender in names:
        acked, doubtful = attempts(tmp_path / sender)
        assert acked
        assert found[sender].keys() - doubtful == acked
        assert set(found[sender].values()) == {1}
        assert len(found[sender].keys() & doubtful) in (0, len(doubtful))  # all or none
        assert bool(doubtful) == (sender == "victim")


@pytest.mark.parametrize(
    ("name", "exists"), [("append.copied", False), ("append.published", True), ("append.unlocked", True)]
)
def test_a_dedup_key_sent_again_after_the_kill_yields_no_second_copy(
    name: str, exists: bool, broker: shmbroker.Broker
) -> None:
    topic = "keyed"
    broker.create_topic(topic, queues=1)
    text = f"{name} 0"
    body = f"{text} {zlib.crc32(text.encode())}"
    failpoint = {"SHMBROKER_FAILPOINTS": f"client/{name}=kill"}
    with Child(KEYED_SENDER, broker.directory, topic, body, environment=failpoint) as victim:
        assert victim.read_line() == "ready"
        victim.write_line()
        assert victim.wait() == -signal.SIGKILL
    with broker.producer("crash") as producer:
        again = producer.send(Message(topic, body.encode()), dedup_key=body)
        third = producer.send(Message(topic, body.encode()), dedup_key=body)
    assert again.duplicate is exists
    assert (third.duplicate, third.position, third.queue_offset) == (True, again.position, again.queue_offset)
    assert stored(broker, topic)[name][0] == 1


def test_a_stopped_holder_of_the_lock_is_named_and_goes_on_when_continued(broker: shmbroker.Broker) -> None:
    topic = "stopped"
    broker.create_topic(topic, queues=1)
    texts = [f"{sender} 0" for sender in ("holder", "waiting")]
    bodies = [f"{text} {zlib.crc32(text.encode())}".encode() for text in texts]
    failpoint = {"SHMBROKER_FAILPOINTS": "client/append.copied=stop"}
    with (
        Child(KEYED_SENDER, broker.directory, topic, bodies[0].decode(), environment=failpoint) as holder,
        broker.producer("crash") as producer,
    ):
        assert holder.read_line() == "ready"
        holder.write_line()
        wait_until(lambda: psutil.Process(holder.pid).status() == psutil.STATUS_STOPPED, "the holder stopped")
        tail = broker.region.get("tail")
        start = time.monotonic()
        with pytest.raises(BrokerBusy, match=str(holder.pid)) as busy:
            producer.send(Message(topic, bodies[1]), timeout=0.2)
        assert busy.value.holder_pid == holder.pid
        assert time.monotonic() - start >= 0.2
        with pytest.raises(BrokerBusy):
            producer.send_batch([Message(topic, bodies[1])] * 3, timeout=0.1)
        assert broker.region.get("tail") == tail
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.read_line().split()[0] == SendStatus.SEND_OK.name
        assert producer.send(Message(topic, bodies[1])).status is SendStatus.SEND_OK
    assert stored(broker, topic) == {"holder": Counter({0: 1}), "waiting": Counter({0: 1})}
