"""``shmbroker send``: one message per line, and a table of what the broker answered."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import TYPE_CHECKING, BinaryIO, Final

import click

from shmbroker.errors import ShmBrokerError
from shmbroker.naming import check_group, check_topic
from shmbroker.tools import console
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Failure, Session, common_options, pass_session

if TYPE_CHECKING:
    from shmbroker.producer import Producer

BATCH_MAX: Final = 1024


@click.command()
@common_options
@click.option("-t", "--topic", required=True, help="Created if it does not exist.")
@click.option("--group", default="shmbroker-send", show_default=True, help="The producer's group.")
@click.option("--tag", help="The tag of every message.")
@click.option("--key", "keys", multiple=True, help="A key of every message; may be repeated.")
@click.option("--input", type=click.File("rb"), default="-", help="A file of lines.  [default: standard input]")
@click.option(
    "--batch", type=click.IntRange(1, BATCH_MAX), default=1, show_default=True, help="Messages per atomic batch."
)
@click.option("--sync", is_flag=True, help="Start the broker with SYNC_FLUSH: each answer waits for the disk.")
@pass_session
def send(
    session: Session,
    topic: str,
    group: str,
    tag: str | None,
    keys: tuple[str, ...],
    input: BinaryIO,
    batch: int,
    sync: bool,
) -> int:
    """Send each line as one message, without its newline. Empty lines are skipped and counted.

    \b
    seq 1000 | shmbroker send --topic numbers
    shmbroker send --topic orders --tag paid --input orders.jsonl --batch 100
    shmbroker -d data/orders send --topic orders --key order-42 <<< '{"id": 42}'

    Makes the directory and starts the broker when the first line has come. Leaves with 0 if every message is SEND_OK,
    1 if some are stored but not proven durable.
    """
    check_topic(topic)
    check_group(group)
    if input.isatty():
        click.echo("one message per line; Ctrl-D ends", err=True)
    statuses: Counter[str] = Counter()
    lines = _Lines(input)
    chunks = lines.chunks(batch)
    first = next(chunks, None)
    if first is None:
        session.check_place()
        _report(session, statuses, lines, 0.0)
        return ExitCode.OK
    settings = {"flush_disk_type": "SYNC_FLUSH"} if sync else {}
    with session.open(create=True, **settings) as broker, broker.producer(group) as producer:
        started, in_doubt = time.monotonic(), 0
        try:
            with console.progress("sending", lines.size) as advance:
                for chunk in chain([first], chunks):
                    in_doubt = len(chunk)
                    statuses[_send(producer, topic, chunk, tag, keys)] += len(chunk)
                    in_doubt = 0
                    advance(sum(map(len, chunk)) + len(chunk))
        except BaseException as error:  # Ctrl-C and SIGTERM, too: whoever is interrupted wants to know how far it came
            if isinstance(error, ShmBrokerError):
                error.add_note(_how_far(statuses.total(), lines, 0))  # what met it is not stored
            else:
                click.echo(_how_far(statuses.total(), lines, in_doubt), err=True)
            with suppress(Failure, BrokenPipeError):  # what stopped us is the answer, whoever can read this one
                _report(session, statuses, lines, time.monotonic() - started)
            raise
        stored = ", ".join(f"{count:,} {status}" for status, count in sorted(statuses.items()))
        with console.done(f"{statuses.total():,} messages stored ({stored})"):
            _report(session, statuses, lines, time.monotonic() - started)
    return ExitCode.OK if set(statuses) <= {"SEND_OK"} else ExitCode.FINDING


class _Lines:
    """The non-empty lines of a stream, counted. Reads ahead no further than the stream itself does."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.empty = 0
        self.bytes = 0
        self.size = os.fstat(stream.fileno()).st_size or None

    def __iter__(self) -> Iterator[bytes]:
        for line in self._stream:
            body = line.removesuffix(b"\n")
            if body:
                self.bytes += len(body)
                yield body
            else:
                self.empty += 1

    def chunks(self, count: int) -> Iterator[list[bytes]]:
        """The same, ``count`` at a time."""
        bodies = iter(self)
        while chunk := list(islice(bodies, count)):
            yield chunk

    def done(self, sent: int) -> int:
        """Number of the line up to which all are dealt with, when ``sent`` messages were sent."""
        return sent + self.empty


def _send(producer: Producer, topic: str, bodies: list[bytes], tag: str | None, keys: tuple[str, ...]) -> str:
    from shmbroker import Message

    messages = [Message(topic, body, tags=tag, keys=keys or None) for body in bodies]
    result = producer.send(messages[0]) if len(messages) == 1 else producer.send_batch(messages)
    return str(result.status.name)


def _how_far(sent: int, lines: _Lines, in_doubt: int) -> str:
    """``in_doubt``: messages that were just being sent."""
    if not sent:
        return f"stopped: of the first {in_doubt} it is unknown" if in_doubt else "nothing was sent"
    unknown = f", of the next {in_doubt} it is unknown" if in_doubt else ""
    return f"stopped behind line {lines.done(sent)}: all before is sent{unknown}"


def _report(session: Session, statuses: Counter[str], lines: _Lines, seconds: float) -> None:
    sent = statuses.total()
    rate = sent / seconds if seconds > 0 else 0.0
    if session.json:
        answer = {"sent": sent, "statuses": dict(statuses), "empty_lines": lines.empty, "bytes": lines.bytes}
        console.print_json(answer | {"seconds": seconds, "messages_per_second": rate})
        return
    rows: list[tuple[object, ...]] = [(status, f"{count:,}") for status, count in sorted(statuses.items())]
    if lines.empty:
        rows.append(("empty lines skipped", f"{lines.empty:,}"))
    console.table("", ["status", ">messages"], rows, empty="nothing sent")
    if sent and sys.stdout.isatty():
        click.echo(f"{console.size(lines.bytes)} in {console.duration(seconds)}, {rate:,.0f} messages/s")
