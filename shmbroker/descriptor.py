"""``run/broker.json``: which shared memory belongs to a directory, and the settings in force.

The descriptor is written *before* the memory is made and removed *after* it is gone, so that whatever a crash leaves
in /dev/shm is named by a descriptor, and the next supervisor clears it away. It names the directory it was written
for: the descriptor in a copy of a directory is nobody's (R22).
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from shmbroker import access
from shmbroker.errors import AttachRefused, LayoutMismatch, ShmBrokerError, StoreFull
from shmbroker.failpoint import failpoint
from shmbroker.naming import BrokerPaths, is_object_name

DESCRIPTOR_FORMAT: Final = 1
DESCRIPTOR_BYTES_MAX: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What ``run/broker.json`` says: where the memory is, whose it is, and how the broker is set."""

    control: str
    ring: str
    store: str  # identity of the log, as in its segments and its checkpoint
    instance: str
    boot_id: str
    pid_namespace: int
    ipc_namespace: int
    device: int
    inode: int
    settings: Mapping[str, Any]
    format: int = DESCRIPTOR_FORMAT

    def with_settings(self, settings: Mapping[str, Any]) -> Descriptor:
        """The same memory under other settings."""
        return replace(self, settings=settings)

    @property
    def directory(self) -> tuple[int, int]:
        return self.device, self.inode

    @property
    def namespaces(self) -> tuple[int, int]:
        return self.pid_namespace, self.ipc_namespace


def directory_identity(paths: BrokerPaths) -> tuple[int, int]:
    status = paths.root.stat()
    return status.st_dev, status.st_ino


def read_descriptor(paths: BrokerPaths) -> Descriptor | None:
    """The descriptor of this directory; None if there is none, or only that of the directory it was copied from."""
    try:
        fd = os.open(paths.descriptor, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise AttachRefused(f"{paths.directory} belongs to another user: {error}") from error
    with os.fdopen(fd, "rb") as stream:
        if os.fstat(fd).st_uid != paths.root.stat().st_uid:
            raise AttachRefused(f"{paths.descriptor} does not belong to the owner of the directory")
        text = stream.read(DESCRIPTOR_BYTES_MAX)
    try:
        descriptor = Descriptor(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise LayoutMismatch(f"{paths.descriptor} is no descriptor of this version: {error}") from error
    if descriptor.format != DESCRIPTOR_FORMAT or not (
        is_object_name(descriptor.control) and is_object_name(descriptor.ring)
    ):
        raise LayoutMismatch(f"{paths.descriptor} is no descriptor of format {DESCRIPTOR_FORMAT}")
    return descriptor if descriptor.directory == directory_identity(paths) else None


def write_descriptor(paths: BrokerPaths, descriptor: Descriptor) -> None:
    """Replace the descriptor at one stroke: temporary file, fsync, rename, fsync of the directory. Or StoreFull.

    A broker starts on a disk without a free block, too: what says the same is not written again, and the temporary file
    is the one that ``remove_descriptor`` has left, written over in place.
    """
    with suppress(ShmBrokerError):  # it is replaced
        if read_descriptor(paths) == descriptor:
            return
    text = json.dumps(asdict(descriptor), indent=1).encode()
    temporary = _temporary(paths)
    fd = _own_file(temporary)
    try:
        access.admit(fd, access.group_of(descriptor.settings))
        if os.pwrite(fd, text, 0) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(fd, len(text))
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreFull(
            f"{temporary}: the disk has no room for {len(text)} bytes, without which no broker starts: free some space"
        ) from error
    finally:
        os.close(fd)
    failpoint("memory.descriptor_written")  # leaves a temporary file, which the next writer writes over
    temporary.rename(paths.descriptor)
    _sync_directory(paths.run)


def remove_descriptor(paths: BrokerPaths, instance: str) -> None:
    """Remove the descriptor of that memory; another's stays. Only under the directory's lock.

    The file goes on as the temporary one: its room on the disk is kept for the next descriptor.
    """
    with suppress(ShmBrokerError, FileNotFoundError):  # what is no descriptor is not ours either
        found = read_descriptor(paths)
        if found is not None and found.instance == instance:
            paths.descriptor.rename(_temporary(paths))


def _temporary(paths: BrokerPaths) -> Path:
    return paths.descriptor.with_suffix(".tmp")


def _own_file(path: Path) -> int:
    """To be written: what lies there, if it is our own and has no other name; else a new file."""
    with suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid():
            return fd
        os.close(fd)
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
