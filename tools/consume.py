"""``shmbroker consume``: a function of yours as the consumer of a group, in many processes and threads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from shmbroker.tools import expressions
from shmbroker.tools.instants import beginning
from shmbroker.tools.session import Session, common_options, pass_session

if TYPE_CHECKING:
    from shmbroker.selector import Sql

PROCESSES_MAX: Final = 256


@click.command()
@common_options
@click.argument("listener", metavar="MODULE:LISTENER")
@expressions.consumer_options
@click.option(
    "--processes", type=click.IntRange(1, PROCESSES_MAX), default=1, show_default=True, help="Consumer processes."
)
@click.option(
    "--threads", type=click.IntRange(1, 1000), default=20, show_default=True, help="Listener threads in each."
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="More: the listener gets lists of one queue's messages, of at most so many.",
)
@click.option(
    "--prefetch", type=click.IntRange(1, 1024), default=32, show_default=True, help="Messages that a thread fetches."
)
@click.option(
    "--consume-timeout",
    type=click.FloatRange(0.01, 43_200),
    default=900.0,
    show_default=True,
    help="Seconds that the listener has, before they are renewed.",
)
@click.option(
    "--max-renewals", type=click.IntRange(0), default=11, show_default=True, help="How often; after that others get it."
)
@click.option(
    "--await-termination",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that a stop waits for listeners that run.",
)
@click.option("--orderly", is_flag=True, help="Each queue in its order, by one process at a time.")
@click.option(
    "--suspend",
    type=click.FloatRange(0.01, 30),
    default=1.0,
    show_default=True,
    help="--orderly: seconds that a queue is held whose message failed.",
)
@click.option(
    "--consume-from",
    type=beginning,
    metavar="first|last|TIME",
    default="first",
    show_default=True,
    help="Where a group begins that has never consumed: also at 2026-11-21T10:00, or 2h (ago).",
)
@click.option(
    "--app-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    show_default=True,
    help="Where MODULE is looked for first.",
)
@pass_session
def consume(
    session: Session,
    listener: str,
    group: str,
    wanted: Mapping[str, str | Sql],
    processes: int,
    threads: int,
    batch: int,
    prefetch: int,
    consume_timeout: float,
    max_renewals: int,
    await_termination: float,
    orderly: bool,
    suspend: float,
    consume_from: str | float,
    app_dir: Path,
) -> int:
    """Call a function with each message of a group, in several processes.

    \b
    shmbroker consume orders:handle --group billing --topic orders
    shmbroker consume orders:handle --group billing --topic orders --processes 4 --threads 8

    orders.py, in the current directory or wherever Python finds it:

    \b
    from shmbroker import ConsumeStatus
    def handle(message, context):
        print(message.body)
        return ConsumeStatus.CONSUME_SUCCESS

    Whatever else it returns, or raises, is a failure: the message comes again after a delay, and goes to the dead
    letters of the group after the last try. With --orderly it returns ConsumeOrderlyStatus.SUCCESS, and what fails
    holds its queue until it comes again. A process that dies is started again, after a pause if that happens often;
    what its listeners had is delivered to others within milliseconds.

    SIGTERM or Ctrl-C: no message is begun any more, what runs may finish for --await-termination seconds, everything
    else goes back to the group. Leaves with 0 then; with 1 if something had to be left unfinished; with 2 or 5 at once
    if no second try would help: the module cannot be imported, the group subscribes to something else. For supervisord
    and systemd: docs/operations.md.
    """
    from shmbroker.tools.consume_fleet import Fleet

    session.require_directory()
    settings = {
        "directory": str(session.paths.directory),
        "app_dir": str(app_dir.resolve()),
        "listener": listener,
        "group": group,
        "subscriptions": {topic: expressions.as_json(of_topic) for topic, of_topic in wanted.items()},
        "settings": {
            "consume_thread_max": threads,
            "consume_message_batch_max_size": batch,
            "pull_batch_size": prefetch,
            "consume_timeout": consume_timeout,
            "max_renewals": max_renewals,
            "await_termination": await_termination,
            "orderly": orderly,
            "suspend_current_queue_time": suspend,
            "consume_from": consume_from,
        },
    }
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")
    return Fleet(settings, processes, await_termination).run()
