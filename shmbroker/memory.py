"""The two shared-memory objects of a broker: make, attach, look at what a killed broker left, remove.

Nothing found is believed before it is checked: names must be such as we make, objects must belong to the directory's
owner and be open to nobody else, or to the one group that the descriptor is open to as well (R25), descriptor and
control segment must name the same directory and instance (R22), this boot, and the pid and ipc namespace we are in
(R19).
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Final

import posix_ipc

from shmbroker import access, process
from shmbroker._native._core import FINGERPRINT, Region
from shmbroker.config import Config
from shmbroker.descriptor import Descriptor, directory_identity, read_descriptor, write_descriptor
from shmbroker.errors import AttachRefused, LayoutMismatch, NotEnoughMemory, NotReady
from shmbroker.failpoint import failpoint
from shmbroker.naming import BrokerPaths, object_names

SHM_DIRECTORY: Final = Path("/dev/shm")
MIB: Final = 1024 * 1024

STATE_STARTING: Final = 1
STATE_RUNNING: Final = 2
STATE_DRAINING: Final = 3
STATE_STOPPED: Final = 4


class Leftover(Enum):
    """What a former broker left in memory, as a supervisor that holds the directory's lock finds it."""

    NOTHING = "no memory: the log alone counts"
    USABLE = "memory of this layout"
    FOREIGN = "memory of another version, or of another pid or ipc namespace: only its unflushed log counts"


# ---- make and remove: only under the directory's lock --------------------------------------------------------------


def create(paths: BrokerPaths, config: Config, *, store: bytes, tail: int, epoch: int) -> Region:
    """Make the memory of a broker whose log ends at ``tail``; its state is STARTING. Raises NotEnoughMemory."""
    limits = config.native_limits()
    sizes = Region.sizes(limits, config.layout.ring_bytes)
    _check_free(sum(sizes))
    control_name, ring_name = object_names()
    instance = os.urandom(16)
    boot_id = process.boot_id()
    descriptor = Descriptor(
        control_name,
        ring_name,
        store.hex(),
        instance.hex(),
        boot_id.hex(),
        *process.namespaces(),
        *directory_identity(paths),
        settings=config.as_dict(),
    )
    write_descriptor(paths, descriptor)
    failpoint("memory.descriptor_renamed")  # leaves a descriptor that names nothing: Leftover.NOTHING
    fds: list[int] = []
    try:
        for name, size in zip((control_name, ring_name), sizes, strict=True):
            fds.append(_allocate(name, size, sum(sizes), access.group_of(descriptor.settings)))
        failpoint("memory.allocated")  # leaves objects full of zeros: no magic, removed by the next supervisor
        region = Region.create(
            fds[0],
            fds[1],
            limits,
            config.layout.ring_bytes,
            config.layout.segment_bytes,
            tail=tail,
            epoch=epoch,
            instance=instance,
            boot_id=boot_id,
            directory=descriptor.directory,
            namespaces=descriptor.namespaces,
            ring_name=ring_name,
        )
    except BaseException:
        remove(paths, descriptor)
        raise
    finally:
        for fd in fds:
            os.close(fd)
    failpoint("memory.formatted")  # leaves memory in state STARTING: nobody has appended, removed as well
    return region


def _allocate(name: str, size: int, needed: int, group: int | None) -> int:
    """A new object whose pages exist: a full /dev/shm is an error here, not a SIGBUS later."""
    made = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=access.PRIVATE_FILE)
    try:
        access.admit(made.fd, group)  # whatever the umask took away
        os.posix_fallocate(made.fd, 0, size)
    except OSError as error:
        made.close_fd()
        raise _not_enough(needed) from error
    failpoint("memory.objects_created")  # leaves one or both objects, without magic
    return int(made.fd)


def _check_free(needed: int) -> None:
    room = os.statvfs(SHM_DIRECTORY)
    if needed > room.f_bavail * room.f_frsize:
        raise _not_enough(needed)


