"""The model of a PROGRESS record's body (R14): what the native core writes and merges (``_native/claim_progress.c``).

     0        4        8     10      12       16       24       28
     +--------+--------+-----+-------+--------+--------+--------+--------+
     | group  | topic  |queue|version| reset  | base   | runs   | 0      |
     +--------+--------+-----+-------+--------+--------+--------+--------+
  32 | first           | count  | attempts | kind |   ... as many as runs says
     +-----------------+--------+----------+------+

All little-endian, as ``_native/layout.h`` draws it at ``sb_progress``. Runs are sorted by offset and disjoint.
Below ``base`` everything is acknowledged but the UNACKED runs (claims that outlived their window); from ``base`` on
nothing is but the ACKED runs, and UNACKED runs tell the attempts of what was delivered.

Two bodies about the same queue merge: the larger base, whatever either calls acknowledged, the larger number of
attempts; a larger reset generation replaces a smaller one. So replaying records in any order, or twice, ends alike.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

PROGRESS_VERSION: Final = 1
_HEADER: Final = struct.Struct("<IIHHIQII")
_RUN: Final = struct.Struct("<QIHH")


class RunKind(enum.IntEnum):
    """What a run of consecutive offsets has in common."""

    ACKED = 1
    UNACKED = 2


class Run(NamedTuple):
    """``length`` offsets from ``first`` on. ``attempts``: deliveries made so far, 0 for ACKED."""

    first: int
    length: int
    attempts: int
    kind: RunKind

    @property
    def end(self) -> int:
        """The first offset behind the run."""
        return self.first + self.length


@dataclass(frozen=True, slots=True)
class Progress:
    """The body of one PROGRESS record."""

    group_id: int
    topic_id: int
    queue_id: int
    reset_generation: int
    base: int
    runs: tuple[Run, ...] = ()

    def is_acked(self, offset: int) -> bool:
        """Whether this record says that the message at ``offset`` was acknowledged."""
        for run in self.runs:
            if run.first <= offset < run.end:
                return run.kind is RunKind.ACKED
        return offset < self.base

    def attempts(self, offset: int) -> int:
        """Deliveries of the message at ``offset`` so far; 0 if it is acknowledged or was never delivered."""
        return next((run.attempts for run in self.runs if run.first <= offset < run.end), 0)

    def encode(self) -> bytes:
        """The body. Raises ValueError if the runs contradict each other or a number does not fit its field."""
        _check_runs(self.base, self.runs)
        try:
            header = _HEADER.pack(
                self.group_id, self.topic_id, self.queue_id, PROGRESS_VERSION, self.reset_generation, self.base,
                len(self.runs), 0,
            )  # fmt: skip
            return header + b"".join(_RUN.pack(*run) for run in self.runs)
        except struct.error as error:
            raise ValueError(f"a number does not fit its field: {error}") from None


def decode_progress(body: bytes) -> Progress:
    """Read a body. Raises ValueError that says what is wrong with it."""
    if len(body) < _HEADER.size:
        raise ValueError(f"{len(body)} bytes are no progress record: its header alone has {_HEADER.size}")
    group_id, topic_id, queue_id, version, reset, base, count, _ = _HEADER.unpack_from(body)
    if version != PROGRESS_VERSION:
        raise ValueError(f"a progress record of version {version}; this build reads {PROGRESS_VERSION}")
    if len(body) != _HEADER.size + count * _RUN.size:
        raise ValueError(f"{count} runs need {_HEADER.size + count * _RUN.size} bytes, here are {len(body)}")
    runs = tuple(
        Run(first, size, attempts, RunKind(kind))  # an unknown kind is a ValueError, too
        for first, size, attempts, kind in _RUN.iter_unpack(body[_HEADER.size :])
    )
    _check_runs(base, runs)
    return Progress(group_id, topic_id, queue_id, reset, base, runs)


def _check_runs(base: int, runs: tuple[Run, ...]) -> None:
    behind = 0
    for run in runs:
        if run.length < 1 or run.first < behind:
            raise ValueError(f"{run} overlaps the run before it, is out of order, or is empty")
        if run.kind is RunKind.ACKED and (run.first < base or run.attempts):
            raise ValueError(f"{run}: acknowledged offsets are named from the base {base} on only, without attempts")
        behind = run.end
