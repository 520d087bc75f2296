"""Rules of messages, and what callers are told who break them. Called by the native core.

The names that RocketMQ keeps to itself (its ``MessageConst``) are refused as property names, so that messages can move
between the two without one meaning the other's bookkeeping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final, TypeGuard

from shmbroker.delays import DELAY_MAX, format_delay
from shmbroker.errors import MessageIllegal, PropertiesTooLarge
from shmbroker.retry import RetryPolicy

if TYPE_CHECKING:
    from shmbroker._native._core import Message

ENCODED_BYTES_MAX: Final = 32_767  # RocketMQ: a signed 16-bit length
NAME_VALUE_SEPARATOR: Final = "\x01"
PROPERTY_SEPARATOR: Final = "\x02"
RESERVED_NAMES: Final = frozenset(
    """
    KEYS TAGS WAIT DELAY RETRY_TOPIC REAL_TOPIC REAL_QID TRAN_MSG PGROUP MIN_OFFSET MAX_OFFSET BUYER_ID
    ORIGIN_MESSAGE_ID TRANSFER_FLAG CORRECTION_FLAG MQ2_FLAG RECONSUME_TIME MSG_REGION TRACE_ON UNIQ_KEY
    EXTEND_UNIQ_INFO MAX_RECONSUME_TIMES CONSUME_START_TIME INNER_NUM INNER_BASE DUP_INFO
    RETRY_POLICY RETRY_FIRST_ERROR RETRY_LAST_ERROR
    CHECK_IMMUNITY_TIME_IN_SECONDS TRAN_PREPARED_QUEUE_OFFSET __transactionId__ TRANSACTION_CHECK_TIMES INSTANCE_ID
    CORRELATION_ID REPLY_TO_CLIENT TTL ARRIVE_TIME PUSH_REPLY_TIME CLUSTER MSG_TYPE POP_CK POP_CK_OFFSET
    1ST_POP_TIME __SHARDINGKEY DLQ_ORIGIN_TOPIC DLQ_ORIGIN_MESSAGE_ID __CRC32# __BORNHOST BORN_TIMESTAMP
    """.split()
)


def check_tags(tags: object) -> str:
    """One tag, or none: what a subscription's ``a || b`` can name, which splits at pipes and drops outer blanks."""
    if tags is None:
        return ""
    if not isinstance(tags, str):
        raise MessageIllegal(f"tags must be a str, not {type(tags).__name__}")
    if "|" in tags or tags == "*" or tags != tags.strip() or not tags.isprintable():
        raise MessageIllegal(
            f"tags = {tags!r}: one tag, of printable characters, without '|', not '*', with no blank before or behind"
        )
    return _bounded("tags", tags)


def check_keys(keys: object) -> str:
    """Keys as one string, separated by blanks."""
    if keys is None:
        return ""
    if isinstance(keys, Iterable) and not isinstance(keys, str | bytes):
        keys = " ".join(_key(key) for key in keys)
    if not isinstance(keys, str):
        raise MessageIllegal(f"keys must be a str or an iterable of str, not {type(keys).__name__}")
    if not keys.isprintable():
        raise MessageIllegal("keys must be printable")
    return _bounded("keys", " ".join(keys.split()))


def _key(key: object) -> str:
    if not isinstance(key, str) or not key or key.split() != [key]:
        raise MessageIllegal(f"key {key!r}: must be a str without blanks")
    return key


def check_properties(properties: object) -> dict[str, str]:
    """A private copy of the properties. Raises MessageIllegal, PropertiesTooLarge."""
    if not isinstance(properties, Mapping):
        raise MessageIllegal(f"properties must be a mapping of str to str, not {type(properties).__name__}")
    checked: dict[str, str] = {}
    for name, value in properties.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise MessageIllegal(f"property {name!r}: name and value must be str")
        if not name or NAME_VALUE_SEPARATOR in name + value or PROPERTY_SEPARATOR in name + value:
            raise MessageIllegal(f"property {name!r}: an empty name, or one of the separators \\x01 and \\x02")
        if name in RESERVED_NAMES or name.startswith("TIMER_"):
            raise MessageIllegal(f"property {name!r}: the name is RocketMQ's own")
        checked[name] = value
    _bounded("properties", "".join(f"{n}\x01{v}\x02" for n, v in checked.items()))
    return checked


