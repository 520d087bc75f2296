"""``make bench``: what the broker does on this machine, each figure beside the machine's own floor."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

import shmbroker
from shmbroker.tools import bench_delivery, bench_figures, bench_lifecycle, bench_timers, console
from shmbroker.tools.bench_figures import Bench, Results
from shmbroker.tools.bench_floors import Floors, NoCompiler
from shmbroker.tools.bench_processes import Failed
from shmbroker.tools.bench_report import NotMeasured, Result, print_table
from shmbroker.tools.cli import main
from shmbroker.tools.exit_codes import ExitCode
from shmbroker.tools.session import Failure

FIGURES: dict[str, Callable[[Bench], Results]] = {
    "burst": bench_figures.burst,
    "sustained": bench_figures.sustained,
    "end-to-end": bench_figures.end_to_end,
    "durable": bench_figures.durable,
    "one-way": bench_figures.one_way,
    "machine": bench_figures.machine,
    "system-calls": bench_lifecycle.system_calls,
    "import": bench_lifecycle.import_time,
    "start": bench_lifecycle.start,
    "restart": bench_lifecycle.restart,
    "memory": bench_lifecycle.memory,
    "push": bench_delivery.push,
    "receive-ack": bench_delivery.receive_and_ack,
    "lag": bench_delivery.lag,
    "many": bench_delivery.many,
    "idle": bench_delivery.idle,
    "timers": bench_timers.timers,
}


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(FIGURES)), help="Only these; may be given several times.")
@click.option("--quick", is_flag=True, help="Shorter runs and three repeats: for a look, not for a record.")
@click.option("--full", is_flag=True, help="Also the restart with a log of 20 GiB.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
@click.option(
    "-d",
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="Make the broker's files below this one, on the disk that is to be measured.  [default: here]",
)
def bench(only: Sequence[str], quick: bool, full: bool, json_file: Path | None, directory: Path) -> int:
    """Measure the broker, each figure beside what the bare machine does in the same minutes.

    \b
    make bench
    shmbroker bench --quick --only burst --only durable --json figures.json

    Figures are medians of runs that alternate with runs of their floor. Leaves with 0 if every target was reached,
    else with 1.
    """
    chosen = {name: run for name, run in FIGURES.items() if not only or name in only}
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=directory.resolve()) as place:
            results = measure(Bench(Floors(Path(place)), Path(place), quick, full), chosen)
    except NoCompiler as error:
        raise Failure(str(error), ExitCode.INTERNAL) from error
    print_table(results)
    if json_file is not None:
        json_file.write_text(json.dumps(document(results, quick=quick), indent=1) + "\n")
    return ExitCode.FINDING if any(result.reached is False for result in results) else ExitCode.OK


def measure(bench: Bench, chosen: dict[str, Callable[[Bench], Results]]) -> list[Result]:
    """Run the chosen benchmarks one after another, never two at a time."""
    results: list[Result] = []
    with console.progress("measuring", len(chosen), unit="benchmarks") as advance:
        for name, run in chosen.items():
            try:
                results.extend(run(bench))  # one by one: those before a failure count
            except (Failed, shmbroker.ShmBrokerError, subprocess.SubprocessError, OSError) as error:
                results.append(NotMeasured(name, f"{type(error).__name__}: {error}", failed=True))
            advance(1)
    return results


def document(results: Sequence[Result], *, quick: bool) -> dict[str, Any]:
    """The results and what they were measured on, for a file."""
    return {
        "shmbroker": shmbroker.__version__,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": quick,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": bench_figures.cores(),
        "units": {"1/s": "per second", "B/s": "bytes per second", "s": "seconds", "B": "bytes", "": "a count"},
        "figures": [result.as_dict() for result in results],
    }


if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
