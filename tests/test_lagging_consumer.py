"""What a consumer meets that lags behind the memory: damage in the files is told, and never passed over in silence.

queues/1/0    | 0 | 1 | 2 | ...     entries lead to the records of ``orders``
log             o   O   o   O ...   o: a message of ``orders``, tagged ``paid``; O: one of ``others``
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from support.consuming import deliverable
from support.running import log_records, running, wait_word

from shmbroker import Message
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


def overwrite(file: Path, at: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(data)


def overwrite_log(directory: Path, position: int, data: bytes) -> None:
    file = BrokerPaths(directory).log / segment_name(position - position % SEGMENT)
    overwrite(file, SEGMENT_HEADER_BYTES + position % SEGMENT, data)


def overwrite_entries(directory: Path, offset: int, entries: bytes) -> None:
    file = BrokerPaths(directory).queues / "1" / "0" / f"{0:020d}"
    overwrite(file, QUEUE_HEADER + offset * ENTRY_BYTES, entries)


def flip_the_tags_hash(directory: Path) -> None:
    victim = messages_of(directory, 1)[VICTIM]
    overwrite_log(directory, victim.position + TAG_HASH, (victim.tag_hash ^ 1).to_bytes(4, "little"))


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


@pytest.mark.parametrize("tags", ["paid", "*"])
@pytest.mark.parametrize(
    "damage", [flip_the_tags_hash, flip_the_hash_and_name_another_queue, lead_an_entry_to_another_topic]
)
def test_a_damaged_message_that_looks_as_if_its_tag_did_not_match_is_told_and_not_acknowledged(
    stored: Path, damage: Callable[[Path], None], tags: str
) -> None:
    damage(stored)
    with running(stored) as broker:
        numbers, damages = deliverable(broker, "audit", tags)
        assert numbers == set(range(COUNT)) - {VICTIM}
        assert len(damages) == 1
        assert str(damages[0].position) in str(damages[0])
        assert [table["base"] for table in broker.region.progress()] == [VICTIM]


def test_a_lagging_consumer_passes_sound_messages_of_other_tags(stored: Path) -> None:
    with running(stored) as broker:
        assert deliverable(broker, "audit", "refunded") == (set(), [])
        assert [table["base"] for table in broker.region.progress()] == [COUNT]
