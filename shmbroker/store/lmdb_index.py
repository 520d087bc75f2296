"""What the indexes of the log have in common: tables in LMDB that hold what the log says before ``position``.

LMDB's keys sort as bytes, so all numbers are big-endian. Beside the tables of its kind each index has

    meta     "store" -> store id and version, "position" -> the log position that the tables have applied

``position`` is written in the same transaction as the entries it stands for, and LMDB syncs the data of a transaction
before the page that makes it the newest (``metasync=False`` only lets the last transactions go at a loss of power).
So the tables hold what ``position`` says, no less and no more. Nothing is committed before it is durable in the log.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final

import lmdb

from shmbroker import access

logger = logging.getLogger(__name__)

DAMAGED: Final = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.ProblemError,
    lmdb.VersionMismatchError,
)
MAP_BYTES: Final = 64 << 20  # address space at first; doubled when full
U64: Final = struct.Struct(">Q")
_NEW_BYTES: Final = 256 << 10  # more than a new, empty index takes


class _Foreign(lmdb.InvalidError):
    """The environment opened, but is not this store's index."""


class LmdbIndex:
    """The index of one store. One process writes; any number of others read, each with an object of its own."""

    NAME: ClassVar[str]
    TABLES: ClassVar[tuple[str, ...]]
    VERSION: ClassVar[bytes]

    def __init__(self, directory: Path, store_id: bytes, *, writable: bool = False, map_bytes: int = MAP_BYTES) -> None:
        """Open the index; a writer makes it, and makes it anew if it is another store's or damaged.

        Raises lmdb.Error: there is none to read. OSError: there is no room for a new one.
        """
        self._directory = directory
        self._mark = store_id + self.VERSION
        self._writable = writable
        self._map_bytes = map_bytes
        try:
            self._open()
        except DAMAGED as error:
            if not writable:
                raise
            logger.warning("%s %s: %s; it is built anew from the log", self.NAME, directory, error)
            self.reset()

    @property
    def position(self) -> int:
        """The tables hold everything before this position, durably but for the last moments."""
        return self._position

    def close(self) -> None:
        self._environment.close()

    def reset(self) -> None:
        """Throw everything away: position 0, to be filled from the log again."""
        if hasattr(self, "_environment"):
            self._environment.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._open()

    def _commit(self, position: int, change: Callable[[Any], None]) -> None:
        """Make what ``change`` does in a transaction, and ``position``, durable together; in a larger map if need be.

        Raises lmdb.Error (disk full, bad map): the tables are as before.
        """
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    change(transaction)
                    transaction.put(b"position", U64.pack(position), db=self._tables["meta"])
                break
            except lmdb.MapFullError:
                self._map_bytes *= 2
                self._environment.set_mapsize(self._map_bytes)
        self._position = position

    def _begin(self) -> Any:
        """A reading transaction; follows a writer in another process that has made the map larger."""
        try:
            return self._environment.begin()
        except lmdb.MapResizedError:
            self._environment.set_mapsize(0)
            return self._environment.begin()

    def _open(self) -> None:
        if self._writable:
            self._directory.mkdir(mode=access.directory_mode(), exist_ok=True)
            self._check_room()
        self._environment = lmdb.open(
            str(self._directory),
            map_size=self._map_bytes if self._writable else 0,
            max_dbs=len(self.TABLES) + 1,
            mode=access.file_mode(),
            readonly=not self._writable,
            metasync=False,
            readahead=False,
            max_readers=64,
            create=self._writable,
        )
        try:
            self._environment.reader_check()  # slots of killed readers
            self._map_bytes = max(self._map_bytes, self._environment.info()["map_size"])
            self._tables: dict[str, Any] = {
                name: self._environment.open_db(name.encode(), create=self._writable) for name in (*self.TABLES, "meta")
            }
            with self._environment.begin(write=self._writable) as transaction:
                meta = self._tables["meta"]
                if self._writable and transaction.get(b"store", db=meta) is None:
                    transaction.put(b"store", self._mark, db=meta)
                    transaction.put(b"position", U64.pack(0), db=meta)
                position = transaction.get(b"position", db=meta)
                if transaction.get(b"store", db=meta) != self._mark or position is None:
                    raise _Foreign("it belongs to another store or version")
                (self._position,) = U64.unpack(position)
        except BaseException:
            self._environment.close()
            raise

    def _check_room(self) -> None:
        """LMDB writes its lock file through a mapping: a full disk would be SIGBUS. Once made, it has its room."""
        disk = os.statvfs(self._directory)
        if not (self._directory / "lock.mdb").exists() and disk.f_bavail * disk.f_frsize < _NEW_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))
