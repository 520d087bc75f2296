"""kill -9 of a push consumer's process at every edge between claim, answer, acknowledgement and move.

Its messages say what is to become of them. Another push consumer ends the work, and every delivery of either is
compared with what the script allows: a kill repeats what ran at that moment, charges it once, and changes nothing else.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from support.consuming import asleep, send_to
from support.failing import at_once, dead_letters
from support.listening import all_done
from support.processes import Child
from support.running import QUICK, running
from support.scripted import MAX_RETRIES, History, Scripted, judge, script
from support.waiting import wait_until

from shmbroker.broker import Broker

pytestmark = pytest.mark.crash

COUNT: Final = 130  # about twice the claim window: what is slow at its beginning goes to the overflow table
PATIENCE: Final = 110
THREADS: Final = 3
ROOM: Final = {"max_topics": 64, "max_groups": 32, "claim_tables": 64}

VICTIM: Final = """
    import sys, shmbroker
    from pathlib import Path
    from support.scripted import Scripted
    directory, name, history, patience, settings = sys.argv[1:]
    broker = shmbroker.open(directory)
    listener = Scripted(Path(history), int(patience))
    consumer = broker.push_consumer(name, listener, {name: "*"}, pull_batch_size=4, **eval(settings))
    listener.belongs_to(consumer)
    sys.stdin.read()
"""

# Edge to the passes at which it kills. Inside an append the first are those of moves, or of durable records.
IN_MEMORY: Final = {
    **{f"append.{edge}": (1, 4) for edge in (
        "locked", "undo_written", "armed", "write_limit", "half_copied", "copied", "effects", "published", "final",
        "disarmed", "unlocked",
    )},
    "claim.chosen": (1, 9), "claim.taken": (1, 9), "claim.started": (1, 9), "claim.acked": (1, 9),
    "claim.freed": (1, 4), "claim.pending": (1, 5), "claim.half_reset": (1, 5), "claim.base": (1, 5),
    "claim.reserved": (1,), "claim.moving": (1,), "claim.moved": (1,),
    "move.appended": (1, 2, 9), "retry.topic_made": (1, 2), "retry.moved": (1, 2, 9),
    "wait.flagged": (1,), "wait.woken": (1,),
}  # fmt: skip
DURABLE: Final = {
    "append.copied": (1, 2, 3), "append.published": (1, 2, 3), "append.unlocked": (1, 2, 3), "move.appended": (1, 3),
    "consumer.claimed": (1, 7), "consumer.attempts_appended": (1, 7), "consumer.attempts_flushed": (1, 7),
    "consumer.acks_appended": (1, 4), "claim.acked": (1, 9),
}  # fmt: skip
CASES: Final = [
    pytest.param(edge, at, mode, id=f"{edge}-{at}-{mode}")
    for mode, edges in (("memory", IN_MEMORY), ("durable", DURABLE))
    for edge, passes in edges.items()
    for at in passes
]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One broker for all kills: each leaves it as good as new."""
    with running(tmp_path_factory.mktemp("kills") / "broker", **(QUICK | ROOM)) as opened:
        yield opened


def victim(broker: Broker, name: str, history: Path, mode: str, armed: str) -> Child:
    settings: dict[str, Any] = {"consume_thread_max": THREADS}
    if mode == "durable":
        settings |= {"ack": "durable", "attempts": "durable"}
    environment = {"SHMBROKER_FAILPOINTS": f"client/{armed}", "PYTHONPATH": str(Path(__file__).parent)}
    return Child(VICTIM, broker.directory, name, history, PATIENCE, settings, environment=environment)


def finish(broker: Broker, name: str, history: Path, count: int) -> None:
    """Another consumer does what is left, until nothing is."""
    listener = Scripted(history)
    with broker.push_consumer(name, listener, {name: "*"}, consume_thread_max=THREADS) as consumer:
        listener.belongs_to(consumer)
        wait_until(lambda: all_done(broker, name, name, count), "everything acknowledged, or moved and then the same")
    listener.close()


@pytest.mark.parametrize(("edge", "at", "mode"), CASES)
def test_a_kill_repeats_and_charges_what_ran_and_nothing_else(
    edge: str, at: int, mode: str, broker: Broker, tmp_path: Path
) -> None:
    name = f"{edge}-{at}-{mode}".replace(".", "-")
    history, bodies = tmp_path / "history", script(COUNT)
    broker.create_topic(name, queues=1)
    broker.create_group(name, at_once(MAX_RETRIES))
    if not edge.startswith("wait."):
        send_to(broker, name, *bodies)
    with victim(broker, name, history, mode, f"{edge}=kill@{at}") as child:
        if edge == "wait.woken":
            wait_until(lambda: asleep(broker), "the victim asleep")
            send_to(broker, name, *bodies)
        assert child.wait() == -signal.SIGKILL
    if edge == "wait.flagged":
        send_to(broker, name, *bodies)
    finish(broker, name, history, len(bodies))
    letters = dead_letters(broker, name)
    assert len(letters) == len({record.body for record in letters})
    dead = {record.body.decode(): record.attempts for record in letters}
    unseen = judge(History.read([history]), bodies, dead, charged=THREADS, killed=child.pid)
    # Charged just before the listener was called; behind that, with durable attempts, each thread waits for the disk.
    assert unseen <= (1 if mode == "memory" else THREADS)
    with broker.simple_consumer(name, {name: "*"}) as consumer:
        assert consumer.receive(32) == []
    broker.delete_group(name)
    for topic in (name, f"%DLQ%{name}"):
        broker.delete_topic(topic)
