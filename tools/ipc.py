"""``shmbroker ipc``: shared memory of brokers, and what is left of dead ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

from shmbroker.naming import is_object_name
from shmbroker.tools import console
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Session, common_options, pass_session

SHM: Final = Path("/dev/shm")
_MAPPED: Final = re.compile(r"/dev/shm(/shmbroker-[0-9a-f]{32})-[cr]")


@dataclass(frozen=True, slots=True)
class Memory:
    """The two objects of one broker, told apart from others' by their random name."""

    name: str
    bytes: int
    owner_uid: int
    pids: tuple[int, ...]  # processes that have it mapped
    unflushed_bytes: int  # what would be lost with it; -1: the header says nothing sensible
    state: str


@click.group()
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
    """
    found = memories()
    if session.json:
        console.print_json([asdict(memory) for memory in found])
        return
    console.table(
        "",
        ["memory", ">size", ">owner", "state", ">not on disk", "processes"],
        [
            (
                memory.name,
                console.size(memory.bytes),
                memory.owner_uid,
                memory.state,
                console.size(memory.unflushed_bytes) if memory.unflushed_bytes >= 0 else "?",
                " ".join(map(str, memory.pids)),
            )
            for memory in found
        ],
        empty="no broker has memory here",
    )


@ipc.command()
@common_options
@click.argument("names", nargs=-1)
@click.option("--lose-unflushed", is_flag=True, help="Also memory that holds messages which are not on the disk.")
@pass_session
def clean(session: Session, names: tuple[str, ...], lose_unflushed: bool) -> int:
    """Remove the memory of dead brokers: yours, mapped by no process; all of it, or the NAMES that `list` shows.

    \b
    shmbroker ipc clean
    shmbroker ipc clean --lose-unflushed /shmbroker-4f...    # its directory is gone for ever

    Memory that still holds messages which are not on the disk is kept: open its directory once and they are written.
    Leaves with 1 if some was kept.
    """
    removed, kept = [], []
    for memory in memories():
        if memory.state != "dead" or (names and memory.name not in names):
            continue
        if memory.unflushed_bytes != 0 and not lose_unflushed:
            kept.append(memory.name)
            continue
        for suffix in ("-r", "-c"):  # the control object last: it is what the list is made from
            (SHM / f"{memory.name[1:]}{suffix}").unlink(missing_ok=True)
        removed.append(memory.name)
    if session.json:
        console.print_json({"removed": removed, "kept": kept})
    else:
        click.echo(f"removed {len(removed)}")
        for name in kept:
            click.echo(
                f"kept {name}: it holds messages that are not on the disk; open its directory once, or --lose-unflushed"
            )
    return ExitCode.FINDING if kept else ExitCode.OK


def memories() -> list[Memory]:
    """Every pair of objects under our names, by name."""
    mapped = _mapped()
    names = sorted({f"/{path.name[:-2]}" for path in SHM.glob("shmbroker-*") if is_object_name(f"/{path.name}")})
    return [found for name in names if (found := _look(name, mapped.get(name, ()))) is not None]


def _look(name: str, pids: tuple[int, ...]) -> Memory | None:
    total, uid = 0, -1
    for suffix in ("-c", "-r"):
        try:
            status = (SHM / f"{name[1:]}{suffix}").stat()
        except FileNotFoundError:
            continue
        total, uid = total + status.st_size, status.st_uid
    if uid < 0:
        return None
    header = _header(name)
    unflushed = header["tail"] - header["flushed"] if header is not None else -1
    if header is not None and not 0 <= unflushed <= header["ring_bytes"]:
        unflushed = -1
    return Memory(name, total, uid, pids, unflushed, _state(header, uid, pids))


def _state(header: dict[str, Any] | None, uid: int, pids: tuple[int, ...]) -> str:
    from shmbroker import process

    if uid != os.geteuid():
        return "another user's"
    if header is not None and any(header["namespaces"]) and header["namespaces"] != process.namespaces():
        return "another namespace's"  # its processes cannot be seen from here
    return "in use" if pids else "dead"


def _header(name: str) -> dict[str, Any] | None:
    """The frozen header of the control object; None if it is missing, foreign or never was finished."""
    from shmbroker._native._core import Region
    from shmbroker.errors import ShmBrokerError

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
