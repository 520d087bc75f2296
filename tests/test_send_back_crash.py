"""kill -9 of consumers that send back, and of those that a message kills; and what is left when the memory is lost."""

from __future__ import annotations

import json
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.consuming import ALL, send
from support.failing import GROUP, at_once, dead_letters
from support.processes import SMALL, Child
from support.running import QUICK, log_records, lose_memory, running
from support.waiting import wait_until

from shmbroker import Message, RetryPolicy
from shmbroker.broker import Broker
from shmbroker.delivery.snapshot import Snapshot
from shmbroker.record import GroupBody, RecordKind

pytestmark = pytest.mark.crash

# Receives one message and sends it back, for a retry (0) or to the dead letters (-1).
VICTIM = """
    import sys, shmbroker
    from shmbroker.send_back import SendBack
    broker = shmbroker.open(sys.argv[1])
    consumer = broker.simple_consumer(sys.argv[2], {sys.argv[3]: "*"})
    print("ready")
    sys.stdin.readline()
    (message,) = consumer.receive(1, wait=10.0)
    SendBack(broker, consumer).later(message, level=int(sys.argv[4]), error="in doubt")
"""

# Each of its children receives what there is, and is killed by the message "poison".
POISONED = """
    import os, signal, sys, shmbroker
    for delivery in range(int(sys.argv[2])):
        pid = os.fork()
        if pid == 0:
            broker = shmbroker.open(sys.argv[1])
            consumer = broker.simple_consumer("audit", {"orders": "*"})
            while True:
                for message in consumer.receive(8, wait=10.0):
                    if message.body == b"poison":
                        print(message.delivery_attempt, flush=True)
                        os.kill(os.getpid(), signal.SIGKILL)
                    consumer.ack(message)
        os.waitpid(pid, 0)
"""


ROOM = {"max_topics": 64, "max_groups": 32, "claim_tables": 64}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One broker for all kills: each leaves it as good as new."""
    with running(tmp_path_factory.mktemp("crash") / "broker", **(QUICK | ROOM)) as opened:
        yield opened


EDGES = ["append.copied", "append.published", "append.unlocked", "move.appended", "retry.topic_made", "retry.moved"]


@pytest.mark.parametrize("level", [0, -1])
@pytest.mark.parametrize("edge", EDGES)
def test_a_kill_in_a_move_neither_loses_nor_doubles_the_message(edge: str, level: int, broker: Broker) -> None:
    group = topic = edge.replace(".", "-") + ("-retry" if level == 0 else "-dead")
    broker.create_topic(topic, queues=1)
    broker.create_group(group, at_once(5))
    with broker.producer("test") as producer:
        sent = producer.send(Message(topic, b"failing"))
    # The topic's definition is an append as well: the failpoints inside an append are to hit that of the move.
    at = 2 if edge.startswith("append.") else 1
    with Child(
        VICTIM, broker.directory, group, topic, level, environment={"SHMBROKER_FAILPOINTS": f"client/{edge}=kill@{at}"}
    ) as victim:
        assert victim.read_line() == "ready"
        victim.write_line()
        assert victim.wait() == -signal.SIGKILL
    moved = edge not in ("append.copied", "retry.topic_made")
    with broker.simple_consumer(group, {topic: "*"}) as consumer:
        dead = dead_letters(broker, group)
        if level == -1 and moved:
            assert [record.message_id for record in dead] == [sent.message_id]
        else:
            (message,) = consumer.receive(1, wait=10.0)
            assert (message.body, message.topic, message.message_id) == (b"failing", topic, sent.message_id)
            assert message.delivery_attempt == 2
            assert ("RETRY_TOPIC" in message.properties) == moved
            consumer.ack(message)
            assert dead == []
        assert consumer.receive(2) == []


@pytest.mark.slow
def test_a_message_that_kills_its_consumers_is_a_dead_letter_after_exactly_seventeen_deliveries(broker: Broker) -> None:
    broker.create_topic("orders", queues=1)
    send(broker, b"before", b"poison", b"behind")
    with Child(POISONED, broker.directory, 17) as child:
        assert [int(child.read_line()) for _ in range(17)] == list(range(1, 18))
        assert child.wait() == 0
    with broker.simple_consumer(GROUP, ALL) as consumer:
        wait_until(
            lambda: consumer.receive(1) == [] and bool(dead_letters(broker)), "the poison among the dead letters"
        )
    (dead,) = dead_letters(broker)
    assert (dead.body, dead.attempts) == (b"poison", 17)


# Fails with most messages, most of them again and again; what it acknowledges goes into its history first.
FAILING = """
    import os, random, sys, shmbroker
    from shmbroker.send_back import SendBack
    broker = shmbroker.open(sys.argv[1])
    chance = random.Random(int(sys.argv[3]))
    history = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    consumer = broker.simple_consumer("random", {"random": "*"})
    send_back = SendBack(broker, consumer)
    print("ready")
    while True:
        for message in consumer.receive(8, wait=1.0):
            if chance.random() < 0.3:
                os.write(history, message.body + b"\\n")
                consumer.ack(message)
            else:
                send_back.later(message)
