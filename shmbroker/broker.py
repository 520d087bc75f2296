"""``shmbroker.open`` and the handle it returns. How a running broker is found or started: ``attachment.py``."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shmbroker import access, failpoint
from shmbroker._native._core import Client, Region
from shmbroker.attachment import OPEN_TIMEOUT, Attachment, await_service, connect, is_owner, keep_supervised
from shmbroker.config import Config, load
from shmbroker.definitions import Definitions
from shmbroker.errors import BadRequest, BrokerClosed, ConfigError, NotReady
from shmbroker.log_files import LogFiles
from shmbroker.naming import BrokerPaths, check_group

if TYPE_CHECKING:
    from shmbroker.consumer import SimpleConsumer
    from shmbroker.dead_letters import DeadLetters
    from shmbroker.producer import Producer
    from shmbroker.pull_consumer import PullConsumer
    from shmbroker.push_consumer import Listener, PushConsumer
    from shmbroker.selector import Sql

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


class Broker(Definitions):
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
        from shmbroker.broadcasting import consumer_of

        return self._adopt(consumer_of(self, check_group(group), subscriptions, **settings))

    def push_consumer(
        self, group: str, listener: Listener, subscriptions: Mapping[str, str | Sql], **settings: Any
    ) -> PushConsumer:
        """Threads that call ``listener`` with each message and a context. ``subscriptions``: as ``simple_consumer``."""
        from shmbroker.push_consumer import PushConsumer

        consumer = PushConsumer(self, check_group(group), listener, subscriptions, **settings)
        self._listening.add(consumer)
        return consumer

    def pull_consumer(self, group: str, **settings: Any) -> PullConsumer:
        """A consumer that reads queues from positions of its own; see ``PullConsumer``."""
        from shmbroker.pull_consumer import PullConsumer

        return self._adopt(PullConsumer(self, group, **settings))

    def dead_letters(self, group: str) -> DeadLetters:
        """The group's dead letters, to be read, sent again or given up. Raises TopicNotExist if it never had any."""
        from shmbroker.dead_letters import DeadLetters

        return self._adopt(DeadLetters(self, group))

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
