"""One broker for several users who share a group (R25): who may use it, who may not, and what stays closed."""

from __future__ import annotations

import grp
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import objects_of
from support.orderly import semaphore_sets
from support.processes import SMALL, Child, processes_of, stop_broker
from support.users import can_be_other_users, wrapper_for_users
from support.waiting import wait_until

from shmbroker.access import arrange, group_of
from shmbroker.naming import BrokerPaths

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not can_be_other_users(), reason="needs root, to become other users that can run Python"
)

OWNER, FRIEND, STRANGER = 54_321, 54_322, 54_323  # nobody's user ids
TEAM = 54_320
SHARED = {**SMALL, "share_with_group": str(TEAM), "embed_grace": 5.0}

# Becomes a user of the groups named, then acts on lines of Python and answers each with a line.
USER = """
    import os, sys, shmbroker
    from shmbroker import Message
    os.setgroups([int(group) for group in sys.argv[3].split()])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
    directory = sys.argv[1]
    for line in sys.stdin:
        try:
            exec(line)
            print("done")
        except Exception as error:
            print(type(error).__name__, error)
"""


@pytest.fixture
def place(directory: Path) -> Iterator[Path]:
    """A directory of the owner's, below directories that everybody may pass."""
    for parent in directory.parents:
        if parent.is_relative_to(tempfile.gettempdir()):
            parent.chmod(parent.stat().st_mode | 0o011)
    directory.mkdir(mode=0o700)
    os.chown(directory, OWNER, OWNER)
    yield directory
    stop_broker(directory)


def user(place: Path, uid: int, *groups: int) -> Child:
    return Child(USER, place, uid, " ".join(map(str, groups)), wrapper=wrapper_for_users())


DRAIN = "while len(got) < 400: consumer.ack([(m, got.update({m.body: 1}))[0] for m in consumer.receive(9, wait=10.0)])"


def say(child: Child, *lines: str) -> str:
    """The answer to the last line; those before it must succeed."""
    answer = "done"
    for line in lines:
        assert answer == "done", answer
        child.write_line(line)
        answer = child.read_line()
    return answer


def opening(**settings: object) -> str:
    return f"broker = shmbroker.open(directory, **{settings})"


def test_members_of_the_group_send_and_receive_and_nobody_else_gets_in(place: Path) -> None:
    with user(place, OWNER, TEAM) as owner, user(place, FRIEND, TEAM) as friend, user(place, STRANGER) as stranger:
        assert say(owner, opening(**SHARED), "producer = broker.producer('test')") == "done"
        assert say(owner, "producer.send(Message('orders', b'from the owner'))") == "done"
        assert say(friend, opening(), "consumer = broker.simple_consumer('audit', {'orders': '*'})") == "done"
        assert say(friend, "messages = consumer.receive(wait=10.0); print(messages[0].body)") == "b'from the owner'"
        assert friend.read_line() == "done"
        assert say(friend, "consumer.ack(messages, durable=True)") == "done"
        assert say(friend, "broker.producer('test').send(Message('orders', b'from the friend'))") == "done"
        assert say(stranger, opening()).startswith("AttachRefused")
        assert say(owner, "print(broker.simple_consumer('other', {'orders': '*'}).receive(9)[-1].body)") in (
            "b'from the owner'",
            "b'from the friend'",
        )
        assert owner.read_line() == "done"


def test_members_of_the_group_own_queues_and_the_owner_of_the_directory_clears_away(place: Path) -> None:
    """Whoever is first makes the semaphores; they are the directory's owner's, who alone stops the broker."""
    consume = "consumer = broker.push_consumer('audit', lambda *_: answer, {'orders': '*'}, orderly=True)"
    answer = "answer = shmbroker.ConsumeOrderlyStatus.SUCCESS"
    before = semaphore_sets(OWNER)
    with user(place, OWNER, TEAM) as owner, user(place, FRIEND, TEAM) as friend:
        assert say(owner, opening(**SHARED), answer, "broker.create_topic('orders', 2)") == "done"
        assert say(friend, opening(), answer, consume) == "done"
        assert len(semaphore_sets(OWNER) - before) == 1
        assert semaphore_sets(FRIEND) == set()
        assert say(owner, consume, "wanted = sorted(client['slot'] for client in broker.region.clients())") == "done"
        halved = "sorted(table['owner'] for table in broker.region.progress() if table['owner'] is not None) == wanted"
        while say(owner, f"print({halved})") != "True":
            assert owner.read_line() == "done"
        assert owner.read_line() == "done"
        friend.kill()
        assert say(owner, "consumer.shutdown()", "broker.close()") == "done"
    stop_broker(place)
    assert semaphore_sets(OWNER) == before


