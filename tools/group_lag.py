"""How far each consumer group is behind, what it keeps from being deleted, and who holds its oldest message."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Final

from shmbroker.naming import DEAD_LETTER_PREFIX, RETRY_PREFIX
from shmbroker.tools.stored_messages import StoredMessages

if TYPE_CHECKING:
    from shmbroker._native._core import Region
    from shmbroker.naming import BrokerPaths

_ENTRIES_PER_READ: Final = 16_384


def lags(paths: BrokerPaths, region: Region) -> list[dict[str, Any]]:
    """One dictionary for each group, by name. Counts change while they are read: each alone is right, not their sum."""
    clients = {client["slot"]: client for client in region.clients() if client["live"]}
    groups = {entry["name"]: entry for entry in region.groups()}
    with StoredMessages(paths, region) as messages:
        return [
            _group(*consumed, clients, messages, region.get("tail")) | _settings(groups.get(consumed[0]))
            for consumed in _consumed(region)
        ]


def name_of(lag: dict[str, Any]) -> str:
    """The group's name for people, with what they must know to read the rest."""
    return f"{lag['group']} (paused)" if lag["paused"] else str(lag["group"])


def brief(region: Region) -> list[dict[str, Any]]:
    """The same in short: messages not acknowledged yet, those of them that a member has in hand, and who owns a queue.

    From the memory alone: it opens no file, and costs the same however far a group is behind.
    """
    paused = {entry["name"] for entry in region.groups() if entry["paused"]}
    clients = {client["slot"]: client for client in region.clients()}
    return [
        {
            "group": name,
            "paused": name in paused,
            "lag_messages": sum(map(_lag_messages, tables)),
            "in_flight": sum(table["held"] for table in tables),
            "owners": [
                {"topic": table["topic"], "queue_id": table["queue_id"], "pid": clients[table["owner"]]["pid"]}
                for table in tables
                if table["owner"] in clients
            ],
        }
        for name, _, tables in _consumed(region)
    ]


def _settings(group: dict[str, Any] | None) -> dict[str, Any]:
    """None: it was deleted while we looked."""
    return {"paused": bool(group and group["paused"]), "retry": json.loads((group and group["retry"]) or "null")}


def _consumed(region: Region) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Each group by name: its name, its subscription, and how far it is in each queue."""
    subscriptions = {entry["name"]: _subscription(entry["subscription"]) for entry in region.groups()}
    queues = [(topic, queue) for topic in region.topics() for queue in topic["queues"]]
    first = {(topic["name"], queue["queue_id"]): queue["first_offset"] for topic, queue in queues}
    progress = region.progress()
    found = []
    for name in sorted({*subscriptions, *(table["group"] for table in progress)}):
        subscription = subscriptions.get(name, {})
        if name.startswith(DEAD_LETTER_PREFIX):
            continue  # `shmbroker dlq` consumes there, and shows it
        own = (table for table in progress if table["group"] == name)
        tables = {_place(table): _still_there(table, first[_place(table)]) for table in own if _place(table) in first}
        for topic, queue in queues:  # one that no member has looked at yet: the group is at its first message
            if topic["name"] in subscription or topic["name"] == RETRY_PREFIX + name:
                place = {"topic": topic["name"], "topic_id": topic["topic_id"], "base": queue["first_offset"]}
                tables.setdefault((topic["name"], queue["queue_id"]), {**_UNTOUCHED, **queue, **place})
        found.append((name, subscription, [tables[place] for place in sorted(tables)]))
    return found


def _still_there(table: dict[str, Any], first: int) -> dict[str, Any]:
    """Without what retention has taken unconsumed: the next receive passes over it."""
    acked = [(max(start, first), start + count) for start, count in table["acked"] if start + count > first]
    return table | {
        "base": max(table["base"], first),
        "acked": [(start, end - start) for start, end in acked],
        "overflow": [offset for offset in table["overflow"] if offset >= first],
    }


_UNTOUCHED: Final[dict[str, Any]] = {
    "acked": [],
    "attempts": {},
    "overflow": [],
    "held": 0,
    "oldest_held": None,
    "oldest_holder": None,
    "owner": None,
    "delivered": 0,
    "redelivered": 0,
}


def _place(table: dict[str, Any]) -> tuple[str, int]:
    return table["topic"], table["queue_id"]


def _lag_messages(table: dict[str, Any]) -> int:
    acked = sum(count for _, count in table["acked"])
    return int(max(0, table["next_offset"] - table["base"] - acked) + len(table["overflow"]))


def _group(
    name: str,
    subscription: dict[str, Any],
    tables: list[dict[str, Any]],
    clients: dict[int | None, dict[str, Any]],
    messages: StoredMessages,
    tail: int,
) -> dict[str, Any]:
    queues = [_queue(table, clients, messages) for table in tables]
    read = {*subscription, RETRY_PREFIX + name}  # members read the group's retries without subscribing to them
    for queue in queues:  # None: nobody knows, since no member came yet and no subscription was set
        queue["subscribed"] = queue["topic"] in read if subscription else None
    floor = min((queue["position"] for queue in queues if queue["position"] is not None), default=tail)
    return {
        "group": name,
        "subscription": subscription,
        "lag_messages": sum(queue["lag_messages"] for queue in queues),
        "lag_bytes": sum(queue["lag_bytes"] for queue in queues),
        "lag_seconds": max((queue["lag_seconds"] for queue in queues), default=0.0),
        "in_flight": sum(queue["in_flight"] for queue in queues),
        "held_back_bytes": max(0, tail - floor),
        "delivered_since_start": sum(table["delivered"] for table in tables),
        "redelivered_since_start": sum(table["redelivered"] for table in tables),
        "queues": queues,
    }


def _queue(
    table: dict[str, Any], clients: dict[int | None, dict[str, Any]], messages: StoredMessages
) -> dict[str, Any]:
    """Lag of a group in one queue. ``position``: of its oldest unacknowledged message; None if it has none."""
    base, overflow = table["base"], sorted(table["overflow"])
    oldest = overflow[0] if overflow else _first_unacked(base, table["acked"])
    lag = _lag_messages(table)
    found: dict[str, Any] = {
        "topic": table["topic"],
        "queue_id": table["queue_id"],
        "base": base,
        "next_offset": table["next_offset"],
        "lag_messages": lag,
        "lag_bytes": 0,
        "lag_seconds": 0.0,
        "in_flight": table["held"],
        "owner": _process(clients.get(table["owner"])),
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


def _process(client: dict[str, Any] | None) -> dict[str, Any] | None:
    return {"pid": client["pid"], "name": client["name"]} if client else None


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


def _subscription(text: str) -> dict[str, Any]:
    """The live members' subscription, topic to tags or {"sql": expression}; empty: there is none, or no sense in it."""
    try:
        found = json.loads(text.rstrip("\0")) if text.rstrip("\0") else {}
    except ValueError:
        return {}
    return {str(topic): wanted for topic, wanted in found.items()} if isinstance(found, dict) else {}
