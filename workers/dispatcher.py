"""The dispatcher: consume queues and key index from the log; progress records, snapshots, checkpoints, retention.

Two threads: this one dispatches and must keep up with the producers; the other does what may take its time, fsync above
all (delivery/upkeep.py). Native scans and file calls drop the GIL.
"""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Sequence
from typing import Final

from shmbroker.delivery.dispatch import Dispatcher, Indexer, Source, scan_to_dispatch
from shmbroker.delivery.upkeep import Upkeep
from shmbroker.errors import CorruptLog
from shmbroker.store.checkpoint import Checkpoint, CheckpointFile
from shmbroker.store.consume_queue import ConsumeQueues
from shmbroker.store.files import NO_SPACE
from shmbroker.store.key_index import KeyIndex
from shmbroker.store.serving_reader import ServingReader
from shmbroker.workers import common

IDLE_SLEEP: Final = 0.5
NO_SPACE_PAUSE: Final = 0.1
GATHER_TICKS: Final = 2  # what nobody waits for is worth a pass only that rarely (R24: 10 ms)
OPEN_FILES_MIN: Final = 64  # of the consume queues, in each thread
OTHER_FILES: Final = 128
FLUSH_WAIT_NS: Final = 10_000_000_000
SWITCH_INTERVAL: Final = 0.0005  # the upkeep's Python must not keep the dispatching thread from the GIL for long


def serve(worker: common.Worker) -> None:
    sys.setswitchinterval(SWITCH_INTERVAL)
    region, paths = worker.region, worker.paths
    open_files = allow_open_files(worker.config.layout.max_queues)
    queues, own_queues = (
        ConsumeQueues(paths.queues, worker.store, writable=True, open_files_max=open_files) for _ in range(2)
    )
    readers = [ServingReader(paths.log, region.segment_bytes, worker.store) for _ in range(2)]
    indexer = Indexer(
        region, Source(region, readers[1], scan_to_dispatch), lambda: KeyIndex(paths.index, worker.store, writable=True)
    )
    checkpoints = CheckpointFile(paths.checkpoint)
    last = checkpoints.read() or Checkpoint(worker.store)
    dispatcher = Dispatcher(region, Source(region, readers[0], scan_to_dispatch), queues, indexer, last.dispatched)
    upkeep = Upkeep(region, worker.config.runtime, dispatcher, own_queues, indexer, checkpoints, last, paths.log)
    thread = _UpkeepThread(worker, upkeep)
    thread.start()
    try:
        while not worker.stopping:
            if upkeep.unlinked.is_set():
                upkeep.unlinked.clear()
                queues.close_unlinked()
            if not dispatch(worker, dispatcher):
                pause(worker, dispatcher)
    finally:
        thread.stop()
    if worker.draining and not worker.orphaned:
        upkeep.finish(lambda position: catch_up(worker, dispatcher, position))
    for reader in readers:
        reader.close()
    queues.close()
    own_queues.close()
    indexer.close()
    checkpoints.close()


def allow_open_files(queues: int) -> int:
    """Raise this process's limit so that a file of every queue can stay open, if that is allowed; how many may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = max(soft, min(hard, 2 * queues + OTHER_FILES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(OPEN_FILES_MIN, (soft - OTHER_FILES) // 2)


def dispatch(worker: common.Worker, dispatcher: Dispatcher) -> bool:
    """One pass. On a full disk it waits for room: retention makes some, consumers go on with what is in memory.

    So it does with a file of the consume queues that is damaged, and only a stop and `log rebuild` can mend.
    """
    try:
        done = dispatcher.step()
    except (OSError, CorruptLog) as error:
        if isinstance(error, OSError) and error.errno not in NO_SPACE:
            raise
        if not dispatcher.starved:
            worker.log.warning("consume queues cannot be written for now: %s", error)
        dispatcher.starved = True
        worker.sleep(common.SLEEP_TICK, 0, NO_SPACE_PAUSE)
        return False
    dispatcher.starved = False
    return done > 0


def pause(worker: common.Worker, dispatcher: Dispatcher) -> None:
    """After all is dispatched: idle until the next append, then some ticks, in which more gathers into one pass.

    Consumers read by the index in memory; who does wait for the consume queues ends the tick.
    """
    worker.region.worker_beat(worker.role)
    if worker.sleep(common.SLEEP_IDLE, dispatcher.position, IDLE_SLEEP):
        worker.sleep(common.SLEEP_TICK, 0, GATHER_TICKS * worker.config.runtime.worker_tick_ms / 1000)


def catch_up(worker: common.Worker, dispatcher: Dispatcher, position: int) -> bool:
    """Dispatch up to ``position``, which nobody appends behind any more, and wait until it is flushed."""
    while dispatcher.position < position and dispatch(worker, dispatcher):
        pass
    return dispatcher.position >= position and worker.region.wait_for("flushed", position, FLUSH_WAIT_NS)


class _UpkeepThread(threading.Thread):
    """Steps the upkeep. What it dies of, the dispatcher dies of."""

    def __init__(self, worker: common.Worker, upkeep: Upkeep) -> None:
        super().__init__(name="upkeep", daemon=True)
        self._worker = worker
        self._upkeep = upkeep
        self._leave = threading.Event()
        self._failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._leave.is_set():
                self._leave.wait(self._upkeep.step())
        except BaseException as error:
            self._failure = error
            self._worker.request_stop()

    def stop(self) -> None:
        """Wait for the present step; raise what ended the thread."""
        self._leave.set()
        self.join()
        if self._failure is not None:
            raise self._failure


def main(argv: Sequence[str] | None = None) -> int:
    return common.run("dispatcher", serve, argv)


if __name__ == "__main__":
    sys.exit(main())
