"""What all handles of a broker have in common: they end with their ``with`` block and belong to their process.

And what those that are made through a broker's handle ask of it.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Protocol, Self

if TYPE_CHECKING:
    from pathlib import Path

    from shmbroker._native._core import Client
    from shmbroker.config import Config
    from shmbroker.log_files import LogFiles


class Home(Protocol):
    """What producers and consumers alike ask of the broker handle that made them."""

    config: Config
    files: LogFiles

    @property
    def directory(self) -> Path:
        """The broker's directory."""

    def attach(self) -> Client:
        """This process's attachment to the running broker; a new one after a restart of the broker or a fork."""

    def attach_serving(self, timeout: float) -> Client:
        """The same, but while the broker is stopping wait ``timeout`` seconds for what comes after it."""


class Handle:
    """A broker, or what is made through it. Stands before a native base, which has a ``__reduce__`` of its own.

    It holds a slot, mappings and threads of its process: none of them means anything in another.
    """

    def close(self) -> None:
        """Give back all that it holds; once more does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} belongs to its process and cannot be pickled: {self._in_another_process()}")

    def _in_another_process(self) -> str:
        """What to do there instead."""
        return "open the broker in the other process"
