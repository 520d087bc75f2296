# record.pxi: CRC, records, clocks and names: needs no shared memory.

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport ENOSYS, ESPIPE, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cdef extern from "<fcntl.h>" nogil:
    int sync_file_range(int fd, int64_t offset, int64_t size, unsigned int flags)
    unsigned int SYNC_FILE_RANGE_WRITE

cdef extern from "codes.h" nogil:
    enum:
        SB_OK
        SB_END
        SB_AGAIN
        SB_INVALID
        SB_NOT_FOUND

cdef extern from "layout.h" nogil:
    enum:
        SB_RECORD_HEADER
        SB_RECORD_ALIGN
        SB_GROUP_RECORDS_MAX
        SB_SUBSCRIPTION_BYTES
        SB_LAYOUT_VERSION
        SB_RECORD_VERSION
        SB_KIND_MESSAGE
        SB_KIND_FILLER
        SB_KIND_TIMER
        SB_KIND_LAST
        SB_FLAG_GROUP

    ctypedef struct sb_record:
        uint32_t size
        uint32_t crc
        uint64_t position
        uint32_t epoch
        uint32_t unflushed
        uint64_t queue_offset
        uint64_t incarnation
        uint64_t sequence
        int64_t born_ns
        uint32_t topic_id
        uint16_t queue_id
        uint8_t kind
        uint8_t flags
        uint32_t group_bytes
        uint32_t tag_hash
        uint16_t tags_bytes
        uint16_t keys_bytes
        uint16_t properties_bytes
        uint8_t attempts
        uint8_t reserved

cdef extern from "record.h" nogil:
    uint32_t sb_crc32c(uint32_t start, const void *data, size_t size)
    uint32_t sb_crc32c_portable(uint32_t start, const void *data, size_t size)
    const char *sb_crc32c_name()
    uint64_t sb_padded(uint64_t size)
    uint32_t sb_tag_hash(const uint8_t *tags, uint32_t bytes)
    uint32_t sb_record_crc(const sb_record *header, uint32_t payload_crc)
    int sb_record_check(const uint8_t *data, uint64_t room, uint64_t position, uint64_t segment_bytes,
                        uint32_t min_epoch, uint32_t max_epoch, int check_crc)

cdef extern from "time.h" nogil:
    ctypedef struct record_timespec "struct timespec":
        long tv_sec
        long tv_nsec
    int record_clock_gettime "clock_gettime"(int clock, record_timespec *now)
    enum:
        RECORD_CLOCK_MONOTONIC "CLOCK_MONOTONIC"

cdef extern from "sys/prctl.h" nogil:
    int prctl(int option, ...)
    enum:
        PR_SET_NAME

RECORD_HEADER_BYTES = SB_RECORD_HEADER
RECORD_ALIGN_BYTES = SB_RECORD_ALIGN
GROUP_RECORDS_MAX = SB_GROUP_RECORDS_MAX
SUBSCRIPTION_BYTES_MAX = SB_SUBSCRIPTION_BYTES - 1  # of JSON, without its NUL
LAYOUT_VERSION = SB_LAYOUT_VERSION
RECORD_VERSION = SB_RECORD_VERSION
CRC_IMPLEMENTATION = sb_crc32c_name().decode()

# Below this a call is over before another thread could take the GIL.

cdef Py_ssize_t release_gil_bytes = 32 * 1024


def crc32c(data, start=0):
    cdef Py_buffer view
    cdef uint32_t crc = start
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len < release_gil_bytes:
            crc = sb_crc32c(crc, view.buf, <size_t>view.len)
        else:
            with nogil:
                crc = sb_crc32c(crc, view.buf, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)
    return crc


def crc32c_portable(data, start=0):
    cdef Py_buffer view
    cdef uint32_t crc = start
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            crc = sb_crc32c_portable(crc, view.buf, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)
    return crc


def monotonic_ns():
    cdef record_timespec now
    record_clock_gettime(RECORD_CLOCK_MONOTONIC, &now)
    return now.tv_sec * 1_000_000_000 + now.tv_nsec


