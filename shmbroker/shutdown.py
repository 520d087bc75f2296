"""The end of a broker's memory, as its supervisor leads it; every function here needs the directory's lock.

    drain    a clean stop: DRAINING ─▶ dispatcher, flusher, janitor finish ─▶ what they left undone ─▶ STOPPED ─▶ gone
    desert   the directory is no longer where it was: nobody finishes anything

A worker that dies while it finishes is followed by another. Where none can (no processes, memory that no newcomer
finds any more because somebody has unlinked it), the supervisor writes the rest of the log itself, out of its own
mapping. So memory is kept for the next start only if the disk does not take what is in it.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from shmbroker import memory, process
from shmbroker._native._core import Region
from shmbroker.delivery.snapshot import append_progress
from shmbroker.errors import NotReady, ShmBrokerError
from shmbroker.failpoint import failpoint
from shmbroker.fleet import WORKERS, Fleet
from shmbroker.lifecycle import write_log
from shmbroker.memory import MIB, Held
from shmbroker.naming import BrokerPaths

DRAIN_TIMEOUT: Final = 30.0  # seconds for each worker to finish
ATTEMPTS: Final = 3  # of workers, one after the other
ROLE_LOCK_TIMEOUT: Final = 5.0
STORE_READ_ONLY: Final = 2  # enum sb_store_state

log = logging.getLogger("shmbroker.supervisor")


def drain(held: Held, paths: BrokerPaths, fleet: Fleet) -> bool:
    """Stop cleanly: everything on the disk, checkpoint clean, memory gone. False: not possible, the memory is kept.

    A sender that was let in before DRAINING holds, or waits for, the append lock; the dispatcher's records take the
    same lock after it, and the last look at ``tail`` comes after those. So nothing is published unflushed.
    """
    region = held.region
    region.set("state", memory.STATE_DRAINING)
    failpoint("supervisor.draining")  # leaves memory that the next supervisor takes over
    _finish(region, fleet, "scheduler")  # from DRAINING on nothing fires
    finished = _finish(region, fleet, "dispatcher")  # progress, snapshot, clean checkpoint: the flusher still works
    _finish(region, fleet, "flusher")  # flushes up to tail before it leaves
    _finish(region, fleet, "janitor")
    try:
        _complete(held, paths, progress=not finished)
    except (ShmBrokerError, OSError) as error:
        left = region.get("tail") - region.get("flushed")
        log.critical("no clean stop: %d bytes are only in memory, which is kept for the next start: %s", left, error)
        return False
    region.set("state", memory.STATE_STOPPED)
    failpoint("supervisor.drained")  # leaves memory that holds nothing: removed by the next supervisor
    memory.remove(paths, held.descriptor)
    held.close()
    return True


def desert(held: Held, paths: BrokerPaths, fleet: Fleet, *, removed: bool) -> None:
    """Leave a directory that is no longer where it was. A moved one keeps its memory, for whoever opens it there."""
    held.region.set("state", memory.STATE_STOPPED if removed else memory.STATE_DRAINING)
    for role in WORKERS:
        fleet.kill(role)
    if removed:
        memory.remove(paths, held.descriptor)
    held.close()


def stop_at_once(region: Region, fleet: Fleet) -> None:
    """End all workers where they stand: they must not make anew what somebody is just removing."""
    region.set("state", memory.STATE_DRAINING)
    for role in WORKERS:
        fleet.kill(role)


def put_back(held: Held, paths: BrokerPaths, fleet: Fleet) -> None:
    """Somebody has removed a part of the directory, and not more: make it anew, so that workers can finish."""
    try:
        paths.make()
        held.describe(paths, held.descriptor.settings)
        fleet.start(["flusher"])
    except OSError as error:  # then it is done without them
        log.warning("what was removed cannot be made anew: %s", error)


def _finish(region: Region, fleet: Fleet, role: str) -> bool:
    """Have a worker of that role finish and leave. False: several have tried.

    A process manager may run workers of its own: such a one is told to leave, and ours, which has waited for the role,
    finishes what it has left.
    """
    deadline = time.monotonic() + DRAIN_TIMEOUT
    for _ in range(ATTEMPTS):
        dismiss(region, role, fleet.pid(role), deadline - time.monotonic())
        if fleet.finish(role, max(0.0, deadline - time.monotonic())):
            return True
    log.error("no %s could finish: what is left to do is done here", role)
    return False


def dismiss(region: Region, role: str, own_pid: int, timeout: float) -> None:
    """Tell the worker of a role to leave, unless it is ``own_pid``, and wait for its end."""
    at_work = next((worker for worker in region.workers() if worker["role"] == role), None)
    if at_work is None or at_work["pid"] == own_pid:
        return
    pidfd = process.open_pidfd(at_work["pid"], at_work["start_ticks"])
    if pidfd is not None:
        with suppress(ProcessLookupError):  # it has left meanwhile
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        process.wait_ended(pidfd, max(0.0, timeout))
        os.close(pidfd)


def _complete(held: Held, paths: BrokerPaths, *, progress: bool) -> None:
    """Put into the log what the workers may have left in memory. Raises what hinders that: then it stays there.

    A crash here leaves what a crash of the flusher leaves: the same bytes are written again.
    """
    region = held.region
    if progress:
        region.topics(exact=True)  # takes the append lock: who was let in before DRAINING has published by then
        append_progress(region)
    if region.get("tail") == region.get("flushed"):
        return
    if region.get("store_state") == STORE_READ_ONLY:
        raise NotReady("the store is read-only")  # what the disk holds is unknown: only a new start tries again (R7)
    role = process.FileLock(paths.role_lock("flusher"))
    try:
        if not role.acquire(ROLE_LOCK_TIMEOUT):
            raise NotReady("the flusher does not leave")
        end = region.get("tail")
        written = write_log(paths, bytes.fromhex(held.descriptor.store), region.segment_bytes, _rest(region, end))
        region.publish_flushed(end)
        log.warning("wrote the last %d bytes of the log in the flusher's place", written)
    finally:
        role.close()


def _rest(region: Region, end: int) -> Iterator[tuple[int, memoryview]]:
    """What the ring holds up to ``end`` and the disk does not."""
    view, position = region.ring_view(), region.get("flushed")
    while position < end:
        start = position & (region.ring_bytes - 1)
        size = min(MIB, end - position)
        yield position, view[start : start + size]
        position += size
