"""A slow model of the ring in plain Python: what append, read, index and id window must answer, without any of the
reasons why the native one is hard (no shared memory, no locks, no readers at the same time).

It keeps the same bytes: records are encoded by ``encode_record`` at the positions that the model works out by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from shmbroker._native._core import encode_record

HEADER = 80
ALIGN = 8
BLOCK_ENTRIES = 128
GROUP_RECORDS_MAX = 1024

KIND_MESSAGE, KIND_FILLER, KIND_PROGRESS = 1, 2, 6
FLAG_GROUP, FLAG_DEDUP, FLAG_GROUP_LAST = 1, 2, 4
NO_QUEUE = 0xFFFF


class Refused(Exception):
    """Nothing was stored. ``code`` is the native core's name for the reason."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Shape:
    """The sizes of a ring; its topic has id 1 and ``queues`` queues."""

    ring_bytes: int = 64 << 10
    segment_bytes: int = 96 << 10  # not a power of two: the ends of ring and segment meet at all distances
    reserve_bytes: int = 8 << 10
    max_message_bytes: int = 16 << 10
    queues: int = 3
    blocks: int = 8
    ids: int = 64


@dataclass(frozen=True)
class Stamp:
    """What the sender brings along and no model can know."""

    incarnation: int = 0
    sequence: int = 0
    born_ns: int = 0


@dataclass(frozen=True)
class Draft:
    """One message before it has a place."""

    body: bytes
    queue: int = 0
    tags: str = ""
    keys: str = ""
    properties: tuple[tuple[str, str], ...] = ()
    kind: int = KIND_MESSAGE

    def size(self) -> int:
        """Bytes of the record, unpadded."""
        properties = sum(len(f"{name}\x01{value}\x02".encode()) for name, value in self.properties)
        return HEADER + len(self.tags.encode()) + len(self.keys.encode()) + properties + len(self.body)


@dataclass(frozen=True)
class Placed:
    """Where an append went: positions and queue offsets of its records, and its end."""

    positions: tuple[int, ...]
    offsets: tuple[int, ...]
    end: int
    duplicate: bool = False


@dataclass
class Block:
    """Up to 128 positions of one queue; ``queue`` None: nobody's."""

    queue: int | None = None
    first: int = 0
    last_position: int = 0


@dataclass
class Queue:
    """What the model knows of a queue."""

    next_offset: int = 0
    bytes: int = 0
    chain: list[Block] = field(default_factory=list)
    index_first: int = 0


def padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class ReferenceRing:
    """The model. Every method is one step; a refused append changes nothing that anybody can see."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.tail = self.write_limit = self.flushed = self.dispatched = 0
        self.user_capacity = self.system_capacity = 1 << 40
        self.queues = [Queue() for _ in range(shape.queues)]
        self._pool = deque(Block() for _ in range(shape.blocks))
        self._ids: deque[tuple[int, int, int]] = deque(maxlen=shape.ids)  # incarnation, sequence, position
        self._log = bytearray()

    # ---- appends

    def send(self, draft: Draft, stamp: Stamp | None = None) -> Placed:
        """One message."""
        return self._append([draft], [stamp or Stamp()])

    def send_once(self, draft: Draft, dedup_id: tuple[int, int], stamp: Stamp | None = None) -> Placed:
        """One message, unless its id was sent before and is remembered."""
        stamp = Stamp(*dedup_id, stamp.born_ns if stamp else 0)
        return self._append([draft], [stamp], dedup=True)

    def send_group(self, drafts: Sequence[Draft], stamps: Sequence[Stamp] | None = None) -> Placed:
        """All or none, published at once."""
        if not drafts:
            raise Refused("ILLEGAL")
        return self._append(drafts, stamps or [Stamp()] * len(drafts))

    def send_system(self, bodies: Sequence[bytes], stamps: Sequence[Stamp] | None = None) -> Placed:
        """Records without a queue, which may use the reserves."""
        drafts = [Draft(body, NO_QUEUE, kind=KIND_PROGRESS) for body in bodies]
        return self._append(drafts, stamps or [Stamp()] * len(drafts), system=True)

    def _append(
        self, drafts: Sequence[Draft], stamps: Sequence[Stamp], *, system: bool = False, dedup: bool = False
    ) -> Placed:
        shape = self.shape
        for draft in drafts:
            if draft.kind == KIND_MESSAGE and not draft.body:
                raise Refused("ILLEGAL")
            if draft.kind == KIND_MESSAGE and len(draft.body) > shape.max_message_bytes:
                raise Refused("TOO_LARGE")
        total = sum(padded(draft.size()) for draft in drafts)
        if len(drafts) > GROUP_RECORDS_MAX or total > min(shape.ring_bytes, shape.segment_bytes) // 4:
            raise Refused("TOO_LARGE")
        if dedup and (known := self._find_id(stamps[0])) is not None:
            return Placed((known,), (), 0, duplicate=True)
        start, end = self._place(total)
        usable = shape.ring_bytes - (0 if system else shape.reserve_bytes)
        if end - self.flushed > usable:
            raise Refused("NO_SPACE")
        if end > (self.system_capacity if system else self.user_capacity):
            raise Refused("NO_CAPACITY")
        self.write_limit = max(self.write_limit, end)
        positions, position = [], start
        for draft in drafts:
            positions.append(position)
            position += padded(draft.size())
        offsets = self._index(drafts, positions)
        if dedup:
            self._ids.append((stamps[0].incarnation, stamps[0].sequence, start))
        self._write(drafts, stamps, positions, offsets, total, end, dedup=dedup)
        return Placed(tuple(positions), tuple(offsets), end)

    def _place(self, total: int) -> tuple[int, int]:
        """Start and end of a group: never across a segment's end, and no header-less rest behind it."""
        segment = self.shape.segment_bytes
        room = segment - self.tail % segment
        start = self.tail + room if total > room else self.tail
        end = start + total
        left = -end % segment
        return start, end + left if left < HEADER else end

    def _write(
        self,
        drafts: Sequence[Draft],
        stamps: Sequence[Stamp],
        positions: Sequence[int],
        offsets: Sequence[int],
        total: int,
        end: int,
        *,
        dedup: bool,
    ) -> None:
        if positions[0] > self.tail:
            filler = bytes(positions[0] - self.tail - HEADER)
            self._log += encode_record(position=self.tail, epoch=1, flushed=self.flushed, kind=KIND_FILLER, body=filler)
        for i, (draft, stamp, position) in enumerate(zip(drafts, stamps, positions, strict=True)):
            group = 0 if len(drafts) == 1 else FLAG_GROUP | (FLAG_GROUP_LAST if i + 1 == len(drafts) else 0)
            message = draft.kind == KIND_MESSAGE
            self._log += encode_record(
                position=position,
                epoch=1,
                flushed=self.flushed,
                kind=draft.kind,
                body=draft.body,
                queue_offset=offsets[i],
                queue_id=draft.queue,
                topic_id=1 if message else 0,
                incarnation=stamp.incarnation,
                sequence=stamp.sequence,
                born_ns=stamp.born_ns,
                flags=group | (FLAG_DEDUP if dedup else 0),
                group_bytes=total if i == 0 and len(drafts) > 1 else 0,
                tags=draft.tags,
                keys=draft.keys,
                properties=dict(draft.properties),
            )
        self._log += bytes(end - len(self._log))
        self.tail = end

    # ---- the queue index (R7)

    def _index(self, drafts: Sequence[Draft], positions: Sequence[int]) -> list[int]:
        """Queue offsets of the drafts, with an index entry for each; NO_INDEX leaves all but taken blocks as it was."""
        before = [(queue.next_offset, queue.bytes, list(queue.chain), queue.index_first) for queue in self.queues]
        pool = list(self._pool)
        taken: list[Block] = []
        offsets = []
        for draft, position in zip(drafts, positions, strict=True):
            if draft.kind != KIND_MESSAGE:
                offsets.append(0)
                continue
            queue = self.queues[draft.queue]
            if not queue.chain or queue.next_offset - queue.chain[-1].first >= BLOCK_ENTRIES:
                head = self._pool[0]
                if head.queue is not None and self.dispatched <= head.last_position:
                    self._undo_index(before, pool, taken)
                    raise Refused("NO_INDEX")
                taken.append(head)
                self._extend(draft.queue)
            queue.chain[-1].last_position = position
            offsets.append(queue.next_offset)
            queue.next_offset += 1
            queue.bytes += len(draft.body)
        return offsets

    def _extend(self, number: int) -> None:
        block, queue = self._pool.popleft(), self.queues[number]
        self._let_go(block)
        if queue.chain:
            self._pool.append(queue.chain[-1])
        else:
            queue.index_first = queue.next_offset
        block.queue, block.first = number, queue.next_offset // BLOCK_ENTRIES * BLOCK_ENTRIES
        queue.chain.append(block)

    def _let_go(self, block: Block) -> None:
        """A block's former queue loses it, come what may."""
        if block.queue is not None:
            former = self.queues[block.queue]
            assert former.chain[0] is block
            del former.chain[0]
            former.index_first = former.chain[0].first
        block.queue = None

    def _undo_index(
        self, before: list[tuple[int, int, list[Block], int]], pool: list[Block], taken: list[Block]
    ) -> None:
        for queue, (next_offset, size, chain, index_first) in zip(self.queues, before, strict=True):
            queue.next_offset, queue.bytes, queue.chain, queue.index_first = next_offset, size, chain, index_first
            for block in taken:
                if block in chain[:1]:
                    del chain[0]
                    queue.index_first = chain[0].first
        for block in taken:
            block.queue = None
        self._pool = deque(pool)

    # ---- remembered ids (R17)

    def _find_id(self, stamp: Stamp) -> int | None:
        """Position of the newest message with this id, if it is among the last that were remembered."""
        known = (
            position for *identity, position in reversed(self._ids) if identity == [stamp.incarnation, stamp.sequence]
        )
        return next(known, None)

    # ---- reading

    def read(self, position: int) -> bytes | None:
        """The padded record at ``position``, if the ring still has it."""
        if position >= self.tail or self.write_limit - position > self.shape.ring_bytes:
            return None
        size = int.from_bytes(self._log[position : position + 4], "little")
        return bytes(self._log[position : position + padded(size)])

    def window(self) -> tuple[int, bytes]:
        """(position, bytes) of all that the ring must still hold unchanged."""
        first = max(0, self.write_limit - self.shape.ring_bytes)
        return first, bytes(self._log[first : self.tail])
