"""The scheduler: delayed messages fire when they are due. ``python -m shmbroker.workers.scheduler DIRECTORY``

It sleeps until the next one is due, and is posted by the append of an earlier one. The wall clock may be set
meanwhile, and says nothing to who sleeps: so no sleep is longer than LOOK_SECONDS.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Final

import lmdb

from shmbroker.delivery.firing import Firing
from shmbroker.errors import BrokerClosed, Retryable, ShmBrokerError, StoreFull, StoreReadOnly
from shmbroker.store.files import NO_SPACE
from shmbroker.store.lmdb_index import DAMAGED
from shmbroker.store.serving_reader import ServingReader
from shmbroker.store.timer_index import TimerIndex
from shmbroker.store.timers import Timers
from shmbroker.workers import common

LOOK_SECONDS: Final = 0.25
GATHER_SECONDS: Final = 0.002  # while timers are sent without pause, each look takes what so long has brought
RETRY_SECONDS: Final = 0.5
QUIET_NS: Final = 50_000_000  # with nothing due for so long there is time for the index


def serve(worker: common.Worker) -> None:
    """Fire until told to leave."""
    log = ServingReader(worker.paths.log, worker.region.segment_bytes, worker.store)
    index = open_index(worker)
    if index is None:
        return
    try:
        firing = Firing(worker.region, Timers(index, worker.region.get("kept")), log)
        complaint = ""
        while not worker.stopping:
            worker.region.worker_beat(worker.role)
            try:
                step(worker, firing)
                complaint = ""
            except DAMAGED as damage:
                worker.log.error("the timer index is damaged, it is built anew from the log: %s", damage)  # noqa: TRY400
                index.reset()
                firing = Firing(worker.region, Timers(index, worker.region.get("kept")), log)
            except (Retryable, StoreFull, StoreReadOnly, BrokerClosed, lmdb.Error) as error:
                if complaint != str(error):
                    worker.log.warning("delayed messages wait, trying again: %s", error)
                    complaint = str(error)
                worker.sleep(common.SLEEP_TICK, 0, RETRY_SECONDS)
        if not worker.orphaned:
            finish(worker, firing)
    finally:
        index.close()
        log.close()


def open_index(worker: common.Worker) -> TimerIndex | None:
    """The timer index; None if the disk had no room for one until we were told to leave."""
    while not worker.stopping:
        try:
            index = TimerIndex(worker.paths.timers, worker.store, writable=True)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            worker.log.warning("there is no room for the timer index, trying again: %s", error)
            worker.sleep(common.SLEEP_TICK, 0, RETRY_SECONDS)
            continue
        if index.position > worker.region.get("flushed"):
            worker.log.warning("the timer index is ahead of the log: it is built anew")
            index.reset()
        return index
    return None


def step(worker: common.Worker, firing: Firing) -> None:
    """Read on, fire what is due, sleep until the next is."""
    firing.read_on()
    fired = firing.fire(time.time_ns())
    now, due = time.time_ns(), firing.next_due()
    quiet = due is None or due > now + QUIET_NS
    if firing.commit_if_due(quiet=quiet) or (quiet and firing.carry_on()):
        return
    if due is not None and due <= now:
        if not fired:
            firing.wait_durable()
        return
    now = time.time_ns()
    pause = LOOK_SECONDS if due is None else min(LOOK_SECONDS, max(0.0, (due - now) / 1e9))
    # First this, then the sleep: whoever appends too early to see it is seen there.
    worker.region.set("timer_look", now + int(pause * 1e9))
    before = time.monotonic()
    worker.sleep(common.SLEEP_TIMER, firing.position, pause)
    if time.monotonic() - before < GATHER_SECONDS < pause and not worker.stopping:
        time.sleep(GATHER_SECONDS)


def finish(worker: common.Worker, firing: Firing) -> None:
    """Spare the next scheduler some reading."""
    try:
        firing.read_on()
        firing.finish()
    except (lmdb.Error, OSError, ShmBrokerError) as error:
        worker.log.warning("the timer index stays behind: %s", error)


def main(argv: Sequence[str] | None = None) -> int:
    """Work as the scheduler of a directory; returns an exit code of ``workers/common.py``."""
    return common.run("scheduler", serve, argv)


if __name__ == "__main__":
    sys.exit(main())
