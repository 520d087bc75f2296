"""Rebuilding what is derived from the log: the same comes out, and whatever differs in the live files is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.store_builder import HEADER, SEGMENT, STORE, StoreBuilder

from shmbroker.errors import CorruptLog
from shmbroker.naming import BrokerPaths
from shmbroker.record import GroupBody, RecordFlag, RecordKind, TopicBody, decode_record, encode_record
from shmbroker.store.checkpoint import CheckpointFile
from shmbroker.store.commit_log import LogReader
from shmbroker.store.consume_queue import ENTRY, ConsumeQueues, Entry
from shmbroker.store.key_index import KeyIndex
from shmbroker.store.rebuild import Progress, Rebuilt, differences, rebuild, swap

FAR = 1 << 60


@pytest.fixture
def built(tmp_path: Path) -> StoreBuilder:
    """Three segments: 200 messages over 3 queues, some with keys and dedup ids, and system records between them."""
    builder = StoreBuilder(tmp_path / "store")
    builder.begin_epoch()
    builder.append(RecordKind.TOPIC, TopicBody("orders", 1, 3).encode())
    builder.append(RecordKind.GROUP, GroupBody("billing", 1).encode())
    for number in range(200):
        flags = RecordFlag.DEDUP if number % 10 == 0 else 0
        keys = f"k{number} shared" if number % 4 == 0 else ""
        builder.message(b"%d" % number, queue_id=number % 3, keys=keys, flags=flags, incarnation=7, sequence=number + 1)
    builder.begin_epoch()
    builder.messages(20)
    builder.sync()
    builder.checkpoint()
    return builder


def made(builder: StoreBuilder, place: Path, first: int = 0, progress: Progress | None = None) -> Rebuilt:
    reader = LogReader(builder.log, SEGMENT, STORE)
    try:
        return rebuild(reader, SEGMENT, STORE, first, builder.position, place, progress)
    finally:
        reader.close()


def live(builder: StoreBuilder) -> BrokerPaths:
    """Derived files in their place, as a dispatcher would have made them."""
    paths = BrokerPaths(builder.directory)
    swap(paths, made(builder, builder.directory / "making"))
    return paths


def named(paths: BrokerPaths, rebuilt: Rebuilt) -> list[str]:
    return [difference.what for difference in differences(paths, rebuilt)]


def test_a_rebuild_holds_every_message_in_the_order_of_its_queue(built: StoreBuilder, tmp_path: Path) -> None:
    rebuilt = made(built, tmp_path / "side")
    queues = ConsumeQueues(rebuilt.side.queues, STORE)
    found = {queue: queues.read(*queue, 0, 1000, FAR) for queue in queues.queues()}
    queues.close()
    assert sorted(found) == [(1, 0), (1, 1), (1, 2)]
    assert [[entry.offset for entry in entries] for entries in found.values()] == [
        list(range(built.offsets[queue_id])) for _, queue_id in sorted(found)
    ]
    assert rebuilt.messages == 220
    index = KeyIndex(rebuilt.side.index, STORE)
    assert index.position == rebuilt.end == built.position
    assert len(index.by_key(1, "shared", 1000)) == 50
    assert len(index.by_id(7, 11)[0]) == 1
    index.close()


def test_progress_is_told_in_bytes_of_log(built: StoreBuilder, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    made(built, tmp_path / "side", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert {total for _, total in told} == {built.position}
    assert told[-1][0] == built.position


def test_nothing_differs_from_what_was_rebuilt_before(built: StoreBuilder, tmp_path: Path) -> None:
    assert named(live(built), made(built, tmp_path / "side")) == []


@pytest.mark.parametrize(
    ("offset", "entry", "what"),
    [
        (5, (1, 90, 0), "queue 1/0 offset 5"),  # another position
        (7, (0, 0, 0), "queue 1/0 offset 7"),  # a hole
    ],
)
def test_a_wrong_entry_is_named(
    built: StoreBuilder, tmp_path: Path, offset: int, entry: tuple[int, int, int], what: str
) -> None:
    paths = live(built)
    writer = ConsumeQueues(paths.queues, STORE, writable=True)
    writer.write(1, 0, offset, ENTRY.pack(*entry))
    writer.close()
    assert named(paths, made(built, tmp_path / "side")) == [what]


def test_missing_and_surplus_entries_are_named(built: StoreBuilder, tmp_path: Path) -> None:
    paths = live(built)
    shutil.rmtree(paths.queues / "1/2")
    writer = ConsumeQueues(paths.queues, STORE, writable=True)
    last = built.offsets[0]
    writer.write(1, 0, last, ENTRY.pack(built.position - 100, 90, 0))
    writer.write(9, 0, 0, ENTRY.pack(400, 90, 0))
    writer.close()
    rebuilt = made(built, tmp_path / "side")
    missing = [f"queue 1/2 offset {offset}" for offset in range(built.offsets[2])]
    assert named(paths, rebuilt) == [f"queue 1/0 offset {last}", *missing, "queue 9/0 offset 0"]
    shown = next(difference for difference in differences(paths, rebuilt) if difference.what == missing[0])
    assert shown.live is None
    assert shown.rebuilt is not None


def test_what_the_running_broker_added_and_deleted_is_no_difference(built: StoreBuilder, tmp_path: Path) -> None:
    paths = live(built)
    rebuilt = made(built, tmp_path / "side", first=SEGMENT)  # retention has taken the first segment meanwhile
    writer = ConsumeQueues(paths.queues, STORE, writable=True)
    writer.write(1, 0, built.offsets[0], ENTRY.pack(built.position, 90, 0))
    writer.close()
    assert rebuilt.messages < 220
    assert named(paths, rebuilt) == []


def test_a_wrong_index_is_named(built: StoreBuilder, tmp_path: Path) -> None:
    paths = live(built)
    at = built.places[-1]
    surplus = encode_record(position=at, epoch=2, flushed=0, kind=RecordKind.MESSAGE, body=b"x", topic_id=1, keys="no")
    index = KeyIndex(paths.index, STORE, writable=True)
    index.add(decode_record(surplus))
    index.commit(built.position)
    index.close()
    (what,) = named(paths, made(built, tmp_path / "side"))
    assert what.startswith("index keys ")
    assert what.endswith(at.to_bytes(8, "big").hex())


def test_a_deleted_topic_is_not_rebuilt(built: StoreBuilder, tmp_path: Path) -> None:
    built.append(RecordKind.TOPIC, TopicBody("orders", 1, deleted=True).encode())
    rebuilt = made(built, tmp_path / "side")
    assert list(ConsumeQueues(rebuilt.side.queues, STORE).queues()) == []


def test_a_damaged_log_is_not_rebuilt_from(built: StoreBuilder, tmp_path: Path) -> None:
    built.flip(built.places[50] + HEADER)
    with pytest.raises(CorruptLog) as caught:
        made(built, tmp_path / "side")
    assert caught.value.position == built.places[50]


def test_a_swap_mends_the_live_files(built: StoreBuilder, tmp_path: Path) -> None:
    paths = live(built)
    shutil.rmtree(paths.queues / "1/2")
    shutil.rmtree(paths.index)
    swap(paths, made(built, tmp_path / "side"))
    assert not (tmp_path / "side").exists()
    assert sorted(path.name for path in built.directory.iterdir()) == ["checkpoint", "index", "log", "queues", "timers"]
    assert named(paths, made(built, tmp_path / "again")) == []
    checkpoint = CheckpointFile(paths.checkpoint).read()
    assert checkpoint is not None
    assert checkpoint.dispatched == built.position


def test_offsets_keep_their_place_in_a_rebuilt_queue(built: StoreBuilder, tmp_path: Path) -> None:
    """The first segment is gone: the queue begins at the first offset that the log still has, not at 0."""
    rebuilt = made(built, tmp_path / "side", first=SEGMENT)
    whole = made(built, tmp_path / "whole")
    queues, all_queues = (ConsumeQueues(side.side.queues, STORE) for side in (rebuilt, whole))
    kept: list[Entry] = queues.read(1, 0, 0, 1000, FAR)
    assert kept == [entry for entry in all_queues.read(1, 0, 0, 1000, FAR) if entry.position >= SEGMENT]
    assert kept[0].offset > 0
    queues.close()
    all_queues.close()
