"""What the demo's processes write down, and the verdict found in it by comparing contents.

Every process appends to a file of its own, in pieces that survive its death: a sender after its sends were answered, a
receiver before and after each ack. Nobody's memory and no counter decides; the verdict reads the files.

    *.sent   started_ns number status duplicate latency_ns        one line for each answered send
    *.got    R received_ns message_id attempt latency_ns body     a delivery, written before its ack
             A acked_ns count                                     the ack of the ``count`` deliveries above it returned

Stamps are nanoseconds of the monotonic clock, which all processes of a host share. ``body`` is the line's number, a
blank, and the line itself.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self


class History:
    """Append-only file of one process. ``note`` collects, ``write`` hands all of it to the kernel in one call."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._lines: list[bytes] = []
        self.note = self._lines.append

    def write(self) -> None:
        """After this a kill -9 loses nothing of what was noted: the page cache belongs to the kernel."""
        if self._lines:
            data = b"".join(self._lines)
            while data:
                data = data[os.write(self._file, data) :]
            self._lines.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()
        os.close(self._file)


class Sent(NamedTuple):
    started_ns: int
    number: int
    status: str
    duplicate: bool
    latency_ns: int


class Delivery(NamedTuple):
    """``acked_ns`` is 0 if no ack of this delivery is known to have returned."""

    received_ns: int
    message_id: bytes
    attempt: int
    latency_ns: int
    body: bytes
    acked_ns: int


def sent_line(started_ns: int, number: int, status: str, duplicate: bool, latency_ns: int) -> bytes:
    return b"%d %d %s %d %d\n" % (started_ns, number, status.encode(), duplicate, latency_ns)


def received_line(received_ns: int, message_id: str, attempt: int, latency_ns: int, body: bytes) -> bytes:
    return b"R %d %s %d %d %s\n" % (received_ns, message_id.encode(), attempt, latency_ns, body)


def acked_line(acked_ns: int, count: int) -> bytes:
    return b"A %d %d\n" % (acked_ns, count)


def body_of(number: int, line: bytes) -> bytes:
    return b"%d %s" % (number, line)


def read_sent(path: Path) -> Iterator[Sent]:
    for line in _whole_lines(path):
        started, number, status, duplicate, latency = line.split(b" ")
        yield Sent(int(started), int(number), status.decode(), duplicate == b"1", int(latency))


def read_deliveries(path: Path) -> Iterator[Delivery]:
    """The deliveries of one receiver in order, each with the time of its ack."""
    open_deliveries: list[Delivery] = []
    for line in _whole_lines(path):
        if line.startswith(b"A "):
            _, acked, count = line.split(b" ")
            if int(count) != len(open_deliveries):
                raise ValueError(
                    f"{path}: an ack of {count.decode()} deliveries follows {len(open_deliveries)} of them"
                )
            yield from (delivery._replace(acked_ns=int(acked)) for delivery in open_deliveries)
            open_deliveries = []
        else:
            _, received, message_id, attempt, latency, body = line.split(b" ", 5)
            open_deliveries.append(Delivery(int(received), message_id, int(attempt), int(latency), body, 0))
    yield from open_deliveries


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Without the last, if its writer was killed within it."""
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield line[:-1]


@dataclass(slots=True)
class Verdict:
    """What became of the lines. ``examples`` has the first few line numbers of each fault."""

    lines: int
    sent: Counter[str] = field(default_factory=Counter)  # by status; DUPLICATE: answered with the first send's result
    delivered: int = 0  # lines of which a delivery, unaltered, was acknowledged
    deliveries: int = 0
    redelivered: int = 0  # deliveries that the broker marked as a further attempt
    lost: int = 0  # the other lines: never received, or received by somebody who died before his ack, and not again
    altered: int = 0  # bodies that no sender sent
    duplicated: int = 0  # lines stored twice, or delivered again after the ack of an earlier delivery had returned
    lag: int = 0  # messages that the broker still has for the group
    examples: dict[str, list[int]] = field(default_factory=dict)
    began_ns: int = 0
    ended_ns: int = 0
    send_latencies_ns: array[int] = field(default_factory=lambda: array("q"), repr=False)
    delivery_latencies_ns: array[int] = field(default_factory=lambda: array("q"), repr=False)

    @property
    def good(self) -> bool:
        return not (self.lost or self.altered or self.duplicated or self.lag)

    @property
    def seconds(self) -> float:
        """From the first send to the last ack."""
        return max(0, self.ended_ns - self.began_ns) / 1e9

    def _example(self, kind: str, number: int) -> None:
        some = self.examples.setdefault(kind, [])
        if len(some) < 5:
            some.append(number)


def judge(lines: Sequence[bytes], directory: Path) -> Verdict:
    """Compare what was to be sent, ``lines``, with the histories in ``directory``."""
    verdict = Verdict(len(lines))
    for path in sorted(directory.glob("*.sent")):
        _count_sends(verdict, path)
    receivers = sorted(directory.glob("*.got"))
    arrivals = bytearray(len(lines))  # 0, 1, or 2 for several
    acked = bytearray(len(lines))
    for path in receivers:
        _count_deliveries(verdict, lines, path, arrivals, acked)
    for number, done in enumerate(acked):
        if not done:
            verdict.lost += 1
            verdict._example("lost", number)
    verdict.delivered = verdict.lines - verdict.lost
    _count_duplicates(verdict, receivers, {number for number, count in enumerate(arrivals) if count == 2})
    return verdict


def _count_sends(verdict: Verdict, path: Path) -> None:
    for sent in read_sent(path):
        verdict.sent["DUPLICATE" if sent.duplicate else sent.status] += 1
        verdict.send_latencies_ns.append(sent.latency_ns)
        verdict.began_ns = min(verdict.began_ns or sent.started_ns, sent.started_ns)


def _count_deliveries(
    verdict: Verdict, lines: Sequence[bytes], path: Path, arrivals: bytearray, acked: bytearray
) -> None:
    for delivery in read_deliveries(path):
        verdict.deliveries += 1
        verdict.redelivered += delivery.attempt > 1
        verdict.delivery_latencies_ns.append(delivery.latency_ns)
        verdict.ended_ns = max(verdict.ended_ns, delivery.acked_ns)
        number = _number_of(delivery.body)
        if 0 <= number < len(lines) and delivery.body == body_of(number, lines[number]):
            arrivals[number] = min(2, arrivals[number] + 1)
            acked[number] |= delivery.acked_ns > 0
        else:
            verdict.altered += 1
            verdict._example("altered", number)


def _count_duplicates(verdict: Verdict, receivers: Sequence[Path], repeated: set[int]) -> None:
    """Look again, now only at lines that arrived several times: a redelivery before any ack is a promise kept."""
    deliveries: dict[int, list[Delivery]] = {number: [] for number in repeated}
    for path in receivers:
        for delivery in read_deliveries(path):
            if (number := _number_of(delivery.body)) in deliveries:
                deliveries[number].append(delivery)
    for number, some in sorted(deliveries.items()):
        first_ack = min((delivery.acked_ns for delivery in some if delivery.acked_ns), default=None)
        stored_twice = len({delivery.message_id for delivery in some}) > 1
        acked_twice = sum(delivery.acked_ns > 0 for delivery in some) > 1
        after_ack = first_ack is not None and any(delivery.received_ns > first_ack for delivery in some)
        if stored_twice or acked_twice or after_ack:
            verdict.duplicated += 1
            verdict._example("duplicated", number)


def _number_of(body: bytes) -> int:
    """-1 if the body does not begin with a number."""
    number = body.partition(b" ")[0]
    return int(number) if number.isdigit() else -1
