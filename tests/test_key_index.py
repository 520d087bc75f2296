"""The key index: found again what was added, newest first, never more promised than the tables hold."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb
import pytest

from shmbroker.record import Record, RecordFlag, RecordKind, decode_record, encode_record
from shmbroker.store.key_index import SEQUENCES_PER_ENTRY, KeyIndex

STORE = b"s" * 16
SPAN = 1000


@pytest.fixture
def index(tmp_path: Path) -> Iterator[KeyIndex]:
    index = KeyIndex(tmp_path / "index", STORE, writable=True, span_bytes=SPAN)
    yield index
    index.close()


def message(position: int, keys: Sequence[str] = (), **fields: Any) -> Record:
    every: dict[str, Any] = {"epoch": 1, "flushed": 0, "kind": RecordKind.MESSAGE, "body": b"x", "topic_id": 1} | fields
    return decode_record(encode_record(position=position, keys=" ".join(keys), **every))


def reopened(index: KeyIndex, tmp_path: Path) -> KeyIndex:
    index.close()
    return KeyIndex(tmp_path / "index", STORE, writable=True, span_bytes=SPAN)


def test_records_are_found_by_key_newest_first(index: KeyIndex) -> None:
    for position in range(0, 5000, 40):
        index.add(message(position, topic_id=7, keys=["all", f"n{position}"]))
        index.add(message(position, topic_id=8, keys=["all"]))
    index.commit(5000)
    assert index.by_key(7, "all", 10_000) == list(range(4960, -1, -40))
    assert index.by_key(7, "all", 3) == [4960, 4920, 4880]
    assert index.by_key(7, "n80", 3) == [80]
    assert index.by_key(8, "n80", 3) == []
    assert index.by_key(9, "all", 3) == []


def test_keys_of_any_length_and_alphabet_are_found(index: KeyIndex) -> None:
    keys = ["x" * 30_000, "schlüssel", "鍵", "\x00"]
    for number, key in enumerate(keys):
        index.add(message(8 * number, keys=[key]))
    index.commit(32)
    assert [index.by_key(1, key, 5) for key in keys] == [[0], [8], [16], [24]]


def test_nothing_is_visible_before_its_commit(index: KeyIndex) -> None:
    index.add(message(8, keys=["k"], incarnation=1, sequence=2, flags=RecordFlag.DEDUP))
    index.add(message(16, incarnation=1, sequence=1))
    assert index.pending == 3
    assert index.by_key(1, "k", 1) == []
    assert index.position == 0
    index.commit(24)
    assert (index.pending, index.position, index.by_key(1, "k", 1)) == (0, 24, [8])


def test_an_id_is_found_between_the_entries_around_it(index: KeyIndex) -> None:
    stride = SEQUENCES_PER_ENTRY
    for number in range(6):
        index.add(message(80 + 800 * number, incarnation=0xABC, sequence=max(1, number * stride)))
    index.commit(6000)
    assert index.by_id(0xABC, 5) == ([], (80, 1680))
    assert index.by_id(0xABC, 2 * stride + 7) == ([], (880, 3280))
    assert index.by_id(0xABC, 5 * stride) == ([], (3280, None))
    assert index.by_id(0xABC, 6 * stride + 1) == ([], (4080, None))
    assert index.by_id(0xABC, 9 * stride) == ([], (0, 0))
    assert index.by_id(0xDEF, 5) == ([], (0, 0))


def test_the_lowest_position_of_an_entry_stays(index: KeyIndex) -> None:
    for position in (80, 240):
        index.add(message(position, incarnation=1, sequence=1))
    index.commit(400)
    index.add(message(480, incarnation=1, sequence=1))
    index.commit(600)
    assert index.by_id(1, 1) == ([], (80, None))


def test_dedup_ids_are_found_exactly(index: KeyIndex) -> None:
    for position, sequence in ((40, 2), (1880, 2), (80, 3)):
        index.add(message(position, incarnation=1, sequence=sequence, flags=RecordFlag.DEDUP))
    index.commit(2000)
    assert index.by_id(1, 2)[0] == [1880, 40]
    assert index.by_id(1, 4)[0] == []


def test_messages_that_nobody_can_look_up_take_no_room(index: KeyIndex) -> None:
    for sequence in range(2, 1000):
        index.add(message(8 * sequence, incarnation=1, sequence=sequence))
    assert index.pending == 0


def test_the_same_records_applied_again_change_nothing(index: KeyIndex) -> None:
    def apply() -> list[list[tuple[bytes, bytes]]]:
        for number in range(60):
            index.add(message(48 * number, keys=["a", "b"], incarnation=1, sequence=1024 * number))
            index.add(message(48 * number + 8, incarnation=1, sequence=number, flags=RecordFlag.DEDUP))
        index.commit(3000)
        return [list(index.items(table, 0, 1 << 60)) for table in KeyIndex.TABLES]

    once = apply()
    assert [len(table) for table in once] == [120, 60, 59]
    assert apply() == once


def test_entries_of_deleted_segments_go_span_by_span(index: KeyIndex) -> None:
    for position in range(0, 5000, 40):
        index.add(message(position, keys=["k"], incarnation=1, sequence=(position + 40) * 1024))
    index.commit(5000)
    assert index.drop_before(3500) == 150
    assert index.drop_before(3500) == 0
    assert index.by_key(1, "k", 1000) == list(range(4960, 2960, -40))


def test_the_map_grows_when_it_is_full_and_readers_follow(tmp_path: Path) -> None:
    writer = KeyIndex(tmp_path / "index", STORE, writable=True, map_bytes=256 << 10)
    for position in range(20_000):
        writer.add(message(8 * position, keys=[f"k{position}"]))
    writer.commit(160_000)
    with start(_READ_WHILE_IT_GROWS, tmp_path) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
        for position in range(20_000, 60_000):
            writer.add(message(8 * position, keys=[f"k{position}"]))
        writer.commit(480_000)
        assert reader.wait(30) == 0
    assert writer.by_key(1, "k59999", 1) == [479_992]
    writer.close()


def start(program: str, tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROGRAM + program, str(tmp_path / "index")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


_PROGRAM = """
import sys
from pathlib import Path
from shmbroker.record import RecordKind, decode_record, encode_record
from shmbroker.store.key_index import KeyIndex

