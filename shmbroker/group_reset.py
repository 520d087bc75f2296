"""Where a group goes on is set by hand: to an instant, to an offset, or behind all that there is.

Each queue is one append (``sb_claims_reset`` of ``_native/claim_open.c``): a PROGRESS record of a new reset generation,
and a new claim table in place of the old one. Killed between two queues, some are reset and the others are not: doing
it again completes it. Live members go on from the new place with their next receive; what they have in hand of these
queues is theirs no more, as if its time were over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from shmbroker.errors import BadRequest, QueueNotExist, TopicNotExist
from shmbroker.naming import DEAD_LETTER_PREFIX, RETRY_PREFIX, check_topic, unknown_group
from shmbroker.queue_time import BEHIND_THE_LAST, QueueTimes, instant_ns

if TYPE_CHECKING:
    from shmbroker._native._core import Region
    from shmbroker.log_files import LogFiles


class QueueReset(NamedTuple):
    """A queue of a reset group: the first offset it was not done with (None: never consumed), and what that is now."""

    topic: str
    queue_id: int
    before: int | None
    after: int


def reset_group(
    region: Region,
    files: LogFiles,
    group: str,
    *,
    to_time: float | datetime | None,
    to_offset: int | None,
    skip: bool,
    topic: str | None,
    queue_id: int | None,
) -> list[QueueReset]:
    """See ``Broker.reset_group``."""
    if [to_time is None, to_offset is None, not skip].count(False) != 1:
        raise BadRequest(f"reset of group {group!r}: give one of to_time, to_offset and skip")
    if to_offset is not None and (topic is None or queue_id is None):
        raise BadRequest(f"to_offset = {to_offset!r}: an offset is of one queue; name topic and queue_id")
    if queue_id is not None and topic is None:
        raise BadRequest(f"queue_id = {queue_id!r}: name the topic, too")
    born_ns = None if to_time is None else instant_ns("to_time", to_time)
    groups = {known["name"]: known for known in region.groups()}
    if group not in groups:
        raise unknown_group(group, groups)
    known = groups[group]
    places = list(_places(region, known, topic, queue_id, with_retries=skip))
    times = None if born_ns is None else QueueTimes(region, files)
    done = []
    try:
        for name, topic_id, queue in places:
            first, end = queue["first_offset"], queue["next_offset"]
            offset = BEHIND_THE_LAST
            if times is not None and born_ns is not None:
                offset = times.first_since(topic_id, queue["queue_id"], first, end, born_ns)
            elif to_offset is not None:
                offset = _check_offset(to_offset, name, queue)
            before, after = region.reset_progress(known["group_id"], topic_id, queue["queue_id"], offset)
            done.append(QueueReset(name, queue["queue_id"], before, after))
    finally:
        region.wake_everybody()  # what members wait for may be there now
    return done


def _places(
    region: Region, group: dict[str, Any], topic: str | None, queue_id: int | None, *, with_retries: bool
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(topic, topic id, queue) of each queue that is meant: of a topic, or of all that the group consumes."""
    topics = {known["name"]: known for known in region.topics()}
    name = group["name"]
    if topic is None:
        wanted = {*json.loads(group["subscription"] or "{}")}
        wanted |= {table["topic"] for table in region.progress() if table["group_id"] == group["group_id"]}
        wanted -= {DEAD_LETTER_PREFIX + name, RETRY_PREFIX + name}
        if with_retries:
            wanted.add(RETRY_PREFIX + name)
        wanted &= topics.keys()
        if not wanted:
            raise BadRequest(f"group {name!r} has not consumed a topic yet: name one")
    else:
        if check_topic(topic).startswith(DEAD_LETTER_PREFIX):
            raise BadRequest(f"{topic!r}: dead letters are sent again or purged (`shmbroker dlq`)")
        if topic not in topics:
            raise TopicNotExist(f"topic {topic!r} does not exist")
        wanted = {topic}
    for wanted_name in sorted(wanted):
        found = topics[wanted_name]
        queues = found["queues"] if queue_id is None else found["queues"][queue_id : queue_id + 1]
        if not queues or (queue_id is not None and queue_id < 0):
            raise QueueNotExist(f"topic {wanted_name!r} has {len(found['queues'])} queues, not number {queue_id}")
        for queue in queues:
            yield wanted_name, found["topic_id"], queue


def _check_offset(offset: int, topic: str, queue: dict[str, Any]) -> int:
    first, end = queue["first_offset"], queue["next_offset"]
    if type(offset) is not int or not first <= offset <= end:
        raise BadRequest(
            f"to_offset = {offset!r}: {topic}[{queue['queue_id']}] has messages from offset {first} on, and the next "
            f"one will be {end}"
        )
    return offset
