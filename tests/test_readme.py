"""What the README shows works as it is written there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support.command import COMMAND, environment
from support.processes import processes_of
from support.waiting import wait_until

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs_as_written(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "data").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"orders [0-9a-f]{32} paid order-42 b'42'\n", done.stdout), done.stdout
    wait_until(lambda: not processes_of(tmp_path / "data" / "orders"), "the embedded broker has gone")


def test_the_command_lines_run_as_written(tmp_path: Path) -> None:
    """Every line of the block in turn, in one shell; a failing one fails the test."""
    (block,) = re.findall(r"```\n(shmbroker --help.*?)```", README, flags=re.DOTALL)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "shmbroker").write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    (programs / "shmbroker").chmod(0o755)
    settings = {"PATH": f"{programs}:{os.environ['PATH']}", "SHMBROKER_DIRECTORY": str(tmp_path / "broker")}
    done = subprocess.run(
        ["/bin/sh", "-e", "-c", block],
        cwd=tmp_path,
        env=environment() | settings,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr) == (0, "")
    received = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert sorted(received) == list(range(1, 1001))
    assert (tmp_path / "COPY" / "backup.json").exists()
    wait_until(lambda: not processes_of(tmp_path / "broker"), "the embedded broker has gone")
