"""What people see: sizes, durations, tables, progress bars. rich is loaded only when something is drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click

from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Failure, Session

if TYPE_CHECKING:
    from rich.table import Table


def print_json(value: Any) -> None:
    """One JSON document; what JSON does not know (paths, enums) as text."""
    click.echo(json.dumps(value, indent=2, default=str, ensure_ascii=False))


@contextmanager
def done(what: str) -> Iterator[None]:
    """Around the answer of a command that has changed something: ``what`` stands, also if stdout cannot be written."""
    try:
        yield
    except BrokenPipeError:  # whoever read our output wants no answer
        pass
    except Failure as failure:
        raise Failure(f"{failure}; done all the same: {what}", failure.code) from failure


def print_done(session: Session, what: str, answer: dict[str, Any]) -> None:
    """The answer of a command that has changed something: a line for people, or JSON."""
    with done(what):
        if session.json:
            print_json(answer)
        else:
            click.echo(what)


def size(count: float) -> str:
    """Bytes for people: 1,023 B, 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people: 3 ms, 1.5 s, 2 h 05 min."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours, days = int(seconds) // 60, int(seconds) // 3600, int(seconds) // 86_400
    if hours == 0:
        return f"{minutes} min {int(seconds) % 60:02d} s"
    return f"{hours} h {minutes % 60:02d} min" if days == 0 else f"{days} d {hours % 24:02d} h"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "none") -> None:
    """A table on stdout. A column whose name begins with ``>`` is right-aligned. Plain text when nobody watches."""
    cells = [[str(cell) for cell in row] for row in rows]
    if not cells:
        click.echo(f"{title}: {empty}" if title else empty)
        return
    if not sys.stdout.isatty():
        _plain_table(title, [name.lstrip(">") for name in columns], cells)
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape

    drawn = _rich_table(title, box.SIMPLE_HEAD, columns)
    for row in cells:
        drawn.add_row(*(escape(cell) for cell in row))
    Console().print(drawn)


def _rich_table(title: str, style: Any, columns: Sequence[str]) -> Table:
    from rich.table import Table

    drawn = Table(title=title or None, title_justify="left", title_style="bold", box=style, pad_edge=False)
    for name in columns:
        drawn.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return drawn


def _plain_table(title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
    """Aligned with blanks, never cut: programs and tests read it too."""
    widths = [max(len(row[i]) for row in [list(columns), *rows]) for i in range(len(columns))]
    if title:
        click.echo(f"{title}:")
    for row in [list(columns), *rows]:
        click.echo("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def confirm(question: str, yes: bool) -> None:
    """Go on only if a person says so, or has said so beforehand with ``--yes``. Raises Failure."""
    if yes:
        return
    click.echo(f"{question} [y/N] ", nl=False, err=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Failure("nothing changed; --yes answers this question", ExitCode.FINDING)


class Advance(Protocol):
    """Tells a progress bar that so much more is done."""

    def __call__(self, amount: float) -> None: ...


@contextmanager
def progress(label: str, total: float | None, *, unit: str = "bytes") -> Iterator[Advance]:
    """A progress bar on stderr while somebody watches, nothing otherwise. ``total`` None: unknown."""
    if not sys.stderr.isatty():
        yield lambda amount: None  # noqa: ARG005 - nobody watches
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    amounts = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amounts, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)
