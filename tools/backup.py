"""``shmbroker backup``: a consistent copy of a directory, checked before it gets its name."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from shmbroker._native._core import crc32c
from shmbroker.config import FILE_NAME
from shmbroker.errors import StoreReadOnly
from shmbroker.naming import BrokerPaths, segment_name
from shmbroker.store.files import pwrite_all, sync_directory
from shmbroker.store.segment import SEGMENT_HEADER_BYTES, Segment, SegmentError, SegmentHeader, list_segments
from shmbroker.tools import console
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Failure, Session, common_options, pass_session
from shmbroker.tools.stored_log import StoredLog

if TYPE_CHECKING:
    from shmbroker._native._core import Region
    from shmbroker.broker import Broker

MANIFEST: Final = "backup.json"
MANIFEST_FORMAT: Final = 1
_PIECE_BYTES: Final = 4 * 1024 * 1024
_FLUSH_SECONDS: Final = 60.0
_LOOK_NS: Final = 100_000_000
STORE_READ_ONLY: Final = 2  # enum sb_store_state


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size: int
    crc32c: int


@click.command()
@common_options
@click.argument("target", type=click.Path(path_type=Path))
@pass_session
def backup(session: Session, target: Path) -> int:
    """Copy the log of a running (or stopped) broker to TARGET, which must not exist.

    \b
    shmbroker backup /backup/orders-2026-11-21
    shmbroker -d /backup/orders-2026-11-21 log verify

    Everything sent before the command is in the copy, also what the disk of a read-only store did not take: that is
    copied from memory, as long as the broker runs. Restoring is opening the copy: it is a broker's directory, and
    its consume queues and index are rebuilt from the log. It appears under its name once it is verified and synced.
    """
    session.require_directory()
    if target.exists():
        raise Failure(f"{target} exists already; name a new directory", ExitCode.USAGE)
    parent = target.absolute().parent
    if not parent.is_dir():  # perhaps the place of a disk that is not mounted
        raise Failure(f"{parent} is no directory; make it (mkdir -p {parent}) or name another place", ExitCode.USAGE)
    partial = target.with_name(target.name + ".partial")
    with session.open() as broker:
        copied = _copy(session.paths, broker, partial)
    verdict = _verify(partial, copied.end)
    (partial / MANIFEST).write_text(json.dumps(copied.manifest(session.paths), indent=1))
    _sync(partial)
    partial.rename(target)
    sync_directory(target.resolve().parent)
    answer = {"target": str(target), "first": copied.first, "end": copied.end, "messages": verdict}
    answer["from_memory"] = copied.from_memory
    if copied.from_memory and not session.json:
        click.echo(f"the store is read-only: its last {console.size(copied.from_memory)} come from memory", err=True)
    size = console.size(copied.end - copied.first)
    console.print_done(session, f"{target}: {size} of log, {verdict:,} messages, verified", answer)
    return ExitCode.OK


@dataclass(frozen=True, slots=True)
class _Copied:
    first: int
    end: int
    from_memory: int  # bytes before ``end`` that the source's disk does not have
    segment_bytes: int
    store: bytes
    files: list[_File]

    def manifest(self, source: BrokerPaths) -> dict[str, Any]:
        return {
            "format": MANIFEST_FORMAT,
            "source": str(source.directory),
            "created_ns": time.time_ns(),
            "store": self.store.hex(),
            "segment_bytes": self.segment_bytes,
            "first": self.first,
            "end": self.end,
            "files": [{"name": file.name, "size": file.size, "crc32c": file.crc32c} for file in self.files],
        }


def _copy(source: BrokerPaths, broker: Broker, partial: Path) -> _Copied:
    """Copy every segment up to what is durable now. A crash leaves ``*.partial``, which nobody takes for a backup.

    A store whose disk has failed never gets durable what came since: that is copied from memory.
    """
    region = broker.region
    end = _wait_flushed(region)
    in_memory = region.get("tail") if region.get("store_state") == STORE_READ_ONLY else end
    stored = StoredLog(source, region)
    stored.close()
    shutil.rmtree(partial, ignore_errors=True)
    log = BrokerPaths(partial).log
    partial.mkdir(mode=0o700)
    log.mkdir(mode=0o700)
    copies: list[int] = []
    bases = [base for base in stored.bases if base < end or base == stored.bases[0]]
    with console.progress("copying", end - bases[0]) as advance:
        for base in bases:
            # Never a hard link: retention uses old segments again, in place, and would write through it.
            if _copy_segment(source.log, log, base, min(end, base + stored.segment_bytes), stored, advance):
                copies.append(base)
            elif copies:
                raise Failure(f"segment {segment_name(base)} vanished from the middle of the log", ExitCode.OPERATOR)
    settings = source.directory / FILE_NAME
    if settings.exists():
        shutil.copyfile(settings, partial / FILE_NAME)
    _append_from_memory(region, log, end, in_memory, stored)
    names = [segment_name(base) for base in list_segments(log)]
    files = [_File(f"log/{name}", (log / name).stat().st_size, _crc(log / name)) for name in names]
    return _Copied(copies[0], in_memory, in_memory - end, stored.segment_bytes, stored.store, files)


def _wait_flushed(region: Region) -> int:
    """Wait until everything sent so far is on the disk, or never will be. Returns the position up to which it is."""
    tail, deadline = region.get("tail"), time.monotonic() + _FLUSH_SECONDS
    while region.get("flushed") < tail and region.get("store_state") != STORE_READ_ONLY:
        with suppress(StoreReadOnly):
            region.wait_for("flushed", tail, _LOOK_NS)
        if time.monotonic() > deadline:
            raise Failure(f"position {tail} did not reach the disk within {_FLUSH_SECONDS:.0f} s", ExitCode.RETRY_LATER)
    return region.get("flushed")


def _append_from_memory(region: Region, log: Path, start: int, end: int, stored: StoredLog) -> None:
    """Write [start, end) from the ring, which keeps what is not flushed, behind what was copied."""
    view, position = region.ring_view(), start
    while position < end:
        base = position - position % stored.segment_bytes
        stop = min(end, base + stored.segment_bytes)
        at = position & (region.ring_bytes - 1)
        if (log / segment_name(base)).exists():
            segment = Segment.open(log / segment_name(base), stored.segment_bytes, stored.store, writable=True)
        else:
            header = SegmentHeader(base, stored.segment_bytes, region.get("epoch"), stored.store)
            segment = Segment.create(log, header)
        try:
            pwrite_all(segment.fd, view[at : at + stop - position], segment.offset(position))
        finally:
            segment.close()
        position = stop


def _copy_segment(
    source: Path, target: Path, base: int, end: int, stored: StoredLog, advance: Callable[[float], None]
) -> bool:
    """Copy one segment up to position ``end``; the rest stays a hole of zeros. False if retention has just taken it."""
    name = segment_name(base)
    try:
        segment = Segment.open(source / name, stored.segment_bytes, stored.store)
    except FileNotFoundError:
        return False
    try:
        used = SEGMENT_HEADER_BYTES + end - base
        with (target / name).open("xb") as copy:
            os.fchmod(copy.fileno(), 0o600)
            done = 0
            while done < used:
                piece = os.pread(segment.fd, min(_PIECE_BYTES, used - done), done)
                if not piece:
                    raise Failure(f"{source / name} is shorter than its header says", ExitCode.OPERATOR)
                copy.write(piece)
                done += len(piece)
                advance(len(piece))
            copy.truncate(SEGMENT_HEADER_BYTES + stored.segment_bytes)
        if _moved(segment):  # used again while we read: what we have is neither the one nor the other
            (target / name).unlink()
            return False
    finally:
        segment.close()
    return True


def _moved(segment: Segment) -> bool:
    try:
        return segment.moved()
    except SegmentError:
        return True  # its header is being written anew


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            yield piece


def _crc(path: Path) -> int:
    crc = 0
    for piece in _pieces(path):
        crc = crc32c(piece, crc)
    return crc


def _verify(partial: Path, end: int) -> int:
    """Read the copy as ``log verify`` does. Returns the number of messages in it."""
    copy = StoredLog(BrokerPaths(partial))
    with console.progress("verifying", copy.limit - copy.first) as advance:
        verdict = copy.verify(advance)
    copy.close()
    if not verdict.sound or verdict.end != end:
        places = [f"{damage.position} ({damage.what})" for damage in verdict.damages] or [str(verdict.end)]
        raise Failure(
            f"{partial} does not hold: {', '.join(places)}; is the source damaged? `log verify` it", ExitCode.OPERATOR
        )
    return verdict.messages


def _sync(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    sync_directory(directory)
