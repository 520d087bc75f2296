"""A broker's directory is had by one supervisor at a time: go there, and take it, or say who has it.

nobody has it                        taken
its holder is starting or stopping   waited for
it is served                         DirectoryTaken, at once
it is embedded                       ``serve`` waits until its last client has left, and names those that have not;
                                     for an opener that is no error, but somebody to attach to
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from shmbroker import memory, process
from shmbroker._native._core import Region
from shmbroker.errors import AttachRefused, NotReady, ShmBrokerError
from shmbroker.naming import BrokerPaths

TAKE_TIMEOUT: Final = 30.0  # seconds: a predecessor may have to flush
_LOOK_SECONDS: Final = 0.2
_ENDING: Final = (memory.STATE_DRAINING, memory.STATE_STOPPED)


class DirectoryTaken(NotReady):
    """Another process has the directory. The message says which, and what to do."""


def enter(paths: BrokerPaths) -> BrokerPaths:
    """Make the directory if there is none, and go there. Raises OSError, and AttachRefused if it is another's.

    To whom the memory would belong, and who then could not remove it.
    """
    paths.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    inside = paths.enter()
    owner = inside.root.stat().st_uid
    if owner != os.geteuid():
        raise AttachRefused(
            f"{paths.directory} belongs to user {owner}, this process runs as user {os.geteuid()}: start the broker as "
            "the directory's owner"
        )
    return inside


def take(
    paths: BrokerPaths, *, embedded: bool, tell: Callable[[str], None], give_up: Callable[[], bool]
) -> process.DirectoryLock:
    """The directory's lock, for life. ``tell`` is told what is waited for. Raises DirectoryTaken."""
    lock = process.DirectoryLock(paths)
    deadline = time.monotonic() + TAKE_TIMEOUT
    told = ""
    while not lock.acquire(_LOOK_SECONDS if told else 0.0):
        reason, passing = _obstacle(paths, embedded=embedded)
        if not passing or time.monotonic() > deadline or give_up():
            lock.close()
            raise DirectoryTaken(reason)
        if reason != told:
            tell(f"{reason} (waiting up to {TAKE_TIMEOUT:g} s)")
            told = reason
    return lock


def _obstacle(paths: BrokerPaths, *, embedded: bool) -> tuple[str, bool]:
    """Who has the directory, with the remedy; and whether that may be over soon."""
    holder = process.lock_holder(paths.lock)
    who, place = f"process {holder}" if holder > 0 else "another process", paths.directory
    region = _look(paths)
    state = region.get("state") if region is not None else memory.STATE_STARTING
    if state in _ENDING:
        return f"{who} is just stopping the broker of {place}", True
    if region is None or state != memory.STATE_RUNNING:  # or what is left of a directory whose broker is leaving it
        return f"{who} is starting or repairing {place}", not embedded or holder == 0
    if not region.get("embedded"):
        return f"{who} serves {place} already: to replace it, stop it first (kill {holder})", False
    clients = ", ".join(f"{client['pid']} ({client['name']})" for client in memory.living_clients(region))
    if clients:
        remedy = "end them, and start `shmbroker serve` before what opens the directory: that attaches to it then"
        return f"the broker of {place} is embedded in these processes: {clients}; {remedy}", not embedded
    return f"the embedded broker of {place}, {who}, stops when its grace is over", not embedded


def _look(paths: BrokerPaths) -> Region | None:
    try:
        attached = memory.attach(paths)
    except ShmBrokerError:  # what a killed broker left
        return None
    return attached[0] if attached is not None else None
