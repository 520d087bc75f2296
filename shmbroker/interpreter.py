"""Which Python runs a worker, and where that Python looks for modules.

A worker imports what this process could import, and nothing that merely lies about: the current directory is on its
path only if PYTHONPATH names it. It starts in ``/`` and goes on in the broker's directory: it holds no other file
system that somebody wants to unmount.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Final

from shmbroker.errors import ConfigError

INTERPRETER_KEY: Final = "SHMBROKER_PYTHON"
_PYTHONS: Final = re.compile("python|pypy")


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of ours. Raises ConfigError if no Python is known that could."""
    return [interpreter(), "-I" if sys.flags.isolated else "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's, with a PYTHONPATH that means the same in ``/``. An empty entry would mean wherever one is."""
    variables = dict(os.environ)
    if path := variables.pop("PYTHONPATH", ""):
        variables["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in path.split(":") if entry)
    return variables


def interpreter() -> str:
    """SHMBROKER_PYTHON, else the Python that runs this process: in a program that embeds one there may be none."""
    remedy = f"name a Python that can import shmbroker in the environment variable {INTERPRETER_KEY}"
    if named := os.environ.get(INTERPRETER_KEY):
        found = shutil.which(named)
        if found is None:
            raise ConfigError(f"{INTERPRETER_KEY} = {named!r}: no such program; {remedy}")
        return str(Path(found).absolute())
    if getattr(sys, "frozen", False) or not _PYTHONS.search(Path(sys.executable or "").name):
        raise ConfigError(
            f"the workers need a Python, and this program, sys.executable = {sys.executable!r}, is none: {remedy}"
        )
    return sys.executable
