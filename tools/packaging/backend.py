"""The build backend that pyproject.toml names: that of setuptools, which is asked for a build only if one can succeed.

Without it, a machine without a compiler answers `pip install` with the traceback of whatever failed to start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that need no compiler

PREFLIGHT = Path(__file__).parents[1] / "preflight.sh"


def build_wheel(*arguments: Any, **options: Any) -> str:
    _check()
    return str(build_meta.build_wheel(*arguments, **options))


def build_editable(*arguments: Any, **options: Any) -> str:
    _check()
    return str(build_meta.build_editable(*arguments, **options))


def _check() -> None:
    """Leave with one sentence that says what is missing, and how to get it."""
    done = subprocess.run(["/bin/sh", PREFLIGHT, "build"], env={**os.environ, "PYTHON": sys.executable}, check=False)
    if done.returncode:
        sys.exit(done.returncode)
