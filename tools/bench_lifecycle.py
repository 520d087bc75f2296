"""Figures besides the data path: system calls, import, start, restart after kill -9, memory."""

from __future__ import annotations

import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import psutil

import shmbroker
from shmbroker import Message
from shmbroker._native._core import Region
from shmbroker.naming import BrokerPaths
from shmbroker.store.checkpoint import CheckpointFile
from shmbroker.tools import bench_processes as processes
from shmbroker.tools import inside
from shmbroker.tools.bench_figures import MIB, Bench, Results, wait_until
from shmbroker.tools.bench_report import Figure, NotMeasured, Target, alternate

GIB = 1024 * MIB
SYSTEM_CALL_SENDS = 100_000
MARK = "/shmbroker-bench-mark"  # a path that nobody has: a look at it shows in the trace
LARGE_BODY_BYTES = MIB
LOAD_BODY_BYTES = 1024
LOADED_TAIL_BYTES = 128 * MIB  # half of what is between two checkpoints at most
LOAD_SECONDS = 10.0
WORKERS = ("supervisor", "flusher", "dispatcher", "janitor", "scheduler")


def system_calls(bench: Bench) -> Results:
    """Count what strace sees between two marks around a burst of sends; workers run untraced beside it."""
    name = f"system calls in {SYSTEM_CALL_SENDS:,} sends"
    if shutil.which("strace") is None:
        yield NotMeasured(name, "strace is not installed")
        return
    with bench.broker() as (_, directory, _):
        trace = bench.place / "strace.log"
        program = f"from {__name__} import send_between_marks as run; run({str(directory)!r})"
        command = ["strace", "-f", "-qq", "-o", str(trace), sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            yield NotMeasured(name, f"strace: {done.stderr.strip()[-200:]}")
            return
        calls = calls_between_marks(trace.read_text())
    note = ", ".join(f"{call} {count}" for call, count in calls.most_common(4))
    yield Figure(name, calls.total(), "", target=Target(at_most=SYSTEM_CALL_SENDS / 1000), note=note)


def send_between_marks(directory: str) -> None:
    """Run under strace: a burst that fits into the ring, its messages made beforehand."""
    with shmbroker.open(directory) as broker, broker.producer(processes.GROUP) as producer:
        pool = processes.messages(1000, 100)
        for message in pool:
            producer.send(message)
        send = producer.send
        Path(MARK).exists()
        for _ in range(SYSTEM_CALL_SENDS // len(pool)):
            for message in pool:
                send(message)
        Path(MARK).exists()


def calls_between_marks(trace: str) -> Counter[str]:
    """System calls by name between the two looks at MARK, in ``strace -f`` lines ``PID call(arguments) = answer``."""
    lines = trace.splitlines()
    marks = [at for at, line in enumerate(lines) if MARK in line]
    if len(marks) != 2:
        raise processes.Failed(f"strace shows {len(marks)} marks, not 2")
    return Counter(line.split(maxsplit=1)[1].partition("(")[0] for line in lines[marks[0] + 1 : marks[1]])


def import_time(bench: Bench) -> Results:
    """The import alone, and with it all that a program that sends and receives then uses; bytecode cached."""

    def seconds(statement: str) -> float:
        program = f"import time; begin = time.perf_counter(); {statement}; print(time.perf_counter() - begin)"
        return float(subprocess.check_output([sys.executable, "-c", program], text=True))

    bare = "import json, tempfile"
    for statement in ("import shmbroker", "from shmbroker import Message, Producer, SendStatus, SimpleConsumer, open"):
        seconds(statement)
        floor, value = alternate(2 * bench.repeats, lambda: seconds(bare), partial(seconds, statement))
        yield Figure(statement, value, "s", floor, bare, Target(at_most=0.060))


def start(bench: Bench) -> Results:
    """``open`` in a new directory up to the answer to the first send, in a fresh process."""
    for flush, target in (("ASYNC_FLUSH", Target(at_most=0.3)), ("SYNC_FLUSH", None)):
        times = []
        for _ in range(bench.repeats):
            with bench.directory() as directory, Holder(directory, flush_disk_type=flush) as holder:
                times.append(holder.seconds)
        yield Figure(f"start to first send, {flush}", statistics.median(times), "s", target=target)


def restart(bench: Bench) -> Results:
    """Kill -9 of everything under load, then ``open`` up to the first send's answer: with its memory, and without."""
    for log_bytes in (1 * GIB, 20 * GIB):
        size = f"{log_bytes // GIB} GiB log"
        if log_bytes > GIB and not bench.full:
            yield NotMeasured(f"restart after kill -9, {size}", "takes 25 GiB of disk: give --full")
            continue
        if shutil.disk_usage(bench.place).free < log_bytes * 5 // 4 + 2 * bench.repeats * 2 * LOADED_TAIL_BYTES:
            yield NotMeasured(f"restart after kill -9, {size}", f"not enough free disk at {bench.place}")
            continue
        with bench.directory() as directory:
            fill(directory, log_bytes)
            for lose_memory in (False, True):
                runs = [_restart(directory, lose_memory) for _ in range(bench.repeats)]
                value, behind = (statistics.median(column) for column in zip(*runs, strict=True))
                name = f"restart after kill -9, {size}, {'without' if lose_memory else 'with'} its memory"
                note = f"killed with {behind / MIB:.0f} MiB of log behind the checkpoint"
                yield Figure(name, value, "s", target=Target(at_most=1.0), note=note)


def _restart(directory: Path, lose_memory: bool) -> tuple[float, int]:
    """Seconds, and how much log there was that the last checkpoint did not know."""
    with Holder(directory, loaded=True) as victim:
        behind = _wait_behind_checkpoint(directory)
        victim.kill_everything()
        if lose_memory:
            victim.unlink_memory()
    with Holder(directory) as successor:
        return successor.seconds, behind


def _wait_behind_checkpoint(directory: Path) -> int:
    """Wait until the log is far ahead of its checkpoint: most of what a load writes between two of them."""
    checkpoints = CheckpointFile(BrokerPaths(directory).checkpoint)
    most, end = 0, time.monotonic() + LOAD_SECONDS
    with inside.attached(directory) as region:
        while most < LOADED_TAIL_BYTES:
            last = checkpoints.read()
            behind = region.get("flushed") - (last.flushed if last is not None else 0)
            if time.monotonic() > end and behind >= most // 2:
                return behind  # a slow disk: no more than this comes together between two checkpoints
            most = max(most, behind)
            time.sleep(0.005)
    return most


def fill(directory: Path, log_bytes: int) -> None:
    """A log of large bodies."""
    with shmbroker.open(directory) as broker, broker.producer(processes.GROUP) as producer:
        message = Message(processes.TOPIC, os.urandom(LARGE_BODY_BYTES))
        for _ in range(log_bytes // LARGE_BODY_BYTES):
            producer.send(message, timeout=60.0)
        with inside.attached(directory) as region:
            wait_until(lambda: inside.drained(region), "the last flush", 120)


class Holder:
    """A fresh process that opens a directory, sends one message and stays until told to leave, or killed."""

    def __init__(self, directory: Path, *, loaded: bool = False, **settings: object) -> None:
        """``loaded``: it goes on sending."""
        program = f"from {__name__} import hold; hold({str(directory)!r}, {loaded}, {settings!r})"
        command = [sys.executable, "-c", program]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.kill()
            self._process.wait()
            raise processes.Failed(f"no broker in {directory}: exit code {self._process.returncode}")
        told = json.loads(line)
        self.seconds: float = told["seconds"]  # from before open to after the first send
        self._workers: list[int] = told["workers"]
        self._memory: list[str] = told["memory"]

    def kill_everything(self) -> None:
        """SIGKILL for this process and all workers at once; returns when none of them is left."""
        everybody = [psutil.Process(pid) for pid in (self._process.pid, *self._workers)]
        for process in everybody:
            process.suspend()  # so that nobody sees another die and replaces it
        for process in everybody:
            process.kill()
        self._process.wait()
        psutil.wait_procs(everybody, timeout=10)

    def unlink_memory(self) -> None:
        """What a power cut does to shared memory."""
        for path in self._memory:
            Path(path).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)


def hold(directory: str, loaded: bool, settings: dict[str, Any]) -> None:
    """Main of the Holder's process. Leaves cleanly when its standard input ends."""
    begin = time.perf_counter()
    with shmbroker.open(directory, **settings) as broker, broker.producer(processes.GROUP) as producer:
        producer.send(Message(processes.TOPIC, b"first"))
        seconds = time.perf_counter() - begin
        with inside.attached(Path(directory)) as region:
            workers = list(inside.worker_pids(region).values())
        memory = [str(path) for path in inside.memory_files(Path(directory))]
        print(json.dumps({"seconds": seconds, "workers": workers, "memory": memory}), flush=True)
        message = Message(processes.TOPIC, os.urandom(LOAD_BODY_BYTES))
        while loaded and not select.select([sys.stdin], [], [], 0)[0]:
            for _ in range(1000):
                producer.send(message, timeout=60.0)
        sys.stdin.read()


def memory(bench: Bench) -> Results:
    """Private memory of every process of a broker under load, and what it takes of /dev/shm."""
    count = 1_000_000 if bench.quick else 10_000_000
    with bench.broker() as (broker, directory, region):
        shared = sum(path.stat().st_blocks * 512 for path in inside.memory_files(directory))
        yield Figure("/dev/shm with defaults", shared, "B", target=Target(at_most=48 * MIB))
        with (
            broker.producer(processes.GROUP) as producer,
            broker.simple_consumer(processes.GROUP, {processes.TOPIC: "*"}) as consumer,
        ):
            batch = processes.messages(100, 100)

            def pass_through(messages: int) -> None:
                for _ in range(messages // len(batch)):
                    producer.send_batch(batch)
                    left = len(batch)
                    while left:
                        received = consumer.receive(max_messages=left, wait=10.0)
                        consumer.ack(received)
                        left -= len(received)

            wait_until(lambda: len(inside.worker_pids(region)) == len(WORKERS), "all workers")
            pass_through(max(count // 10, 500_000))  # until buffers, caches and tables have their size
            before = private_bytes(region)
            pass_through(count)
            after = private_bytes(region)
    growth = {role: after[role] - before[role] for role in before}
    note = ", ".join(f"{role} {grown / 1024:+.0f} KiB" for role, grown in growth.items())
    name = f"growth of private memory over {count / 1e6:g} M messages"
    yield Figure(name, max(0, *growth.values()), "B", target=Target(at_most=2 * MIB), note=note)


def private_bytes(region: Region) -> dict[str, int]:
    """Anonymous memory of this process and of each worker, by role.

    The ring is mapped by all of them, and mapped pages of files (the key index) are the kernel's to take back.
    """
    pids = {"client": os.getpid()} | inside.worker_pids(region)
    return {role: _anonymous_bytes(pid) for role, pid in pids.items()}


def _anonymous_bytes(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:"))
