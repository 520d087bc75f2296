"""shmbroker: a durable message broker for the processes of one host.

    import shmbroker
    from shmbroker import Message, SendStatus

    with shmbroker.open("data/orders") as broker, broker.producer("billing") as producer:
        assert producer.send(Message("orders", b"42")).status is SendStatus.SEND_OK

Names are loaded when they are first used: a worker process, which imports this package too, pays for none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shmbroker._native._core import BatchResult, ConsumeContext, Message, ReceivedMessage, SendResult
    from shmbroker.broker import Broker, open  # noqa: A004 - shmbroker.open, as gzip.open
    from shmbroker.consumer import SimpleConsumer
    from shmbroker.errors import (
        AckNotDurable,
        AttachRefused,
        BadRequest,
        BrokerBusy,
        BrokerClosed,
        BrokerFenced,
        ConfigConflict,
        ConfigError,
        CorruptLog,
        DirectoryUnusable,
        ForkedHandleError,
        GroupInUse,
        GroupNotExist,
        LayoutMismatch,
        LimitReached,
        MessageIllegal,
        MessageTooLarge,
        NameIllegal,
        NeedsOperator,
        NeedsRestart,
        NoPermission,
        NotEnoughMemory,
        NotReady,
        PositionGone,
        PropertiesTooLarge,
        QueueNotExist,
        ReceiptExpired,
        Refused,
        Retryable,
        ShmBrokerError,
        StoreFull,
        StoreReadOnly,
        SubscriptionConflict,
        TopicNotExist,
    )
    from shmbroker.producer import Producer, SendCallback
    from shmbroker.pull_consumer import PullConsumer
    from shmbroker.push_consumer import PushConsumer
    from shmbroker.retry import RetryPolicy
    from shmbroker.selector import Sql, sql
    from shmbroker.status import ConsumeOrderlyStatus, ConsumeStatus, SendStatus

__version__ = "0.1.0"

_HOMES: Final = {
    "shmbroker.broker": ("open", "Broker"),
    "shmbroker._native._core": ("Message", "ReceivedMessage", "SendResult", "BatchResult", "ConsumeContext"),
    "shmbroker.producer": ("Producer", "SendCallback"),
    "shmbroker.status": ("SendStatus", "ConsumeStatus", "ConsumeOrderlyStatus"),
    "shmbroker.consumer": ("SimpleConsumer",),
    "shmbroker.pull_consumer": ("PullConsumer",),
    "shmbroker.push_consumer": ("PushConsumer",),
    "shmbroker.retry": ("RetryPolicy",),
    "shmbroker.selector": ("sql", "Sql"),
}
_HOME_OF: Final = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    # the broker
    "open",
    "Broker",
    # messages
    "Message",
    "ReceivedMessage",
    # sending
    "Producer",
    "SendCallback",
    "SendResult",
    "BatchResult",
    "SendStatus",
    # receiving
    "PushConsumer",
    "ConsumeContext",
    "ConsumeStatus",
    "ConsumeOrderlyStatus",
    "SimpleConsumer",
    "PullConsumer",
    "RetryPolicy",
    "sql",
    "Sql",
    # errors: the class says what to do; see shmbroker.errors
    "ShmBrokerError",
    "Retryable",
    "BrokerBusy",
    "NotReady",
    "BadRequest",
    "MessageIllegal",
    "MessageTooLarge",
    "PropertiesTooLarge",
    "NameIllegal",
    "QueueNotExist",
    "TopicNotExist",
    "GroupNotExist",
    "NoPermission",
    "LimitReached",
    "ConfigError",
    "Refused",
    "ReceiptExpired",
    "SubscriptionConflict",
    "GroupInUse",
    "AttachRefused",
    "ConfigConflict",
    "NeedsOperator",
    "StoreFull",
    "StoreReadOnly",
    "CorruptLog",
    "NotEnoughMemory",
    "DirectoryUnusable",
    "NeedsRestart",
    "LayoutMismatch",
    "BrokerClosed",
    "BrokerFenced",
    "ForkedHandleError",
    "AckNotDurable",
    "PositionGone",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'shmbroker' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME_OF.get(name, "shmbroker.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
