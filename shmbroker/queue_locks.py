"""The semaphores by which consumers own queues: one SysV set per broker, made when the first consumer wants to (R23).

Its key is in the instance of the memory that it belongs to, which the descriptor named before there was any memory, and
the control segment names as long as there is some. So whatever is killed, whoever removes the memory finds the set, and
removes it first:

    nothing ──make──▶ the maker's own ──share──▶ the broker's ──remove──▶ nothing

A maker that is killed before ``share`` leaves a set that only it and root can open, in a directory shared by several
users; in any other it is whole from its beginning. The kernel keeps it until then or until the next boot, however many
processes die, but ``ipcrm`` and a logind with RemoveIPC=yes do not: then it is made anew (``OrderlyMember``).
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from shmbroker import access
from shmbroker._native import _core
from shmbroker._native._core import Region
from shmbroker.errors import AttachRefused, LimitReached, NotReady
from shmbroker.failpoint import failpoint
from shmbroker.naming import BrokerPaths

LIMITS: Final = Path("/proc/sys/kernel/sem")
PAUSE_SECONDS: Final = 0.01
_TRIES: Final = 5
_PASSING: Final = (  # somebody else was quicker with making it, has not shared it yet, or removes it at this moment
    errno.EEXIST,
    errno.EACCES,
    errno.EINVAL,
    errno.EIDRM,
)
_tested: set[int] = set()  # the sets that this process has seen at work


def key_of(instance: bytes) -> int:
    """The key of the set that belongs to this memory; never 0, which is nobody's."""
    return int.from_bytes(instance[:4], "little") & 0x7FFFFFFF or 1


def open_locks(region: Region, tables: int, directory: Path) -> int:
    """The id of the set of a broker with so many claim tables, made if there is none.

    Raises LimitReached, AttachRefused, NotReady.
    """
    key = key_of(region.header["instance"])
    for tries_left in reversed(range(_TRIES)):
        try:
            found = _find(key, tables, directory)
            if found is None:
                found = _make(key, tables, directory)
            if found not in _tested:
                _core.test_queue_locks(found, tables)
                _tested.add(found)
        except OSError as error:
            if not tries_left or error.errno not in _PASSING or not _is_possible(tables):
                raise _explained(error, tables) from error
            time.sleep(PAUSE_SECONDS)
        else:
            return found
    raise AssertionError("the last try returns or raises")


def remove_locks(instance: bytes) -> None:
    """The set that belongs to this memory, if there is one. Who owns queues by it finds out when it takes the next."""
    with suppress(OSError):
        found, owner = _core.find_queue_locks(key_of(instance), 0)
        if os.geteuid() in (0, owner):
            _core.remove_queue_locks(found)


def _find(key: int, tables: int, directory: Path) -> int | None:
    try:
        found, owner = _core.find_queue_locks(key, tables)
    except FileNotFoundError:
        return None
    if owner not in (0, os.geteuid(), directory.stat().st_uid):
        raise AttachRefused(
            f"the semaphores of the broker of {directory} belong to user {owner}, who may own neither: remove them "
            f"(`ipcrm -s {found}`)"
        )
    return found


def _make(key: int, tables: int, directory: Path) -> int:
    made = _core.make_queue_locks(key, tables)
    failpoint("locks.made")
    run = BrokerPaths(directory).run.stat()
    _core.share_queue_locks(made, run.st_uid, run.st_gid, access.file_mode())
    failpoint("locks.shared")
    return made


def _limits() -> tuple[int, ...]:
    return tuple(map(int, LIMITS.read_text().split()))


def _is_possible(tables: int) -> bool:
    most, *_ = _limits()
    return tables < most


def _explained(error: OSError, tables: int) -> Exception:
    needed = f"consuming in order needs a set of {tables + 1} semaphores (claim_tables = {tables}, and one)"
    if error.errno == errno.EACCES:
        return AttachRefused(f"{needed}, and that of this broker was made by another user, who was killed on the way")
    if error.errno in (errno.ENOSPC, errno.EINVAL):
        most, total, _, sets = _limits()
        return LimitReached(
            f"{needed}, and the kernel has no room for it: a set has at most {most} (SEMMSL), all together "
            f"{total} (SEMMNS), there are at most {sets} sets (SEMMNI), `ipcs -s` shows whose. Raise the limit "
            '(`sysctl -w kernel.sem="32000 1024000000 500 32000"`), remove sets that nobody needs (`ipcrm -s ID`), or '
            "start the broker with fewer claim_tables"
        )
    return NotReady(
        f"{needed}, and this kernel does not do what is asked of them: {error.strerror}. A sandbox without System V "
        "semaphores (SEM_UNDO, semtimedop) cannot consume in order"
    )


__all__ = ["key_of", "open_locks", "remove_locks"]
