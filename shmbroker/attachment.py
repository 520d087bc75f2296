"""How a process comes to a running broker, and keeps one running.

    RUNNING                      attach
    STARTING, DRAINING           wait: for the one to be ready, for the other to be gone
    nobody holds the lock        start a supervisor (detached) and wait for its report; killed before it: another

The supervisor's lock, not a file or a word, says whether one lives; who loses the race for it attaches to the winner.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from shmbroker import errors, interpreter, memory, process
from shmbroker._native._core import Client, Region
from shmbroker.config import Config
from shmbroker.descriptor import Descriptor, directory_identity, read_descriptor
from shmbroker.errors import AttachRefused, BrokerClosed, ConfigConflict, LayoutMismatch, NotReady, ShmBrokerError
from shmbroker.failpoint import ENVIRONMENT_KEY
from shmbroker.interpreter import INTERPRETER_KEY
from shmbroker.naming import BrokerPaths

OPEN_TIMEOUT: Final = 60.0  # seconds: a predecessor may have to flush and stop, a long log to be scanned
_POLL_SECONDS: Final = 0.002
_RETRY_SECONDS: Final = 2.0  # between two tries to start a supervisor that cannot be started for now
_KILLED_PAUSE_SECONDS: Final = 0.05  # behind the first that was killed while it started; twice that behind the second
_STAGGER_SECONDS: Final = 0.2  # about what a supervisor needs to take the lock

log = logging.getLogger("shmbroker")


class Attachment:
    """This process's place in a running broker: memory, client slot, pidfd of the supervisor."""

    def __init__(self, region: Region, descriptor: Descriptor, client: Client, supervisor: int) -> None:
        self.region = region
        self.descriptor = descriptor
        self.client = client
        self.pid = os.getpid()
        self._embedded = bool(region.get("embedded"))
        self.supervisor = supervisor  # closed by keep_supervised
        self.superseded = False
        self.left = os.eventfd(0, os.EFD_CLOEXEC)  # readable once this process has left; closed by keep_supervised

    @property
    def embedded(self) -> bool:
        """Whether the broker lives by its clients. No longer, once a ``serve`` has taken it over."""
        if not self.region.closed:
            self._embedded = bool(self.region.get("embedded"))
        return self._embedded

    def is_gone(self) -> bool:
        """True in a forked child, and when the broker has stopped or works on other memory by now."""
        if self.pid != os.getpid() or self.region.closed or self.superseded:
            return True
        return bool(self.region.get("state") == memory.STATE_STOPPED)

    def is_current(self, paths: BrokerPaths) -> bool:
        """False once the directory's descriptor names other memory, or none: nobody will serve this one again."""
        descriptor = read_descriptor(paths)
        return descriptor is not None and descriptor.instance == self.descriptor.instance

    def supersede(self) -> None:
        """Nobody serves this memory any more: refuse to send into it. Never STOPPED, which says that it is flushed."""
        self.superseded = True
        self.region.set("state", memory.STATE_DRAINING)

    def is_in_place(self, paths: BrokerPaths) -> bool:
        """False once the broker's directory was removed or moved: what may lie at its path is not this broker's."""
        try:
            return directory_identity(paths) == self.descriptor.directory
        except OSError:
            return False

    def close(self) -> None:
        """Leave the broker; in a forked child only forget it, since the slot is the parent's."""
        if self.pid == os.getpid() and not self.region.closed:
            self.client.close()
            self.region.close()
            os.eventfd_write(self.left, 1)


def connect(paths: BrokerPaths, wanted: Config, timeout: float, *, may_start: bool = True) -> Attachment:
    """Attach to the broker of a directory; if nobody serves it, start it, or with ``may_start=False`` wait for one."""
    deadline = time.monotonic() + timeout
    killed = 0  # supervisors of ours
    while True:
        attached = None
        try:
            attached = _attach(paths, wanted)
        except (LayoutMismatch, AttachRefused):
            if not _is_abandoned(paths):
                raise  # else it is what a killed broker left, and the next supervisor knows what to do with it
        if attached is not None:
            return attached
        holder = process.lock_holder(paths.lock)
        if time.monotonic() > deadline:
            raise NotReady(_why_not_ready(paths, holder, timeout, killed))
        if holder == 0 and may_start:
            if not start_supervisor(paths, wanted, deadline, armed=not killed):
                killed += 1
                log.warning("the supervisor of %s was killed while it started: starting another", paths.directory)
                time.sleep(max(0.0, min(killed * _KILLED_PAUSE_SECONDS, deadline - time.monotonic())))
        elif holder < 0:
            raise AttachRefused(
                f"the broker of {paths.directory} runs in another pid namespace: start the containers with "
                "--pid=container:NAME and --ipc=container:NAME"
            )
        else:
            time.sleep(_POLL_SECONDS)  # STARTING or DRAINING: of another process's making, so nothing to wait on


