"""``shmbroker ipc``: shared memory of brokers, and what is left of dead ones."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

from shmbroker import process, queue_locks, remains
from shmbroker._native._core import Region
from shmbroker.errors import ShmBrokerError
from shmbroker.naming import is_object_name
from shmbroker.tools import console
from shmbroker.tools.command_group import CommandGroup
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Session, common_options, pass_session

SHM: Final = Path("/dev/shm")
DEAD: Final = "dead"
_MAPPED: Final = re.compile(r"/dev/shm(/shmbroker-[0-9a-f]{32})-[cr]")


@dataclass(frozen=True, slots=True)
class Memory:
    """The two objects of one broker, told apart from others' by their random name."""

    name: str
    bytes: int
    owner_uid: int
    pids: tuple[int, ...]  # processes that have it mapped
    unflushed_bytes: int  # messages that would be lost with it; -1: the header says nothing sensible
    written: bool  # the log has all of it, acknowledgements as well
    state: str
    directory: str  # of the broker; of a dead one the memory knows no name, only what to look for; empty: not even that


@click.group(cls=CommandGroup)
@common_options
def ipc() -> None:
    """List the shared memory of brokers and remove what dead ones have left.

    \b
    shmbroker ipc list
    shmbroker ipc clean
    """


@ipc.command(name="list")
@common_options
@pass_session
def list_memory(session: Session) -> None:
    """List every broker's memory on this host, and whose it is.

    \b
    shmbroker ipc list
    find /var/lib -xdev -inum 1234567     # a dead broker's directory: its memory knows only the inode
    """
    found = memories()
    if session.json:
        console.print_json([asdict(memory) for memory in found])
        return
    console.table(
        "",
        ["memory", ">size", ">owner", "state", ">not on disk", "processes", "directory"],
        [
            (
                memory.name,
                console.size(memory.bytes),
                memory.owner_uid,
                memory.state,
                console.size(memory.unflushed_bytes) if memory.unflushed_bytes >= 0 else "?",
                " ".join(map(str, memory.pids)),
                memory.directory or "?",
            )
            for memory in found
        ],
        empty="no broker has memory here",
    )


@ipc.command()
@common_options
@click.argument("names", nargs=-1)
@click.option("--lose-unflushed", is_flag=True, help="Also memory that holds what is not on the disk.")
@pass_session
def clean(session: Session, names: tuple[str, ...], lose_unflushed: bool) -> int:
    """Remove the memory of dead brokers: yours, mapped by no process; all of it, or the NAMES that `list` shows.

    \b
    shmbroker ipc clean
    shmbroker ipc clean --lose-unflushed /shmbroker-4f...    # its directory is gone for ever

    Memory that holds messages or acknowledgements which are not on the disk is kept: open its directory once and they
    are written.
    Leaves with 1 if some was kept.
    """
    removed: list[str] = []
    kept: list[Memory] = []
    for memory in memories():
        if memory.state == DEAD and (not names or memory.name in names):
            outcome = _remove(memory.name, lose_unflushed)
            if outcome is not None:
                removed.append(memory.name) if outcome else kept.append(memory)
    with console.done(f"removed {len(removed)}, kept {len(kept)}"):
        if session.json:
            console.print_json({"removed": removed, "kept": [memory.name for memory in kept]})
        else:
            _print_cleaned(removed, kept)
    return ExitCode.FINDING if kept else ExitCode.OK


def _print_cleaned(removed: list[str], kept: list[Memory]) -> None:
    click.echo(f"removed {len(removed)}")
    for memory in kept:
        place = memory.directory or "unknown"
        click.echo(f"kept {memory.name}: it may hold what is not on the disk; ", nl=False)
        click.echo(f"open its directory ({place}) once, or --lose-unflushed")


def memories() -> list[Memory]:
    """Every pair of objects under our names, by name."""
    # The names first: whose memory is made after the look at the processes is not among them.
    names = sorted({f"/{path.name[:-2]}" for path in SHM.glob("shmbroker-*") if is_object_name(f"/{path.name}")})
    mapped = _mapped()
    return [found for name in names if (found := _look(name, mapped.get(name, ()))) is not None]


