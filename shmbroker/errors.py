"""Every exception that shmbroker raises. The class says what the caller should do.

ShmBrokerError
├── Retryable             nothing was stored; try again later
│   ├── BrokerBusy        the ring stayed full, or the append lock stayed taken, for the whole send timeout
│   └── NotReady          the broker is starting or its supervisor is being replaced
├── BadRequest            never succeeds as it stands; mend the call (also a ValueError)
│   ├── MessageIllegal    empty body, bad type, properties with forbidden characters ...
│   │   ├── MessageTooLarge      body over max_message_bytes, or an append over a quarter of ring or segment
│   │   └── PropertiesTooLarge   encoded properties over 32,767 bytes
│   ├── NameIllegal       topic or group name outside RocketMQ's alphabet or length
│   ├── QueueNotExist     queue number outside the topic
│   ├── TopicNotExist     and auto_create_topics is off
│   ├── GroupNotExist
│   ├── NoPermission      the topic lacks the W (or R) permission
│   ├── LimitReached      a table is full; the message names the setting that sizes it
│   └── ConfigError       a setting is unknown, ill-typed or out of range
├── Refused               another's right stands against it
│   ├── ReceiptExpired    ack or renewal of a claim that is no longer yours: it will be (or was) delivered again
│   ├── SubscriptionConflict  a live member of the group subscribes differently
│   ├── GroupInUse        the group to delete has live consumers
│   ├── AttachRefused     other user, other pid or ipc namespace
│   └── ConfigConflict    the running broker was started with another value
├── NeedsOperator         a person has to act; the message says how
│   ├── StoreFull         the disk has no room for more; consumers go on, sending resumes by itself
│   ├── StoreReadOnly     a write or fdatasync failed (EIO): nothing more is promised
│   ├── CorruptLog        damage inside the log, with its exact place
│   ├── NotEnoughMemory   /dev/shm too small; says need, free and the setting
│   └── DirectoryUnusable no broker can work in that directory: read-only, no directory, not to be made
├── AckNotDurable         the acknowledgement stands in memory, and is not known to be on the disk
├── NeedsRestart          this handle is of no more use; open again
│   ├── LayoutMismatch    memory made by another version or build
│   ├── BrokerClosed
│   ├── BrokerFenced      another directory was promoted; outcome of the last send unknown, resend with the same id
│   └── ForkedHandleError made before a fork, used after it
└── PositionGone          retention has deleted what was asked for
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class ShmBrokerError(Exception):
    """Root of all errors of this library."""


class Retryable(ShmBrokerError):
    """Nothing was stored. The same call may succeed later."""


class BrokerBusy(Retryable):
    """The ring stayed full or the append lock stayed taken until the send timeout. Nothing was stored.

    ``holder_pid`` names the process that holds the append lock, if that was the cause; else it is None. ``messages``
    are those of an acknowledgement that a stopped process holds up: try again with them; the others' stands.
    """

    def __init__(self, message: str, holder_pid: int | None = None, messages: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.holder_pid = holder_pid
        self.messages = list(messages)


class NotReady(Retryable):
    """The broker did not reach its running state in time. The message says what it waits for, or who starts it."""


class BadRequest(ShmBrokerError, ValueError):
    """The call can never succeed as it stands. Nothing was stored."""


class MessageIllegal(BadRequest):
    """The message breaks a rule of its own: empty body, wrong type, forbidden character."""


class MessageTooLarge(MessageIllegal):
    """The body is over ``max_message_bytes``, or all of message or batch over a quarter of the ring or of a segment."""


class PropertiesTooLarge(MessageIllegal):
    """Tags, keys or properties do not fit their length fields (32,767 bytes encoded)."""


class NameIllegal(BadRequest):
    """A topic or group name is empty, too long, or has a character outside ``[A-Za-z0-9_%|-]``."""


class QueueNotExist(BadRequest):
    """The queue number is not one of the topic's."""


class TopicNotExist(BadRequest):
    """The topic does not exist and may not be created on first use."""


class GroupNotExist(BadRequest):
    """The consumer group does not exist."""


class NoPermission(BadRequest):
    """The topic's permission forbids it (RocketMQ: 2 write, 4 read, 6 both)."""


class LimitReached(BadRequest):
    """A table of the control segment is full. The message names the setting that sizes it."""


class ConfigError(BadRequest):
    """A setting is unknown, of the wrong type, or outside its limits."""


class Refused(ShmBrokerError):
    """Another's right stands against the call."""


class ReceiptExpired(Refused):
    """The claim behind a received message is no longer the caller's: the message is, or will be, delivered again.

    ``messages`` are those of the call that this is true of; the others' acknowledgement stands.
    """

    def __init__(self, message: str, messages: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.messages = list(messages)


class SubscriptionConflict(Refused):
    """A live member of the group has subscribed differently (R25). The message shows both subscriptions."""


class GroupInUse(Refused):
    """The group cannot be deleted while live processes consume in it. The message names them."""


class AttachRefused(Refused):
    """The broker's memory belongs to another user, or to another pid or ipc namespace (R19)."""


class ConfigConflict(Refused):
    """A setting given to ``open`` differs from the one the running broker was started with."""


class NeedsOperator(ShmBrokerError):
    """A person has to act. The message says what to do."""


class StoreFull(NeedsOperator):
    """The disk has no room for further segments. Nothing was stored; sending resumes by itself when there is room."""


class StoreReadOnly(NeedsOperator):
    """A write or fdatasync failed: the store accepts nothing more until it is opened anew."""


class CorruptLog(NeedsOperator):
    """The log is damaged in its middle. ``position`` and ``path`` name the place."""

    def __init__(self, message: str, position: int | None = None, path: str | None = None) -> None:
        super().__init__(message)
        self.position = position
        self.path = path


class NotEnoughMemory(NeedsOperator):
    """/dev/shm cannot hold the broker's memory."""


class DirectoryUnusable(NeedsOperator):
    """No broker can work in that directory, now or later: it cannot be made, is none, or is on a read-only disk."""


class NeedsRestart(ShmBrokerError):
    """This handle is of no more use. Open the broker again."""


class LayoutMismatch(NeedsRestart):
    """The memory was made by another version or build of shmbroker. The message shows both fingerprints."""


class BrokerClosed(NeedsRestart):
    """The handle was closed, or the broker has stopped."""


class BrokerFenced(NeedsRestart):
    """Another directory was promoted to master while the send was under way: its outcome is unknown."""


class ForkedHandleError(NeedsRestart):
    """The handle was made before a fork and used in the child (R25)."""


class AckNotDurable(ShmBrokerError):
    """A durable acknowledgement is done in memory, but not known to be on the disk; ``__cause__`` may say why.

    It survives the death of every process, and reaches the disk with the group's next progress record if the disk
    works; if the machine loses its memory before, the messages are delivered again.
    """


class PositionGone(ShmBrokerError):
    """Retention has deleted the segment that was asked for."""
