"""The life of a broker's memory, as its supervisor leads it, up to its end (shutdown.py).

Every function here needs the directory's lock.

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
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from shmbroker import memory, process, remains
from shmbroker._native._core import Region
from shmbroker.config import LAYOUT_RULES, Config
from shmbroker.delivery.restore import Restoration
from shmbroker.descriptor import Descriptor
from shmbroker.errors import ConfigError, NotReady
from shmbroker.failpoint import failpoint
from shmbroker.fleet import WORKERS
from shmbroker.memory import Held, Leftover
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
EPOCH_TIMEOUT_NS: Final = 10_000_000_000
ORPHAN_TIMEOUT: Final = 10.0
SEAL_TIMEOUT: Final = 10.0


@dataclass(frozen=True, slots=True)
class Opened:
    """Memory to serve from. ``epoch`` is to be begun by ``begin_epoch`` if the memory is new; else None."""

    held: Held
    config: Config
    epoch: EpochBody | None


def open_memory(paths: BrokerPaths, config: Config) -> Opened:
    """Memory to serve from: what a killed broker left, or new memory behind a recovered log (then state STARTING).

    What a killed broker left keeps its layout, whatever the settings say now.
    """
    for role in WORKERS:  # who removes the directory later on is not to meet new files of workers that just start
        process.FileLock(paths.role_lock(role)).close()
    found, descriptor = memory.leftover(paths)
    if found is Leftover.USABLE:
        taken = _take_over(paths, config)
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


def _take_over(paths: BrokerPaths, config: Config) -> Opened | None:
    """Go on with the memory of a killed broker; None if it holds nothing that the log does not have."""
    held = memory.take_over(paths)
    if held is None:
        return None
    region = held.region
    unflushed = region.get("tail") - region.get("flushed")  # then it is kept, whatever its state says
    if region.get("state") not in (memory.STATE_RUNNING, memory.STATE_DRAINING) and not unflushed:
        held.close()
        return None
    kept = {key: value for key, value in held.descriptor.settings.items() if key in LAYOUT_RULES}
    config = config.replace(**kept)
    held.describe(paths, config.as_dict())
    region.janitor_pass(time.monotonic_ns())  # a lock whose owner died is repaired before anybody waits for it
    region.publish_store_state(0, 0)  # opened anew: a store that had failed is tried again, from the ring (R7)
    log.info("took over the memory of a killed broker: %d bytes to flush", unflushed)
    return Opened(held, config, None)


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
    dispatched = restoration.finish(recovered.end)
    log.info(
        "recovered the log: %s, positions %d to %d, %d records read from %d on, %d bytes cut, %.3f s",
        recovered.reason, recovered.first, recovered.end, recovered.records, recovered.replayed_from,
        recovered.cut_bytes, time.monotonic() - started,
    )  # fmt: skip
    last = max([recovered.epoch, *(epoch.epoch for epoch in recovered.epochs)])
    epoch = EpochBody(last + 1, recovered.end, last, recovered.reason)
    # From here on the stop before was not clean any more; consume queues hold what restoration has just synced.
    epochs = (*recovered.epochs, Epoch(epoch.epoch, epoch.start, epoch.previous))
    ends = recovered.end, dispatched, recovered.snapshot, recovered.first
    checkpoints.write(Checkpoint(store, *ends, epochs))
    checkpoints.close()
    remains.clear()
    held = memory.create(paths, config, store=store, tail=recovered.end, epoch=epoch.epoch)
    try:
        region = held.region
        region.set("kept", recovered.first)
        region.set("dispatched", dispatched)  # less than all if the disk is full: the dispatcher goes on from there
        region.set("indexed", recovered.first)  # until the dispatcher knows better
        region.set("snapshot", recovered.snapshot or 0)
        reader = LogReader(paths.log, config.layout.segment_bytes, store)
        restoration.apply(region, reader, recovered.first)
        reader.close()
    except BaseException:
        abandon(paths, held)
        raise
    queues.close()
    failpoint("supervisor.restored")  # leaves memory in state STARTING: removed by the next supervisor
    return Opened(held, config, epoch)


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
    if checkpoint is not None:
        return checkpoint.store, config
    # What is derived from a log that is no more: somebody has removed most of it all.
    for path in (paths.queues, paths.index, paths.timers):
        for leftover in path.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return os.urandom(16), config


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
    saved = write_log(
        paths,
        bytes.fromhex(descriptor.store),
        int(descriptor.settings["segment_bytes"]),
        memory.unflushed(paths, descriptor),
    )
    log.warning("saved %d bytes from the memory of another version or namespace", saved)


def write_log(
    paths: BrokerPaths, store: bytes, segment_bytes: int, pieces: Iterable[tuple[int, bytes | memoryview]]
) -> int:
    """Write pieces of a ring to the log, in place of a flusher that cannot. Returns how many bytes are durable now."""
    pool: SegmentPool | None = None
    writer: CommitLog | None = None
    written = 0
    try:
        for position, data in pieces:
            if writer is None:
                pool = SegmentPool(paths.log, segment_bytes, store, 0, position)
                writer = CommitLog(pool, segment_bytes)
            writer.write(memoryview(data), position)
            written += len(data)
        if writer is not None:
            writer.sync()
    finally:
        if writer is not None and pool is not None:
            writer.close()
            pool.stop()
    return written


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


def abandon(paths: BrokerPaths, held: Held) -> None:
    """A start has failed: nobody has appended to memory in state STARTING, so it goes; any other is kept."""
    if held.region.get("state") == memory.STATE_STARTING:
        memory.remove(paths, held.descriptor)
    held.close()
