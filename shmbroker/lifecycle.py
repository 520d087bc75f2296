"""The life of a broker's memory, as its supervisor leads it; every function here needs the directory's lock.

    nothing ──open_memory──▶ STARTING ──▶ RUNNING ──▶ DRAINING ──drain──▶ STOPPED ──▶ nothing
                                            ▲  │          │
                  kill -9 of everything ────┴──┴──────────┘   the memory is still there: attach and go on (design 7)

What each crash leaves, and what the next ``open_memory`` does about it:

    descriptor, objects missing or unformatted   remove, recover from the log
    STARTING     nobody but us has appended      remove, recover from the log; if all is not flushed, go on with it
    RUNNING      appended, perhaps not flushed   go on with it: the flusher writes what its predecessor had not synced
    DRAINING     the same, senders refused       the same
    STOPPED      everything flushed              remove, recover from the log; if not, go on with it
    memory of another build, or of a container's former namespaces: its unflushed bytes go to the log, then as above
"""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from shmbroker import memory, process
from shmbroker._native._core import Region
from shmbroker.config import LAYOUT_RULES, Config
from shmbroker.delivery.restore import Restoration
from shmbroker.descriptor import Descriptor, read_descriptor, write_descriptor
from shmbroker.errors import ConfigError, NotReady, ShmBrokerError
from shmbroker.failpoint import failpoint
from shmbroker.fleet import Fleet
from shmbroker.memory import Leftover
from shmbroker.naming import BrokerPaths, segment_name
from shmbroker.record import EpochBody, RecordKind
from shmbroker.store import recovery
from shmbroker.store.checkpoint import Checkpoint, CheckpointFile, Epoch
from shmbroker.store.commit_log import CommitLog, LogReader
from shmbroker.store.consume_queue import ConsumeQueues
from shmbroker.store.log_end import LogPlace
from shmbroker.store.segment import SEGMENT_HEADER_BYTES, SegmentHeader, list_segments
from shmbroker.store.segment_pool import SegmentPool

log = logging.getLogger("shmbroker.supervisor")

VISIBLE: Final = {"append": 0, "flush": 1}  # enum sb_visible
WORKERS: Final = ("flusher", "dispatcher", "janitor")  # in the order in which they are needed
EPOCH_TIMEOUT_NS: Final = 10_000_000_000
ORPHAN_TIMEOUT: Final = 10.0
SEAL_TIMEOUT: Final = 10.0
DRAIN_TIMEOUT: Final = 30.0  # seconds for each worker to finish; then what is not on the disk stays in memory


@dataclass(frozen=True, slots=True)
class Opened:
    """Memory to serve from. ``epoch`` is to be begun by ``begin_epoch`` if the memory is new; else None."""

    region: Region
    config: Config
    epoch: EpochBody | None


def open_memory(paths: BrokerPaths, config: Config) -> Opened:
    """Memory to serve from: what a killed broker left, or new memory behind a recovered log (then state STARTING).

    What a killed broker left keeps its layout, whatever the settings say now.
    """
    found, descriptor = memory.leftover(paths)
    if found is Leftover.USABLE and descriptor is not None:
        taken = _take_over(paths, descriptor, config)
        if taken is not None:
            return taken
    _wait_for_orphans(paths)
    if found is Leftover.FOREIGN and descriptor is not None:
        _save_foreign(paths, descriptor)
    if descriptor is not None:
        memory.remove(paths, descriptor)
    return _recover(paths, config)


def _wait_for_orphans(paths: BrokerPaths) -> None:
    """Wait until the workers of a killed supervisor have flushed and left: nobody else may write yet. Or NotReady."""
    for role in WORKERS:
        lock = process.FileLock(paths.role_lock(role))
        free = lock.acquire(ORPHAN_TIMEOUT)
        lock.close()
        if not free:
            raise NotReady(f"the {role} of a killed supervisor of {paths.directory} does not leave: kill it")


