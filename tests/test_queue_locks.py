"""The semaphores behind orderly queues: made when they are wanted, gone when the broker is, and what limits say."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.consuming import ALL, numbered, send
from support.listening import Gate, Heard, done_with
from support.orderly import DONE, MEMBER, Log, owners, remove_semaphores, semaphore_sets
from support.processes import SMALL, Child, kill_all, wait_for_workers, wait_gone
from support.served import serving
from support.waiting import wait_until

import shmbroker
from shmbroker import AttachRefused, ForkedHandleError, memory, remains
from shmbroker._native import _core
from shmbroker.broker import Broker
from shmbroker.config import Config
from shmbroker.descriptor import read_descriptor
from shmbroker.janitor import is_stopped
from shmbroker.naming import BrokerPaths
from shmbroker.queue_locks import key_of, open_locks

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as other users, makes namespaces: root only")

TABLES = int(SMALL["claim_tables"])

LATE = """
    import sys, shmbroker
    broker = shmbroker.open(sys.argv[1])
    try:
        broker.push_consumer("audit", print, {"orders": "*"}, orderly=True)
    except shmbroker.ShmBrokerError as error:
        print(type(error).__name__)
"""


@pytest.fixture(autouse=True)
def _no_semaphores_are_left() -> Iterator[None]:
    before = semaphore_sets()
    yield
    wait_until(lambda: semaphore_sets() <= before, "semaphores removed")


def locks_of(directory: Path) -> int | None:
    """Id of the broker's set, if there is one."""
    descriptor = read_descriptor(BrokerPaths(directory))
    assert descriptor is not None
    try:
        return int(_core.find_queue_locks(key_of(bytes.fromhex(descriptor.instance)), TABLES)[0])
    except FileNotFoundError:
        return None


def consume_in_order(broker: Broker, first: int = 0) -> None:
    heard = Heard(lambda *_: DONE)
    send(broker, *numbered(10, first))
    with broker.push_consumer("audit", heard, ALL, orderly=True):
        assert heard.wait(10) == numbered(10, first)
        wait_until(lambda: done_with(broker) == first + 10, "acknowledged")


