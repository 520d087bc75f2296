"""What a broker's memory and directory say about its health, as plain values; ``status`` draws them.

Only looks: maps the memory, takes no lock and no slot, and works while the broker is stuck. Everything read here may
change while it is read.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

if TYPE_CHECKING:
    from shmbroker._native._core import Region
    from shmbroker.descriptor import Descriptor
    from shmbroker.naming import BrokerPaths

STATES: Final = {1: "starting", 2: "running", 3: "draining", 4: "stopped"}
STORE_STATES: Final = {0: "ok", 1: "full", 2: "read-only"}
VISIBLE_AFTER: Final = {0: "append", 1: "flush", 2: "replicate"}
WORDS: Final = ("tail", "flushed", "dispatched", "indexed", "snapshot", "kept", "user_capacity", "system_capacity")
EXPECTED_ROLES: Final = ("supervisor", "flusher", "dispatcher", "janitor", "scheduler")
ABANDONED: Final = "abandoned"
RING_NEARLY_FULL: Final = 0.9
MANY_STARTS: Final = 5
TIMERS_LATE_SECONDS: Final = 30.0  # the index may be some seconds behind

_STORE_REMEDIES: Final = {
    "full": "free space on that disk, or let consumers work; sending resumes by itself",
    "read-only": "look at the kernel log, back up to another disk, replace the disk, then restart the broker: "
    "what was not synced is written again from memory",
}


def of_running(region: Region, descriptor: Descriptor, paths: BrokerPaths) -> dict[str, Any]:
    """Everything that ``status`` shows of a broker whose memory stands."""
    words = {name: region.get(name) for name in WORDS}
    unflushed = words["tail"] - words["flushed"]
    store = STORE_STATES.get(region.get("store_state"), "unknown")
    error = region.get("store_errno")
    health: dict[str, Any] = {
        "directory": str(paths.directory),
        "state": STATES.get(region.get("state"), "unknown"),
        "epoch": region.get("epoch"),
        "embedded": bool(region.get("embedded")),
        "flush_disk_type": "SYNC_FLUSH" if region.get("sync_flush") else "ASYNC_FLUSH",
        "visible_after": VISIBLE_AFTER.get(region.get("visible_after"), "unknown"),
        "positions": words,
        "ring": {
            "bytes": region.ring_bytes,
            "unflushed_bytes": unflushed,
            "fill": unflushed / region.ring_bytes,
        },
        "lag": {
            "flusher_bytes": unflushed,
            "dispatcher_bytes": words["tail"] - words["dispatched"],
            "index_bytes": words["tail"] - words["indexed"],
        },
        "store": {
            "state": store,
            "errno": error,
            "error": os.strerror(error) if error else "",
            "remedy": _STORE_REMEDIES.get(store, ""),
        },
        "damaged_at": _damage(region),
        "workers": [_worker(worker) for worker in region.workers()],
        "clients": [_client(client) for client in region.clients() if client["live"]],
        "append_lock": {"holder": _process(region.lock_holder()), "takeovers": region.get("lock_takeovers")},
        "waits": dict(Counter(waiter["kind"] for waiter in region.waiters() if waiter["state"] != "idle")),
        "timers": timers(descriptor, paths),
        "topics": len(region.topics()),
        "groups": len(region.groups()),
        "unserved": _unserved(region),
        "memory": memory_use(descriptor),
        "disk": disk_use(paths),
    }
    if not any(worker["alive"] for worker in health["workers"] if worker["role"] == "supervisor"):
        health["state"] = ABANDONED if health["state"] == "running" else f"{ABANDONED} while {health['state']}"
    health["findings"] = findings(health)
    return health


def of_stopped(paths: BrokerPaths) -> dict[str, Any]:
    """What is known of a directory that nobody serves."""
    return {
        "directory": str(paths.directory),
        "state": "not running",
        "disk": disk_use(paths),
        "findings": ["no broker runs; `shmbroker serve`, or any program that opens the directory, starts it"],
    }


def findings(health: dict[str, Any]) -> list[str]:
    """What is wrong, and what to do about it: a sentence each."""
    found: list[str] = []
    abandoned = health["state"].startswith(ABANDONED)
    if abandoned:
        found.append(_abandoned(health))
    leaving = health["state"] == "draining"  # as told; what hinders it is found below
    if health["state"] != "running" and not abandoned and not leaving:
        found.append(f"the broker is {health['state']}; run/supervisor.log in the directory says why")
    store = health["store"]
    if store["state"] != "ok":
        found.append(f"the store is {store['state']} ({store['error'] or 'no errno'}): {store['remedy']}")
    if health["damaged_at"] is not None:
        found.append(
            f"the log is damaged at position {health['damaged_at']}: what can be read is served, what cannot raises "
            "CorruptLog. `shmbroker log verify` shows the extent; restore a backup, or stop the broker and "
            "`shmbroker log repair`, which cuts the log there and keeps a copy"
        )
    roles = {worker["role"]: worker for worker in health["workers"]}
    for role in () if abandoned else EXPECTED_ROLES:
        worker = roles.get(role)
        if worker is None or not worker["alive"]:
            if not leaving:
                found.append(f"the {role} is not running; the supervisor restarts it, run/{role}.log says why it died")
        elif worker["process_state"] == psutil.STATUS_STOPPED:
            found.append(f"the {role} is stopped: kill -CONT {worker['pid']}")
        elif worker["starts"] >= MANY_STARTS:
            found.append(f"the {role} was started {worker['starts']} times; run/{role}.log says why it died")
    late = time.time_ns() / 1e9 - (health["timers"]["next_due"] or math.inf)
    if late > TIMERS_LATE_SECONDS:
        found.append(f"delayed messages are {late:.0f} s late; run/scheduler.log says what the scheduler waits for")
    holder = health["append_lock"]["holder"]
    if holder and holder["process_state"] == psutil.STATUS_STOPPED:
        found.append(
            f"process {holder['pid']} ({holder['command']}) is stopped and holds the append lock, nobody can send: "
            f"kill -CONT {holder['pid']}, or kill -9 it and the lock is repaired at once"
        )
    found += [
        f"group {place['group']!r} cannot consume {place['topic']}{place['queues']}, where messages wait: all claim "
        "tables are in use. Start the broker anew with more claim_tables, or delete groups or topics that nobody needs"
        for place in health["unserved"]
    ]
    if health["ring"]["fill"] > RING_NEARLY_FULL:
        found.append("the ring is nearly full of what is not on the disk yet: the disk is slower than the producers")
    return found


def _abandoned(health: dict[str, Any]) -> str:
    """Its supervisor was killed, and nobody restarts a worker: who starts the next one?"""
    place = health["directory"]
    if health["embedded"] and any(client["process_state"] != "dead" for client in health["clients"]):
        return "its supervisor was killed; a client that has it open is starting another: look again in a second"
    who = "any program that opens the directory" if health["embedded"] else "its process manager, or you,"
    remedy = f"{who} starts another: `shmbroker serve -d {place}`"
    if not health["embedded"]:
        remedy += "; a program that newly opens the directory does so, too, and embeds it then"
    return (
        f"its supervisor was killed, and nobody works for it: {remedy}. What was sent is kept in memory; clients can "
        "send until the ring is full"
    )


def _unserved(region: Region) -> list[dict[str, Any]]:
    """Queues with messages that their groups cannot be given, since there are too few claim tables."""
    consumed = set(region.consumed_queues())
    if len(consumed) < region.limits["claim_tables"]:
        return []
    found = []
    topics = region.topics()
    for group in region.groups():
        subscribed = json.loads(group["subscription"] or "{}")
        for topic in (topic for topic in topics if topic["name"] in subscribed):
            queues = [
                queue["queue_id"]
                for queue in topic["queues"]
                if (group["group_id"], topic["topic_id"], queue["queue_id"]) not in consumed
                and queue["next_offset"] > queue["first_offset"]
            ]
            if queues:
                found.append({"group": group["name"], "topic": topic["name"], "queues": queues})
    return found


def _damage(region: Region) -> int | None:
    """The first damaged place that dispatcher or consumers met in the log, as long as retention has not taken it."""
    position = region.get("damaged") - 1
    return position if position >= region.get("kept") else None


def memory_use(descriptor: Descriptor) -> dict[str, Any]:
    """Bytes of the broker's objects, and what /dev/shm has left."""
    room = os.statvfs("/dev/shm")
    return {
        "control_bytes": _size_of(Path("/dev/shm" + descriptor.control)),
        "ring_bytes": _size_of(Path("/dev/shm" + descriptor.ring)),
        "free_bytes": room.f_bavail * room.f_frsize,
    }


