"""The dead letters of a group: read by a group of their own, so that each is sent again or given up once.

It has the name of their topic, and its progress says which are done with: that stands when the other group is deleted.
"""

from __future__ import annotations

from typing import Final

from shmbroker._native._core import ReceivedMessage
from shmbroker.consumer import ConsumerHome, SimpleConsumer
from shmbroker.errors import TopicNotExist
from shmbroker.naming import DEAD_LETTER_PREFIX, RETRY_PREFIX, check_group, check_topic
from shmbroker.send_back import original_properties
from shmbroker.status import SendStatus

_WITHOUT_END: Final = 2**31


class DeadLetters(SimpleConsumer):
    """Receives what lies in ``%DLQ%group``. ``ack`` gives a letter up; what is only received stays where it is.

    Who has received a letter has it alone until the invisible time is over, or until its process leaves the broker. The
    group's members, its subscription and its lag know nothing of it; ``group`` is ``%DLQ%`` and that group's name.
    """

    def __init__(self, home: ConsumerHome, group: str) -> None:
        self.of = check_group(group)
        super().__init__(home, DEAD_LETTER_PREFIX + group, {DEAD_LETTER_PREFIX + group: "*"})

    def resend(self, message: ReceivedMessage, to: str | None = None) -> int:
        """Send a letter again, as new: to its group alone, or with ``to`` to that topic and whoever consumes it.

        The copy and the letter's end are one append. Returns the position for ``settled``. Raises ReceiptExpired,
        Retryable, NeedsOperator, TopicNotExist: nothing happened.
        """
        properties = original_properties(message.properties)
        if to is None:
            for name in ("RETRY_TOPIC", "ORIGIN_MESSAGE_ID"):  # by which a retry shows where it comes from
                if name in message.properties:
                    properties[name] = message.properties[name]
        elif all(topic["name"] != to for topic in self.client.region.topics()):
            raise TopicNotExist(f"topic {check_topic(to)!r} does not exist: `shmbroker topic create {to}`")
        return self._send_back.copy_to(to or RETRY_PREFIX + self.of, message, 0, 0, properties)

    def settled(self, end_position: int) -> SendStatus:
        """How durable the resends up to there are: under SYNC_FLUSH this waits for the disk."""
        return self._send_back.settled(end_position)

    def _subscribe(self) -> None:
        client = self._home.attach()
        if all(topic["name"] != self.group for topic in client.region.topics()):
            raise TopicNotExist(f"group {self.of!r} has never had a dead letter: there is no topic {self.group!r}")
        client.region.define_group(self.group)
        self._look_at(client, self.group)

    def _max_deliveries(self, message: ReceivedMessage) -> int:  # noqa: ARG002 - a letter is not buried again
        return _WITHOUT_END


__all__ = ["DeadLetters"]