def check_delay(level: object, delay: object, deliver_at: object) -> tuple[int | None, float | None, float | None]:
    """At most one of them, as level, seconds from the send, seconds since 1970. How far ahead is looked at by the send.

    Level 0 and what is due already are no delay, as in RocketMQ. A datetime without a time zone is local time.
    """
    if sum(given is not None for given in (level, delay, deliver_at)) > 1:
        raise MessageIllegal("give one of delay_level, delay and deliver_at")
    if level is not None and (type(level) is not int or level < 0):
        raise MessageIllegal(f"delay_level = {level!r}: 1 for the first of message_delay_level, and so on")
    if isinstance(delay, timedelta):
        delay = delay.total_seconds()
    if delay is not None and not (_is_number(delay) and delay >= 0):
        raise MessageIllegal(f"delay = {delay!r}: seconds from now, or a timedelta, not negative")
    if isinstance(deliver_at, datetime):
        deliver_at = deliver_at.timestamp()
    if deliver_at is not None and not (_is_number(deliver_at) and deliver_at >= 0):
        raise MessageIllegal(f"deliver_at = {deliver_at!r}: seconds since 1970, or a datetime")
    return level, delay, deliver_at


def due_ns(message: Message, now_ns: int, levels: Sequence[float]) -> int:
    """When a delayed message that is sent now is due; 0: at once. ``levels``: seconds of each delay level."""
    if message.delay_level is not None:
        if message.delay_level > len(levels):
            raise MessageIllegal(
                f"delay_level = {message.delay_level}: message_delay_level of this broker has {len(levels)} levels"
            )
        due = now_ns + int(levels[message.delay_level - 1] * 1e9) if message.delay_level else 0
    elif message.delay is not None:
        due = now_ns + int(message.delay * 1e9)
    else:
        due = int((message.deliver_at or 0) * 1e9)
    if due > now_ns + int(DELAY_MAX * 1e9):
        raise MessageIllegal(
            f"due in {format_delay((due - now_ns) // 10**9)}: a message can be delayed by {format_delay(DELAY_MAX)}, "
            "not by more"
        )
    return due if due > now_ns else 0


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def retry_property(retry: RetryPolicy) -> bytes:
    """The message's own retry policy, encoded as one more property."""
    if not isinstance(retry, RetryPolicy):
        raise MessageIllegal(f"retry = {retry!r}: must be a RetryPolicy")
    return f"RETRY_POLICY{NAME_VALUE_SEPARATOR}{retry.encode()}{PROPERTY_SEPARATOR}".encode()


def _bounded(what: str, text: str) -> str:
    try:
        encoded = len(text.encode())
    except UnicodeEncodeError as error:
        raise MessageIllegal(f"{what}: not valid Unicode: {error}") from error
    if encoded > ENCODED_BYTES_MAX:
        raise PropertiesTooLarge(f"{what}: {encoded} bytes encoded, at most {ENCODED_BYTES_MAX}")
    return text if type(text) is str else str.__str__(text)


def check_body(body: object) -> bytes:
    """Any bytes-like object, but for an empty one, as plain bytes."""
    if not isinstance(body, bytes | bytearray | memoryview):
        hint = ": encode it first, e.g. body.encode()" if isinstance(body, str) else ""
        raise MessageIllegal(f"body must be bytes, not {type(body).__name__}{hint}")
    if not (copied := bytes(body)):
        raise MessageIllegal("the body is empty: a message has at least one byte")
    return copied


# ---- arguments that are something else altogether: a TypeError that the native core raises


def wrong_type(name: str, wanted: str, given: object) -> TypeError:
    return TypeError(f"{name} must be {wanted}, not {type(given).__name__}")


def no_message(name: str, given: object) -> TypeError:
    return TypeError(f"{name} must be a Message, not {type(given).__name__}: Message(topic, body) makes one")


def not_received(given: object) -> TypeError:
    return TypeError(
        f"message must be one that receive() returned, not {type(given).__name__}: that object carries the claim, and "
        "nothing else can stand for it"
    )