def _not_enough(needed: int) -> NotEnoughMemory:
    room = os.statvfs(SHM_DIRECTORY)
    free = room.f_bavail * room.f_frsize
    total = room.f_blocks * room.f_frsize
    return NotEnoughMemory(
        f"the broker needs {needed / MIB:.1f} MiB of {SHM_DIRECTORY}, {free / MIB:.1f} MiB are free: lower ring_bytes, "
        f"or make it larger (docker run --shm-size={-(-(total + needed - free) // MIB)}m, or remount {SHM_DIRECTORY})"
    )


def remove(paths: BrokerPaths, descriptor: Descriptor) -> None:
    """Unlink the objects and then the descriptor. Mapped memory stays until its processes leave."""
    remove_objects(descriptor)
    failpoint("memory.unlinked")  # leaves a descriptor that names nothing
    paths.descriptor.unlink(missing_ok=True)


def remove_objects(descriptor: Descriptor) -> None:
    """Unlink the objects of a broker whose directory has gone, and the descriptor with it."""
    for name in (descriptor.control, descriptor.ring):
        with suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(name)
        failpoint("memory.control_unlinked")  # leaves one object and the descriptor: Leftover.NOTHING, removed again


class Vanished(Enum):
    """What somebody took away from under a running broker."""

    REMOVED = "its directory was removed"
    MOVED = "its directory was moved"
    UNLINKED = "its memory objects were removed"


