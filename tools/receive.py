"""``shmbroker receive``: messages become lines, and each is acknowledged once its line is out of our hands."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from shmbroker.errors import TopicNotExist
from shmbroker.tools import expressions
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Failure, Session, common_options, pass_session

if TYPE_CHECKING:
    from shmbroker._native._core import ReceivedMessage
    from shmbroker.selector import Sql

BATCH_MAX: Final = 1024
SLICE_SECONDS: Final = 1.0
BUSY_MS: Final = 10


@click.command()
@common_options
@expressions.consumer_options
@click.option(
    "--batch",
    type=click.IntRange(1, BATCH_MAX),
    default=1,
    show_default=True,
    help="Messages received, written and acknowledged together; more: faster.",
)
@click.option("--max", "most", type=click.IntRange(1), help="Leave after so many messages.")
@click.option(
    "--wait", type=click.FloatRange(0), default=1.0, show_default=True, help="Seconds without a message before leaving."
)
@click.option("--follow", is_flag=True, help="Wait for more for ever, until Ctrl-C or --max.")
@click.option(
    "--invisible",
    type=click.FloatRange(1, 43_200),
    default=60.0,
    show_default=True,
    help="Seconds to write a batch, and for the reader of a pipe to take it.",
)
@click.option("--no-ack", is_flag=True, help="Look only: what was printed is held, and given back on leaving.")
@pass_session
def receive(
    session: Session,
    group: str,
    wanted: Mapping[str, str | Sql],
    batch: int,
    most: int | None,
    wait: float,
    follow: bool,
    invisible: float,
    no_ack: bool,
) -> int:
    """Print each message's body as one line, and acknowledge it.

    \b
    shmbroker receive --group audit --topic orders
    shmbroker receive --group audit --topic orders --tags 'paid || refunded' --max 10
    shmbroker receive --group audit --topic orders --sql "amount > 100 AND region = 'EU'"
    shmbroker --json receive --group audit --topic orders --follow | jq .keys

    Acknowledged means that the group never gets the message again. It is done one by one, or batch by batch: when the
    line is written to the file or the terminal, or when the reader of the pipe has taken it. So `| head -1`
    acknowledges what head has read, --max N acknowledges N, --no-ack nothing. What is not acknowledged when the command
    ends, however it ends, is delivered again.

    The directory and the topic must exist. Leaves with 0, or 1 if there was no message.
    """
    received = 0
    with session.open() as broker:
        missing = set(wanted) - {entry["name"] for entry in broker.topics()}
        if missing:  # a consumer would make it, and a slip of the pen would wait there for ever
            raise TopicNotExist(f"topic {min(missing)!r} does not exist: nothing to receive")
        output = _Output()
        with broker.simple_consumer(group, wanted) as consumer:
            idle_since = time.monotonic()
            while most is None or received < most:
                left = SLICE_SECONDS if follow else idle_since + wait - time.monotonic()
                count = batch if most is None else min(batch, most - received)
                # Slices, so that a long wait is nothing special: receive itself gives way to Ctrl-C.
                messages = consumer.receive(count, wait=max(0.0, min(left, SLICE_SECONDS)), invisible=invisible)
                if messages:
                    lines = [_as_json(message) if session.json else message.body for message in messages]
                    output.write(b"".join(line + b"\n" for line in lines), invisible)
                    if not no_ack:  # else held, or they would come again at once; closing the consumer gives them back
                        consumer.ack(messages)
                    received += len(messages)
                    idle_since = time.monotonic()
                elif left <= 0:
                    break
    return ExitCode.OK if received else ExitCode.FINDING


class _Output:
    """Standard output. Lines are out of our hands when ``write`` returns.

    What lies in a pipe its reader may never take, so ``write`` waits until the pipe is empty. The kernel says so of a
    pipe that holds one page: it can be written to just when nothing is in it.
    """

    def __init__(self) -> None:
        self._poll: select.poll | None = None
        if stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
            self._poll = select.poll()
            self._poll.register(sys.stdout.fileno(), select.POLLOUT)
            _hold_one_page(sys.stdout.fileno())

    def write(self, lines: bytes, seconds: float) -> None:
        """Raises BrokenPipeError if the reader has gone, Failure if it takes nothing for so long, or writing fails."""
        out, deadline = sys.stdout.buffer, time.monotonic() + seconds
        if self._poll is None:
            out.write(lines)
            out.flush()
            return
        for start in range(0, len(lines), select.PIPE_BUF):
            out.write(lines[start : start + select.PIPE_BUF])
            out.flush()
            _wait_taken(self._poll, deadline)


def _hold_one_page(pipe: int) -> None:
    closed = select.poll()
    closed.register(pipe, 0)
    while True:
        try:
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, os.sysconf("SC_PAGESIZE"))
        except OSError as error:
            if error.errno != errno.EBUSY:  # else there is more in it, from whoever wrote before us
                raise
        else:
            return
        if closed.poll(BUSY_MS):
            raise BrokenPipeError


def _wait_taken(poll: select.poll, deadline: float) -> None:
    events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    if not events:
        raise Failure("the reader of the pipe takes nothing; the message stays in the broker", ExitCode.RETRY_LATER)
    if not events[0][1] & select.POLLOUT:  # POLLERR alone: the reader has gone and left something in it
        raise BrokenPipeError


def _as_json(message: ReceivedMessage) -> bytes:
    import json

    fields: dict[str, Any] = {
        "topic": message.topic,
        "queue_id": message.queue_id,
        "queue_offset": message.queue_offset,
        "message_id": message.message_id,
        "tags": message.tags,
        "keys": message.keys,
        "properties": message.properties,
        "delivery_attempt": message.delivery_attempt,
        "born": message.born_timestamp,
    } | body_fields(message.body)
    return json.dumps(fields, ensure_ascii=False).encode()


def body_fields(body: bytes) -> dict[str, str]:
    """A body for JSON: as text if it is UTF-8, else in base64."""
    try:
        return {"body": body.decode()}
    except UnicodeDecodeError:
        import base64

        return {"body_base64": base64.b64encode(body).decode()}
