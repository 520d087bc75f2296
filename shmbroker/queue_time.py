"""Where in a queue an instant is: for groups that begin at one, or are set back to one.

A record tells when its message was sent, not when it was stored. In one queue the two orders agree, but for messages
of several producers, one of which had to wait for room; and for delayed messages and retries, which tell nothing here:
they are stored long after they were sent. A search looks at their neighbours.
"""

from __future__ import annotations

import struct
import time
from datetime import datetime
from typing import TYPE_CHECKING, Final, TypeAlias

from shmbroker._native._core import decode_record
from shmbroker.errors import BadRequest, BrokerBusy, CorruptLog, PositionGone

if TYPE_CHECKING:
    from shmbroker._native._core import Record, Region
    from shmbroker.log_files import LogFiles

ConsumeFrom: TypeAlias = "str | float | datetime"

BEHIND_THE_LAST: Final = 2**64 - 1  # SB_NO_OFFSET
_DISPATCH_TIMEOUT_NS: Final = 5_000_000_000
_ENTRY: Final = struct.Struct("<QII")  # of a consume queue
_LATE: Final = 16  # SB_FLAG_LATE
_LOOKS: Final = 64  # at neighbours, for one that tells when it was stored


def instant_ns(name: str, value: object) -> int:
    """Seconds since 1970, or a datetime (without a time zone: local time), as nanoseconds.

    Raises BadRequest, also for what is still to come: nobody knows where in the queue that will be.
    """
    seconds = value.timestamp() if isinstance(value, datetime) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 2**33:
        raise BadRequest(f"{name} = {value!r}: must be seconds since 1970, or a datetime")
    if seconds * 1e9 > time.time_ns():
        raise BadRequest(f"{name} = {value!r}: lies in the future, where there are no messages yet")
    return int(seconds * 1e9)


def check_consume_from(value: object) -> str | int:
    """``"first"``, ``"last"``, or an instant as nanoseconds. Raises BadRequest."""
    if value in ("first", "last"):
        return str(value)
    if isinstance(value, str):
        raise BadRequest(f"consume_from = {value!r}: must be 'first', 'last', seconds since 1970 or a datetime")
    return instant_ns("consume_from", value)


class QueueTimes:
    """The queues of a running broker by time, as far as there were messages when this was made."""

    def __init__(self, region: Region, files: LogFiles) -> None:
        """Wait until the consume queues have all that was sent before this call. Raises BrokerBusy."""
        self._region = region
        self._files = files
        if not region.wait_for("dispatched", region.get("tail"), _DISPATCH_TIMEOUT_NS):
            raise BrokerBusy(
                f"the consume queues were not up to date within {_DISPATCH_TIMEOUT_NS / 1e9:g} s: the disk is slow, or "
                "the dispatcher is stopped (`shmbroker status` shows which). Try again later"
            )

    def first_since(self, topic_id: int, queue_id: int, first: int, end: int, born_ns: int) -> int:
        """The offset in [first, end] that a group begins at to get what was stored at that instant or later.

        What does not tell its time is got, unless an older message stands behind it. Damage tells nothing.
        """
        low, high = first, end
        while low < high:
            middle = (low + high) // 2
            found = self._telling(topic_id, queue_id, middle, high)
            if found is None or found[1] >= born_ns:
                high = middle
            else:
                low = found[0] + 1
        return low

    def _telling(self, topic_id: int, queue_id: int, offset: int, end: int) -> tuple[int, int] | None:
        """Offset and time of the first message in [offset, end) that tells when it was stored; else of the first."""
        packed = self._files.read_entries(topic_id, queue_id, offset, min(_LOOKS, end - offset))
        first = None
        for at, (position, size, _) in enumerate(_ENTRY.iter_unpack(packed), offset):
            record = self._record(position) if size else None
            if record is None:
                continue
            if not record.flags & _LATE:
                return at, record.born_ns
            first = first or (at, record.born_ns)
        return first

    def _record(self, position: int) -> Record | None:
        raw = self._region.read_raw(position)
        try:
            return decode_record(self._files.read_log(position) if raw is None else raw, position)
        except (CorruptLog, PositionGone):
            return None
