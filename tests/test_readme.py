"""What the README shows works as it is written there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support.command import COMMAND, environment, shmbroker
from support.processes import stop_broker, wait_gone

from shmbroker._native._core import Region
from shmbroker.config import MIB, load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()


def run_the_example(directory: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=directory, env=environment(), capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"(b'42'\n)?orders [0-9a-f]{32} paid order-42 b'42'\n", done.stdout), done.stdout


def test_the_example_for_other_processes_runs_as_written(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", API, flags=re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    directory = tmp_path / "data" / "spawned"
    received = shmbroker(directory, "receive", "--group", "audit", "--topic", "results").stdout.split()
    assert sorted(map(int, received)) == list(range(10))
    wait_gone(directory)


def test_what_the_readme_says_about_the_cost_is_true() -> None:
    """Disk: the segment in use, those ahead, and the reserve."""

    def costs(**settings: str) -> tuple[int, int]:
        config = load(arguments=settings, environment={})
        memory = sum(Region.sizes(config.native_limits(), config.layout.ring_bytes))
        segments = 1 + config.runtime.segments_ahead + config.runtime.reserve_segments
        return round(memory / MIB), config.layout.segment_bytes * segments // MIB

    memory, disk = costs()
    assert f"{memory} MiB of `/dev/shm`, and {disk} MiB of disk" in README
    memory, disk = costs(segment_bytes="8 MiB", ring_bytes="4 MiB")
    assert f'`segment_bytes="8 MiB"` it is {disk} MiB of disk' in README
    assert f'`ring_bytes="4 MiB"` {memory} MiB of memory' in README.replace("\n", " ")
    assert f"A topic has {load(environment={}).runtime.default_topic_queues} queues" in README


def test_the_example_and_the_command_lines_behind_it_run_as_written(tmp_path: Path) -> None:
    """Typed one after the other, in one place: every line in turn, in one shell; a failing one fails the test."""
    directory = tmp_path / "data" / "orders"
    directory.mkdir(parents=True)
    (directory / "broker.toml").write_text("embed_grace_ms = 60_000\n")  # a slow machine types slowly
    run_the_example(tmp_path)
    (block,) = re.findall(r"```\n([^`]*shmbroker --help.*?)```", README, flags=re.DOTALL)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "shmbroker").write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    (programs / "shmbroker").chmod(0o755)
    settings = {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["/bin/sh", "-e", "-c", block],
        cwd=tmp_path,
        env=environment() | settings,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    received = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert sorted(received) == list(range(1, 1001))
    assert re.search(r"^ *orders +4 +rw +1 +1$", done.stdout, flags=re.MULTILINE), "the broker of the example"
    assert (tmp_path / "COPY" / "backup.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["COPY", "bin", "data"]
    stop_broker(directory)
