"""What is given away: a source distribution with everything in it, a wheel with nothing that only a build needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from shmbroker._native import _core

ROOT = Path(__file__).parents[1]
TIMEOUT = 50.0
# What a working tree has besides: a build's and an interpreter's leavings.
LEAVINGS = (
    "shmbroker/_native/_core.c",
    "shmbroker/_native/_core.cpython-311-x86_64-linux-gnu.so",
    "shmbroker/__pycache__/naming.cpython-311.pyc",
    "tests/native/build/plain/ring_test",
    "build/lib/shmbroker/naming.py",
    "bench-results/2026-01-01.json",
    ".venv/pyvenv.cfg",
)
NO_COMPILER = (
    "shmbroker: the C compiler /nowhere/cc was not found; "
    "install one (Debian: apt-get install gcc) or name yours in CC."
)


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """Every file that git tracks."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a checkout to compare with")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if (ROOT / name).is_file()}


@pytest.fixture
def tree(tracked: set[str], tmp_path: Path) -> Path:
    """A copy of the working tree to build in."""
    copy = tmp_path / "tree"
    for name in (*tracked, *LEAVINGS):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if name in tracked:
            shutil.copy(ROOT / name, copy / name)
        else:
            (copy / name).write_text("left by a build")
    return copy


def run(tree: Path, code: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in ``tree`` that can import the build backend, as whoever builds does."""
    program = f"import sys; sys.path.insert(0, 'tools/packaging'); {code}"
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    return subprocess.run(
        command, cwd=tree, env=os.environ | variables, capture_output=True, text=True, timeout=TIMEOUT
    )


def test_a_source_distribution_is_what_git_tracks(tree: Path, tracked: set[str], tmp_path: Path) -> None:
    done = run(tree, "import backend; backend.build_sdist(sys.argv[1])", tmp_path)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("shmbroker-*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}
    made = {name for name in names if name.startswith("shmbroker.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == tracked


def test_a_wheel_carries_the_modules_and_no_source_of_the_native_core(
    tree: Path, tracked: set[str], tmp_path: Path
) -> None:
    code = "from setuptools import setup; setup(script_name='', script_args=['-q', 'build_py', '-d', sys.argv[1]])"
    done = run(tree, code, tmp_path / "lib")
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path / "lib").as_posix() for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    places = {"workers": "shmbroker/workers", "tools": "shmbroker/tools", "config": "shmbroker/presets"}
    modules = {
        f"{places.get(top, top)}/{rest}"
        for top, _, rest in (name.partition("/") for name in tracked if name.endswith(".py"))
        if top in {"shmbroker", *places} and not rest.startswith("packaging/")
    }
    assert built - modules == {
        "shmbroker/py.typed",
        "shmbroker/_native/_core.pyi",
        "shmbroker/presets/broker.toml",
        "shmbroker/tools/bench_floors.c",
    }
    assert modules <= built


def test_the_native_module_carries_no_debug_information() -> None:
    """An interpreter that was built with -g hands it on."""
    assert b".debug_info" not in Path(_core.__file__).read_bytes()


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_a_build_without_a_compiler_says_so_and_nothing_else(tree: Path, tmp_path: Path, hook: str) -> None:
    done = run(tree, f"import backend; backend.{hook}(sys.argv[1])", tmp_path, CC="/nowhere/cc")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{NO_COMPILER}\n")


def test_pip_install_without_a_compiler_ends_in_one_sentence(tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", tmp_path / "target", tree],
        env=os.environ | {"CC": "/nowhere/cc"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 1
    assert NO_COMPILER in done.stdout
    assert "[1 lines of output]" in done.stdout
