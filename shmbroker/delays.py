"""Delays as people write them: ``"1s 5s 10m 2h"``, RocketMQ's ``messageDelayLevel``."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from shmbroker.errors import ConfigError

DELAY_MAX: Final = 40 * 86_400.0
LEVELS_MAX: Final = 64
DEFAULT_LEVELS: Final = "1s 5s 10s 30s 1m 2m 3m 4m 5m 6m 7m 8m 9m 10m 20m 30m 1h 2h"
_DELAY: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def parse_delay(text: str) -> float:
    """Seconds of ``"500ms"``, ``"10s"``, ``"1.5m"``, ``"2h"`` or ``"1d"``. Raises ConfigError."""
    match = _DELAY.fullmatch(text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else -1.0
    if not 0.0 <= seconds <= DELAY_MAX:
        raise ConfigError(f"delay {text!r}: a number and ms, s, m, h or d, at most {DELAY_MAX / 86_400:g}d")
    return seconds


@lru_cache
def parse_delay_levels(text: str) -> tuple[float, ...]:
    """Seconds of the levels 1, 2, ... of ``"1s 5s 10s"``. Raises ConfigError."""
    levels = tuple(parse_delay(word) for word in text.split())
    if not 1 <= len(levels) <= LEVELS_MAX:
        raise ConfigError(f"{len(levels)} delay levels: from 1 to {LEVELS_MAX}, separated by blanks")
    return levels


def format_delay(seconds: float) -> str:
    """The shortest of the spellings that ``parse_delay`` reads."""
    for unit in ("d", "h", "m", "s"):
        if seconds and seconds % _UNITS[unit] == 0:
            return f"{seconds / _UNITS[unit]:g}{unit}"
    return f"{seconds:g}s" if seconds >= 1 or not seconds else f"{seconds * 1000:g}ms"
