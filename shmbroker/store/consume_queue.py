"""Consume queues: where the messages of each queue lie in the log. Derived from the log, and rebuilt from it at will.

One directory per queue, ``queues/<topic_id>/<queue_id>/``, with one file per 65,536 offsets, named by its first offset
in 20 digits. Entry ``i`` of a queue therefore has one place, known without looking, and writing it twice is harmless:

     0          8         12        16        20        24              32                  48           60    64
     +----------+---------+---------+---------+---------+---------------+-------------------+------------+-----+
     | SBCQUEUE | version | entries | topic   | queue   | first offset  | store id          | zeros      | crc |
     +----------+---------+---------+---------+---------+---------------+-------------------+------------+-----+
  64 | position             8 | size 4  | tag hash 4 |  entry of the file's first offset ...

All little-endian. A size of 0 is a hole: an offset that no message has (before the first one kept when the queue was
rebuilt, or skipped by a recovery that found progress beyond a cut, R4), or what the disk has lost: only the log tells
(queue_hole.py). Positions grow with the offsets.

What a crash leaves: a killed writer leaves a run half written and others unsynced; its successor, who starts at the
checkpoint's ``dispatched``, writes the same bytes again. After a loss of power nothing at or past that position is
trusted: :meth:`ConsumeQueues.truncate` drops it and recovery dispatches it anew.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from shmbroker import access
from shmbroker._native._core import RECORD_HEADER_BYTES, crc32c
from shmbroker.errors import CorruptLog

ENTRY: Final = struct.Struct("<QII")
ENTRY_BYTES: Final = ENTRY.size
ENTRIES_PER_FILE: Final = 65_536
OPEN_FILES_MAX: Final = 256

_HEADER: Final = struct.Struct("<8s4IQ16s12xI")
_HEADER_BYTES: Final = _HEADER.size
_MAGIC: Final = b"SBCQUEUE"
_VERSION: Final = 1
_SEARCH_ENTRIES: Final = 256  # read at a time where holes must be stepped over


class Entry(NamedTuple):
    """One message of a queue: its offset in the queue, and the position, size and tag hash of its record."""

    offset: int
    position: int
    size: int
    tag_hash: int


class ConsumeQueues:
    """All consume queues of one store. A writer and its readers are different objects; neither is thread-safe."""

    def __init__(
        self,
        directory: Path,
        store_id: bytes,
        *,
        writable: bool = False,
        entries_per_file: int = ENTRIES_PER_FILE,
        open_files_max: int = OPEN_FILES_MAX,
    ) -> None:
        self._directory = directory
        self._store_id = store_id
        self._writable = writable
        self._per_file = entries_per_file
        self._open_max = open_files_max
        self._open: OrderedDict[tuple[int, int, int], int] = OrderedDict()
        self._dirty = threading.Lock()  # guards the two below
        self._dirty_files: set[tuple[int, int, int]] = set()
        self._dirty_directories: set[Path] = set()
        if writable:
            directory.mkdir(mode=access.directory_mode(), exist_ok=True)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    # ---- writing --------------------------------------------------------------------------------------------------

    def write(self, topic_id: int, queue_id: int, offset: int, entries: bytes | memoryview) -> None:
        """Store a run of packed entries whose first belongs to ``offset``. Writing the same run again changes nothing.

        Raises OSError; the run may then be stored in part, and is to be written again.
        """
        view = memoryview(entries)
        while view:
            index = offset % self._per_file
            part = view[: (self._per_file - index) * ENTRY_BYTES]
            fd = self._file(topic_id, queue_id, offset - index, create=True)
            self._write_all(fd, part, _HEADER_BYTES + index * ENTRY_BYTES)
            with self._dirty:  # after the write: see sync
                self._dirty_files.add((topic_id, queue_id, offset - index))
            offset += len(part) // ENTRY_BYTES
            view = view[len(part) :]

    def dirty(self) -> set[Path]:
        """Paths of files and directories that this object has changed and not synced yet."""
        with self._dirty:
            return {self._path(*key) for key in self._dirty_files} | self._dirty_directories

    def sync(self) -> None:
        """Make all that this object has changed durable. Raises OSError; what it was to sync is then dirty again.

        May be called by another thread than the writer's. Who loads the writer's position first has all before it.
        """
        with self._dirty:
            files, self._dirty_files = self._dirty_files, set()
            directories, self._dirty_directories = self._dirty_directories, set()
        try:
            _sync_paths({self._path(*key) for key in files} | directories)
        except BaseException:
            with self._dirty:
                self._dirty_files |= files
                self._dirty_directories |= directories
            raise

    def truncate(self, position: int) -> None:
        """Drop every entry at or past ``position``, and files that power loss left without a header."""
        for topic_id, queue_id in self.queues():
            for first in reversed(self._files(topic_id, queue_id)):
                if _is_blank(self._path(topic_id, queue_id, first)):
                    self._forget(topic_id, queue_id, first)
                    continue
                fd = self._file(topic_id, queue_id, first)
                end = (os.fstat(fd).st_size - _HEADER_BYTES) // ENTRY_BYTES
                keep = self._search(topic_id, queue_id, first, first + end, position) - first
                if keep == 0:
                    self._forget(topic_id, queue_id, first)
                    continue
                if keep < end or (os.fstat(fd).st_size - _HEADER_BYTES) % ENTRY_BYTES:
                    os.ftruncate(fd, _HEADER_BYTES + keep * ENTRY_BYTES)
                    with self._dirty:
                        self._dirty_files.add((topic_id, queue_id, first))
                break  # all earlier files lie before the position

    def delete_before(self, topic_id: int, queue_id: int, offset: int) -> int:
        """Remove the files that hold only entries before ``offset``; the queue's last file stays. Returns how many."""
        gone = [first for first in self._files(topic_id, queue_id)[:-1] if first + self._per_file <= offset]
        for first in gone:
            self._forget(topic_id, queue_id, first)
        return len(gone)

    def delete_topic(self, topic_id: int) -> None:
        """Remove all queues of a deleted topic. Topic ids are never used again, so nobody waits for these files."""
        for key in [key for key in self._open if key[0] == topic_id]:
            os.close(self._open.pop(key))
        shutil.rmtree(self._directory / str(topic_id), ignore_errors=True)
        with self._dirty:
            self._dirty_directories.add(self._directory)

    def close_unlinked(self) -> None:
        """Close files that another object has removed: while one is open, its room on the disk does not come free."""
        for key in [key for key, fd in self._open.items() if os.fstat(fd).st_nlink == 0]:
            os.close(self._open.pop(key))

    # ---- reading --------------------------------------------------------------------------------------------------

    def queues(self) -> Iterator[tuple[int, int]]:
        """(topic id, queue id) of every queue that has files."""
        for topic_id in _numbers(self._directory):
            for queue_id in _numbers(self._directory / str(topic_id)):
                yield topic_id, queue_id

    def read(self, topic_id: int, queue_id: int, offset: int, count: int, limit: int) -> list[Entry]:
        """The next entries at or after ``offset``, at most ``count`` of them, those before position ``limit``.

        Holes are passed over: what lies between ``offset`` and the first entry returned does not exist.

        The caller has loaded ``limit`` (``dispatched`` or less) before this call. Raises CorruptLog for entries that
        make no sense. An entry is still only a hint: the record that it names is checked when it is read.
        """
        found: list[Entry] = []
        previous, want = -1, count
        while len(found) < count and (data := self._read(topic_id, queue_id, offset, want)):
            for position, size, tag_hash in ENTRY.iter_unpack(data):
                if position >= limit or len(found) == count:
                    return found
                if size:
                    if position <= previous or size < RECORD_HEADER_BYTES:
                        raise self.corrupt(topic_id, queue_id, offset, f"entry ({position}, {size}) after {previous}")
                    found.append(Entry(offset, position, size, tag_hash))
                    previous = position
                offset += 1
            want = max(count - len(found), _SEARCH_ENTRIES)
        return found

    def packed(self, topic_id: int, queue_id: int, offset: int, count: int) -> bytes:
        """At most ``count`` entries from ``offset`` on as they stand in the file, holes as zeros; b"" past the end."""
        return self._read(topic_id, queue_id, offset, count)

    def offsets(self, topic_id: int, queue_id: int) -> tuple[int, int]:
        """(first, end): the offsets for which the queue has files. (0, 0) for a queue without."""
        files = self._files(topic_id, queue_id)
        while files:
            size = self._path(topic_id, queue_id, files[-1]).stat().st_size
            if size > _HEADER_BYTES:
                return files[0], files[-1] + (size - _HEADER_BYTES) // ENTRY_BYTES
            files.pop()
        return 0, 0

    def find_position(self, topic_id: int, queue_id: int, position: int) -> int:
        """The first offset whose record lies at or past ``position``; the queue's end if none does."""
        first, end = self.offsets(topic_id, queue_id)
        return self._search(topic_id, queue_id, first, end, position)

    def last_before(self, topic_id: int, queue_id: int, offset: int) -> Entry | None:
        """The last entry before ``offset`` that is no hole."""
        first = min(self._files(topic_id, queue_id), default=offset)
        while offset > first:
            start = max(first, offset - _SEARCH_ENTRIES, (offset - 1) // self._per_file * self._per_file)
            packed = ENTRY.iter_unpack(self._read(topic_id, queue_id, start, offset - start))
            found = [Entry(at, *entry) for at, entry in enumerate(packed, start) if entry[1]]
            if found:
                return found[-1]
            offset = start
        return None

    def corrupt(self, topic_id: int, queue_id: int, offset: int, what: str) -> CorruptLog:
        """The error to raise for a damaged file."""
        path = self._path(topic_id, queue_id, offset - offset % self._per_file)
        remedy = "stop the broker; `shmbroker log rebuild --replace` makes it anew"
        return CorruptLog(f"{path}: offset {offset}: {what}; {remedy}", path=str(path))

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _search(self, topic_id: int, queue_id: int, first: int, end: int, position: int) -> int:
        while first < end:
            middle = (first + end) // 2
            entry = self._entry_from(topic_id, queue_id, middle, end)
            if entry is None or entry.position >= position:
                end = middle
            else:
                first = entry.offset + 1
        return end

    def _entry_from(self, topic_id: int, queue_id: int, offset: int, end: int) -> Entry | None:
        """The first entry in [offset, end) that is no hole."""
        want = 1
        while offset < end:
            data = self._read(topic_id, queue_id, offset, min(want, end - offset))
            if not data:
                return None
            for position, size, tag_hash in ENTRY.iter_unpack(data):
                if size:
                    return Entry(offset, position, size, tag_hash)
                offset += 1
            want = _SEARCH_ENTRIES
        return None

    def _read(self, topic_id: int, queue_id: int, offset: int, count: int) -> bytes:
        """Packed entries from ``offset`` to the end of its file at most; b"" past the queue's end.

        A missing file with files behind it (no message was kept there) reads as holes.
        """
        index = offset % self._per_file
        count = min(count, self._per_file - index)
        try:
            fd = self._file(topic_id, queue_id, offset - index)
        except FileNotFoundError:
            behind = any(first > offset for first in self._files(topic_id, queue_id))
            return bytes(count * ENTRY_BYTES) if behind else b""
        data = os.pread(fd, count * ENTRY_BYTES, _HEADER_BYTES + index * ENTRY_BYTES)
        if len(data) < ENTRY_BYTES and any(first > offset for first in self._files(topic_id, queue_id)):
            return bytes(count * ENTRY_BYTES)
        return data[: len(data) // ENTRY_BYTES * ENTRY_BYTES]

    def _file(self, topic_id: int, queue_id: int, first: int, *, create: bool = False) -> int:
        """Descriptor of the file whose first offset is ``first``; its header is checked, or made."""
        key = topic_id, queue_id, first
        fd = self._open.get(key)
        if fd is not None:
            self._open.move_to_end(key)
            return fd
        path = self._path(*key)
        fd = self._open_file(path, create)
        try:
            header = os.pread(fd, _HEADER_BYTES, 0)
            if create and not any(header):
                # A fresh file, or one whose creator was killed right here: the header comes before any entry.
                self._write_all(fd, memoryview(self._header(*key)), 0)
            elif not any(header):
                raise FileNotFoundError(errno.ENOENT, "consume queue file has no header yet", str(path))
            elif header != self._header(*key):
                raise self.corrupt(topic_id, queue_id, first, "the file's header is not this queue's")
        except BaseException:
            os.close(fd)
            raise
        self._open[key] = fd
        if len(self._open) > self._open_max:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def _open_file(self, path: Path, create: bool) -> int:
        flags = os.O_CLOEXEC | (os.O_RDWR if self._writable else os.O_RDONLY)
        if create:  # also where the file is there: who made it may have been killed before it synced the directories
            with self._dirty:
                self._dirty_directories.update((path.parent, path.parent.parent, self._directory))
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            if not create:
                raise
        for directory in (path.parent.parent, path.parent):
            directory.mkdir(mode=access.directory_mode(), exist_ok=True)
        return os.open(path, flags | os.O_CREAT, access.file_mode())

    def _forget(self, topic_id: int, queue_id: int, first: int) -> None:
        fd = self._open.pop((topic_id, queue_id, first), None)
        if fd is not None:
            os.close(fd)
        path = self._path(topic_id, queue_id, first)
        path.unlink(missing_ok=True)
        with self._dirty:
            self._dirty_directories.add(path.parent)

    def _header(self, topic_id: int, queue_id: int, first: int) -> bytes:
        fields = _MAGIC, _VERSION, self._per_file, topic_id, queue_id, first, self._store_id
        packed = _HEADER.pack(*fields, 0)
        return _HEADER.pack(*fields, crc32c(packed[:-4]))

    def _path(self, topic_id: int, queue_id: int, first: int) -> Path:
        return self._directory / str(topic_id) / str(queue_id) / f"{first:020d}"

    def _files(self, topic_id: int, queue_id: int) -> list[int]:
        return _numbers(self._directory / str(topic_id) / str(queue_id))

    @staticmethod
    def _write_all(fd: int, view: memoryview, at: int) -> None:
        while view:
            written = os.pwrite(fd, view, at)
            view = view[written:]
            at += written


def _sync_paths(paths: set[Path]) -> None:
    """fdatasync files and directories; deeper ones first, so that a directory is synced after what it names.

    May run in another thread than the writer: it opens each path itself. A path deleted meanwhile needs no sync.
    """
    for path in sorted(paths, key=lambda path: (-len(path.parts), path)):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)


def _numbers(directory: Path) -> list[int]:
    try:
        return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
    except FileNotFoundError:
        return []


def _is_blank(path: Path) -> bool:
    """Power was lost before the header reached the disk: short, or zeros."""
    with path.open("rb", buffering=0) as file:
        header = file.read(_HEADER_BYTES)
    return len(header) < _HEADER_BYTES or not any(header)