def await_service(paths: BrokerPaths, attached: Attachment, timeout: float, *, may_start: bool) -> bool:
    """While the broker is DRAINING, wait: True once it serves the same memory again, False if that is given up.

    Raises NotReady after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while (state := attached.region.get("state")) == memory.STATE_DRAINING:
        if not attached.is_in_place(paths) or not attached.is_current(paths):
            return False
        holder = process.lock_holder(paths.lock)
        if time.monotonic() > deadline:
            raise NotReady(_why_not_ready(paths, holder, timeout))
        if may_start and holder == 0:  # its supervisor was killed on the way
            start_supervisor(paths, Config.of(attached.descriptor.settings), deadline, armed=False)
        time.sleep(_POLL_SECONDS)
    return bool(state == memory.STATE_RUNNING)


def _why_not_ready(paths: BrokerPaths, holder: int, timeout: float, killed: int = 0) -> str:
    """What was waited for, and who can do something about it."""
    place = paths.directory
    if killed and holder <= 0:
        return (
            f"{killed} supervisors were killed while they started, for {place} within {timeout:.3g} s: the kernel's "
            f"log says if for want of memory, {paths.worker_log('supervisor')} how far they came"
        )
    if holder > 0:
        return (
            f"process {holder} is starting or stopping the broker of {place}, not ready within {timeout:.3g} s: "
            f"{paths.worker_log('supervisor')} says how far it is; `ps` shows if it is stopped"
        )
    return (
        f"nobody serves {place}, and nobody came within {timeout:.3g} s: start `shmbroker serve -d {place}` again; "
        "what the broker has accepted is kept"
    )


def _is_abandoned(paths: BrokerPaths) -> bool:
    try:
        return process.lock_holder(paths.lock) == 0
    except PermissionError:
        return False


def _attach(paths: BrokerPaths, wanted: Config) -> Attachment | None:
    """Register with a running broker, or None if it is not (or no longer) running."""
    found = memory.attach(paths)
    if found is None:
        return None
    region, descriptor = found
    supervisor = process.open_pidfd(region.get("supervisor_pid"), region.get("supervisor_start_ticks"))
    if supervisor is None:
        return None
    try:
        if region.get("state") == memory.STATE_RUNNING:
            _refuse_conflict(wanted, descriptor)
            client = Client(region, Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python")
            # Registered first, looked at again after; the supervisor refuses senders first and counts clients after.
            if region.get("state") == memory.STATE_RUNNING:
                attached = Attachment(region, descriptor, client, supervisor)
                supervisor = None
                return attached
            client.close()
        return None
    finally:
        if supervisor is not None:
            os.close(supervisor)


def _refuse_conflict(wanted: Config, descriptor: Descriptor) -> None:
    asked = wanted.as_dict()
    for key in sorted(wanted.given):
        if asked[key] != descriptor.settings.get(key):
            raise ConfigConflict(
                f"{key} = {asked[key]!r}: the running broker was started with {descriptor.settings.get(key)!r}; "
                "leave the setting out, or stop the broker first"
            )


def keep_supervised(paths: BrokerPaths, attached: Attachment) -> None:
    """The thread of an embedded broker's handle: when the supervisor dies, start another with the same settings.

    Every client does so; the lock lets one win, and the others give it time by their rank. Of a broker that is served
    by somebody's process manager it only waits for the end.
    """
    supervisor: int | None = attached.supervisor
    while supervisor is not None:
        left = _has_left(attached, supervisor)
        os.close(supervisor)
        supervisor = None if left or not attached.embedded else _find_successor(paths, attached)
    _has_left(attached, None)
    os.close(attached.left)


def _has_left(attached: Attachment, supervisor: int | None, timeout: float | None = None) -> bool:
    """Wait until this process leaves the broker (True), the supervisor dies, or ``timeout`` seconds have passed."""
    poll = select.poll()
    poll.register(attached.left, select.POLLIN)
    if supervisor is not None:
        poll.register(supervisor, select.POLLIN)
    return attached.left in {fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000)}


def _find_successor(paths: BrokerPaths, attached: Attachment) -> int | None:
    """A pidfd of the successor; None if the broker has stopped, or its memory has been given up.

    What hinders it may pass (no descriptors, no room, no processes): tried again until this process leaves. Meanwhile
    sends go on into the memory, which every later start takes over, until the ring is full.
    """
    complained = ""
    while True:
        try:
            return _replace_supervisor(paths, attached)
        except BrokerClosed:  # this process has left meanwhile
            return None
        except (ShmBrokerError, OSError) as error:
            if str(error) != complained:
                complained = str(error)
                log.warning("the broker of %s cannot be restarted, trying again: %s", paths.directory, error)
        if _has_left(attached, None, _RETRY_SECONDS):
            return None


def _replace_supervisor(paths: BrokerPaths, attached: Attachment) -> int | None:
    region = attached.region
    if region.get("state") == memory.STATE_STOPPED or not attached.is_in_place(paths):
        return None
    if attached.is_current(paths):
        rank = sum(other["slot"] < attached.client.slot for other in region.clients())
        successor = _succeed(paths, Config.of(attached.descriptor.settings), rank)
        if attached.is_current(paths):
            return successor
        os.close(successor)
    attached.supersede()
    return None


def _succeed(paths: BrokerPaths, settings: Config, rank: int) -> int:
    """A pidfd of the next supervisor, started by us if nobody of a lower rank does. Raises NotReady."""
    deadline = time.monotonic() + OPEN_TIMEOUT
    may_start_at = time.monotonic() + rank * _STAGGER_SECONDS
    may_start = is_owner(paths)  # who shares a directory waits for its owner's processes to do it
    while time.monotonic() < deadline:
        found = memory.attach(paths)
        if found is not None:
            pidfd = process.open_pidfd(found[0].get("supervisor_pid"), found[0].get("supervisor_start_ticks"))
            if pidfd is not None:
                return pidfd
        our_turn = may_start and process.lock_holder(paths.lock) == 0 and time.monotonic() >= may_start_at
        if our_turn and not start_supervisor(paths, settings, deadline, armed=False):
            raise NotReady("the supervisor was killed while it started")
        time.sleep(_POLL_SECONDS)
    raise NotReady(_why_not_ready(paths, process.lock_holder(paths.lock), OPEN_TIMEOUT))


def is_owner(paths: BrokerPaths) -> bool:
    """Whether this process may start the broker: only the directory's owner can remove the memory of a former one."""
    return paths.directory.stat().st_uid == os.geteuid()


