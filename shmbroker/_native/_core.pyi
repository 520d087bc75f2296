"""Types of the native core. Units: positions and sizes in bytes, offsets in messages, deadlines in ns of CLOCK_MONOTONIC."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar, overload

from shmbroker.retry import RetryPolicy
from shmbroker.status import SendStatus

RECORD_HEADER_BYTES: Final[int]
RECORD_ALIGN_BYTES: Final[int]
GROUP_RECORDS_MAX: Final[int]
SUBSCRIPTION_BYTES_MAX: Final[int]
FILTER_NAMES_MAX: Final[int]
FILTER_STACK_MAX: Final[int]
FILTER_INSTRUCTIONS: Final[dict[str, int]]
LAYOUT_VERSION: Final[int]
RECORD_VERSION: Final[int]
FINGERPRINT: Final[int]
CRC_IMPLEMENTATION: Final[str]  # "sse4.2", "armv8" or "portable"

# ---- no memory needed -------------------------------------------------------------------------------------------

def crc32c(data: Any, start: int = 0) -> int:
    """CRC-32C (Castagnoli) of a bytes-like object, continued from ``start``."""

def crc32c_portable(data: Any, start: int = 0) -> int: ...
def run_filter(program: bytes, tags: bytes, keys: bytes, properties: Mapping[str, str]) -> bool:
    """Whether a program of sql_program.py (drawn in filter.h) accepts a message. Raises ValueError: it is none."""

def monotonic_ns() -> int: ...
def start_ticks(pid: int) -> int:
    """Start time of a process in clock ticks since boot (field 22 of /proc/PID/stat); 0 if there is none."""

def start_writeback(fd: int, offset: int, size: int) -> None:
    """Ask the kernel to begin writing these bytes of a file to the disk; nothing is durable before fdatasync.

    Raises OSError: writing has failed already. A file system that cannot do it is no error.
    """

def set_process_name(name: str) -> None:
    """prctl(PR_SET_NAME): what ``ps -o comm`` and ``top`` show, at most 15 bytes."""

def scan(
    data: Any, position: int, epoch: int, segment_bytes: int, max_records: int = 65536, check_crc: bool = True
) -> tuple[list[Record], int, str]:
    """Valid records at the start of ``data``, whose first byte lies at ``position``.

    Returns (records, position behind the last whole record, why it stopped). Why: "end" (data used up exactly, or
    the next record is not whole in data), "limit" (max_records reached), "invalid" (the bytes at the returned position
    are no record of epoch ``epoch`` or, introduced by an EPOCH record on the way, later). Steps over short segment ends.
    """

def scan_ids(
    data: Any, position: int, epoch: int, segment_bytes: int
) -> tuple[list[tuple[int, int, int]], int, int]:
    """The ids of the messages that ``scan`` would meet, but for those of dedup keys; no CRC is looked at.

    Returns ((incarnation, sequence, position) of each, position behind, last epoch).
    """

def skim(data: Any, position: int, epoch: int, segment_bytes: int) -> tuple[int, int, int, str]:
    """As ``scan``, but only checks: (position behind, number of records, last epoch, why)."""

def find_record(
    data: Any, position: int, segment_bytes: int, min_epoch: int, max_epoch: int, flushed_above: int = -1
) -> tuple[int, int, int] | None:
    """First valid record at an aligned place in ``data``: (position, size, flushed as its writer knew it), or None.

    With ``flushed_above`` >= 0 only a record whose writer knew more than that to be on the disk counts (R1).
    """

def group_floor(data: Any, position: int, segment_bytes: int, end: int) -> int:
    """``end``, or the start of the record or atomic group that ``end`` cuts in two (R18).

    ``data`` holds records checked before, from the start of one at ``position`` on.
    """

def dispatch_scan(
    data: Any, position: int, epoch: int, segment_bytes: int, max_records: int = 65536, keys: bool = True,
    check_crc: bool = True,
) -> tuple[list[tuple[int, int, int, bytes]], list[int], int, int, str]:
    """Consume queue entries of a run of records, sorted by queue.

    Returns (runs, marked, position behind, last epoch, why). A run is (topic_id, queue_id, first queue offset,
    entries): entries are 16 bytes each, ``<QII``: position, size, tag hash; consecutive offsets. ``marked`` lists the
    positions of records that somebody must look at one by one: system records and dedup ids; with ``keys`` also those
    that the key index wants (keys, a producer's sequence 1 and every 1,024th). Why: as for ``scan``.
    """

def timer_scan(
    data: Any, position: int, epoch: int, segment_bytes: int
) -> tuple[list[tuple[int, int, int, int, int]], int, int, str]:
    """What a run of records says about delayed messages: (events, position behind, last epoch, why, as for ``scan``).

    An event is (position of the record that says it, kind, position of the TIMER record that it is about, a, b). TIMER:
    a is when it is due, b its padded size. FIRED: a and b are 0, or of a timer that was carried on its origin and the
    position of its successor. RECALL: a is the end of the record. Only these kinds have their CRC checked.
    """

class Record:
    """One record, decoded from a copy of its bytes; equal if the bytes are."""
    position: int
    size: int            # header and payload, without padding
    padded: int          # bytes to the next record
    crc: int
    epoch: int
    flushed: int         # what the writer knew to be on the disk
    kind: int
    flags: int
    queue_offset: int
    queue_id: int
    topic_id: int
    incarnation: int
    sequence: int
    born_ns: int
    group_bytes: int
    tag_hash: int
    attempts: int
    tags: str
    keys: str
    properties: dict[str, str]
    body: bytes
    raw: bytes
    message_id: str

def encode_record(
    *, position: int, epoch: int, flushed: int, kind: int, body: bytes, queue_offset: int = 0, queue_id: int = 0xFFFF,
    topic_id: int = 0, incarnation: int = 0, sequence: int = 0, born_ns: int = 0, flags: int = 0, group_bytes: int = 0,
    tags: str = "", keys: str = "", properties: Mapping[str, str] | None = None, attempts: int = 0,
) -> bytes:
    """The padded bytes of one record, as append would write them. For tests, tools and the reference ring."""

def decode_record(data: Any, position: int | None = None) -> Record:
    """Decode and check one record; ValueError says what is wrong with it."""

# ---- failpoints --------------------------------------------------------------------------------------------------

def failpoint_names() -> list[str]:
    """Names of the failpoints inside the native core."""

def failpoint_arm(name: str, action: str, at: int) -> None:
    """Arm a native failpoint: ``kill``, ``stop`` or ``exit`` at the ``at``-th pass (1 = the first)."""

# ---- messages ----------------------------------------------------------------------------------------------------

class Message:
    """A message to send. ``body`` is bytes; tags is one tag; keys is one string of keys separated by blanks, or an iterable.

    What can never be sent is refused here, with BadRequest: an illegal topic name, too, since a look at each of its bytes
    costs next to nothing. What depends on the broker is refused by the send.
    """
    topic: str
    body: bytes
    tags: str
    keys: str
    properties: dict[str, str]
    wait_store_ok: bool
    delay_level: int | None   # 1 for the first of message_delay_level
    delay: float | None       # seconds from its send
    deliver_at: float | None  # seconds since 1970
    retry: RetryPolicy | None  # its own, instead of that of the group that consumes it
    def __init__(
        self, topic: str, body: bytes, *, tags: str | None = None, keys: str | Iterable[str] | None = None,
        properties: Mapping[str, str] | None = None, wait_store_ok: bool = True, delay_level: int | None = None,
        delay: float | timedelta | None = None, deliver_at: datetime | float | None = None,
        retry: RetryPolicy | None = None,
    ) -> None: ...

class ReceivedMessage:
    """A delivered message: a lazy view of a private copy of its record."""
    topic: str              # that it was sent to, also when this is a retry, which lies in %RETRY%group
    group: str
    queue_id: int           # this and the next two: of this delivery's record
    queue_offset: int
    position: int
    message_id: str
    tags: str
    keys: str
    properties: dict[str, str]
    body: bytes
    delivery_attempt: int   # 1 for the first delivery
    born_timestamp: float   # seconds since 1970
    store_size: int

class SendResult:
    status: Any             # shmbroker.SendStatus
    message_id: str
    topic: str
    queue_id: int
    queue_offset: int       # 0 of a delayed message: it gets one when it fires
    position: int           # of the record
    recall_handle: str | None  # of a delayed message: what Broker.recall takes, in any process
    def recall(self) -> bool:
        """As Broker.recall; False of a message that was not delayed."""
    end_position: int       # durable when flushed has reached it
    duplicate: bool         # an earlier send with this id or dedup key was found: this is its result
    def confirm(self, timeout: float = 5.0) -> Any:
        """Wait again for the durability that was asked for; returns the SendStatus then true. Sends nothing."""

class BatchResult(Sequence[SendResult]):
    """Lazy: the SendResult of message i is made when asked for."""
    status: Any
    topic: str
    queue_id: int
    end_position: int
    @overload
    def __getitem__(self, index: int) -> SendResult: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SendResult]: ...
    def __len__(self) -> int: ...
    def confirm(self, timeout: float = 5.0) -> Any: ...

# ---- shared memory -----------------------------------------------------------------------------------------------

class Region:
    """The two mapped shared-memory objects of a broker."""

    @staticmethod
    def sizes(limits: Mapping[str, int], ring_bytes: int) -> tuple[int, int]:
        """(control bytes, ring bytes) that these limits need. Limits as Config.native_limits() gives them."""

    @staticmethod
    def create(
        control_fd: int, ring_fd: int, limits: Mapping[str, int], ring_bytes: int, segment_bytes: int, *, tail: int,
        epoch: int, instance: bytes, boot_id: bytes, directory: tuple[int, int], namespaces: tuple[int, int], ring_name: str,
    ) -> Region:
        """Format two objects already allocated to their sizes; flushed = dispatched = tail = ``tail``; state STARTING."""

    @staticmethod
    def attach(control_fd: int, ring_fd: int) -> Region:
        """Map existing objects. LayoutMismatch if the frozen header's magic, version or fingerprint differs."""

    @staticmethod
    def seal(control_fd: int, timeout_ns: int) -> None:
        """Let nobody append to memory of any version again: its append lock counts as broken from now on.

        Raises NotReady if its holder does not give it up in time, LayoutMismatch.
        """

    @staticmethod
    def read_header(control_fd: int) -> dict[str, Any]:
        """The frozen header of any version: magic, layout_version, fingerprint, ring_bytes, tail, flushed, ..."""

    def close(self) -> None: ...
    closed: bool
    ring_bytes: int
    segment_bytes: int
    max_message_bytes: int
    header: dict[str, Any]
    limits: dict[str, int]

    def get(self, word: str) -> int:
        """Acquire load of a word of sb_watermarks by name: tail, write_limit, flushed, dispatched, ..., state, epoch, ..."""
    def set(self, word: str, value: int) -> None:
        """Release store. The caller is the word's one writer."""
    def raise_to(self, word: str, value: int) -> int:
        """Grow-only store; returns the value now."""

    def note_damage(self, position: int) -> None:
        """The log is damaged at ``position``. The first such call sets the word ``damaged`` to 1 + position."""
    def ring_view(self) -> memoryview:
        """Read-only view of the ring mapped twice (2 * ring_bytes): index with position & (ring_bytes - 1)."""
    def read_raw(self, position: int) -> bytes | None:
        """A checked private copy of the record at ``position``, or None when the ring no longer (or not yet) has it."""

    # workers
    def worker_register(self, role: str) -> None: ...
    def worker_sleep(self, role: str, mode: int, seen_position: int, timeout_ns: int) -> bool:
        """mode 1: woken by any append past ``seen_position``; mode 2: only by urgent work. True if posted or tail moved."""
    def worker_wake(self, role: str) -> int: ...
    def wait_for(self, word: str, target: int, timeout_ns: int) -> bool:
        """Wait until ``flushed``, ``replicated`` or ``dispatched`` has reached ``target``; False at the deadline."""
    def worker_beat(self, role: str) -> None: ...
    def workers(self) -> list[dict[str, Any]]: ...
    def publish_flushed(self, position: int) -> int:
        """flushed := position, then post every waiter it satisfies, writers waiting for space, and consumers if visibility
        follows the flush. Returns the number of posts."""
    def publish_store_state(self, state: int, error: int) -> None:
        """Set the store's state and wake everybody who waits, so that they look."""

    # appends that do not come from a Producer
    def append_system(
        self, kind: int, bodies: Sequence[bytes], *, queue_id: int = 0xFFFF, topic_id: int = 0, timeout_ns: int = 0
    ) -> tuple[int, int]:
        """Append records of one kind as one atomic group, with the system's reserve. (position, end position)."""

    # delayed messages. ``records`` are whole TIMER records, checked; ``turn`` is what the word ``timer_turn`` was before the
    # caller read the log up to its tail. None, False: somebody was faster, nothing was appended: read on and try again.
    def fire(self, records: list[bytes], turn: int, timeout_ns: int) -> int | None:
        """Append their messages, and that they have fired, as one group. How many messages: those of deleted topics are none."""
    def carry_on(self, records: list[bytes], origins: list[int], turn: int, timeout_ns: int) -> bool:
        """Append them anew, and that the old ones are done with, as one group. ``origins``: of each, the position of the first
        record that it descends from."""

    # definitions; each appends its record in the same atomic append that makes it live
    def define_topic(self, name: str, queues: int, permission: int = 0, topic_id: int = 0, next_offsets: Sequence[int] | None = None,
                     record: bool = True) -> int:
        """Create a topic, or alter an existing one (more queues, permission; 0: as it is, 6 if new). Returns its id. ``record=False`` restores
        what the log already says (recovery)."""
    def delete_topic(self, name: str) -> None: ...
    def define_group(self, name: str, group_id: int = 0, record: bool = True) -> int: ...
    def set_subscription(self, name: str, text: bytes, generation: int = 0, record: bool = True) -> None:
        """What the group subscribes to from now on, as JSON. Raises GroupNotExist. ``record=False``: recovery, with the
        generation that the log says."""
    def set_retry(self, name: str, text: bytes, generation: int = 0, record: bool = True) -> None:
        """The group's retry policy from now on, as JSON; else as set_subscription."""
    def set_paused(self, name: str, paused: bool, generation: int = 0, record: bool = True) -> None:
        """Members get nothing until they are resumed. Nothing changes if it is so already; else as set_subscription. Recovery
        (record False) gives the generation, which says whether it is paused."""
    def retry_text(self, name: str) -> str:
        """The group's retry policy as JSON; empty: the default one. Raises GroupNotExist."""
    def wake_everybody(self) -> None:
        """Whoever sleeps looks again: a queue has come into being that a sleeping consumer does not know."""
    def delete_group(self, name: str, retry_topic: str) -> None:
        """With that topic, if it is there, in one append. Raises GroupNotExist, GroupInUse (a live client consumes in it)."""
    def topics(self, *, exact: bool = False) -> list[dict[str, Any]]:
        """Each: name, topic_id, permission, queues: [{queue_id, slot, next_offset, first_offset, index_first, bytes}]."""
    def groups(self) -> list[dict[str, Any]]:
        """Each: name, group_id, slot, subscription (JSON), subscription_set: by set_subscription, not by its members,
        subscription_generation, retry (JSON, empty: the default policy), retry_generation, paused, pause_generation, members: the slots of the clients that consume in it."""
    def restore_queue(self, topic_id: int, queue_id: int, next_offset: int, first_offset: int) -> None:
        """Recovery only: a queue's next offset and the first the log still has; both only grow."""
    def restore_index(self, topic_id: int, queue_id: int, offset: int, positions: bytes) -> None:
        """Recovery only, after restore_queue: a queue's last messages, from ``offset`` to its next, lie at these positions
        (8 bytes each): where the consume queue does not have them yet."""
    def set_first_offset(self, topic_id: int, queue_id: int, first_offset: int) -> None: ...

    # group progress
    def progress(self) -> list[dict[str, Any]]:
        """Each claim table: group, group_id, topic, topic_id, queue_id, base, next, next_offset, acked: [(first, count)],
        attempts: {offset: n}, held, overflow: [offsets], delivered, redelivered, refused, reset_generation; oldest_held
        and oldest_holder (a client slot): who keeps the base back, or None."""
    def consumed_queues(self) -> list[tuple[int, int, int]]:
        """(group_id, topic_id, queue_id) of each claim table in use."""
    def progress_records(self, only_changed: bool) -> list[bytes]:
        """Bodies of PROGRESS records (layout.h draws them at sb_progress)."""
    def progress_recorded(self, bodies: Iterable[bytes]) -> None:
        """These bodies stand in the log: ``progress_records(only_changed=True)`` leaves them out until something changes."""
    def restore_progress(self, body: bytes) -> None:
        """Recovery only: merge one PROGRESS body into the claim tables (max base, OR of acks, max of attempts)."""
    def reset_progress(self, group_id: int, topic_id: int, queue_id: int, offset: int) -> tuple[int | None, int]:
        """The group consumes this queue anew from ``offset``, or the next one that the queue has: its base before (None: it
        had none) and after. Receipts that are out are void. Raises GroupNotExist, QueueNotExist, LimitReached (no free claim
        table), and what append_system raises."""
    def dedup_ids(self, newest: int) -> list[bytes]:
        """Bodies of IDS records: the ids of dedup keys among the ``newest`` remembered, oldest first."""
    def remember_id(self, incarnation: int, sequence: int, position: int, *, given: bool = False) -> None:
        """Recovery only: put an id into the window. ``given``: it was not made of a dedup key."""

    # janitor
    def clients(self) -> list[dict[str, Any]]:
        """Each live slot: slot, generation, pid, start_ticks, name, sends, receives, acks, attached_ns."""
    def client_states(self) -> bytes:
        """The state words of all client slots: other bytes than before if anybody has come or gone."""
    def reap(self, slot: int, generation: int) -> int:
        """Take back all that a dead client held: claims, waiters, locks; free the slot. Returns claims released."""
    def janitor_pass(self, now_ns: int, turn: int = 0) -> tuple[int, int]:
        """Pass number ``turn``: expired claims, lost wake-ups, locks of the dead. (claims expired, ns until the next deadline)."""
    def lock_holder(self) -> int:
        """Thread id that holds the append lock, or 0."""
    def waiters(self) -> list[dict[str, Any]]: ...

class Client:
    """This process attached to a region: one slot. Not usable after a fork."""
    def __init__(self, region: Region, name: str) -> None: ...
    region: Region
    slot: int
    generation: int
    incarnation: int
    closed: bool
    def close(self) -> None: ...
    def append_system(self, kind: int, bodies: Sequence[bytes], timeout_ns: int) -> tuple[int, int]:
        """As Region.append_system, in this client's name."""
    def recall(self, position: int, turn: int, timeout_ns: int) -> int | None:
        """Append that the timer at ``position`` is not to fire. The end position; None: ``timer_turn`` is not ``turn`` any more."""
    def wait_flushed(self, position: int, timeout_ns: int) -> bool: ...

class TopicRoute:
    """A topic as a producer knows it; looked up again when the definitions have moved."""
    name: str
    topic_id: int
    count: int              # queues
    permission: int

Stored = TypeVar("Stored", SendResult, BatchResult)

class ProducerCore:
    """The send path. A subclass resolves missing topics, chooses queues and ids, and sends again after a restart."""
    client: Client
    group: str
    send_timeout_ns: int
    sync_flush_timeout_ns: int
    def __init__(self, client: Client, group: str, *, send_timeout: float, sync_flush_timeout: float) -> None: ...
    def send(
        self, message: Message, timeout: float | None = None, *,
        selector: Callable[[Sequence[int], Message, Any], int] | None = None, argument: Any = None,
        sharding_key: str | bytes | None = None, queue_id: int | None = None, dedup_key: str | bytes | None = None,
    ) -> SendResult:
        """Append, wait for the promised durability, answer. ``timeout`` (send_timeout by default) bounds the wait for lock
        and room: BrokerBusy, and for a broker that restarts: NotReady; nothing stored. Raises MessageIllegal, MessageTooLarge, TopicNotExist, NoPermission,
        QueueNotExist, StoreFull, StoreReadOnly, BrokerClosed, ForkedHandleError: in all of them nothing was stored."""
    def send_oneway(
        self, message: Message, *, selector: Callable[[Sequence[int], Message, Any], int] | None = None,
        argument: Any = None, sharding_key: str | bytes | None = None, queue_id: int | None = None,
    ) -> None:
        """Append and ask for nothing more. Waits as ``send`` does for lock, room and a broker that restarts: NotReady."""
    def send_batch(
        self, messages: Iterable[Message], timeout: float | None = None, *,
        selector: Callable[[Sequence[int], Message, Any], int] | None = None, argument: Any = None,
        sharding_key: str | bytes | None = None, queue_id: int | None = None,
    ) -> BatchResult:
        """One atomic append: all of them or none, in one queue. One topic, one wait_store_ok, at most 1,024 messages and, with
        80 bytes of header each, a quarter of ring or segment."""
    def _missing_topic(self, topic: str) -> None: ...
    def _store_only(
        self, message: Message, timeout: float | None, selector: Any, argument: Any, sharding_key: Any, queue_id: int | None,
        dedup_key: Any,
    ) -> SendResult: ...
    @staticmethod
    def _settle(result: Stored, deadline_ns: int) -> Stored: ...
    def _attach_again(self) -> Client: ...
    def _due_ns(self, message: Message, now_ns: int) -> int: ...
    def _recall(self, handle: str) -> bool: ...
    def _rebind(self, client: Client) -> None: ...
    def _shut(self) -> None: ...

class ConsumerCore:
    """Fast path of SimpleConsumer. Messages are claimed by compare-and-swap in shared memory; no lock, no system call."""
    client: Client
    group: str
    spin: bool
    lost: int  # messages that were deleted from the log before this consumer could read them
    durable_acks: bool
    durable_attempts: bool
    def __init__(
        self, client: Client, group: str, *, spin: bool = False, from_first: bool = True, durable_acks: bool = False,
        attempts_within: float = 0.0,
    ) -> None:
        """``attempts_within``: seconds that it may take to write attempts to the disk before messages are handed over;
        0: they are not written."""
    def receive(self, max_messages: int = 1, wait: float = 0.0, invisible: float = 60.0) -> list[ReceivedMessage]:
        """At most ``max_messages`` messages, as soon as there is one; [] if none comes within ``wait`` seconds.

        Each is this consumer's for ``invisible`` seconds (0.001 to 43,200): then it is delivered again unless it was
        acknowledged. Messages of one queue come in the order of their offsets. Raises BadRequest, BrokerClosed,
        ForkedHandleError, LimitReached (max_waiters), CorruptLog, BrokerFenced. With durable attempts also BrokerBusy,
        StoreFull and StoreReadOnly: the attempts could not be written; the messages are the group's again, uncounted.
        """
    def ack(self, messages: ReceivedMessage | Iterable[ReceivedMessage], *, durable: bool | None = None) -> None:
        """These are done. Raises ReceiptExpired for those that are no longer this consumer's (``error.messages``); the
        others are acknowledged all the same; so they are if it is BrokerBusy, whose ``messages`` a stopped process holds
        up. BrokerFenced: another directory was promoted. TypeError: none is acknowledged.

        The acknowledgement survives the death of every process at once, and a power cut once the group's progress has
        been written to the log (``progress_interval``). ``durable=True`` writes it now and returns when it is on the
        disk; None: as the consumer was made. Raises AckNotDurable if the disk fails or takes too long: the
        acknowledgement is done all the same."""
    def change_invisible_duration(self, message: ReceivedMessage, seconds: float) -> None:
        """From now on ``message`` is this consumer's for ``seconds`` more; 0 gives it back at once. Raises ReceiptExpired."""
    def _bind(self, client: Client, filters: Mapping[str, Sequence[bytes] | bytes | None], text: bytes) -> bool: ...
    def _take_over(self, text: bytes) -> Mapping[str, Sequence[bytes] | bytes | None]: ...
    def _look_at(self, client: Client, topic: str) -> None: ...
    def _start_offsets(self, topic_id: int, queues: int) -> Sequence[int]: ...
    def _leave(self) -> None: ...
    def _write_acks(self, bodies: list[bytes]) -> None: ...
    def _write_attempts(self, bodies: list[bytes]) -> None: ...
    def _shut(self) -> None: ...
    def _reattach(self) -> None: ...
    def _read_entries(self, topic_id: int, queue_id: int, offset: int, count: int) -> bytes: ...
    def _hole_at(self, topic_id: int, queue_id: int, offset: int) -> tuple[int, bool] | None: ...
    def _read_window(self, position: int) -> bytes: ...
    def _read_at(self, position: int) -> bytes | None: ...
    def _report_lost(self, topic: str, queue_id: int, first: int, count: int) -> None: ...
    def _max_deliveries(self, message: ReceivedMessage) -> int: ...
    def _bury(self, messages: list[ReceivedMessage]) -> None: ...
    def _own_by(self, locks: int) -> None: ...
    def _locks_removed(self) -> None: ...

# ---- orderly queues: see queue_locks.py

def make_queue_locks(key: int, tables: int) -> int: ...
def find_queue_locks(key: int, tables: int) -> tuple[int, int]: ...
def share_queue_locks(found: int, uid: int, gid: int, mode: int) -> None: ...
def remove_queue_locks(found: int) -> None: ...
def test_queue_locks(found: int, tables: int) -> None: ...

# ---- event loops

class Hub:
    """Where one event loop waits in one broker's memory: a thread that sleeps for all of its coroutines."""
    client: Client
    def __init__(self, client: Client) -> None: ...
    def sleep(self, seconds: float) -> bool:
        """On the hub's thread: until a wait is posted, or so long. False: it was closed."""
    def close(self) -> None:
        """End ``sleep``."""
    def leave(self) -> None:
        """On the hub's thread, as its last act: give back the wait slots."""
    def begin_flush(self, end: int) -> bool:
        """Wake the hub once the log is flushed up to ``end``, instead of what was wanted before. True: that is decided now."""
    def end_flush(self) -> None: ...
    def flush_decided(self, end: int) -> bool:
        """It is flushed up to there, or will not be."""

class MessageWait:
    """A coroutine's wait for a message. It begins at once: whoever makes one claimable from now on posts it. BrokerClosed."""
    posted: bool
    polls: bool     # it got no wait slot: it is to look whenever the hub does
    seconds: float  # until it should look without being posted
    def __init__(self, hub: Hub, consumer: ConsumerCore) -> None: ...
    def end(self) -> None: ...
    def pass_on(self) -> None:
        """Behind the end, and the last look: if it was posted and there is more, wake another member of the group."""

class PullCore(ConsumerCore):
    """Reads queues from positions of its own, and claims nothing. One thread at a time."""
    def _assign(
        self, client: Client, filters: Mapping[str, Sequence[bytes] | bytes | None], assigned: Iterable[tuple[str, int]],
        store: bytes,
    ) -> None: ...
    def _poll(self, room: int, wait: float) -> list[ReceivedMessage]: ...
    def _positions(self) -> list[tuple[str, int, int, int, int, int, int]]: ...
    def _seek(self, topic: str, queue_id: int, offset: int) -> None: ...
    def _commit(self) -> list[bytes]: ...

# ---- push consumers

class ConsumeContext:
    """What a listener is told beside its messages, and what it may ask for. True only while it runs."""
    group: str
    topic: str
    queue_id: int
    delay_level_when_next_consume: int  # of what fails: 1..18 that level, 0 the group's policy, -1 to the dead letters at once
    ack_index: int  # with CONSUME_SUCCESS or SUCCESS: the messages up to this index have succeeded, those behind it have failed
    suspend_current_queue_time: float  # orderly: seconds that the queue is held if it fails, 0.01 to 30
    def __init__(self, group: str) -> None: ...

class Lane:
    """One listener thread's: what it has prefetched, and what its listener works on."""
    renewals: int       # of the claims that the listener has now
    empty: bool         # nothing is prefetched that was not begun
    overran: bool       # the time of what the listener has is over
    def __init__(self, group: str) -> None: ...

class PushCore:
    """Takes the messages of a consumer to a listener. Subclass: shmbroker.push_consumer.PushConsumer."""
    def __init__(
        self, consumer: ConsumerCore, listener: Callable[[Any, ConsumeContext], object], *, batch: int, ahead: int, ahead_bytes: int,
        queue_room: int, queue_bytes: int, consume_timeout: float, suspend: float,
    ) -> None: ...
    def _fill(self, lane: Lane, wait: float) -> bool: ...
    def _give_back(self, lane: Lane) -> None: ...
    @property
    def _group_paused(self) -> bool: ...
    def _lay_down(self, lane: Lane) -> None: ...
    def _call_off(self) -> None: ...
    def _call_on(self) -> None: ...
    def _run(self, lane: Lane, alone: bool) -> bool: ...
    def _renew(self, lane: Lane, most: int) -> None: ...
    def _abandon(self, lane: Lane) -> None: ...
    # what the subclass defines
    def _send_back(self, message: ReceivedMessage, level: int, error: str | None) -> None: ...
    def _report_failure(self, messages: Sequence[ReceivedMessage], error: BaseException | None, result: object) -> None: ...
    def _report_late(self, message: ReceivedMessage) -> None: ...
    def _report_held(self, message: ReceivedMessage, error: BaseException) -> None: ...
    def _report_unwritten(self, error: BaseException) -> None: ...

def hold_back(held: bool) -> None:
    """Whether threads of this process return from ``_run`` before their next message, but for one that runs alone."""

def move_message(
    client: Client, message: ReceivedMessage, topic: str, properties: bytes, *, attempts: int, due_ns: int, timeout_ns: int
) -> int | None:
    """Append a copy for ``topic``, with these encoded properties and this number of deliveries, and acknowledge the message,
    in one: the position that has to be flushed for both. None: there is no such topic. ``due_ns``: a TIMER record that is due
    at that time of CLOCK_REALTIME; 0: a message. Waits ``timeout_ns`` for lock and room. Raises ReceiptExpired, BrokerBusy,
    NoPermission, MessageTooLarge, StoreFull, StoreReadOnly, BrokerClosed: in all of them nothing was changed; BrokerFenced."""
def durable_status(client: Client, end_position: int, timeout_ns: int) -> SendStatus:
    """What a send that ends there answers: under SYNC_FLUSH, whether it was flushed within ``timeout_ns``."""
