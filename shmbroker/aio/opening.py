"""What ``shmbroker.aio`` makes is made off the loop: awaited, or by the ``async with`` block that it ends with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar


class AsyncHandle:
    """A broker, or what is made through it, of one event loop."""

    async def close(self) -> None:
        """Give back all that it holds; once more does nothing."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Closeable(Protocol):
    async def close(self) -> None: ...


Made = TypeVar("Made", bound=_Closeable)


class Opening(Generic[Made]):
    """``consumer = await opening``, or ``async with opening as consumer``. Once."""

    def __init__(self, make: Callable[[], Awaitable[Made]]) -> None:
        self._make = make
        self._made: Made | None = None

    def __await__(self) -> Generator[Any, Any, Made]:
        return self._make().__await__()

    async def __aenter__(self) -> Made:
        self._made = await self._make()
        return self._made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._made is not None
        await self._made.close()
