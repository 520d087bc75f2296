"""The ``shmbroker`` command. Each family of commands is a file of its own, loaded when it is used."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO

import click

from shmbroker.errors import ConfigError, ShmBrokerError
from shmbroker.tools.command_group import CommandGroup
from shmbroker.tools.exit_codes import ExitCode, exit_code, remedy
from shmbroker.tools.session import ENVIRONMENT_KEY, Failure, common_options

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# name: (module, one line for --help). The line stands here so that --help loads no module.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "demo": ("demo", "Stream a file through a broker whose processes are killed on the way."),
    "serve": ("serve", "Run the broker of a directory in the foreground."),
    "worker": ("serve", "Run one worker alone, for process managers."),
    "send": ("send", "Send lines as messages."),
    "receive": ("receive", "Print messages as lines and acknowledge them."),
    "consume": ("consume", "Call a function with each message, in several processes."),
    "status": ("status", "Show the health of a broker, and what to do about it."),
    "topic": ("topic", "Create, list, alter and delete topics."),
    "group": ("group", "Show consumer groups and their lag; delete those nobody needs."),
    "dlq": ("dlq", "Look at dead letters, send them again, give them up."),
    "message": ("message", "Look up messages by id or key."),
    "log": ("log", "Dump, verify and rebuild the commit log."),
    "backup": ("backup", "Make a consistent copy of a directory."),
    "ipc": ("ipc", "List and remove shared memory of dead brokers."),
    "bench": ("bench", "Measure the broker beside the bare machine."),
    "failpoints": ("failpoints", "List the places where tests can make a process die."),
}
HIDDEN: Final = frozenset({"failpoints"})  # for contributors: CONTRIBUTING.md


class Terminated(BaseException):
    """SIGTERM, raised in the main thread so that every ``with`` is left in order."""


class _Commands(CommandGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return [name for name in COMMANDS if name not in HIDDEN]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"shmbroker.tools.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: shmbroker demo. Each command has examples: shmbroker send --help.",
)
@common_options
@click.version_option(package_name="shmbroker")
@click.pass_context
def cli(context: click.Context) -> None:
    """A durable message broker for the processes of one host.

    Producers and consumers share a ring in memory; a flusher keeps it on disk. All commands work on one DIRECTORY.
    `serve`, `send` and `topic create` make it; the others want one that is there. Commands that need the workers start
    them if nobody has.
    """
    _check_environment(of_worker=context.invoked_subcommand in ("serve", "worker"))


def _check_environment(*, of_worker: bool) -> None:
    """Refuse a variable of ours that nobody knows, before a command works on another directory than was meant."""
    if not any(name.startswith("SHMBROKER_") and name != ENVIRONMENT_KEY for name in os.environ):
        return  # the common case: reading the settings costs 8 ms
    from shmbroker.config import read_environment

    try:
        read_environment()
    except ConfigError as error:
        raise Failure(str(error), os.EX_CONFIG if of_worker else ExitCode.USAGE) from error


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run a command, say in one line what went wrong, leave with a named exit code."""
    signal.signal(signal.SIGTERM, _raise_terminated)
    _open_closed_streams()
    sys.stdout = _guarded(sys.stdout)
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    # Not cli.main: it answers a broken pipe and Ctrl-C in its own way, with code 1.
    try:
        with cli.make_context("shmbroker", list(sys.argv[1:] if arguments is None else arguments)) as context:
            result: Any = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as leaving:  # --help and --version
        return leaving.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Failure as failure:
        click.echo(f"shmbroker: {failure}", err=True)
        return failure.code
    except (KeyboardInterrupt, click.Abort):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one must not cut the interpreter's end short
        return ExitCode.INTERRUPTED
    except Terminated:
        return ExitCode.TERMINATED
    except BrokenPipeError:  # whoever read our output has enough of it
        return ExitCode.OK
    except (ShmBrokerError, OSError) as error:
        hint = remedy(error)
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        click.echo(f"shmbroker: {type(error).__name__}: {error}{f' ({hint})' if hint else ''}{notes}", err=True)
        return exit_code(error)
    except Exception:  # Python's own code for a traceback is 1, which means "finding" here
        traceback.print_exc()
        click.echo("shmbroker: this is a fault of shmbroker; please report it with the lines above", err=True)
        return ExitCode.INTERNAL
    return int(result) if isinstance(result, int) else ExitCode.OK


def _raise_terminated(_signum: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the clean-up short
    raise Terminated


def _open_closed_streams() -> None:
    """What was closed by our caller (``>&-``) is /dev/null: else the next file that is opened would get its number.

    Standard output so that it cannot be written to: an answer must not be lost unnoticed.
    """
    for fd, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


class _Stdout(io.FileIO):
    """Standard output whose errors are told from those of the broker's files: a full output is no full store."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            _drop_stdout()  # else the interpreter's last flush meets it again
            raise
        except OSError as error:
            _drop_stdout()
            raise Failure(f"standard output cannot be written to: {error.strerror}", ExitCode.OPERATOR) from error


def _guarded(stream: TextIO) -> TextIO:
    raw = io.BufferedWriter(_Stdout(stream.fileno(), "wb", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=stream.isatty())


def _drop_stdout() -> None:
    """Point stdout at nothing: whatever else is written goes there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
