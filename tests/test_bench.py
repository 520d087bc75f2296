"""The benchmark's own parts: its floors measure something, its targets and its system-call count can fail."""

from __future__ import annotations

from collections import Counter
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
from support.running import running

from shmbroker.tools import bench_consumers, bench_processes
from shmbroker.tools.bench_floors import Floors, record_bytes
from shmbroker.tools.bench_lifecycle import MARK, calls_between_marks
from shmbroker.tools.bench_processes import Failed
from shmbroker.tools.bench_report import Figure, Target, alternate, human

pytestmark = pytest.mark.native

resource_tracker.ensure_running()  # multiprocessing's own, which it starts with the first process and keeps


def test_the_floors_build_and_measure_this_machine(tmp_path: Path) -> None:
    floors = Floors(tmp_path)
    assert floors.append(100, 1, count=1000, ring_bytes=1 << 20) > 0
    assert floors.sequential_write(1 << 20, 4 << 20, ring_bytes=2 << 20) > 0
    durable = floors.hand_over(100, 2, 0.1)
    assert durable.rate > 0
    assert 0 < durable.p50 <= durable.p99
    for spin in (False, True):
        latency = floors.one_way(2000, 20, spin=spin)
        assert 0 < latency.p50 <= latency.p99
    apart = floors.one_way(0, 20, apart=True)
    assert 0 < apart.p50 <= apart.p99


def test_the_floor_appends_records_as_large_as_the_brokers() -> None:
    assert [record_bytes(size) for size in (0, 1, 8, 100, 1024)] == [80, 88, 88, 184, 1104]


@pytest.mark.parametrize(
    ("target", "value", "floor", "reached"),
    [
        (Target(at_least=10), 10, None, True),
        (Target(at_least=10), 9, None, False),
        (Target(at_most=10), 11, None, False),
        (Target(at_most=1.3, of_floor=True), 13, 10, True),
        (Target(at_most=1.3, of_floor=True), 14, 10, False),
        (Target(at_least=0.8, of_floor=True), 7, 10, False),
        (None, 7, 10, None),
    ],
)
def test_a_figure_knows_whether_its_target_was_reached(
    target: Target | None, value: float, floor: float | None, reached: bool | None
) -> None:
    assert Figure("x", value, "s", floor, target=target).reached is reached


def test_floor_and_figure_take_turns_and_their_medians_count() -> None:
    turns: list[str] = []
    values = iter([3.0, 30.0, 1.0, 10.0, 2.0, 20.0])

    def run(name: str) -> float:
        turns.append(name)
        return next(values)

    assert alternate(3, lambda: run("floor"), lambda: run("figure")) == (2.0, 20.0)
    assert turns == ["floor", "figure"] * 3


def test_system_calls_between_the_marks_are_counted_by_name() -> None:
    mark = f'newfstatat(AT_FDCWD, "{MARK}", 0x7ffd, 0) = -1 ENOENT (No such file or directory)'
    trace = f"7 read(3) = 1\n7 {mark}\n7 futex(0x1, FUTEX_WAKE, 1) = 1\n8 futex(0x1) = 0\n7 {mark}\n7 close(3) = 0\n"
    assert calls_between_marks(trace) == Counter(futex=2)
    with pytest.raises(Failed):
        calls_between_marks(f"7 {mark}\n")


def test_figures_are_written_with_a_fitting_unit() -> None:
    assert human(1_530_000, "1/s") == "1.53 M/s"
    assert human(126e-6, "s") == "126 us"
    assert human(2.5 * 2**30, "B/s") == "2.5 GiB/s"
    assert human(7, "") == "7"


def test_push_consumers_are_fed_until_all_is_acknowledged(directory: Path) -> None:
    count = bench_consumers.BACKLOG + 10_000
    with running(directory, ring_bytes="32 MiB", segment_bytes="32 MiB", claim_window=1024) as broker:
        broker.create_topic(bench_processes.TOPIC)
        feed = (bench_consumers.feed, (directory, count, 100))
        push = (bench_consumers.push, (directory, count))
        answers = bench_processes.run_fleet([feed, push, push], seconds=60)
        assert all(answer > 0 for answer in answers)
        assert bench_consumers.acked(broker) == count


def test_a_lagging_consumer_catches_up_beside_producers_who_keep_their_pace_meanwhile(directory: Path) -> None:
    count, rate = 10_000, 1000
    with running(directory, segment_bytes="4 MiB") as broker:
        broker.create_topic(bench_processes.TOPIC)
        broker.create_group(bench_processes.GROUP)
        with broker.producer("test") as producer:
            for _ in range(count // 100):
                producer.send_batch(bench_processes.messages(100, 1024))
        lagging = (bench_consumers.receive_lagging, (directory, count, 32, 2))
        beside = (bench_consumers.send_beside, (directory, rate, 1024, count))
        caught, kept = bench_processes.run_fleet([lagging, beside], seconds=60)
        assert min(caught.seconds, caught.bare_seconds, caught.processor) > 0
        assert 0 < kept < 2 * rate
        assert bench_consumers.acked(broker) >= count


def test_who_sleeps_and_who_works_is_told_by_its_processor_time(directory: Path) -> None:
    with running(directory) as broker:
        broker.create_topic(bench_processes.TOPIC)
        roles = (bench_consumers.watch_workers, bench_consumers.sleep_in_receive, bench_consumers.sleep_in_push)
        workers, *sleepers = bench_processes.run_fleet([(role, (directory, 0.2)) for role in roles], seconds=60)
        assert {"supervisor", "flusher", "dispatcher", "janitor", "scheduler"} <= set(workers)
        assert all(0 <= used < 0.2 for used in (*workers.values(), *sleepers))
