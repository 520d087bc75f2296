"""``shmbroker log``: every byte is accounted for, damage is named, a torn end is not called damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command import shmbroker, shmbroker_json
from support.store_builder import StoreBuilder

from shmbroker.process import FileLock
from shmbroker.record import RecordKind, TopicBody


def build(directory: Path, messages: int = 200) -> StoreBuilder:
    """Several segments of messages, all synced, as the checkpoint says."""
    store = StoreBuilder(directory)
    store.begin_epoch()
    store.messages(messages)
    store.group(5)
    store.sync()
    store.checkpoint()
    return store


def test_verify_counts_every_record_of_a_sound_log(tmp_path: Path) -> None:
    store = build(tmp_path)
    verdict = shmbroker_json(tmp_path, "log", "verify")
    assert verdict["sound"]
    assert (verdict["first"], verdict["end"]) == (0, store.position)
    assert (verdict["records"], verdict["messages"]) == (len(store.records), 205)
    assert verdict["segments"] > 2


def test_verify_names_the_place_of_a_flipped_bit_and_goes_on_behind_it(tmp_path: Path) -> None:
    store = build(tmp_path)
    damaged = store.places[70]
    byte = store.read_bytes(damaged + 90, 1)[0]
    store.write_bytes(damaged + 90, bytes([byte ^ 4]))
    verdict = shmbroker_json(tmp_path, "log", "verify", code=1)
    assert [(place["position"], place["end"]) for place in verdict["damages"]] == [(damaged, store.places[71])]
    assert (verdict["end"], verdict["records"]) == (store.position, len(store.records) - 1)
    text = shmbroker(tmp_path, "log", "verify")
    assert text.returncode == 1
    assert f"! {damaged:,} .. {store.places[71]:,}" in text.stdout


def test_verify_names_a_missing_segment(tmp_path: Path) -> None:
    store = build(tmp_path)
    store.place.path(store.segment_bytes).unlink()
    verdict = shmbroker_json(tmp_path, "log", "verify", code=1)
    assert "segments are missing" in [place["what"] for place in verdict["damages"]]
    assert store.segment_bytes in [place["position"] for place in verdict["damages"]]
    assert verdict["end"] == store.position


def test_verify_names_a_damaged_segment_header(tmp_path: Path) -> None:
    store = build(tmp_path)
    with store.place.path(store.segment_bytes).open("r+b") as file:
        file.write(b"NOTALOG!")
    verdict = shmbroker_json(tmp_path, "log", "verify", code=1)
    assert any("a segment starts with" in place["what"] for place in verdict["damages"])


def test_verify_does_not_call_a_torn_end_damage(tmp_path: Path) -> None:
    """Unsynced records behind the checkpoint: one is missing from the middle, as after a power cut."""
    store = build(tmp_path)
    end = store.position
    first = store.message(b"torn away" * 10)
    store.message(b"by chance there!" * 10)
    store.write_bytes(first, bytes(64))
    verdict = shmbroker_json(tmp_path, "log", "verify")
    assert verdict["sound"]
    assert verdict["end"] == end
    assert verdict["torn_bytes"] == store.position - end


def test_verify_calls_lost_durable_log_damage(tmp_path: Path) -> None:
    store = build(tmp_path)
    last = store.places[-5]
    store.write_bytes(last, bytes(store.position - last))
    verdict = shmbroker_json(tmp_path, "log", "verify", code=1)
    assert [place["what"] for place in verdict["damages"]] == ["durable log is missing"]


def test_a_later_record_that_knew_the_place_to_be_durable_makes_a_hole_damage(tmp_path: Path) -> None:
    """No checkpoint says so, but the writer of a record behind the hole did (R1)."""
    store = build(tmp_path)
    store.checkpoint(flushed=0)
    hole = store.message(b"lost" * 20)
    store.sync()
    store.message(b"its writer knew" * 4)
    store.write_bytes(hole, bytes(80))
    verdict = shmbroker_json(tmp_path, "log", "verify", code=1)
    assert [place["position"] for place in verdict["damages"]] == [hole]


@pytest.mark.parametrize("witness", ["the checkpoint", "the last record"])
def test_large_records_behind_damage_are_not_taken_for_a_part_of_it(tmp_path: Path, witness: str) -> None:
    """Each of them fits into no window of the reader's that does not begin near it."""
    store = StoreBuilder(tmp_path, segment_bytes=32 << 20)
    store.begin_epoch()
    store.append(RecordKind.TOPIC, TopicBody("early", 7, 1).encode())
    damaged, following = (store.message(bytes(3_000_000)) for _ in range(2))
    store.append(RecordKind.TOPIC, TopicBody("late", 8, 1).encode())
    store.sync()
    store.message(bytes(5_000_000))
    store.checkpoint(flushed=store.flushed if witness == "the checkpoint" else 0)
    store.flip(damaged + 100)
    verdict = shmbroker_json(tmp_path, "log", "verify", code=1)
    assert [(place["position"], place["end"]) for place in verdict["damages"]] == [(damaged, following)]
    assert (verdict["end"], verdict["messages"]) == (store.position, 2)
    done = shmbroker(tmp_path, "--json", "log", "dump", "--from", str(damaged + 8), "--limit", "1")
    assert json.loads(done.stdout)["position"] == following
    assert shmbroker(tmp_path, "log", "dump", "--topic", "late", "--from", str(following)).returncode == 0


