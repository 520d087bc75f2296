"""The machine's own limits, measured by ``bench_floors.c`` beside the broker's figures and in the same run.

A figure without the floor of its minute says little: a virtual machine's disk and clock drift by a third in an hour.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shmbroker.tools.bench_report import percentile

SOURCE = Path(__file__).with_name("bench_floors.c")
RECORD_HEADER_BYTES = 80
RECORD_ALIGN_BYTES = 8


class NoCompiler(Exception):
    """The floors are bare C and this machine has no C compiler."""


@dataclass(frozen=True, slots=True)
class Flushes:
    """What producers get who wait for the disk: acknowledged records per second, and seconds per record."""

    rate: float
    p50: float
    p99: float
    records_per_flush: float = 0.0


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, nanoseconds: Iterable[int]) -> Self:
        """Of single measurements, at least one."""
        ordered = sorted(nanoseconds)
        return cls(percentile(ordered, 0.5) / 1e9, percentile(ordered, 0.99) / 1e9)


def record_bytes(body_bytes: int) -> int:
    """Bytes of log that one message of this body takes, without tags, keys and properties."""
    size = RECORD_HEADER_BYTES + body_bytes
    return (size + RECORD_ALIGN_BYTES - 1) // RECORD_ALIGN_BYTES * RECORD_ALIGN_BYTES


class Floors:
    """Builds the C program into ``directory``, which must lie on the disk that is measured, and runs its parts."""

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise NoCompiler("the floors need a C compiler: install gcc or clang (Debian: apt install gcc)")
        self._program = directory / "bench_floors"
        self._file = directory / "bench_floors.data"
        self._file_bytes = 0
        subprocess.run([compiler, "-std=gnu11", "-O3", "-pthread", SOURCE, "-o", self._program], check=True)

    def append(self, body_bytes: int, batch: int, *, count: int, ring_bytes: int) -> float:
        """Records per second that one process appends to a ring in memory, ``batch`` of them under one lock."""
        return count / self._seconds("append", body_bytes, batch, count, ring_bytes)

    def sequential_write(self, piece_bytes: int, total_bytes: int, *, ring_bytes: int) -> float:
        """Bytes per second of ``pwrite`` + ``fdatasync`` of each piece of a ring in memory into a zero-filled file."""
        self._prepare(min(total_bytes, 1 << 30))
        count = max(1, total_bytes // piece_bytes)
        return count * piece_bytes / self._seconds("write", self._file, piece_bytes, count, ring_bytes)

    def small_write(self, piece_bytes: int, count: int) -> Latency:
        """Seconds of one ``pwrite`` + ``fdatasync`` of a small piece."""
        self._prepare(64 << 20)
        return _latency(self._run("write", self._file, piece_bytes, count, piece_bytes))

    def hand_over(self, body_bytes: int, producers: int, seconds: float) -> Flushes:
        """Producers append and wait for one flusher process, which commits at once whatever has come meanwhile."""
        self._prepare(64 << 20)
        found = self._run("handover", self._file, body_bytes, producers, seconds)
        latency = _latency(found)
        rate = found["count"] / found["elapsed_ns"] * 1e9
        return Flushes(rate, latency.p50, latency.p99, found["count"] / max(1, found["flushes"]))

    def one_way(self, rate: int, count: int, *, spin: bool = False, apart: bool = False) -> Latency:
        """From the sender's stamp to the receiver's, who sleeps on a semaphore or spins. Rate 0: one after another.

        ``apart``: each on a core of its own. Else the scheduler decides, and a ping-pong on one core is much faster.
        """
        return _latency(self._run("one_way", rate, count, int(spin), int(apart)))

    def _prepare(self, size: int) -> None:
        if self._file_bytes != size:
            self._run("prepare", self._file, size)
            self._file_bytes = size

    def _seconds(self, *arguments: object) -> float:
        return self._run(*arguments)["elapsed_ns"] / 1e9

    def _run(self, *arguments: object) -> dict[str, int]:
        command = [str(self._program), *map(str, arguments)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        found: dict[str, int] = json.loads(done.stdout)
        return found


def _latency(found: dict[str, int]) -> Latency:
    return Latency(found["p50_ns"] / 1e9, found["p99_ns"] / 1e9)
