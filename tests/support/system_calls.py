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
    """System calls of the process's main thread fail as ``injection`` says, noted in ``log``.

    Rules of strace -e inject, with blanks between them. With ``file`` only calls on that file.
    """
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    only = ["-P", str(file)] if file is not None else []
    inject = [option for one in injection.split() for option in ("-e", f"inject={one}")]
    command = [strace, "-qq", "-o", str(log), *only, *inject, "-p", str(pid)]
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
