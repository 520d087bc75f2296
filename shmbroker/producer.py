"""Producer: policy around the native send path (which queue, which id, when to try again, who is told).

The data path itself is ``_native/producer.pxi`` (fill, append, wait) and ``_native/append.c``.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from shmbroker._native._core import BatchResult, Client, Message, ProducerCore, SendResult, crc32c
from shmbroker.completion import Completion
from shmbroker.errors import BadRequest, BrokerClosed, TopicNotExist
from shmbroker.handle import Handle, Home
from shmbroker.message import due_ns, no_message, wrong_type
from shmbroker.naming import check_group

if TYPE_CHECKING:
    pass

Result = TypeVar("Result")
QueueSelector = Callable[[Sequence[int], Message, Any], int]

_completions = threading.RLock()  # held for a moment, to begin a producer's thread for callbacks


def _after_fork_in_child() -> None:
    global _completions  # noqa: PLW0603 - a thread that does not exist here may hold it
    _completions = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


class SendCallback(Protocol):
    """RocketMQ's SendCallback: exactly one of the two is called, once, on a thread of the producer's."""

    def on_success(self, result: SendResult) -> None:
        """The message is stored; ``result.status`` says how durably."""

    def on_exception(self, error: Exception) -> None:
        """The message is not stored."""


class ProducerHome(Home, Protocol):
    """What a producer asks of the broker handle that made it."""

    def recall(self, handle: str) -> bool:
        """As Broker.recall."""


class Producer(Handle, ProducerCore):
    """Sends messages to topics. Thread-safe; in a forked child it attaches anew with its first send (R25).

    ``send`` answers with a ``SendResult`` once the message is as durable as the broker's ``flush_disk_type`` says, or
    raises with nothing stored. ``group`` is the producer group: a name for people, and who is asked about transactions.
    """

    def __init__(self, home: ProducerHome, group: str) -> None:
        config = home.config.runtime
        super().__init__(
            home.attach(),
            check_group(group),
            send_timeout=config.send_timeout_ms / 1000,
            sync_flush_timeout=config.sync_flush_timeout_ms / 1000,
        )
        self._home = home
        self._completion: Completion | None = None
        self._completion_pid = 0  # its thread does not live on in a fork
        self._closed = False

    # ---- called by the native core for what is not the common case

    def _missing_topic(self, topic: str) -> None:
        runtime = self._home.config.runtime
        if not runtime.auto_create_topics:
            raise TopicNotExist(
                f"topic {topic!r} does not exist and auto_create_topics is off: "
                f"`shmbroker topic create {topic}` or broker.create_topic({topic!r})"
            )
        self.client.region.define_topic(topic, runtime.default_topic_queues)

    def _choose_queue(
        self,
        message: Message,
        count: int,
        selector: QueueSelector | None,
        argument: Any,
        sharding_key: str | bytes | None,
        queue_id: int | None,
    ) -> int:
        if sum(given is not None for given in (selector, sharding_key, queue_id)) != 1:
            raise BadRequest("give one of queue_id, sharding_key and selector")
        if queue_id is not None:
            return queue_id
        if sharding_key is not None:  # the same key meets the same queue in every process, for as long as queues stay
            return crc32c(_key_bytes("sharding_key", sharding_key)) % count
        if not callable(selector):
            raise wrong_type("selector", "a function of the queues, the message and the argument", selector)
        return selector(range(count), message, argument)

    def _dedup_id(self, message: Message, dedup_key: str | bytes) -> tuple[int, int]:
        """The id that this key gives to the message: whoever sends with it, the id is the same (R17)."""
        key = _key_bytes("dedup_key", dedup_key)
        if not key:
            raise BadRequest("an empty dedup_key")
        digest = hashlib.blake2b(message.topic.encode() + b"\0" + key, digest_size=16).digest()
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")

    def _due_ns(self, message: Message, now_ns: int) -> int:
        return due_ns(message, now_ns, self._home.config.runtime.delay_levels)

    def _recall(self, handle: str) -> bool:
        return self._home.recall(handle)

    def _attach_again(self) -> Client:
        return self._home.attach()

    def _read_log(self, position: int) -> bytes:
        return self._home.files.read_log(position)

    def _send_again(self, send: Callable[[float], Result], timeout: float | None) -> Result:
        """The broker this producer was attached to has stopped: attach to its successor and send, with nothing stored
        by the failed try (retry_times_when_send_failed), all within the one send timeout."""
        runtime = self._home.config.runtime
        deadline = time.monotonic() + (runtime.send_timeout_ms / 1000 if timeout is None else timeout)
        for tries_left in range(runtime.retry_times_when_send_failed, 0, -1):
            if self._closed:
                break
            self._rebind(self._home.attach_serving(max(0.0, deadline - time.monotonic())))
            try:
                return send(max(0.0, deadline - time.monotonic()))
            except BrokerClosed:
                if tries_left == 1 or time.monotonic() >= deadline:
                    raise
        raise BrokerClosed("this producer was closed" if self._closed else "the broker has stopped")

    # ---- sending

    def send_async(
        self,
        message: Message,
        callback: SendCallback | None = None,
        timeout: float | None = None,
        *,
        selector: QueueSelector | None = None,
        argument: Any = None,
        sharding_key: str | bytes | None = None,
        queue_id: int | None = None,
        dedup_key: str | bytes | None = None,
    ) -> None:
        """Append now; tell ``callback``, in the order of a thread's sends, when the message is as durable as promised.

        Waits for room in the ring, for a broker that restarts, and for callbacks to return if very many are due; at
        most ``timeout`` seconds. Raises BadRequest and TypeError, and BrokerBusy if no callback has returned; the rest
        (NotReady too) reaches ``on_exception``.
        """
        if not isinstance(message, Message):
            raise no_message("message", message)
        if callback is not None and not (hasattr(callback, "on_success") and hasattr(callback, "on_exception")):
            raise BadRequest(f"callback = {callback!r}: an object with the methods on_success and on_exception")
        self._completion_of_this_process().send(
            lambda left: self._store_only(message, left, selector, argument, sharding_key, queue_id, dedup_key),
            callback,
            self.send_timeout_ns / 1e9 if timeout is None else timeout,
            self.sync_flush_timeout_ns if message.wait_store_ok else 0,
        )

    def _completion_of_this_process(self) -> Completion:
        with _completions:
            if self._completion is None or self._completion_pid != os.getpid():
                self._completion = Completion(self._settle)
                self._completion_pid = os.getpid()
                weakref.finalize(self, self._completion.end)  # a producer that is dropped leaves no thread behind
            completion = self._completion
        if self._closed:  # perhaps just now, by a signal handler
            completion.end()
        return completion

    # ---- life

    def close(self) -> None:
        """Wait for the callbacks of what was sent, and refuse further sends. The broker goes on.

        From a signal handler that has interrupted a ``send_async`` of this producer it does not wait: that send ends,
        and its callback is called, after the handler.
        """
        with _completions:  # no send_async begins another one behind us
            self._closed = True
            completion = self._completion if self._completion_pid == os.getpid() else None
        if completion is not None:
            completion.close()
        self._shut()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<{type(self).__name__} of group {self.group!r} in {str(self._home.directory)!r}, {state}>"


def _key_bytes(name: str, key: object) -> bytes:
    if isinstance(key, str):
        return key.encode()
    if isinstance(key, bytes | bytearray | memoryview):
        return bytes(key)
    raise wrong_type(name, "a str or bytes", key)


__all__ = ["BatchResult", "Message", "Producer", "QueueSelector", "SendCallback", "SendResult"]
