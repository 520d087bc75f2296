"""Instants as people write them on a command line: a date, seconds since 1970, or how long ago."""

from __future__ import annotations

import time
from datetime import datetime

import click

from shmbroker.delays import parse_delay
from shmbroker.errors import ConfigError


def instant(text: str) -> float:
    """Seconds since 1970. Raises BadParameter, also for what is still to come."""
    seconds = _seconds(text)
    if seconds * 1e9 > time.time_ns():
        raise click.BadParameter(f"{text!r}: lies in the future, where there are no messages yet")
    return seconds


def _seconds(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()  # without a time zone: local time
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return time.time_ns() / 1e9 - parse_delay(text)
    except ConfigError:
        raise click.BadParameter(
            f"{text!r}: a time as in 2026-11-21T10:00, seconds since 1970, or how long ago, as in 2h"
        ) from None


def beginning(text: str) -> str | float:
    """``first``, ``last``, or an instant."""
    return text if text in ("first", "last") else instant(text)
