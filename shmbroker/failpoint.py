"""Failpoints: named places where a test makes a process die, stop, leave, fail or dawdle.

    SHMBROKER_FAILPOINTS="flusher.after_pwrite=kill@3;janitor/append.copied=stop;flusher.before_fdatasync=errno:EIO@2+"

``[role/]name=action[@pass[+]]``: only in processes of that role (``client`` for those that are no worker), at that
pass (default the first; with ``+`` at every later one too). Unarmed, ``failpoint`` is one test of an empty dict. A
worker that the supervisor restarts starts unarmed, so that a crash under test happens once and recovery can be seen.

    kill       SIGKILL to this process
    stop       SIGSTOP to this process; a test sends SIGCONT
    exit       leave at once, without clean-up, with FAILPOINT_EXIT_CODE
    errno:E    raise OSError with that errno
    sleep:MS   wait
    torn:N     returned to the caller, which writes N bytes of what it was about to write, then calls ``die``

Names inside the native core (``_core.failpoint_names``) are armed there; they know kill, stop and exit.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass
from typing import Final, NoReturn

from shmbroker.errors import ConfigError

ENVIRONMENT_KEY: Final = "SHMBROKER_FAILPOINTS"
FAILPOINT_EXIT_CODE: Final = 77

# Every name used in Python, and the state it is passed in.
FAILPOINTS: Final[dict[str, str]] = {
    "flusher.before_pwrite": "bytes of the ring chosen, nothing written",
    "flusher.pwrite": "the write itself: torn:N writes a part of it",
    "flusher.after_pwrite": "written, not synced: the disk may hold any part of it",
    "flusher.before_fdatasync": "as after_pwrite; errno:EIO is a failing disk",
    "flusher.after_fdatasync": "durable, but flushed is old and nobody has been told",
    "flusher.after_publish": "flushed is new and its waiters are posted",
    "segment.retired": "an old segment has a temporary name: its log is gone, it is not used again yet",
    "segment.created": "file made under its temporary name, no blocks",
    "segment.allocated": "blocks allocated, header written, nothing synced",
    "segment.synced": "synced, still under its temporary name",
    "segment.renamed": "under its own name, directory not synced",
    "segment.ready": "usable, its blocks not written yet",
    "segment.half_filled": "some steps of zeros written and synced",
    "checkpoint.half_written": "one of the two copies is new, not synced",
    "checkpoint.synced": "one copy is new and durable",
    "dispatcher.before_queues": "records read, consume queues old",
    "dispatcher.after_queues": "some consume queues longer than dispatched says",
    "dispatcher.before_index": "consume queues written, key index old",
    "dispatcher.after_index": "key index committed, dispatched old",
    "dispatcher.after_publish": "dispatched is new",
    "dispatcher.progress_written": "progress records appended, not flushed",
    "dispatcher.snapshot_begun": "a snapshot's begin record stands alone",
    "dispatcher.kept_noted": "the checkpoint gives segments up, the memory does not yet",
    "dispatcher.snapshot_ended": "snapshot complete, its position not yet noted",
    "scheduler.before_fire": "timers are due and their records read, nothing appended",
    "scheduler.after_fire": "appended with their FIRED record, the scheduler has not noted it",
    "scheduler.before_commit": "the timer index is behind what the scheduler knows",
    "scheduler.after_commit": "the timer index is new, retention has not been told",
    "scheduler.carried": "timers appended anew and their old records done with, the scheduler has not noted it",
    "recall.before_append": "the timer was pending, its RECALL record not appended",
    "recall.after_append": "recalled in the log, not flushed, the caller not told",
    "recovery.scanned": "the log's end is known, nothing changed",
    "recovery.removed": "segments behind the end are gone, directory not synced",
    "recovery.tail_zeroed": "all behind the last whole record is zeros and synced",
    "recovery.checkpoint_lowered": "the checkpoint no longer claims what a cut group held",
    "recovery.cut": "the torn group is zeros, not synced",
    "recovery.done": "the log is clean on disk, no memory yet",
    "supervisor.sealed": "nobody can append to memory of another version any more, nothing saved",
    "memory.objects_created": "two empty objects, no descriptor names them",
    "memory.allocated": "two whole objects, no descriptor names them",
    "memory.formatted": "memory formatted, no descriptor names it",
    "memory.descriptor_written": "descriptor under its temporary name",
    "memory.descriptor_renamed": "descriptor names the memory, state STARTING",
    "locks.made": "the semaphores of the queues exist, for their maker alone",
    "locks.shared": "likewise, for all whom the directory is open to",
    "memory.locks_removed": "the semaphores of the queues gone, the memory still there",
    "memory.ring_unlinked": "one object gone, descriptor still there",
    "memory.unlinked": "both objects gone, descriptor still there",
    "supervisor.locked": "directory lock held, nothing looked at",
    "supervisor.restored": "definitions and progress in memory, epoch record not written",
    "supervisor.epoch_written": "epoch record appended, state STARTING",
    "supervisor.running": "state RUNNING, opener not told",
    "supervisor.draining": "state DRAINING, workers not told",
    "supervisor.drained": "everything flushed, checkpoint clean, state STOPPED",
    "consumer.acks_appended": "acknowledged in memory, the progress record appended, not flushed",
    "consumer.claimed": "messages claimed, their attempts in memory only, nobody has them",
    "consumer.attempts_appended": "the same, with the progress record appended, not flushed",
    "consumer.attempts_flushed": "attempts on the disk, nobody has the messages",
    "retry.topic_made": "%RETRY% or %DLQ% is defined, nothing moved, sleeping members not told",
    "retry.moved": "copy and acknowledgement are there, not flushed, sleeping members not told",
    "janitor.death_seen": "a client's death is known, nothing taken back",
    "janitor.reaped": "its claims, waiters and slot are free",
}


@dataclass(slots=True)
class _Armed:
    action: str
    argument: int
    at: int
    onwards: bool
    passes: int = 0


_armed: dict[str, _Armed] = {}


def failpoint(name: str) -> int | None:
    """Do what is armed at this place, usually nothing. Returns N if ``torn:N`` is due, else None."""
    if not _armed:
        return None
    point = _armed.get(name)
    if point is None:
        if name not in FAILPOINTS:
            raise ConfigError(f"failpoint {name!r} is not in the registry")
        return None
    point.passes += 1
    if point.passes != point.at and not (point.onwards and point.passes > point.at):
        return None
    return _act(name, point)


def _act(name: str, point: _Armed) -> int | None:
    match point.action:
        case "kill":
            die()
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(FAILPOINT_EXIT_CODE)
        case "errno":
            raise OSError(point.argument, f"{os.strerror(point.argument)} (failpoint {name})")
        case "sleep":
            time.sleep(point.argument / 1000)
        case "torn":
            return point.argument
    return None


def die() -> NoReturn:
    """SIGKILL this process: no handler, no clean-up, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)
    while True:  # the signal is delivered before kill returns to a single thread; another thread may be here first
        signal.pause()


