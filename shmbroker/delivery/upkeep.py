"""What the dispatcher process does beside dispatching, in a thread of its own, each duty at its own pace.

    key index            as records become durable; committed every progress_interval, or when much has come together
    progress records     every progress_interval, if something changed
    snapshot             every snapshot_interval_bytes of log
    checkpoint           every checkpoint_interval, and every 256 MiB of log
    retention            once a second; more often while the disk is full
    abandoned members    once a second: groups of nameless broadcasting members that nobody has come back to

What cannot be done for now (ring or disk full, store read-only, a damaged queue file) is tried again later. All of it
may be killed anywhere: a duty repeated does no harm, and what a restart reads back is bounded by the checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import lmdb

from shmbroker._native._core import Region
from shmbroker.config import RuntimeConfig
from shmbroker.delivery.dispatch import Dispatcher, Indexer
from shmbroker.delivery.retention import STORE_FULL, retain
from shmbroker.delivery.snapshot import Snapshot, append_progress
from shmbroker.errors import BrokerClosed, CorruptLog, GroupInUse, GroupNotExist, Retryable, StoreFull, StoreReadOnly
from shmbroker.failpoint import failpoint
from shmbroker.naming import RETRY_PREFIX, is_passing_member
from shmbroker.store.checkpoint import Checkpoint, CheckpointFile
from shmbroker.store.consume_queue import ConsumeQueues
from shmbroker.store.files import NO_SPACE

logger = logging.getLogger("shmbroker.dispatcher")

CHECKPOINT_BYTES: Final = 256 << 20  # a restart scans not much more than this
POLL: Final = 0.1  # seconds between two looks at what has no date
RETENTION_INTERVAL: Final = 1.0
RETRY_INTERVAL: Final = 1.0
MEMBER_GRACE: Final = 10.0  # seconds in which a member attaches again when its broker has come back


@dataclass(slots=True)
class _Duty:
    """``work`` returns the seconds until its next turn."""

    work: Callable[[], float]
    due: float
    complained: str = ""


class Upkeep:
    """One thread steps it. Of what it shares with the dispatcher's thread, each object says what it allows."""

    def __init__(
        self,
        region: Region,
        config: RuntimeConfig,
        dispatcher: Dispatcher,
        own_queues: ConsumeQueues,
        indexer: Indexer,
        checkpoints: CheckpointFile,
        last: Checkpoint,
        log: Path,
    ) -> None:
        """``own_queues`` is a second object over the files of the dispatcher's queues, for this thread.

        ``last`` is the newest checkpoint: store id and epochs go on from it. ``log`` is where the segments are.
        """
        self._region = region
        self._config = config
        self._dispatcher = dispatcher
        self._own_queues = own_queues
        self._indexer = indexer
        self._checkpoints = checkpoints
        self._last = last
        self._log = log
        # Set when consume queue files were removed; cleared by the dispatcher's thread.
        self.unlinked = threading.Event()
        self._last_checkpoint = time.monotonic()
        self._snapshot_behind = region.get("snapshot")  # its end, once it is ours
        self._snapshot_pending: tuple[int, int] | None = None  # (begin, end) of one that is not flushed yet
        now = self._last_checkpoint
        self._no_members_in = -1  # the generation of definitions in which there is no such member at all
        self._abandoned: dict[str, float] = {}  # since when nobody is in these groups
        self._duties = [
            _Duty(work, now)
            for work in (
                self._index,
                self._commit_index,
                self._write_progress,
                self._write_snapshot,
                self._write_checkpoint,
                self._retain,
                self._delete_abandoned,
            )
        ]

    def step(self) -> float:
        """Do what is due, a bounded amount of each. Returns the seconds until the next thing is."""
        for duty in self._duties:
            if time.monotonic() >= duty.due:
                duty.due = time.monotonic() + self._attempt(duty)
        return max(0.0, min(duty.due for duty in self._duties) - time.monotonic())

    def finish(self, wait: Callable[[int], bool]) -> None:
        """The broker stops cleanly, nobody else appends any more: leave a log that needs no replay to speak of.

        ``wait(position)`` returns True once everything before that position is flushed and dispatched. Raises what the
        append or the disk raises: the next start then replays from the last good checkpoint.
        """
        append_progress(self._region)
        snapshot = Snapshot(self._region, self._last.epochs)
        end = snapshot.complete()
        if wait(end):
            self._region.set("snapshot", snapshot.begin)
            try:
                while self._indexer.step():
                    pass
                self._indexer.commit()
            except (lmdb.Error, OSError) as error:  # no room: it goes on at the next start, from where it is
                logger.warning("the key index stays behind: %s", error)
            self.checkpoint(clean=self._region.get("tail") == end)

    def checkpoint(self, *, clean: bool = False) -> None:
        """Note how far everything is, of consume queues only what this process has written, and so can sync.

        The order, and what a crash at each edge leaves:

        watermarks loaded ── nothing
        queues synced     ── more on the disk than any checkpoint says: recovery writes it again
        checkpoint synced ── recovery begins at these watermarks
        """
        flushed = self._region.get("flushed")
        dispatched = min(flushed, self._dispatcher.position)  # before the sync, which then covers all files up to it
        snapshot = self._region.get("snapshot")
        kept = self._region.get("kept")
        self._dispatcher.queues.sync()
        self._own_queues.sync()
        if not 0 < snapshot <= dispatched:
            # Replay starts at the snapshot, and has to meet everything that is not dispatched.
            snapshot = -1 if self._last.snapshot is None else self._last.snapshot
        known = None if snapshot < 0 else snapshot
        made = Checkpoint(self._last.store, flushed, dispatched, known, kept, self._last.epochs, clean)
        self._checkpoints.write(made)
        self._last = made
        self._last_checkpoint = time.monotonic()

    def _note_kept(self, position: int) -> None:
        """The last checkpoint again, with its files synced already, and with a new ``kept``: works on a full disk."""
        self._last = replace(self._last, kept=position, clean=False)
        self._checkpoints.write(self._last)

    # ---- duties ----------------------------------------------------------------------------------------------------

    def _attempt(self, duty: _Duty) -> float:
        try:
            wait = duty.work()
            duty.complained = ""
        except (Retryable, StoreFull, StoreReadOnly, CorruptLog, BrokerClosed, lmdb.Error, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_SPACE:
                raise
            if duty.complained != str(error):
                logger.warning("%s, trying again: %s", duty.work.__name__.strip("_").replace("_", " "), error)
                duty.complained = str(error)
            return RETRY_INTERVAL
        return wait

    def _index(self) -> float:
        busy = self._indexer.step()
        if self._indexer.full:
            self._indexer.commit()
        while self._indexer.deleted_topics and not self._dispatcher.behind:  # else it might make the files again
            self._own_queues.delete_topic(self._indexer.deleted_topics.pop())
            self.unlinked.set()
        return 0.0 if busy else POLL

    def _commit_index(self) -> float:
        if self._region.get("indexed") < self._indexer.position:
            self._indexer.commit()
        return self._config.progress_interval_ms / 1000

    def _write_progress(self) -> float:
        append_progress(self._region)
        failpoint("dispatcher.progress_written")
        return self._config.progress_interval_ms / 1000

    def _write_snapshot(self) -> float:
        """A snapshot counts, and frees segments, only once the whole of it is on the disk."""
        if self._snapshot_pending is not None:
            begin, end = self._snapshot_pending
            if self._region.get("flushed") >= end:
                self._region.set("snapshot", begin)
                self._snapshot_pending = None
        elif self._region.get("tail") - self._snapshot_behind >= self._config.snapshot_interval_bytes:
            snapshot = Snapshot(self._region, self._last.epochs)
            failpoint("dispatcher.snapshot_begun")  # a BEGIN without END frees nothing, and is replayed like the rest
            end = snapshot.complete()
            failpoint("dispatcher.snapshot_ended")  # whole in the log, not noted: the older one still counts
            self._snapshot_pending = snapshot.begin, end
            self._snapshot_behind = end
        return POLL

    def _write_checkpoint(self) -> float:
        new_bytes = self._region.get("flushed") - self._last.flushed
        due = time.monotonic() - self._last_checkpoint >= self._config.checkpoint_interval_ms / 1000
        if new_bytes >= CHECKPOINT_BYTES or (due and self._changed()):
            self.checkpoint()
        return POLL

    def _changed(self) -> bool:
        last = self._last
        now = self._region.get("flushed"), self._dispatcher.position, self._region.get("kept")
        return now != (last.flushed, last.dispatched, last.kept) or self._region.get("snapshot") != (last.snapshot or 0)

    def _delete_abandoned(self) -> float:
        """A member without a name was killed: what it has not consumed is kept for nobody."""
        now, generation = time.monotonic(), self._region.get("topic_generation")
        if generation == self._no_members_in:
            return RETENTION_INTERVAL
        passing = [group for group in self._region.groups() if is_passing_member(group["name"])]
        self._no_members_in = -1 if passing else generation
        empty = {group["name"] for group in passing if not group["members"]}
        self._abandoned = {name: self._abandoned.get(name, now) for name in empty}
        for name, since in self._abandoned.items():
            if now - since >= MEMBER_GRACE:
                with suppress(GroupInUse, GroupNotExist):  # somebody has come back, or has closed it
                    self._region.delete_group(name, RETRY_PREFIX + name)
        return RETENTION_INTERVAL

    def _retain(self) -> float:
        if retain(self._region, self._own_queues, self._log, self._config, self._note_kept):
            logger.info("the log before position %d is no longer needed", self._region.get("kept"))
            self.unlinked.set()
        self._indexer.drop_before(self._region.get("kept"))
        return POLL if self._region.get("store_state") == STORE_FULL else RETENTION_INTERVAL
