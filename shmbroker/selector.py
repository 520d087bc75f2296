"""What a consumer selects by an SQL92 expression: RocketMQ's ``MessageSelector.bySql``."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from shmbroker._native._core import Message, ReceivedMessage, run_filter
from shmbroker.errors import BadRequest

_COMPILED_MAX: Final = 100  # expressions kept compiled, as in RocketMQ


class Sql:
    """An SQL92 expression on the properties of messages, as a subscription takes it in place of tags.

    ``text`` is the expression in one line without comments: what the members of a group compare. Raises BadRequest,
    whose text marks the place and says what was expected there.
    """

    __slots__ = ("program", "text")

    def __init__(self, expression: str) -> None:
        if not isinstance(expression, str):
            raise BadRequest(f"SQL expression {expression!r}: must be a str")
        self.text, self.program = _compiled(expression)

    def accepts(self, message: Message | ReceivedMessage) -> bool:
        """Whether a consumer with this expression gets that message."""
        keys = message.keys or ""
        tags = message.tags or ""
        return run_filter(self.program, tags.encode(), keys.encode(), message.properties)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sql) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"sql({self.text!r})"


def sql(expression: str) -> Sql:
    """Select messages by an SQL92 expression: ``{"orders": shmbroker.sql("amount > 100 AND region = 'EU'")}``."""
    return Sql(expression)


@lru_cache(_COMPILED_MAX)
def _compiled(expression: str) -> tuple[str, bytes]:
    from shmbroker.sql_program import compile_sql  # imports lark: only for those who need it

    return compile_sql(expression)