def test_everything_is_open_to_the_group_and_nothing_to_others(place: Path) -> None:
    with user(place, OWNER, TEAM) as owner:
        assert say(owner, opening(**SHARED), "broker.producer('test').send(Message('orders', b'x'))") == "done"
        wait_until(lambda: any((place / "queues").rglob("*.cq*")) or any(place.glob("queues/*/*/*")), "a queue file")
        found = [place, *place.rglob("*"), *(Path("/dev/shm", name) for name in objects_of(place))]
        assert len(found) > 12
        for path in found:
            status = path.lstat()
            wanted = 0o2770 if path.is_dir() else 0o660
            assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (wanted, OWNER, TEAM), path


def test_without_the_setting_a_group_is_nobody(place: Path) -> None:
    with user(place, OWNER, TEAM) as owner, user(place, FRIEND, TEAM, OWNER) as friend:
        assert say(owner, opening(**SMALL)) == "done"
        assert say(friend, opening()).startswith("AttachRefused")


def test_a_reader_behind_the_ring_needs_the_files_too(place: Path) -> None:
    with user(place, OWNER, TEAM) as owner, user(place, FRIEND, TEAM) as friend:
        assert say(owner, opening(**SHARED), "producer = broker.producer('test')") == "done"
        assert (
            say(owner, "for i in range(400): producer.send(Message('orders', b'%d' % i + b'x' * 9000), 30.0)") == "done"
        )
        assert say(friend, opening(), "consumer = broker.simple_consumer('audit', {'orders': '*'})") == "done"
        assert say(friend, "got = {}", DRAIN) == "done"
        assert say(friend, "print(got == {b'%d' % i + b'x' * 9000: 1 for i in range(400)})") == "True"
        assert friend.read_line() == "done"


@pytest.mark.crash
def test_a_friend_survives_the_death_of_the_broker_and_leaves_the_start_to_the_owner(place: Path) -> None:
    with user(place, OWNER, TEAM) as owner, user(place, FRIEND, TEAM) as friend:
        assert say(owner, opening(**SHARED)) == "done"
        assert say(friend, opening(), "producer = broker.producer('test')") == "done"
        assert say(friend, "producer.send(Message('others', b'a segment stands ready'))") == "done"
        os.kill(owner.pid, 9)
        owner.wait()
        victims = [process for process in processes_of(place) if process.pid != friend.pid]
        for signal in (19, 9):
            for victim in victims:
                victim.send_signal(signal)
        assert say(friend, "producer.send(Message('orders', b'kept'))") == "done"  # the memory still stands
        with user(place, OWNER, TEAM) as successor:
            assert say(successor, opening(), "consumer = broker.simple_consumer('audit', {'orders': '*'})") == "done"
            assert say(successor, "print(consumer.receive(wait=10.0)[0].body)") == "b'kept'"
            assert successor.read_line() == "done"
            assert say(friend, "producer.send(Message('orders', b'again'))") == "done"
            assert say(successor, "print(consumer.receive(wait=10.0)[0].body)") == "b'again'"


def test_an_object_of_another_group_or_open_to_all_is_refused(place: Path) -> None:
    with user(place, OWNER, TEAM) as owner, user(place, FRIEND, TEAM, OWNER) as friend:
        assert say(owner, opening(**SHARED)) == "done"
        control = next(Path("/dev/shm", name) for name in objects_of(place) if name.endswith("-c"))
        control.chmod(0o666)
        assert "mode 666: expected the directory's owner and group and 660" in say(friend, opening())
        control.chmod(0o660)
        os.chown(control, -1, OWNER)
        assert f"group {OWNER} and mode 660" in say(friend, opening())
        os.chown(control, -1, TEAM)
        assert say(friend, opening()) == "done"


def test_the_setting_is_checked(place: Path) -> None:
    with user(place, OWNER) as owner:
        answer = say(owner, opening(**SMALL, share_with_group="no-such-group"))
        assert answer == f"ConfigError share_with_group = 'no-such-group': there is no such group (in {place})"
        answer = say(owner, opening(**SMALL, share_with_group=TEAM))
        assert answer == f"ConfigError share_with_group: user {OWNER} is no member of group {TEAM} (in {place})"
    assert group_of({"share_with_group": grp.getgrgid(0).gr_name}) == 0


def test_a_directory_can_be_opened_and_closed_again(tmp_path: Path) -> None:
    paths = BrokerPaths(tmp_path / "broker")
    paths.make()
    outside = tmp_path / "outside"
    outside.write_text("not ours")
    outside.chmod(0o600)
    (paths.log / "link").symlink_to(outside)
    (paths.queues / "1").mkdir(mode=0o700)
    (paths.queues / "1" / "file").touch(mode=0o600)
    arrange(paths, TEAM)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (paths.directory, paths.run, paths.queues / "1")} == {0o2770}
    assert stat.S_IMODE((paths.queues / "1" / "file").stat().st_mode) == 0o660
    arrange(paths, None)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (paths.directory, paths.run, paths.queues / "1")} == {0o700}
    assert stat.S_IMODE((paths.queues / "1" / "file").stat().st_mode) == 0o600
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
