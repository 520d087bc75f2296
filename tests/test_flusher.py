"""The flusher as a process: what it says is durable is on the disk, and nobody is told more than that."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.running import log_bodies, running, starts_of, wait_restarted, wait_word, worker_pid
from support.waiting import assert_in_time, wait_until

import shmbroker
from shmbroker import Message, SendResult, SendStatus
from shmbroker.store.flush_policy import LARGE_BYTES, FlushPolicy

EDGES = [
    "flusher.before_pwrite=kill",
    "flusher.pwrite=torn:100",
    "flusher.after_pwrite=kill",
    "flusher.before_fdatasync=kill",
    "flusher.after_fdatasync=kill",
    "flusher.after_publish=kill",
    "flushed.stored=kill",
]
SYNC = {"flush_disk_type": "SYNC_FLUSH"}


def body(number: int) -> bytes:
    return b"message %d " % number + b"." * (number % 200)


# ---- policy ------------------------------------------------------------------------------------------------------


def test_sync_flush_never_waits() -> None:
    policy = FlushPolicy(True, 1000, 60.0, clock=lambda: 0.0)
    assert policy.due(1)


def test_async_flush_waits_for_bytes_or_for_the_interval() -> None:
    now = [100.0]
    policy = FlushPolicy(False, 1000, 0.5, clock=lambda: now[0])
    assert not policy.due(5000), "the first look starts the tick, in which a burst gathers"
    assert policy.due(1000)
    assert not policy.due(999)
    now[0] += 0.5
    assert policy.due(1)
    policy.flushed()
    assert not policy.due(1)


def test_async_flush_hurries_for_who_waits_and_for_much() -> None:
    policy = FlushPolicy(False, 1000, 60.0, clock=lambda: 0.0)
    assert policy.due(LARGE_BYTES)
    assert not policy.due(1)
    policy.hurry()
    assert policy.due(1)
    policy.flushed()
    assert not policy.due(1)


# ---- group commit ------------------------------------------------------------------------------------------------


def test_one_fdatasync_answers_everybody_who_waits_for_it(tmp_path: Path) -> None:
    """Each fdatasync is made to take 50 ms or more: 16 senders of 5 messages would need 4 s if each had its own."""
    with running(tmp_path / "b", "flusher/flusher.before_fdatasync=sleep:50@1+", **SYNC) as broker:
        broker.create_topic("orders")
        sent: list[bytes] = []

        def attempt() -> float:
            statuses: list[SendStatus] = []

            def send(sender: int) -> None:
                with broker.producer(f"sender{sender}") as producer:
                    statuses.extend(producer.send(Message("orders", body(sender))).status for _ in range(5))

            senders = [threading.Thread(target=send, args=(number,)) for number in range(16)]
            begin = time.monotonic()
            for sender in senders:
                sender.start()
            for sender in senders:
                sender.join()
            took = time.monotonic() - begin
            assert statuses == [SendStatus.SEND_OK] * 80
            assert took >= 5 * 0.05
            sent.extend(body(number) for number in range(16) for _ in range(5))
            return took

        assert_in_time(attempt, 2.0)
    assert sorted(log_bodies(tmp_path / "b")) == sorted(sent)


def test_async_flush_reaches_the_disk_by_itself(tmp_path: Path) -> None:
    with running(tmp_path / "b", flush_interval=0.05) as broker, broker.producer("p") as producer:
        result = producer.send(Message("orders", b"one"))
        wait_word(broker, "flushed", result.end_position)


def test_confirm_makes_an_idle_flusher_flush_at_once(tmp_path: Path) -> None:
    with running(tmp_path / "b", flush_interval=60.0) as broker, broker.producer("p") as producer:
        result = producer.send(Message("orders", b"one"))
        assert result.confirm(timeout=10.0) is SendStatus.SEND_OK
        assert broker.region.get("flushed") >= result.end_position


# ---- slow and dead -----------------------------------------------------------------------------------------------


def test_a_stopped_flusher_gives_flush_disk_timeout_on_time_and_then_delivers_once(tmp_path: Path) -> None:
    with running(tmp_path / "b", **SYNC, sync_flush_timeout=0.3) as broker, broker.producer("p") as producer:
        assert producer.send(Message("orders", b"before")).status is SendStatus.SEND_OK
        os.kill(worker_pid(broker, "flusher"), signal.SIGSTOP)
        results: list[SendResult] = []

        def attempt() -> float:
            begin = time.monotonic()
            results.append(producer.send(Message("orders", b"meanwhile")))
            took = time.monotonic() - begin
            assert results[-1].status is SendStatus.FLUSH_DISK_TIMEOUT
            assert took >= 0.3
            return took

        assert_in_time(attempt, 1.3)
        result = results[-1]
        assert result.confirm(timeout=0.01) is SendStatus.FLUSH_DISK_TIMEOUT
        os.kill(worker_pid(broker, "flusher"), signal.SIGCONT)
        assert result.confirm(timeout=10.0) is SendStatus.SEND_OK
        assert producer.send(Message("orders", b"after")).status is SendStatus.SEND_OK
        assert starts_of(broker, "flusher") == 1
    assert log_bodies(tmp_path / "b") == [b"before", *([b"meanwhile"] * len(results)), b"after"]


@pytest.mark.crash
@pytest.mark.parametrize(("mode", "edge"), [("SYNC_FLUSH", edge) for edge in EDGES] + [("ASYNC_FLUSH", EDGES[1])])
def test_a_flusher_killed_at_any_edge_loses_and_doubles_nothing(tmp_path: Path, mode: str, edge: str) -> None:
    name, _, action = edge.partition("=")
    with (
        running(tmp_path / "b", f"flusher/{name}={action}@7", flush_disk_type=mode, flush_interval=0.01) as broker,
        broker.producer("p") as producer,
    ):
        sent = 0

        def killed() -> bool:
            nonlocal sent
            assert producer.send(Message("orders", body(sent))).status is SendStatus.SEND_OK
            sent += 1
            return starts_of(broker, "flusher") > 1

        wait_until(killed, f"the flusher killed at {edge}")
        for number in range(sent, sent + 50):
            assert producer.send(Message("orders", body(number))).status is SendStatus.SEND_OK
    assert log_bodies(tmp_path / "b") == [body(number) for number in range(sent + 50)]


def test_a_flush_of_much_ends_between_two_groups(tmp_path: Path) -> None:
    """Whatever ``flushed`` becomes on the way is a place at which no batch is cut in two."""
    batch_bytes = 100 * 208
    slow = "flusher/flusher.after_publish=sleep:100@1+"  # so that each step is seen
    with (
        running(tmp_path / "b", slow, ring_bytes=32 << 20, segment_bytes=32 << 20, flush_interval=60.0) as broker,
        broker.producer("p") as producer,
    ):
        broker.create_topic("orders", queues=1)
        flusher = worker_pid(broker, "flusher")
        wait_word(broker, "user_capacity", 32 << 20)
        os.kill(flusher, signal.SIGSTOP)
        ends = [producer.send_batch([Message("orders", b"x" * 128)] * 100).end_position for _ in range(600)]
        assert ends[-1] - ends[0] > 2 * (4 << 20)
        seen = {broker.region.get("flushed")}
        os.kill(flusher, signal.SIGCONT)

        def all_of_it() -> bool:
            seen.add(broker.region.get("flushed"))
            return ends[-1] in seen

        wait_until(all_of_it, "all flushed")
        assert ends[1] - ends[0] == batch_bytes
        assert {flushed for flushed in seen if flushed >= ends[0]} <= set(ends)
        assert len(seen) > 2, "it was flushed in steps"


# ---- a failing disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flusher.before_fdatasync", "flusher.pwrite"])
def test_after_eio_nothing_is_ever_acknowledged_and_the_reason_is_named(tmp_path: Path, name: str) -> None:
    with running(tmp_path / "b", f"flusher/{name}=errno:EIO@3", **SYNC) as broker, broker.producer("p") as producer:
        acknowledged: list[bytes] = []
        while producer.send(Message("orders", body(len(acknowledged)))).status is SendStatus.SEND_OK:
            acknowledged.append(body(len(acknowledged)))
        flushed = broker.region.get("flushed")
        with pytest.raises(shmbroker.StoreReadOnly, match="errno 5"):
            producer.send(Message("orders", b"later"))
        assert (broker.region.get("store_state"), broker.region.get("store_errno")) == (2, errno.EIO)
        assert broker.region.get("flushed") == flushed
        assert starts_of(broker, "flusher") == 1, "it lives on, so that status and readers do"
        assert len(acknowledged) < 100
    # The memory was kept; on a disk that works the new flusher writes again what is not known to be on it.
    with running(tmp_path / "b", **SYNC) as broker, broker.producer("p") as producer:
        assert producer.send(Message("orders", b"mended")).status is SendStatus.SEND_OK
    bodies = log_bodies(tmp_path / "b")
    assert bodies[: len(acknowledged)] == acknowledged
    assert bodies[-1] == b"mended"
    assert len(bodies) == len(set(bodies))


def test_a_full_disk_refuses_sends_keeps_everything_and_resumes_by_itself(small_disk: Path) -> None:
    with running(small_disk / "b", **SYNC, send_timeout=0.5) as broker, broker.producer("p") as producer:
        sent = 0

        def send() -> None:
            nonlocal sent
            assert producer.send(Message("orders", body(sent) + bytes(20_000))).status is SendStatus.SEND_OK
            sent += 1

        def send_until_refused() -> None:
            while True:
                send()

        ballast = small_disk / "ballast"
        room = os.statvfs(small_disk)
        ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - (8 << 20)))
        with pytest.raises(shmbroker.StoreFull):
            send_until_refused()
        assert broker.region.get("store_state") == 1
        with pytest.raises(shmbroker.StoreFull):
            send()
        ballast.unlink()

        def accepted() -> bool:
            try:
                send()
            except (shmbroker.StoreFull, shmbroker.BrokerBusy):
                return False
            return True

        wait_until(accepted, "sends accepted again")
        wait_until(lambda: broker.region.get("store_state") == 0, "the store well again")
        send()
    assert log_bodies(small_disk / "b") == [body(number) + bytes(20_000) for number in range(sent)]


def test_who_waits_for_a_disk_without_room_does_not_make_the_flusher_spin(tmp_path: Path) -> None:
    with running(tmp_path / "b", "flusher/flusher.pwrite=errno:ENOSPC@3+") as broker, broker.producer("p") as producer:
        flusher = worker_pid(broker, "flusher")
        results = []
        for number in range(10):
            results.append(producer.send(Message("orders", body(number))))
            results[-1].confirm(timeout=0.01)  # a flush for each
        busy = sum(psutil.Process(flusher).cpu_times()[:2])
        assert results[-1].confirm(timeout=2.0) is SendStatus.FLUSH_DISK_TIMEOUT
        assert sum(psutil.Process(flusher).cpu_times()[:2]) - busy < 0.3
        os.kill(flusher, signal.SIGKILL)  # the next one has room
        assert results[-1].confirm(timeout=30.0) is SendStatus.SEND_OK
    assert log_bodies(tmp_path / "b") == [body(number) for number in range(10)]


def test_a_flusher_that_is_to_leave_a_full_disk_keeps_house_and_gives_up_as_an_orphan(tmp_path: Path) -> None:
    with running(tmp_path / "b", "flusher/flusher.pwrite=errno:ENOSPC@3+") as broker, broker.producer("p") as producer:
        flusher = worker_pid(broker, "flusher")

        def beat() -> int:
            return next(int(worker["beat_ns"]) for worker in broker.region.workers() if worker["role"] == "flusher")

        for number in range(10):
            result = producer.send(Message("orders", body(number)))
            assert result.status is SendStatus.SEND_OK
            result.confirm(timeout=0.01)  # a flush for each
        assert broker.region.get("flushed") < broker.region.get("tail")
        os.kill(flusher, signal.SIGTERM)
        told, busy = time.monotonic_ns(), sum(psutil.Process(flusher).cpu_times()[:2])
        wait_until(lambda: beat() > told + 1_000_000_000, "housekeeping for a second")
        assert sum(psutil.Process(flusher).cpu_times()[:2]) - busy < 0.5
        os.kill(worker_pid(broker, "supervisor"), signal.SIGKILL)
        wait_until(lambda: worker_pid(broker, "flusher") != flusher, "the next flusher")
        wait_word(broker, "flushed", broker.region.get("tail"))
    assert log_bodies(tmp_path / "b") == [body(number) for number in range(10)]


def test_a_killed_flushers_successor_takes_over_its_segments(tmp_path: Path) -> None:
    with running(tmp_path / "b", **SYNC) as broker, broker.producer("p") as producer:
        for number in range(120):
            if number in (40, 80):
                os.kill(worker_pid(broker, "flusher"), signal.SIGKILL)
                wait_restarted(broker, "flusher", number // 40)
            assert producer.send(Message("orders", body(number) + bytes(30_000))).status is SendStatus.SEND_OK
    assert log_bodies(tmp_path / "b") == [body(number) + bytes(30_000) for number in range(120)]
