"""What every worker does alike: parse, lock its role, attach, watch the supervisor, log, leave with a named exit code.

A worker module is ``main(argv) -> int`` around a loop:

    def main(argv: Sequence[str] | None = None) -> int:
        return common.run("flusher", serve, argv)

    def serve(worker: common.Worker) -> None:
        while not worker.stopping:
            ...
            worker.sleep(SLEEP_TICK, seen, timeout)

``serve`` leaves soon after ``worker.stopping`` turns true: on SIGTERM or SIGINT, or when the supervisor has died
(``worker.orphaned``). The signal handler and the watching thread post the worker's own semaphore, so a sleep in the
native core ends at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from shmbroker import access, failpoint, memory, process
from shmbroker._native._core import Region, set_process_name
from shmbroker.config import Config
from shmbroker.descriptor import Descriptor
from shmbroker.directory import DirectoryTaken
from shmbroker.errors import ConfigError, NotReady, ShmBrokerError
from shmbroker.leaving import MeantCode
from shmbroker.naming import BrokerPaths


class Exit(MeantCode):
    """How the supervisor and the workers leave: the codes of sysexits.h.

    The supervisor restarts a worker whatever it says; people and process managers read them. docs/operations.md has
    this table.
    """

    OK = os.EX_OK, "stopped cleanly, as told"
    USAGE = os.EX_USAGE, "the command line is wrong"
    NO_BROKER = os.EX_UNAVAILABLE, "no broker runs there, or its supervisor has died"
    BUG = os.EX_SOFTWARE, "a fault of shmbroker; the log has its traceback"
    STORE = os.EX_IOERR, "a person has to act: the message says why; what is not on the disk is kept in memory"
    TAKEN = os.EX_TEMPFAIL, "another process serves the directory or has the role"
    CONFIG = os.EX_CONFIG, "a setting is wrong"


SLEEP_IDLE: Final = 1  # any append ends the sleep
SLEEP_TICK: Final = 2  # only urgent work ends it
SLEEP_TIMER: Final = 3  # a timer that is due before ``timer_look`` ends it

ROLE_LOCK_SLICE: Final = 0.5  # who waits for its role looks so often whether it is still wanted
ATTACH_TIMEOUT: Final = 60.0  # a log may have to be scanned first
_LOOK_SECONDS: Final = 0.005
_ENDING: Final = (memory.STATE_DRAINING, memory.STATE_STOPPED)
_LOG_FORMAT: Final = "%(asctime)s.%(msecs)03d %(process)d %(levelname)s %(message)s"


class Worker:
    """A worker process at work: memory and settings of the running broker, and its log's identity ``store``."""

    def __init__(self, role: str, paths: BrokerPaths, region: Region, descriptor: Descriptor) -> None:
        self.role = role
        self.paths = paths
        self.region = region
        self.config = Config.of(descriptor.settings)
        self.store = bytes.fromhex(descriptor.store)
        self.log = logging.getLogger(f"shmbroker.{role}")
        self.orphaned = False
        self._stop_requested = False

    @property
    def stopping(self) -> bool:
        return self._stop_requested

    @property
    def draining(self) -> bool:
        """True during a clean stop of the broker: nobody appends any more, and what is written now is final."""
        return self.region.get("state") == memory.STATE_DRAINING

    def sleep(self, mode: int, seen_position: int, timeout: float) -> bool:
        """Sleep until there is work, at most ``timeout`` seconds; True if something was posted or ``tail`` moved."""
        if self._stop_requested:
            return False
        return self.region.worker_sleep(self.role, mode, seen_position, int(timeout * 1e9))

    def request_stop(self) -> None:
        """Make ``stopping`` true and end the sleep. Safe in a signal handler and from any thread."""
        self._stop_requested = True
        self.region.worker_wake(self.role)


