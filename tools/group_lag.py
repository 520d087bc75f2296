"""How far each consumer group is behind, what it keeps from being deleted, and who holds its oldest message."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Final

from shmbroker.tools.stored_messages import StoredMessages

if TYPE_CHECKING:
    from shmbroker._native._core import Region
    from shmbroker.naming import BrokerPaths

_ENTRIES_PER_READ: Final = 16_384


def lags(paths: BrokerPaths, region: Region) -> list[dict[str, Any]]:
    """One dictionary for each group, by name. Counts change while they are read: each alone is right, not their sum."""
    tables: dict[str, list[dict[str, Any]]] = {entry["name"]: [] for entry in region.groups()}
    for table in region.progress():
        tables.setdefault(table["group"], []).append(table)
    subscriptions = {entry["name"]: _subscription(entry["subscription"]) for entry in region.groups()}
    queues_of = {entry["name"]: entry["queues"] for entry in region.topics()}
    clients = {client["slot"]: client for client in region.clients() if client["live"]}
    with StoredMessages(paths, region) as messages:
        return [
            _group(name, tables[name], subscriptions.get(name, {}), queues_of, clients, messages, region.get("tail"))
            for name in sorted(tables)
        ]


def _group(
    name: str,
    tables: list[dict[str, Any]],
    subscription: dict[str, str],
    queues_of: dict[str, list[dict[str, Any]]],
    clients: dict[int | None, dict[str, Any]],
    messages: StoredMessages,
    tail: int,
) -> dict[str, Any]:
    queues = [_queue(table, clients, messages) for table in tables]
    known = {(queue["topic"], queue["queue_id"]) for queue in queues}
    # A queue that no member has looked at yet has no claim table: the group is at its first message.
    for topic in subscription:
        for queue in queues_of.get(topic, ()):
            if (topic, queue["queue_id"]) not in known and queue["next_offset"] > queue["first_offset"]:
                untouched = {"topic": topic, "topic_id": messages.topic_id(topic), "base": queue["first_offset"]}
                queues.append(_queue({**_UNTOUCHED, **queue, **untouched}, clients, messages))
    queues.sort(key=lambda queue: (queue["topic"], queue["queue_id"]))
    floor = min((queue["position"] for queue in queues if queue["position"] is not None), default=tail)
    return {
        "group": name,
        "subscription": subscription,
        "lag_messages": sum(queue["lag_messages"] for queue in queues),
        "lag_bytes": sum(queue["lag_bytes"] for queue in queues),
        "lag_seconds": max((queue["lag_seconds"] for queue in queues), default=0.0),
        "in_flight": sum(queue["in_flight"] for queue in queues),
        "held_back_bytes": max(0, tail - floor),
        "delivered": sum(table["delivered"] for table in tables),
        "redelivered": sum(table["redelivered"] for table in tables),
        "queues": queues,
    }


_UNTOUCHED: Final[dict[str, Any]] = {
    "acked": [],
    "attempts": {},
    "overflow": [],
    "held": 0,
    "oldest_held": None,
    "oldest_holder": None,
}


def _queue(
    table: dict[str, Any], clients: dict[int | None, dict[str, Any]], messages: StoredMessages
) -> dict[str, Any]:
    """Lag of a group in one queue. ``position``: of its oldest unacknowledged message; None if it has none."""
    base, overflow = table["base"], sorted(table["overflow"])
    oldest = overflow[0] if overflow else _first_unacked(base, table["acked"])
    acked = sum(count for _, count in table["acked"])
    lag = max(0, table["next_offset"] - base - acked) + len(overflow)
    found: dict[str, Any] = {
        "topic": table["topic"],
        "queue_id": table["queue_id"],
        "base": base,
        "next_offset": table["next_offset"],
        "lag_messages": lag,
        "lag_bytes": 0,
        "lag_seconds": 0.0,
        "in_flight": table["held"],
        "position": None,
        "oldest": None,
    }
    if lag == 0:
        return found
    found["lag_bytes"] = _bytes_between(messages, table, oldest)
    entries = messages.entries(table["topic_id"], table["queue_id"], oldest, 1)
    record = messages.at_position(entries[0].position) if entries else None
    if record is None:  # the dispatcher has not come to it: it is as young as that
        return found
    client = clients.get(table["oldest_holder"]) if table["oldest_held"] == record.queue_offset else None
    found["position"] = record.position
    found["lag_seconds"] = max(0.0, (time.time_ns() - record.born_ns) / 1e9)
    found["oldest"] = {
        "queue_offset": record.queue_offset,
        "message_id": record.message_id,
        "attempts": table["attempts"].get(record.queue_offset, 0),
        "pid": client["pid"] if client else 0,
        "name": client["name"] if client else "",
    }
    return found


def _first_unacked(base: int, acked: list[tuple[int, int]]) -> int:
    """The base may still have to move over what is acknowledged."""
    for first, count in sorted(acked):
        if first <= base:
            base = max(base, first + count)
    return base


def _bytes_between(messages: StoredMessages, table: dict[str, Any], start: int) -> int:
    """Record bytes of a queue from offset ``start`` on, as far as it is dispatched, without those acknowledged."""
    acked = [(first, first + count) for first, count in table["acked"]]
    total, offset = 0, start
    while entries := messages.entries(table["topic_id"], table["queue_id"], offset, _ENTRIES_PER_READ):
        total += sum(entry.size for entry in entries)
        total -= sum(entry.size for entry in entries for first, end in acked if first <= entry.offset < end)
        offset = entries[-1].offset + 1
    return total


def _subscription(text: str) -> dict[str, str]:
    """The live members' subscription, topic by topic; empty if there is none or it makes no sense."""
    try:
        found = json.loads(text.rstrip("\0")) if text.rstrip("\0") else {}
    except ValueError:
        return {}
    return {str(topic): str(tags) for topic, tags in found.items()} if isinstance(found, dict) else {}
