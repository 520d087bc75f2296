"""What a consumer meets that lags behind the memory: damage in the files is told, and never passed over in silence.

queues/1/0    | 0 | 1 | 2 | ...     entries lead to the records of ``orders``
log             o   O   o   O ...   o: a message of ``orders``, tagged ``paid``; O: one of ``others``
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from support.command import shmbroker
from support.consuming import ALL, deliverable, drain, send
from support.disk import overwrite
from support.running import log_records, running, wait_word

from shmbroker import Message, Sql, sql
from shmbroker.naming import BrokerPaths, segment_name
from shmbroker.record import Record, RecordKind
from shmbroker.store.consume_queue import ENTRY, ENTRY_BYTES
from shmbroker.store.segment import SEGMENT_HEADER_BYTES

SEGMENT: Final = 1 << 20
COUNT: Final = 50  # fewer than the claim window has
QUEUE_HEADER: Final = 64
TAG_HASH: Final = 68  # in a record's header
RECORD_HEADER: Final = 80
VICTIM: Final = 5


@pytest.fixture
def stored(directory: Path) -> Path:
    """A stopped broker's directory: nothing is in memory any more."""
    with running(directory) as broker, broker.producer("test") as producer:
        for topic in ("orders", "others"):
            broker.create_topic(topic, queues=1)
        for number in range(COUNT):
            producer.send(Message("orders", b"%d " % number + bytes(1000), tags="paid"))
            producer.send(Message("others", b"%d" % number, tags="other"))
        wait_word(broker, "dispatched", broker.region.get("tail"))
    return directory


def messages_of(directory: Path, topic_id: int) -> list[Record]:
    records = log_records(directory)
    return [record for record in records if record.kind == RecordKind.MESSAGE and record.topic_id == topic_id]


def overwrite_log(directory: Path, position: int, data: bytes) -> None:
    file = BrokerPaths(directory).log / segment_name(position - position % SEGMENT)
    overwrite(file, SEGMENT_HEADER_BYTES + position % SEGMENT, data)


def overwrite_entries(directory: Path, offset: int, entries: bytes) -> None:
    file = BrokerPaths(directory).queues / "1" / "0" / f"{0:020d}"
    overwrite(file, QUEUE_HEADER + offset * ENTRY_BYTES, entries)


def flip_the_tags_hash(directory: Path) -> None:
    victim = messages_of(directory, 1)[VICTIM]
    overwrite_log(directory, victim.position + TAG_HASH, (victim.tag_hash ^ 1).to_bytes(4, "little"))


def change_the_tag(directory: Path) -> None:
    overwrite_log(directory, messages_of(directory, 1)[VICTIM].position + RECORD_HEADER, b"q")


def flip_the_hash_and_name_another_queue(directory: Path) -> None:
    """The header of a record of ``others``, with a CRC that does not hold, where one of ``orders`` was."""
    victim, other = messages_of(directory, 1)[VICTIM], messages_of(directory, 2)[VICTIM]
    header = bytearray(victim.raw[:RECORD_HEADER])
    header[TAG_HASH : TAG_HASH + 4] = other.tag_hash.to_bytes(4, "little")
    header[56:60] = (2).to_bytes(4, "little")  # topic id
    overwrite_log(directory, victim.position, bytes(header))


def lead_an_entry_to_another_topic(directory: Path) -> None:
    victim, other = messages_of(directory, 1)[VICTIM], messages_of(directory, 2)[VICTIM]
    overwrite_entries(directory, VICTIM, ENTRY.pack(other.position, victim.size, victim.tag_hash))


@pytest.mark.parametrize("wanted", ["paid", "*", sql("TAGS = 'paid'")], ids=str)
@pytest.mark.parametrize(
    "damage", [flip_the_tags_hash, change_the_tag, flip_the_hash_and_name_another_queue, lead_an_entry_to_another_topic]
)
def test_a_damaged_message_that_looks_as_if_its_tag_did_not_match_is_told_and_not_acknowledged(
    stored: Path, damage: Callable[[Path], None], wanted: str | Sql
) -> None:
    damage(stored)
    with running(stored) as broker:
        numbers, damages = deliverable(broker, "audit", wanted)
        assert numbers == set(range(COUNT)) - {VICTIM}
        assert len(damages) == 1
        assert str(damages[0].position) in str(damages[0])
        assert [table["base"] for table in broker.region.progress()] == [VICTIM]


