"""``run/broker.json``: which shared memory belongs to a directory, and the settings in force.

The descriptor is written *before* the memory is made and removed *after* it is gone, so that whatever a crash leaves
in /dev/shm is named by a descriptor, and the next supervisor clears it away. It names the directory it was written
for: the descriptor in a copy of a directory is nobody's (R22).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from shmbroker import access
from shmbroker.errors import AttachRefused, LayoutMismatch, ShmBrokerError
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
    """Replace the descriptor at one stroke: temporary file, fsync, rename, fsync of the directory."""
    temporary = paths.descriptor.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as stream:
        access.admit(fd, access.group_of(descriptor.settings))
        json.dump(asdict(descriptor), stream, indent=1)
        stream.flush()
        os.fsync(fd)
    failpoint("memory.descriptor_written")  # leaves a temporary file, which the next writer removes
    temporary.rename(paths.descriptor)
    _sync_directory(paths.run)


def remove_descriptor(paths: BrokerPaths, instance: str) -> None:
    """Remove the descriptor of that memory; another's stays. Only under the directory's lock."""
    with suppress(ShmBrokerError):  # what is no descriptor is not ours either
        found = read_descriptor(paths)
        if found is not None and found.instance == instance:
            paths.descriptor.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