def start_ticks(pid):
    try:
        with open(f"/proc/{int(pid)}/stat", "rb", buffering=0) as stat:
            line = stat.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    # The name in parentheses may itself hold blanks and parentheses: the last one ends it. Field 3 follows.
    return int(line[line.rindex(b")") + 2:].split()[19])


def start_writeback(int fd, int64_t offset, int64_t size):
    cdef int code, number
    with nogil:
        code = sync_file_range(fd, offset, size, SYNC_FILE_RANGE_WRITE)
        number = errno
    if code != 0 and number != ENOSYS and number != ESPIPE:
        raise OSError(number, "sync_file_range")


def set_process_name(name):
    encoded = name.encode()[:15]
    if prctl(PR_SET_NAME, <const char *>encoded, 0, 0, 0) != 0:
        raise OSError(errno, "prctl(PR_SET_NAME)")


cdef class Record:
    cdef sb_record header
    cdef readonly bytes raw

    @staticmethod
    cdef Record of(const uint8_t *data):
        """The caller has checked the record and its length."""
        cdef Record record = Record.__new__(Record)
        memcpy(&record.header, data, SB_RECORD_HEADER)
        record.raw = PyBytes_FromStringAndSize(<const char *>data, <Py_ssize_t>sb_padded(record.header.size))
        return record

    def __init__(self):
        raise TypeError("records come from scan() and decode_record()")

    cdef bytes slice(self, uint32_t start, uint32_t size):
        return PyBytes_FromStringAndSize(PyBytes_AS_STRING(self.raw) + start, size)

    @property
    def position(self):
        return self.header.position

    @property
    def size(self):
        return self.header.size

    @property
    def padded(self):
        return sb_padded(self.header.size)

    @property
    def crc(self):
        return self.header.crc

    @property
    def epoch(self):
        return self.header.epoch

    @property
    def flushed(self):
        return self.header.position - self.header.unflushed

    @property
    def kind(self):
        return self.header.kind

    @property
    def flags(self):
        return self.header.flags

    @property
    def queue_offset(self):
        return self.header.queue_offset

    @property
    def queue_id(self):
        return self.header.queue_id

    @property
    def topic_id(self):
        return self.header.topic_id

    @property
    def incarnation(self):
        return self.header.incarnation

    @property
    def sequence(self):
        return self.header.sequence

    @property
    def born_ns(self):
        return self.header.born_ns

    @property
    def group_bytes(self):
        return self.header.group_bytes

    @property
    def tag_hash(self):
        return self.header.tag_hash

    @property
    def attempts(self):
        return self.header.attempts

    @property
    def tags(self):
        return self.slice(SB_RECORD_HEADER, self.header.tags_bytes).decode()

    @property
    def keys(self):
        return self.slice(SB_RECORD_HEADER + self.header.tags_bytes, self.header.keys_bytes).decode()

    @property
    def properties(self):
        cdef uint32_t at = SB_RECORD_HEADER + <uint32_t>self.header.tags_bytes + self.header.keys_bytes
        return parse_properties(self.slice(at, self.header.properties_bytes))

    @property
    def body(self):
        cdef uint32_t at = (
            SB_RECORD_HEADER + <uint32_t>self.header.tags_bytes + self.header.keys_bytes + self.header.properties_bytes
        )
        return self.slice(at, self.header.size - at)

    @property
    def message_id(self):
        return f"{self.header.incarnation:016x}{self.header.sequence:016x}"

    def __eq__(self, other):
        return isinstance(other, Record) and self.raw == (<Record>other).raw

    def __hash__(self):
        return hash(self.raw)

    def __repr__(self):
        return (
            f"Record(position={self.position}, size={self.size}, kind={self.kind}, epoch={self.epoch}, "
            f"topic_id={self.topic_id}, queue_id={self.queue_id}, queue_offset={self.queue_offset})"
        )


cdef dict parse_properties(bytes encoded):
    """RocketMQ's encoding: name 0x01 value 0x02, again and again; a pair without a 0x01 is left out, as there."""
    cdef dict properties = {}
    for pair in encoded.decode().split("\x02"):
        name, separator, value = pair.partition("\x01")
        if separator:
            properties[name] = value
    return properties


