"""``shmbroker group reset``, ``pause`` and ``resume``: where a group goes on, and whether."""

from __future__ import annotations

from typing import Any

import click

from shmbroker.tools import console
from shmbroker.tools.group_lag import brief
from shmbroker.tools.instants import instant
from shmbroker.tools.session import Session, common_options, pass_session


@click.command()
@common_options
@click.argument("name")
@click.option(
    "--to-time", type=instant, metavar="TIME", help="With what was sent from then on: 2026-11-21T10:00, or 2h (ago)."
)
@click.option("--to-offset", type=click.IntRange(0), help="With this offset; of one queue.")
@click.option("--skip", is_flag=True, help="Behind all that there is, retries included.")
@click.option("-t", "--topic", help="This topic alone.  [default: all that the group consumes]")
@click.option("-q", "--queue", "queue_id", type=click.IntRange(0), help="This queue of the topic alone.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_session
def reset(
    session: Session,
    name: str,
    to_time: float | None,
    to_offset: int | None,
    skip: bool,
    topic: str | None,
    queue_id: int | None,
    yes: bool,
) -> None:
    """Set where a group goes on: messages are delivered once more, or never.

    \b
    shmbroker group reset audit --to-time 2026-11-21T10:00
    shmbroker group reset audit --to-time 2h --topic orders
    shmbroker group reset audit --to-offset 17 --topic orders --queue 0
    shmbroker group reset audit --skip --yes

    Live members go on from there at once. What they have in hand is theirs no more: their acknowledgements are refused,
    and what lies behind the new place is delivered again, beside those that still work on it. Stop or pause the group
    first if that matters. What waits for the delay of its retry comes nevertheless.
    """
    with session.open() as broker:
        in_flight = sum(lag["in_flight"] for lag in brief(broker.region) if lag["group"] == name)
        question = f"Reset group {name}" + (
            f", whose members have {in_flight:,} messages in hand?" if in_flight else "?"
        )
        console.confirm(question, yes)
        done = broker.reset_group(name, to_time=to_time, to_offset=to_offset, skip=skip, topic=topic, queue_id=queue_id)
    answer = [queue._asdict() for queue in done]
    with console.done(f"reset {name}"):
        if session.json:
            console.print_json(answer)
        else:
            console.table("", ["topic", ">queue", ">was done to", ">goes on at"], [_cells(queue) for queue in answer])


@click.command()
@common_options
@click.argument("name")
@pass_session
def pause(session: Session, name: str) -> None:
    """Hand out nothing to a group until it is resumed: in no process, across restarts too.

    \b
    shmbroker group pause audit
    shmbroker group resume audit

    What its members have in hand they may finish. Sends go on; what comes is kept for the group.
    """
    with session.open() as broker:
        broker.pause_group(name)
    console.print_done(session, f"{name} is paused", {"group": name, "paused": True})


@click.command()
@common_options
@click.argument("name")
@pass_session
def resume(session: Session, name: str) -> None:
    """Let a paused group go on.

    \b
    shmbroker group resume audit
    """
    with session.open() as broker:
        broker.resume_group(name)
    console.print_done(session, f"{name} goes on", {"group": name, "paused": False})


def _cells(queue: dict[str, Any]) -> tuple[str, int, str, str]:
    before = "-" if queue["before"] is None else f"{queue['before']:,}"
    return queue["topic"], queue["queue_id"], before, f"{queue['after']:,}"