def test_dump_prints_what_was_written(tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path)
    store.begin_epoch()
    store.message(b"hello", tags="greeting", keys="k1 k2", properties={"a": "b"})
    store.message(b"\xff\x00", queue_id=2)
    store.sync()
    store.checkpoint()
    done = shmbroker(tmp_path, "--json", "log", "dump", "--kind", "message", "--body")
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["body"], first["tags"], first["keys"], first["properties"]) == (
        "hello",
        "greeting",
        "k1 k2",
        {"a": "b"},
    )
    assert (second["body_base64"], second["queue_id"], second["position"]) == ("/wA=", 2, store.places[2])


def test_dump_shows_one_topic_by_its_name_also_behind_damage(tmp_path: Path) -> None:
    """The name stands in the log's own records; a topic that was made twice has two numbers."""
    store = build(tmp_path)
    for topic_id in (7, 8):
        store.append(RecordKind.TOPIC, TopicBody("orders", topic_id, 1).encode())
        store.message(b"of %d" % topic_id, topic_id=topic_id)
        store.append(RecordKind.TOPIC, TopicBody("orders", topic_id, deleted=True).encode())
    store.sync()
    store.checkpoint()
    store.flip(store.places[70] + 90)
    arguments = ["log", "dump", "--topic", "orders", "--body", "--from", str(store.places[80])]
    done = shmbroker(tmp_path, "--json", *arguments)
    assert [json.loads(line)["body"] for line in done.stdout.splitlines()] == ["of 7", "of 8"]
    refused = shmbroker(tmp_path, "log", "dump", "--topic", "others")
    assert (refused.returncode, "topic 'others' is not in this log" in refused.stderr) == (2, True)


def test_dump_begins_at_the_next_record_and_stops_where_it_is_told(tmp_path: Path) -> None:
    store = build(tmp_path)
    done = shmbroker(tmp_path, "--json", "log", "dump", "--from", str(store.places[3] + 1), "--limit", "2")
    assert [json.loads(line)["position"] for line in done.stdout.splitlines()] == store.places[4:6]
    done = shmbroker(tmp_path, "--json", "log", "dump", "--to", str(store.places[2]))
    assert [json.loads(line)["position"] for line in done.stdout.splitlines()] == store.places[:2]


def test_dump_says_where_it_had_to_stop(tmp_path: Path) -> None:
    store = build(tmp_path)
    store.write_bytes(store.places[9], b"\xff" * 80)
    done = shmbroker(tmp_path, "log", "dump")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 9
    assert f"no valid record at position {store.places[9]}" in done.stderr


def test_a_directory_that_is_no_brokers_is_refused(tmp_path: Path) -> None:
    done = shmbroker(tmp_path / "typo", "log", "verify")
    assert done.returncode == 6
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "typo").exists()


def derive(directory: Path, store: StoreBuilder) -> None:
    """The consume queues and the index as a broker would have left them."""
    assert shmbroker_json(directory, "log", "rebuild", "--replace")["end"] == store.position


def test_rebuild_finds_no_difference_in_what_it_has_made(tmp_path: Path) -> None:
    store = build(tmp_path)
    assert shmbroker(tmp_path, "log", "rebuild").returncode == 1
    derive(tmp_path, store)
    answer = shmbroker_json(tmp_path, "log", "rebuild")
    assert (answer["messages"], answer["differences"]) == (205, [])
    assert shmbroker(tmp_path, "log", "rebuild").stdout.endswith("nothing was changed\n")
    replaced = shmbroker(tmp_path, "log", "rebuild", "--replace").stdout
    assert replaced.endswith("the rebuilt files have taken the place of the live ones\n")
    assert not (tmp_path / "rebuilt.tmp").exists()


def test_rebuild_names_an_entry_that_differs_and_replaces_it(tmp_path: Path) -> None:
    store = build(tmp_path)
    derive(tmp_path, store)
    (queue,) = (tmp_path / "queues" / "1" / "0").iterdir()
    with queue.open("r+b") as file:
        file.seek(64 + 16 * 3)
        file.write((12345).to_bytes(8, "little"))
    (difference,) = shmbroker_json(tmp_path, "log", "rebuild", code=1)["differences"]
    assert difference["what"] == "queue 1/0 offset 3"
    assert difference["live"][0] == 12345
    assert shmbroker_json(tmp_path, "log", "rebuild", "--replace")["replaced"]
    assert shmbroker_json(tmp_path, "log", "rebuild")["differences"] == []


def test_repair_cuts_at_the_damage_on_request_and_keeps_what_it_cut(tmp_path: Path) -> None:
    store = build(tmp_path)
    damaged = store.places[70]
    store.flip(damaged + 90)
    before = store.place.path(damaged).read_bytes()
    refused = shmbroker(tmp_path, "log", "repair", stdin=b"n\n")
    assert refused.returncode == 1
    assert store.place.path(damaged).read_bytes() == before
    assert shmbroker_json(tmp_path, "log", "repair", "--yes")["end"] == damaged
    verdict = shmbroker_json(tmp_path, "log", "verify")
    assert (verdict["sound"], verdict["end"], verdict["records"]) == (True, damaged, 70)
    assert store.place.path(damaged).with_suffix(".broken").read_bytes() == before
    assert "nothing to repair" in shmbroker(tmp_path, "log", "repair").stdout


def test_repair_and_replacing_are_refused_while_a_broker_has_the_directory(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "run").mkdir()
    lock = FileLock(tmp_path / "run" / "lock")
    assert lock.acquire()
    for arguments in (["log", "repair", "--yes"], ["log", "rebuild", "--replace"]):
        done = shmbroker(tmp_path, *arguments)
        assert (done.returncode, "stop it first" in done.stderr) == (3, True)
    lock.close()
