"""The scheduler or the dispatcher killed at every edge while a push consumer works, and power cuts at its moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import psutil
import pytest
from support.consuming import send_to
from support.failing import GROUP, dead_letters
from support.listening import all_done
from support.processes import Child
from support.running import QUICK, lose_memory, running, wait_restarted
from support.scripted import KINDS, MAX_RETRIES, History, Scripted, judge, kind_of, script
from support.waiting import wait_until

from shmbroker import RetryPolicy
from shmbroker.broker import Broker

pytestmark = pytest.mark.crash

COUNT: Final = 60
BODIES: Final = script(COUNT)
APPEND: Final = (
    "locked", "undo_written", "armed", "write_limit", "half_copied", "copied", "effects", "published", "final",
    "disarmed", "unlocked",
)  # fmt: skip
FIRING: Final = [*(f"scheduler.{edge}" for edge in ("before_fire", "after_fire", "before_commit", "after_commit")),
                 *(f"append.{edge}" for edge in APPEND)]  # fmt: skip
RECORDING: Final = [
    "dispatcher.progress_written", "dispatcher.snapshot_begun", "dispatcher.snapshot_ended", "checkpoint.half_written",
    "checkpoint.synced", "append.half_copied", "append.effects", "append.published", "append.unlocked",
]  # fmt: skip
DURABLE: Final = [
    "append.copied", "append.published", "append.unlocked", "claim.started", "claim.acked", "move.appended",
    "retry.moved", "consumer.claimed", "consumer.attempts_appended", "consumer.attempts_flushed",
    "consumer.acks_appended",
]  # fmt: skip
SNAPSHOTS: Final[dict[str, Any]] = {**QUICK, "snapshot_interval_bytes": "64 KiB", "flush_disk_type": "SYNC_FLUSH"}

# Sends the script and consumes it, all by itself; then tells, once its progress is as durable as it gets, and waits.
ALONE: Final = """
    import os, sys, shmbroker
    from pathlib import Path
    from support.consuming import send_to
    from support.failing import GROUP, at_once
    from support.listening import all_done
    from support.scripted import MAX_RETRIES, Scripted, script
    from support.waiting import wait_until
    directory, history, count, recorded, settings, modes = sys.argv[1:]
    broker, bodies = shmbroker.open(directory, **eval(settings)), script(int(count))
    broker.create_topic("orders", queues=1)
    broker.create_group(GROUP, at_once(MAX_RETRIES))
    send_to(broker, "orders", *bodies)
    listener = Scripted(Path(history))
    settings = {"consume_thread_max": 3, "pull_batch_size": 4, **eval(modes)}
    consumer = broker.push_consumer(GROUP, listener, {"orders": "*"}, **settings)
    listener.belongs_to(consumer)
    wait_until(lambda: all_done(broker, GROUP, "orders", len(bodies)), "all done with")
    if eval(recorded):
        wait_until(lambda: not broker.region.progress_records(True), "progress recorded")
    tail = broker.region.get("tail")
    wait_until(lambda: broker.region.get("flushed") >= tail, "all on the disk")
    print("done")
    sys.stdin.read()
"""


def consume(broker: Broker, history: Path, *, answers: int = 0) -> None:
    """A push consumer of this process does what there is to do, also what comes only later: so many answers."""
    listener = Scripted(history)
    with broker.push_consumer(GROUP, listener, {"orders": "*"}, consume_thread_max=3) as consumer:
        listener.belongs_to(consumer)
        wait_until(lambda: history.read_text().count("answered") >= answers, f"{answers} answers")
        wait_until(lambda: all_done(broker, GROUP, "orders", len(BODIES)), "all done with")
    listener.close()


def letters_of(broker: Broker) -> dict[str, int]:
    """Body to deliveries; each is there once."""
    letters = dead_letters(broker)
    found = {record.body.decode(): record.attempts for record in letters}
    assert len(found) == len(letters)
    return found


@pytest.mark.parametrize("edge", FIRING)
def test_a_scheduler_killed_as_retries_fire_brings_each_of_them_once(tmp_path: Path, edge: str) -> None:
    with running(tmp_path / "broker", failpoints=f"scheduler/{edge}=kill@2") as broker:
        broker.create_topic("orders", queues=1)
        broker.create_group(GROUP, RetryPolicy("table", MAX_RETRIES, delays=(0.05, 0.3)))
        send_to(broker, "orders", *BODIES)
        consume(broker, tmp_path / "history", answers=sum(KINDS[kind_of(body.decode())][0] for body in BODIES))
        wait_restarted(broker, "scheduler")
        assert judge(History.read([tmp_path / "history"]), BODIES, letters_of(broker), charged=0) == 0


def alone(directory: Path, history: Path, failpoints: str, *, recorded: bool = False, durable: bool = False) -> Child:
    environment = {"SHMBROKER_FAILPOINTS": failpoints, "PYTHONPATH": str(Path(__file__).parent)}
    modes = {"ack": "durable", "attempts": "durable"} if durable else {}
    return Child(ALONE, directory, history, COUNT, recorded, SNAPSHOTS, modes, environment=environment)


@pytest.mark.parametrize("edge", RECORDING)
def test_a_dispatcher_killed_as_it_records_progress_has_recorded_it_in_the_end(tmp_path: Path, edge: str) -> None:
    """Without the memory nothing comes again that was answered, and nothing is a dead letter twice."""
    directory, history = tmp_path / "broker", tmp_path / "history"
    with alone(directory, history, f"dispatcher/{edge}=kill@2", recorded=True) as child:
        assert child.read_line() == "done"
        lose_memory(directory)
    with running(directory, **SNAPSHOTS) as broker:
        consume(broker, history)
        assert judge(History.read([history]), BODIES, letters_of(broker), charged=0) == 0


@pytest.mark.parametrize("edge", RECORDING)
def test_a_power_cut_while_progress_is_recorded_repeats_plain_messages_and_never_a_move(
    tmp_path: Path, edge: str
) -> None:
    """The dispatcher stands still at the edge, so that what is acknowledged from then on is not recorded."""
    directory, history = tmp_path / "broker", tmp_path / "history"
    with alone(directory, history, f"dispatcher/{edge}=stop@2") as child:
        assert child.read_line() == "done"
        lose_memory(directory)
    with running(directory, **SNAPSHOTS) as broker:
        consume(broker, history)
        letters = letters_of(broker)
    begun = History.read([history]).begun
    for body in map(bytes.decode, BODIES):
        deliveries, ends_dead = KINDS[kind_of(body)]
        once = list(range(1, deliveries + 1))
        # Attempts in memory may be forgotten as well, those of a copy were written with it.
        assert begun[body] in ([once] if ends_dead else [once, [*once, deliveries], [*once, deliveries + 1]]), body
        assert letters.get(body, 0) == ends_dead * deliveries, body


@pytest.mark.parametrize("edge", DURABLE)
def test_a_power_cut_at_an_edge_of_a_durable_consumer_forgets_no_delivery_and_doubles_no_move(
    tmp_path: Path, edge: str
) -> None:
    """All of them stand still at the edge; then only the disk is left. What was answered may come once more."""
    directory, history = tmp_path / "broker", tmp_path / "history"
    with alone(directory, history, f"client/{edge}=stop@9", durable=True) as child:
        wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED, "at the edge")
        lose_memory(directory)
    with running(directory, **SNAPSHOTS) as broker:
        consume(broker, history)
        judge(History.read([history]), BODIES, letters_of(broker), charged=len(BODIES))
