"""The supervisor: owns a directory, its memory and its workers. ``python -m shmbroker.workers.supervisor DIRECTORY``

It serves until SIGTERM or SIGINT. Embedded, that is started by ``shmbroker.open``, it takes its settings from stdin,
reports through a pipe, and leaves ``embed_grace_ms`` after the last client has gone. Either way it stops cleanly:
everything flushed, the memory removed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from shmbroker import access, directory, failpoint, memory
from shmbroker._native._core import Region, set_process_name
from shmbroker.config import Config, load
from shmbroker.directory import DirectoryTaken
from shmbroker.fleet import WORKERS, Fleet
from shmbroker.footing import Footing, Vanished
from shmbroker.memory import Held
from shmbroker.naming import BrokerPaths
from shmbroker.workers import common

LOOK_SECONDS: Final = 0.1  # so often are clients counted, and directory and memory looked at
TORN_SECONDS: Final = 0.5  # who removes the directory part by part is given so long to finish

log = logging.getLogger("shmbroker.supervisor")


class Supervisor:
    """One start of a broker: memory, workers, a clean stop. The caller holds the directory's lock and is inside."""

    def __init__(self, paths: BrokerPaths, config: Config, *, embedded: bool) -> None:
        self._paths = paths
        self._config = config
        self._embedded = embedded
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stop_requested = False

    @property
    def stopping(self) -> bool:
        return self._stop_requested

    def request_stop(self) -> None:
        """Make ``serve`` stop the broker. Safe in a signal handler."""
        self._stop_requested = True
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    def serve(self, tell_ready: Callable[[], None]) -> int | None:
        """Open memory and log, start the workers, call ``tell_ready``, stay, stop. Returns the exit code.

        None: somebody has taken away what it stood on. All of it is in the log now; the broker is to be opened anew.
        """
        fleet = Fleet(self._paths, WORKERS, log)
        # Its interpreter starts while this one loads the rest and reads the log; it waits for the memory.
        fleet.start(["flusher"])
        try:
            held, config = self._start(fleet)
        except BaseException:
            fleet.kill("flusher")
            raise
        failure: Exception | None = None
        vanished: Vanished | None = None
        footing = Footing(self._paths, held.descriptor)
        try:
            tell_ready()
            fleet.start(["dispatcher", "janitor", "scheduler"])
            log.info("serving %s, epoch %d", self._paths.directory, held.region.get("epoch"))
            vanished = self._stay(held.region, fleet, footing, config.runtime.embed_grace_ms / 1000)
        except Exception as error:  # a fault here, or no processes: that is no reason to leave memory behind
            log.exception("stopping the broker")
            failure = error
        code = self._leave(held, fleet, footing, vanished)
        fleet.close()
        if failure is not None:
            raise failure
        return code

    def _start(self, fleet: Fleet) -> tuple[Held, Config]:
        """Everything up to the first send."""
        from shmbroker import lifecycle

        opened = lifecycle.open_memory(self._paths, self._config)
        held, config = opened.held, opened.config
        try:
            logging.getLogger("shmbroker").setLevel(config.runtime.log_level)
            lifecycle.announce(held.region, config, embedded=self._embedded)
            held.region.worker_register("supervisor")
            fleet.restart_dead()
            if opened.epoch is not None:
                lifecycle.begin_epoch(held.region, opened.epoch)
            lifecycle.run(held.region)
        except BaseException:
            lifecycle.abandon(self._paths, held)
            raise
        return held, config

    def _stay(self, region: Region, fleet: Fleet, footing: Footing, grace: float) -> Vanished | None:
        """Keep the workers running until told to stop, or (embedded) until nobody is attached; or: what vanished."""
        last_seen = time.monotonic()
        while not self._stop_requested:
            fleet.wait(LOOK_SECONDS, self._wake_read)
            if (vanished := footing.vanished()) is not None:  # first: nobody is to be started where nothing is left
                return vanished
            fleet.restart_dead()
            if not self._embedded or memory.has_living_clients(region):
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen >= grace and _nobody_comes(region):
                break
        return None

    def _leave(self, held: Held, fleet: Fleet, footing: Footing, vanished: Vanished | None) -> int | None:
        from shmbroker import shutdown

        if vanished is not None:
            log.critical("%s, while the broker runs", vanished.value)
        if vanished is Vanished.TORN:
            shutdown.stop_at_once(held.region, fleet)
            vanished = _settled(footing)
        if vanished is Vanished.TORN:
            shutdown.put_back(held, self._paths, fleet)
        if vanished not in (Vanished.REMOVED, Vanished.MOVED):
            if shutdown.drain(held, self._paths, fleet):
                log.info("stopped")
                return None if vanished is not None and not self._stop_requested else common.Exit.OK
            vanished = footing.vanished()  # perhaps that is why
        if vanished in (Vanished.REMOVED, Vanished.MOVED):
            shutdown.desert(held, self._paths, fleet, removed=vanished is Vanished.REMOVED)
        return common.Exit.STORE


