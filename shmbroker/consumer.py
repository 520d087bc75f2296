"""SimpleConsumer: policy around the native receive path (what is subscribed, where lagging reads come from).

The data path itself is ``_native/consumer.pxi`` (look, claim, copy) and ``_native/claim.c``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from shmbroker._native._core import ConsumerCore, ReceivedMessage, Region
from shmbroker.config import Config
from shmbroker.delivery.snapshot import bounded_groups
from shmbroker.errors import (
    AckNotDurable,
    BadRequest,
    BrokerBusy,
    PositionGone,
    ShmBrokerError,
    SubscriptionConflict,
    TopicNotExist,
)
from shmbroker.failpoint import failpoint
from shmbroker.handle import Handle, Home
from shmbroker.naming import check_group
from shmbroker.queue_time import BEHIND_THE_LAST, ConsumeFrom, QueueTimes, check_consume_from
from shmbroker.record import RecordKind
from shmbroker.selector import Sql
from shmbroker.send_back import SendBack
from shmbroker.subscription import encode_subscription, format_subscription, parse_subscriptions, read_subscription

if TYPE_CHECKING:
    pass

logger = logging.getLogger("shmbroker.consumer")


class ConsumerHome(Home, Protocol):
    """What a consumer asks of the broker handle that made it."""


class SimpleConsumer(Handle, ConsumerCore):
    """Fetches messages, and acknowledges each one when it is done with it. Thread-safe; of no use after a fork.

    Any number of consumers, in any number of processes, share a group's queues: each message is delivered to one of
    them. It is delivered again, with its ``delivery_attempt`` one higher, if it is not acknowledged before its
    invisible time is over, or at once if the process that has it dies. After as many deliveries as the group's retry
    policy allows (17) it goes to ``%DLQ%group`` instead. Retries that other members have asked for come as well.

    ``subscriptions``: topic to tag expression, ``"*"`` or ``"paid || refunded"``, or to ``shmbroker.sql("amount >
    100")``; all members of a group have the same. ``spin``: burn a core instead of sleeping while there is nothing to
    receive. ``consume_from``: where a group that has never consumed a queue begins, at the ``"first"`` message the log
    has, behind the ``"last"``, or with what was sent at an instant (seconds since 1970, or a datetime) or later.
    ``ack``: whether an acknowledgement is done when it stands in ``"memory"``, which survives every process, or
    ``"durable"``. ``attempts``: the same for the count of deliveries, before ``receive`` returns the messages:
    ``"durable"`` never forgets a delivery, whatever is lost; in ``"memory"`` a power cut may take back those of the
    last second.

    Raises SubscriptionConflict, TopicNotExist (auto_create_topics is off), NoPermission, LimitReached, BadRequest.
    """

    def __init__(
        self,
        home: ConsumerHome,
        group: str,
        subscriptions: Mapping[str, str | Sql],
        *,
        spin: bool = False,
        consume_from: ConsumeFrom = "first",
        ack: str = "memory",
        attempts: str = "memory",
    ) -> None:
        for name, value in (("ack", ack), ("attempts", attempts)):
            if value not in ("memory", "durable"):
                raise BadRequest(f"{name} = {value!r}: must be 'memory' or 'durable'")
        begin = check_consume_from(consume_from)
        wanted = parse_subscriptions(subscriptions)
        client = home.attach()
        super().__init__(
            client,
            check_group(group),
            spin=spin,
            from_first=begin == "first",
            durable_acks=ack == "durable",
            attempts_within=_append_and_flush_seconds(home.config) if attempts == "durable" else 0.0,
        )
        self._home = home
        self._wanted = wanted
        self._begin = begin
        self._send_back = SendBack(home, self)
        self._was_member = False
        self._closed = False
        self._subscribe()

    def _subscribe(self) -> None:
        """Become a member of the group in the running broker. Who was one follows `group set-subscription` (R25)."""
        client = self._home.attach()
        while True:
            define_topics(client.region, self._wanted, self._home.config)
            client.region.define_group(self.group)
            if self._bind(client, encode_subscription(self._wanted), format_subscription(self._wanted)):
                break
            group = next(group for group in client.region.groups() if group["name"] == self.group)
            if not (self._was_member and group["subscription_set"]):
                raise SubscriptionConflict(_conflict(group, format_subscription(self._wanted)))
            self._take_over(group["subscription"].encode())
        self._was_member = True

    # ---- called by the native core for what is not the common case

    def _take_over(self, text: bytes) -> Mapping[str, Sequence[bytes] | bytes | None]:
        self._wanted = read_subscription(text)
        logger.info("group %s subscribes to %s now", self.group, text.decode())
        return encode_subscription(self._wanted)

    def _start_offsets(self, topic_id: int, queues: int) -> list[int]:
        if not isinstance(self._begin, int):
            return [BEHIND_THE_LAST] * queues
        region, born_ns = self._home.attach().region, self._begin
        times = QueueTimes(region, self._home.files)
        known = [queue for topic in region.topics() if topic["topic_id"] == topic_id for queue in topic["queues"]]
        if len(known) < queues:  # deleted meanwhile: nobody consumes it
            return [0] * queues
        return [
            times.first_since(topic_id, queue["queue_id"], queue["first_offset"], queue["next_offset"], born_ns)
            for queue in known[:queues]
        ]

    def _reattach(self) -> None:
        if self._home.attach_serving(self._home.config.runtime.send_timeout_ms / 1000) is not self.client:
            self._subscribe()

    def _write_acks(self, bodies: list[bytes]) -> None:
        """The order, and what a crash at each edge leaves (the memory counts, as long as it is there):

        claims ACKED      ── the acknowledgement in memory; without it, what the last progress record says
        records appended  ── the same; whole in the log or cut with its torn tail
        flushed           ── the acknowledgement, whatever is lost
        """
        try:
            end = self._append_progress(bodies)
            failpoint("consumer.acks_appended")
            self._wait_flushed(end)
        except ShmBrokerError as error:
            stands = "acknowledged in memory, where it stands whatever process dies, but not known to be on the disk"
            raise AckNotDurable(f"{stands}: {error}") from error

    def _write_attempts(self, bodies: list[bytes]) -> None:
        """The order, and what a crash at each edge leaves (the memory counts, as long as it is there):

        claims HELD       ── attempts in memory; without it, what the last progress record says: nobody had the messages
        records appended  ── the same; whole in the log or cut with its torn tail
        flushed           ── the attempts, whatever is lost: one too many at most, for messages that nobody has yet
        (the caller gets the messages)
        """
        try:
            failpoint("consumer.claimed")
            end = self._append_progress(bodies)
            failpoint("consumer.attempts_appended")
            self._wait_flushed(end)
            failpoint("consumer.attempts_flushed")
        except ShmBrokerError as error:
            back = "attempts = 'durable', and they could not be written: the messages went back to the group, uncounted"
            error.args = (f"{back}: {error}", *error.args[1:])
            raise

    def _append_progress(self, bodies: list[bytes]) -> int:
        """Append them, all in one unless they are very large; the position that has to be flushed."""
        client, timeout_ns = self.client, self._home.config.runtime.send_timeout_ms * 1_000_000
        end = 0
        for group in bounded_groups(client.region, bodies):
            _, end = client.append_system(RecordKind.PROGRESS, group, timeout_ns)
        return end

    def _wait_flushed(self, end: int) -> None:
        """Wait for the disk, and share its fdatasync with whoever else does."""
        timeout_ms = self._home.config.runtime.sync_flush_timeout_ms
        if not self.client.wait_flushed(end, timeout_ms * 1_000_000):
            raise BrokerBusy(f"not flushed within sync_flush_timeout = {timeout_ms / 1000:g} s")

    def _read_entries(self, topic_id: int, queue_id: int, offset: int, count: int) -> bytes:
        return self._home.files.read_entries(topic_id, queue_id, offset, count)

    def _hole_at(self, topic_id: int, queue_id: int, offset: int) -> tuple[int, bool] | None:
        return self._home.files.hole_at(topic_id, queue_id, offset)

    def _read_window(self, position: int) -> bytes:
        return self._home.files.read_window(position)

    def _read_at(self, position: int) -> bytes | None:
        try:
            return self._home.files.read_log(position)
        except PositionGone:
            return None

    def _report_lost(self, topic: str, queue_id: int, first: int, count: int) -> None:
        store = self._home.config.runtime
        by_retention = (
            f"deleted by retention (delete_unconsumed = true, retention_ms = {store.retention_ms}, retention_bytes = "
            f"{store.retention_bytes}), "
            if store.delete_unconsumed
            else ""
        )
        logger.error(
            "group %s: %d messages of %s[%d], from offset %d on, cannot be had from the log any more, and no "
            "acknowledgement of them is known: %slost, or, after a power cut, consumed shortly before it",
            self.group, count, topic, queue_id, first, by_retention,
        )  # fmt: skip

    def _max_deliveries(self, message: ReceivedMessage) -> int:
        return self._send_back.max_deliveries(message)

    def _bury(self, messages: list[ReceivedMessage]) -> None:
        self._send_back.bury(messages)

    # ---- life

    def close(self) -> None:
        """Leave the group. What was received and not acknowledged goes back to it at once, as a delivery that failed.

        If this process has other consumers in the group, it goes back with the last of them, or when its time is over.
        """
        self._closed = True
        self._shut()

    def __repr__(self) -> str:
        tags = format_subscription(self._wanted).decode()
        state = "closed" if self._closed else "open"
        return f"<{type(self).__name__} of group {self.group!r} for {tags} in {str(self._home.directory)!r}, {state}>"


def _append_and_flush_seconds(config: Config) -> float:
    return (config.runtime.send_timeout_ms + config.runtime.sync_flush_timeout_ms) / 1000


def _conflict(group: Mapping[str, Any], text: bytes) -> str:
    name, agreed = group["name"], group["subscription"]
    if group["subscription_set"]:
        return (
            f"group {name!r} was set to subscribe to {agreed}, this consumer subscribes to {text.decode()}: change "
            f"this consumer, or set the group again (`shmbroker group set-subscription {name}`)"
        )
    return (
        f"group {name!r}: its live members subscribe to {agreed}, this consumer to {text.decode()}. All members of a "
        "group must subscribe alike, or messages would go to members that do not want them: use another group, stop "
        f"the others first, or switch them (`shmbroker group set-subscription {name}`)"
    )


def define_topics(region: Region, names: Iterable[str], config: Config) -> None:
    """Create those that are not there, as the settings say. Raises TopicNotExist."""
    known = {topic["name"] for topic in region.topics()}
    for name in sorted(set(names) - known):
        if not config.runtime.auto_create_topics:
            raise TopicNotExist(f"topic {name!r} does not exist and auto_create_topics is off")
        region.define_topic(name, config.runtime.default_topic_queues)


__all__ = ["ReceivedMessage", "SimpleConsumer"]
