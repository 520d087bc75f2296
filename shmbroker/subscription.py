"""What a group subscribes to: topics, and for each all messages, some tags, or an SQL expression.

Three forms of one thing: what the application gives, what is read here, and the text that members of a group compare,
that stands in the group's definition, and that people read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from shmbroker._native._core import SUBSCRIPTION_BYTES_MAX
from shmbroker.errors import BadRequest
from shmbroker.naming import check_topic
from shmbroker.record import subscription_text
from shmbroker.selector import Sql

ALL: Final = "*"
TAGS_MAX: Final = 64

Wanted: TypeAlias = "tuple[str, ...] | Sql | None"  # of one topic: tags, an expression, or every message


def parse_subscriptions(subscriptions: object) -> dict[str, Wanted]:
    """Topic to tag expression or ``Sql`` as topic to what is wanted. Raises BadRequest, also for what is no mapping."""
    if not isinstance(subscriptions, Mapping) or not subscriptions:
        raise BadRequest(
            f"subscriptions = {subscriptions!r}: must map at least one topic to a tag expression, as in "
            '{"orders": "*"}, or to an SQL expression, as in {"orders": shmbroker.sql("amount > 100")}'
        )
    return {check_topic(topic): _parse(expression) for topic, expression in subscriptions.items()}


def parse_tags(expression: str) -> tuple[str, ...] | None:
    """The tags of ``"a || b"``, sorted; None for all messages (``"*"`` or nothing). Raises BadRequest."""
    if not isinstance(expression, str):
        raise BadRequest(f"tag expression {expression!r}: must be a str")
    tags = {tag.strip() for tag in expression.split("||")}
    if tags in ({""}, {ALL}):
        return None
    if "" in tags or ALL in tags or any("|" in tag for tag in tags):
        raise BadRequest(f"tag expression {expression!r}: '*', or tags separated by '||'")
    if len(tags) > TAGS_MAX:
        raise BadRequest(f"{len(tags)} tags in one subscription, at most {TAGS_MAX}")
    return tuple(sorted(tags))


def format_subscription(wanted: Mapping[str, Wanted]) -> bytes:
    """What members of a group compare, and people read: see ``subscription_text``. Raises BadRequest: too long."""
    text = subscription_text({topic: _format(of_topic) for topic, of_topic in wanted.items()})
    if len(text) > SUBSCRIPTION_BYTES_MAX:
        raise BadRequest(f"the subscription takes {len(text)} bytes as JSON, at most {SUBSCRIPTION_BYTES_MAX} fit")
    return text


def read_subscription(text: bytes) -> dict[str, Wanted]:
    """What ``format_subscription`` has written."""
    found = json.loads(text)
    return {
        topic: Sql(of_topic["sql"]) if isinstance(of_topic, dict) else parse_tags(of_topic)
        for topic, of_topic in found.items()
    }


def encode_subscription(wanted: Mapping[str, Wanted]) -> dict[str, Sequence[bytes] | bytes | None]:
    """As the native core takes it: each topic's tags or program, or None."""
    return {topic: _encode(of_topic) for topic, of_topic in wanted.items()}


def _parse(expression: object) -> Wanted:
    if isinstance(expression, Sql):
        return expression
    if isinstance(expression, str):
        return parse_tags(expression)
    raise BadRequest(f"{expression!r}: a topic's messages are chosen by a tag expression or by shmbroker.sql(...)")


def _format(wanted: Wanted) -> str | dict[str, str]:
    if wanted is None:
        return ALL
    return {"sql": wanted.text} if isinstance(wanted, Sql) else " || ".join(wanted)


def _encode(wanted: Wanted) -> Sequence[bytes] | bytes | None:
    if wanted is None:
        return None
    return wanted.program if isinstance(wanted, Sql) else [tag.encode() for tag in wanted]