def _settled(footing: Footing) -> Vanished:
    """What has vanished in the end, when a part of the directory is already gone."""
    deadline = time.monotonic() + TORN_SECONDS
    while (vanished := footing.vanished()) is Vanished.TORN and time.monotonic() < deadline:
        time.sleep(0.01)
    return vanished or Vanished.TORN


def _nobody_comes(region: Region) -> bool:
    """Refuse senders, then count again: a client that attached at the last moment is served on."""
    region.set("state", memory.STATE_DRAINING)
    if memory.has_living_clients(region):
        region.set("state", memory.STATE_RUNNING)
        return False
    return True


def detach() -> None:
    """Become nobody's child, in the session that the opener has given us: it is not to be bothered with our exit."""
    if os.fork():
        os._exit(common.Exit.OK)


def report(fd: int | None, outcome: dict[str, Any]) -> None:
    """Tell the opener, if there is one and it still listens."""
    if fd is not None:
        with suppress(OSError):
            os.write(fd, b"\n" + json.dumps(outcome).encode())
            os.close(fd)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a directory; returns an exit code of ``workers/common.py``."""
    parser = argparse.ArgumentParser(prog="shmbroker serve", description="serve a directory until SIGTERM")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, instead of DIRECTORY/broker.toml")
    parser.add_argument("--embedded", type=int, metavar="FD", help="detach, read settings from stdin, report to FD")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as leaving:
        return common.Exit.OK if leaving.code == 0 else common.Exit.USAGE
    paths = BrokerPaths(arguments.directory.absolute())
    if arguments.embedded is not None:
        detach()
        os.set_inheritable(arguments.embedded, False)
    set_process_name("shmb-supervisor")
    try:
        return _run(paths, arguments.config, arguments.embedded)
    except Exception as error:  # whatever it is, the opener and stderr are told
        failure = error
    if isinstance(failure, OSError):
        failure = access.explained(failure, paths)
    _complain(str(failure))
    taken = isinstance(failure, DirectoryTaken)  # for an opener no error, but somebody to attach to
    outcome = {"taken": True} if taken else {"error": type(failure).__name__, "message": str(failure)}
    report(arguments.embedded, outcome)
    return common.exit_code(failure)


def _complain(text: str) -> None:
    print(f"shmbroker: {text}", file=sys.stderr, flush=True)


def _run(paths: BrokerPaths, file: Path | None, report_fd: int | None) -> int:
    failpoint.arm_from_environment("supervisor")
    config = load(paths.directory, file) if report_fd is None else Config.of(json.load(sys.stdin))
    embedded = report_fd is not None
    paths = directory.enter(paths)
    supervisor = Supervisor(paths, config, embedded=embedded)
    common.leave_on_signals(supervisor.request_stop)
    tell = (lambda _: None) if embedded else _complain
    try:
        lock = directory.take(paths, embedded=embedded, tell=tell, give_up=lambda: supervisor.stopping)
    except DirectoryTaken:
        if supervisor.stopping:
            return common.Exit.OK
        raise
    try:
        failpoint.failpoint("supervisor.locked")
        common.start_log("supervisor", paths, to_stderr=not embedded)
        access.arrange(paths, memory.group_in_force(paths, config))
        access.adopt(paths)
        code = supervisor.serve(lambda: report(report_fd, {"ready": True}))
        while code is None and lock.show():
            code = supervisor.serve(lambda: None)
        return common.Exit.TAKEN if code is None else code
    except Exception:
        log.exception("cannot serve")
        raise
    finally:
        lock.close()


if __name__ == "__main__":
    sys.exit(main())
