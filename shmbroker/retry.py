"""When a failed message is tried again, and how often: pure policy, no clock, no memory.

A group has one, as its definition says (``shmbroker group set-retry``), and a message may bring its own
(``Message(..., retry=RetryPolicy(...))``). Deliveries are counted however they ended: by an answer, a timeout or the
death of the process. A message gets 1 + ``max_retries`` of them; whoever would deliver it once more puts it into
``%DLQ%group`` instead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from shmbroker.delays import DELAY_MAX, format_delay
from shmbroker.errors import BadRequest

MAX_RETRIES: Final = 250  # deliveries are counted in a byte of the record and one of the claim
TABLE_MAX: Final = 32
FIRST_LEVEL: Final = 3  # RocketMQ: the first retry waits for level 3
KINDS: Final = ("levels", "exponential", "table")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long retry number 1, 2, ... waits, and how many there are. Raises BadRequest.

    ``kind``: ``"levels"``: retry n waits for delay level 2 + n of the broker's ``message_delay_level``;
    ``"exponential"``: ``initial`` seconds, then ``multiplier`` times the last, at most ``longest``; ``"table"``: the
    seconds in ``delays``, the last of them for all further retries.
    """

    kind: str = "levels"
    max_retries: int = 16
    initial: float = 5.0
    multiplier: float = 2.0
    longest: float = 7200.0
    delays: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadRequest(f"retry policy {self.kind!r}: one of {', '.join(KINDS)}")
        if type(self.max_retries) is not int or not 0 <= self.max_retries <= MAX_RETRIES:
            raise BadRequest(f"max_retries = {self.max_retries!r}: an integer from 0 to {MAX_RETRIES}")
        if not isinstance(self.delays, tuple | list):
            raise BadRequest(f"delays = {self.delays!r}: must be a tuple of seconds, not {type(self.delays).__name__}")
        named = (("initial", self.initial), ("longest", self.longest), *(("delays", delay) for delay in self.delays))
        for name, number in (("multiplier", self.multiplier), *named):
            if isinstance(number, bool) or not isinstance(number, int | float):
                wanted = "a number" if name == "multiplier" else "seconds"
                raise BadRequest(
                    f"{name} = {number!r}: must be {wanted}, as a float or an int, not {type(number).__name__}"
                )
        if self.kind == "table" and not 1 <= len(self.delays) <= TABLE_MAX:
            raise BadRequest(f"{len(self.delays)} delays in a table of retries: from 1 to {TABLE_MAX}")
        for _, seconds in named:
            if not 0.0 <= seconds <= DELAY_MAX:
                raise BadRequest(f"a retry after {seconds!r} seconds: from 0 to {DELAY_MAX:.0f}")
        if not 1.0 <= self.multiplier <= 1000.0:
            raise BadRequest(f"multiplier = {self.multiplier!r}: from 1 to 1000")

    @property
    def max_deliveries(self) -> int:
        """What a message gets, all in all."""
        return 1 + self.max_retries

    def delay(self, retry: int, levels: Sequence[float]) -> float:
        """Seconds that retry number ``retry``, from 1 on, waits. ``levels``: the broker's delay levels."""
        if self.kind == "levels":
            return level_delay(FIRST_LEVEL - 1 + retry, levels)
        if self.kind == "table":
            return self.delays[min(retry, len(self.delays)) - 1]
        seconds = self.initial
        for _ in range(retry - 1):
            if seconds >= self.longest or self.multiplier == 1.0:
                break
            seconds *= self.multiplier
        return min(seconds, self.longest)

    def encode(self) -> str:
        """As JSON, for log and memory: the same text for the same policy."""
        fields: dict[str, Any] = {"kind": self.kind, "max_retries": self.max_retries}
        if self.kind == "exponential":
            fields |= {"initial": self.initial, "multiplier": self.multiplier, "longest": self.longest}
        if self.kind == "table":
            fields["delays"] = self.delays
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    def __str__(self) -> str:
        if self.kind == "levels":
            waits = f"the delay levels from {FIRST_LEVEL} on"
        elif self.kind == "table":
            waits = " ".join(map(format_delay, self.delays))
        else:
            waits = f"{format_delay(self.initial)}, times {self.multiplier:g}, at most {format_delay(self.longest)}"
        return f"{self.max_retries} retries after {waits}"


DEFAULT_POLICY: Final = RetryPolicy()


def level_delay(level: int, levels: Sequence[float]) -> float:
    """Seconds of a delay level; one beyond the last counts as the last (RocketMQ)."""
    return levels[min(level, len(levels)) - 1]


@lru_cache(maxsize=256)
def parse_policy(text: str) -> RetryPolicy:
    """What ``encode`` gave; the default for an empty text. Raises ValueError."""
    if not text:
        return DEFAULT_POLICY
    fields = json.loads(text)
    if not isinstance(fields, dict) or not fields.keys() <= RetryPolicy.__dataclass_fields__.keys():
        raise ValueError(f"{text!r} is no retry policy")
    try:
        return RetryPolicy(**(fields | {"delays": tuple(fields.get("delays", ()))}))
    except TypeError as error:
        raise ValueError(f"{text!r} is no retry policy: {error}") from error
