"""What a benchmark answers: a figure, the floor beside it, the target, and whether it was reached."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shmbroker.tools import console

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Target:
    """``at_least`` or ``at_most``: of the figure itself, or of its ratio to the floor."""

    at_least: float | None = None
    at_most: float | None = None
    of_floor: bool = False

    def reached(self, value: float, floor: float | None) -> bool:
        measured = value / floor if self.of_floor and floor else value
        return (self.at_least is None or measured >= self.at_least) and (
            self.at_most is None or measured <= self.at_most
        )


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the result. ``value`` and ``floor`` share ``unit``; ``floor`` is what bare C did meanwhile."""

    name: str
    value: float
    unit: str  # "1/s", "B/s", "s", "B" or "" for a plain count
    floor: float | None = None
    floor_name: str = ""
    target: Target | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.value / self.floor if self.floor else None

    @property
    def reached(self) -> bool | None:
        """None if no target was set."""
        return None if self.target is None else self.target.reached(self.value, self.floor)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio, "reached": self.reached}


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """A figure that this machine or these options could not give, and why; ``failed`` if it should have been."""

    name: str
    reason: str
    failed: bool = False

    @property
    def reached(self) -> bool | None:
        return False if self.failed else None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"reached": self.reached}


Result = Figure | NotMeasured


def alternate(repeats: int, floor: Callable[[], T], figure: Callable[[], U]) -> tuple[T, U]:
    """Medians of ``repeats`` runs of floor, figure, floor, figure ...: both see the same minutes of the machine."""
    floors: list[T] = []
    figures: list[U] = []
    for _ in range(repeats):
        floors.append(floor())
        figures.append(figure())
    return median(floors), median(figures)


def median(values: Sequence[Any]) -> Any:
    """Median of numbers, or of each field of dataclasses of numbers."""
    kind = type(values[0])
    if not dataclasses.is_dataclass(kind):
        return statistics.median(values)
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: statistics.median(getattr(value, name) for value in values) for name in names})


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of a sorted, non-empty sequence."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def human(value: float | None, unit: str) -> str:
    """``1.53 M/s``, ``2.31 GiB/s``, ``126 us``: four characters of number are all that a noisy machine means."""
    if value is None:
        return ""
    if unit == "s":
        for factor, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
            if value >= factor:
                return f"{value / factor:.3g} {name}"
        return f"{value * 1e9:.0f} ns"
    if unit in ("B", "B/s"):
        for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
            if abs(value) >= 1024**power:
                return f"{value / 1024**power:.3g} {name}{unit[1:]}"
        return f"{value:.0f} {unit}"
    for factor, name in ((1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{name}{unit[1:]}"
    return f"{value:.3g} {unit[1:]}".rstrip()


def print_table(results: Sequence[Result]) -> None:
    """The results for people."""
    console.table(
        "shmbroker beside the bare machine",
        ["figure", ">measured", ">floor", "", ">ratio", "target", "", "note"],
        [_row(result) for result in results],
    )


def _row(result: Result) -> Sequence[str]:
    if isinstance(result, NotMeasured):
        return (result.name, "failed" if result.failed else "skipped", "", "", "", "", "", result.reason)
    floor = human(result.floor, result.unit) if result.floor else ""
    ratio = f"{result.ratio:.2f}" if result.ratio is not None else ""
    verdict = {None: "", True: "pass", False: "MISS"}[result.reached]
    value = human(result.value, result.unit)
    return (result.name, value, floor, result.floor_name, ratio, _target_text(result), verdict, result.note)


def _target_text(figure: Figure) -> str:
    if figure.target is None:
        return ""
    at_least = figure.target.at_least is not None
    limit = figure.target.at_least if at_least else figure.target.at_most
    text = f"{limit:g} x floor" if figure.target.of_floor else human(limit, figure.unit)
    return f"{'>=' if at_least else '<='} {text}"