def arm(text: str, role: str) -> None:
    """Arm the failpoints that ``text`` names for processes of ``role``. Raises ConfigError and then arms nothing."""
    from shmbroker._native import _core

    native = set(_core.failpoint_names())
    python: dict[str, _Armed] = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        where, name, point = _parse(item)
        if name not in FAILPOINTS and name not in native:
            raise ConfigError(f"failpoint {name!r} does not exist; `shmbroker failpoints` lists them")
        if where not in ("", role):
            continue
        if name in FAILPOINTS:
            python[name] = point
        elif point.action in ("kill", "stop", "exit") and not point.onwards:
            _core.failpoint_arm(name, point.action, point.at)
        else:
            raise ConfigError(f"failpoint {item!r}: a native one knows only kill, stop and exit, at one pass")
    _armed.clear()
    _armed.update(python)


def arm_from_environment(role: str) -> None:
    """Arm what SHMBROKER_FAILPOINTS says; called once, when a worker or a broker handle starts."""
    if text := os.environ.get(ENVIRONMENT_KEY):
        arm(text, role)


def _parse(item: str) -> tuple[str, str, _Armed]:
    target, _, what = item.partition("=")
    where, _, name = target.strip().rpartition("/")
    action, _, count = what.strip().partition("@")
    action, _, argument = action.partition(":")
    onwards = count.endswith("+")
    try:
        at = int(count.rstrip("+") or 1)
        number = 0
        if action == "errno":
            number = getattr(errno, argument)
        elif action in ("sleep", "torn"):
            number = int(argument)
        elif action not in ("kill", "stop", "exit") or argument:
            raise ValueError(action)
        if at < 1 or number < 0:
            raise ValueError(item)
    except (ValueError, AttributeError):
        raise ConfigError(
            f"failpoint {item!r}: expected [role/]name=kill|stop|exit|errno:NAME|sleep:MS|torn:BYTES[@pass[+]]"
        ) from None
    return where, name, _Armed(action, number, at, onwards)


def listing() -> list[tuple[str, str]]:
    """Every failpoint, Python's and the native core's, with the state it is passed in; sorted by name."""
    from shmbroker._native import _core

    native = [(name, "native core; see failpoint.h") for name in _core.failpoint_names()]
    return sorted([*FAILPOINTS.items(), *native])