def message(position, key):
    return decode_record(encode_record(
        position=position, epoch=1, flushed=0, kind=RecordKind.MESSAGE, body=b"x", topic_id=1, keys=key))
"""

_READ_WHILE_IT_GROWS = """
index = KeyIndex(Path(sys.argv[1]), b"s" * 16)
assert index.by_key(1, "k7", 1) == [56]
print("open", flush=True)
while not index.by_key(1, "k59999", 1):
    pass
"""

_WRITE_FOR_EVER = """
index = KeyIndex(Path(sys.argv[1]), b"s" * 16, writable=True)
position = index.position
while True:
    for _ in range(50):
        index.add(message(position, f"k{position}"))
        position += 8
    index.commit(position)
    print(position, flush=True)
"""


def test_a_reader_of_no_index_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(lmdb.Error):
        KeyIndex(tmp_path / "index", STORE)
    assert not (tmp_path / "index").exists()


def test_an_index_of_another_store_is_built_anew(index: KeyIndex, tmp_path: Path) -> None:
    index.add(message(8, keys=["k"]))
    index.commit(16)
    index.close()
    with pytest.raises(lmdb.Error, match="belongs to another store"):
        KeyIndex(tmp_path / "index", b"t" * 16)
    other = KeyIndex(tmp_path / "index", b"t" * 16, writable=True)
    assert other.position == 0
    assert other.by_key(1, "k", 1) == []
    other.close()


@pytest.mark.parametrize("damage", [b"", b"no index", bytes(8192)])
def test_a_broken_index_is_built_anew(index: KeyIndex, tmp_path: Path, damage: bytes) -> None:
    index.add(message(8, keys=["k"]))
    index.commit(16)
    index.close()
    (tmp_path / "index/data.mdb").write_bytes(damage)
    again = KeyIndex(tmp_path / "index", STORE, writable=True)
    assert again.position == 0
    again.add(message(8, keys=["k"]))
    again.commit(16)
    assert again.by_key(1, "k", 1) == [8]
    again.close()


def test_a_cut_of_the_log_takes_what_lay_past_it(index: KeyIndex, tmp_path: Path) -> None:
    for position in range(0, 4000, 400):
        index.add(message(position, keys=["k"], incarnation=1, sequence=1024 * (position + 400)))
        index.add(message(position + 8, incarnation=2, sequence=position + 1, flags=RecordFlag.DEDUP))
    index.commit(4000)
    index.cut(1600)
    index.cut(2000)
    again = reopened(index, tmp_path)
    assert again.position == 1600
    assert again.by_key(1, "k", 100) == [1200, 800, 400, 0]
    assert [len(list(again.items(table, 0, 1 << 60))) for table in KeyIndex.TABLES] == [4, 4, 4]
    again.close()


@pytest.mark.crash
def test_a_killed_writer_leaves_position_and_entries_together(tmp_path: Path) -> None:
    """Kill it at changing moments: whatever position the index then has, all keys before it are there."""
    position = 0
    for commits in (1, 2, 5, 17):
        with start(_WRITE_FOR_EVER, tmp_path) as writer:
            assert writer.stdout is not None
            told = [int(writer.stdout.readline()) for _ in range(commits)][-1]
            writer.kill()
        index = KeyIndex(tmp_path / "index", STORE, writable=True)
        assert index.position >= told > position
        position = index.position
        assert all(index.by_key(1, f"k{n}", 1) == [n] for n in range(0, position, 8))
        assert index.by_key(1, f"k{position}", 1) == []
        index.close()