def timers(descriptor: Descriptor, paths: BrokerPaths) -> dict[str, Any]:
    """Delayed messages, as far as their index knows of them: what came within the last second it may not."""
    from shmbroker.store.timer_index import reading

    with reading(paths.timers, bytes.fromhex(descriptor.store)) as index:
        if index is None:
            return {"pending": 0, "next_due": None}
        following = index.after(0, 0, 1)
        return {"pending": index.count, "next_due": following[0][0] / 1e9 if following else None}


def disk_use(paths: BrokerPaths) -> dict[str, Any]:
    """Bytes of log and derived files as allocated, and how full the file system is."""
    room = os.statvfs(paths.root)
    segments = list(_files(paths.log))
    return {
        "log_bytes": sum(segments),
        "segments": len(segments),
        "queues_bytes": sum(_files(paths.queues)),
        "index_bytes": sum(_files(paths.index)) + sum(_files(paths.timers)),
        "free_bytes": room.f_bavail * room.f_frsize,
        "used": 1 - room.f_bavail / room.f_blocks if room.f_blocks else 0.0,
    }


def _files(directory: Path) -> Iterable[int]:
    """Allocated bytes of every file below ``directory``; what vanishes meanwhile counts nothing."""
    for base, _, names in os.walk(directory):
        for name in names:
            try:
                yield Path(base, name).stat().st_blocks * 512
            except FileNotFoundError:
                continue


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _worker(worker: dict[str, Any]) -> dict[str, Any]:
    found = _process(worker["pid"], worker["start_ticks"])
    return {
        "role": worker["role"],
        "pid": worker["pid"],
        "alive": found is not None,
        "process_state": found["process_state"] if found else "",
        "uptime_seconds": found["uptime_seconds"] if found else 0.0,
        "resident_bytes": found["resident_bytes"] if found else 0,
        "starts": worker["starts"],
        "beat_age_seconds": max(0.0, time.monotonic() - worker["beat_ns"] / 1e9),
        "asleep": worker["asleep"],
    }


def _client(client: dict[str, Any]) -> dict[str, Any]:
    found = _process(client["pid"], client["start_ticks"])
    return {
        "slot": client["slot"],
        "pid": client["pid"],
        "name": client["name"],
        "command": found["command"] if found else "",
        "process_state": found["process_state"] if found else "dead",
        "attached_seconds": max(0.0, time.monotonic() - client["attached_ns"] / 1e9),
        "sends": client["sends"],
        "receives": client["receives"],
        "acks": client["acks"],
    }


def _process(pid: int, start_ticks: int | None = None) -> dict[str, Any] | None:
    """A living process (or thread) by its id; None if it is gone, or if the id has come to mean another process."""
    from shmbroker._native import _core

    if pid <= 0 or (start_ticks is not None and _core.start_ticks(pid) != start_ticks):
        return None
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            return {
                "pid": pid,
                "command": " ".join(process.cmdline())[:120] or process.name(),
                "process_state": process.status(),
                "uptime_seconds": max(0.0, time.time_ns() / 1e9 - process.create_time()),
                "resident_bytes": process.memory_info().rss,
            }
    except psutil.Error:
        return None