class Footing:
    """Watches that a running broker's directory and memory objects are still where they were.

    ``run/`` stands for the directory: with it the lock is gone that keeps a second broker out.
    """

    def __init__(self, paths: BrokerPaths) -> None:
        descriptor = read_descriptor(paths)
        if descriptor is None:
            raise NotReady(f"{paths.descriptor} has gone while the broker starts")
        self._paths = paths
        self.descriptor = descriptor
        self._objects = [SHM_DIRECTORY / name[1:] for name in (descriptor.control, descriptor.ring)]
        self._run = os.open(paths.run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def vanished(self) -> Vanished | None:
        """Look: a few system calls."""
        ours = os.fstat(self._run)
        try:
            found = self._paths.run.stat()
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found is None or (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino):
            return Vanished.MOVED if ours.st_nlink else Vanished.REMOVED
        return None if all(path.exists() for path in self._objects) else Vanished.UNLINKED

    def close(self) -> None:
        os.close(self._run)


# ---- attach and look ----------------------------------------------------------------------------------------------


def attach(paths: BrokerPaths) -> tuple[Region, Descriptor] | None:
    """Map the memory of the broker that serves this directory; None if there is none, or not yet.

    Raises AttachRefused (other user, other namespace) and LayoutMismatch (made by another version or build).
    """
    descriptor = read_descriptor(paths)
    if descriptor is None or descriptor.boot_id != process.boot_id().hex():
        return None
    check_namespaces(descriptor)
    with _opened(paths, descriptor) as fds:
        if fds is None or not _formatted(fds[0]):
            return None
        region = Region.attach(*fds)
    header = region.header
    if (
        header["instance"] != bytes.fromhex(descriptor.instance)
        or header["directory"] != descriptor.directory
        or header["ring_name"] != descriptor.ring
    ):
        region.close()
        raise LayoutMismatch(f"the memory that {paths.descriptor} names belongs to another broker")
    return region, descriptor


def check_namespaces(descriptor: Descriptor) -> None:
    """Raise AttachRefused unless this process shares pid and ipc namespace with the broker."""
    if descriptor.namespaces != process.namespaces():
        raise AttachRefused(
            "the broker runs in another pid or ipc namespace, across which locks and the death of a process cannot be "
            "trusted: start the containers with --pid=container:NAME and --ipc=container:NAME"
        )


def leftover(paths: BrokerPaths) -> tuple[Leftover, Descriptor | None]:
    """What memory a former broker of this directory left. Only under the directory's lock."""
    descriptor = read_descriptor(paths)
    if descriptor is None or descriptor.boot_id != process.boot_id().hex():
        return Leftover.NOTHING, None
    with _opened(paths, descriptor) as fds:
        if fds is None or not _formatted(fds[0]):
            return Leftover.NOTHING, descriptor
        header = Region.read_header(fds[0])
    same = header["fingerprint"] == FINGERPRINT and descriptor.namespaces == process.namespaces()
    return Leftover.USABLE if same else Leftover.FOREIGN, descriptor


def group_in_force(paths: BrokerPaths, config: Config) -> int | None:
    """The group that a killed broker's memory is shared with; if there is none, the one that the settings name."""
    descriptor = read_descriptor(paths)
    if descriptor is None or descriptor.boot_id != process.boot_id().hex():
        return access.group_of(config.as_dict())
    return access.group_of(descriptor.settings)


def seal(paths: BrokerPaths, descriptor: Descriptor, timeout: float) -> None:
    """Let no client that is still attached to memory of any version append to it again: its sends fail from now on.

    For good, as the memory is about to be unlinked. A crash before that leaves memory that still can be flushed, here
    or by the version that made it. Raises NotReady after ``timeout`` seconds.
    """
    with _opened(paths, descriptor) as fds:
        if fds is not None:
            Region.seal(fds[0], int(timeout * 1e9))


def unflushed(paths: BrokerPaths, descriptor: Descriptor, chunk_bytes: int = MIB) -> Iterator[tuple[int, bytes]]:
    """What the ring holds and the disk does not, as (position, bytes), by the frozen header of any version (R22)."""
    with _opened(paths, descriptor) as fds:
        if fds is None:
            return
        header = Region.read_header(fds[0])
        position, tail, ring_bytes = (header["flushed"], header["tail"], header["ring_bytes"])
        if not 0 <= tail - position <= ring_bytes or ring_bytes != os.fstat(fds[1]).st_size:
            raise LayoutMismatch(f"the memory that {paths.descriptor} names has an impossible header: {header}")
        with mmap.mmap(fds[1], ring_bytes, prot=mmap.PROT_READ) as ring:
            while position < tail:
                at = position % ring_bytes
                size = min(chunk_bytes, tail - position, ring_bytes - at)
                yield position, ring[at : at + size]
                position += size


@contextmanager
def _opened(paths: BrokerPaths, descriptor: Descriptor) -> Iterator[tuple[int, int] | None]:
    """Descriptors of the two objects, or None if they are gone (a reboot, or removed by hand)."""
    fds: list[int] = []
    try:
        closed = paths.descriptor.stat()
    except FileNotFoundError:
        yield None
        return
    try:
        for name in (descriptor.control, descriptor.ring):
            fds.append(posix_ipc.SharedMemory(name).fd)
            _check_access(closed, name, os.fstat(fds[-1]))
        yield fds[0], fds[1]
    except posix_ipc.ExistentialError:
        yield None
    except posix_ipc.PermissionsError as error:
        raise AttachRefused(f"{SHM_DIRECTORY}{descriptor.control} belongs to another user") from error
    finally:
        for fd in fds:
            os.close(fd)


def _check_access(descriptor: os.stat_result, name: str, found: os.stat_result) -> None:
    """An object must be as closed as the descriptor, which the directory's owner wrote; never is it open to all."""
    shared = stat.S_IMODE(descriptor.st_mode) == access.SHARED_FILE
    mode = access.SHARED_FILE if shared else access.PRIVATE_FILE
    wrong_group = shared and found.st_gid != descriptor.st_gid
    if found.st_uid != descriptor.st_uid or stat.S_IMODE(found.st_mode) != mode or wrong_group:
        raise AttachRefused(
            f"{SHM_DIRECTORY}{name} has owner {found.st_uid}, group {found.st_gid} and mode "
            f"{stat.S_IMODE(found.st_mode):o}: expected the directory's owner{' and group' * shared} and {mode:o}"
        )


def _formatted(control_fd: int) -> bool:
    """False while, or because, the memory is only half made: its magic is stored last."""
    return len(os.pread(control_fd, 8, 0).strip(b"\0")) > 0
