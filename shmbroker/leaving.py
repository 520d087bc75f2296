"""How processes leave: an exit code that says what it means. Commands and workers each have a table of their own."""

from __future__ import annotations

from enum import IntEnum
from typing import Self


class MeantCode(IntEnum):
    """A table of exit codes, each with its meaning; docs/operations.md has the same tables."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> Self:
        made = int.__new__(cls, code)
        made._value_ = code
        made.meaning = meaning
        return made
