"""``shmbroker demo``: the main job, with processes killed in the middle of it.

A fleet of senders streams the lines of a text file through a real broker to a fleet of receivers, while a sender, a
receiver and the flusher are killed with -9 and replaced. At the end what arrived is compared with the file.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

import shmbroker
from shmbroker.naming import BrokerPaths
from shmbroker.tools import console, group_lag, inside
from shmbroker.tools import demo_processes as processes
from shmbroker.tools.bench_report import human, percentile
from shmbroker.tools.cli import main
from shmbroker.tools.demo_fleet import KILLS, Fleet, Killed, signals_deferred
from shmbroker.tools.demo_history import Verdict, judge
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Failure, Session, pass_session

LINES = 600_000
# A killed sender's lines in doubt must still be remembered when its successor sends them again: within so many sends of
# the others. 32 bytes each; with this the broker still fits into the 64 MiB of /dev/shm that Docker gives.
ID_WINDOW = 1 << 19


def run_demo(
    text: Path,
    place: Path,
    heed: Callable[[], None],
    *,
    at_least: int,
    senders: int,
    receivers: int,
    settings: dict[str, Any],
) -> tuple[Verdict, list[Killed]]:
    """Carry the demo through in the empty directory ``place`` and judge it. No process is left behind.

    ``heed``: see ``signals_deferred``, which must surround this. Raises Failure or ShmBrokerError.
    """
    lines = processes.read_lines(text, at_least)
    if not lines:
        raise Failure(f"{text} has no lines", ExitCode.USAGE)
    histories = place / "histories"
    histories.mkdir()
    columns = (TextColumn("{task.description:<8}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    try:
        with ExitStack() as stack:
            opened = shmbroker.open(place / "broker", id_window=ID_WINDOW, embed_grace=0.0, **settings)
            broker = stack.enter_context(opened)
            broker.create_topic(processes.TOPIC, queues=max(4, receivers))
            fleet = Fleet(place / "broker", histories, text, at_least, len(lines), senders, receivers)
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                fleet.run(progress, heed)
            lags = group_lag.lags(BrokerPaths(place / "broker"), broker.region)
    finally:
        inside.wait_stopped(place / "broker")
    heed()
    verdict = judge(lines, histories)
    verdict.lag = sum(group["lag_messages"] for group in lags)
    return verdict, fleet.made


def some_text() -> Path:
    """A text that comes with Python: the topics of its help, or the source of a module if they were left out."""
    for name in ("pydoc_data.topics", "argparse"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.has_location:
            return Path(spec.origin)
    raise Failure("this Python has no text to send: name one with --input", ExitCode.USAGE)


def report(text: Path, verdict: Verdict, killed: list[Killed]) -> dict[str, Any]:
    """The result as plain data."""
    send, delivery = sorted(verdict.send_latencies_ns), sorted(verdict.delivery_latencies_ns)
    return {
        "input": str(text),
        "lines": verdict.lines,
        "sent": dict(verdict.sent),
        "delivered": verdict.delivered,
        "redelivered": verdict.redelivered,
        "lost": verdict.lost,
        "altered": verdict.altered,
        "duplicated_after_ack": verdict.duplicated,
        "group_lag": verdict.lag,
        "examples": verdict.examples,
        "kills": [{"what": k.what, "pid": k.pid, "sent": k.sent, "received": k.received} for k in killed],
        "seconds": verdict.seconds,
        "messages_per_second": verdict.delivered / verdict.seconds if verdict.seconds else 0.0,
        "send_seconds": _percentiles(send),
        "delivery_seconds": _percentiles(delivery),
        "good": verdict.good and len(killed) == len(KILLS),
    }


def _percentiles(nanoseconds: list[int]) -> dict[str, float]:
    if not nanoseconds:
        return {}
    return {"p50": percentile(nanoseconds, 0.5) / 1e9, "p99": percentile(nanoseconds, 0.99) / 1e9}


_SENT = {"DUPLICATE": "sent: DUPLICATE, stored once"}


def _print_table(told: dict[str, Any]) -> None:
    rows: list[tuple[str, str]] = [("input", told["input"]), ("lines read", f"{told['lines']:,}")]
    rows += [(_SENT.get(status, f"sent: {status}"), f"{count:,}") for status, count in sorted(told["sent"].items())]
    for what in ("delivered", "redelivered", "lost", "altered", "duplicated_after_ack", "group_lag"):
        rows.append((what.replace("_", " "), f"{told[what]:,}"))
    for what, some in told["examples"].items():
        rows.append((f"{what}: for example lines", ", ".join(map(str, some))))
    for kill in told["kills"]:
        rows.append((f"kill -9: {kill['what']}", f"after {kill['sent']:,} sent, {kill['received']:,} received"))
    rows.append(("throughput", human(told["messages_per_second"], "1/s")))
    for what in ("send", "delivery"):
        rows += [(f"{what} latency {name}", human(found, "s")) for name, found in told[f"{what}_seconds"].items()]
    console.table("", ["main job", ">result"], rows)


@click.command()
@click.option(
    "--input",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text file.  [default: the topics of Python's help, pydoc_data/topics.py]",
)
@click.option(
    "--lines",
    type=click.IntRange(1),
    default=LINES,
    show_default=True,
    help="Repeat the whole file until it is so many lines.",
)
@click.option("--producers", type=click.IntRange(1, 64), default=4, show_default=True, help="Processes that send.")
@click.option("--consumers", type=click.IntRange(1, 64), default=3, show_default=True, help="Processes that receive.")
@click.option("--sync", is_flag=True, help="SYNC_FLUSH: every answer waits for the disk.")
@click.option(
    "-d",
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Make the broker and the histories in a new directory below this one, and keep them.  [default: in "
    "shmbroker-demo-* below the current directory, removed if all went well]",
)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@pass_session
def demo(
    session: Session,
    input: Path | None,
    lines: int,
    producers: int,
    consumers: int,
    sync: bool,
    directory: Path | None,
    as_json: bool,
) -> int:
    """Stream a text file through a broker while a producer, a consumer and the flusher are killed with -9.

    \b
    shmbroker demo
    shmbroker demo --input /var/log/syslog --producers 8 --consumers 4 --sync

    Every process writes down what it sent and got in a file of its own; at the end these are compared with the input,
    line by line: each must have been delivered and acknowledged, by another process if the first to have it was killed.
    What a killed sender had not written down its successor sends again, with the same dedup key: the broker answers
    DUPLICATE and stores nothing. Leaves with 0 if nothing was lost, nothing came again after its ack and nothing is
    left over, else with 1.
    """
    text = input or some_text()
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    with signals_deferred() as heed:
        place = Path(tempfile.mkdtemp(prefix="shmbroker-demo-", dir=directory or Path.cwd()))
        keep = directory is not None
        try:
            verdict, killed = run_demo(
                text,
                place,
                heed,
                at_least=lines,
                senders=producers,
                receivers=consumers,
                settings={"flush_disk_type": "SYNC_FLUSH"} if sync else {},
            )
            heed()
            told = report(text, verdict, killed)
            keep = keep or not told["good"]
        finally:
            if not keep:
                shutil.rmtree(place)
    if session.json or as_json:
        console.print_json(told)
    else:
        _print_table(told)
    if keep:
        click.echo(f"the broker and the histories are in {place}", err=True)
    return ExitCode.OK if told["good"] else ExitCode.FINDING


if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
