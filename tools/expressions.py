"""``--topic``, ``--tags`` and ``--sql``: which messages of its topics a command or a group wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from shmbroker.naming import check_group, check_topic

if TYPE_CHECKING:
    from shmbroker.selector import Sql


def consumer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``-g``, ``-t``, ``--tags`` and ``--sql`` of a command that consumes.

    The command gets ``group``, and ``wanted``: topic to tag or SQL expression.
    """

    @click.option("-g", "--group", required=True, help="The consumer group; its members share the messages.")
    @click.option("-t", "--topic", "topics", required=True, multiple=True, help="A topic; may be repeated.")
    @click.option("--tags", help="A tag expression: 'paid || refunded'.  [default: *]")
    @click.option("--sql", help="An SQL expression on the properties instead: \"amount > 100 AND region = 'EU'\".")
    @wraps(command)
    def checked(*args: Any, group: str, topics: tuple[str, ...], tags: str | None, sql: str | None, **rest: Any) -> Any:
        check_group(group)
        topics = tuple(map(check_topic, topics))
        wanted = subscriptions(topics, [tags] if tags is not None else [], [sql] if sql is not None else [])
        return command(*args, group=group, wanted=wanted, **rest)

    return checked


def subscriptions(topics: Sequence[str], tags: Sequence[str], expressions: Sequence[str]) -> dict[str, str | Sql]:
    """Topic to tag or SQL expression: one for all topics, or one for each; all messages if there is none."""
    if tags and expressions:
        raise click.UsageError("--tags and --sql: give one of them; RocketMQ's name for the tags in --sql is TAGS")
    given: Sequence[str | Sql] = tags or ["*"]
    if expressions:
        from shmbroker.selector import sql

        given = [sql(expression) for expression in expressions]
    if len(given) not in (1, len(topics)):
        raise click.UsageError(f"{len(topics)} topics and {len(given)} expressions: give one for all, or one for each")
    return dict(zip(topics, given if len(given) == len(topics) else [*given] * len(topics), strict=True))


def as_json(wanted: str | Sql) -> Any:
    """As it stands in a group's subscription."""
    return wanted if isinstance(wanted, str) else {"sql": wanted.text}


def from_json(wanted: Any) -> str | Sql:
    """What ``as_json`` was made from."""
    from shmbroker.selector import sql

    return sql(wanted["sql"]) if isinstance(wanted, dict) else str(wanted)


def shown(wanted: Any) -> str:
    """What ``as_json`` returns, for people."""
    return f"SQL {wanted['sql']}" if isinstance(wanted, dict) else str(wanted)