def _take_over(paths: BrokerPaths, descriptor: Descriptor, config: Config) -> Opened | None:
    """Go on with the memory of a killed broker; None if it holds nothing that the log does not have."""
    attached = memory.attach(paths)
    if attached is None:
        return None
    region, _ = attached
    unflushed = region.get("tail") != region.get("flushed")  # then it is kept, whatever its state says
    if region.get("state") not in (memory.STATE_RUNNING, memory.STATE_DRAINING) and not unflushed:
        region.close()
        return None
    kept = {key: value for key, value in descriptor.settings.items() if key in LAYOUT_RULES}
    config = config.replace(**kept)
    write_descriptor(paths, descriptor.with_settings(config.as_dict()))
    region.janitor_pass(time.monotonic_ns())  # a lock whose owner died is repaired before anybody waits for it
    region.publish_store_state(0, 0)  # opened anew: a store that had failed is tried again, from the ring (R7)
    log.info("took over the memory of a killed broker: %d bytes to flush", region.get("tail") - region.get("flushed"))
    return Opened(region, config, None)


def _recover(paths: BrokerPaths, config: Config) -> Opened:
    """New memory behind the log as it is on the disk. Raises CorruptLog, and then has changed nothing."""
    checkpoints = CheckpointFile(paths.checkpoint)
    store, config = _identify(paths, config, checkpoints)
    place = LogPlace(paths.log, config.layout.segment_bytes, config.layout.ring_bytes, store)
    checkpoint = recovery.usable(checkpoints.read(), place)
    queues = ConsumeQueues(paths.queues, store, writable=True)
    restoration = Restoration(queues, checkpoint.dispatched if checkpoint is not None else 0)
    started = time.monotonic()
    recovered = recovery.recover(place, checkpoints, restoration.replay, restoration.dispatch)
    restoration.finish(recovered.end)
    log.info(
        "recovered the log: %s, positions %d to %d, %d records read from %d on, %d bytes cut, %.3f s",
        recovered.reason, recovered.first, recovered.end, recovered.records, recovered.replayed_from,
        recovered.cut_bytes, time.monotonic() - started,
    )  # fmt: skip
    last = max([recovered.epoch, *(epoch.epoch for epoch in recovered.epochs)])
    epoch = EpochBody(last + 1, recovered.end, last, recovered.reason)
    # From here on the stop before was not clean any more; consume queues hold what restoration has just synced.
    epochs = (*recovered.epochs, Epoch(epoch.epoch, epoch.start, epoch.previous))
    ends = recovered.end, recovered.end, recovered.snapshot, recovered.first
    checkpoints.write(Checkpoint(store, *ends, epochs))
    checkpoints.close()
    region = memory.create(paths, config, store=store, tail=recovered.end, epoch=epoch.epoch)
    region.set("kept", recovered.first)
    region.set("indexed", recovered.first)  # until the dispatcher knows better
    region.set("snapshot", recovered.snapshot or 0)
    reader = LogReader(paths.log, config.layout.segment_bytes, store)
    restoration.apply(region, reader, recovered.first)
    reader.close()
    queues.close()
    failpoint("supervisor.restored")  # leaves memory in state STARTING: removed by the next supervisor
    return Opened(region, config, epoch)


def _identify(paths: BrokerPaths, config: Config, checkpoints: CheckpointFile) -> tuple[bytes, Config]:
    """The log's identity, and the settings with the segment size that the directory was made with."""
    bases = list_segments(paths.log)
    if bases:
        path = paths.log / segment_name(bases[0])
        with path.open("rb") as stream:
            header = SegmentHeader.parse(stream.read(SEGMENT_HEADER_BYTES), path)
        if config.layout.segment_bytes != header.segment_bytes:
            if "segment_bytes" in config.chosen:
                raise ConfigError(
                    f"segment_bytes = {config.layout.segment_bytes}: {paths.directory} was made with "
                    f"{header.segment_bytes}, which is fixed for its life"
                )
            config = config.replace(segment_bytes=header.segment_bytes)
        return header.store, config
    checkpoint = checkpoints.read()
    return (checkpoint.store if checkpoint is not None else os.urandom(16)), config


def begin_epoch(region: Region, epoch: EpochBody) -> None:
    """The first record behind a recovery says so (R2). The flusher must be at work: it makes room on the disk."""
    region.append_system(RecordKind.EPOCH, [epoch.encode()], timeout_ns=EPOCH_TIMEOUT_NS)
    failpoint("supervisor.epoch_written")  # leaves memory in state STARTING: removed by the next supervisor