def run(role: str, serve: Callable[[Worker], None], argv: Sequence[str] | None = None) -> int:
    """Work as ``role`` for the broker of a directory until told to leave. Returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"shmbroker worker {role}", description=f"the {role} of a running broker")
    parser.add_argument("directory", type=Path, help="the broker's directory")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as leaving:  # argparse has said why
        return Exit.OK if leaving.code == 0 else Exit.USAGE
    paths = BrokerPaths(arguments.directory.resolve())
    set_process_name(f"shmb-{role}")
    if _supervisor() == 0 and not paths.run.is_dir():
        print(f"{role}: no broker runs in {paths.directory}: start `shmbroker serve` first", file=sys.stderr)
        return Exit.NO_BROKER
    paths = paths.enter() if _supervisor() == 0 else paths.entered()
    access.adopt(paths)
    start_log(role, paths)
    return guarded(role, lambda: _work(role, serve, paths))


def guarded(role: str, work: Callable[[], int]) -> int:
    """Run ``work``; an exception becomes a line of the log and the exit code that says who has to act."""
    try:
        return work()
    except Exception as error:
        failure = error
    traceback = None if isinstance(failure, ShmBrokerError) else failure
    logging.getLogger(f"shmbroker.{role}").error("%s: %s", type(failure).__name__, failure, exc_info=traceback)
    return exit_code(failure)


def exit_code(error: Exception) -> int:
    """The exit code that says who has to act."""
    match error:
        case ConfigError():
            return Exit.CONFIG
        case DirectoryTaken():
            return Exit.TAKEN
        case NotReady():
            return Exit.NO_BROKER
        case ShmBrokerError():
            return Exit.STORE
        case _:
            return Exit.BUG


def _work(role: str, serve: Callable[[Worker], None], paths: BrokerPaths) -> int:
    failpoint.arm_from_environment(role)
    region, descriptor, supervisor = attach(paths, ATTACH_TIMEOUT)
    lock = process.FileLock(paths.role_lock(role), create=False)
    waiting = False
    while not lock.acquire(ROLE_LOCK_SLICE):
        if not waiting:
            logging.getLogger(f"shmbroker.{role}").info("another process is the %s: waiting for its end", role)
            waiting = True
        if _told_to_leave():
            return Exit.TAKEN  # nothing was finished here
        if process.has_ended(supervisor):
            raise NotReady("the supervisor has died")
    # Memory can be replaced only by a supervisor that has seen all role locks free. So while this one lives, and from
    # here on in any case, what we are attached to is the memory that counts.
    if process.has_ended(supervisor):
        raise NotReady("the supervisor has died")
    if _supervisor() == 0 and region.get("state") in _ENDING:
        raise NotReady("the broker is stopping: its supervisor's own workers finish what there is")
    worker = Worker(role, paths, region, descriptor)
    logging.getLogger("shmbroker").setLevel(worker.config.runtime.log_level)
    region.worker_register(role)
    leave_on_signals(worker.request_stop)
    threading.Thread(target=_watch, args=(worker, supervisor), name="watch-supervisor", daemon=True).start()
    worker.log.info("started")
    if not all(path.exists() for path in paths.parts):  # nobody is to find anew what he has just removed
        raise NotReady(f"{paths.directory} is being removed")
    serve(worker)
    worker.log.info("left, %s", "the supervisor has died" if worker.orphaned else "as told")
    return Exit.NO_BROKER if worker.orphaned else Exit.OK


def attach(paths: BrokerPaths, timeout: float) -> tuple[Region, Descriptor, int]:
    """Memory, descriptor and a pidfd of the supervisor of the broker in ``paths``; NotReady after ``timeout`` s."""
    deadline = time.monotonic() + timeout
    ours = _supervisor()
    while True:
        refusal: ShmBrokerError = NotReady(f"no broker runs in {paths.directory}")
        found = None
        try:
            found = memory.attach(paths)
        except ShmBrokerError as error:  # perhaps of what a killed broker left: our supervisor is about to remove it
            refusal = error
        if found is not None:
            region, descriptor = found
            pid = region.get("supervisor_pid")
            supervisor = process.open_pidfd(pid, region.get("supervisor_start_ticks"))
            wanted = pid == ours or (ours == 0 and region.get("state") not in _ENDING)
            if supervisor is not None and wanted:
                return region, descriptor, supervisor
            region.close()
            if supervisor is not None:
                os.close(supervisor)
        if time.monotonic() > deadline or ours not in (0, os.getppid()) or _told_to_leave():
            raise refusal
        time.sleep(_LOOK_SECONDS)  # started before the memory stands: there is nothing yet that could be waited on


def _supervisor() -> int:
    """Pid of the supervisor that has started this process; 0: a process manager has."""
    return int(os.environ.get(process.SUPERVISOR_KEY, "0"))


def _told_to_leave() -> bool:
    """Whether a signal says so that is still blocked: fleet.py has started us so, until ``leave_on_signals``."""
    return not signal.sigpending().isdisjoint({signal.SIGTERM, signal.SIGINT})


def leave_on_signals(request_stop: Callable[[], None]) -> None:
    """SIGTERM and SIGINT ask to leave; SIGHUP of a closing terminal is ignored."""

    def handle(_signum: int, _frame: FrameType | None) -> None:
        request_stop()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))


def _watch(worker: Worker, supervisor: int) -> None:
    """Orphans leave: who outlived its supervisor would stand in the way of the next one's worker."""
    poll = select.poll()
    poll.register(supervisor, select.POLLIN)
    poll.poll()
    worker.orphaned = True
    worker.request_stop()


def start_log(role: str, paths: BrokerPaths, *, to_stderr: bool = False) -> None:
    """Log to run/<role>.log, appending; a supervisor in the foreground to stderr as well."""
    root = logging.getLogger("shmbroker")
    handlers = [logging.StreamHandler()]
    if _supervisor() == 0:  # else that is where the supervisor has pointed our stderr
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(paths.worker_log(role), flags, access.file_mode())
        if to_stderr:
            handlers.append(logging.StreamHandler(os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace")))
        else:
            os.dup2(fd, sys.stderr.fileno())  # as well what an interpreter says when it fails
            os.close(fd)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_LOG_FORMAT, "%Y-%m-%d %H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False
