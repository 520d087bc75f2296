"""``shmbroker log``: dump, verify and rebuild."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import click

from shmbroker.errors import TopicNotExist
from shmbroker.tools import console
from shmbroker.tools.command_group import CommandGroup
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Failure, Session, common_options, pass_session

if TYPE_CHECKING:
    from shmbroker._native._core import Record
    from shmbroker.store.rebuild import Rebuilt
    from shmbroker.tools.stored_log import StoredLog, Verdict

REBUILT: Final = "rebuilt.tmp"  # beside the live files, on the same file system
DIFFERENCES_SHOWN: Final = 20
_TAKEN: Final = "the rebuilt files have taken the place of the live ones"


@click.group(cls=CommandGroup)
@common_options
def log() -> None:
    """Look at the commit log itself, whether or not a broker runs.

    \b
    shmbroker log dump --limit 20
    shmbroker log verify
    shmbroker log rebuild
    """


def _open(session: Session) -> StoredLog:
    from shmbroker.tools.stored_log import StoredLog

    paths = session.require_directory()
    found = session.attach()
    return StoredLog(paths, found[0] if found else None)


@log.command()
@common_options
@click.option("--from", "start", type=click.IntRange(0), help="Position to begin at.  [default: the oldest segment]")
@click.option("--to", "end", type=click.IntRange(0), help="Position to stop before.  [default: the end]")
@click.option("--limit", type=click.IntRange(1), help="Leave after so many records.")
@click.option("--kind", help="Only records of this kind: message, topic, progress, ...")
@click.option("--topic", help="Only messages of this topic.")
@click.option("--body/--no-body", default=False, help="Print bodies as well.")
@pass_session
def dump(
    session: Session,
    start: int | None,
    end: int | None,
    limit: int | None,
    kind: str | None,
    topic: str | None,
    body: bool,
) -> int:
    """Print the records of the log, one line each.

    \b
    shmbroker log dump --from 1048576 --limit 10 --body
    shmbroker log dump --topic orders
    shmbroker --json log dump --kind topic | jq .body

    Leaves with 1 if it ends at a place where a record should be and is not.
    """
    from shmbroker.record import RecordKind, next_position

    if kind is not None and kind.upper() not in RecordKind.__members__:
        raise click.BadParameter(f"{kind}: one of {', '.join(name.lower() for name in RecordKind.__members__)}")
    stored = _open(session)
    topics = None if topic is None else stored.topic_ids(topic)
    if topics == set():
        raise TopicNotExist(f"topic {topic!r} is not in this log")
    start = stored.first if start is None else stored.align(start)
    end = min(stored.limit if end is None else end, stored.limit)
    position, printed = start, 0
    for record in stored.records(start, end):
        if record.position >= end:
            return ExitCode.OK
        position = next_position(record.position, record.size, stored.segment_bytes)
        of_topic = topics is None or (record.kind == RecordKind.MESSAGE and record.topic_id in topics)
        if of_topic and (kind is None or record.kind == RecordKind[kind.upper()]):
            click.echo(_as_json(record, body) if session.json else _as_line(record, body))
            printed += 1
        if printed == limit:
            return ExitCode.OK
    if position < min(end, stored.durable):
        raise Failure(
            f"no valid record at position {position}; `shmbroker log verify` shows the extent", ExitCode.FINDING
        )
    return ExitCode.OK


def _kind_name(record: Record) -> str:
    from shmbroker.record import RecordKind

    return RecordKind(record.kind).name.lower() if record.kind in list(RecordKind) else str(record.kind)


def _as_line(record: Record, body: bool) -> str:
    parts = [f"{record.position:>14} epoch {record.epoch} {_kind_name(record):<14} {record.size:>7} B"]
    if record.kind == 1:
        parts.append(f"topic {record.topic_id} queue {record.queue_id} offset {record.queue_offset}")
        parts.append(f"id {record.message_id}")
    parts += [f"{name} {value!r}" for name in ("tags", "keys") if (value := getattr(record, name))]
    if record.group_bytes:
        parts.append(f"group of {record.group_bytes} B")
    if record.attempts:
        parts.append(f"attempts {record.attempts}")
    if body:
        parts.append(repr(record.body))
    return "  ".join(parts)


def _as_json(record: Record, body: bool) -> str:
    from shmbroker.tools.receive import body_fields

    fields: dict[str, Any] = {name: getattr(record, name) for name in RECORD_FIELDS} | {"kind": _kind_name(record)}
    return json.dumps(fields | (body_fields(record.body) if body else {}), ensure_ascii=False)


RECORD_FIELDS = (
    "position", "size", "epoch", "flushed", "kind", "flags", "topic_id", "queue_id", "queue_offset", "message_id",
    "born_ns", "group_bytes", "attempts", "tags", "keys", "properties", "crc",
)  # fmt: skip


@log.command()
@common_options
@pass_session
def verify(session: Session) -> int:
    """Read every byte of the log and account for it.

    \b
    shmbroker log verify
    shmbroker --json log verify | jq .damages

    Leaves with 0 if the log is sound, 1 if something durable is damaged: each place is named. A torn end that no sender
    was told to be durable is no damage; the next start cuts it.
    """
    stored = _open(session)
    with console.progress("verifying", stored.limit - stored.first) as advance:
        verdict = stored.verify(advance)
    stored.close()
    report(session, verdict)
    return ExitCode.OK if verdict.sound else ExitCode.FINDING


def report(session: Session, verdict: Verdict) -> None:
    """Print what reading a log has shown."""
    if session.json:
        console.print_json(verdict.as_dict())
        return
    rows = [
        ("positions", f"{verdict.first:,} .. {verdict.end:,}"),
        ("segments", f"{verdict.segments:,}"),
        ("records", f"{verdict.records:,}"),
        ("messages", f"{verdict.messages:,}"),
        ("torn end", console.size(verdict.torn_bytes) if verdict.torn_bytes else "none"),
        ("damaged places", f"{len(verdict.damages):,}"),
    ]
    console.table("", ["log", ""], rows)
    for damage in verdict.damages:
        click.secho(f"! {damage.position:,} .. {damage.end:,} ({damage.path}): {damage.what}", fg="red")


@log.command()
@common_options
@click.option("--replace", is_flag=True, help="Put the rebuilt files in the place of the live ones; no broker may run.")
@pass_session
def rebuild(session: Session, replace: bool) -> int:
    """Make consume queues and key index anew from the log, beside the live ones, and compare them entry by entry.

    \b
    shmbroker log rebuild              # compare only; a broker may run meanwhile
    shmbroker log rebuild --replace    # after stopping the broker

    Leaves with 1 if something differs, 0 if nothing does or the rebuilt files have taken their place.
    """
    paths = session.require_directory()
    derived = (paths.index / "data.mdb").exists()
    if not derived and not replace:
        raise Failure("there is nothing to compare with; --replace makes it from the log", ExitCode.FINDING)
    with _stopped(session) if replace else nullcontext():
        found, rebuilt = _rebuild(session, derived=derived, replace=replace)
    with console.done(_TAKEN) if replace else nullcontext():
        _report_rebuilt(session, rebuilt, found, replaced=replace)
    return ExitCode.FINDING if found and not replace else ExitCode.OK


def _rebuild(session: Session, *, derived: bool, replace: bool) -> tuple[list[dict[str, Any]], Rebuilt]:
    """Differences between live and rebuilt files, and what was rebuilt. The side directory is gone afterwards."""
    from shmbroker.store import rebuild as rebuilder

    paths = session.paths
    stored = _open(session)
    end = stored.dispatched_end()
    side = paths.directory / REBUILT
    shutil.rmtree(side, ignore_errors=True)
    try:
        with console.progress("rebuilding", end - stored.first) as advance:
            done = 0

            def report_progress(position: int, _total: int) -> None:
                nonlocal done
                advance(position - done)
                done = position

            rebuilt = rebuilder.rebuild(
                stored.reader, stored.segment_bytes, stored.store, stored.first, end, side, report_progress
            )
        found = [asdict(difference) for difference in rebuilder.differences(paths, rebuilt)] if derived else []
        if replace:
            rebuilder.swap(paths, rebuilt)
    finally:
        shutil.rmtree(side, ignore_errors=True)
        stored.close()
    return found, rebuilt


@contextmanager
def _stopped(session: Session) -> Iterator[None]:
    """Hold the directory's lock: no broker runs, and none can start meanwhile."""
    from shmbroker import access, process

    paths = session.require_directory()
    paths.run.mkdir(mode=0o700, exist_ok=True)
    access.adopt(paths)  # what is rebuilt is as open as what it replaces
    lock = process.DirectoryLock(paths)
    try:
        if not lock.acquire():
            raise Failure(f"a broker runs in {session.place}; stop it first", ExitCode.RETRY_LATER)
        if session.attach() is not None:
            raise Failure(
                "a killed broker's memory may hold what is not on the disk; start the broker and stop it, then again",
                ExitCode.RETRY_LATER,
            )
        yield
    finally:
        lock.close()


