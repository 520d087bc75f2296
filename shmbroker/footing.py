"""What a running broker stands on: its directory and its memory objects, which somebody may take away."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

from shmbroker.descriptor import Descriptor
from shmbroker.memory import SHM_DIRECTORY
from shmbroker.naming import BrokerPaths


class Vanished(Enum):
    """What has been taken away."""

    REMOVED = "its directory, or the log in it, was removed"
    MOVED = "its directory was moved"
    TORN = "a part of its directory was removed"  # perhaps more of it is about to be
    UNLINKED = "its memory objects, or the descriptor that names them, were removed"


class Footing:
    """Watches that all of it is still where it was when the broker started. ``paths`` are those of who has entered."""

    def __init__(self, paths: BrokerPaths, descriptor: Descriptor) -> None:
        self._paths = paths
        self._directory = _identity(paths.root)
        self._log = _identity(paths.log)
        self._watched = [paths.queues, paths.run]  # not index/, which the dispatcher replaces if it is damaged
        self._parts = [_identity(path) for path in self._watched]
        self._objects = [SHM_DIRECTORY / name[1:] for name in (descriptor.control, descriptor.ring)]

    def vanished(self) -> Vanished | None:
        """Look: some ten system calls."""
        if _identity(self._paths.log) != self._log or self._paths.root.stat().st_nlink == 0:
            return Vanished.REMOVED
        if _identity(self._paths.directory) != self._directory:
            return Vanished.MOVED
        if [_identity(path) for path in self._watched] != self._parts:
            return Vanished.TORN
        return None if all(map(os.path.exists, [self._paths.descriptor, *self._objects])) else Vanished.UNLINKED


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of what ``path`` names by now; None: nothing."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino
