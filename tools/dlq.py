"""``shmbroker dlq``: look at dead letters, send them again, give them up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from shmbroker.errors import GroupNotExist, ReceiptExpired
from shmbroker.naming import DEAD_LETTER_PREFIX
from shmbroker.status import SendStatus
from shmbroker.tools import console
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Failure, Session, common_options, pass_session

if TYPE_CHECKING:
    from shmbroker._native._core import ReceivedMessage, Record, Region
    from shmbroker.broker import Broker
    from shmbroker.dead_letters import DeadLetters

BATCH: Final = 256
HELD_SECONDS: Final = 600.0  # while a command runs
DISPATCH_TIMEOUT_NS: Final = 5_000_000_000
ERROR_COLUMN: Final = 60


@click.group()
@common_options
def dlq() -> None:
    """Look at dead letters, send them again, give them up.

    \b
    shmbroker dlq list
    shmbroker dlq list billing
    shmbroker dlq show billing 17
    shmbroker dlq resend billing --all
    shmbroker dlq purge billing 17 18

    A dead letter keeps the log from being deleted until it is sent again or purged.
    """


@dlq.command(name="list")
@common_options
@click.argument("group", required=False)
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Letters shown, oldest first.")
@pass_session
def list_letters(session: Session, group: str | None, limit: int) -> None:
    """List the groups that have dead letters, or the letters of one group.

    \b
    shmbroker dlq list
    shmbroker dlq list billing --limit 20
    shmbroker --json dlq list billing | jq -r '.[].last_error' | sort | uniq -c
    """
    with session.open() as broker:
        if group is None:
            _list_groups(session, broker)
            return
        shown = [_fields(record) for record in _letters(session, broker, group, limit)]
    if session.json:
        console.print_json([{key: value for key, value in fields.items() if key != "body"} for fields in shown])
        return
    console.table(
        "",
        [">offset", "message id", "topic", ">deliveries", "born", "last error"],
        [
            (
                fields["offset"], fields["message_id"], fields["topic"], fields["deliveries"], fields["born"],
                fields["last_error"][:ERROR_COLUMN],
            )
            for fields in shown
        ],
        empty=f"no dead letters of {group}",
    )  # fmt: skip


@dlq.command()
@common_options
@click.argument("group")
@click.argument("letters", nargs=-1, required=True)
@pass_session
def show(session: Session, group: str, letters: tuple[str, ...]) -> None:
    """Print all that is known of dead letters, named by offset or message id.

    \b
    shmbroker dlq show billing 17
    shmbroker --json dlq show billing 5f0c6a9d3b7e21840000000000000007 | jq -r '.[].body'
    """
    chosen = _Chosen(letters, everything=False)
    with session.open() as broker:
        shown = [
            _fields(record)
            for record in _letters(session, broker, group, None)
            if chosen.has(record.queue_offset, record.message_id)
        ]
    if session.json and shown:
        console.print_json(shown)
    for fields in shown if not session.json else []:
        console.table("", ["offset", str(fields["offset"])], [(name, value) for name, value in fields.items()][1:])
    chosen.must_be_of(group)


@dlq.command()
@common_options
@click.argument("group")
@click.argument("letters", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--to", help="To this topic, for whoever consumes it, instead of the group alone.")
@pass_session
def resend(session: Session, group: str, letters: tuple[str, ...], everything: bool, to: str | None) -> None:
    """Send dead letters again, named by offset or message id, or all: as new messages, to the group that failed.

    \b
    shmbroker dlq resend billing 17
    shmbroker dlq resend billing --all
    shmbroker dlq resend billing --all --to orders-repaired

    The new message and the letter's end are one append: a kill leaves the one or the other. Other groups, which have
    had the message, do not get it again.
    """
    chosen = _Chosen(letters, everything)
    end = 0

    def send_again(consumer: DeadLetters, messages: list[ReceivedMessage]) -> None:
        nonlocal end
        for message in messages:
            end = consumer.resend(message, to)

    with session.open() as broker, broker.dead_letters(group) as consumer:
        count = _work_on(consumer, chosen, "sending again", send_again)
        status = consumer.settled(end) if end else SendStatus.SEND_OK
    if session.json:
        console.print_json({"group": group, "resent": count, "to": to, "status": status.name})
    else:
        click.echo(f"sent {count} dead letters of {group} again{f', to {to}' if to else ''}")
    chosen.must_be_of(group, ", or another has it in hand")
    if status is not SendStatus.SEND_OK:
        raise Failure("done, and not known to be on the disk: `shmbroker status`", ExitCode.OPERATOR)


@dlq.command()
@common_options
@click.argument("group")
@click.argument("letters", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_session
def purge(session: Session, group: str, letters: tuple[str, ...], everything: bool, yes: bool) -> None:
    """Give dead letters up, named by offset or message id, or all: nobody gets them any more.

    \b
    shmbroker dlq purge billing 17 18
    shmbroker dlq purge billing --all --yes
    """
    chosen = _Chosen(letters, everything)
    with session.open() as broker, broker.dead_letters(group) as consumer:
        which = "all dead letters" if everything else f"{len(letters)} dead letters"
        console.confirm(f"Give up {which} of {group}?", yes)
        count = _work_on(consumer, chosen, "giving up", lambda letters, messages: letters.ack(messages, durable=True))
    if session.json:
        console.print_json({"group": group, "purged": count})
    else:
        click.echo(f"gave up {count} dead letters of {group}")
    chosen.must_be_of(group, ", or another has it in hand")


# ---- which letters


class _Chosen:
    """The letters that a command line means, and which of them were there."""

    def __init__(self, letters: tuple[str, ...], everything: bool) -> None:
        if everything == bool(letters):
            raise click.UsageError("name letters by offset or message id, or give --all")
        for letter in letters:
            if not (letter.isdecimal() or len(letter) == 32):
                raise click.UsageError(f"{letter!r} is neither an offset nor a message id of 32 digits")
        self._everything = everything
        self._missing = self._wanted = dict.fromkeys(letters)  # in the order in which they were named

    def has(self, offset: int, message_id: str) -> bool:
        names = {str(offset), message_id}
        self._missing = {name: None for name in self._missing if name not in names}
        return self._everything or not names.isdisjoint(self._wanted)

    def must_be_of(self, group: str, otherwise: str = "") -> None:
        """Raise Failure that names those that were not there. What was there has been dealt with."""
        if self._missing:
            text = f"group {group} has no such dead letter{otherwise}: {', '.join(self._missing)}"
            raise Failure(text, ExitCode.FINDING)


# ---- reading


def _unfinished(region: Region, group: str) -> tuple[int, Iterator[int]]:
    """Topic id of the group's dead letters, and the offsets of those neither sent again nor given up.

    A group that was deleted leaves its letters. Raises GroupNotExist.
    """
    name = DEAD_LETTER_PREFIX + group
    topic = next((topic for topic in region.topics() if topic["name"] == name), None)
    if topic is None:
        if all(known["name"] != group for known in region.groups()):
            raise GroupNotExist(f"group {group!r} does not exist")
        return 0, iter(())  # it has never had one
    queue = topic["queues"][0]
    table = next((table for table in region.progress() if table["group"] == table["topic"] == name), None)
    if table is None:
        return topic["topic_id"], iter(range(queue["first_offset"], queue["next_offset"]))
    acked = {offset for first, count in table["acked"] for offset in range(first, first + count)}
    ahead = (offset for offset in range(table["base"], queue["next_offset"]) if offset not in acked)
    return topic["topic_id"], iter([*sorted(table["overflow"]), *ahead])


def _letters(session: Session, broker: Broker, group: str, limit: int | None) -> list[Record]:
    """The letters, oldest first."""
    from shmbroker.tools.stored_messages import StoredMessages

    region = broker.region
    region.wait_for("dispatched", region.get("tail"), DISPATCH_TIMEOUT_NS)
    topic_id, offsets = _unfinished(region, group)
    found: list[Record] = []
    with StoredMessages(session.paths, region) as messages:
        for offset in offsets:
            entries = messages.entries(topic_id, 0, offset, 1)
            record = messages.at_position(entries[0].position) if entries else None
            if record is not None and record.queue_offset == offset:
                found.append(record)
            if len(found) == limit:
                break
    return found


def _fields(record: Record) -> dict[str, Any]:
    from shmbroker.send_back import original_properties
    from shmbroker.tools.receive import body_fields

    properties = record.properties
    return {
        "offset": record.queue_offset,
        "message_id": record.message_id,
        "topic": properties.get("DLQ_ORIGIN_TOPIC", ""),
        "deliveries": record.attempts,
        "born": datetime.fromtimestamp(record.born_ns / 1e9, UTC).isoformat(timespec="seconds"),
        "first_error": properties.get("RETRY_FIRST_ERROR", ""),
        "last_error": properties.get("RETRY_LAST_ERROR", ""),
        "tags": record.tags,
        "keys": record.keys,
        "properties": original_properties(properties),
        "position": record.position,
    } | body_fields(record.body)


def _list_groups(session: Session, broker: Broker) -> None:
    rows = []
    for topic in broker.topics():
        group = topic["name"].removeprefix(DEAD_LETTER_PREFIX)
        if group != topic["name"]:
            _, offsets = _unfinished(broker.region, group)
            if count := sum(1 for _ in offsets):
                rows.append({"group": group, "letters": count})
    rows.sort(key=lambda row: str(row["group"]))
    if session.json:
        console.print_json(rows)
    else:
        cells = [(row["group"], f"{row['letters']:,}") for row in rows]
        console.table("", ["group", ">dead letters"], cells, empty="no dead letters")


# ---- changing


def _work_on(
    consumer: DeadLetters,
    chosen: _Chosen,
    label: str,
    work: Callable[[DeadLetters, list[ReceivedMessage]], None],
) -> int:
    """Do ``work`` with every chosen letter that is there now; how many there were. What another has in hand is left.

    Letters that are not chosen are held meanwhile, and come back when the command leaves.
    """
    _, offsets = _unfinished(consumer.client.region, consumer.of)
    there = list(offsets)
    count = 0
    with console.progress(label, len(there), unit="letters") as advance:
        while messages := consumer.receive(BATCH, invisible=HELD_SECONDS):
            new = [message for message in messages if there and message.queue_offset <= there[-1]]
            wanted = [message for message in new if chosen.has(message.queue_offset, message.message_id)]
            try:
                if wanted:
                    work(consumer, wanted)
            except ReceiptExpired as error:
                raise Failure(f"stopped after {count}: {error}", ExitCode.FINDING) from error
            count += len(wanted)
            advance(len(new))
            if len(new) < len(messages):
                break
    return count
