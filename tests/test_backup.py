"""The remedy for a disk that failed: a backup of the running broker has also what only its memory has."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.command import shmbroker as shmbroker_command
from support.command import shmbroker_json
from support.running import running, worker_pid

import shmbroker
from shmbroker import Message
from shmbroker.tools.exit_codes import ExitCode


@pytest.mark.parametrize("flushes", [1, 15])
def test_a_backup_of_a_read_only_store_has_every_acknowledged_message(
    directory: Path, tmp_path: Path, flushes: int
) -> None:
    """The disk fails at the first flush, or at a later one; SEND_OK of ASYNC_FLUSH does not speak of the disk."""
    copy = tmp_path / "copy"
    sent: list[int] = []
    failing = f"flusher/flusher.before_fdatasync=errno:EIO@{flushes}+"
    settings: dict[str, Any] = {"flush_interval": 0.02, "flush_least_bytes": 64 << 10}
    with running(directory, failing, **settings) as broker, broker.producer("p") as producer:
        worker_pid(broker, "dispatcher")
        with suppress(shmbroker.StoreReadOnly, shmbroker.BrokerBusy):
            while len(sent) < 3000:
                producer.send(Message("orders", b"%d " % len(sent) + bytes(20_000)))
                sent.append(len(sent))
        flushed, tail = broker.region.get("flushed"), broker.region.get("tail")
        answer = shmbroker_json(directory, "backup", str(copy))
        assert answer["from_memory"] == tail - flushed > 0
        assert answer["end"] == tail
    assert shmbroker_json(copy, "log", "verify")["sound"]
    for place in (copy, directory):  # and the broker itself, on a disk that works again
        with running(place) as broker, broker.simple_consumer("audit", {"orders": "*"}) as consumer:
            received: list[int] = []
            while messages := consumer.receive(32, wait=1.0):
                received += [int(message.body.split()[0]) for message in messages]
                consumer.ack(messages)
        assert sorted(received) == sent


def test_a_backup_makes_no_directories_above_its_target(directory: Path, tmp_path: Path) -> None:
    """It would fill the disk below a place where the disk for backups is not mounted."""
    missing = tmp_path / "mnt" / "backups"
    with running(directory):
        refused = shmbroker_command(directory, "backup", str(missing / "orders"))
        assert (refused.returncode, refused.stdout) == (ExitCode.USAGE, "")
        assert f"{missing} is no directory; make it (mkdir -p {missing})" in refused.stderr
        assert not (tmp_path / "mnt").exists()
