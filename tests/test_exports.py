"""The public surface: grouped, importable, and cheap to import."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_library_does_not_import_what_only_workers_and_tools_need() -> None:
    code = "import sys, shmbroker; print(*sorted({'click', 'lmdb', 'psutil', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