def test_they_are_made_for_the_first_orderly_consumer_and_removed_with_the_memory(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker:
        with broker.push_consumer("beside", lambda *_: None, ALL):
            assert locks_of(directory) is None
        consume_in_order(broker)
        made = locks_of(directory)
        assert made is not None
        consume_in_order(broker, 10)
        assert locks_of(directory) == made
    wait_gone(directory)
    assert made not in semaphore_sets()


@pytest.mark.crash
def test_when_everything_is_killed_they_outlive_it_as_the_memory_does(directory: Path, tmp_path: Path) -> None:
    with Child(MEMBER, directory, tmp_path / "heard", {}, SMALL) as child:
        assert child.read_line() == "ready"
        wait_for_workers(directory)
        made = locks_of(directory)
        kill_all(directory)
    assert made in semaphore_sets()
    with shmbroker.open(directory, **SMALL) as broker:
        consume_in_order(broker)
        assert locks_of(directory) == made


@pytest.mark.crash
@pytest.mark.parametrize("edge", ["locks.made", "locks.shared"])
def test_whoever_is_killed_while_it_makes_them_leaves_them_to_the_next(
    directory: Path, tmp_path: Path, edge: str
) -> None:
    armed = {"SHMBROKER_FAILPOINTS": f"{edge}=kill"}
    with shmbroker.open(directory, **SMALL) as broker:
        with Child(MEMBER, directory, tmp_path / "heard", environment=armed) as child:
            assert child.read_line() == ""
        assert locks_of(directory) is not None
        consume_in_order(broker)


@pytest.mark.crash
@pytest.mark.parametrize("edge", ["locks.made", "locks.shared"])
def test_whoever_makes_them_while_the_broker_removes_everything_leaves_none(directory: Path, edge: str) -> None:
    armed = {"SHMBROKER_FAILPOINTS": f"client/{edge}=stop"}
    before = semaphore_sets()
    with ExitStack() as stack:
        with serving(directory):
            maker = stack.enter_context(Child(LATE, directory, environment=armed))
            wait_until(lambda: is_stopped(maker.pid), "stopped")
            assert len(semaphore_sets() - before) == 1
        assert semaphore_sets() <= before
        os.kill(maker.pid, signal.SIGCONT)
        assert maker.read_line() == "BrokerClosed"
        assert semaphore_sets() <= before


@pytest.mark.crash
def test_a_supervisor_killed_behind_their_removal_leaves_the_rest_to_the_next(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMBROKER_FAILPOINTS", "supervisor/memory.locks_removed=kill")
    with shmbroker.open(directory, **SMALL) as broker:
        consume_in_order(broker)
    monkeypatch.delenv("SHMBROKER_FAILPOINTS")
    wait_gone(directory)
    assert locks_of(directory) is None
    with shmbroker.open(directory, **SMALL) as broker:
        consume_in_order(broker, 10)


def test_those_of_a_dead_broker_go_with_the_memory_that_is_cleared_away(tmp_path: Path) -> None:
    paths = BrokerPaths(tmp_path / "broker")
    paths.make()
    layout = {key: value for key, value in SMALL.items() if key != "embed_grace"}
    config = Config.of({**layout, "ring_bytes": 1 << 20, "segment_bytes": 1 << 20})
    held = memory.create(paths, config, store=bytes(16), tail=0, epoch=1)
    made = open_locks(held.region, TABLES, paths.directory)
    held.close()
    for name in (held.descriptor.ring, held.descriptor.control):
        os.utime(f"/dev/shm{name}", (0, 0))
    paths.descriptor.unlink()  # its directory was removed
    remains.clear()
    wait_until(lambda: made not in semaphore_sets(), "removed")


def test_removed_under_a_running_consumer_they_are_made_anew_and_the_order_stands(directory: Path) -> None:
    with shmbroker.open(directory, **SMALL) as broker:
        broker.create_topic("orders", queues=2)
        gate = Gate(DONE)
        heard, other = Heard(gate), Heard(lambda *_: DONE)
        with broker.push_consumer("audit", heard, ALL, orderly=True, consume_thread_max=1):
            send(broker, *numbered(3))
            heard.wait(1)
            removed = locks_of(directory)
            assert removed is not None
            remove_semaphores(removed)
            with shmbroker.open(directory) as second, second.push_consumer("audit", other, ALL, orderly=True):
                assert locks_of(directory) not in (None, removed)
                send(broker, b"elsewhere", queue_id=1)
                gate.let_go()
                wait_until(lambda: done_with(broker) == 4, "everything acknowledged")
        assert [body for body in [*heard.bodies, *other.bodies] if body != b"elsewhere"] == numbered(3)


def test_a_forked_child_owns_nothing_and_takes_nothing_from_its_parent(broker: Broker) -> None:
    heard = Heard(lambda *_: DONE)
    with broker.push_consumer("audit", heard, ALL, orderly=True) as consumer:
        wait_until(lambda: len(owners(broker)) == 4, "all queues owned")
        child = os.fork()
        if child == 0:  # pragma: no cover - another process
            try:
                consumer.pause()
                consumer.shutdown()
                with pytest.raises(ForkedHandleError):
                    consumer._consumer.receive()
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert set(owners(broker).values()) == {os.getpid()}
        with Child(MEMBER, broker.directory, "/dev/null") as other:
            assert other.read_line() == "ready"
            wait_until(lambda: sorted(owners(broker).values()) == sorted([os.getpid(), other.pid] * 2), "halved")


@as_root
def test_a_limit_of_the_kernel_is_named_with_its_remedy(tmp_path: Path) -> None:
    source = """
        import sys, shmbroker
        with open("/proc/sys/kernel/sem", "w") as limits:
            limits.write(sys.argv[2])
        with shmbroker.open(sys.argv[1], **eval(sys.argv[3])) as broker:
            try:
                broker.push_consumer("audit", print, {"orders": "*"}, orderly=True)
            except shmbroker.LimitReached as error:
                print(error)
            with broker.push_consumer("billing", print, {"orders": "*"}):
                print("side by side")
    """
    for limits, said in (("32000 32000 32 0", "at most 0 sets (SEMMNI)"), ("10 32000 32 128", "at most 10 (SEMMSL)")):
        with Child(source, tmp_path / said[-8:-1], limits, SMALL, wrapper=("unshare", "--ipc")) as child:
            line = child.read_line()
            assert {said, "sysctl -w kernel.sem", "a set of 17 semaphores"} == {
                part for part in (said, "sysctl -w kernel.sem", "a set of 17 semaphores") if part in line
            }
            assert child.read_line() == "side by side"
            assert child.wait() == 0


@as_root
def test_the_first_set_of_a_container_has_the_id_0_and_serves_like_any_other(directory: Path) -> None:
    source = """
        import sys, shmbroker
        answer = shmbroker.ConsumeOrderlyStatus.SUCCESS
        with shmbroker.open(sys.argv[1], **eval(sys.argv[2])) as broker:
            for group in ("audit", "billing"):
                with broker.push_consumer(group, lambda *_: answer, {"orders": "*"}, orderly=True):
                    print(*open("/proc/sysvipc/sem").read().splitlines()[1].split()[1:2])
    """
    with Child(source, directory, SMALL, wrapper=("unshare", "--ipc")) as child:
        assert [child.read_line(), child.read_line()] == ["0", "0"]
        assert child.wait() == 0


@as_root
def test_a_set_that_somebody_else_made_is_not_trusted(broker: Broker) -> None:
    key = key_of(broker.region.header["instance"])
    made = _core.make_queue_locks(key, TABLES)
    _core.share_queue_locks(made, 65534, 65534, 0o666)
    try:
        with pytest.raises(AttachRefused, match=f"belong to user 65534.*ipcrm -s {made}"):
            broker.push_consumer("audit", lambda *_: DONE, ALL, orderly=True)
    finally:
        _core.remove_queue_locks(made)


def test_many_that_begin_at_once_make_one_set(broker: Broker) -> None:
    found: list[int] = []
    together = threading.Barrier(8)

    def make() -> None:
        together.wait()
        found.append(open_locks(broker.region, TABLES, broker.directory))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_log_of_calls_knows_an_order_that_was_broken(tmp_path: Path) -> None:
    """The judge of the tests with killed owners."""
    log = Log(tmp_path / "heard")
    sent = {0: numbered(2)}
    fine = ["began 0 0 1 7 0", "done 0 0 1 7 0", "began 0 1 1 7 1", "done 0 1 1 7 1"]
    log.path.write_text("\n".join(fine))
    log.check_order(sent, killed=set())
    overtaking = [fine[2], fine[3], fine[0], fine[1]]
    beside = [fine[0], "began 0 0 2 8 0", "done 0 0 2 8 0", *fine[2:]]
    for broken in (overtaking, beside, fine[:2], fine[2:]):
        log.path.write_text("\n".join(broken))
        with pytest.raises(AssertionError):
            log.check_order(sent, killed=set())
    log.path.write_text("\n".join(beside))
    log.check_order(sent, killed={7})
