"""What is missing on a machine gets one sentence with its remedy: tools/preflight.sh, with things hidden from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "preflight.sh"


def preflight(path: Path, *commands: str, prelude: str = "") -> tuple[int, str]:
    """Run the script where only ``commands`` can be found. ``prelude`` is run by python3 before what it is asked to."""
    for name in ("uname", *commands):
        found = sys.executable if name == "python3" else shutil.which(name)
        assert found, f"this test needs {name}"
        (path / name).symlink_to(found)
    if prelude:
        (path / "python3").unlink()
        hidden = 'if [ "$1" = --version ]; then echo "Python 3.9.2"; exit; fi'
        wrapper = f'#!/bin/sh\n{hidden}\nexec {sys.executable} -c "{prelude}; $2"\n'
        (path / "python3").write_text(wrapper)
        (path / "python3").chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", SCRIPT],
        env={"PATH": str(path), "PYTHON": "python3", "CC": "gcc"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_python_that_does_not_run_is_not_called_too_old(tmp_path: Path) -> None:
    shim = tmp_path / "python3"
    shim.write_text("#!/bin/sh\necho 'version 3.13.1 is not installed' >&2\necho more >&2\nexit 127\n")
    shim.chmod(0o755)
    done = subprocess.run(["/bin/sh", SCRIPT], env=os.environ | {"PYTHON": str(shim)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"shmbroker: {shim} does not run (version 3.13.1 is not installed more); install")
    assert done.stderr.count("\n") == 1


def test_a_machine_with_everything_passes_in_silence() -> None:
    done = subprocess.run(["/bin/sh", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("commands", "prelude", "remedy"),
    [
        ((), "", "apt-get install python3"),
        (("python3",), "import sys; sys.version_info = (3, 9, 2)", "Python 3.9.2 is too old"),
        (("python3",), "import sys; sys.modules['ensurepip'] = None", "apt-get install python3-venv"),
        (("python3",), "", "apt-get install gcc"),
        (("python3", "gcc"), "import sysconfig; sysconfig.get_path = lambda _: '/no'", "apt-get install python3-dev"),
    ],
    ids=["no python", "old python", "no ensurepip", "no compiler", "no Python.h"],
)
def test_what_is_missing_is_named_in_one_sentence_with_its_remedy(
    tmp_path: Path, commands: tuple[str, ...], prelude: str, remedy: str
) -> None:
    code, error = preflight(tmp_path, *commands, prelude=prelude)
    assert code == 1
    assert remedy in error
    assert error.startswith("shmbroker: ")
    assert error.count("\n") == 1