def _remove(name: str, lose_unflushed: bool) -> bool | None:
    """False if it is kept; None if it is not dead after all.

    The lock is the one that a supervisor holds for life (memory.py): while we have it nobody takes the memory over, so
    what is seen now is still so when the names go. Clients come only to memory that a supervisor serves.
    """
    control, ring = (SHM / f"{name[1:]}{suffix}" for suffix in ("-c", "-r"))
    with ExitStack() as stack:
        with suppress(FileNotFoundError):  # half of it is gone: nobody takes that over
            fd = os.open(control, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            if not process.try_flock(fd):
                return None
        found = _look(name, _mapped().get(name, ()))
        if found is None or found.state != DEAD:
            return None
        if not found.written and not lose_unflushed:
            return False
        header = _header(name)
        if header is not None:
            queue_locks.remove_locks(header["instance"])
        for path in (ring, control):  # the control object last: without it a ring is nobody's
            path.unlink(missing_ok=True)
    return True


def _look(name: str, pids: tuple[int, ...]) -> Memory | None:
    total, uid, changed = 0, -1, 0.0
    for suffix in ("-c", "-r"):
        try:
            status = (SHM / f"{name[1:]}{suffix}").stat()
        except FileNotFoundError:
            continue
        total, uid, changed = total + status.st_size, status.st_uid, max(changed, status.st_mtime)
    if uid < 0:
        return None
    header, region = _header(name), _attach(name)
    unflushed = _unflushed(header)
    written = unflushed == 0 and (region is None or remains.is_written(region))
    used = bool(pids) or (region is not None and remains.is_used(region))
    young = time.time_ns() / 1e9 - changed < remains.YOUNG_SECONDS
    state = _state(header, uid, used, young)
    return Memory(name, total, uid, pids, unflushed, written, state, _directory(header, pids))


def _unflushed(header: dict[str, Any] | None) -> int:
    if header is None or not 0 <= header["tail"] - header["flushed"] <= header["ring_bytes"]:
        return -1
    return int(header["tail"] - header["flushed"])


def _state(header: dict[str, Any] | None, uid: int, used: bool, young: bool) -> str:
    if uid != os.geteuid():
        return "another user's"
    if header is not None and any(header["namespaces"]) and header["namespaces"] != process.namespaces():
        return "another namespace's"  # its processes cannot be seen from here
    if used:
        return "in use"
    return "being made" if header is None and young else DEAD


def _directory(header: dict[str, Any] | None, pids: tuple[int, ...]) -> str:
    """The directory of a broker whose workers live, since they work there; else its inode, and where to look for it."""
    if header is None or not any(header["directory"]):
        return ""
    device, inode = header["directory"]
    for pid in pids:
        with suppress(OSError):
            place = Path(f"/proc/{pid}/cwd")
            status = place.stat()
            if (status.st_dev, status.st_ino) == (device, inode):
                return str(place.readlink())
    number = f"{os.major(device)}:{os.minor(device)}"
    # mountinfo(5): id, parent, device, root, mount point. A container has single files mounted as well.
    mounts = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    places = [fields[4] for fields in mounts if fields[2] == number and Path(fields[4]).is_dir()]
    return f"inode {inode} of {min(places, key=len, default=f'device {number}')}"


def _attach(name: str) -> Region | None:
    """Mapped, if it is whole, ours, and of this build."""
    try:
        with ExitStack() as stack:
            fds = []
            for suffix in ("-c", "-r"):
                fds.append(os.open(SHM / f"{name[1:]}{suffix}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC))
                stack.callback(os.close, fds[-1])
            return Region.attach(*fds)
    except (ShmBrokerError, OSError):
        return None


def _header(name: str) -> dict[str, Any] | None:
    """The frozen header of the control object; None if it is missing, foreign or never was finished."""
    try:
        fd = os.open(SHM / f"{name[1:]}-c", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        header = Region.read_header(fd)
    except (ShmBrokerError, OverflowError, OSError):
        return None
    finally:
        os.close(fd)
    return header if header["magic"] else None


def _mapped() -> dict[str, tuple[int, ...]]:
    """Which processes have which memory mapped, by the memory's name. Processes of others may be unreadable to us."""
    found: dict[str, set[int]] = {}
    for pid, maps in _all_maps():
        for match in _MAPPED.finditer(maps):
            found.setdefault(match[1], set()).add(pid)
    return {name: tuple(sorted(pids)) for name, pids in found.items()}


def _all_maps() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            yield int(path.parent.name), path.read_text(errors="replace")
        except OSError:  # gone meanwhile, or another user's
            continue
