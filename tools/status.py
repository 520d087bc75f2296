"""``shmbroker status``: is the broker well, what holds it up, what to do."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any

import click

from shmbroker.tools import console
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Session, common_options, pass_session


@click.command()
@common_options
@pass_session
def status(session: Session) -> int:
    """Show state, watermarks, lag, workers, clients, memory and disk; name what is wrong and the remedy.

    \b
    shmbroker status
    shmbroker --json status | jq .lag
    watch -n1 shmbroker status

    Only looks at the memory: takes no lock, works while the broker is stuck. Leaves with 0 if all is well, 1 if
    something is wrong, 6 if no broker runs.
    """
    from shmbroker import health as health_of
    from shmbroker.tools.group_lag import brief

    paths = session.require_directory()
    found = session.attach()
    if found is None:
        health = health_of.of_stopped(paths)
    else:
        region, descriptor = found
        health = health_of.of_running(region, descriptor, paths)
        health["group_lag"] = brief(region)
        region.close()
    if session.json:
        console.print_json(health)
    else:
        _draw(health, running=found is not None)
    if found is None or health["state"].startswith(health_of.ABANDONED):
        return ExitCode.NOT_SERVED
    return ExitCode.FINDING if health["findings"] else ExitCode.OK


def _draw(health: dict[str, Any], *, running: bool) -> None:
    if running:
        _summary(health)
        _groups(health["group_lag"])
        _processes(health)
    else:
        _disk(health)
    for finding in health["findings"]:
        click.secho(f"! {finding}", fg="red", bold=True)


def _summary(health: dict[str, Any]) -> None:
    words, ring, lag, memory = health["positions"], health["ring"], health["lag"], health["memory"]
    embedded = "embedded: stops with its last client" if health["embedded"] else "served: runs until it is told to stop"
    in_memory = memory["control_bytes"] + memory["ring_bytes"]
    behind = ", ".join(f"{name.removesuffix('_bytes')} {console.size(count)}" for name, count in lag.items())
    rows = [
        ("directory", health["directory"]),
        ("state", f"{health['state']}, epoch {health['epoch']}, {embedded}"),
        ("policy", f"{health['flush_disk_type']}, visible after {health['visible_after']}"),
        ("log", f"{words['kept']:,} .. {words['tail']:,}; flushed {words['flushed']:,}"),
        ("lag", behind),
        ("ring", f"{ring['fill']:.1%} of {console.size(ring['bytes'])} not on the disk yet"),
        ("store", f"{health['store']['state']} {health['store']['error']}".strip()),
        ("append lock", _lock_line(health["append_lock"])),
        ("waiting", ", ".join(f"{count} for {kind}" for kind, count in sorted(health["waits"].items())) or "nobody"),
        ("contents", f"{health['topics']} topics, {health['groups']} groups"),
        ("delayed", _timers_line(health["timers"])),
        ("memory", f"{console.size(in_memory)} of /dev/shm, {console.size(memory['free_bytes'])} free"),
        ("disk", _disk_line(health["disk"])),
    ]
    console.table("", ["broker", ""], rows)


def _groups(lags: list[dict[str, Any]]) -> None:
    from shmbroker.tools.group_lag import name_of

    rows = [(name_of(lag), f"{lag['lag_messages']:,}", f"{lag['in_flight']:,}", _owners_line(lag)) for lag in lags]
    console.table("groups", ["group", ">lag in messages", ">in flight", "queues owned"], rows)


def _owners_line(lag: dict[str, Any]) -> str:
    counts = Counter(owned["pid"] for owned in lag["owners"])
    return ", ".join(f"{count} by {pid}" for pid, count in sorted(counts.items())) or "-"


def _lock_line(lock: dict[str, Any]) -> str:
    holder = f"held by {lock['holder']['pid']} {lock['holder']['command']}" if lock["holder"] else "free"
    return f"{holder}, repaired {lock['takeovers']} times" if lock["takeovers"] else holder


def _timers_line(timers: dict[str, Any]) -> str:
    if not timers["pending"]:
        return "no messages"
    following = datetime.fromtimestamp(timers["next_due"]).astimezone().isoformat(" ", "milliseconds")
    return f"{timers['pending']:,} messages, the next at {following}"


def _disk_line(disk: dict[str, Any]) -> str:
    log, queues, index, free = (console.size(disk[f"{name}_bytes"]) for name in ("log", "queues", "index", "free"))
    files = f"log {log} in {disk['segments']} files, queues {queues}, index {index}"
    return f"{files}; {free} free, {disk['used']:.0%} used"


def _disk(health: dict[str, Any]) -> None:
    rows = [("directory", health["directory"]), ("state", health["state"]), ("disk", _disk_line(health["disk"]))]
    console.table("", ["broker", ""], rows)


def _processes(health: dict[str, Any]) -> None:
    console.table(
        "workers",
        ["role", ">pid", "state", ">uptime", ">starts", ">memory"],
        [
            (
                worker["role"],
                worker["pid"],
                worker["process_state"] if worker["alive"] else "dead",
                console.duration(worker["uptime_seconds"]),
                worker["starts"],
                console.size(worker["resident_bytes"]),
            )
            for worker in health["workers"]
        ],
    )
    console.table(
        "clients",
        ["name", ">pid", "state", ">attached", ">sends", ">receives", ">acks", "command"],
        [
            (
                client["name"],
                client["pid"],
                client["process_state"],
                console.duration(client["attached_seconds"]),
                f"{client['sends']:,}",
                f"{client['receives']:,}",
                f"{client['acks']:,}",
                client["command"][:60],
            )
            for client in health["clients"]
        ],
    )
