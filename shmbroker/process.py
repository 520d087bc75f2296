"""Processes: who is one, does it live, which lock does it hold.

A pid alone names nobody, because pids come round again: a process is known by boot id, pid namespace, pid and start
ticks, and a living one is watched through a pidfd, which can never come to mean another process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import time
from pathlib import Path
from typing import Final, NamedTuple

from shmbroker import access
from shmbroker._native import _core
from shmbroker.naming import BrokerPaths

SUPERVISOR_KEY: Final = "SHMBROKER_SUPERVISOR_PID"  # in a worker's environment: whose memory it is to work on
_FLOCK: Final = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid
_LOCK_POLL_SECONDS: Final = 0.05


class Identity(NamedTuple):
    """A process of this boot and this pid namespace."""

    pid: int
    start_ticks: int


def own_identity() -> Identity:
    return Identity(os.getpid(), _core.start_ticks(os.getpid()))


def boot_id() -> bytes:
    """16 bytes that differ from boot to boot: memory of another boot is gone, and so are its processes."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", ""))


def namespaces() -> tuple[int, int]:
    """Inode numbers of this process's pid and ipc namespaces. Across them neither a pid nor a robust lock is sound."""
    return Path("/proc/self/ns/pid").stat().st_ino, Path("/proc/self/ns/ipc").stat().st_ino


def open_pidfd(pid: int, start_ticks: int) -> int | None:
    """A pidfd of exactly that process, or None if it has gone. Start ticks are read after the pidfd is held."""
    if pid <= 0:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except (ProcessLookupError, OSError) as error:
        if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):  # the latter two: a thread has that id by now
            return None
        raise
    if _core.start_ticks(pid) != start_ticks or has_ended(pidfd):
        os.close(pidfd)
        return None
    return pidfd


def has_ended(pidfd: int) -> bool:
    """True once the process is dead, a zombie included: its memory, locks and files are released by then."""
    return wait_ended(pidfd, 0.0)


def wait_ended(pidfd: int, timeout: float) -> bool:
    """Wait at most ``timeout`` seconds for the process to die; True if it has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def exists(pid: int) -> bool:
    """True while some process lives under that pid, whichever it is. A zombie is dead: perhaps nobody waits for it."""
    pidfd = open_pidfd(pid, _core.start_ticks(pid))
    if pidfd is None:
        return False
    os.close(pidfd)
    return True


def is_alive(identity: Identity) -> bool:
    pidfd = open_pidfd(*identity)
    if pidfd is None:
        return False
    os.close(pidfd)
    return True


class FileLock:
    """An fcntl lock on a private file: the kernel gives it back when its holder dies, and a forked child has none.

    The file is opened once and its name never opened again in this process: closing any other descriptor of it would
    drop the lock. It is never unlinked: a second file of that name would be a second lock.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        self._fd = os.open(path, flags, access.file_mode())

    def acquire(self, timeout: float = 0.0) -> bool:
        """Take the lock, waiting at most ``timeout`` seconds for its holder to release it or to die."""
        deadline = time.monotonic() + timeout
        while not self._try():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            # A living holder may also release without dying, hence the short slices.
            _wait_for(_lock_holder(self._fd), min(remaining, _LOCK_POLL_SECONDS))
        return True

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def is_in_place(self) -> bool:
        """False once the file was removed: who opens its name now holds another lock."""
        try:
            return os.path.samestat(os.fstat(self._fd), self.path.lstat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Release the lock, if held."""
        os.close(self._fd)


class DirectoryLock:
    """Held by the one process that may change a broker's directory: its supervisor, or a repair.

    Two locks. An flock on the directory itself keeps others out: it lasts as long as the directory, whatever somebody
    removes from inside. The fcntl lock on ``run/lock`` lets everybody see who holds it (``lock_holder``).
    """

    def __init__(self, paths: BrokerPaths) -> None:
        self._paths = paths
        self._fd = os.open(paths.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._named: FileLock | None = None

    def acquire(self, timeout: float = 0.0) -> bool:
        """Take it, waiting at most ``timeout`` seconds for its holder; what a broker's directory has is there then."""
        deadline = time.monotonic() + timeout
        while not try_flock(self._fd):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            _wait_for(lock_holder(self._paths.lock), min(remaining, _LOCK_POLL_SECONDS))
        return self.show(max(0.0, deadline - time.monotonic()))

    def show(self, timeout: float = 0.0) -> bool:
        """Make what was removed from the directory, and be seen to hold it. False: somebody else is seen."""
        self._paths.make()
        if self._named is not None and not self._named.is_in_place():
            self._named.close()
            self._named = None
        if self._named is None:
            self._named = FileLock(self._paths.lock)
        return self._named.acquire(timeout)

    def close(self) -> None:
        """Release it, if held."""
        if self._named is not None:
            self._named.close()
        os.close(self._fd)


def try_flock(fd: int) -> bool:
    """Take the flock on an open file or directory, which lasts until ``fd`` is closed; False if it is taken."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for(pid: int, timeout: float) -> None:
    """Wait for the holder of a lock to die, at most ``timeout`` seconds; a moment if it cannot be seen."""
    try:
        pidfd = os.pidfd_open(pid) if pid > 0 else None
    except OSError:
        pidfd = None
    if pidfd is None:  # gone just now, or of another pid namespace
        time.sleep(min(timeout, 0.005))
        return
    wait_ended(pidfd, timeout)
    os.close(pidfd)


def lock_holder(path: Path) -> int:
    """Pid of the process that holds the fcntl lock on ``path``; 0: nobody; -1: one of another pid namespace.

    Not for the process that may hold it: closing the descriptor used here would release its lock.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return 0
    try:
        return _lock_holder(fd)
    finally:
        os.close(fd)


def _lock_holder(fd: int) -> int:
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    if kind == fcntl.F_UNLCK:
        return 0
    return int(pid) if pid > 0 else -1
