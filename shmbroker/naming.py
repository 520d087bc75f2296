"""Names of topics, groups, files and memory objects, and the types of the numbers that go with them.

The rules for topics and groups are RocketMQ's, so that names can move between the two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NewType

from shmbroker.errors import GroupNotExist, NameIllegal

Position = NewType("Position", int)  # bytes since the log began
QueueOffset = NewType("QueueOffset", int)  # messages since the queue began
TopicId = NewType("TopicId", int)  # never reused within a directory
GroupId = NewType("GroupId", int)

RETRY_PREFIX: Final = "%RETRY%"
DEAD_LETTER_PREFIX: Final = "%DLQ%"
BROADCAST_PREFIX: Final = "%BROADCAST%"
TOPIC_LENGTH_MAX: Final = 127
GROUP_LENGTH_MAX: Final = 120
PREFIXED_TOPIC_LENGTH_MAX: Final = 255
RESERVED_GROUPS: Final = frozenset({"DEFAULT_PRODUCER", "DEFAULT_CONSUMER"})
PERMISSIONS: Final = {"r": 4, "w": 2, "rw": 6}  # of topics: RocketMQ's bits, and what people read and write
OBJECT_PREFIX: Final = "shmbroker-"

_ALPHABET: Final = re.compile(r"[%|a-zA-Z0-9_-]+", re.ASCII)
_MEMBER: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}", re.ASCII)
_PASSING: Final = re.compile(r"%BROADCAST%.*\|[0-9a-f]{16}", re.ASCII)
_SEGMENT: Final = re.compile(r"[0-9]{20}", re.ASCII)
_OBJECT: Final = re.compile(r"/shmbroker-[0-9a-f]{32}-[cr]", re.ASCII)


def is_in_names(text: str) -> bool:
    """True if all of its characters may stand in the name of a topic or group."""
    return _ALPHABET.fullmatch(text) is not None


def _check(kind: str, name: object, length_max: int) -> None:
    if not isinstance(name, str):
        raise NameIllegal(f"{kind} {name!r}: must be a str")
    if not name:
        raise NameIllegal(f"{kind} name is empty")
    if len(name) > length_max:
        raise NameIllegal(f"{kind} {name[:40]!r}...: {len(name)} characters, at most {length_max}")
    if not is_in_names(name):
        raise NameIllegal(f"{kind} {name!r}: only letters, digits and % | _ - are allowed")


def check_topic(name: str) -> str:
    """Return ``name``, as a plain str, if it may name a topic, also one for retries or dead letters.

    Raises NameIllegal.
    """
    prefixed = str(name).startswith((RETRY_PREFIX, DEAD_LETTER_PREFIX))
    _check("topic", name, PREFIXED_TOPIC_LENGTH_MAX if prefixed else TOPIC_LENGTH_MAX)
    return str.__str__(name)


def check_group(name: str) -> str:
    """Return ``name`` if it may name a producer or consumer group; else raise NameIllegal."""
    aside = len(DEAD_LETTER_PREFIX) if str(name).startswith(DEAD_LETTER_PREFIX) else 0  # of whoever reads a group's
    _check("group", name, GROUP_LENGTH_MAX + aside)
    if name in RESERVED_GROUPS:
        raise NameIllegal(f"group {name!r} is reserved, as in RocketMQ: choose a name of your own")
    return name


def member_group(group: str, member: object, unique: str) -> str:
    """The group that a member of a broadcasting group is by itself; without a name it is ``unique``. NameIllegal."""
    start = BROADCAST_PREFIX + check_group(group)
    if member is None:
        return check_group(f"{start}|{unique}")
    if not (isinstance(member, str) and _MEMBER.fullmatch(member)):
        raise NameIllegal(f"member {member!r}: 1 to 64 letters, digits, _ and -")
    return check_group(f"{start}%{member}")


def unknown_group(name: str, known: Iterable[str]) -> GroupNotExist:
    """The error for a group that is not among those known; it names the members that it has if it is broadcasting."""
    starts = f"{BROADCAST_PREFIX}{name}%", f"{BROADCAST_PREFIX}{name}|"
    members = sorted(group for group in known if group.startswith(starts))
    each = f"; it is broadcasting, and each member a group: {', '.join(members)}" if members else ""
    return GroupNotExist(f"group {name!r} does not exist{each}")


def is_passing_member(group: str) -> bool:
    """Whether this is the group of a member without a name, which nobody comes back to."""
    return _PASSING.fullmatch(group) is not None


def permission_name(bits: int) -> str:
    """``r``, ``w`` or ``rw``; "-" for none at all."""
    return next((name for name, known in PERMISSIONS.items() if known == bits), "-")


def segment_name(start: int) -> str:
    """File name of the segment whose first byte lies at position ``start``; names sort as positions do."""
    return f"{start:020d}"


def segment_start(name: str) -> Position | None:
    """Position of the first byte of the segment called ``name``, or None if no segment is called so."""
    return Position(int(name)) if _SEGMENT.fullmatch(name) else None


def object_names() -> tuple[str, str]:
    """Names for a new control and ring object: random, so that nobody can occupy them beforehand."""
    token = os.urandom(16).hex()
    return f"/{OBJECT_PREFIX}{token}-c", f"/{OBJECT_PREFIX}{token}-r"


def is_object_name(name: object) -> bool:
    """True if ``name`` is one that ``object_names`` could have made: nothing else is opened or unlinked."""
    return isinstance(name, str) and _OBJECT.fullmatch(name) is not None


class BrokerPaths:
    """Where things lie inside a broker's directory.

    Clients and commands reach them from outside. The supervisor and its workers have gone inside (``enter``), and all
    their names begin there: they make, rename and unlink in the directory that they were started for, whatever its
    path has come to name since; once it was removed, nowhere.
    """

    def __init__(self, directory: Path, root: Path | None = None) -> None:
        self.directory = directory  # its name, for people and command lines
        self.root = directory if root is None else root  # where it is reached
        self.log = self.root / "log"
        self.queues = self.root / "queues"
        self.index = self.root / "index"
        self.timers = self.root / "timers"
        self.checkpoint = self.root / "checkpoint"
        self.run = self.root / "run"
        self.descriptor = self.run / "broker.json"
        self.lock = self.run / "lock"

    @property
    def parts(self) -> tuple[Path, ...]:
        """The directories in it."""
        return self.log, self.queues, self.index, self.timers, self.run

    def make(self) -> None:
        """Make the directory and what stands in it, for its owner alone. What exists keeps its mode."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self.parts:
            path.mkdir(mode=0o700, exist_ok=True)

    def enter(self) -> BrokerPaths:
        """Make the directory this process's working directory; the paths as they are called from there."""
        os.chdir(self.directory)
        return self.entered()

    def entered(self) -> BrokerPaths:
        """The paths as a process calls them whose working directory this already is."""
        return BrokerPaths(self.directory, Path())

    def role_lock(self, role: str) -> Path:
        """Held by the one process that works as ``role``."""
        return self.run / f"{role}.lock"

    def worker_log(self, role: str) -> Path:
        return self.run / f"{role}.log"
