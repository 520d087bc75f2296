"""Topics and groups as a broker's handle manages them: what may be asked for, what is refused before anything moves.

Each change is one append with its record (``_native/definition.c``, ``_native/group.c``), so that it is done or not,
whoever is killed, and stands across restarts.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from shmbroker._native._core import Region
from shmbroker.config import Config
from shmbroker.errors import BadRequest, GroupNotExist, TopicNotExist
from shmbroker.handle import Handle
from shmbroker.log_files import LogFiles
from shmbroker.naming import PERMISSIONS, RETRY_PREFIX, check_group, check_topic, permission_name, unknown_group
from shmbroker.retry import DEFAULT_POLICY, RetryPolicy, parse_policy

if TYPE_CHECKING:
    from shmbroker.group_reset import QueueReset
    from shmbroker.selector import Sql

QUEUES_MAX: Final = 1024


class Definitions(Handle):
    """The part of ``Broker`` that is about its topics and groups."""

    config: Config
    files: LogFiles

    @property
    def region(self) -> Region:
        """The mapped memory."""
        raise NotImplementedError

    def create_topic(self, name: str, queues: int | None = None, permission: int | str = "rw") -> None:
        """Make a topic; once more as it stands changes nothing. Raises NameIllegal, LimitReached, BadRequest.

        ``permission``: ``"r"``, ``"w"`` or ``"rw"``, or RocketMQ's number for it (4, 2, 6).
        """
        queues = self.config.runtime.default_topic_queues if queues is None else _check_queues(queues)
        bits = _permission_bits(permission)
        found = self._find_topic(check_topic(name))
        if found is None:
            self.region.define_topic(name, queues, bits)
        elif (len(found["queues"]), found["permission"]) != (queues, bits):
            raise BadRequest(
                f"topic {name!r} exists, with {len(found['queues'])} queues and permission "
                f"{permission_name(found['permission'])}: alter it instead"
            )

    def alter_topic(self, name: str, queues: int | None = None, permission: int | str | None = None) -> None:
        """Give a topic more queues or another permission. Raises TopicNotExist, BadRequest (fewer queues)."""
        found = self._require_topic(name)
        queues = len(found["queues"]) if queues is None else _check_queues(queues)
        if queues < len(found["queues"]):
            raise BadRequest(f"topic {name!r} has {len(found['queues'])} queues and cannot lose any")
        bits = found["permission"] if permission is None else _permission_bits(permission)
        self.region.define_topic(name, queues, bits)

    def delete_topic(self, name: str) -> None:
        """Delete a topic and its messages, for every group. Raises TopicNotExist."""
        self._require_topic(name)
        self.region.delete_topic(name)

    def set_subscription(self, group: str, subscriptions: Mapping[str, str | Sql]) -> None:
        """Switch a group to another subscription, topic to tag or SQL expression, all members at once.

        Live members take it over at their next receive; it stands in the log, and a consumer that subscribes to
        anything else is refused from now on. Raises GroupNotExist, TopicNotExist (auto_create_topics is off),
        BadRequest.
        """
        from shmbroker.consumer import define_topics
        from shmbroker.subscription import format_subscription, parse_subscriptions

        wanted = parse_subscriptions(subscriptions)
        text = format_subscription(wanted)
        if all(known["name"] != group for known in self.region.groups()):
            raise GroupNotExist(f"group {group!r} does not exist")
        define_topics(self.region, wanted, self.config)
        self.region.set_subscription(group, text)

    def create_group(self, name: str, retry: RetryPolicy | None = None) -> None:
        """Make a consumer group before its first consumer does. Raises NameIllegal, LimitReached, BadRequest.

        ``retry``: its retry policy. Once more as it stands changes nothing.
        """
        known = {group["name"]: group for group in self.region.groups()}
        self.region.define_group(check_group(name))
        wanted = "" if retry is None else retry.encode()
        found = known[name]["retry"] if name in known else ""
        if name not in known and wanted:
            self.set_retry(name, retry)
        elif name in known and parse_policy(found) != parse_policy(wanted):
            raise BadRequest(f"group {name!r} exists, with {parse_policy(found)}: set its retry policy instead")

    def set_retry(self, group: str, retry: RetryPolicy | None) -> None:
        """How failed messages of the group are tried again from now on; None: by default. Raises GroupNotExist."""
        self.region.set_retry(check_group(group), (retry or DEFAULT_POLICY).encode().encode())

    def reset_group(
        self,
        group: str,
        *,
        to_time: float | datetime | None = None,
        to_offset: int | None = None,
        skip: bool = False,
        topic: str | None = None,
        queue_id: int | None = None,
    ) -> list[QueueReset]:
        """Set where the group goes on, in all that it consumes, or in one topic or queue; one of the three says where.

        ``to_time`` (seconds since 1970, or a datetime): with what was sent from then on; ``to_offset``: of one queue;
        ``skip``: behind all that there is, retries included. Live members go on from there at once; what they have in
        hand of these queues is theirs no more. Raises GroupNotExist, TopicNotExist, QueueNotExist, BadRequest,
        LimitReached (no free claim table), Retryable, NeedsOperator.
        """
        from shmbroker import group_reset

        return group_reset.reset_group(
            self.region, self.files, check_group(group),
            to_time=to_time, to_offset=to_offset, skip=skip, topic=topic, queue_id=queue_id,
        )  # fmt: skip

    def pause_group(self, name: str) -> None:
        """Hand out nothing to the group until it is resumed, in no process, across restarts too. Raises GroupNotExist.

        What its members have in hand they may finish. Sends go on; what comes is kept for it.
        """
        self._set_paused(name, True)

    def resume_group(self, name: str) -> None:
        """Let a paused group go on. Raises GroupNotExist."""
        self._set_paused(name, False)

    def delete_group(self, name: str) -> None:
        """Delete a consumer group, its progress and its retries; it keeps no log any more. Its dead letters stay.

        A group that is made again under this name begins like a new one. Raises GroupNotExist, GroupInUse.
        """
        self.region.delete_group(check_group(name), RETRY_PREFIX + name)

    def topics(self) -> list[dict[str, Any]]:
        """Each: name, topic_id, permission, and queues: queue_id, first_offset, next_offset, bytes.

        ``bytes`` counts bodies since the broker's memory was made: from 0 again after a clean stop.
        """
        return self.region.topics()

    def groups(self) -> list[dict[str, Any]]:
        """The groups: each one's name, group_id, subscription, subscription_set, paused, and members (slots)."""
        return self.region.groups()

    def _set_paused(self, name: str, paused: bool) -> None:
        try:
            self.region.set_paused(check_group(name), paused)
        except GroupNotExist:
            raise unknown_group(name, [group["name"] for group in self.region.groups()]) from None

    def _find_topic(self, name: str) -> dict[str, Any] | None:
        return next((topic for topic in self.region.topics() if topic["name"] == name), None)

    def _require_topic(self, name: str) -> dict[str, Any]:
        found = self._find_topic(check_topic(name))
        if found is None:
            raise TopicNotExist(f"topic {name!r} does not exist")
        return found


def _check_queues(queues: int) -> int:
    if type(queues) is not int or not 1 <= queues <= QUEUES_MAX:
        raise BadRequest(f"queues = {queues!r}: must be an integer from 1 to {QUEUES_MAX}")
    return queues


def _permission_bits(permission: int | str) -> int:
    for name, bits in PERMISSIONS.items():
        if permission in (name, bits):
            return bits
    raise BadRequest(f"permission = {permission!r}: must be 'r' (read), 'w' (write) or 'rw' (both)")
