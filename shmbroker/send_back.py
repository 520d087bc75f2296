"""What becomes of a message that a consumer could not deal with: a later try, or the dead-letter queue.

The copy and the acknowledgement of the original are one append (``_native/move.c``), so a kill leaves both or neither,
and the copy is as durable as a send. A copy that is to wait is a TIMER record, which the scheduler turns into a message
of ``%RETRY%group`` when its time has come; one that is due at once is that message itself. The order of a move, and
what a crash at each edge leaves:

    (message claimed)             it goes back to the group at once, and this delivery counts
    topic %RETRY% or %DLQ% made   the same, and an empty topic, which the next move finds
    copy, PROGRESS, claim ACKED   one append: see move.c. In SYNC_FLUSH the caller waits for the disk; a power cut
                                  before that takes both back, or neither
    sleeping members woken        once per consumer, for members that do not know the new topic: whoever moves next
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from shmbroker._native._core import durable_status, move_message
from shmbroker.errors import BadRequest, ReceiptExpired, ShmBrokerError, TopicNotExist
from shmbroker.failpoint import failpoint
from shmbroker.naming import DEAD_LETTER_PREFIX, RETRY_PREFIX
from shmbroker.retry import RetryPolicy, level_delay, parse_policy
from shmbroker.status import SendStatus

if TYPE_CHECKING:
    from shmbroker._native._core import ConsumerCore, ReceivedMessage
    from shmbroker.consumer import ConsumerHome

logger = logging.getLogger("shmbroker.consumer")

HOLD_SECONDS: Final = 5.0
BY_POLICY: Final = 0
DEAD_LETTER: Final = -1
ERROR_CHARACTERS_MAX: Final = 500
BOOKKEEPING: Final = frozenset(
    "RETRY_TOPIC ORIGIN_MESSAGE_ID RETRY_FIRST_ERROR RETRY_LAST_ERROR DLQ_ORIGIN_TOPIC DLQ_ORIGIN_MESSAGE_ID".split()
)
_TRIES: Final = 3  # of a topic that somebody deletes meanwhile
_UNPRINTABLE: Final = {1: " ", 2: " "}  # they separate properties


class SendBack:
    """Moves what one consumer has failed with. Thread-safe."""

    def __init__(self, home: ConsumerHome, core: ConsumerCore) -> None:
        self._home = home
        self._core: ConsumerCore = weakref.proxy(core)  # which owns this, and is to go with its last user
        self._levels = home.config.runtime.delay_levels
        self._told: set[str] = set()  # topics of which sleeping members have been told
        self._complained = ""

    def later(self, message: ReceivedMessage, *, level: int = BY_POLICY, error: str | None = None) -> SendStatus:
        """Failed: a retry copy by the group's policy (level 0), after that delay level (1..18), or to the DLQ (-1).

        Whatever the level, a message that has had all its deliveries goes to the DLQ. Answers as a send does: under
        SYNC_FLUSH, FLUSH_DISK_TIMEOUT says that the move is done, and not known to be on the disk. Raises
        ReceiptExpired (the claim is not ours any more), Retryable, NeedsOperator, BadRequest: nothing happened.
        """
        if level < DEAD_LETTER:
            raise BadRequest(f"level = {level}: -1 (dead letter), 0 (the group's policy) or a delay level from 1 on")
        attempts = message.delivery_attempt
        policy = self.policy(message)
        if level == DEAD_LETTER or attempts >= policy.max_deliveries:
            end = self._move_to_dead_letters(message, attempts, error)
        else:
            delay = policy.delay(attempts, self._levels) if level == BY_POLICY else level_delay(level, self._levels)
            due_ns = time.time_ns() + round(delay * 1e9) if delay else 0
            end = self._move(message, RETRY_PREFIX, due_ns, attempts, _bookkeeping(message, error))
        return self.settled(end)

    def bury(self, messages: list[ReceivedMessage]) -> None:
        """These were claimed after their last delivery had failed: to the DLQ, with nobody being told of it.

        What cannot be moved now is held for a few seconds; then whoever claims it tries again.
        """
        for message in messages:
            deliveries = self.max_deliveries(message)
            try:
                self._move_to_dead_letters(message, deliveries, None)
            except ReceiptExpired:
                continue  # another member has it, and will do this
            except ShmBrokerError as error:
                with suppress(ShmBrokerError):
                    self._core.change_invisible_duration(message, HOLD_SECONDS)
                if self._complained != str(error):
                    logger.warning(
                        "group %s: %r cannot be moved to the dead letters yet: %s", self._core.group, message, error
                    )
                    self._complained = str(error)
            else:
                logger.warning("group %s: %r was delivered %d times: moved to the dead letters",
                               self._core.group, message, deliveries)  # fmt: skip

    def max_deliveries(self, message: ReceivedMessage) -> int:
        """How often the message may be delivered."""
        return self.policy(message).max_deliveries

    def policy(self, message: ReceivedMessage) -> RetryPolicy:
        """The message's own, else its group's."""
        own = message.properties.get("RETRY_POLICY", "")
        try:
            return parse_policy(own or self._core.client.region.retry_text(self._core.group))
        except ValueError:  # a property that another program wrote
            return parse_policy(self._core.client.region.retry_text(self._core.group))

    def _move_to_dead_letters(self, message: ReceivedMessage, deliveries: int, error: str | None) -> int:
        properties = _bookkeeping(message, error)
        properties["DLQ_ORIGIN_TOPIC"] = properties["RETRY_TOPIC"]
        properties["DLQ_ORIGIN_MESSAGE_ID"] = properties["ORIGIN_MESSAGE_ID"]
        return self._move(message, DEAD_LETTER_PREFIX, 0, deliveries, properties)

    def _move(
        self, message: ReceivedMessage, prefix: str, due_ns: int, attempts: int, properties: Mapping[str, str]
    ) -> int:
        return self.copy_to(prefix + self._core.group, message, due_ns, attempts, properties)

    def copy_to(
        self, topic: str, message: ReceivedMessage, due_ns: int, attempts: int, properties: Mapping[str, str]
    ) -> int:
        """Move it to ``topic``, made if there is none. Returns the position that has to be flushed for the move."""
        client = self._core.client
        timeout_ns = self._home.config.runtime.send_timeout_ms * 1_000_000
        encoded = encode_properties(properties)
        for _ in range(_TRIES):
            end = move_message(client, message, topic, encoded, attempts=attempts, due_ns=due_ns, timeout_ns=timeout_ns)
            if end is not None:
                failpoint("retry.moved")
                break
            client.region.define_topic(topic, 1)
            failpoint("retry.topic_made")
        else:
            raise TopicNotExist(f"topic {topic!r} is deleted again and again while messages are moved there")
        if topic not in self._told:
            client.region.wake_everybody()
            self._told.add(topic)
        return end

    def settled(self, end_position: int) -> SendStatus:
        """How durable a move that ends there is, as the answer to a send."""
        timeout_ns = self._home.config.runtime.sync_flush_timeout_ms * 1_000_000
        return durable_status(self._core.client, end_position, timeout_ns)


def original_properties(properties: Mapping[str, str]) -> dict[str, str]:
    """What the sender has given to a message that was moved since."""
    return {name: value for name, value in properties.items() if name not in BOOKKEEPING}


def encode_properties(properties: Mapping[str, str]) -> bytes:
    """As a record holds them: name 0x01 value 0x02, again and again."""
    return "".join(f"{name}\x01{value}\x02" for name, value in properties.items()).encode()


def _bookkeeping(message: ReceivedMessage, error: str | None) -> dict[str, str]:
    """The copy's properties: the original's, where it comes from, and the first and the last error."""
    properties = message.properties
    if properties.get("RETRY_TOPIC") != message.topic:  # no retry of ours; perhaps another group's dead letter
        properties.pop("RETRY_FIRST_ERROR", None)
        properties.pop("RETRY_LAST_ERROR", None)
    properties |= {"RETRY_TOPIC": message.topic, "ORIGIN_MESSAGE_ID": message.message_id}
    if error:
        text = error[:ERROR_CHARACTERS_MAX].translate(_UNPRINTABLE)
        properties.setdefault("RETRY_FIRST_ERROR", text)
        properties["RETRY_LAST_ERROR"] = text
    return properties
