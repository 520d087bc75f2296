"""Consume queues on disk: what is written is read back, twice written is written once, and damage is not absence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbroker.errors import CorruptLog
from shmbroker.store.consume_queue import ENTRY, OPEN_FILES_MAX, ConsumeQueues, Entry

STORE = bytes(range(16))
PER_FILE = 8
FAR = 1 << 60


@pytest.fixture
def queues(tmp_path: Path) -> Iterator[ConsumeQueues]:
    writer = ConsumeQueues(tmp_path / "queues", STORE, writable=True, entries_per_file=PER_FILE)
    yield writer
    writer.close()


def reader_of(tmp_path: Path, store: bytes = STORE) -> ConsumeQueues:
    return ConsumeQueues(tmp_path / "queues", store, entries_per_file=PER_FILE)


def entries(first: int, count: int) -> list[Entry]:
    """Message ``i`` of the queue lies at 1000 + 100 i."""
    return [Entry(i, 1000 + 100 * i, 90, i) for i in range(first, first + count)]


def packed(run: list[Entry]) -> bytes:
    return b"".join(ENTRY.pack(*entry[1:]) for entry in run)


def test_a_run_across_files_is_read_back_from_any_offset(queues: ConsumeQueues, tmp_path: Path) -> None:
    queues.write(3, 1, 0, packed(entries(0, 21)))
    assert sorted(path.name for path in (tmp_path / "queues/3/1").iterdir()) == [f"{n:020d}" for n in (0, 8, 16)]
    reader = reader_of(tmp_path)
    for first in range(21):
        assert reader.read(3, 1, first, 100, FAR) == entries(first, 21 - first)
    assert reader.read(3, 1, 21, 100, FAR) == []
    assert reader.read(3, 1, 2, 3, FAR) == entries(2, 3)
    assert reader.offsets(3, 1) == (0, 21)
    assert list(reader.queues()) == [(3, 1)]
    reader.close()


def test_a_reader_sees_nothing_at_or_past_its_limit(queues: ConsumeQueues) -> None:
    queues.write(3, 0, 0, packed(entries(0, 10)))
    assert queues.read(3, 0, 0, 10, limit=1500) == entries(0, 5)


def test_a_run_written_again_leaves_the_same_bytes(queues: ConsumeQueues, tmp_path: Path) -> None:
    queues.write(1, 0, 0, packed(entries(0, 12)))
    before = {path: path.read_bytes() for path in (tmp_path / "queues/1/0").iterdir()}
    queues.write(1, 0, 3, packed(entries(3, 9)))
    assert {path: path.read_bytes() for path in (tmp_path / "queues/1/0").iterdir()} == before


def test_a_reader_waits_for_a_queue_that_is_not_there_yet(queues: ConsumeQueues, tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    assert reader.read(7, 0, 0, 1, FAR) == []
    assert reader.offsets(7, 0) == (0, 0)
    queues.write(7, 0, 0, packed(entries(0, 1)))
    assert reader.read(7, 0, 0, 1, FAR) == entries(0, 1)
    reader.close()


def test_offsets_that_no_message_has_are_left_out(queues: ConsumeQueues) -> None:
    queues.write(1, 0, 30, packed(entries(30, 2)))  # the first kept message is number 30
    queues.write(1, 0, 75, packed(entries(75, 3)))  # a recovery has skipped 32 .. 74
    assert queues.read(1, 0, 0, 100, FAR) == [*entries(30, 2), *entries(75, 3)]
    assert queues.find_position(1, 0, 0) == 24, "nothing before the first file"
    assert queues.find_position(1, 0, 4001) in range(31, 32)
    assert queues.find_position(1, 0, 4101) in range(32, 76)
    assert queues.read(1, 0, queues.find_position(1, 0, 4101), 1, FAR) == entries(75, 1)
    assert queues.find_position(1, 0, FAR) == 78


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 16, 20, 21, 40])
def test_truncation_drops_exactly_the_entries_at_or_past_a_position(
    queues: ConsumeQueues, tmp_path: Path, cut: int
) -> None:
    queues.write(1, 0, 0, packed(entries(0, 21)))
    queues.write(2, 5, 0, packed(entries(0, 3)))
    queues.truncate(1000 + 100 * cut)
    assert queues.read(1, 0, 0, 100, FAR) == entries(0, min(cut, 21))
    assert queues.read(2, 5, 0, 100, FAR) == entries(0, min(cut, 3))
    queues.write(1, 0, cut, packed(entries(cut, 30)))
    reader = reader_of(tmp_path)
    assert reader.read(1, 0, 0, 100, FAR)[-30:] == entries(cut, 30)
    reader.close()


@pytest.mark.parametrize("left", [b"", b"SBCQ", bytes(64), bytes(64 + 32)])
def test_a_file_that_lost_power_before_its_header_is_removed_by_truncation(
    queues: ConsumeQueues, tmp_path: Path, left: bytes
) -> None:
    queues.write(1, 0, 0, packed(entries(0, 8)))
    (tmp_path / "queues/1/0" / f"{8:020d}").write_bytes(left)
    queues.truncate(1800)
    assert queues.offsets(1, 0) == (0, 8)
    queues.write(1, 0, 8, packed(entries(8, 3)))
    assert queues.read(1, 0, 0, 100, FAR) == entries(0, 11)


def test_a_writer_killed_inside_an_entry_leaves_nothing_to_read_of_it(queues: ConsumeQueues, tmp_path: Path) -> None:
    queues.write(1, 0, 0, packed(entries(0, 3)))
    with (tmp_path / "queues/1/0" / f"{0:020d}").open("ab") as file:
        file.write(packed(entries(3, 1))[:7])
    assert queues.read(1, 0, 0, 100, FAR) == entries(0, 3)
    queues.write(1, 0, 3, packed(entries(3, 1)))
    assert queues.read(1, 0, 0, 100, FAR) == entries(0, 4)


@pytest.mark.parametrize(
    ("at", "damage"),
    [
        (0, b"\x00"),  # magic
        (8, b"\x09"),  # version
        (24, b"\x01"),  # first offset
        (33, b"\xff"),  # store
        (60, b"\x00"),  # crc
    ],
)
def test_a_damaged_header_is_refused_by_name(queues: ConsumeQueues, tmp_path: Path, at: int, damage: bytes) -> None:
    queues.write(1, 0, 0, packed(entries(0, 3)))
    path = tmp_path / "queues/1/0" / f"{0:020d}"
    data = bytearray(path.read_bytes())
    data[at : at + 1] = damage
    path.write_bytes(data)
    reader = reader_of(tmp_path)
    with pytest.raises(CorruptLog, match="log rebuild") as caught:
        reader.read(1, 0, 0, 1, FAR)
    assert caught.value.path == str(path)


def test_another_stores_queue_is_refused(queues: ConsumeQueues, tmp_path: Path) -> None:
    queues.write(1, 0, 0, packed(entries(0, 3)))
    with pytest.raises(CorruptLog):
        reader_of(tmp_path, store=bytes(16)).read(1, 0, 0, 1, FAR)


@pytest.mark.parametrize(("position", "size"), [(1000, 90), (1050, 79), (0, 90)])
def test_entries_that_make_no_sense_are_not_handed_out(queues: ConsumeQueues, position: int, size: int) -> None:
    queues.write(1, 0, 0, packed(entries(0, 3)))
    queues.write(1, 0, 1, ENTRY.pack(position, size, 0))
    assert queues.read(1, 0, 0, 1, FAR) == entries(0, 1)
    with pytest.raises(CorruptLog):
        queues.read(1, 0, 0, 3, FAR)


def test_whole_files_before_an_offset_are_deleted_and_the_last_stays(queues: ConsumeQueues) -> None:
    queues.write(1, 0, 0, packed(entries(0, 24)))
    assert queues.delete_before(1, 0, 15) == 1
    assert queues.offsets(1, 0) == (8, 24)
    assert queues.read(1, 0, 8, 100, FAR) == entries(8, 16)
    assert queues.delete_before(1, 0, 1000) == 1
    assert queues.offsets(1, 0) == (16, 24)
    queues.write(1, 0, 24, packed(entries(24, 1)))
    assert queues.read(1, 0, 16, 100, FAR) == entries(16, 9)


def test_a_deleted_topic_leaves_no_files(queues: ConsumeQueues, tmp_path: Path) -> None:
    queues.write(1, 0, 0, packed(entries(0, 24)))
    queues.write(2, 0, 0, packed(entries(0, 1)))
    queues.delete_topic(1)
    assert list(queues.queues()) == [(2, 0)]
    assert not (tmp_path / "queues/1").exists()


def test_open_files_stay_bounded_with_many_queues(queues: ConsumeQueues) -> None:
    count = OPEN_FILES_MAX + 50
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        for queue_id in range(count):
            queues.write(9, queue_id, 0, packed(entries(0, 2)))
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= OPEN_FILES_MAX
    assert all(queues.read(9, queue_id, 0, 9, FAR) == entries(0, 2) for queue_id in range(count))


def test_what_changed_is_named_once_for_the_checkpoint(queues: ConsumeQueues, tmp_path: Path) -> None:
    root = tmp_path / "queues"
    queues.write(1, 0, 0, packed(entries(0, 9)))
    files = {root / "1/0" / f"{n:020d}" for n in (0, 8)}
    assert queues.dirty() == files | {root, root / "1", root / "1/0"}
    queues.sync()
    assert queues.dirty() == set()
    queues.write(1, 0, 9, packed(entries(9, 1)))
    assert queues.dirty() == {root / "1/0" / f"{8:020d}"}
    (root / "1/0" / f"{8:020d}").unlink()
    queues.sync()


def test_what_could_not_be_synced_is_synced_by_the_next_checkpoint(queues: ConsumeQueues, tmp_path: Path) -> None:
    file = tmp_path / "queues/1/0" / f"{0:020d}"
    queues.write(1, 0, 0, packed(entries(0, 2)))
    dirty = queues.dirty()
    file.rename(tmp_path / "aside")
    file.symlink_to(file)  # opening it fails
    with pytest.raises(OSError, match="symbolic links"):
        queues.sync()
    assert queues.dirty() == dirty
    file.unlink()
    (tmp_path / "aside").rename(file)
    queues.sync()
    assert queues.dirty() == set()


def test_a_file_that_another_object_removed_is_closed(queues: ConsumeQueues) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    queues.write(1, 0, 0, packed(entries(0, 20)))
    remover = ConsumeQueues(queues._directory, queues._store_id, writable=True, entries_per_file=8)
    assert remover.delete_before(1, 0, 16) == 2
    queues.close_unlinked()
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    assert queues.read(1, 0, 16, 9, FAR) == entries(16, 4)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_of_runs_and_cuts_reads_as_the_model_says(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The model: a list of entries, None for a hole; positions grow; a cut shortens it."""
    place = tmp_path_factory.mktemp("model") / "queues"
    # Closed whatever happens: hypothesis gives many an example up half-way.
    with closing(ConsumeQueues(place, STORE, writable=True, entries_per_file=PER_FILE)) as queues:
        model: list[Entry] = []
        end, position = data.draw(st.integers(0, 40), label="first offset"), 0
        for _ in range(data.draw(st.integers(1, 12))):
            match data.draw(st.sampled_from(["write", "write", "again", "skip", "cut"])):
                case "write":
                    run = [Entry(end + i, position + 80 * i, 80, i) for i in range(data.draw(st.integers(1, 20)))]
                    queues.write(4, 2, end, packed(run))
                    model += run
                    end, position = run[-1].offset + 1, run[-1].position + 80
                case "again" if model:
                    tail = [entry for entry in model[-5:] if entry.offset > model[-1].offset - 5]
                    for entry in tail:
                        queues.write(4, 2, entry.offset, packed([entry]))
                case "skip":
                    end += data.draw(st.integers(1, 30))
                case "cut":
                    cut = data.draw(st.integers(0, position + 10))
                    queues.truncate(cut)
                    model = [entry for entry in model if entry.position < cut]
                    end = max(end, model[-1].offset + 1 if model else 0)
            assert queues.read(4, 2, 0, 10_000, FAR) == model
            for target in (0, position // 2, position):
                offset = queues.find_position(4, 2, target)
                assert queues.read(4, 2, offset, 1, FAR) == [entry for entry in model if entry.position >= target][:1]
                assert all(entry.position < target for entry in model if entry.offset < offset)
