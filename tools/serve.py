"""``shmbroker serve`` and ``shmbroker worker``: become a worker process.

Both replace this process by the worker's own module: the pid that a process manager knows is the worker's, its signals
need no forwarding, and ``ps`` shows role and directory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from shmbroker import interpreter
from shmbroker.config import FILE_NAME
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Failure, Session, common_options, pass_session

ROLES: Final = ("supervisor", "flusher", "dispatcher", "janitor", "scheduler")

_CODES: Final[dict[int, int]] = {ExitCode.USAGE: os.EX_USAGE, ExitCode.NOT_SERVED: os.EX_UNAVAILABLE}


class _BecomesWorker(click.Command):
    """Leaves as a worker does (workers/common.py), also while it is none yet: process managers read these codes."""

    def make_context(self, *arguments: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **extra)
        except click.UsageError as error:
            error.show()
            raise click.exceptions.Exit(os.EX_USAGE) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Failure as failure:
            failure.code = _CODES.get(failure.code, failure.code)
            raise


@click.command(cls=_BecomesWorker)
@common_options
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help=f"Instead of its {FILE_NAME}."
)
@pass_session
def serve(session: Session, config: Path | None) -> None:
    """Run the broker in the foreground: starts its workers, restarts those that die.

    \b
    shmbroker serve -d /var/lib/orders
    SHMBROKER_FLUSH_DISK_TYPE=SYNC_FLUSH shmbroker serve

    Settings come from the environment and from broker.toml in the directory. SIGTERM or Ctrl-C: what is in memory is
    flushed, the workers leave. For supervisord and systemd: docs/operations.md.
    """
    _become("supervisor", session.paths.directory, config)


@click.command(cls=_BecomesWorker)
@common_options
@click.argument("role", type=click.Choice(ROLES))
@click.option(
    "--config",
    type=click.Path(exists=True, path_type=Path),
    help="The supervisor's settings file, or a directory. Without -d, the file lies in the broker's directory.",
)
@pass_session
def worker(session: Session, role: str, config: Path | None) -> None:
    """Run one worker of a broker alone, in the foreground.

    \b
    shmbroker worker supervisor -d /var/lib/orders
    shmbroker worker flusher --config /var/lib/orders/broker.toml

    A role is held by one process at a time. Workers take the settings in force from the running broker; only the
    supervisor reads a file.
    """
    if config is not None and session.chosen is None:
        session.chosen = config if config.is_dir() else config.resolve().parent
    if role != "supervisor" and not session.directory.is_dir():
        raise Failure(f"{session.place} does not exist; start the supervisor first", ExitCode.NOT_SERVED)
    _become(role, session.paths.directory, config if config is not None and config.is_file() else None)


def _become(role: str, directory: Path, config: Path | None) -> NoReturn:
    command = interpreter.command(f"shmbroker.workers.{role}", str(directory))
    if role == "supervisor":
        command += ["--config", str(config.resolve())] if config is not None else []
    environment = interpreter.environment()
    os.chdir("/")
    sys.stdout.flush()
    os.execve(command[0], command, environment)
