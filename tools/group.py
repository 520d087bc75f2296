"""``shmbroker group``: how far consumer groups are, what they hold back, and an end for those that nobody needs."""

from __future__ import annotations

import json
from typing import Any

import click

from shmbroker.delays import parse_delay
from shmbroker.naming import unknown_group
from shmbroker.retry import KINDS, RetryPolicy, parse_policy
from shmbroker.tools import console, expressions, group_offsets
from shmbroker.tools.command_group import CommandGroup
from shmbroker.tools.group_lag import brief, lags, name_of
from shmbroker.tools.session import Session, common_options, pass_session


@click.group(cls=CommandGroup)
@common_options
def group() -> None:
    """Show consumer groups, their lag, and what they hold back; set how they subscribe and retry; reset, delete them.

    \b
    shmbroker group list
    shmbroker group show audit
    shmbroker group set-subscription audit --topic orders --tags 'paid || refunded'
    shmbroker group set-retry audit exponential --initial 1s --max 8
    shmbroker group reset audit --to-time 2h
    shmbroker group pause audit
    shmbroker group delete oudit --yes
    """


for command in (group_offsets.reset, group_offsets.pause, group_offsets.resume):
    group.add_command(command)


@group.command(name="list")
@common_options
@pass_session
def list_groups(session: Session) -> None:
    """List the groups: lag in messages, bytes and seconds, and the log that they keep from being deleted.

    \b
    shmbroker group list
    shmbroker --json group list | jq '.[] | select(.lag_messages > 1000) | .group'
    """
    found = _lags(session, None)
    if session.json:
        console.print_json([{key: value for key, value in lag.items() if key != "queues"} for lag in found])
        return
    console.table(
        "",
        ["group", ">lag", ">bytes", ">oldest", ">in flight", ">log held back"],
        [(name_of(lag), *_cells(lag), console.size(lag["held_back_bytes"])) for lag in found],
        empty="no groups",
    )


@group.command()
@common_options
@click.argument("name")
@pass_session
def show(session: Session, name: str) -> None:
    """Show one group queue by queue: who holds its oldest unacknowledged message, and who owns it, if it is consumed in
    order.

    \b
    shmbroker group show audit
    shmbroker --json group show audit | jq .held_back_bytes
    """
    (lag,) = _lags(session, name)
    if session.json:
        console.print_json(lag)
        return
    rows = [
        (
            "subscription",
            _subscription(lag["subscription"]) or "no live member",
        ),
        *([("paused", "members get nothing: `shmbroker group resume`")] if lag["paused"] else []),
        *(("not subscribed any more", _waiting(topic, count)) for topic, count in _unsubscribed(lag).items()),
        ("retry", str(parse_policy(json.dumps(lag["retry"]) if lag["retry"] else ""))),
        ("lag", "{} messages, {}, oldest {}".format(*_cells(lag)[:3])),
        ("in flight", f"{lag['in_flight']:,}"),
        ("log held back", console.size(lag["held_back_bytes"])),
    ]
    if lag["delivered_since_start"]:  # else this command has perhaps just started the broker: 0 would say nothing
        again = f"of them again {lag['redelivered_since_start']:,}"
        rows.append(("delivered since the broker started", f"{lag['delivered_since_start']:,}, {again}"))
    console.table("", ["group", name], rows)
    in_order = any(queue["owner"] for queue in lag["queues"])
    console.table(
        "queues",
        [
            *("topic", ">queue", ">done to", ">next", ">lag", ">bytes", ">oldest", ">in flight"),
            *(("owner",) if in_order else ()),
            "oldest unacknowledged",
        ],
        [
            (
                queue["topic"] if queue["subscribed"] is not False else f"{queue['topic']} (not subscribed)",
                queue["queue_id"],
                f"{queue['base']:,}",
                f"{queue['next_offset']:,}",
                *_cells(queue),
                *((_owner(queue["owner"]),) if in_order else ()),
                _holder(queue["oldest"]),
            )
            for queue in lag["queues"]
        ],
    )


@group.command(name="set-subscription")
@common_options
@click.argument("name")
@click.option("-t", "--topic", "topics", required=True, multiple=True, help="A topic; may be repeated.")
@click.option("--tags", multiple=True, help="A tag expression; one for all topics, or one for each.  [default: *]")
@click.option("--sql", multiple=True, help="An SQL expression on the properties instead; likewise.")
@pass_session
def set_subscription(
    session: Session, name: str, topics: tuple[str, ...], tags: tuple[str, ...], sql: tuple[str, ...]
) -> None:
    """Switch a group to another subscription, all its members at once.

    \b
    shmbroker group set-subscription audit --topic orders --tags 'paid || refunded'
    shmbroker group set-subscription audit -t orders --tags paid -t refunds --tags '*'
    shmbroker group set-subscription audit -t orders --sql "amount > 100 AND region = 'EU'"

    Live members take it over at their next receive. From then on a consumer that subscribes to anything else is
    refused: change the programs before they are started the next time.
    """
    wanted = expressions.subscriptions(topics, tags, sql)
    with session.open() as broker:
        broker.set_subscription(name, wanted)
    subscription = {topic: expressions.as_json(of_topic) for topic, of_topic in wanted.items()}
    done = f"{name} subscribes to {_subscription(subscription)} now"
    console.print_done(session, done, {"group": name, "subscription": subscription})


@group.command(name="set-retry")
@common_options
@click.argument("name")
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--max", "max_retries", default=16, show_default=True, help="Retries; then it is a dead letter.")
@click.option("--initial", default="5s", show_default=True, help="exponential: the first delay.")
@click.option("--multiplier", default=2.0, show_default=True, help="exponential: each delay so many times the last.")
@click.option("--longest", default="2h", show_default=True, help="exponential: no delay is longer.")
@click.option("--delays", default="", help='table: all delays, as in "0s 5s 1m"; the last one goes on.')
@pass_session
def set_retry(
    session: Session, name: str, kind: str, max_retries: int, initial: str, multiplier: float, longest: str, delays: str
) -> None:
    """Set how failed messages of a group are tried again, and how often.

    \b
    shmbroker group set-retry billing levels --max 16
    shmbroker group set-retry billing exponential --initial 1s --multiplier 3 --longest 10m --max 8
    shmbroker group set-retry billing table --delays '0s 5s 1m' --max 5

    `levels` waits as message_delay_level says, from level 3 on. Live members follow at once; what waits already keeps
    its time.
    """
    if kind == "table" and not delays.split():
        raise click.UsageError("table: --delays says which, as in --delays '0s 5s 1m'")
    table = tuple(parse_delay(word) for word in delays.split())
    policy = RetryPolicy(kind, max_retries, parse_delay(initial), multiplier, parse_delay(longest), table)
    with session.open() as broker:
        broker.set_retry(name, policy)
    console.print_done(session, f"{name}: {policy}", {"group": name, "retry": json.loads(policy.encode())})


@group.command()
@common_options
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_session
def delete(session: Session, name: str, yes: bool) -> None:
    """Delete a group and its progress. What it had not consumed no longer keeps log from being deleted.

    \b
    shmbroker group delete oudit --yes     # made by a slip of the pen

    No live process may consume in it. A group that is made again under this name begins like a new one.
    """
    with session.open() as broker:
        (found,) = _chosen(brief(broker.region), name)
        console.confirm(f"Delete group {name}, which has {found['lag_messages']:,} messages to come?", yes)
        broker.delete_group(name)
    console.print_done(session, f"deleted {name}", {"group": name, "result": "deleted"})


def _unsubscribed(lag: dict[str, Any]) -> dict[str, int]:
    """Topics that the group has consumed and does not subscribe to now, with the messages that wait in them."""
    waiting: dict[str, int] = {}
    for queue in lag["queues"]:
        if queue["subscribed"] is False:
            waiting[queue["topic"]] = waiting.get(queue["topic"], 0) + queue["lag_messages"]
    return waiting


def _waiting(topic: str, count: int) -> str:
    return f"{topic}: {count:,} messages wait and keep their log until a member subscribes to it" if count else topic


def _cells(lag: dict[str, Any]) -> tuple[str, str, str, str]:
    oldest = console.duration(lag["lag_seconds"]) if lag["lag_messages"] else "-"
    return f"{lag['lag_messages']:,}", console.size(lag["lag_bytes"]), oldest, f"{lag['in_flight']:,}"


def _subscription(subscription: dict[str, Any]) -> str:
    return ", ".join(f"{topic}: {expressions.shown(wanted)}" for topic, wanted in subscription.items())


def _owner(owner: dict[str, Any] | None) -> str:
    return f"{owner['pid']} ({owner['name']})" if owner else "nobody"


def _holder(oldest: dict[str, Any] | None) -> str:
    if oldest is None:
        return "-"
    holder = f", held by {oldest['pid']} ({oldest['name']})" if oldest["pid"] else ""
    return f"{oldest['message_id']}, attempts {oldest['attempts']}{holder}"


def _lags(session: Session, name: str | None) -> list[dict[str, Any]]:
    with session.open() as broker:
        found = lags(session.paths, broker.region)
    return found if name is None else _chosen(found, name)


def _chosen(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    chosen = [lag for lag in found if lag["group"] == name]
    if not chosen:
        raise unknown_group(name, [lag["group"] for lag in found])
    return chosen
