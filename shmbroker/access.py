"""Who may open a broker's files and memory: its owner alone, or the members of one group as well (R25).

Setting ``share_with_group``. ``run/`` says which of the two a directory is: 0700, or 2770 and of that group, which what
is made inside then belongs to. Nothing is ever open to everybody, and only the owner starts a broker.
"""

from __future__ import annotations

import errno
import grp
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shmbroker.errors import (
    AttachRefused,
    ConfigError,
    DirectoryUnusable,
    NotReady,
    ShmBrokerError,
    StoreFull,
)
from shmbroker.naming import BrokerPaths

SETTING: Final = "share_with_group"
PRIVATE_FILE: Final = 0o600
SHARED_FILE: Final = 0o660
_PRIVATE_DIRECTORY: Final = 0o700
_SHARED_DIRECTORY: Final = 0o2770  # setgid: what is made inside belongs to the group
_GROUP_WRITES: Final = 0o020

# What trying again does not change, and what does.
_UNUSABLE: Final = {
    errno.ENOENT: "a directory there cannot be made; name another",
    errno.ENOTDIR: "something on the way to it is no directory; name another",
    errno.EEXIST: "it is no directory; name another",
    errno.EISDIR: "a directory stands where a file belongs; name another directory, or remove it",
    errno.ELOOP: "there is a symbolic link where none may be; name the directory itself, or remove the link",
    errno.ENAMETOOLONG: "its name is too long; name another",
    errno.EROFS: "its file system is read-only; mount it writable, or name another",
    errno.EINVAL: "its file system cannot hold a broker; name a directory on a local disk",
    errno.EOPNOTSUPP: "its file system cannot hold a broker; name a directory on a local disk",
    errno.ENODEV: "its file system cannot hold a broker; name a directory on a local disk",
    errno.EIO: "its disk fails; look at the kernel log, and restore a backup to another",
}

_shared = False  # this process makes files for a shared directory


def group_of(settings: Mapping[str, Any]) -> int | None:
    """The number of the group that these settings share with; None: nobody. Raises ConfigError."""
    name = str(settings.get(SETTING, ""))
    if name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid if name else None
    except KeyError:
        raise ConfigError(f"{SETTING} = {name!r}: there is no such group") from None


def adopt(paths: BrokerPaths) -> None:
    """From here on this process makes files and directories as open as this broker's are."""
    global _shared  # noqa: PLW0603 - like the umask, a matter of the whole process
    _shared = bool(paths.run.stat().st_mode & _GROUP_WRITES)
    if _shared:
        os.umask(0o007)


def explained(error: OSError, paths: BrokerPaths) -> ShmBrokerError:
    """What an error of the operating system in a broker's directory means: who has to act, and how."""
    what = f"{paths.directory}: {error.strerror or error}"
    if error.filename is not None and os.fspath(error.filename) != os.fspath(paths.directory):
        what += f" ({os.fsdecode(error.filename)})"
    if error.errno in (errno.EACCES, errno.EPERM):
        return AttachRefused(
            f"{what}: user {os.geteuid()} may not use it; run as the directory's owner, who may also share it "
            f"({SETTING}), or name another directory"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"{what}; free space there")
    if error.errno in _UNUSABLE:
        return DirectoryUnusable(f"{what}: {_UNUSABLE[error.errno]}")
    return NotReady(f"{what}; try again")


def file_mode() -> int:
    return SHARED_FILE if _shared else PRIVATE_FILE


def directory_mode() -> int:
    return _SHARED_DIRECTORY if _shared else _PRIVATE_DIRECTORY


def arrange(paths: BrokerPaths, group: int | None) -> None:
    """Open a directory to a group, or close it again, if it is not so already. Only under the directory's lock.

    ``run/`` comes last: after a crash before it, the next start does it all again.
    """
    status = paths.run.stat()
    if group == (status.st_gid if status.st_mode & _GROUP_WRITES else None):
        return
    places = [paths.root]
    for top, directories, files in os.walk(paths.root):
        places += [Path(top, name) for name in (*directories, *files)]
    places.remove(paths.run)
    for place in (*places, paths.run):
        _admit(place, group)


def _admit(path: Path, group: int | None) -> None:
    # O_PATH: closing an ordinary descriptor of a lock file would drop this process's lock on it.
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if not stat.S_ISLNK(os.fstat(fd).st_mode):
            admit(fd, group)
    finally:
        os.close(fd)


def admit(fd: int, group: int | None) -> None:
    """Give an open file, directory or memory object to its owner alone, or to a group as well. Raises ConfigError."""
    place = f"/proc/self/fd/{fd}"
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        mode = _PRIVATE_DIRECTORY if group is None else _SHARED_DIRECTORY
    else:
        mode = PRIVATE_FILE if group is None else SHARED_FILE
    try:
        os.chown(place, -1, -1 if group is None else group)
    except PermissionError:
        raise ConfigError(f"{SETTING}: user {os.geteuid()} is no member of group {group}") from None
    Path(place).chmod(mode)
