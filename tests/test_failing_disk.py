"""The kernel refuses a write or a sync of a running flusher: nothing is acknowledged that is not on the disk.

What the failpoints of tests/test_flusher.py only stand for happens here: strace makes the system call itself fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.running import QUICK, receive_all, running, starts_of, worker_pid
from support.system_calls import failing

import shmbroker
from shmbroker import Message, SendStatus

SYNC = {**QUICK, "flush_disk_type": "SYNC_FLUSH", "sync_flush_timeout": 10.0}
SMALL, LARGE = 100, 150_000  # what is written past the page cache, and what goes through it (store/direct_write.py)
STORE_OK = 0


def message(number: int, size: int) -> Message:
    return Message("orders", b"%d %s" % (number, bytes(size)))


@pytest.mark.parametrize(
    ("injection", "size"),
    [
        ("pwritev2,pwrite64:error=EIO:when=3+", SMALL),
        ("pwritev2,pwrite64:error=EIO:when=3", SMALL),  # once: the kernel says so once, and takes the pages for clean
        ("pwrite64:error=EIO:when=3+", LARGE),
        ("fdatasync:error=EIO:when=3+", LARGE),
        ("fdatasync:error=EIO:when=3", LARGE),
        ("fdatasync:error=ENOSPC:when=3", LARGE),
    ],
)
def test_what_was_acknowledged_before_the_disk_failed_is_delivered_by_the_next_broker(
    tmp_path: Path, injection: str, size: int
) -> None:
    with running(tmp_path / "b", **SYNC) as broker, broker.producer("test") as producer:
        assert producer.send(message(0, size)).status is SendStatus.SEND_OK
        acknowledged = 1
        with failing(injection, worker_pid(broker, "flusher"), tmp_path / "calls"):
            while producer.send(message(acknowledged, size)).status is SendStatus.SEND_OK:
                acknowledged += 1
                assert acknowledged < 50, "the disk does not fail"
            assert broker.region.get("flushed") < broker.region.get("tail")
            with pytest.raises(shmbroker.StoreReadOnly, match=r"errno (5|28)"):
                producer.send(message(99, size))
            assert starts_of(broker, "flusher") == 1, "it lives on, so that status and readers do"
    with running(tmp_path / "b", **SYNC) as broker:
        # The one that timed out is stored, the refused one is not.
        assert sorted(receive_all(broker, acknowledged + 1)) == list(range(acknowledged + 1))


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_write_for_which_there_is_no_room_is_tried_again(tmp_path: Path, size: int) -> None:
    with running(tmp_path / "b", **SYNC) as broker, broker.producer("test") as producer:
        assert producer.send(message(0, size)).status is SendStatus.SEND_OK
        with failing("pwritev2,pwrite64:error=ENOSPC:when=1", worker_pid(broker, "flusher"), tmp_path / "calls"):
            assert producer.send(message(1, size)).status is SendStatus.SEND_OK
        assert (tmp_path / "calls").read_text().count("ENOSPC") >= 1  # of either call once
        assert broker.region.get("store_state") == STORE_OK
        assert sorted(receive_all(broker, 2)) == [0, 1]
