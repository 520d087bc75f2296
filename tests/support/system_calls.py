"""Making the kernel itself refuse a system call of a running process."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.waiting import wait_until


@contextmanager
def failing(injection: str, pid: int, log: Path, file: Path | None = None) -> Iterator[None]:
    """System calls of the process's main thread fail as ``injection`` says (strace -e inject), noted in ``log``.

    With ``file`` only those on that file.
    """
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    only = ["-P", str(file)] if file is not None else []
    command = [strace, "-qq", "-o", str(log), *only, "-e", f"inject={injection}", "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        try:
            wait_until(lambda: is_traced(pid) or tracer.poll() is not None, "strace at work")
            if tracer.poll() is not None:
                assert tracer.stderr is not None
                pytest.skip(f"strace cannot attach here: {tracer.stderr.read().strip()}")
            yield
        finally:
            tracer.terminate()


def is_traced(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line for line in status.splitlines() if line.startswith("TracerPid:")).split()[1] != "0"
