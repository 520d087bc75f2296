"""PullConsumer: an application that reads queues from where it wants, and says itself how far it is.

It claims nothing, so nothing is delivered again and nothing is retried: its positions are its own, in this process.
What it commits is its group's progress like that of every other consumer (R14): in the memory at once, where it
outlives every process, in the log within a second, or with ``durable`` when the call returns. Committing passes over
the messages before a position one by one, as a filter does; killed in between, a part is committed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from shmbroker._native._core import PullCore, ReceivedMessage
from shmbroker.consumer import ConsumerHome, SimpleConsumer, define_topics
from shmbroker.errors import BadRequest, BrokerClosed, QueueNotExist
from shmbroker.handle import Handle
from shmbroker.naming import check_group, check_topic
from shmbroker.queue_time import ConsumeFrom, QueueTimes, check_consume_from, instant_ns
from shmbroker.subscription import encode_subscription, parse_subscriptions

if TYPE_CHECKING:
    from shmbroker.selector import Sql

Places: TypeAlias = "set[tuple[str, int]]"

MESSAGES_MAX: Final = 1024
_WITHOUT_END: Final = 2**31


class QueuePosition(NamedTuple):
    """A queue as a pull consumer has it: the next offset it reads, and the first that its group is not done with."""

    topic: str
    queue_id: int
    position: int
    committed: int
    first_offset: int
    next_offset: int


def check_poll(max_messages: int, wait: float) -> None:
    """Raise BadRequest for arguments of a ``poll`` that make no sense."""
    if type(max_messages) is not int or not 1 <= max_messages <= MESSAGES_MAX or not wait >= 0.0:
        raise BadRequest(f"poll({max_messages!r}, wait={wait!r}): 1 to {MESSAGES_MAX} messages, no negative wait")


class _Reader(SimpleConsumer, PullCore):
    """What reads for a pull consumer: no member of its group, whose subscription is no business of its own."""

    def __init__(
        self,
        home: ConsumerHome,
        group: str,
        wanted: Mapping[str, str | Sql],
        assigned: Places,
        consume_from: ConsumeFrom,
    ) -> None:
        self._assigned = assigned
        super().__init__(home, group, wanted, consume_from=consume_from)

    def assign(self, wanted: Mapping[str, str | Sql], assigned: Places) -> None:
        self._wanted, self._assigned = parse_subscriptions(wanted), assigned
        self._subscribe()

    def _subscribe(self) -> None:
        client = self._home.attach()
        client.region.define_group(self.group)
        self._assign(client, encode_subscription(self._wanted), self._assigned, self._home.files.store)

    def _max_deliveries(self, message: ReceivedMessage) -> int:  # noqa: ARG002 - what is not delivered is not buried
        return _WITHOUT_END


class PullConsumer(Handle):
    """Reads the queues that it is assigned, from positions that it may set. Thread-safe; of no use after a fork.

    Messages come in the order of each queue. ``poll`` moves the positions, ``commit`` makes them the group's progress;
    a queue that is assigned anew is read from there, and when its group is reset from the new place. Which consumer
    reads which queue is for the application to see to. ``consume_from``: as for a ``SimpleConsumer``.
    """

    def __init__(self, home: ConsumerHome, group: str, consume_from: ConsumeFrom = "first") -> None:
        check_consume_from(consume_from)
        self.group = check_group(group)
        self._home = home
        self._consume_from = consume_from
        self._reader: _Reader | None = None
        self._one_at_a_time = threading.Lock()
        self._closed = False

    def assign(self, queues: Iterable[str | tuple[str, int]], expression: str | Sql = "*") -> None:
        """Read these queues from now on: each a (topic, queue_id), or a topic, for all queues that it has now.

        Those that stay keep their position. ``expression``: tags or ``shmbroker.sql``; what it rejects is passed over.
        Raises TopicNotExist, QueueNotExist, NoPermission, LimitReached (claim tables), BadRequest.
        """
        if isinstance(queues, str):
            raise BadRequest(f"assign({queues!r}): a list of topics, or of (topic, queue_id)")
        listed = [(queue, None) if isinstance(queue, str) else queue for queue in queues]
        wanted = {check_topic(topic): expression for topic, _ in listed}
        region = self._home.attach().region
        define_topics(region, parse_subscriptions(wanted), self._home.config)
        counts = {topic["name"]: len(topic["queues"]) for topic in region.topics()}
        assigned: set[tuple[str, int]] = set()
        for topic, queue_id in listed:
            chosen = range(counts[topic]) if queue_id is None else [queue_id]
            if any(number not in range(counts[topic]) for number in chosen):
                raise QueueNotExist(f"{topic}[{queue_id!r}]: the topic has {counts[topic]} queues, numbered from 0")
            assigned |= {(topic, number) for number in chosen}
        with self._one_at_a_time:
            self._check_open()
            if self._reader is None:
                self._reader = _Reader(self._home, self.group, wanted, assigned, self._consume_from)
            else:
                self._reader.assign(wanted, assigned)

    def poll(self, max_messages: int = 32, wait: float = 0.0) -> list[ReceivedMessage]:
        """The next messages, at most ``max_messages``, as soon as there is one; [] if none comes in ``wait`` seconds.

        Their ``delivery_attempt`` is 0: nobody counts. Raises CorruptLog once nothing sound stands before the damage,
        which is then passed over.
        """
        check_poll(max_messages, wait)
        with self._one_at_a_time:
            reader = self._assigned_reader()
            try:
                return reader._poll(max_messages, wait)
            except BrokerClosed:
                self._check_open()
            reader._reattach()
            return reader._poll(max_messages, 0.0)

    def queues(self) -> list[QueuePosition]:
        """Each assigned queue: position, what is committed, and the offsets that it has."""
        with self._one_at_a_time:
            return [QueuePosition(place[0], place[1], *place[3:]) for place in self._places()]

    def seek(self, topic: str, queue_id: int, offset: int) -> None:
        """Read on from ``offset``. Raises BadRequest: not assigned, or no offset that the queue has."""
        with self._one_at_a_time:
            (place,) = self._places(topic, queue_id)
            first, end = place[5:]
            if type(offset) is not int:
                raise BadRequest(f"offset = {offset!r}: must be an int, not {type(offset).__name__}")
            if not first <= offset <= end:
                raise BadRequest(
                    f"seek to {offset!r}: {topic}[{queue_id}] has messages from offset {first} on, "
                    f"the next will be {end}"
                )
            self._assigned_reader()._seek(topic, queue_id, offset)

    def seek_to_time(self, instant: float | datetime, topic: str | None = None, queue_id: int | None = None) -> None:
        """Read on with what was sent at an instant or later, in all assigned queues or some. Raises BadRequest."""
        born_ns = instant_ns("instant", instant)
        with self._one_at_a_time:
            places = self._places(topic, queue_id)
            times = QueueTimes(self._home.attach().region, self._home.files)
            for name, number, topic_id, _, _, first, end in places:
                self._assigned_reader()._seek(name, number, times.first_since(topic_id, number, first, end, born_ns))

    def seek_to_begin(self, topic: str | None = None, queue_id: int | None = None) -> None:
        """Read on from the first message that the log has."""
        with self._one_at_a_time:
            for place in self._places(topic, queue_id):
                self._assigned_reader()._seek(place[0], place[1], place[5])

    def seek_to_end(self, topic: str | None = None, queue_id: int | None = None) -> None:
        """Read on behind the last message."""
        with self._one_at_a_time:
            for place in self._places(topic, queue_id):
                self._assigned_reader()._seek(place[0], place[1], place[6])

    def commit(self, *, durable: bool = False) -> None:
        """The group is done with all that stands before the positions, in each assigned queue.

        It outlives every process at once, and a power cut within ``progress_interval``, or with ``durable`` when this
        returns. Progress never goes back: for that there is ``Broker.reset_group``. Raises AckNotDurable (done in
        memory), BrokerClosed (the broker is stopping: perhaps not recorded), BrokerBusy.
        """
        with self._one_at_a_time:
            reader = self._assigned_reader()
            try:
                bodies = reader._commit()
            except BrokerClosed:
                self._check_open()
                reader._reattach()
                bodies = reader._commit()
            if durable:
                reader._write_acks(bodies)

    def close(self) -> None:
        """Leave; what was not committed is read again by whoever is assigned the queue next."""
        self._closed = True
        if self._reader is not None:
            self._reader.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<{type(self).__name__} of group {self.group!r} in {str(self._home.directory)!r}, {state}>"

    # ---- inside

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerClosed("this consumer was closed")

    def _assigned_reader(self) -> _Reader:
        self._check_open()
        if self._reader is None:
            raise BadRequest(f"the pull consumer of group {self.group!r} has no queues: assign some first")
        return self._reader

    def _places(
        self, topic: str | None = None, queue_id: int | None = None
    ) -> list[tuple[str, int, int, int, int, int, int]]:
        """Of the queues that are meant; at least one. See ``PullCore._positions``."""
        if topic is not None and not isinstance(topic, str):
            raise BadRequest(f"topic = {topic!r}: must be a str, not {type(topic).__name__}")
        if queue_id is not None and type(queue_id) is not int:
            raise BadRequest(f"queue_id = {queue_id!r}: must be an int, not {type(queue_id).__name__}")
        reader = self._assigned_reader()
        try:
            places = reader._positions()
        except BrokerClosed:
            self._check_open()
            reader._reattach()
            places = reader._positions()
        chosen = [place for place in places if topic in (None, place[0]) and queue_id in (None, place[1])]
        if not chosen:
            raise BadRequest(f"{topic}[{'*' if queue_id is None else queue_id}] is not assigned to this consumer")
        return chosen


__all__ = ["PullConsumer", "QueuePosition"]
