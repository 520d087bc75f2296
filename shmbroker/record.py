"""Records as Python sees them: names of kinds and flags, and the JSON bodies of the system's own records.

The bytes are drawn in ``_native/layout.h`` and described in ``docs/format.md``; ``scan``, ``encode_record`` and
``decode_record`` of the native core read and write them. Bodies come from a disk: every parser here refuses what it
does not know with ValueError, and no value is used before its type and range are checked.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum, IntFlag
from typing import Any, Final

from shmbroker._native._core import (
    GROUP_RECORDS_MAX,
    RECORD_ALIGN_BYTES,
    RECORD_HEADER_BYTES,
    RECORD_VERSION,
    Record,
    decode_record,
    encode_record,
)
from shmbroker.retry import parse_policy

__all__ = [
    "GROUP_RECORDS_MAX",
    "NO_QUEUE",
    "RECORD_ALIGN_BYTES",
    "RECORD_HEADER_BYTES",
    "RECORD_VERSION",
    "EpochBody",
    "GroupBody",
    "Record",
    "RecordFlag",
    "RecordKind",
    "SnapshotBody",
    "TopicBody",
    "decode_record",
    "encode_record",
    "next_position",
    "padded",
    "parse_ids",
    "subscription_text",
]

NO_QUEUE: Final = 0xFFFF
_U16: Final = 0xFFFF
_U32: Final = 0xFFFF_FFFF
_POSITION: Final = 2**63 - 1
_KNOWN_ID: Final = struct.Struct("<QQQ")  # sb_known_id of layout.h


class RecordKind(IntEnum):
    """``sb_kind`` of layout.h."""

    MESSAGE = 1
    FILLER = 2
    EPOCH = 3
    TOPIC = 4
    GROUP = 5
    PROGRESS = 6
    SNAPSHOT_BEGIN = 7
    SNAPSHOT_END = 8
    IDS = 9
    TIMER = 10
    FIRED = 11
    RECALL = 12


class RecordFlag(IntFlag):
    """``SB_FLAG_*`` of layout.h."""

    GROUP = 0x01
    DEDUP = 0x02
    GROUP_LAST = 0x04
    WAIT_STORE_NOT_OK = 0x08
    LATE = 0x10


def padded(size: int) -> int:
    """Bytes from the start of a record of ``size`` bytes to where the next may begin."""
    return -(-size // RECORD_ALIGN_BYTES) * RECORD_ALIGN_BYTES


def next_position(position: int, size: int, segment_bytes: int) -> int:
    """Where the record after the one at ``position`` begins: short segment ends are stepped over."""
    after = position + padded(size)
    left = segment_bytes - after % segment_bytes
    return after + left if left < RECORD_HEADER_BYTES else after


# Bodies: one flat JSON object each, keys sorted, no blanks, so that equal contents are equal bytes.


@dataclass(frozen=True, slots=True)
class EpochBody:
    """A new epoch: it begins at ``start``, the record's own position when the epoch was made (R2)."""

    epoch: int
    start: int
    previous: int
    reason: str

    def encode(self) -> bytes:
        """The body of an EPOCH record."""
        return _encode(asdict(self))

    @staticmethod
    def parse(body: bytes) -> EpochBody:
        """Check and read an EPOCH record's body; ValueError."""
        fields = _decode(body)
        parsed = EpochBody(
            _integer(fields, "epoch", 1, _U32),
            _integer(fields, "start", 0, _POSITION),
            _integer(fields, "previous", 0, _U32),
            _text(fields, "reason"),
        )
        if parsed.previous >= parsed.epoch:
            raise ValueError(f"epoch {parsed.epoch} cannot follow epoch {parsed.previous}")
        return parsed