"""


@pytest.mark.slow
def test_kills_at_random_moments_leave_each_message_acknowledged_or_a_dead_letter_once(
    broker: Broker, tmp_path: Path
) -> None:
    count, chance = 400, random.Random(20261121)
    broker.create_topic("random", queues=2)
    broker.create_group("random", at_once(8))
    with broker.producer("test") as producer:
        for first in range(0, count, 50):
            producer.send_batch([Message("random", b"%d" % number) for number in range(first, first + 50)])
    children = 0
    while children < 8:
        with ExitStack() as running_children:
            for _ in range(2):
                history = tmp_path / str(children)
                child = Child(FAILING, broker.directory, history, children)
                running_children.enter_context(child)
                assert child.read_line() == "ready"
                children += 1
            threading.Event().wait(chance.random() * 0.2)  # they die at some moment or other
    acknowledged: Counter[bytes] = Counter()
    with broker.simple_consumer("random", {"random": "*"}) as consumer:
        while messages := consumer.receive(32, wait=1.0):
            acknowledged.update(message.body for message in messages)
            consumer.ack(messages)
    dead = Counter(record.body for record in dead_letters(broker, "random"))
    assert set(acknowledged.values()) <= {1}
    assert set(dead.values()) <= {1}
    assert not acknowledged.keys() & dead.keys()
    noted = {line for path in tmp_path.iterdir() for line in path.read_bytes().split()}
    # One that was noted was acknowledged behind that, unless its process was killed in between.
    assert len(noted & (acknowledged.keys() | dead.keys())) <= children
    assert noted | acknowledged.keys() | dead.keys() == {b"%d" % number for number in range(count)}
    assert dead


# Then everything is killed and the memory taken away; nothing but the moves has recorded progress.
SETTINGS = {**SMALL, "progress_interval": 3600.0}
MOVES = """
    import sys, shmbroker
    from shmbroker import Message, RetryPolicy
    from shmbroker.send_back import SendBack
    broker = shmbroker.open(sys.argv[1], **eval(sys.argv[2]))
    broker.create_topic("orders", queues=1)
    broker.create_group("audit", RetryPolicy("table", 7, delays=(0.0, 3600.0)))
    with broker.producer("test") as producer:
        producer.send_batch([Message("orders", b"%d" % number) for number in range(100)], queue_id=0)
    consumer = broker.simple_consumer("audit", {"orders": "*"})
    messages = consumer.receive(64, invisible=600.0) + consumer.receive(36, invisible=600.0)
    assert len(messages) == 100  # more than the window: the oldest are in the overflow table
    send_back = SendBack(broker, consumer)
    for message in messages[10:20] + messages[70:80]:
        send_back.later(message)
    send_back.later(messages[50], level=-1)
    broker.region.wait_for("flushed", broker.region.get("tail"), 10_000_000_000)
    print("done")
    sys.stdin.readline()
"""


def test_without_the_memory_what_was_moved_comes_as_its_copy_alone(tmp_path: Path) -> None:
    directory = tmp_path / "broker"
    with Child(MOVES, directory, SETTINGS) as child:
        assert child.read_line() == "done"
        lose_memory(directory)
    with running(directory) as broker:
        assert broker.region.retry_text(GROUP) == RetryPolicy("table", 7, delays=(0.0, 3600.0)).encode()
        assert [record.body for record in dead_letters(broker)] == [b"50"]
        found: Counter[bytes] = Counter()
        retried = set()
        with broker.simple_consumer(GROUP, ALL) as consumer:
            while messages := consumer.receive(32, wait=1.0):
                found.update(message.body for message in messages)
                retried |= {message.body for message in messages if "RETRY_TOPIC" in message.properties}
                assert all(message.delivery_attempt == 2 for message in messages if message.body in retried)
                consumer.ack(messages)
    moved = {b"%d" % number for number in (*range(10, 20), *range(70, 80))}
    assert found == Counter({b"%d" % number for number in range(100)} - {b"50"})
    assert retried == moved


def test_a_policy_is_in_every_snapshot_beside_the_subscription(tmp_path: Path) -> None:
    directory = tmp_path / "broker"
    policy = RetryPolicy("exponential", 7, initial=0.5, multiplier=3.0, longest=60.0)
    with running(directory, **QUICK) as broker:
        broker.create_group(GROUP, RetryPolicy(max_retries=1))
        broker.set_retry(GROUP, policy)
        broker.create_topic("orders", queues=1)
        broker.set_subscription(GROUP, ALL)
        Snapshot(broker.region, ()).complete()
    with running(directory, **QUICK) as broker:
        assert broker.region.retry_text(GROUP) == policy.encode()
        (group,) = (known for known in broker.groups() if known["name"] == GROUP)
        assert (group["subscription_set"], group["subscription"]) == (True, '{"orders":"*"}')
    bodies = [GroupBody.parse(record.body) for record in log_records(directory) if record.kind == RecordKind.GROUP]
    assert GroupBody(GROUP, bodies[-1].group_id, ALL, 1, json.loads(policy.encode()), 2) in bodies
