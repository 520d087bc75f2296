# filter.pxi: which messages of a topic a subscription wants: by their tags, or by an SQL expression on their properties.

cdef extern from "filter.h" nogil:
    enum:
        SB_FILTER_NAMES_MAX
        SB_FILTER_STACK_MAX
        SB_FILTER_PROPERTY
        SB_FILTER_TEXT
        SB_FILTER_WHOLE
        SB_FILTER_REAL
        SB_FILTER_TRUE
        SB_FILTER_EQUAL
        SB_FILTER_LESS
        SB_FILTER_AT_MOST
        SB_FILTER_CONTAINS
        SB_FILTER_STARTS
        SB_FILTER_ENDS
        SB_FILTER_AND
        SB_FILTER_OR
        SB_FILTER_NOT
        SB_FILTER_IS_NULL
    int sb_filter_run(const uint8_t *program, uint32_t program_bytes, const sb_record *header, const uint8_t *payload)

cdef enum:
    HASHES_MAX = 64  # tags in one subscription
    PROPERTIES_MAX = 3 * 0xFFFF  # tags, keys and properties of a record

FILTER_NAMES_MAX = SB_FILTER_NAMES_MAX
FILTER_STACK_MAX = SB_FILTER_STACK_MAX
FILTER_INSTRUCTIONS = {
    "PROPERTY": SB_FILTER_PROPERTY, "TEXT": SB_FILTER_TEXT, "WHOLE": SB_FILTER_WHOLE, "REAL": SB_FILTER_REAL,
    "TRUE": SB_FILTER_TRUE, "EQUAL": SB_FILTER_EQUAL, "LESS": SB_FILTER_LESS, "AT_MOST": SB_FILTER_AT_MOST,
    "CONTAINS": SB_FILTER_CONTAINS, "STARTS": SB_FILTER_STARTS, "ENDS": SB_FILTER_ENDS, "AND": SB_FILTER_AND,
    "OR": SB_FILTER_OR, "NOT": SB_FILTER_NOT, "IS_NULL": SB_FILTER_IS_NULL,
}


cdef class _Filter:
    """Looks at a record where it lies, and once more at the private copy, which a CRC vouches for."""
    cdef bint looks_inside  # may_match wants tags, keys and properties, not the header alone

    cdef bint may_match(self, const sb_record *header, const uint8_t *payload) noexcept:
        return True

    cdef bint matches(self, bytes record) except? -1:
        return True


@cython.final
cdef class _TagFilter(_Filter):
    """Hashes are compared in the ring, the strings on the copy (RocketMQ's two steps)."""
    cdef frozenset tags
    cdef uint32_t hashes[HASHES_MAX]
    cdef uint32_t count

    def __init__(self, tags):
        cdef bytes tag
        if len(tags) > HASHES_MAX:
            raise _errors.BadRequest(f"{len(tags)} tags in one subscription, at most {HASHES_MAX}")
        self.tags = frozenset(tags)
        self.count = 0
        for tag in self.tags:
            self.hashes[self.count] = sb_tag_hash(<const uint8_t *>PyBytes_AS_STRING(tag), <uint32_t>len(tag))
            self.count += 1

    cdef bint may_match(self, const sb_record *header, const uint8_t *payload) noexcept:
        cdef uint32_t i
        for i in range(self.count):
            if self.hashes[i] == header.tag_hash:
                return True
        return False

    cdef bint matches(self, bytes record) except? -1:
        cdef const sb_record *h = <const sb_record *>PyBytes_AS_STRING(record)
        return PyBytes_FromStringAndSize(PyBytes_AS_STRING(record) + SB_RECORD_HEADER, h.tags_bytes) in self.tags


@cython.final
cdef class _SqlFilter(_Filter):
    """A program of selector.py, with room for what the ring may overwrite while it is looked at."""
    cdef bytes program
    cdef uint8_t *properties

    def __cinit__(self, bytes program not None):
        check_program(program)
        self.program = program
        self.looks_inside = True
        self.properties = <uint8_t *>malloc(PROPERTIES_MAX)
        if self.properties == NULL:
            raise MemoryError("an SQL filter needs 192 KiB")

    def __dealloc__(self):
        free(self.properties)

    cdef bint may_match(self, const sb_record *header, const uint8_t *payload) noexcept:
        return run_program(self.program, header, payload) == 1

    cdef bint matches(self, bytes record) except? -1:
        cdef const uint8_t *data = <const uint8_t *>PyBytes_AS_STRING(record)
        return run_program(self.program, <const sb_record *>data, data + SB_RECORD_HEADER) == 1


cdef _Filter make_filter(wanted):
    """None: every message | the bytes of a program | tags."""
    if wanted is None:
        return None
    return _SqlFilter(wanted) if isinstance(wanted, bytes) else _TagFilter(wanted)


cdef inline int run_program(bytes program, const sb_record *header, const uint8_t *payload) noexcept:
    return sb_filter_run(<const uint8_t *>PyBytes_AS_STRING(program), <uint32_t>len(program), header, payload)


cdef int check_program(bytes program) except -1:
    cdef sb_record empty
    memset(&empty, 0, sizeof(sb_record))
    if run_program(program, &empty, <const uint8_t *>&empty) == SB_INVALID:
        raise ValueError("no program of a filter")
    return 0


def run_filter(bytes program not None, bytes tags not None, bytes keys not None, properties):
    cdef sb_record header
    cdef bytes encoded = format_properties(properties) if properties else b""
    cdef bytes payload = tags + keys + encoded
    check_program(program)
    if max(len(tags), len(keys), len(encoded)) > 0xFFFF:
        raise ValueError("no record has so long tags, keys or properties")
    memset(&header, 0, sizeof(sb_record))
    header.tags_bytes = <uint16_t>len(tags)
    header.keys_bytes = <uint16_t>len(keys)
    header.properties_bytes = <uint16_t>len(encoded)
    return run_program(program, &header, <const uint8_t *>PyBytes_AS_STRING(payload)) == 1
