"""What a dead process held goes back at once; what a stopped one holds is named.

The janitor holds a pidfd of every attached process. The kernel makes it readable when the process has died and its
memory is released, so claims, wait slots and client slot are free within a millisecond, whoever was killed how.
Nothing is taken from a process that is merely slow. Every TICK_SECONDS, and at every death, it also does what a killed
or stopped process may have left undone: expired claims, wake-ups, a lock whose owner died (R6, R12).
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from shmbroker import process
from shmbroker._native._core import Region
from shmbroker.failpoint import failpoint

TICK_SECONDS: Final = 0.020
STOPPED_HOLDER_SECONDS: Final = 0.2  # a holder is looked at when it has kept the append lock so long


class _Watched(NamedTuple):
    slot: int
    generation: int
    pid: int
    name: str


class Janitor:
    """Watches the processes attached to one region. One thread uses it."""

    def __init__(self, region: Region, log: logging.Logger, *, kill_stopped_holder: bool) -> None:
        self._region = region
        self._log = log
        self._kill_stopped_holder = kill_stopped_holder
        self._deaths = select.epoll()  # what a look costs does not depend on how many live
        self._watched: dict[int, _Watched] = {}  # by pidfd
        self._states = b""  # of the client slots when all of them were watched; empty: one is to be looked at again
        self._turn = 0
        self._holder = 0  # thread id seen holding the append lock, since when, and whether it was reported
        self._holder_since = 0.0
        self._holder_reported = False

    def turn(self) -> None:
        """Look for new clients, do what is due, then wait for a death or the next tick."""
        self._watch_new_clients()
        _, next_deadline_ns = self._region.janitor_pass(time.monotonic_ns(), self._turn)
        self._turn = (self._turn + 1) % 2**32
        self._look_at_lock_holder()
        pause = TICK_SECONDS if next_deadline_ns < 0 else min(TICK_SECONDS, next_deadline_ns / 1e9)
        for pidfd, _ in self._deaths.poll(pause):
            self._reap(pidfd)

    def close(self) -> None:
        """Give up watching."""
        for pidfd in self._watched:
            os.close(pidfd)
        self._watched.clear()
        self._deaths.close()

    def _watch_new_clients(self) -> None:
        states = self._region.client_states()
        if states != self._states:  # else there is nobody new: fifty clients are not to cost anything while they sleep
            self._states = states if self._watch_all() else b""

    def _watch_all(self) -> bool:
        """Watch each live client, and take back what the dead have left. False: some slot is to be looked at again."""
        known = {(client.slot, client.generation) for client in self._watched.values()}
        alive = set()
        for entry in self._region.clients():
            client = _Watched(entry["slot"], entry["generation"], entry["pid"], entry["name"])
            alive.add((client.slot, client.generation))
            if (client.slot, client.generation) in known:
                continue
            if not entry["live"]:  # joining or leaving: its start ticks may be old, so only the pid can say it is dead
                if not process.exists(client.pid):
                    self._take_back(client)
                continue
            pidfd = process.open_pidfd(client.pid, entry["start_ticks"])
            if pidfd is None:  # dead before we came, or while another janitor was
                self._take_back(client)
                continue
            self._watched[pidfd] = client
            self._deaths.register(pidfd, select.EPOLLIN)
        for pidfd in [fd for fd, client in self._watched.items() if (client.slot, client.generation) not in alive]:
            self._forget(pidfd)  # it closed its handle and lives on
        return alive == {(client.slot, client.generation) for client in self._watched.values()}

    def _reap(self, pidfd: int) -> None:
        self._take_back(self._forget(pidfd))

    def _take_back(self, client: _Watched) -> None:
        failpoint("janitor.death_seen")  # the slot is still LIVE with a dead pid: the next janitor finds it
        released = self._region.reap(client.slot, client.generation)
        failpoint("janitor.reaped")
        self._log.info("process %d (%s) has died: %d claims released", client.pid, client.name, released)

    def _forget(self, pidfd: int) -> _Watched:
        self._deaths.unregister(pidfd)
        os.close(pidfd)
        return self._watched.pop(pidfd)

    def _look_at_lock_holder(self) -> None:
        holder = self._region.lock_holder()
        now = time.monotonic()
        if holder == 0 or holder != self._holder:
            self._holder, self._holder_since, self._holder_reported = holder, now, False
        elif now - self._holder_since >= STOPPED_HOLDER_SECONDS and not self._holder_reported and is_stopped(holder):
            self._holder_reported = True
            self._report(thread_group(holder))

    def _report(self, pid: int) -> None:
        pidfd = next((fd for fd, client in self._watched.items() if client.pid == pid), None)
        if pidfd is not None and self._kill_stopped_holder:
            self._log.warning(
                "process %d was stopped holding the append lock: killed, as stopped_lock_holder says", pid
            )
            with suppress(PermissionError):  # another user's, of a shared broker
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        else:
            self._log.warning("process %d is stopped and holds the append lock: nobody can send until it goes on", pid)


def is_stopped(thread: int) -> bool:
    """True if that thread is stopped by a signal or a debugger."""
    return _status_field(thread, "State").startswith(("T", "t"))


def thread_group(thread: int) -> int:
    """The process that a thread belongs to; the thread's own id if it has gone."""
    return int(_status_field(thread, "Tgid") or thread)


def _status_field(thread: int, name: str) -> str:
    try:
        lines = Path(f"/proc/{thread}/status").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:")), "")
