"""``shmbroker receive``: messages become lines, and are acknowledged once the lines are written."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Final

import click

from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Session, common_options, pass_session

if TYPE_CHECKING:
    from shmbroker._native._core import ReceivedMessage

BATCH: Final = 64
SLICE_SECONDS: Final = 1.0


@click.command()
@common_options
@click.option("-g", "--group", required=True, help="The consumer group; its members share the messages.")
@click.option("-t", "--topic", "topics", required=True, multiple=True, help="A topic; may be repeated.")
@click.option("--tags", default="*", show_default=True, help="A tag expression: 'paid || refunded'.")
@click.option("--max", type=click.IntRange(1), help="Leave after so many messages.")
@click.option(
    "--wait", type=click.FloatRange(0), default=1.0, show_default=True, help="Seconds without a message before leaving."
)
@click.option("--follow", is_flag=True, help="Wait for more for ever, until Ctrl-C or --max.")
@click.option(
    "--invisible", type=click.FloatRange(1, 43_200), default=60.0, show_default=True, help="Seconds to print a message."
)
@click.option("--no-ack", is_flag=True, help="Look only: what was printed is held, and given back on leaving.")
@pass_session
def receive(
    session: Session,
    group: str,
    topics: tuple[str, ...],
    tags: str,
    max: int | None,
    wait: float,
    follow: bool,
    invisible: float,
    no_ack: bool,
) -> int:
    """Print each message's body as one line and acknowledge it once the line is written.

    \b
    shmbroker receive --group audit --topic orders
    shmbroker receive --group audit --topic orders --tags 'paid || refunded' --max 10
    shmbroker --json receive --group audit --topic orders --follow | jq .keys

    A message whose line could not be written is delivered again. Leaves with 0, or 1 if there was no message at all.
    """
    received = 0
    with (
        session.open() as broker,
        broker.simple_consumer(group, dict.fromkeys(topics, tags)) as consumer,
    ):
        idle_since = time.monotonic()
        while max is None or received < max:
            patience = SLICE_SECONDS if follow else idle_since + wait - time.monotonic()
            if patience < 0:
                break
            count = BATCH if max is None else min(BATCH, max - received)
            # Slices, so that a long wait is nothing special: receive itself gives way to Ctrl-C.
            messages = consumer.receive(max_messages=count, wait=min(patience, SLICE_SECONDS), invisible=invisible)
            if not messages:
                continue
            try:
                _write(messages, json=session.json)
            except BaseException:
                _give_back(consumer, messages)  # the reader of our lines is gone: somebody else gets them at once
                raise
            if not no_ack:  # else held, or they would come again at once; closing the consumer gives them back
                consumer.ack(messages)
            received += len(messages)
            idle_since = time.monotonic()
    return ExitCode.OK if received else ExitCode.FINDING


def _give_back(consumer: Any, messages: list[ReceivedMessage]) -> None:
    for message in messages:
        consumer.change_invisible_duration(message, 0.0)


def _write(messages: list[ReceivedMessage], *, json: bool) -> None:
    out = sys.stdout.buffer
    for message in messages:
        out.write((_as_json(message) if json else message.body) + b"\n")
    out.flush()


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