cdef bytes format_properties(properties):
    cdef list parts = []
    for name, value in properties.items():
        if "\x01" in name or "\x02" in name or "\x01" in value or "\x02" in value:
            raise ValueError("the characters 0x01 and 0x02 separate properties: they cannot stand in one")
        parts.append(f"{name}\x01{value}\x02")
    return "".join(parts).encode()


def encode_record(*, position, epoch, flushed, kind, bytes body, queue_offset=0, queue_id=0xFFFF, topic_id=0,
                  incarnation=0, sequence=0, born_ns=0, flags=0, group_bytes=0, tags="", keys="", properties=None,
                  attempts=0):
    cdef bytes encoded_tags = tags.encode()
    cdef bytes encoded_keys = keys.encode()
    cdef bytes encoded_properties = format_properties(properties) if properties else b""
    cdef bytes payload = encoded_tags + encoded_keys + encoded_properties + body
    cdef sb_record header
    cdef uint32_t payload_crc = 0
    for part in (encoded_tags, encoded_keys, encoded_properties):
        if len(part) > 0xFFFF:
            raise ValueError(f"{len(part)} bytes of tags, keys or properties: at most 65535 fit their length field")
    if position % SB_RECORD_ALIGN or not position - 0xFFFFFFFF <= flushed <= position:
        raise ValueError(f"no record can stand at {position} with flushed = {flushed}")
    if kind == SB_KIND_FILLER:
        payload = bytes(len(payload))
    else:
        payload_crc = sb_crc32c(0, PyBytes_AS_STRING(payload), <size_t>len(payload))
    header = sb_record(
        size=SB_RECORD_HEADER + len(payload), crc=0, position=position, epoch=epoch, unflushed=position - flushed,
        queue_offset=queue_offset, incarnation=incarnation, sequence=sequence, born_ns=born_ns, topic_id=topic_id,
        queue_id=queue_id, kind=kind, flags=flags, group_bytes=group_bytes,
        tag_hash=sb_tag_hash(<const uint8_t *>PyBytes_AS_STRING(encoded_tags), <uint32_t>len(encoded_tags)),
        tags_bytes=len(encoded_tags), keys_bytes=len(encoded_keys), properties_bytes=len(encoded_properties),
        attempts=attempts, reserved=0,
    )
    header.crc = sb_record_crc(&header, payload_crc)
    padding = bytes(sb_padded(header.size) - header.size)
    return PyBytes_FromStringAndSize(<const char *>&header, SB_RECORD_HEADER) + payload + padding


def decode_record(data, position=None):
    cdef Py_buffer view
    cdef sb_record header
    cdef uint64_t place
    cdef uint64_t segment_bytes = <uint64_t>1 << 63
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len < SB_RECORD_HEADER:
            raise ValueError(f"{view.len} bytes are no record: its header alone has {SB_RECORD_HEADER}")
        memcpy(&header, view.buf, SB_RECORD_HEADER)
        place = header.position if position is None else position
        if header.position != place:
            raise ValueError(f"the record at {place} names another position, {header.position}")
        if header.size < SB_RECORD_HEADER or sb_padded(header.size) > <uint64_t>view.len:
            raise ValueError(f"the record at {place} claims {header.size} bytes, {view.len} are here")
        if header.kind == SB_KIND_FILLER:
            segment_bytes = place + header.size  # it ends a segment: here of any size
        if sb_record_check(<const uint8_t *>view.buf, <uint64_t>view.len, place, segment_bytes, header.epoch,
                           header.epoch, 0) != SB_OK:
            raise ValueError(f"the header of the record at {place} contradicts itself")
        if sb_record_check(<const uint8_t *>view.buf, <uint64_t>view.len, place, segment_bytes, header.epoch,
                           header.epoch, 1) != SB_OK:
            raise ValueError(f"the record at {place} fails its CRC")
        return Record.of(<const uint8_t *>view.buf)
    finally:
        PyBuffer_Release(&view)
