"""PushConsumer: threads that take messages to a listener.

What happens to a message between its claim and its answer is native (``_native/push.pxi``); here are the threads, their
life, and what is said when something goes wrong. A listener thread claims its own messages when it has none left, one
thread of the consumer at a time, so that no thread hands anything to another.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from types import FrameType
from typing import Any, Final

from shmbroker import listening
from shmbroker._native._core import ConsumeContext, Lane, PushCore, ReceivedMessage
from shmbroker.broadcasting import CLUSTERING, consumer_of
from shmbroker.consumer import ConsumerHome, SimpleConsumer
from shmbroker.errors import BadRequest, BrokerClosed, ForkedHandleError, ShmBrokerError
from shmbroker.handle import Handle
from shmbroker.message import wrong_type
from shmbroker.orderly import OrderlyMember
from shmbroker.selector import Sql
from shmbroker.status import ConsumeOrderlyStatus, ConsumeStatus

logger = logging.getLogger("shmbroker.push_consumer")

Listener = Callable[[Any, ConsumeContext], ConsumeStatus | ConsumeOrderlyStatus | None]

KIB: Final = 1024
MIB: Final = KIB * KIB
TIMEOUT_MAX: Final = 12 * 3600.0
WAIT_SECONDS: Final = 1.0  # for messages, until a thread looks around
PAUSE_SECONDS: Final = 1.0  # after an error that is not a listener's (RocketMQ's figure)
RENEWAL_LOOKS: Final = 6  # in one consume_timeout; a claim is renewed when a third of its time is left
RENEWAL_LOOK_MIN_SECONDS: Final = 0.01
WINDOW_SHARE: Final = 4  # at most this part of a group's claim window is prefetched by one consumer

# What its own settings leave, it passes on.
_OF_THE_CONSUMER: Final = {*(SimpleConsumer.__init__.__kwdefaults__ or ()), *(consumer_of.__kwdefaults__ or ())}


class PushConsumer(Handle, PushCore):
    """Calls a listener with each message, in threads of its own, until it is shut down. Of no use after a fork.

    Any number of push consumers and simple ones, in any number of processes, share a group's messages. The listener is
    called with a message, or with a list of one queue's if ``consume_message_batch_max_size`` is more than one, and a
    ``ConsumeContext``. It answers with a ``ConsumeStatus``; an exception, or anything else, counts as RECONSUME_LATER
    and is logged.

    A message is a delivery from the call of the listener on: what is only prefetched goes back uncounted when its
    process dies, and other members take it over when they have nothing to do. The listener has ``consume_timeout``
    seconds, ``max_renewals`` times more while its process lives (None: for ever). After that the message is delivered
    to another, and the late answer is refused and reported.

    Raises what ``SimpleConsumer`` raises.
    """

    def __init__(
        self,
        home: ConsumerHome,
        group: str,
        listener: Listener,
        subscriptions: Mapping[str, str | Sql],
        *,
        consume_thread_max: int = 20,
        consume_message_batch_max_size: int = 1,
        pull_batch_size: int = 32,
        pull_batch_size_in_bytes: int = 256 * KIB,
        pull_threshold_for_queue: int = 1000,
        pull_threshold_size_for_queue: int = 100 * MIB,
        consume_timeout: float = 900.0,
        max_renewals: int | None = 11,
        await_termination: float = 30.0,
        orderly: bool = False,
        suspend_current_queue_time: float = 1.0,
        **settings: Any,
    ) -> None:
        if unknown := settings.keys() - _OF_THE_CONSUMER:
            known = ", ".join(sorted({*(PushConsumer.__init__.__kwdefaults__ or ()), *_OF_THE_CONSUMER} - {"spin"}))
            raise TypeError(f"push_consumer() got an unexpected keyword argument {min(unknown)!r}; there are {known}")
        if not callable(listener):
            raise BadRequest(f"listener = {listener!r}: must be callable with a message and a ConsumeContext")
        if is_coroutine_function(listener):
            raise BadRequest(
                f"listener = {listener!r}: is a coroutine function, which nobody would await here: "
                "shmbroker.aio has the push_consumer for it, or write it with def"
            )
        _check_count("consume_thread_max", consume_thread_max, 1000)
        _check_count("consume_message_batch_max_size", consume_message_batch_max_size, 1024)
        _check_count("pull_batch_size", pull_batch_size, 1024)
        _check_count("pull_batch_size_in_bytes", pull_batch_size_in_bytes, 1024 * MIB)
        _check_count("pull_threshold_for_queue", pull_threshold_for_queue, 65_535)
        _check_count("pull_threshold_size_for_queue", pull_threshold_size_for_queue, 1024 * MIB)
        _check_seconds("consume_timeout", consume_timeout, 0.01, TIMEOUT_MAX)
        _check_seconds("await_termination", await_termination, 0.0, inf)
        _check_seconds("suspend_current_queue_time", suspend_current_queue_time, 0.01, 30.0)
        if max_renewals is not None and (type(max_renewals) is not int or max_renewals < 0):
            raise BadRequest(f"max_renewals = {max_renewals!r}: must be an integer from 0 on, or None: without end")
        if "spin" in settings:
            raise BadRequest("spin: only a SimpleConsumer burns a core while it waits")
        if orderly and (settings.pop("message_model", CLUSTERING) != CLUSTERING or settings.pop("member", None)):
            raise BadRequest("orderly: the members of a group share its queues, so its message_model is CLUSTERING")
        consumer = (OrderlyMember if orderly else consumer_of)(home, group, subscriptions, **settings)
        super().__init__(
            consumer,
            listener,
            batch=consume_message_batch_max_size,
            ahead=pull_batch_size,
            ahead_bytes=pull_batch_size_in_bytes,
            queue_room=min(pull_threshold_for_queue, max(1, home.config.layout.claim_window // WINDOW_SHARE)),
            queue_bytes=pull_threshold_size_for_queue,
            consume_timeout=consume_timeout,
            suspend=suspend_current_queue_time,
        )
        self.group = group
        self.orderly = orderly
        self.await_termination = await_termination
        self.late = 0
        self.error: BaseException | None = None
        self._consumer = consumer
        self._sender = consumer._send_back
        self._pid = os.getpid()
        self._most_renewals = -1 if max_renewals is None else max_renewals
        self._look_seconds = max(RENEWAL_LOOK_MIN_SECONDS, consume_timeout / RENEWAL_LOOKS)
        self._turn = threading.Lock()  # to look for messages
        self._changed = threading.Condition()  # one of the next three
        self._paused = False
        self._stopping = False
        self._left = False  # nobody is waited for any more
        self._asked = False  # by ``stop``
        self._lanes = [Lane(group) for _ in range(consume_thread_max)]
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"{group}-{number}", daemon=True)
            for number, lane in enumerate(self._lanes, 1)
        ]
        try:
            for thread in self._threads:
                thread.start()
            if max_renewals != 0 and not orderly:  # an owner has all the time it wants
                threading.Thread(target=self._keep_renewing, name=f"{group}-renewal", daemon=True).start()
        except BaseException:  # Ctrl-C, no more threads to be had: nobody has this consumer to shut it down
            self.shutdown()
            raise

    # ---- life

    def pause(self) -> None:
        """Begin no further message until ``resume``. What runs goes on; what was prefetched goes back to the group."""
        with self._changed:
            self._paused = True
            self._call_off()
        self._clear_all()

    def resume(self) -> None:
        """Go on after ``pause``."""
        with self._changed:
            self._paused = False
            if not self._stopping:
                self._call_on()
            self._changed.notify_all()

    @property
    def paused(self) -> bool:
        """Whether ``pause`` was called last."""
        return self._paused

    def shutdown(self, await_termination: float | None = None) -> bool:
        """Begin no further message, give back what was prefetched, wait for the listeners that run, leave the group.

        Waits at most ``await_termination`` seconds, the consumer's own by default. What runs longer goes back to the
        group as a failed delivery, and its answer will be refused: then False.
        """
        deadline = time.monotonic() + (self.await_termination if await_termination is None else await_termination)
        if os.getpid() != self._pid:
            return True  # after a fork: the threads are the parent's
        with self._changed:
            self._stopping = True
            self._call_off()
            self._changed.notify_all()
        self._clear_all()
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        running = [thread.name for thread in self._threads if thread.is_alive()]
        with self._changed:
            first, self._left = not self._left, True
            self._changed.notify_all()
        if first and running:
            logger.warning(
                "group %s: %d listeners still run at the end of await_termination (%s): what they have is delivered "
                "again, and their answers will be refused", self.group, len(running), ", ".join(running[:5]),
            )  # fmt: skip
            for lane in self._lanes:  # what they have must not wait for other consumers of this process to leave
                with suppress(ShmBrokerError):  # then it has gone back already
                    self._abandon(lane)
        self._consumer.close()
        return not running

    def close(self) -> None:
        """As ``shutdown()``."""
        self.shutdown()

    def run(self) -> bool:
        """Wait for SIGTERM, SIGINT or ``stop``, then shut down; for a program, or a thread, that does nothing else.

        Returns what ``shutdown`` returns. The signals are those of the main thread; while the listeners that run are
        waited for, they mean again what they meant before. Raises the error that has ended the consumer, if one has.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._stop_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with self._changed:
                # A look now and then: a signal between the look and the sleep wakes nobody.
                while not self._changed.wait_for(lambda: self._asked or self._stopping, PAUSE_SECONDS):
                    pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        in_time = self.shutdown()
        if self.error is not None:
            raise self.error
        return in_time

    def stop(self) -> None:
        """Let ``run`` come to its end, or not begin to wait. May be called in the handler of a signal."""
        self._asked = True
        with self._changed:
            self._changed.notify_all()

    def _stop_on(self, _signum: int, _frame: FrameType | None) -> None:
        self.stop()

    # ---- a listener thread

    def _work(self, lane: Lane) -> None:
        while self._wanted():
            try:
                if lane.empty:
                    with self._turn:
                        self._fill(lane, WAIT_SECONDS)
                else:
                    self._run_lane(lane)
            except BaseException as error:
                self._recover(lane, error)
            if self._unwanted():
                self._clear(lane)
            self._lay_down(lane)
        self._clear(lane)
        self._lay_down(lane)

    def _run_lane(self, lane: Lane) -> None:
        with listening.floor.together(lane, self._unwanted) as entered:
            suspect = entered and self._run(lane, False)
        if suspect:
            with listening.floor.alone(lane, self._unwanted) as entered:
                if entered:
                    self._run(lane, True)

    def _wanted(self) -> bool:
        """Waits while the consumer is paused. False once it is stopping."""
        if self._paused:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or not self._paused)
        return not self._stopping

    def _unwanted(self) -> bool:
        return self._stopping or self._paused or self._group_paused

    def _clear(self, lane: Lane) -> None:
        """Give back what its thread has prefetched and not begun."""
        with suppress(BrokerClosed):  # then it has gone back with all that this process held
            self._give_back(lane)

    def _clear_all(self) -> None:
        """At once, whatever the threads' listeners do; a thread that prefetches at this moment clears its own lane."""
        for lane in self._lanes:
            self._clear(lane)

    def _recover(self, lane: Lane, error: BaseException) -> None:
        """Go on with the same broker or its successor. Errors of the listener have ended in ``_report_failure``."""
        self._clear(lane)
        if self._stopping:
            return
        if isinstance(error, BrokerClosed):
            try:
                with self._turn:
                    self._consumer._reattach()
                return
            except Exception as why:
                error = why
        if isinstance(error, BrokerClosed | ForkedHandleError) or not isinstance(error, Exception):
            self._fail(error)
            return
        if isinstance(error, ShmBrokerError):
            logger.warning("group %s: %s: %s. Trying again", self.group, type(error).__name__, error)
        else:
            logger.error("group %s: trying again", self.group, exc_info=error)
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, PAUSE_SECONDS)

    def _fail(self, error: BaseException) -> None:
        """Nothing can be received any more: all threads end, and ``run`` says why."""
        with self._changed:
            first, self._stopping = not self._stopping, True
            self._changed.notify_all()
        if first:
            self.error = error
            logger.error("group %s: the consumer has ended: %s: %s", self.group, type(error).__name__, error)
            self._call_off()

    # ---- the renewing thread

    def _keep_renewing(self) -> None:
        while True:
            with self._changed:  # also while the consumer waits for its listeners to return
                if self._changed.wait_for(lambda: self._left, self._look_seconds):
                    return
            for lane in self._lanes:
                with suppress(ShmBrokerError):  # the broker is being restarted: what would be renewed is lost with it
                    self._renew(lane, self._most_renewals)

    # ---- called by the native core for what is not the common case

    def _send_back(self, message: ReceivedMessage, level: int, error: str | None) -> None:
        self._sender.later(message, level=level, error=error)

    def _report_failure(self, messages: Sequence[ReceivedMessage], error: BaseException | None, result: object) -> None:
        if error is not None:
            logger.error("group %s: the listener failed with %s", self.group, _named(messages), exc_info=error)
        else:
            kind, taken_for = (
                (ConsumeOrderlyStatus, ConsumeOrderlyStatus.SUSPEND_CURRENT_QUEUE_A_MOMENT)
                if self.orderly
                else (ConsumeStatus, ConsumeStatus.RECONSUME_LATER)
            )
            logger.error(
                "group %s: the listener returned %r for %s: it must return a %s; taken for %s",
                self.group, result, _named(messages), kind.__name__, taken_for,
            )  # fmt: skip

    def _report_late(self, message: ReceivedMessage) -> None:
        self.late += 1
        logger.warning(
            "group %s: the answer for %r is refused: its time was over, and it was or will be delivered again; or its "
            "group was reset",
            self.group, message,
        )  # fmt: skip

    def _report_held(self, message: ReceivedMessage, error: BaseException) -> None:
        logger.error(
            "group %s: what was answered for %r could not be stored: %s: %s. It comes again in a few seconds",
            self.group, message, type(error).__name__, error,
        )  # fmt: skip

    def _report_unwritten(self, error: BaseException) -> None:
        logger.error("group %s: %s", self.group, error)


def is_coroutine_function(listener: object) -> bool:
    """Whether its call gives a coroutine: ``async def``, one in a ``partial``, an object whose ``__call__`` is one."""
    while isinstance(listener, partial):
        listener = listener.func
    called = type(listener).__call__ if callable(listener) else None
    return inspect.iscoroutinefunction(listener) or inspect.iscoroutinefunction(called)


def _check_count(name: str, value: object, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise BadRequest(f"{name} = {value!r}: must be an integer from 1 to {most}")


def _check_seconds(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float):
        raise wrong_type(name, "seconds, as a float or an int", value)
    if not low <= value <= high:
        raise BadRequest(f"{name} = {value!r}: must be from {low:g} to {high:g} seconds")


def _named(messages: Sequence[ReceivedMessage]) -> str:
    more = f" and {len(messages) - 1} more" if len(messages) > 1 else ""
    return f"{messages[0]!r}{more}"


__all__ = ["PushConsumer"]
