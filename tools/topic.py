"""``shmbroker topic``: create, list, alter and delete."""

from __future__ import annotations

from typing import Any

import click

from shmbroker.errors import TopicNotExist
from shmbroker.naming import PERMISSIONS, check_topic, permission_name
from shmbroker.tools import console
from shmbroker.tools.command_group import CommandGroup
from shmbroker.tools.session import Session, common_options, pass_session

PERMISSION_HELP = "r: may be consumed, w: may be sent to."


@click.group(cls=CommandGroup)
@common_options
def topic() -> None:
    """Create, list, alter and delete topics.

    \b
    shmbroker topic create orders --queues 8
    shmbroker topic list
    shmbroker topic alter orders --permission r
    shmbroker topic delete orders --yes
    """


@topic.command()
@common_options
@click.argument("name")
@click.option("--queues", type=click.IntRange(1, 1024), help="[default: what broker.toml says, else 4]")
@click.option(
    "--permission", type=click.Choice(list(PERMISSIONS)), default="rw", show_default=True, help=PERMISSION_HELP
)
@pass_session
def create(session: Session, name: str, queues: int | None, permission: str) -> None:
    """Create a topic; creating it again as it stands changes nothing.

    \b
    shmbroker topic create orders --queues 8
    """
    check_topic(name)  # before a broker is made for it
    with session.open(create=True) as broker:
        broker.create_topic(name, queues=queues, permission=permission)
    console.print_done(session, f"created {name}", {"topic": name, "result": "created"})


@topic.command(name="list")
@common_options
@pass_session
def list_topics(session: Session) -> None:
    """List topics with their queues and how many messages each holds.

    \b
    shmbroker topic list
    shmbroker --json topic list | jq '.[].name'
    """
    with session.open() as broker:
        topics = [_as_row(entry) for entry in broker.topics()]
    if session.json:
        console.print_json(topics)
        return
    console.table(
        "",
        ["topic", ">queues", "permission", ">messages kept", ">messages ever"],
        [
            (
                entry["name"],
                len(entry["queues"]),
                entry["permission"],
                f"{entry['kept']:,}",
                f"{entry['sent']:,}",
            )
            for entry in sorted(topics, key=lambda entry: str(entry["name"]))
        ],
        empty="no topics",
    )


def _as_row(entry: dict[str, Any]) -> dict[str, Any]:
    queues = entry["queues"]
    return {
        "name": entry["name"],
        "topic_id": entry["topic_id"],
        "permission": permission_name(entry["permission"]),
        "sent": sum(queue["next_offset"] for queue in queues),
        "kept": sum(queue["next_offset"] - queue["first_offset"] for queue in queues),
        "bytes_since_start": sum(queue["bytes"] for queue in queues),  # not in the log's snapshots
        "queues": [{key: queue[key] for key in ("queue_id", "first_offset", "next_offset")} for queue in queues],
    }


@topic.command()
@common_options
@click.argument("name")
@click.option("--queues", type=click.IntRange(1, 1024), help="More queues; a topic never loses one.")
@click.option("--permission", type=click.Choice(list(PERMISSIONS)), help=PERMISSION_HELP)
@pass_session
def alter(session: Session, name: str, queues: int | None, permission: str | None) -> None:
    """Give a topic more queues, or another permission.

    \b
    shmbroker topic alter orders --queues 16
    shmbroker topic alter orders --permission r     # nobody may send any more
    """
    if queues is None and permission is None:
        raise click.UsageError("name what to alter: --queues or --permission")
    with session.open() as broker:
        broker.alter_topic(name, queues=queues, permission=permission)
    console.print_done(session, f"altered {name}", {"topic": name, "result": "altered"})


@topic.command()
@common_options
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_session
def delete(session: Session, name: str, yes: bool) -> None:
    """Delete a topic and all its messages, for every group.

    \b
    shmbroker topic delete orders --yes
    """
    with session.open() as broker:
        if name not in (entry["name"] for entry in broker.topics()):
            raise TopicNotExist(f"topic {name!r} does not exist")
        console.confirm(f"Delete {name} and all its messages?", yes)
        broker.delete_topic(name)
    console.print_done(session, f"deleted {name}", {"topic": name, "result": "deleted"})