def _save_foreign(paths: BrokerPaths, descriptor: Descriptor) -> None:
    """Write to the log what memory that we cannot work with holds and the disk does not.

    Sealed first: what a client was told is stored there is in it before we look where it ends.
    """
    memory.seal(paths, descriptor, SEAL_TIMEOUT)
    failpoint("supervisor.sealed")  # leaves foreign memory that nobody appends to: saved by the next supervisor
    store, segment_bytes = bytes.fromhex(descriptor.store), int(descriptor.settings["segment_bytes"])
    pool: SegmentPool | None = None
    writer: CommitLog | None = None
    saved = 0
    for position, data in memory.unflushed(paths, descriptor):
        if writer is None:
            pool = SegmentPool(paths.log, segment_bytes, store, 0, position)
            writer = CommitLog(pool, segment_bytes)
        writer.write(memoryview(data), position)
        saved += len(data)
    if writer is not None and pool is not None:
        writer.sync()
        writer.close()
        pool.stop()
    log.warning("saved %d bytes from the memory of another version or namespace", saved)


def announce(region: Region, config: Config, *, embedded: bool) -> None:
    """This process is the supervisor of that memory from now on, with these settings."""
    me = process.own_identity()
    region.set("sync_flush", int(config.sync_flush))
    region.set("visible_after", VISIBLE[config.visible_after])
    region.set("embedded", int(embedded))
    region.set("supervisor_start_ticks", me.start_ticks)
    region.set("supervisor_pid", me.pid)


def run(region: Region) -> None:
    """Senders may send."""
    region.set("state", memory.STATE_RUNNING)
    failpoint("supervisor.running")


def drain(region: Region, paths: BrokerPaths, fleet: Fleet) -> bool:
    """Stop cleanly: everything on the disk, checkpoint clean, memory gone. False: not possible, the memory is kept.

    A sender that was let in before DRAINING holds, or waits for, the append lock; the dispatcher's records take the
    same lock after it, and the flusher's last look at ``tail`` comes after those. So nothing is published unflushed.
    """
    region.set("state", memory.STATE_DRAINING)
    failpoint("supervisor.draining")  # leaves memory that the next supervisor takes over
    done = _finish(region, fleet, "dispatcher")  # progress, snapshot, clean checkpoint: the flusher still works
    done = _finish(region, fleet, "flusher") and done  # flushes up to tail before it leaves
    _finish(region, fleet, "janitor")
    left = region.get("tail") - region.get("flushed")
    if not done or left:
        log.error("no clean stop: %d bytes are only in memory, which is kept for the next start", left)
        return False
    region.set("state", memory.STATE_STOPPED)
    failpoint("supervisor.drained")  # leaves memory that holds nothing: removed by the next supervisor
    if (descriptor := read_descriptor(paths)) is not None:
        memory.remove(paths, descriptor)
    region.close()
    return True


def desert(region: Region, descriptor: Descriptor, fleet: Fleet, *, removed: bool) -> None:
    """Leave a directory that is no longer where it was. A moved one keeps its memory, for whoever opens it there."""
    region.set("state", memory.STATE_STOPPED if removed else memory.STATE_DRAINING)
    for role in WORKERS:
        fleet.kill(role)
    if removed:
        memory.remove_objects(descriptor)
    region.close()


def _finish(region: Region, fleet: Fleet, role: str) -> bool:
    """Let the worker of a role finish and leave, whoever started it: a process manager may run workers of its own."""
    at_work = next((worker for worker in region.workers() if worker["role"] == role), None)
    if at_work is None or at_work["pid"] == fleet.pid(role):
        return fleet.stop(role, DRAIN_TIMEOUT)
    pidfd = process.open_pidfd(at_work["pid"], at_work["start_ticks"])
    if pidfd is None:
        return fleet.stop(role, DRAIN_TIMEOUT)
    fleet.kill(role)  # ours, if there is one, only waits for the role
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    left = process.wait_ended(pidfd, DRAIN_TIMEOUT)
    os.close(pidfd)
    return left


def abandon(paths: BrokerPaths) -> None:
    """A start has failed: nobody has appended to memory in state STARTING, so it goes; any other is kept."""
    with suppress(ShmBrokerError):  # what hindered the start may hinder this too; then the next supervisor does it
        found = memory.attach(paths)
        if found is not None and found[0].get("state") == memory.STATE_STARTING:
            memory.remove(paths, found[1])


def live_clients(region: Region) -> int:
    """Processes attached, or just attaching, and alive: stopped ones, but no dead ones that the janitor has to meet."""
    return sum(
        process.is_alive(process.Identity(client["pid"], client["start_ticks"]))
        if client["live"]
        else process.exists(client["pid"])
        for client in region.clients()
    )
