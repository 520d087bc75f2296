"""What runs the workers: a Python that imports nothing from where its user happens to stand, and holds no directory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.command import environment
from support.processes import SMALL, processes_of, stop_broker, supervisor_of, wait_for_workers
from support.waiting import wait_until

from shmbroker.broker import Broker

# Names of the standard library that users have for files of their own; whoever imports one of these leaves a trace.
TRAP = "import os, pathlib; pathlib.Path(__file__).with_suffix(f'.{os.getpid()}.trace').touch(); raise SystemExit(1)"
TRAPS = ("json", "queue", "logging", "subprocess", "shmbroker", "site", "posix_ipc", "tomllib")

OPENER = """
    import json, os, sys, shmbroker
    from shmbroker import Message
    with shmbroker.open(sys.argv[1], **json.loads(sys.argv[2])) as broker:
        with broker.producer("test") as producer:
            producer.send(Message("orders", b"42"))
        with broker.simple_consumer("audit", {"orders": "*"}) as consumer:
            print(consumer.receive(wait=10.0)[0].body.decode())
"""


def run(program: str, directory: Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with `-P`: what is tested is what it starts, not where its own program came from."""
    command = [sys.executable, "-P", "-c", textwrap.dedent(program), str(directory), json.dumps(SMALL)]
    return subprocess.run(command, cwd=cwd, env=environment() | variables, capture_output=True, text=True, timeout=30)


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    """A directory full of modules that nobody should import."""
    place = tmp_path / "trapped"
    place.mkdir()
    for name in TRAPS:
        (place / f"{name}.py").write_text(TRAP)
    return place


@pytest.mark.parametrize("pythonpath", ["", ":"], ids=["no PYTHONPATH", "an empty entry in PYTHONPATH"])
def test_nothing_in_the_current_directory_runs_in_a_worker(directory: Path, trapped: Path, pythonpath: str) -> None:
    # An empty entry means the current directory to the opener too, which therefore stands elsewhere when it starts.
    program = f"    import os; os.chdir({str(trapped)!r}){OPENER}"
    done = run(program, directory, trapped.parent, PYTHONPATH=pythonpath)
    assert (done.stdout, done.stderr) == ("42\n", "")
    assert list(trapped.glob("*.trace")) == []


def test_nothing_in_the_current_directory_runs_in_a_broker_that_is_served(directory: Path, trapped: Path) -> None:
    command = [sys.executable, "-P", "-m", "shmbroker.tools.cli", "-d", str(directory), "serve"]
    with subprocess.Popen(command, cwd=trapped, env=environment()) as served:
        wait_for_workers(directory)
        stop_broker(directory)
        assert served.wait(15) == 0
    assert list(trapped.glob("*.trace")) == []


@pytest.mark.parametrize("role", ["supervisor", "flusher", "dispatcher", "janitor"])
def test_nothing_in_the_current_directory_runs_in_a_worker_that_is_started_by_hand(trapped: Path, role: str) -> None:
    (trapped / "shmbroker.py").unlink()  # `python -m shmbroker...` means that one
    command = [sys.executable, "-m", f"shmbroker.workers.{role}", "--help"]
    done = subprocess.run(command, cwd=trapped, env=environment(), capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: shmbroker ")
    assert list(trapped.glob("*.trace")) == []


def test_workers_stand_in_the_brokers_directory_and_hold_no_other(broker: Broker, directory: Path) -> None:
    wait_for_workers(directory)
    assert {process.cwd() for process in processes_of(directory)} == {str(directory)}
    assert broker.topics() == []


def test_what_pythonpath_names_is_found_by_the_workers_too(directory: Path, tmp_path: Path) -> None:
    """Relative entries are the opener's: sitecustomize is imported by every Python that finds it."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "sitecustomize.py").write_text(
        "import os, pathlib; pathlib.Path(__file__).with_name(str(os.getpid())).touch()"
    )
    program = OPENER.replace("print(", "print(*(w['pid'] for w in broker.status()['workers'] if w['starts'])); print(")
    done = run(program, directory, tmp_path, PYTHONPATH="library")
    pids = done.stdout.split()[1:-1]  # the supervisor's comes first: it has forked since
    assert pids, done.stderr
    assert [pid for pid in pids if not (library / pid).exists()] == []


@pytest.mark.parametrize(
    "embedding",
    ["sys.executable = '/usr/sbin/uwsgi'", "sys.executable = ''", "sys.executable = None", "sys.frozen = 1"],
)
def test_a_program_that_embeds_python_is_told_how_to_name_one(directory: Path, embedding: str) -> None:
    program = f"""
    import json, os, sys, shmbroker
    python = sys.executable
    {embedding}
    try:
        shmbroker.open(sys.argv[1], **json.loads(sys.argv[2]))
    except shmbroker.ConfigError as error:
        print(error)
    os.environ["SHMBROKER_PYTHON"] = python
    with shmbroker.open(sys.argv[1], **json.loads(sys.argv[2])) as broker:
        print(broker.topics())
"""
    done = run(program, directory, directory.parent)
    assert done.stderr == ""
    refusal, topics = done.stdout.splitlines()
    assert topics == "[]"
    assert "sys.executable = " in refusal
    assert "a Python that can import shmbroker in the environment variable SHMBROKER_PYTHON" in refusal


@pytest.mark.parametrize(
    ("named", "error"),
    [
        ("/nowhere/python3", "ConfigError: SHMBROKER_PYTHON = '/nowhere/python3': no such program"),
        (
            "/bin/false",
            "NotReady: the supervisor failed: exit code 1 (run by /bin/false; SHMBROKER_PYTHON names another)",
        ),
    ],
)
def test_a_wrong_shmbroker_python_is_named(directory: Path, named: str, error: str) -> None:
    done = run(OPENER, directory, directory.parent, SHMBROKER_PYTHON=named)
    assert error in done.stderr.splitlines()[-1]
    wait_until(lambda: supervisor_of(directory) == 0, "nobody serves")
