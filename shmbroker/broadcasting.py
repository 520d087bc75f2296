"""Broadcasting: each member of a group gets every message.

A member is a group of its own below, ``%BROADCAST%group%member``, with a progress like every other: it stands in
memory and log (RocketMQ keeps it in a file of the client's), and what the member has not consumed is kept for it. A
member without a name is gone for good when its consumer is: closing deletes its group; if the process was killed, or
killed in between, the dispatcher does so once nobody has come back to it for a while (``delivery/upkeep.py``).

As in RocketMQ, what a member fails with is not tried again: who else would do it? It is logged and done with.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shmbroker.consumer import ConsumerHome, SimpleConsumer
from shmbroker.errors import BadRequest, ReceiptExpired, ShmBrokerError
from shmbroker.naming import RETRY_PREFIX, member_group
from shmbroker.send_back import BY_POLICY, SendBack
from shmbroker.status import SendStatus

if TYPE_CHECKING:
    from shmbroker._native._core import ReceivedMessage
    from shmbroker.queue_time import ConsumeFrom
    from shmbroker.selector import Sql

logger = logging.getLogger("shmbroker.consumer")

CLUSTERING = "CLUSTERING"
BROADCASTING = "BROADCASTING"


class Member(SimpleConsumer):
    """A consumer that gets every message of its topics, whatever other members of its group get."""

    def __init__(
        self,
        home: ConsumerHome,
        group: str,
        subscriptions: Mapping[str, str | Sql],
        *,
        member: str | None = None,
        consume_from: ConsumeFrom = "last",
        **settings: Any,
    ) -> None:
        self._passing = member is None
        name = member_group(group, member, os.urandom(8).hex())
        super().__init__(home, name, subscriptions, consume_from=consume_from, **settings)
        self._send_back = _NoRetry(home, self)

    def close(self) -> None:
        """As every consumer. A member without a name leaves nothing: it would not be found again."""
        already = self._closed
        super().close()
        if self._passing and not already:
            with suppress(ShmBrokerError):  # the broker has gone: the dispatcher of its next life does this
                self.client.region.delete_group(self.group, RETRY_PREFIX + self.group)


class _NoRetry(SendBack):
    """What a member has failed with is done with."""

    def later(self, message: ReceivedMessage, *, level: int = BY_POLICY, error: str | None = None) -> SendStatus:  # noqa: ARG002
        self._core.ack(message)
        logger.warning("group %s: %r has failed, and is not tried again: %s", self._core.group, message, error)
        return SendStatus.SEND_OK

    def bury(self, messages: list[ReceivedMessage]) -> None:
        for message in messages:
            with suppress(ReceiptExpired):
                self._core.ack(message)
                logger.error("group %s: %r was delivered too often, and is given up", self._core.group, message)


def consumer_of(
    home: ConsumerHome,
    group: str,
    subscriptions: Mapping[str, str | Sql],
    *,
    message_model: str = CLUSTERING,
    member: str | None = None,
    **settings: Any,
) -> SimpleConsumer:
    """One that shares the group's messages with its members, or one that gets all of them. Raises BadRequest."""
    if message_model == BROADCASTING:
        return Member(home, group, subscriptions, member=member, **settings)
    if message_model != CLUSTERING:
        raise BadRequest(f"message_model = {message_model!r}: must be {CLUSTERING!r} or {BROADCASTING!r}")
    if member is not None:
        raise BadRequest(f"member = {member!r}: only members of a {BROADCASTING} group have names")
    return SimpleConsumer(home, group, subscriptions, **settings)