@dataclass(frozen=True, slots=True)
class TopicBody:
    """A topic as it now is, or (``deleted``) no longer is.

    In a snapshot it also holds, per queue number, the next offset and the first that the log still has; the record
    that defines a topic leaves both lists empty.
    """

    name: str
    topic_id: int
    queues: int = 0
    permission: int = 6
    next_offsets: tuple[int, ...] = ()
    first_offsets: tuple[int, ...] = ()
    deleted: bool = False

    def encode(self) -> bytes:
        """The body of a TOPIC record."""
        fields: dict[str, Any] = {"op": "delete", "name": self.name, "topic_id": self.topic_id}
        if not self.deleted:
            fields |= {"op": "define", "queues": self.queues, "permission": self.permission}
        if self.next_offsets:
            fields |= {"next_offsets": self.next_offsets, "first_offsets": self.first_offsets}
        return _encode(fields)

    @staticmethod
    def parse(body: bytes) -> TopicBody:
        """Check and read a TOPIC record's body; ValueError."""
        fields = _decode(body)
        name, topic_id = _text(fields, "name"), _integer(fields, "topic_id", 0, _U32)
        if _deletes(fields):
            return TopicBody(name, topic_id, deleted=True)
        queues = _integer(fields, "queues", 0, _U16)
        next_offsets, first_offsets = _integers(fields, "next_offsets"), _integers(fields, "first_offsets")
        if next_offsets and len(next_offsets) != queues:
            raise ValueError(f"{len(next_offsets)} next offsets for {queues} queues")
        if len(first_offsets) != len(next_offsets) or any(map(int.__gt__, first_offsets, next_offsets)):
            raise ValueError("every queue's first offset must be at or before its next")
        return TopicBody(name, topic_id, queues, _integer(fields, "permission", 0, 7), next_offsets, first_offsets)


@dataclass(frozen=True, slots=True)
class GroupBody:
    """A consumer group as it now is, or (``deleted``) no longer is.

    ``subscription``: topic to tag expression or ``{"sql": expression}``, if it was set (R25) and is not what the first
    member brings along; of two, that of the larger ``generation`` counts. ``retry``: its retry policy, if one was set;
    likewise. ``pause_generation``: odd if it is paused; the largest counts.
    """

    name: str
    group_id: int
    subscription: Mapping[str, str | Mapping[str, str]] = field(default_factory=dict)
    generation: int = 0
    retry: Mapping[str, Any] = field(default_factory=dict)
    retry_generation: int = 0
    pause_generation: int = 0
    deleted: bool = False

    def encode(self) -> bytes:
        """The body of a GROUP record."""
        fields: dict[str, Any] = {"op": "delete", "name": self.name, "group_id": self.group_id}
        if not self.deleted:
            fields["op"] = "define"
        if self.subscription:
            fields |= {"subscription": dict(self.subscription), "generation": self.generation}
        if self.retry:
            fields |= {"retry": dict(self.retry), "retry_generation": self.retry_generation}
        if self.pause_generation:
            fields["pause_generation"] = self.pause_generation
        return _encode(fields)

    def merged(self, other: GroupBody) -> GroupBody:
        """What two records about the same group say together."""
        subscribed, retried = max(self, other, key=_generation), max(self, other, key=_retry_generation)
        pauses = max(self.pause_generation, other.pause_generation)
        retry, generation = retried.retry, retried.retry_generation
        return replace(subscribed, retry=retry, retry_generation=generation, pause_generation=pauses)

    @staticmethod
    def parse(body: bytes) -> GroupBody:
        """Check and read a GROUP record's body; ValueError."""
        fields = _decode(body)
        name, group_id = _text(fields, "name"), _integer(fields, "group_id", 0, _U32)
        if _deletes(fields):
            return GroupBody(name, group_id, deleted=True)
        parsed = GroupBody(name, group_id)
        if "subscription" in fields:
            generation = _integer(fields, "generation", 1, _U32)
            parsed = replace(parsed, subscription=_subscription(fields), generation=generation)
        if "retry" in fields:
            retry, generation = fields["retry"], _integer(fields, "retry_generation", 1, _U32)
            parse_policy(json.dumps(retry))
            parsed = replace(parsed, retry=retry, retry_generation=generation)
        if "pause_generation" in fields:
            parsed = replace(parsed, pause_generation=_integer(fields, "pause_generation", 1, _U32))
        return parsed


