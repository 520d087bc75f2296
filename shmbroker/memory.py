"""The two shared-memory objects of a broker: make, attach, look at what a killed broker left, remove.

Nothing found is believed before it is checked: names must be such as we make, objects must belong to the directory's
owner and be open to nobody else, or to the one group that the descriptor is open to as well (R25), descriptor and
control segment must name the same directory and instance (R22), this boot, and the pid and ipc namespace we are in
(R19).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, Final

import posix_ipc

from shmbroker import access, process, queue_locks
from shmbroker._native._core import FINGERPRINT, Region
from shmbroker.config import Config
from shmbroker.descriptor import (
    Descriptor,
    directory_identity,
    read_descriptor,
    remove_descriptor,
    write_descriptor,
)
from shmbroker.errors import AttachRefused, LayoutMismatch, NotEnoughMemory, NotReady
from shmbroker.failpoint import failpoint
from shmbroker.naming import BrokerPaths, object_names

SHM_DIRECTORY: Final = Path("/dev/shm")
MIB: Final = 1024 * 1024
LOCK_TIMEOUT: Final = 10.0

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


class Held:
    """A broker's memory in the hands of its supervisor: mapped, described and locked.

    The flock on the control object tells who clears away what dead brokers have left that this one is alive
    (remains.py). It goes with the process.
    """

    def __init__(self, region: Region, descriptor: Descriptor, lock: int) -> None:
        self.region = region
        self.descriptor = descriptor
        self._lock = lock

    def describe(self, paths: BrokerPaths, settings: Mapping[str, Any]) -> None:
        """Other settings are in force from now on."""
        self.descriptor = self.descriptor.with_settings(settings)
        write_descriptor(paths, self.descriptor)

    def close(self) -> None:
        """Let go of it; what is still linked stays."""
        if not self.region.closed:
            self.region.close()
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing would not do: the mapping keeps the file open
            os.close(self._lock)


def create(paths: BrokerPaths, config: Config, *, store: bytes, tail: int, epoch: int) -> Held:
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
        # The control object first: a ring without one is nobody's, and who clears away takes it.
        for name, size in zip((control_name, ring_name), sizes, strict=True):
            fds.append(_allocate(name, size, sum(sizes), access.group_of(descriptor.settings)))
        _lock(fds[0])
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
        for fd in fds:
            os.close(fd)
        remove(paths, descriptor)
        raise
    os.close(fds[1])
    failpoint("memory.formatted")  # leaves memory in state STARTING: nobody has appended, removed as well
    return Held(region, descriptor, fds[0])


def take_over(paths: BrokerPaths) -> Held | None:
    """The memory that a killed supervisor left; None if there is none. Raises as ``attach``, and NotReady."""
    attached = attach(paths)
    if attached is None:
        return None
    region, descriptor = attached
    lock = posix_ipc.SharedMemory(descriptor.control).fd
    try:
        _lock(lock)
        if os.fstat(lock).st_nlink > 0:
            return Held(region, descriptor, lock)
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)  # somebody has cleared it away: it held nothing
    region.close()
    return None


def _lock(control_fd: int) -> None:
    """Who clears away looks for a moment only; another supervisor cannot be, under the directory's lock."""
    deadline = time.monotonic() + LOCK_TIMEOUT
    while not process.try_flock(control_fd):
        if time.monotonic() > deadline:
            raise NotReady("another process has locked the broker's memory: `shmbroker ipc list` names it")
        time.sleep(0.001)


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
        f"or make it larger (docker run --shm-size={-(-(total + needed - free) // MIB)}m, or remount {SHM_DIRECTORY}); "
        "`shmbroker ipc list` shows what brokers have of it"
    )


def remove(paths: BrokerPaths, descriptor: Descriptor) -> None:
    """Unlink semaphores, objects and then the descriptor, which need not be there. What is mapped stays so.

    The names are those of ``descriptor``, never what a file says by now: the directory may have been removed, and
    another broker may have been started in its place.
    """
    queue_locks.remove_locks(bytes.fromhex(descriptor.instance))
    failpoint("memory.locks_removed")  # leaves the objects and the descriptor, with nobody who uses them
    with suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(descriptor.ring)
    failpoint("memory.ring_unlinked")  # leaves the control object and the descriptor: Leftover.NOTHING, removed again
    with suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(descriptor.control)
    failpoint("memory.unlinked")  # leaves a descriptor that names nothing
    remove_descriptor(paths, descriptor.instance)


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
        if fds is None or not is_formatted(fds[0]):
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
        if fds is None or not is_formatted(fds[0]):
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


def is_formatted(control_fd: int) -> bool:
    """False while, or because, the memory is only half made: its magic is stored last."""
    return len(os.pread(control_fd, 8, 0).strip(b"\0")) > 0


# ---- who lives ----------------------------------------------------------------------------------------------------


def living_clients(region: Region) -> list[dict[str, Any]]:
    """Processes attached, or just attaching, and alive: stopped ones, but no dead ones that the janitor has to meet."""
    return [client for client in region.clients() if is_living(client)]


def has_living_clients(region: Region) -> bool:
    """Whether there are any; as a rule the first that is looked at lives."""
    return any(map(is_living, region.clients()))


def is_living(entry: Mapping[str, Any]) -> bool:
    """Of a client or a worker of ``region``. A client that is just joining has no start ticks yet."""
    if entry.get("live", True):
        return process.is_alive(process.Identity(entry["pid"], entry["start_ticks"]))
    return process.exists(entry["pid"])
