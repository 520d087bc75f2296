"""The ``shmbroker`` command as such: help, exit codes, and what it does not load."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support.command import COMMAND, TIMEOUT, environment
from support.served import served

from shmbroker import errors
from shmbroker.tools.cli import COMMANDS, HIDDEN, cli
from shmbroker.tools.exit_codes import ExitCode, exit_code
from shmbroker.workers.common import Exit


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", found) for sub, found in command.commands.items())


def test_the_help_of_every_command_teaches_by_example() -> None:
    without = [name for name, command in commands() if f"shmbroker {name}".split()[1] not in (command.help or "")]
    assert without == []
    assert [name for name, command in commands() if "shmbroker " not in (command.help or "")] == []


def test_help_is_fast_because_it_loads_no_command() -> None:
    code = (
        "import sys, shmbroker.tools.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit as leaving: assert leaving.code == 0\n"
        "print(*{'rich', 'lmdb', 'psutil', 'posix_ipc', 'shmbroker._native._core'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == []
    shown = set(re.findall(r"^  ([a-z]+)  ", done.stdout, flags=re.MULTILINE))
    assert shown == set(COMMANDS) - HIDDEN, "what only contributors need is not shown to users"


@pytest.mark.parametrize("arguments", [["--help"], ["status"], ["topic", "list"]], ids=" ".join)
def test_an_output_that_cannot_be_written_is_called_so(tmp_path: Path, arguments: list[str]) -> None:
    """Not like a full disk of the broker, which has the same errno."""
    with served(tmp_path / "broker"), Path("/dev/full").open("wb") as full:
        command = [*COMMAND, "-d", str(tmp_path / "broker"), *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert done.returncode == ExitCode.OPERATOR
    assert done.stderr == "shmbroker: standard output cannot be written to: No space left on device\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_a_mistyped_variable_before_it_does_anything(tmp_path: Path, name: str) -> None:
    """`SHMBROKER_DIRECTRY=... shmbroker status` would look at another directory than was meant."""
    done = subprocess.run(
        [*COMMAND, name, "--help"],
        cwd=tmp_path,
        env=environment() | {"SHMBROKER_DIRECTRY": "data/orders"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert (done.stdout, done.stderr) == (
        "",
        "shmbroker: SHMBROKER_DIRECTRY: unknown variable; did you mean SHMBROKER_DIRECTORY?\n",
    )
    assert done.returncode == (Exit.CONFIG if name in ("serve", "worker") else ExitCode.USAGE)
    assert list(tmp_path.iterdir()) == []


def test_the_exit_codes_are_those_of_the_documents() -> None:
    text = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    _, of_commands, of_workers = re.split(r"^\| code \| of .*$", text, flags=re.MULTILINE)
    for table, codes in ((of_commands, ExitCode), (of_workers, Exit)):
        rows = re.findall(r"^\| (\d+) \| (.*) \|$", table, flags=re.MULTILINE)
        assert rows == [(f"{code:d}", code.meaning) for code in codes]


def test_every_error_of_the_library_has_an_exit_code_that_says_what_to_do() -> None:
    leaves = [cls for cls in vars(errors).values() if isinstance(cls, type) and not cls.__subclasses__()]
    assert [cls.__name__ for cls in leaves if exit_code(cls("why")) is ExitCode.INTERNAL] == []
