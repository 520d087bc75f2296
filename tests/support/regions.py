"""A broker's memory without a broker: a Region on two anonymous files, for tests that need no workers and no log."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from shmbroker._native._core import Region

RING_BYTES = 1 << 20
LIMITS = {
    "clients": 16, "waiters": 16, "topics": 8, "queues": 32, "groups": 8, "claim_tables": 16, "claim_window": 64,
    "overflow_claims": 64, "ids": 64, "blocks": 256, "reserve_bytes": 64 << 10, "max_message_bytes": 128 << 10,
}  # fmt: skip


@contextmanager
def memory(ring_bytes: int = RING_BYTES, segment_bytes: int = 1 << 20, **limits: int) -> Iterator[Region]:
    """A formatted region in state RUNNING whose disk never fills. Shared with forked children."""
    merged = LIMITS | limits
    control_bytes, _ = Region.sizes(merged, ring_bytes)
    control, ring = os.memfd_create("control"), os.memfd_create("ring")
    try:
        os.ftruncate(control, control_bytes)
        os.ftruncate(ring, ring_bytes)
        region = Region.create(
            control, ring, merged, ring_bytes, segment_bytes, tail=0, epoch=1, instance=bytes(16), boot_id=bytes(16),
            directory=(0, 0), namespaces=(0, 0), ring_name="memfd",
        )  # fmt: skip
    finally:
        os.close(control)
        os.close(ring)
    for word in ("user_capacity", "system_capacity"):
        region.raise_to(word, 1 << 40)
    region.set("state", 2)
    try:
        yield region
    finally:
        region.close()
