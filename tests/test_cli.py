"""The ``shmbroker`` command as such: help, exit codes, and what it does not load."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support.command import COMMAND, TIMEOUT, environment, shmbroker, shmbroker_json
from support.processes import wait_gone
from support.served import served

from shmbroker import errors
from shmbroker.tools.cli import COMMANDS, HIDDEN, cli
from shmbroker.tools.exit_codes import ExitCode, exit_code, remedy
from shmbroker.workers.common import Exit


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", found) for sub, found in command.commands.items())


@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_directory_that_was_typed_wins_over_the_environment_before_and_behind_the_command(
    tmp_path: Path, place: str
) -> None:
    typed, other = tmp_path / "typed", tmp_path / "other"
    command = ["send", "--topic", "t"]
    words = ["-d", str(typed), *command] if place == "before" else [*command, "-d", str(typed)]
    settings = environment() | {"SHMBROKER_DIRECTORY": str(other)}
    done = subprocess.run([*COMMAND, *words], input=b"x\n", capture_output=True, timeout=TIMEOUT, env=settings)
    assert done.returncode == 0, done.stderr
    assert typed.exists()
    assert not other.exists()
    wait_gone(typed)


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


UNWRITABLE = {">/dev/full": "No space left on device", ">&-": "Bad file descriptor"}


@pytest.mark.parametrize("redirection", UNWRITABLE)
def test_an_output_that_cannot_be_written_is_called_so(tmp_path: Path, redirection: str) -> None:
    """Not like a full disk of the broker, which has the same errno. What a command has changed it says on stderr."""
    done_all_the_same = {
        "topic create made": "created made",
        "send --topic t": "2 messages stored (2 SEND_OK)",
        "topic alter t --queues 3": "altered t",
        "topic delete made --yes": "deleted made",
        "group set-subscription g --topic t": "g subscribes to t: * now",
        "group delete g --yes": "deleted g",
    }
    with served(tmp_path / "broker"):
        shmbroker(tmp_path / "broker", "topic", "create", "t", "--queues", "2")
        shmbroker(tmp_path / "broker", "receive", "--topic", "t", "--group", "g", "--wait", "0")
        for arguments in ("--help", "--version", "status", "topic list", "--json log verify", *done_all_the_same):
            done = closing(tmp_path / "broker", redirection, *arguments.split())
            told = f"shmbroker: standard output cannot be written to: {UNWRITABLE[redirection]}"
            if arguments in done_all_the_same:
                told += f"; done all the same: {done_all_the_same[arguments]}"
            assert (done.returncode, done.stderr) == (ExitCode.OPERATOR, f"{told}\n"), arguments
        (topic,) = shmbroker_json(tmp_path / "broker", "topic", "list")
        assert (topic["name"], topic["sent"], len(topic["queues"])) == ("t", 2, 3)
        assert shmbroker_json(tmp_path / "broker", "group", "list") == []


def test_a_closed_input_is_an_empty_one_and_a_closed_stderr_hears_nothing(tmp_path: Path) -> None:
    with served(tmp_path / "broker"):
        sent = closing(tmp_path / "broker", "<&-", "send", "--topic", "t")
        assert (sent.returncode, sent.stdout, sent.stderr) == (0, "nothing sent\n", "")
        shmbroker(tmp_path / "broker", "topic", "create", "t")
        asked = closing(tmp_path / "broker", "<&-", "topic", "delete", "t")
        assert (asked.returncode, asked.stdout) == (ExitCode.FINDING, "")
        unheard = closing(tmp_path / "broker", "2>&-", "topic", "delete", "other", "--yes")
        assert (unheard.returncode, unheard.stdout, unheard.stderr) == (ExitCode.USAGE, "", "")


def closing(directory: Path, redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of which the shell redirects or closes a standard stream."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, "-d", str(directory), *arguments],
        input="one\ntwo\n",
        capture_output=True,
        env=environment(),
        text=True,
        timeout=TIMEOUT,
    )


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


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("recieve", "'receive'"), ("topics", "'topic'"), ("topic lst", "'list'"), ("ipc claen", "'clean'")],
)
def test_a_mistyped_command_is_refused_with_what_was_meant(tmp_path: Path, typed: str, meant: str) -> None:
    done = shmbroker(tmp_path, *typed.split())
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.endswith(f"Error: No such command '{typed.rsplit(maxsplit=1)[-1]}'. Did you mean {meant}?\n")


def test_a_command_like_no_other_is_refused_with_where_they_are_listed(tmp_path: Path) -> None:
    done = shmbroker(tmp_path, "topic", "xyzzy")
    assert done.stderr.endswith("Error: No such command 'xyzzy'. `shmbroker topic --help` lists them.\n")


def test_a_remedy_that_the_error_names_itself_is_not_given_twice() -> None:
    assert remedy(errors.CorruptLog("position 7: no record")).startswith("`shmbroker log verify`")
    assert remedy(errors.CorruptLog("position 7: no record. `shmbroker log verify` shows the extent")) == ""


def test_the_exit_codes_are_those_of_the_documents() -> None:
    text = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    _, of_commands, of_workers = re.split(r"^\| code \| of .*$", text, flags=re.MULTILINE)
    for table, codes in ((of_commands, ExitCode), (of_workers, Exit)):
        rows = re.findall(r"^\| (\d+) \| (.*) \|$", table, flags=re.MULTILINE)
        assert rows == [(f"{code:d}", code.meaning) for code in codes]


def test_every_error_of_the_library_has_an_exit_code_that_says_what_to_do() -> None:
    leaves = [cls for cls in vars(errors).values() if isinstance(cls, type) and not cls.__subclasses__()]
    assert [cls.__name__ for cls in leaves if exit_code(cls("why")) is ExitCode.INTERNAL] == []
