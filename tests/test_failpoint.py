"""Failpoints: parsed strictly, passed in order, all of them known."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmbroker import failpoint
from shmbroker._native import _core
from shmbroker.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    failpoint.arm("", "client")


def run_armed(text: str, code: str) -> subprocess.CompletedProcess[bytes]:
    """Pass failpoints in a process of their own."""
    head = f"from shmbroker import failpoint as f; f.arm({text!r}, 'client'); "
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, timeout=20)


def test_unarmed_it_does_nothing_and_asks_for_no_name() -> None:
    assert failpoint.failpoint("flusher.after_pwrite") is None


def test_an_errno_is_raised_at_that_pass_only() -> None:
    failpoint.arm("flusher.before_fdatasync=errno:EIO@2", "flusher")
    failpoint.failpoint("flusher.before_fdatasync")
    with pytest.raises(OSError, match="failpoint") as caught:
        failpoint.failpoint("flusher.before_fdatasync")
    assert caught.value.errno == errno.EIO
    failpoint.failpoint("flusher.before_fdatasync")


def test_a_plus_means_every_later_pass_too() -> None:
    failpoint.arm("flusher.pwrite=torn:7@2+", "flusher")
    assert [failpoint.failpoint("flusher.pwrite") for _ in range(4)] == [None, 7, 7, 7]


def test_a_role_confines_it_to_processes_of_that_role() -> None:
    failpoint.arm("janitor/flusher.pwrite=torn:7", "flusher")
    assert failpoint.failpoint("flusher.pwrite") is None
    failpoint.arm("flusher/flusher.pwrite=torn:7", "flusher")
    assert failpoint.failpoint("flusher.pwrite") == 7


@pytest.mark.parametrize(
    ("action", "code"), [("kill", -signal.SIGKILL), ("exit", failpoint.FAILPOINT_EXIT_CODE), ("kill@2", 0)]
)
def test_kill_and_exit_end_the_process_there(action: str, code: int) -> None:
    done = run_armed(f"segment.created={action}", "f.failpoint('segment.created')")
    assert done.returncode == code


def test_native_failpoints_are_armed_in_the_native_core() -> None:
    name = _core.failpoint_names()[0]
    assert run_armed(f"{name}=kill", "").returncode == 0, "armed, and not passed"
    with pytest.raises(ConfigError, match="a native one knows only kill, stop and exit"):
        failpoint.arm(f"{name}=errno:EIO", "client")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flusher.nowhere=kill", "does not exist"),
        ("flusher.pwrite", "expected"),
        ("flusher.pwrite=explode", "expected"),
        ("flusher.pwrite=kill@0", "expected"),
        ("flusher.pwrite=kill@x", "expected"),
        ("flusher.pwrite=errno:EWHAT", "expected"),
        ("flusher.pwrite=torn:-1", "expected"),
        ("flusher.pwrite=kill:9", "expected"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_arms_nothing(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        failpoint.arm(f"segment.created=torn:1;{text}", "client")
    assert failpoint.failpoint("segment.created") is None


def test_a_name_that_is_passed_but_not_registered_is_found_out_when_anything_is_armed() -> None:
    failpoint.arm("segment.created=torn:1", "client")
    with pytest.raises(ConfigError, match="not in the registry"):
        failpoint.failpoint("segment.imagined")


def test_the_registry_and_the_code_name_the_same_failpoints() -> None:
    passed = set()
    for top in ("shmbroker", "workers"):
        for path in (ROOT / top).rglob("*.py"):
            passed |= set(re.findall(r"\bfailpoint\(\s*\"([^\"]+)\"", path.read_text()))
    passed.discard("name")
    assert passed == set(failpoint.FAILPOINTS)


def test_the_listing_has_python_names_and_native_ones() -> None:
    names = [name for name, _ in failpoint.listing()]
    assert names == sorted(names)
    assert set(names) == set(failpoint.FAILPOINTS) | set(_core.failpoint_names())


def test_the_environment_arms_a_process_when_it_opens_a_broker(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import shmbroker, sys; shmbroker.open(sys.argv[1])", str(tmp_path)],
        capture_output=True,
        timeout=20,
        env={**os.environ, "SHMBROKER_FAILPOINTS": "no.such=kill"},
    )
    assert b"failpoint 'no.such' does not exist" in done.stderr
