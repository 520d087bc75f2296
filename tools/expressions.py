"""``--tags`` and ``--sql``: which messages of its topics a command or a group wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from shmbroker.selector import Sql


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