def _report_rebuilt(session: Session, rebuilt: Rebuilt, found: list[dict[str, Any]], *, replaced: bool) -> None:
    counts = {"messages": rebuilt.messages, "index_entries": rebuilt.keys, "first": rebuilt.first, "end": rebuilt.end}
    if session.json:
        console.print_json(counts | {"differences": found, "replaced": replaced})
        return
    rows = [(name.replace("_", " "), f"{count:,}") for name, count in counts.items()]
    console.table("", ["rebuilt", ""], [*rows, ("differences", f"{len(found):,}")])
    click.echo(_TAKEN if replaced else "nothing was changed")
    for difference in found[:DIFFERENCES_SHOWN]:
        click.secho(f"! {difference['what']}: live {difference['live']}, log says {difference['rebuilt']}", fg="red")
    if len(found) > DIFFERENCES_SHOWN:
        click.echo(f"... and {len(found) - DIFFERENCES_SHOWN:,} more; --json lists all")


@log.command()
@common_options
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_session
def repair(session: Session, yes: bool) -> int:
    """Cut a damaged log at its first damaged place. Everything behind that place is lost; copies of it are kept.

    \b
    shmbroker log verify
    shmbroker log repair --yes

    The damaged segment and all behind it stay as SEGMENT.broken beside the log. The broker must not run. A backup is
    the better way, if there is one.
    """
    from shmbroker.config import load
    from shmbroker.store import recovery
    from shmbroker.store.checkpoint import CheckpointFile
    from shmbroker.store.log_end import LogPlace

    with _stopped(session):
        paths = session.paths
        stored = _open(session)
        with console.progress("verifying", stored.limit - stored.first) as advance:
            verdict = stored.verify(advance)
        stored.close()
        if verdict.sound:
            click.echo("the log is sound: nothing to repair", err=session.json)
            return ExitCode.OK
        place_of_cut = min(damage.position for damage in verdict.damages)
        lost = max(verdict.end, verdict.durable) - place_of_cut
        console.confirm(f"Cut the log at position {place_of_cut:,}? {console.size(lost)} are lost.", yes)
        ring_bytes = load(paths.directory).layout.ring_bytes
        place = LogPlace(paths.log, stored.segment_bytes, ring_bytes, stored.store)
        checkpoints = CheckpointFile(paths.checkpoint)
        for file in paths.timers.glob("*"):  # it would say what was in the part that is cut off
            file.unlink()
        end = recovery.repair(place, checkpoints).end
        checkpoints.close()
    cut = f"cut at position {end:,}; what was behind it is in {paths.log}/*{recovery.BROKEN}"
    console.print_done(session, cut, {"end": end, "lost_bytes": lost})
    return ExitCode.OK
