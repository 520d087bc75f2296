"""Taking back a delayed message before it fires.

A caller decides as the scheduler does (delivery/firing.py): it reads ``timer_turn``, then what became of the timer,
from the index and from the log behind it, and appends a RECALL record if it is pending and the word has not moved
meanwhile. So of a recall and a fire at one moment one is first in the log, and the other sees it and does nothing.
Killed before the append nothing has happened; killed behind it the message is recalled, and a second recall says so.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from shmbroker.delivery.dispatch import Source
from shmbroker.delivery.firing import TimerScan, scan_timers
from shmbroker.errors import BadRequest, BrokerBusy, PositionGone
from shmbroker.failpoint import failpoint
from shmbroker.record import RecordKind
from shmbroker.store.timer_index import Known, reading

if TYPE_CHECKING:
    from shmbroker._native._core import Client, Region
    from shmbroker.log_files import LogFiles
    from shmbroker.store.serving_reader import ServingReader

_HANDLE_DIGITS: Final = 64


class RecallHome(Protocol):
    """What a recall asks of the broker handle."""

    files: LogFiles

    def attach(self) -> Client:
        """This process's attachment to the running broker."""


class Handle(NamedTuple):
    """Which message a recall is about: what ``SendResult.recall_handle`` says."""

    origin: int  # position of the first TIMER record
    due: int
    incarnation: int
    sequence: int

    @staticmethod
    def parse(text: str) -> Handle:
        """Raises BadRequest."""
        try:
            if len(text) != _HANDLE_DIGITS:
                raise ValueError(text)
            return Handle(*(int(text[at : at + 16], 16) for at in range(0, _HANDLE_DIGITS, 16)))
        except (TypeError, ValueError):
            raise BadRequest(f"{text!r} is no recall handle: take it from the SendResult's recall_handle") from None


class _Fate(NamedTuple):
    """What became of a timer. Not pending and not recalled: it has fired, or nobody knows it."""

    pending: int | None  # position of its TIMER record
    recalled: int | None  # position that has to be durable for it


def recall(home: RecallHome, text: str, timeout: float, durable_timeout: float) -> bool:
    """True: the message will not fire, ever. False: it has fired, or there is no such message.

    Raises BadRequest (no handle), BrokerBusy (lock or disk took longer than the timeouts; ask again), StoreFull,
    StoreReadOnly, BrokerClosed, CorruptLog (what became of it cannot be read).
    """
    handle = Handle.parse(text)
    deadline = time.monotonic() + timeout
    while True:
        client = home.attach()
        region = client.region
        turn = region.get("timer_turn")  # first: who has moved it has published what he decided
        fate = _fate_of(home, region, handle)
        if fate.pending is None and fate.recalled is None:
            return False
        end = fate.recalled
        if fate.pending is not None:
            failpoint("recall.before_append")
            end = client.recall(fate.pending, turn, int(max(0.0, deadline - time.monotonic()) * 1e9))
            failpoint("recall.after_append")
        if end is not None:
            return _settled(client, end, durable_timeout)
        if time.monotonic() >= deadline:
            raise BrokerBusy("recalling a message: other timers fire or are recalled without pause; ask again")


def _settled(client: Client, end: int, timeout: float) -> bool:
    """Under SYNC_FLUSH a recall is as durable as a send: not even a power cut brings the message back."""
    if client.region.get("sync_flush") and not client.wait_flushed(end, int(timeout * 1e9)):
        raise BrokerBusy(
            "the recall is in the log, but was not on the disk in time: the message will not fire unless the machine "
            "fails now. Ask again to wait on"
        )
    return True


def _fate_of(home: RecallHome, region: Region, handle: Handle) -> _Fate:
    while True:
        kept = region.get("kept")  # before the index is asked: what it does not know then lies behind
        known = _ask_index(home, handle)
        start = max(kept, known.position)
        log = home.files.open_log()
        try:
            return _read_fate(region, log, handle, known, start)
        except PositionGone:  # retention was faster; the index knows by now what was there
            continue
        finally:
            log.close()


def _ask_index(home: RecallHome, handle: Handle) -> Known:
    with reading(*home.files.timers) as index:
        if index is None:  # not yet: then the log says everything
            return Known(0, None, recalled=False)
        return index.know(handle.origin, handle.due)


def _read_fate(region: Region, log: ServingReader, handle: Handle, known: Known, start: int) -> _Fate:
    source = Source(region, log, scan_timers)
    pending = known.timer.position if known.timer is not None else None
    recalled = 0 if known.recalled else None
    position, epoch, tail = start, 0, region.get("tail")
    while position < tail:
        found = source.scan(position, tail, epoch or source.epoch_at(position))
        for at, kind, timer, first, second in found.events:
            if kind == RecordKind.TIMER:
                pending = at if at == handle.origin else pending
            elif timer == pending:
                pending = second or None if kind == RecordKind.FIRED else None
                recalled = first if kind == RecordKind.RECALL else recalled
        position, epoch = found.end, found.epoch
    if pending is not None and not _is_of(source, pending, handle):
        return _Fate(None, None)
    return _Fate(pending, recalled)


def _is_of(source: Source[TimerScan], position: int, handle: Handle) -> bool:
    """Another message may lie there now: a power cut has taken the log's end, and with it what the handle names."""
    record = source.record(position)
    return (record.incarnation, record.sequence) == (handle.incarnation, handle.sequence)
