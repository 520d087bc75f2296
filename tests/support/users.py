"""Other users for tests: programs for them, though the interpreter may lie where only root can read it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

# In a mount namespace of its own: what the program needs is mounted again below an open directory at the same place.
_OPEN_UP: Final = """
set -e
closed=$1; shift
spare=$(mktemp -d)
number=0
for place in $NEEDED; do
    number=$((number + 1)); mkdir "$spare/$number"; mount --rbind "$place" "$spare/$number"
done
mount -t tmpfs -o mode=755 tmpfs "$closed"
number=0
for place in $NEEDED; do
    number=$((number + 1)); mkdir -p "$place"; mount --move "$spare/$number" "$place"
done
rm -d "$spare"/* "$spare"
exec "$@"
"""


def wrapper_for_users() -> tuple[str, ...]:
    """What to put before a command whose process becomes another user; nothing if all can read the interpreter."""
    closed = _closed_directory()
    if closed is None:
        return ()
    needed = [place for place in _needed() if place.is_relative_to(closed)]
    outermost = [
        place for place in needed if not any(place != other and place.is_relative_to(other) for other in needed)
    ]
    words = " ".join(map(str, dict.fromkeys(outermost)))
    return ("unshare", "--mount", "env", f"NEEDED={words}", "sh", "-c", _OPEN_UP, "sh", str(closed))


def can_be_other_users() -> bool:
    """Whether a process that has become another user can run Python here."""
    command = [*wrapper_for_users(), "setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    code = "import shmbroker, shmbroker.broker, sysconfig"
    try:
        return subprocess.run([*command, sys.executable, "-c", code], capture_output=True, timeout=30).returncode == 0
    except FileNotFoundError:
        return False


def _needed() -> list[Path]:
    import shmbroker

    assert shmbroker.__file__ is not None
    source = Path(shmbroker.__file__).resolve().parents[1]
    return [Path(sys.base_prefix), Path(sys.prefix), Path(sysconfig.get_path("purelib")), source]


def _closed_directory() -> Path | None:
    """The first directory on the way to any of them that others may not pass."""
    for place in _needed():
        for parent in reversed(place.parents):
            if not parent.stat().st_mode & 0o001:
                return parent
    return None
