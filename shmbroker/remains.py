"""What dead brokers have left in /dev/shm, and nobody would ever clear away, since their directories are gone.

Who opens a directory clears what was left of *its* broker. This is about all others of the same user: memory goes if
nobody is alive that uses it and it provably holds nothing that its log does not have. A directory that still exists
loses nothing by that: its next start recovers from the log instead. Memory with unflushed messages, or with progress
that is in no record, is kept for whoever finds its directory again; ``shmbroker ipc`` lists it.

An flock on the control object stands between this and a supervisor that just takes the memory over (memory.py).
"""

from __future__ import annotations

import logging
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from shmbroker import memory, process, queue_locks
from shmbroker._native._core import FINGERPRINT, Region
from shmbroker.errors import ShmBrokerError
from shmbroker.naming import OBJECT_PREFIX, is_object_name

YOUNG_SECONDS: Final = 60.0  # what was written to since may be about to be opened again: that is quicker with it

log = logging.getLogger("shmbroker.supervisor")


def clear(directory: Path = memory.SHM_DIRECTORY) -> int:
    """Remove all such memory. Returns how many objects."""
    cleared = 0
    for path in sorted(directory.glob(f"{OBJECT_PREFIX}*")):
        if is_object_name(f"/{path.name}"):
            with suppress(OSError, ShmBrokerError):  # gone meanwhile, somebody else's, or nothing we understand
                cleared += _clear_ring(path) if path.name.endswith("-r") else _clear_pair(path)
    if cleared:
        log.info("removed %d memory objects of dead brokers, with nothing in them that is not on the disk", cleared)
    return cleared


def _clear_pair(control: Path) -> int:
    fd = os.open(control, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if not _may_go(os.fstat(fd)) or not process.try_flock(fd):
            return 0
        ring = control.with_name(control.name[:-1] + "r")
        if os.fstat(fd).st_nlink == 0 or not _holds_nothing(fd, ring):
            return 0
        if memory.is_formatted(fd):
            queue_locks.remove_locks(Region.read_header(fd)["instance"])
        ring.unlink(missing_ok=True)  # the control object last, as always
        control.unlink()
        return 2
    finally:
        os.close(fd)


def _clear_ring(ring: Path) -> int:
    """One without its control object is what is left of a removal: it goes last, and is made first."""
    if ring.with_name(ring.name[:-1] + "c").exists() or not _may_go(ring.lstat()):
        return 0
    ring.unlink()
    return 1


def _may_go(status: os.stat_result) -> bool:
    ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    return ours and time.time_ns() / 1e9 - status.st_mtime > YOUNG_SECONDS


def _holds_nothing(control_fd: int, ring: Path) -> bool:
    """Whether nobody uses it and all of it is in the log. Under its lock: no supervisor lives, and none takes over."""
    if not memory.is_formatted(control_fd):
        return True  # its maker was killed
    header = Region.read_header(control_fd)
    if header["fingerprint"] != FINGERPRINT or header["namespaces"] != process.namespaces():
        return False
    try:
        ring_fd = os.open(ring, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True  # a removal that was killed on the way
    try:
        region = Region.attach(control_fd, ring_fd)
    finally:
        os.close(ring_fd)
    return not is_used(region) and is_written(region)


def is_used(region: Region) -> bool:
    """Whether a worker or a client lives that works on it."""
    return any(map(memory.is_living, [*region.workers(), *region.clients()]))


def is_written(region: Region) -> bool:
    """Whether the log has all of it: messages, and what was acknowledged."""
    return region.get("tail") == region.get("flushed") and not region.progress_records(only_changed=True)
