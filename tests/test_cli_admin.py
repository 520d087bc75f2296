"""Looking at a served broker and changing it from the command line: real processes, compared by content."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.command import TIMEOUT, shmbroker, shmbroker_json
from support.processes import wait_for_workers
from support.served import SETTINGS, feed, lines, runs, served, start, wait_for_the_end
from support.waiting import wait_until

import shmbroker as api
from shmbroker import memory
from shmbroker.health import EXPECTED_ROLES, findings
from shmbroker.naming import BrokerPaths
from shmbroker.tools.exit_codes import ExitCode


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    with served(tmp_path / "broker"):
        yield tmp_path / "broker"


def test_status_of_a_well_broker_shows_its_workers_and_finds_nothing(server: Path) -> None:
    shmbroker_json(server, "send", "--topic", "t", stdin=feed(lines(10)))
    health = shmbroker_json(server, "status")
    assert (health["state"], health["findings"], health["topics"]) == ("running", [], 1)
    assert {worker["role"] for worker in health["workers"]} == set(EXPECTED_ROLES)
    assert all(psutil.pid_exists(worker["pid"]) for worker in health["workers"])
    assert health["positions"]["tail"] >= health["positions"]["flushed"] >= 0
    assert health["positions"]["tail"] > 10 * len("line 0")
    text = shmbroker(server, "status").stdout
    assert re.search(r"^ *state +running, epoch 1, served", text, flags=re.MULTILINE)


def test_a_broker_that_stops_as_it_was_told_is_no_finding(server: Path) -> None:
    health = shmbroker_json(server, "status")
    gone = [worker | {"alive": False} for worker in health["workers"]]
    assert findings(health | {"state": "draining", "workers": gone}) == []
    assert findings(health | {"state": "draining", "store": health["store"] | {"state": "full"}}) != []
    assert len(findings(health | {"workers": gone})) == len(gone)


def test_status_names_a_stopped_worker_and_the_remedy(server: Path) -> None:
    (flusher,) = (w for w in shmbroker_json(server, "status")["workers"] if w["role"] == "flusher")
    os.kill(flusher["pid"], signal.SIGSTOP)
    try:
        wait_until(lambda: psutil.Process(flusher["pid"]).status() == psutil.STATUS_STOPPED, "it has stopped")
        done = shmbroker(server, "status")
        assert done.returncode == 1
        assert f"the flusher is stopped: kill -CONT {flusher['pid']}" in done.stdout
    finally:
        os.kill(flusher["pid"], signal.SIGCONT)


def test_status_without_a_broker_leaves_with_its_own_code(tmp_path: Path) -> None:
    with served(tmp_path / "broker"):
        pass
    answer = shmbroker_json(tmp_path / "broker", "status", code=ExitCode.NOT_SERVED)
    assert answer["state"] == "not running"


def test_worker_processes_show_role_and_directory_in_ps(server: Path) -> None:
    for worker in shmbroker_json(server, "status")["workers"]:
        words = psutil.Process(worker["pid"]).cmdline()
        assert f"shmbroker.workers.{worker['role']}" in words
        assert str(server) in words


def test_group_show_counts_the_lag_and_names_who_holds_the_oldest(server: Path) -> None:
    shmbroker_json(server, "topic", "create", "t", "--queues", "1")
    shmbroker_json(server, "send", "--topic", "t", stdin=feed(lines(10)))
    with api.open(server) as handle, handle.simple_consumer("g", {"t": "*"}) as consumer:
        messages = consumer.receive(max_messages=4, wait=5.0, invisible=60.0)
        consumer.ack(messages[1:])
        wait_until(lambda: shmbroker_json(server, "group", "show", "g")["lag_bytes"] > 0, "dispatched")
        lag = shmbroker_json(server, "group", "show", "g")
        assert (lag["lag_messages"], lag["in_flight"], lag["delivered_since_start"]) == (7, 1, 4)
        (queue,) = lag["queues"]
        assert queue["oldest"]["message_id"] == messages[0].message_id
        assert (queue["oldest"]["pid"], queue["oldest"]["attempts"]) == (os.getpid(), 1)
        assert lag["held_back_bytes"] > 0
        in_short = {"group": "g", "paused": False, "lag_messages": 7, "in_flight": 1, "owners": []}
        assert shmbroker_json(server, "status")["group_lag"] == [in_short]
        assert re.search(r"^ *g +7 +1 +-$", shmbroker(server, "status").stdout, flags=re.MULTILINE)
        consumer.ack(messages[0])
    assert shmbroker_json(server, "group", "list")[0]["lag_messages"] == 6
    assert len(shmbroker(server, "receive", "--group", "g", "--topic", "t").stdout.splitlines()) == 6
    assert shmbroker_json(server, "group", "show", "g")["lag_messages"] == 0


def test_group_show_marks_topics_that_the_group_does_not_subscribe_to_any_more(server: Path) -> None:
    for topic in ("orders", "refunds", "numbers"):
        shmbroker_json(server, "topic", "create", topic, "--queues", "1")
        shmbroker_json(server, "send", "--topic", topic, stdin=feed(lines(3)))
    shmbroker(server, "receive", "-g", "g", "-t", "orders", "-t", "refunds", "-t", "numbers", "--no-ack")
    shmbroker(server, "receive", "-g", "g", "-t", "orders")
    shmbroker(server, "receive", "-g", "g", "-t", "numbers")
    lag = shmbroker_json(server, "group", "show", "g")
    assert {q["topic"]: (q["subscribed"], q["lag_messages"]) for q in lag["queues"]} == {
        "orders": (False, 0),
        "refunds": (False, 3),
        "numbers": (True, 0),
    }
    shown = shmbroker(server, "group", "show", "g").stdout
    rows = re.findall(r"^ *not subscribed any more +(.*)$", shown, flags=re.MULTILINE)
    assert rows == ["orders", "refunds: 3 messages wait and keep their log until a member subscribes to it"]
    topics = re.findall(r"^ *(\w+(?: \(not subscribed\))?) +0 +\d+ +3 ", shown, flags=re.MULTILINE)
    assert topics == ["numbers", "orders (not subscribed)", "refunds (not subscribed)"]


def test_lag_counts_queues_that_no_member_has_looked_at_yet(server: Path) -> None:
    """They were made after the last member had left."""
    shmbroker_json(server, "topic", "create", "t", "--queues", "1")
    assert shmbroker(server, "receive", "--group", "g", "--topic", "t", "--wait", "0").returncode == 1
    shmbroker_json(server, "topic", "alter", "t", "--queues", "3")
    shmbroker_json(server, "send", "--topic", "t", stdin=feed(lines(9)))
    lag = shmbroker_json(server, "group", "show", "g")
    assert (lag["lag_messages"], [queue["lag_messages"] for queue in lag["queues"]]) == (9, [3, 3, 3])
    assert shmbroker_json(server, "status")["group_lag"][0]["lag_messages"] == 9


def test_looking_at_an_unknown_group_or_topic_makes_none(server: Path) -> None:
    for arguments in (["group", "show", "other"], ["group", "delete", "other", "--yes"]):
        refused = shmbroker(server, *arguments)
        assert refused.returncode == ExitCode.USAGE
        assert "group 'other' does not exist (`shmbroker group list` shows those that exist)" in refused.stderr
    refused = shmbroker(server, "topic", "delete", "other")
    assert refused.returncode == ExitCode.USAGE, "it does not ask before it looks"
    assert "topic 'other' does not exist (`shmbroker topic list` shows those that exist)" in refused.stderr
    assert (shmbroker_json(server, "group", "list"), shmbroker_json(server, "topic", "list")) == ([], [])


def test_a_group_is_deleted_on_request_unless_somebody_consumes_in_it(server: Path) -> None:
    shmbroker_json(server, "send", "--topic", "t", stdin=feed(lines(10)))
    for group in ("audit", "oudit"):
        assert shmbroker(server, "receive", "--group", group, "--topic", "t", "--max", "4").returncode == 0
    for answer in (b"", b"n\n"):
        asked = shmbroker(server, "group", "delete", "oudit", stdin=answer)
        assert (asked.returncode, asked.stdout) == (ExitCode.FINDING, "")
        assert "which has 6 messages to come? [y/N]" in asked.stderr
    with api.open(server) as handle, handle.simple_consumer("oudit", {"t": "*"}):
        refused = shmbroker(server, "group", "delete", "oudit", "--yes")
        assert (refused.returncode, f": {os.getpid()} (" in refused.stderr) == (ExitCode.REFUSED, True)
    assert shmbroker(server, "group", "delete", "oudit", stdin=b"y\n").stdout == "deleted oudit\n"
    assert [group["group"] for group in shmbroker_json(server, "group", "list")] == ["audit"]
    received = shmbroker(server, "receive", "--group", "oudit", "--topic", "t").stdout.splitlines()
    assert Counter(received) == Counter(lines(10)), "made again, it begins anew"


def test_a_message_is_found_by_its_id_and_by_its_key(server: Path) -> None:
    with api.open(server) as handle, handle.producer("p") as producer:
        for number in range(50):
            producer.send(api.Message("t", b"%d" % number, keys=f"all key-{number}"))
        wanted = producer.send(api.Message("t", b"wanted", tags="x", keys="needle", properties={"colour": "blue"}))
        (by_id,) = shmbroker_json(server, "message", "show", wanted.message_id)
        (by_key,) = shmbroker_json(server, "message", "show", "--key", "needle", "--topic", "t")
        assert by_id == by_key
        assert (by_id["body"], by_id["position"], by_id["properties"]) == (
            "wanted",
            wanted.position,
            {"colour": "blue"},
        )
        newest = shmbroker_json(server, "message", "show", "--key", "all", "--topic", "t", "--limit", "3")
        assert [message["body"] for message in newest] == ["49", "48", "47"]
    assert shmbroker(server, "message", "show", "0" * 32).returncode == ExitCode.FINDING
    assert shmbroker(server, "message", "show", "xyz").returncode == ExitCode.USAGE


def test_the_log_of_a_running_broker_is_sound_and_holds_what_was_sent(server: Path) -> None:
    sent = lines(500)
    shmbroker_json(server, "send", "--topic", "t", "--batch", "50", stdin=feed(sent))
    region = memory.attach(BrokerPaths(server))
    assert region is not None
    assert region[0].wait_for("flushed", region[0].get("tail"), int(TIMEOUT * 1e9))
    verdict = shmbroker_json(server, "log", "verify")
    assert (verdict["sound"], verdict["messages"]) == (True, 500)
    dumped = shmbroker(server, "--json", "log", "dump", "--kind", "message", "--body").stdout.splitlines()
    assert [json.loads(line)["body"] for line in dumped] == sent


def test_topics_are_created_listed_altered_and_deleted(server: Path) -> None:
    shmbroker_json(server, "topic", "create", "orders", "--queues", "3")
    shmbroker_json(server, "topic", "create", "orders", "--queues", "3")
    shmbroker_json(server, "topic", "alter", "orders", "--queues", "5", "--permission", "r")
    (topic,) = shmbroker_json(server, "topic", "list")
    assert (topic["name"], len(topic["queues"]), topic["permission"]) == ("orders", 5, "r")
    refused = shmbroker(server, "send", "--topic", "orders", stdin=b"x\n")
    assert refused.returncode == ExitCode.USAGE
    assert "NoPermission" in refused.stderr
    shmbroker_json(server, "topic", "delete", "orders", "--yes")
    assert shmbroker_json(server, "topic", "list") == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["topic", "create", "not a name"], 2, "only letters, digits"),
        (["topic", "alter", "missing", "--queues", "2"], 2, "does not exist"),
        (["topic", "alter", "missing"], 2, "--queues or --permission"),
        (["topic", "create"], 2, "NAME"),
        (["no-such-command"], 2, "no-such-command"),
        (["receive", "--topic", "t"], 2, "--group"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_name_the_cause_and_have_their_code(server: Path, arguments: list[str], code: int, says: str) -> None:
    done = shmbroker(server, *arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_counts_that_a_stop_forgets_say_so(tmp_path: Path) -> None:
    for count, total in ((5, 5), (3, 8)):
        with served(tmp_path / "broker"):
            shmbroker_json(tmp_path / "broker", "send", "--topic", "t", stdin=b"12345\n" * count)
            received = shmbroker(tmp_path / "broker", "receive", "--group", "g", "--topic", "t")
            assert received.stdout == "12345\n" * count
            (topic,) = shmbroker_json(tmp_path / "broker", "topic", "list")
            assert (topic["sent"], topic["bytes_since_start"]) == (total, 5 * count)
            shown = shmbroker(tmp_path / "broker", "topic", "list").stdout.split()
            assert shown == f"topic queues permission messages kept messages ever t 2 rw {total} {total}".split()
            lag = shmbroker_json(tmp_path / "broker", "group", "show", "g")
            assert lag["delivered_since_start"] == count
            assert "delivered since the broker started" in shmbroker(tmp_path / "broker", "group", "show", "g").stdout


def test_a_broker_that_has_just_started_shows_no_count_of_deliveries(tmp_path: Path) -> None:
    """Without a server each command may be the first of a broker: what the one before delivered it cannot know."""
    with served(tmp_path / "broker"):
        shmbroker_json(tmp_path / "broker", "send", "--topic", "t", stdin=b"1\n")
        assert shmbroker(tmp_path / "broker", "receive", "--group", "g", "--topic", "t").stdout == "1\n"
    shown = shmbroker(tmp_path / "broker", "group", "show", "g").stdout
    assert (" lag " in shown, "delivered" in shown) == (True, False)
    wait_for_the_end(tmp_path / "broker")


def test_a_second_server_is_refused(server: Path) -> None:
    second = shmbroker(server, "serve")
    assert second.returncode != 0
    assert runs(server)


def test_a_backup_holds_everything_sent_before_it_and_opens_as_a_broker(server: Path, tmp_path: Path) -> None:
    sent = [f"{number} {'x' * 3000}" for number in range(1000)]  # about three segments
    shmbroker_json(server, "send", "--topic", "t", "--batch", "50", stdin=feed(sent))
    copy = tmp_path / "copy"
    answer = shmbroker_json(server, "backup", str(copy))
    assert answer["messages"] == 1000
    shmbroker_json(server, "send", "--topic", "t", stdin=b"after the backup\n")
    manifest = json.loads((copy / "backup.json").read_text())
    assert manifest["end"] == answer["end"]
    assert len(manifest["files"]) >= 3
    assert shmbroker_json(copy, "log", "verify")["messages"] == 1000
    received = shmbroker(copy, "receive", "--group", "g", "--topic", "t")
    assert Counter(received.stdout.splitlines()) == Counter(sent)
    wait_for_the_end(copy)
    assert shmbroker(server, "backup", str(copy)).returncode == ExitCode.USAGE


def test_serve_takes_its_settings_from_another_file(tmp_path: Path) -> None:
    directory, settings = tmp_path / "broker", tmp_path / "other.toml"
    settings.write_text(SETTINGS + 'flushDiskType = "SYNC_FLUSH"\n')
    process = start(directory, "serve", "--config", str(settings))
    try:
        wait_until(lambda: runs(directory), "the broker runs")
        assert shmbroker_json(directory, "status", code=None)["flush_disk_type"] == "SYNC_FLUSH"
        process.terminate()
        assert process.wait(TIMEOUT) == 0
    finally:
        process.kill()
        process.wait()


def test_a_worker_runs_alone_and_takes_over_from_one_that_was_killed(server: Path) -> None:
    """The supervisor starts another one; whichever holds the role works, the other leaves."""
    flusher = next(worker for worker in shmbroker_json(server, "status")["workers"] if worker["role"] == "flusher")
    alone = start(server, "worker", "flusher", "--config", str(server / "broker.toml"))
    try:
        wait_until(
            lambda: "shmbroker.workers.flusher" in psutil.Process(alone.pid).cmdline(), "it has become the flusher"
        )
        assert str(server) in psutil.Process(alone.pid).cmdline()
        os.kill(flusher["pid"], signal.SIGKILL)
        sent = shmbroker_json(server, "send", "--topic", "t", stdin=feed(lines(50)))
        assert sent["statuses"] == {"SEND_OK": 50}
        assert Counter(shmbroker(server, "receive", "--group", "g", "--topic", "t").stdout.splitlines()) == Counter(
            lines(50)
        )
    finally:
        alone.terminate()
        alone.wait(TIMEOUT)
    wait_for_workers(server)
