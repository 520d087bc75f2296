"""Claims as they stand in shared memory: to make one look as if whoever decides about it was stopped in the middle."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shmbroker.descriptor import read_descriptor
from shmbroker.naming import BrokerPaths

HELD_TO_MOVING: Final = 3  # exclusive or of the two states


@contextmanager
def control_words(directory: Path) -> Iterator[memoryview]:
    """The control segment of a running broker, in words of 8 bytes."""
    descriptor = read_descriptor(BrokerPaths(directory))
    assert descriptor is not None
    with (
        Path(f"/dev/shm{descriptor.control}").open("r+b") as control,
        mmap.mmap(control.fileno(), 0) as memory,
        memoryview(memory) as view,
        view.cast("Q") as words,
    ):
        yield words


def claims_in(words: memoryview, slot: int) -> list[int]:
    """Which words of the control segment are claims of client ``slot``, each the first of its message."""
    held = 1 | (slot + 1) << 2 | 1 << 14 | 1 << 22  # claim.h draws it: state, holder, attempts, generation, deadline
    return [i for i, word in enumerate(words) if word & 0xFFFF_FFFF == held and word >> 32]
