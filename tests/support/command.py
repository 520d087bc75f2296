"""Runs the real ``shmbroker`` command as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "shmbroker.tools.cli"]
TIMEOUT = 30.0


def environment() -> dict[str, str]:
    """This process's, without settings that would change what is tested."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SHMBROKER_")}


def shmbroker(directory: Path, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run one command on ``directory`` to its end."""
    done = subprocess.run(
        [*COMMAND, "-d", str(directory), *arguments],
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT,
        env=environment(),
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def shmbroker_json(directory: Path, *arguments: str, stdin: bytes = b"", code: int | None = 0) -> Any:
    """Run one command with ``--json`` and return what it answered; the exit code must be ``code``, if one is given."""
    done = shmbroker(directory, "--json", *arguments, stdin=stdin)
    assert code is None or done.returncode == code, done.stderr
    return json.loads(done.stdout)