@pytest.mark.parametrize("wanted", ["refunded", sql("TAGS = 'refunded'")], ids=str)
def test_a_lagging_consumer_passes_sound_messages_of_other_tags(stored: Path, wanted: str | Sql) -> None:
    with running(stored) as broker:
        assert deliverable(broker, "audit", wanted) == (set(), [])
        assert [table["base"] for table in broker.region.progress()] == [COUNT]


@pytest.mark.parametrize("tags", ["paid", "*"])
def test_entries_that_the_disk_has_lost_are_no_hole_and_come_back_with_a_rebuild(stored: Path, tags: str) -> None:
    overwrite_entries(stored, VICTIM, bytes(10 * ENTRY_BYTES))
    with running(stored) as broker:
        numbers, damages = deliverable(broker, "audit", tags)
        assert numbers == set(range(VICTIM))
        assert len(set(map(str, damages))) == 1
        assert re.search(r"queues/1/0/0+: offset 5: .*`shmbroker log rebuild --replace`", str(damages[0]))
        assert [table["base"] for table in broker.region.progress()] == [VICTIM]
    assert shmbroker(stored, "log", "rebuild", "--replace").returncode == 0
    with running(stored) as broker:
        assert deliverable(broker, "audit", tags) == (set(range(VICTIM, COUNT)), [])


@pytest.mark.parametrize("lost", [1, COUNT], ids=["the last", "all"])
def test_entries_that_the_end_of_a_file_has_lost_are_told_and_not_waited_for(stored: Path, lost: int) -> None:
    """A start cuts zeros at the end off: nobody would see any more that there was something."""
    overwrite_entries(stored, COUNT - lost, bytes(lost * ENTRY_BYTES))
    with running(stored) as broker:
        numbers, damages = deliverable(broker, "audit")
        assert numbers == set(range(COUNT - lost))
        assert re.search(rf"queues/1/0/0+: offset {COUNT - lost}: no entry", str(damages[0]))
    assert shmbroker(stored, "log", "rebuild", "--replace").returncode == 0
    with running(stored) as broker:
        assert deliverable(broker, "audit") == (set(range(COUNT - lost, COUNT)), [])


def make_hole(directory: Path) -> None:
    """Behind the last message, as a recovery does that found progress beyond a cut (R4); then as many messages."""
    with running(directory) as broker, broker.producer("test") as producer:
        broker.region.restore_queue(1, 0, COUNT + 10, 0)
        producer.send(Message("others", b"between"))
        for number in range(COUNT, 2 * COUNT):
            producer.send(Message("orders", b"%d " % number, tags="paid"))
        wait_word(broker, "dispatched", broker.region.get("tail"))


def test_offsets_that_no_message_ever_had_are_passed_over(stored: Path) -> None:
    make_hole(stored)
    assert messages_of(stored, 1)[COUNT].queue_offset == COUNT + 10
    with running(stored, claim_window=256) as broker:
        assert deliverable(broker, "audit") == (set(range(2 * COUNT)), [])
        assert [table["base"] for table in broker.region.progress()] == [2 * COUNT + 10]


def test_a_hole_of_which_a_damaged_log_cannot_tell_is_counted_as_lost(
    stored: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_hole(stored)
    bodies = [message.body for message in messages_of(stored, 1)]
    overwrite_log(stored, messages_of(stored, 2)[COUNT].position, bytes(RECORD_HEADER))
    with (
        running(stored, claim_window=256) as broker,
        broker.simple_consumer("audit", {"orders": "*"}) as consumer,
    ):
        assert drain(consumer, 2 * COUNT) == bodies
        assert consumer.lost == 10
        assert f"10 messages of orders[0], from offset {COUNT} on" in caplog.text
        assert [table["base"] for table in broker.region.progress()] == [2 * COUNT + 10]


def test_each_piece_of_the_log_is_read_once_however_many_queues_lie_in_it(directory: Path) -> None:
    queues, batches = 4, 100
    with running(directory, segment_bytes="32 MiB") as broker:
        broker.create_topic("orders", queues)
        bodies = [b"%d " % number + bytes(1000) for number in range(100 * batches)]
        for at in range(batches):  # each batch in one queue: so the queues are always some way apart
            send(broker, *bodies[100 * at : 100 * (at + 1)], queue_id=at % queues)
        end = broker.region.get("tail")
        wait_word(broker, "dispatched", end)
        with broker.simple_consumer("audit", ALL) as consumer:
            before = bytes_read()
            received = drain(consumer, len(bodies))
            read = bytes_read() - before
    assert sorted(received) == sorted(bodies)
    assert end < read < 1.5 * end


def bytes_read() -> int:
    """By this process, from the disk or from memory: /proc/self/io."""
    return int(Path("/proc/self/io").read_text().split()[1])
