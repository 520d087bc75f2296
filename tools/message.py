"""``shmbroker message``: everything that the log knows about a message."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from shmbroker.tools import console
from shmbroker.tools.command_group import CommandGroup
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Failure, Session, common_options, pass_session

if TYPE_CHECKING:
    from shmbroker._native._core import Record

_ID_DIGITS = 32


@click.group(cls=CommandGroup)
@common_options
def message() -> None:
    """Look up messages by id or by key.

    \b
    shmbroker message show 5f0c...e1
    shmbroker message show --key order-42 --topic orders
    """


@message.command()
@common_options
@click.argument("message_id", required=False)
@click.option("--key", help="Look for this key instead; needs --topic.")
@click.option("--topic", help="The topic of the key.")
@click.option("--limit", type=click.IntRange(1, 1000), default=10, show_default=True, help="Newest messages of a key.")
@pass_session
def show(session: Session, message_id: str | None, key: str | None, topic: str | None, limit: int) -> int:
    """Print all fields of the messages found, newest first.

    \b
    shmbroker message show 5f0c6a9d3b7e21840000000000000007
    shmbroker message show --key order-42 --topic orders --limit 1
    shmbroker --json message show --key order-42 --topic orders | jq -r '.[].body'

    Leaves with 1 if there is no such message.
    """
    if (message_id is None) == (key is None) or (key is not None) != (topic is not None):
        raise click.UsageError("give either a message id, or --key and --topic")
    from shmbroker.tools.stored_messages import StoredMessages

    with session.open() as broker:
        names = {entry["topic_id"]: entry["name"] for entry in broker.region.topics()}
        with StoredMessages(session.paths, broker.region) as messages:
            if message_id is not None:
                record = messages.by_id(*_parse_id(message_id))
                records = [record] if record is not None else []
            else:
                assert topic is not None
                assert key is not None
                records = messages.by_key(messages.topic_id(topic), key, limit)
        shown = [_fields(record, names) for record in records]
    if session.json:
        console.print_json(shown)
    for fields in shown if not session.json else []:
        console.table("", ["message", fields["message_id"]], [(name, value) for name, value in fields.items()][1:])
    if not shown:
        what = f"id {message_id}" if message_id is not None else f"key {key!r} in topic {topic}"
        raise Failure(f"no message with {what}", ExitCode.FINDING)
    return ExitCode.OK


def _parse_id(text: str) -> tuple[int, int]:
    try:
        if len(text) != _ID_DIGITS:
            raise ValueError(text)
        return int(text[:16], 16), int(text[16:], 16)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no message id: {_ID_DIGITS} hexadecimal digits") from None


def _fields(record: Record, topics: dict[int, str]) -> dict[str, Any]:
    from shmbroker.record import RecordKind
    from shmbroker.tools.receive import body_fields

    pending = record.kind == RecordKind.TIMER  # no message with this id has fired yet
    return {
        "message_id": record.message_id,
        "topic": topics.get(record.topic_id, f"deleted topic {record.topic_id}"),
        "queue_id": record.queue_id,
        "queue_offset": None if pending else record.queue_offset,
        "due": datetime.fromtimestamp(record.queue_offset / 1e9, UTC).isoformat() if pending else None,
        "position": record.position,
        "size": record.size,
        "epoch": record.epoch,
        "born": datetime.fromtimestamp(record.born_ns / 1e9, UTC).isoformat(),
        "tags": record.tags,
        "keys": record.keys,
        "properties": record.properties,
        "attempts_before": record.attempts,
    } | body_fields(record.body)
