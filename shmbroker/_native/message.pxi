# message.pxi: Message, SendResult, BatchResult. Immutable, so that a send may read them without the GIL.

from cpython.unicode cimport PyUnicode_AsUTF8AndSize

from shmbroker import message as _rules
from shmbroker import naming as _naming
from shmbroker.status import SendStatus as _SendStatus

cdef object SEND_OK = _SendStatus.SEND_OK
cdef object FLUSH_DISK_TIMEOUT = _SendStatus.FLUSH_DISK_TIMEOUT


cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(object text)
    const uint8_t *PyUnicode_1BYTE_DATA(object text)

cdef bytes IN_NAMES = bytes(_naming.is_in_names(chr(c)) for c in range(128))
cdef bytes IN_WORDS = bytes(c > 0x20 and c < 0x7f and c not in b"|*" for c in range(128))  # of most tags, and of one key
cdef Py_ssize_t TOPIC_LENGTH_MAX = _naming.TOPIC_LENGTH_MAX


cdef inline bint is_plain(text, bytes letters) noexcept:
    """True: no need to ask the function that knows what this may be, as every short text of these letters may.

    A look at each byte costs a Message some nanoseconds, a call of Python many times as much.
    """
    cdef const uint8_t *allowed = <const uint8_t *>PyBytes_AS_STRING(letters)
    cdef const uint8_t *byte
    cdef Py_ssize_t length, i
    cdef uint8_t all_allowed = 1
    if type(text) is not str or not PyUnicode_IS_COMPACT_ASCII(text):
        return False
    length = len(<str>text)
    byte = PyUnicode_1BYTE_DATA(text)
    for i in range(length):
        all_allowed &= allowed[byte[i]]
    return all_allowed and 0 < length <= TOPIC_LENGTH_MAX


cdef inline str id_text(uint64_t incarnation, uint64_t sequence):
    return f"{incarnation:016x}{sequence:016x}"


@cython.freelist(256)
cdef class Message:
    """A message to send; see _core.pyi."""
    cdef readonly str topic
    cdef readonly bytes body
    cdef readonly str tags
    cdef readonly str keys
    cdef readonly dict properties
    cdef readonly bint wait_store_ok
    cdef readonly object delay_level
    cdef readonly object delay
    cdef readonly object deliver_at
    cdef readonly object retry
    cdef bytes encoded_properties
    cdef bint delayed

    def __init__(self, topic, body, *, tags=None, keys=None, properties=None, bint wait_store_ok=True,
                 delay_level=None, delay=None, deliver_at=None, retry=None):
        if self.topic is not None:
            raise TypeError("a Message is immutable")  # a send may be reading it without the GIL
        self.topic = <str>topic if is_plain(topic, IN_NAMES) else _naming.check_topic(topic)
        self.body = <bytes>body if type(body) is bytes and len(<bytes>body) else _rules.check_body(body)
        self.tags = "" if tags is None else <str>tags if is_plain(tags, IN_WORDS) else _rules.check_tags(tags)
        self.keys = "" if keys is None else <str>keys if is_plain(keys, IN_WORDS) else _rules.check_keys(keys)
        self.wait_store_ok = wait_store_ok
        if properties:
            self.properties = _rules.check_properties(properties)
            self.encoded_properties = format_properties(self.properties)
        else:
            self.properties = {}
            self.encoded_properties = None
        if delay_level is not None or delay is not None or deliver_at is not None:
            self.delay_level, self.delay, self.deliver_at = _rules.check_delay(delay_level, delay, deliver_at)
            self.delayed = True
        self.retry = retry
        if retry is not None:
            self.encoded_properties = (self.encoded_properties or b"") + _rules.retry_property(retry)

    def __repr__(self):
        return f"Message({self.topic!r}, {len(self.body)} bytes, tags={self.tags!r}, keys={self.keys!r})"


@cython.freelist(256)
cdef class SendResult:
    """What became of a send; see _core.pyi."""
    cdef readonly object status
    cdef readonly str topic
    cdef readonly uint32_t queue_id
    cdef readonly uint64_t queue_offset
    cdef readonly uint64_t position
    cdef readonly uint64_t end_position
    cdef readonly bint duplicate
    cdef uint64_t incarnation
    cdef uint64_t sequence
    cdef uint64_t due_ns
    cdef object recaller
    cdef Client client

    @property
    def message_id(self):
        return id_text(self.incarnation, self.sequence)

    @property
    def recall_handle(self):
        return f"{self.position:016x}{self.due_ns:016x}{self.message_id}" if self.due_ns else None

    def recall(self):
        return self.recaller(self.recall_handle) if self.due_ns else False

    def confirm(self, timeout=5.0):
        return confirm_position(self.client, self.end_position, timeout)

    def __reduce__(self):
        raise TypeError("a SendResult belongs to its process and cannot be pickled: pass its message_id and status")

    def __repr__(self):
        return (f"SendResult({self.status.name}, {self.message_id}, {self.topic}[{self.queue_id}] "
                f"offset {self.queue_offset}, position {self.position})")


cdef object confirm_position(Client client, uint64_t end_position, timeout):
    """SEND_OK once the disk has it, FLUSH_DISK_TIMEOUT if not in time; StoreReadOnly if it never will."""
    cdef int code = client.wait_position(SB_WAIT_FLUSH, end_position, deadline_of(timeout))
    if code == SB_OK:
        return SEND_OK
    if code == SB_TIMEOUT:
        return FLUSH_DISK_TIMEOUT
    raise code_error(&client.region.r, code, "confirming a send")


cdef class BatchResult:
    """The results of one send_batch: a sequence of SendResult, each made when asked for."""
    cdef readonly object status
    cdef readonly str topic
    cdef readonly uint32_t queue_id
    cdef readonly uint64_t end_position
    cdef uint32_t count
    cdef uint64_t first_offset
    cdef uint64_t incarnation
    cdef uint64_t first_sequence
    cdef uint64_t *positions
    cdef Client client

    def __dealloc__(self):
        free(self.positions)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        cdef Py_ssize_t i = index
        cdef SendResult result
        if i < 0:
            i += self.count
        if i < 0 or i >= self.count:
            raise IndexError("batch index out of range")
        result = SendResult.__new__(SendResult)
        result.status = self.status
        result.topic = self.topic
        result.queue_id = self.queue_id
        result.queue_offset = self.first_offset + i
        result.position = self.positions[i]
        result.end_position = self.end_position
        result.incarnation = self.incarnation
        result.sequence = self.first_sequence + i
        result.client = self.client
        return result

    def confirm(self, timeout=5.0):
        return confirm_position(self.client, self.end_position, timeout)

    def __repr__(self):
        return (f"BatchResult({self.status.name}, {self.count} messages, {self.topic}[{self.queue_id}] "
                f"from offset {self.first_offset})")
