"""Settings: every key with its default, unit, limits and meaning, and the only reader of files and environment.

Two kinds. *Layout* keys shape the shared memory and the segments: they are fixed when the memory (``segment_bytes``:
the directory) is made and compared when it is attached. *Runtime* keys may differ from one start to the next.

The first of these that names a key wins: argument, environment ``SHMBROKER_<KEY>``, ``DIRECTORY/broker.toml`` or the
file given instead, default. A file is flat, like RocketMQ's ``broker.conf``, and RocketMQ's spelling of a key is as
good as ours; ``config/README.md`` has a row for each. Units stand in the names: ``sync_flush_timeout_ms = 5000`` in a
file is ``sync_flush_timeout=5.0``, float seconds, as an argument of ``shmbroker.open``.

``load`` reads once, when a broker is opened. The supervisor writes the result into the broker's descriptor, and its
workers and clients take it from there: all processes of one broker run with one configuration.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from shmbroker.delays import DEFAULT_LEVELS, parse_delay_levels
from shmbroker.errors import ConfigError

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
FILE_NAME: Final = "broker.toml"
ENVIRONMENT_PREFIX: Final = "SHMBROKER_"
PAGE_BYTES: Final = 4096
RECORD_HEADER_BYTES: Final = 80
SMALLEST_RECORD_BYTES: Final = 88  # header, one byte of body, padding
BLOCK_ENTRIES: Final = 128  # SB_BLOCK_ENTRIES
RESERVE_SHARE: Final = 8  # that part of the ring is kept for the broker's own records (R16)
_NUMBER: Final = re.compile(r"(\d+)\s*([A-Za-z]*)", re.ASCII)
_SIZE_UNITS: Final = {"": 1, "B": 1, "KIB": KIB, "MIB": MIB, "GIB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_BOOLEANS: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}  # in any case


class Rule(NamedTuple):
    """What a value must be, and what it means: the column ``meaning`` of ``config/README.md``."""

    meaning: str
    low: float
    high: float
    choices: tuple[str, ...] = ()
    later: tuple[str, ...] = ()  # values with a meaning that this version has no code for
    power_of_two: bool = False
    multiple_of: int = 1
    form: str = ""  # of a text


def _key(default: Any, meaning: str, low: float = 0, high: float = 0, **rest: Any) -> Any:
    return field(default=default, metadata={"rule": Rule(meaning, low, high, **rest)})


def largest_body(room_bytes: int) -> int:
    """The largest body that a ring, or a segment, of this size takes: an append may fill a quarter of it."""
    return max(1, room_bytes // 4 - RECORD_HEADER_BYTES)


def room_for(body_bytes: int) -> int:
    """The smallest power of two that, as ring or segment, takes bodies of this size."""
    return 1 << (4 * (body_bytes + RECORD_HEADER_BYTES) - 1).bit_length()


def size_text(size_bytes: int) -> str:
    """A size as it may be written in a setting: in the largest unit that says it exactly."""
    unit, factor = next(
        ((unit, factor) for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)) if size_bytes % factor == 0),
        ("B", 1),
    )
    return f"{size_bytes // factor} {unit}"


@dataclass(frozen=True, slots=True)
class LayoutConfig:
    """Sizes of the shared memory and of the segments, and whose the memory is; fixed at creation."""

    ring_bytes: int = _key(
        32 * MIB, "bytes of the newest messages kept in shared memory", 64 * KIB, 2 * GIB, power_of_two=True
    )
    segment_bytes: int = _key(
        64 * MIB,
        "bytes of log in one segment file; fixed for the life of a directory",
        64 * KIB,
        4 * GIB,
        multiple_of=PAGE_BYTES,
    )
    max_message_bytes: int = _key(
        4 * MIB, "largest body; four, with 80 bytes of header each, must fit into ring and segment", 1, GIB
    )
    max_topics: int = _key(256, "topics, retry and dead-letter topics included", 1, 65_535)
    max_queues: int = _key(1024, "queues of all topics together", 1, 65_535)
    max_groups: int = _key(128, "consumer groups", 1, 65_535)
    max_clients: int = _key(256, "processes attached at one time", 1, 4_094)
    max_waiters: int = _key(
        256, "threads and coroutines asleep at one time: in a durable send or an empty receive", 2, 512
    )
    claim_tables: int = _key(384, "pairs of a group and a queue that it consumes", 1, 65_535)
    claim_window: int = _key(
        1024, "messages of one queue claimed and unacknowledged at one time, per group", 64, 65_536, power_of_two=True
    )
    overflow_claims: int = _key(4096, "unacknowledged claims older than their window, all groups together", 1, 1 << 20)
    id_window: int = _key(
        16_384, "message ids and dedup keys remembered against a second copy", 64, 1 << 24, power_of_two=True
    )
    share_with_group: str = _key("", "members of this group may use the broker as well as the directory's owner")

    def __post_init__(self) -> None:
        _check_fields(self)
        rooms = {name: getattr(self, name) for name in ("ring_bytes", "segment_bytes")}
        small = {name: room for name, room in rooms.items() if self.max_message_bytes > largest_body(room)}
        if small:
            limits = " and of ".join(f"{name} ({size_text(room)})" for name, room in small.items())
            needed = room_for(self.max_message_bytes)
            larger = " and ".join(f'{name} = "{size_text(needed)}"' for name in small)
            raise ConfigError(
                f"max_message_bytes = {self.max_message_bytes}: a message fills at most a quarter of {limits}, its "
                f"header included: at most {largest_body(min(small.values()))} bytes of body"
                + (f"; this size takes {larger}" if all(needed <= RULES[name].high for name in small) else "")
            )


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """Policies and times; may differ from one start to the next."""

    flush_disk_type: str = _key(
        "ASYNC_FLUSH", "SYNC_FLUSH: SEND_OK means the message is on the disk", choices=("ASYNC_FLUSH", "SYNC_FLUSH")
    )
    broker_role: str = _key(
        "ASYNC_MASTER", "SEND_OK asks for no slave", choices=("ASYNC_MASTER",), later=("SYNC_MASTER",)
    )
    sync_flush_timeout_ms: int = _key(5000, "a send waits so long for the disk, then FLUSH_DISK_TIMEOUT", 1, 3_600_000)
    slave_timeout_ms: int = _key(
        3000, "without effect until there is replication: how long a send waits for a slave", 1, 3_600_000
    )
    send_timeout_ms: int = _key(
        3000, "a send waits so long for the lock and for room in the ring, then BrokerBusy", 1, 3_600_000
    )
    retry_times_when_send_failed: int = _key(2, "further tries of a failed send, within send_timeout_ms", 0, 100)
    auto_create_topics: bool = _key(True, "the first send to a topic creates it")
    default_topic_queues: int = _key(4, "queues of a topic created without a number", 1, 1024)
    visible_after: str = _key(
        "auto",
        "what consumers may see: appended or flushed messages; auto follows flush_disk_type",
        choices=("auto", "append", "flush"),
        later=("replicate",),
    )
    flush_interval_ms: int = _key(500, "ASYNC_FLUSH: the disk is at most so far behind", 1, 3_600_000)
    flush_least_bytes: int = _key(16 * KIB, "ASYNC_FLUSH: less than this waits for the interval", 0, 16 * GIB)
    worker_tick_ms: int = _key(5, "pause of a busy worker between two looks at the ring", 1, 1000)
    disk_full_watermark: float = _key(0.95, "used share of the file system from which sends are refused", 0.1, 1.0)
    segments_ahead: int = _key(1, "zero-filled segments kept ready", 1, 64)
    reserve_segments: int = _key(
        2, "ready segments that only the broker's own records may use when the disk is full", 1, 64
    )
    retention_bytes: int = _key(0, "consumed log kept; 0 keeps all, until the disk is full", 0, 2**63 - 1)
    retention_ms: int = _key(
        0,
        "consumed log is kept so long after it was written; 0 keeps all, until the disk is full",
        0,
        100 * 365 * 86_400_000,
    )
    delete_unconsumed: bool = _key(False, "log goes by size, by age, and when the disk is full, consumed or not")
    progress_interval_ms: int = _key(1000, "group progress is written to the log so often", 10, 3_600_000)
    snapshot_interval_bytes: int = _key(
        64 * MIB, "log between two snapshots of definitions and progress; at most a segment", 64 * KIB, 4 * GIB
    )
    checkpoint_interval_ms: int = _key(
        2000, "the checkpoint is written so often: what a restart has to scan", 10, 3_600_000
    )
    message_delay_level: str = _key(
        DEFAULT_LEVELS,
        "delay levels 1, 2, ...; a message's retry number n waits for level 2 + n, unless its group says otherwise",
        form="1 to 64 delays with ms, s, m, h or d",
    )
    stopped_lock_holder: str = _key(
        "report",
        "a stopped process that holds the append lock is named in status, or killed",
        choices=("report", "kill"),
    )
    embed_grace_ms: int = _key(1000, "an embedded broker stops so long after its last client has gone", 0, 3_600_000)
    log_level: str = _key("INFO", "of run/<role>.log", choices=("DEBUG", "INFO", "WARNING", "ERROR"))

    def __post_init__(self) -> None:
        _check_fields(self)

    @property
    def delay_levels(self) -> tuple[float, ...]:
        """Seconds of delay level 1, 2, and so on."""
        return parse_delay_levels(self.message_delay_level)


LAYOUT_RULES: Final[dict[str, Rule]] = {f.name: f.metadata["rule"] for f in fields(LayoutConfig)}
RUNTIME_RULES: Final[dict[str, Rule]] = {f.name: f.metadata["rule"] for f in fields(RuntimeConfig)}
RULES: Final[dict[str, Rule]] = LAYOUT_RULES | RUNTIME_RULES
DEFAULTS: Final[dict[str, Any]] = {f.name: f.default for f in (*fields(LayoutConfig), *fields(RuntimeConfig))}

# RocketMQ's spelling -> (ours, factor between its unit and ours).
ROCKETMQ_KEYS: Final[dict[str, tuple[str, int]]] = {
    "flushDiskType": ("flush_disk_type", 1),
    "brokerRole": ("broker_role", 1),
    "syncFlushTimeout": ("sync_flush_timeout_ms", 1),
    "slaveTimeout": ("slave_timeout_ms", 1),
    "sendMsgTimeout": ("send_timeout_ms", 1),
    "retryTimesWhenSendFailed": ("retry_times_when_send_failed", 1),
    "maxMessageSize": ("max_message_bytes", 1),
    "autoCreateTopicEnable": ("auto_create_topics", 1),
    "defaultTopicQueueNums": ("default_topic_queues", 1),
    "flushIntervalCommitLog": ("flush_interval_ms", 1),
    "flushCommitLogLeastPages": ("flush_least_bytes", PAGE_BYTES),
    "mappedFileSizeCommitLog": ("segment_bytes", 1),
    "fileReservedTime": ("retention_ms", 3_600_000),
    "diskSpaceWarningLevelRatio": ("disk_full_watermark", 1),
    "messageDelayLevel": ("message_delay_level", 1),
}
_SPELLINGS: Final = {name.lower(): name for name in (*RULES, *ROCKETMQ_KEYS)}

# Environment variables of ours that are no settings, and what Kubernetes sets for a service that has our name.
OTHER_VARIABLES: Final = frozenset({"DIRECTORY", "FAILPOINTS", "PYTHON", "SUPERVISOR_PID"})
_VARIABLES: Final = {name.lower(): ENVIRONMENT_PREFIX + name.upper() for name in (*_SPELLINGS, *OTHER_VARIABLES)}
_KUBERNETES: Final = re.compile(r"(\w+_)?(SERVICE_(HOST|PORT)\w*|PORT(_\d+_\w+)?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of one broker.

    ``given`` holds the keys that the caller of ``open`` asked for himself, ``chosen`` those and the keys that file or
    environment set: the others may follow what they depend on.
    """

    layout: LayoutConfig = field(default_factory=LayoutConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    given: frozenset[str] = field(default=frozenset(), compare=False)
    chosen: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        interval = self.runtime.snapshot_interval_bytes
        if interval > self.layout.segment_bytes:
            raise ConfigError(
                f"snapshot_interval_bytes = {interval}: must be at most segment_bytes ({self.layout.segment_bytes}), "
                "so that every segment can be left behind by a newer snapshot"
            )

    @property
    def sync_flush(self) -> bool:
        """True if SEND_OK has to wait for the disk."""
        return self.runtime.flush_disk_type == "SYNC_FLUSH"

    @property
    def visible_after(self) -> str:
        """``append`` or ``flush``. ``auto``: consumers see what is as durable as SEND_OK says."""
        if self.runtime.visible_after != "auto":
            return self.runtime.visible_after
        return "flush" if self.sync_flush else "append"

    def native_limits(self) -> dict[str, int]:
        """Sizes of the tables in shared memory, by the names that layout.h gives them."""
        layout = self.layout
        return {
            "clients": layout.max_clients,
            "waiters": layout.max_waiters,
            "topics": layout.max_topics,
            "queues": layout.max_queues,
            "groups": layout.max_groups,
            "claim_tables": layout.claim_tables,
            "claim_window": layout.claim_window,
            "overflow_claims": layout.overflow_claims,
            "ids": layout.id_window,
            # The queues' index covers a ring full of the smallest records, and each queue keeps a block begun (R7).
            "blocks": layout.ring_bytes // SMALLEST_RECORD_BYTES // BLOCK_ENTRIES + layout.max_queues + 1,
            "reserve_bytes": layout.ring_bytes // RESERVE_SHARE,
            "max_message_bytes": layout.max_message_bytes,
        }

    def as_dict(self) -> dict[str, Any]:
        """Every key and its value: what stands in the descriptor of a running broker."""
        return {key: getattr(self.layout if key in LAYOUT_RULES else self.runtime, key) for key in RULES}

    def chosen_settings(self) -> dict[str, Any]:
        """What was not left at its default: enough for ``of`` to make the same configuration again."""
        return {key: value for key, value in self.as_dict().items() if key in self.chosen}

    def replace(self, **settings: Any) -> Config:
        """The same choices, with these on top."""
        return Config.of(self.chosen_settings() | settings, self.given)

    @staticmethod
    def of(settings: Mapping[str, Any], given: frozenset[str] = frozenset()) -> Config:
        """A configuration from our own keys; the others keep their defaults. Raises ConfigError.

        Two defaults follow a small ring or segment down. What somebody chose is checked instead.
        """
        if unknown := settings.keys() - RULES.keys():
            raise ConfigError(f"unknown setting {min(unknown)!r}{_hint(min(unknown), _SPELLINGS)}")
        for key in ("ring_bytes", "segment_bytes"):
            if key in settings and not isinstance(settings[key], int):
                raise ConfigError(f"{key} = {settings[key]!r}: {_wanted(key)}{_size_meant(key, settings[key])}")
        chosen = frozenset(settings)
        settings = DEFAULTS | dict(settings)
        smallest = min(settings["ring_bytes"], settings["segment_bytes"])
        if "max_message_bytes" not in chosen:
            settings["max_message_bytes"] = min(settings["max_message_bytes"], largest_body(smallest))
        if "snapshot_interval_bytes" not in chosen:
            settings["snapshot_interval_bytes"] = min(settings["snapshot_interval_bytes"], settings["segment_bytes"])
        layout = LayoutConfig(**{key: settings[key] for key in LAYOUT_RULES})
        return Config(layout, RuntimeConfig(**{key: settings[key] for key in RUNTIME_RULES}), given, chosen)


def load(
    directory: str | os.PathLike[str] | None = None,
    file: str | os.PathLike[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Read the settings of a broker once, in the order this module's head gives.

    ``file`` replaces ``directory/broker.toml`` and must exist. ``arguments`` are keyword settings of ``open``: times
    without a unit in their name are float seconds. Raises ConfigError, naming key, value and limits.
    """
    from_file: dict[str, _Found] = {}
    path = Path(file) if file is not None else Path(directory) / FILE_NAME if directory is not None else None
    if path is not None and (file is not None or path.exists()):
        for name, value in _read_file(path).items():
            _put(from_file, name, value, f"{path}: ")
    from_arguments: dict[str, _Found] = {}
    for name, value in (arguments or {}).items():
        if f"{name}_ms" in RULES:
            _put(from_arguments, f"{name}_ms", _milliseconds(name, value), "")
        else:
            _put(from_arguments, name, value, "")
    found = from_file | read_environment(environment) | from_arguments
    for key, (value, where) in found.items():
        _check(key, value, where)
    return Config.of({key: value for key, (value, _) in found.items()}, frozenset(from_arguments))


class _Found(NamedTuple):
    """A value that somebody chose, converted to the type of its default, and where it was found."""

    value: Any
    where: str  # begins the sentence of an error


def read_environment(environment: Mapping[str, str] | None = None) -> dict[str, _Found]:
    """The settings that stand in the environment. Raises ConfigError, also for a variable of ours that nobody knows."""
    settings: dict[str, _Found] = {}
    for name, value in sorted((os.environ if environment is None else environment).items()):
        key = name.removeprefix(ENVIRONMENT_PREFIX)
        if name == key or key in OTHER_VARIABLES or _KUBERNETES.fullmatch(key):
            continue
        if key.lower() not in _SPELLINGS:
            raise ConfigError(f"{name}: unknown variable{_hint(key, _VARIABLES)}")
        _put(settings, _SPELLINGS[key.lower()], value, f"{name}: ")
    return settings


def _read_file(path: Path) -> dict[str, Any]:
    import tomllib  # only when there is a file: it costs 5 ms of every start

    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _put(settings: dict[str, _Found], name: str, value: Any, where: str) -> None:
    """Store ``value`` under our own key, converted to the type of its default."""
    key, factor = ROCKETMQ_KEYS.get(name, (name, 1))
    if key not in RULES:
        raise ConfigError(f"{where}unknown setting {name!r}{_hint(name, _SPELLINGS)}")
    if key in settings:
        raise ConfigError(f"{where}{name!r} and another spelling of {key!r} are both set")
    try:
        converted = _convert(key, value)
    except ValueError:
        raise ConfigError(f"{where}{name} = {value!r}: {_wanted(key)}") from None
    settings[key] = _Found(converted * factor if factor != 1 else converted, where)


def _hint(name: str, known: Mapping[str, str]) -> str:
    """What somebody may have meant who wrote a name that nobody knows. ``known``: in lower case, to how it is spelt."""
    from difflib import get_close_matches

    if with_unit := known.get(f"{name.lower()}_ms"):
        return f"; did you mean {with_unit}, in milliseconds?"
    nearest = get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {known[nearest[0]]}?" if nearest else "; config/README.md lists them all"


def _convert(key: str, value: Any) -> Any:
    """Values as people write them: text from the environment, sizes like "32 MiB", an int where a float is meant."""
    kind = _type_of(key)
    if kind is bool and isinstance(value, str):
        return _BOOLEANS.get(value.strip().lower(), value)
    if kind is int and isinstance(value, str):
        number = _NUMBER.fullmatch(value.strip())
        unit = number[2].upper() if number else ""
        if number is None or unit not in _SIZE_UNITS or (unit and not key.endswith("_bytes")):
            return value
        return int(number[1]) * _SIZE_UNITS[unit]
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a group's number
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        return float(value)
    return value


def _milliseconds(name: str, value: Any) -> int:
    rule = RULES[f"{name}_ms"]
    low, high = rule.low / 1000, rule.high / 1000
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} = {value!r}: must be a number of seconds, {low:g} to {high:g}")
    return round(value * 1000)


def _type_of(key: str) -> type:
    return type(DEFAULTS[key])


def limits_text(key: str) -> str:
    """The limits of a key in words, as errors and ``config/README.md`` give them."""
    rule = RULES[key]
    kind = _type_of(key)
    if rule.choices:
        return " or ".join(rule.choices)
    if kind is bool:
        return "true or false"
    if kind is str:
        return rule.form or "a name or a number, or nothing"
    extra = ", a power of two" if rule.power_of_two else ""
    extra += f", a multiple of {rule.multiple_of}" if rule.multiple_of > 1 else ""
    return f"{rule.low:g} to {rule.high:g}{extra}" if kind is float else f"{rule.low} to {rule.high}{extra}"


def _wanted(key: str) -> str:
    if _type_of(key) is bool:
        true, false = (", ".join(text for text in _BOOLEANS if _BOOLEANS[text] is value) for value in (True, False))
        return f"must be {limits_text(key)}; as text: {true} or {false}"
    noun = {int: "an integer, ", float: "a number, "}.get(_type_of(key), "")
    return f"must be {noun}{limits_text(key)}"


def _size_meant(key: str, value: Any) -> str:
    """A hint for whoever wrote "4M", or "8 MB", which is no power of two."""
    if not key.endswith("_bytes"):
        return ""
    if isinstance(value, str):
        return '; as text: a whole number and one of B, KiB, MiB, GiB, KB, MB, GB, as in "4 MiB"'
    if not isinstance(value, int) or value == 0 or value % 10**6:
        return ""
    bounded = RULES[key].power_of_two or RULES[key].multiple_of > 1
    return f'; {value // 10**6} MB is a decimal size: did you mean "{value // 10**6} MiB"?' if bounded else ""


def _check_fields(config: LayoutConfig | RuntimeConfig) -> None:
    for item in fields(config):
        _check(item.name, getattr(config, item.name))


def _check(key: str, value: Any, where: str = "") -> None:
    """Raises ConfigError for what this key cannot be."""
    if value in RULES[key].later:
        raise ConfigError(f"{where}{key} = {value!r}: replication comes with a later version; here it {_wanted(key)}")
    if not _acceptable(value, _type_of(key), RULES[key]):
        raise ConfigError(f"{where}{key} = {value!r}: {_wanted(key)}{_size_meant(key, value)}")
    if key == "message_delay_level":
        try:
            parse_delay_levels(value)
        except ConfigError as error:
            raise ConfigError(f"{where}{key} = {value!r}: {error}") from None


def _acceptable(value: Any, kind: type, rule: Rule) -> bool:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):  # True is no integer here
        return False
    if rule.choices:
        return value in rule.choices
    if kind in (bool, str):
        return True
    number = cast(int, value)
    if not rule.low <= number <= rule.high:
        return False
    return kind is float or not (number % rule.multiple_of or (rule.power_of_two and number & (number - 1)))
