"""Waiting for a condition with a deadline: the only way in which a test waits."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Final, TypeVar

DEADLINE: Final = 15.0
_LOOK_SECONDS: Final = 0.002
_TRIES: Final = 5

Value = TypeVar("Value")


def wait_until(predicate: Callable[[], Value], what: str, deadline: float = DEADLINE) -> Value:
    """Return the first true value of ``predicate``; AssertionError naming ``what`` after ``deadline`` seconds."""
    end = time.monotonic() + deadline
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {deadline:g} s")
        select.select([], [], [], _LOOK_SECONDS)


def assert_in_time(attempt: Callable[[], float], seconds: float) -> None:
    """``attempt`` tells how long it took: less than ``seconds``, in one of five tries.

    What is always late fails; a machine that is busy with something else at the moment fails nothing.
    """
    taken: list[float] = []
    while not taken or taken[-1] >= seconds:
        assert len(taken) < _TRIES, f"promised within {seconds:g} s, took {taken}"
        taken.append(attempt())