def start_supervisor(paths: BrokerPaths, config: Config, deadline: float, *, armed: bool = True) -> bool:
    """Start a detached supervisor and wait for its report. One that finds the directory served is no error.

    False: it was killed before it could report, and left nothing that hinders another. Raises what it reports.
    """
    text, code = _run_supervisor(paths, config, deadline, armed)
    while code == -signal.SIGINT and time.monotonic() < deadline:
        # A Ctrl-C at the terminal, meant for us, in the instant before it had a session of its own.
        text, code = _run_supervisor(paths, config, deadline, armed)
    if text is None:
        raise NotReady(f"the supervisor did not report in time; {paths.worker_log('supervisor')} says how far it is")
    outcome = _parse_report(text)
    if outcome is None and code > 0:
        python = f"{interpreter.interpreter()}; {INTERPRETER_KEY} names another"
        raise NotReady(f"the supervisor failed: {(text.splitlines() or [f'exit code {code}'])[-1]} (run by {python})")
    if outcome is not None and "error" in outcome:  # "taken" is none: the race is lost, and the winner is attached to
        _raise_reported(outcome, paths)
    return outcome is not None


def _run_supervisor(paths: BrokerPaths, config: Config, deadline: float, armed: bool) -> tuple[str | None, int]:
    """What it says until it serves, or ends before that (None: neither in time), and its first process's exit code."""
    environment = interpreter.environment()
    if not armed:
        environment.pop(ENVIRONMENT_KEY, None)  # a crash under test happens once: see failpoint.py
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    try:
        child = subprocess.Popen(
            interpreter.command("shmbroker.workers.supervisor", str(paths.directory), "--embedded", str(write_fd)),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=write_fd,  # until its log is open
            pass_fds=(write_fd,),
            env=environment,
            start_new_session=True,  # a Ctrl-C at the terminal is our affair: it must not end whom others may need, too
        )
        os.close(write_fd)
        write_fd = -1
        assert child.stdin is not None
        with suppress(BrokenPipeError), child.stdin:  # if it died at once, its report says why
            child.stdin.write(json.dumps(config.chosen_settings()).encode())
        text = _read_report(read_fd, deadline)
        if text is None:
            child.kill()  # stopped, or very slow, before it has forked the supervisor; else that goes on
        return text, child.wait()
    finally:
        os.close(read_fd)
        if write_fd >= 0:
            os.close(write_fd)


def _read_report(fd: int, deadline: float) -> str | None:
    """All that the supervisor says until it closes the pipe, or dies; None if it does neither in time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    text = b""
    while time.monotonic() < deadline:
        if poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            piece = os.read(fd, 65536)
            if not piece:
                return text.decode(errors="replace")
            text += piece
    return None


def _parse_report(text: str) -> dict[str, Any] | None:
    """The last line, if it is a report: else the supervisor was killed, or it could not even begin and says why."""
    try:
        return dict(json.loads(text.splitlines()[-1]))
    except (ValueError, IndexError):
        return None


def _raise_reported(outcome: Mapping[str, Any], paths: BrokerPaths) -> None:
    """Raise here what the supervisor met there."""
    name, message = str(outcome["error"]), str(outcome["message"])
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, ShmBrokerError):
        raise kind(message if str(paths.directory) in message else f"{message} (in {paths.directory})")
    raise NotReady(f"the supervisor failed: {name}: {message}; {paths.worker_log('supervisor')} has more")
