"""The native ring behind the same face as the model in ``reference_ring.py``: a Region on anonymous memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from reference_ring import KIND_PROGRESS, Draft, Placed, Refused, Shape, Stamp
from support.regions import memory

from shmbroker._native._core import Client, Message, ProducerCore, Region, SendResult, decode_record
from shmbroker.errors import BrokerBusy, MessageIllegal, MessageTooLarge

TOPIC = "test"
CODES = {"ring stayed full": "NO_SPACE", "queue index stayed full": "NO_INDEX", "no segment stood ready": "NO_CAPACITY"}


class _Producer(ProducerCore):
    """Queues as told, ids as told, and a log that remembers all that was ever sent."""

    log: dict[int, bytes]

    def _choose_queue(self, _message: Message, _count: int, *choice: Any) -> int:
        return int(choice[-1])

    def _dedup_id(self, _message: Message, dedup_key: str) -> tuple[int, int]:
        incarnation, sequence = map(int, dedup_key.split())
        return incarnation, sequence

    def _read_log(self, position: int) -> bytes:
        return self.log[position]


class NativeRing:
    """One producer and one region. Appends never wait: they are refused at once."""

    def __init__(self, region: Region, shape: Shape) -> None:
        self.region = region
        self.shape = shape
        region.define_topic(TOPIC, shape.queues, record=False)
        self._producer = _Producer(Client(region, "test"), "test", send_timeout=0, sync_flush_timeout=0)
        self._log: dict[int, bytes] = {}
        self._producer.log = self._log

    def remember(self, log: dict[int, bytes]) -> None:
        """What was in the log before: records by position."""
        self._log.update(log)

    def close(self) -> None:
        self._producer.client.close()

    tail = property(lambda self: self.region.get("tail"))
    write_limit = property(lambda self: self.region.get("write_limit"))
    flushed = property(lambda self: self.region.get("flushed"), lambda self, value: self.region.set("flushed", value))
    dispatched = property(
        lambda self: self.region.get("dispatched"), lambda self, value: self.region.set("dispatched", value)
    )
    user_capacity = property(None, lambda self, value: self.region.set("user_capacity", value))
    system_capacity = property(None, lambda self, value: self.region.set("system_capacity", value))

    def send(self, draft: Draft) -> Placed:
        with _codes():
            return self._placed([self._producer.send(_message(draft), 0, queue_id=draft.queue)])

    def send_once(self, draft: Draft, dedup_id: tuple[int, int]) -> Placed:
        with _codes():
            result = self._producer.send(_message(draft), 0, queue_id=draft.queue, dedup_key="{} {}".format(*dedup_id))
        if result.duplicate:
            return Placed((result.position,), (), 0, duplicate=True)
        return self._placed([result])

    def send_group(self, drafts: Sequence[Draft]) -> Placed:
        with _codes():
            messages = [_message(draft) for draft in drafts]
            results = self._producer.send_batch(messages, 0, queue_id=drafts[0].queue if drafts else 0)
        return self._placed(results)

    def send_system(self, bodies: Sequence[bytes]) -> Placed:
        with _codes():
            start, end = self.region.append_system(KIND_PROGRESS, bodies)
        positions, position = [], start
        for _ in bodies:
            raw = self.region.read_raw(position)
            assert raw is not None
            positions.append(position)
            position += len(raw)
        return Placed(tuple(positions), (0,) * len(bodies), end)

    def _placed(self, results: Sequence[SendResult]) -> Placed:
        for result in results:
            raw = self.region.read_raw(result.position)
            assert raw is not None
            self._log[result.position] = raw
        return Placed(
            tuple(result.position for result in results),
            tuple(result.queue_offset for result in results),
            results[-1].end_position,
        )

    def stamps(self, positions: Sequence[int]) -> list[Stamp]:
        """Ids and times that the records were given."""
        records = [decode_record(self.region.read_raw(position), position) for position in positions]
        return [Stamp(record.incarnation, record.sequence, record.born_ns) for record in records]

    def read(self, position: int) -> bytes | None:
        return self.region.read_raw(position)

    @property
    def queues(self) -> list[Any]:
        return [_Queue(**queue) for queue in self.region.topics()[0]["queues"]]

    def window(self) -> tuple[int, bytes]:
        first = max(0, self.write_limit - self.shape.ring_bytes)
        at = first % self.shape.ring_bytes
        with self.region.ring_view() as view:
            return first, bytes(view[at : at + self.tail - first])


class _Queue:
    def __init__(self, **fields: int) -> None:
        self.next_offset = fields["next_offset"]
        self.index_first = fields["index_first"]
        self.bytes = fields["bytes"]


def _message(draft: Draft) -> Message:
    return Message(TOPIC, draft.body, tags=draft.tags, keys=draft.keys, properties=dict(draft.properties))


@contextmanager
def _codes() -> Iterator[None]:
    """Errors as the model names them."""
    try:
        yield
    except MessageTooLarge as error:
        raise Refused("TOO_LARGE") from error
    except MessageIllegal as error:
        raise Refused("ILLEGAL") from error
    except BrokerBusy as error:
        raise Refused(next(code for words, code in CODES.items() if words in str(error))) from error


@contextmanager
def native_ring(shape: Shape) -> Iterator[NativeRing]:
    """A fresh native ring of this shape."""
    with memory(
        shape.ring_bytes,
        shape.segment_bytes,
        reserve_bytes=shape.reserve_bytes,
        max_message_bytes=shape.max_message_bytes,
        queues=shape.queues,
        blocks=shape.blocks,
        ids=shape.ids,
    ) as region:
        ring = NativeRing(region, shape)
        try:
            yield ring
        finally:
            ring.close()