def _generation(body: GroupBody) -> int:
    return body.generation


def _retry_generation(body: GroupBody) -> int:
    return body.retry_generation


def subscription_text(subscription: Mapping[str, str | Mapping[str, str]]) -> bytes:
    """A group's subscription as its members compare it, and people read it: the same bytes for the same one."""
    return json.dumps(dict(subscription), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


@dataclass(frozen=True, slots=True)
class SnapshotBody:
    """Frame of a snapshot: the same body stands in its BEGIN and in its END record.

    ``snapshot`` tells snapshots of one epoch apart, so that the end of one never closes the torn begin of another.
    ``next_topic_id`` and ``next_group_id`` are never lowered: ids of what was deleted are not given again. ``epochs``
    lists (epoch, start, previous) of the epochs so far, as their own records may be deleted.
    """

    snapshot: int
    epoch: int
    next_topic_id: int = 1
    next_group_id: int = 1
    epochs: tuple[tuple[int, int, int], ...] = ()

    def encode(self) -> bytes:
        """The body of a SNAPSHOT_BEGIN or SNAPSHOT_END record."""
        return _encode(asdict(self))

    @staticmethod
    def parse(body: bytes) -> SnapshotBody:
        """Check and read the body of either record; ValueError."""
        fields = _decode(body)
        epochs = fields.get("epochs", [])
        if not isinstance(epochs, list) or any(not isinstance(item, list) or len(item) != 3 for item in epochs):
            raise ValueError("epochs: a list of (epoch, start, previous) is wanted")
        return SnapshotBody(
            _integer(fields, "snapshot", 0, _POSITION),
            _integer(fields, "epoch", 1, _U32),
            _integer(fields, "next_topic_id", 0, _U32),
            _integer(fields, "next_group_id", 0, _U32),
            tuple((item[0], item[1], item[2]) for item in ([*_integers({"epoch": item}, "epoch")] for item in epochs)),
        )


def parse_ids(body: bytes) -> list[tuple[int, int, int]]:
    """An IDS record's body: (incarnation, sequence, position) of messages with a dedup key. ValueError."""
    if len(body) % _KNOWN_ID.size:
        raise ValueError(f"{len(body)} bytes are no ids: each has {_KNOWN_ID.size}")
    return list(_KNOWN_ID.iter_unpack(body))


def _encode(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _decode(body: bytes) -> dict[str, Any]:
    fields = json.loads(body)  # JSONDecodeError and UnicodeDecodeError are ValueErrors
    if not isinstance(fields, dict):
        raise ValueError("a JSON object is wanted")  # noqa: TRY004 - one class for all that a disk can get wrong
    return fields


def _integer(fields: dict[str, Any], name: str, low: int, high: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} = {value!r}: an integer from {low} to {high} is wanted")
    return value


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or len(value) > 1024:
        raise ValueError(f"{name} = {value!r}: a short string is wanted")
    return value


def _subscription(fields: dict[str, Any]) -> dict[str, str | dict[str, str]]:
    value = fields.get("subscription")
    if not isinstance(value, dict) or not value or not all(map(_is_expression, value.values())):
        raise ValueError(f"subscription = {value!r}: an object of tag and SQL expressions is wanted")
    return value


def _is_expression(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and [*value] == ["sql"] and type(value["sql"]) is str)


def _deletes(fields: dict[str, Any]) -> bool:
    operation = fields.get("op")
    if operation not in ("define", "delete"):
        raise ValueError(f"op = {operation!r}: define or delete is wanted")
    return bool(operation == "delete")


def _integers(fields: dict[str, Any], name: str) -> tuple[int, ...]:
    values = fields.get(name, [])
    if not isinstance(values, list) or any(type(value) is not int or not 0 <= value <= _POSITION for value in values):
        raise ValueError(f"{name}: a list of offsets is wanted")
    return tuple(values)
