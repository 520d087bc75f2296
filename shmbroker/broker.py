"""``shmbroker.open`` and the handle it returns. How a running broker is found or started: ``attachment.py``."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from shmbroker import access, failpoint
from shmbroker._native._core import Client, Region
from shmbroker.attachment import OPEN_TIMEOUT, Attachment, await_service, connect, is_owner, keep_supervised
from shmbroker.config import Config, load
from shmbroker.errors import BadRequest, BrokerClosed, ConfigError, GroupNotExist, NotReady, TopicNotExist
from shmbroker.handle import Handle
from shmbroker.log_files import LogFiles
from shmbroker.naming import PERMISSIONS, RETRY_PREFIX, BrokerPaths, check_group, check_topic, permission_name
from shmbroker.retry import DEFAULT_POLICY, RetryPolicy, parse_policy

if TYPE_CHECKING:
    from shmbroker.consumer import SimpleConsumer
    from shmbroker.dead_letters import DeadLetters
    from shmbroker.group_reset import QueueReset
    from shmbroker.producer import Producer
    from shmbroker.push_consumer import Listener, PushConsumer
    from shmbroker.selector import Sql

QUEUES_MAX: Final = 1024

Child = TypeVar("Child")


def open(  # noqa: A001 - as in gzip.open
    directory: str | os.PathLike[str],
    config: str | os.PathLike[str] | None = None,
    *,
    timeout: float = OPEN_TIMEOUT,
    **settings: Any,
) -> Broker:
    """Attach to the broker that serves ``directory``, and start it first if nobody does.

    ``config`` is a TOML file instead of ``directory/broker.toml``; ``settings`` are single settings, times in float
    seconds. Raises ConfigError (a setting is wrong), ConfigConflict (the broker runs with another value),
    AttachRefused, DirectoryUnusable, LayoutMismatch, NotEnoughMemory, CorruptLog, StoreFull, and NotReady after
    ``timeout`` seconds.
    """
    failpoint.arm_from_environment("client")
    if not os.fspath(directory):
        raise ConfigError("directory = '': name one; an empty path would make a broker in the current directory")
    if not _is_seconds(timeout):
        raise BadRequest(f"timeout = {timeout!r}: must be seconds, 0 or more")
    paths = BrokerPaths(Path(directory).absolute())
    try:
        wanted = load(paths.directory, config, settings)
        return Broker(paths, connect(paths, wanted, timeout))
    except OSError as error:
        raise access.explained(error, paths) from error


class Broker(Handle):
    """A process's handle of a running broker: makes producers and consumers, manages topics. Thread-safe.

    A context manager; ``close`` closes what was made through it. After a fork the child's first use registers it anew
    (R25). If the supervisor of an embedded broker is killed, a thread of this handle sees it at once and starts
    another, which goes on with the same memory.
    """

    def __init__(self, paths: BrokerPaths, attached: Attachment) -> None:
        self._paths = paths
        self._attached = attached
        self._lock = threading.RLock()
        self._closed = False
        self._children: weakref.WeakSet[Any] = weakref.WeakSet()
        self._listening: weakref.WeakSet[PushConsumer] = weakref.WeakSet()
        self.files = LogFiles(paths, self._serving)
        self.config = Config.of(attached.descriptor.settings)
        self._watch()
        _handles.add(self)

    @property
    def directory(self) -> Path:
        """The broker's directory."""
        return self._paths.directory

    @property
    def region(self) -> Region:
        """The mapped memory."""
        return self.attach().region

    def attach(self) -> Client:
        """This process's attachment to the running broker: a new one after a fork, or after the broker was restarted.

        Raises BrokerClosed (handle closed, directory removed or moved) and NotReady (no running broker within the send
        timeout).
        """
        return self._attach_by(time.monotonic() + self.config.runtime.send_timeout_ms / 1000)

    def attach_serving(self, timeout: float) -> Client:
        """As ``attach``, but to a broker that accepts sends: waits, at most ``timeout`` seconds, while one is stopping.

        The client is the same if the broker goes on with the same memory.
        """
        deadline = time.monotonic() + timeout
        with self._locked_by(deadline):
            attached = self._attached
            if not self._closed and not attached.is_gone():
                left = max(0.0, deadline - time.monotonic())
                if await_service(self._paths, attached, left, may_start=self._may_start(attached)):
                    return attached.client
                if attached.is_in_place(self._paths):
                    attached.close()
            return self._attach_by(deadline)

    def _attach_by(self, deadline: float) -> Client:
        with self._locked_by(deadline):
            if self._closed:
                raise BrokerClosed("this broker handle was closed")
            attached = self._attached
            if attached.is_gone():
                attached.close()
                if not attached.is_in_place(self._paths):
                    raise BrokerClosed(f"{self.directory} was removed or moved while it was open: open it anew")
                self._connect(max(0.0, deadline - time.monotonic()))
            return self._attached.client

    @contextmanager
    def _locked_by(self, deadline: float) -> Iterator[None]:
        """One thread at a time attaches; who waits behind it has a deadline of its own."""
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise NotReady(
                f"another thread still waits for the broker of {self.directory}: nobody serves it, or not yet"
            )
        try:
            yield
        finally:
            self._lock.release()

    # ---- what applications use

    def producer(self, group: str) -> Producer:
        """A producer of a producer group."""
        from shmbroker.producer import Producer

        return self._adopt(Producer(self, group))

    def simple_consumer(self, group: str, subscriptions: Mapping[str, str | Sql], **settings: Any) -> SimpleConsumer:
        """A consumer that fetches and acknowledges by itself. ``subscriptions``: topic to tag or SQL expression."""
        from shmbroker.consumer import SimpleConsumer

        return self._adopt(SimpleConsumer(self, check_group(group), subscriptions, **settings))

    def push_consumer(
        self, group: str, listener: Listener, subscriptions: Mapping[str, str | Sql], **settings: Any
    ) -> PushConsumer:
        """Threads that call ``listener`` with each message and a context. ``subscriptions``: as ``simple_consumer``."""
        from shmbroker.push_consumer import PushConsumer

        consumer = PushConsumer(self, check_group(group), listener, subscriptions, **settings)
        self._listening.add(consumer)
        return consumer

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

    def dead_letters(self, group: str) -> DeadLetters:
        """The group's dead letters, to be read, sent again or given up. Raises TopicNotExist if it never had any."""
        from shmbroker.dead_letters import DeadLetters

        return self._adopt(DeadLetters(self, check_group(group)))

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
        self.region.set_paused(check_group(name), True)

    def resume_group(self, name: str) -> None:
        """Let a paused group go on. Raises GroupNotExist."""
        self.region.set_paused(check_group(name), False)

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

    def status(self) -> dict[str, Any]:
        """What ``shmbroker status --json`` shows."""
        from shmbroker import health

        self.attach()
        return health.of_running(self._attached.region, self._attached.descriptor, self._paths)

    def recall(self, handle: str) -> bool:
        """Take back a delayed message, by the ``recall_handle`` of its SendResult, in any process.

        True: it will not fire, ever. False: it has fired, or is not known (any more). Raises BadRequest (no handle),
        BrokerBusy (ask again), StoreFull, StoreReadOnly.
        """
        from shmbroker.recall import recall

        runtime = self.config.runtime
        return recall(self, handle, runtime.send_timeout_ms / 1000, runtime.sync_flush_timeout_ms / 1000)

    def close(self) -> None:
        """Close all that was made here and leave the broker; an embedded one stops when its last client has left."""
        for consumer in list(self._listening):  # first, and without the lock: their listeners may use all the rest
            consumer.close()
        with self._lock:
            if self._closed:
                return
            for child in list(self._children):
                child.close()
            self._closed = True
            self._attached.close()
            self.files.close()

    def __del__(self) -> None:
        """Nobody uses it any more, nor what was made here: as a file does, give back what close would, and say so.

        Without this the thread that watches the supervisor would keep the client slot for as long as the process lives.
        """
        if getattr(self, "_closed", True) or self._attached.pid != os.getpid():
            return
        self._attached.close()
        self.files.close()
        text = f"unclosed broker of {self._paths.directory}: close it, or open it in a with statement"
        warnings.warn(text, ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {str(self.directory)!r}, {'closed' if self._closed else 'open'}>"

    def _in_another_process(self) -> str:
        return f"pass the directory, and call shmbroker.open({str(self.directory)!r}) in the other process"

    # ---- inside

    def _connect(self, timeout: float) -> None:
        self._attached = connect(self._paths, self.config, timeout, may_start=self._may_start(self._attached))
        self.config = Config.of(self._attached.descriptor.settings)
        self.files.close()
        self._watch()

    def _may_start(self, attached: Attachment) -> bool:
        """Who serves a broker that is not embedded starts it again, too; so does the owner one that is shared."""
        return attached.embedded and is_owner(self._paths)

    def _adopt(self, child: Child) -> Child:
        self._children.add(child)
        return child

    def _find_topic(self, name: str) -> dict[str, Any] | None:
        return next((topic for topic in self.region.topics() if topic["name"] == name), None)

    def _require_topic(self, name: str) -> dict[str, Any]:
        found = self._find_topic(check_topic(name))
        if found is None:
            raise TopicNotExist(f"topic {name!r} does not exist")
        return found

    def _serving(self) -> tuple[Region, bytes]:
        self.attach()
        return self._attached.region, bytes.fromhex(self._attached.descriptor.store)

    def _watch(self) -> None:
        target, arguments = keep_supervised, (self._paths, self._attached)
        threading.Thread(target=target, args=arguments, name="shmbroker-watch", daemon=True).start()

    def _after_fork(self) -> None:
        """In the child: locks may be held by threads that do not exist here; the slot is the parent's."""
        self._lock = threading.RLock()
        self._children = weakref.WeakSet()
        self._listening = weakref.WeakSet()
        self.files = LogFiles(self._paths, self._serving)  # the parent's descriptors are neither closed nor shared


_handles: weakref.WeakSet[Broker] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for handle in list(_handles):
        handle._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and value >= 0


def _check_queues(queues: int) -> int:
    if type(queues) is not int or not 1 <= queues <= QUEUES_MAX:
        raise BadRequest(f"queues = {queues!r}: must be an integer from 1 to {QUEUES_MAX}")
    return queues


def _permission_bits(permission: int | str) -> int:
    for name, bits in PERMISSIONS.items():
        if permission in (name, bits):
            return bits
    raise BadRequest(f"permission = {permission!r}: must be 'r' (read), 'w' (write) or 'rw' (both)")
