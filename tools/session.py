"""What all commands share: which broker, and whether people or programs read the answer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.core import ParameterSource

from shmbroker.naming import BrokerPaths
from shmbroker.tools.exit_codes import ExitCode

if TYPE_CHECKING:
    from shmbroker._native._core import Region
    from shmbroker.broker import Broker
    from shmbroker.descriptor import Descriptor

DEFAULT_DIRECTORY: Final = "shmbroker-data"
ENVIRONMENT_KEY: Final = "SHMBROKER_DIRECTORY"

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Failure(Exception):
    """A command ends with one line on stderr and a named exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Session:
    """The broker that a command works on, and how it answers."""

    def __init__(self) -> None:
        self.chosen: Path | None = None  # by -d or by the environment
        self.json = False

    @property
    def directory(self) -> Path:
        return self.chosen or Path(DEFAULT_DIRECTORY)

    @property
    def paths(self) -> BrokerPaths:
        try:
            return BrokerPaths(self.directory.resolve())
        except RuntimeError as error:
            raise Failure(f"{self.directory}: {error}; name the directory itself", ExitCode.USAGE) from error

    @property
    def place(self) -> str:
        """The directory for people: in full, and who names it if they did not do so with this command."""
        named = os.environ.get(ENVIRONMENT_KEY)
        by = f" (named by {ENVIRONMENT_KEY})" if named and self.chosen == Path(named) else ""
        return f"{self.paths.directory}{by}"

    def require_directory(self) -> BrokerPaths:
        """The paths of a directory that a broker has written to before; a mistyped name must not make a new broker."""
        paths = self.paths
        if not paths.log.is_dir():
            raise Failure(
                f"{self.place} is no broker's directory; name it with -d, or make it with `shmbroker serve`",
                ExitCode.NOT_SERVED,
            )
        return paths

    def check_place(self) -> None:
        """A broker's directory, or a place where one can be made; nothing is left there. Raises ShmBrokerError."""
        from shmbroker import access

        paths = self.paths
        try:
            if paths.log.is_dir():
                return
            place = paths.directory
            while not place.exists():
                place = place.parent
            attempt = place / f".shmbroker-{os.getpid()}"
            attempt.mkdir(mode=0o700)
            attempt.rmdir()
        except OSError as error:
            raise access.explained(OSError(error.errno, error.strerror), paths) from error

    def open(self, *, create: bool = False, **settings: Any) -> Broker:
        """Open the broker, starting its workers if nobody has.

        ``create``: make the directory if there is none, and say so: it may be a mistyped one.
        """
        import shmbroker

        if not create:
            self.require_directory()
        new = not self.paths.log.is_dir()
        broker = shmbroker.open(self.directory, **settings)
        if new:
            click.echo(f"made a new broker in {self.place}", err=True)
        return broker

    def attach(self) -> tuple[Region, Descriptor] | None:
        """The running broker's memory, to look at only; None if nobody serves the directory."""
        from shmbroker import memory

        return memory.attach(self.require_directory())


pass_session = click.make_pass_decorator(Session, ensure=True)


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        session = ctx.ensure_object(Session)
        typed = ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if value not in (None, False) and (
            typed or not getattr(session, name)
        ):  # what was typed before the command stays
            setattr(session, name, value)

    return callback


def common_options(function: _Function) -> _Function:
    """``-d`` and ``--json``, understood before and after the command's name."""
    directory = click.option(
        "-d",
        "--directory",
        type=click.Path(file_okay=False, path_type=Path),
        envvar=ENVIRONMENT_KEY,
        callback=_set("chosen"),
        expose_value=False,
        is_eager=True,
        help=f"The broker's directory.  [default: ${ENVIRONMENT_KEY}, else {DEFAULT_DIRECTORY}]",
    )
    json = click.option(
        "--json", is_flag=True, callback=_set("json"), expose_value=False, is_eager=True, help="Answer in JSON."
    )
    return directory(json(function))
