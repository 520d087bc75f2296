# scan.pxi: walks over runs of records in any bytes-like object: needs no shared memory.

cdef extern from "scan.h" nogil:
    ctypedef struct sb_walk:
        const uint8_t *data
        uint64_t length
        uint64_t start
        uint64_t segment_bytes
        uint64_t position
        uint32_t epoch
        int check_crc

    ctypedef struct sb_entry:
        uint64_t position
        uint32_t size
        uint32_t tag_hash

    ctypedef struct sb_run:
        uint32_t topic_id
        uint32_t queue_id
        uint64_t first_offset
        uint64_t next_offset
        sb_entry *out

    ctypedef struct sb_dispatch:
        sb_entry *entry
        uint32_t *run_of
        uint64_t *marked
        sb_run *run
        uint32_t *slot
        uint32_t slots
        uint32_t max_records
        int mark_keys
        uint32_t entries
        uint32_t marks
        uint32_t runs

    enum:
        SB_RUNS_MAX

    int sb_walk_next(sb_walk *walk, sb_record *record)
    uint64_t sb_skim(sb_walk *walk, int *why)
    int sb_find_record(const uint8_t *data, uint64_t length, uint64_t start, uint64_t segment_bytes,
                       uint32_t min_epoch, uint32_t max_epoch, int64_t flushed_above, sb_record *record)
    uint64_t sb_group_floor(const uint8_t *data, uint64_t length, uint64_t start, uint64_t segment_bytes,
                            uint64_t end)
    int sb_dispatch_collect(sb_dispatch *d, sb_walk *walk)
    void sb_dispatch_deal(sb_dispatch *d)


cdef sb_walk make_walk(Py_buffer *view, position, epoch, segment_bytes, bint check_crc) except *:
    cdef sb_walk walk
    if segment_bytes <= 0 or segment_bytes % SB_RECORD_ALIGN:
        raise ValueError(f"segment_bytes = {segment_bytes} is no positive multiple of {SB_RECORD_ALIGN}")
    walk.data = <const uint8_t *>view.buf
    walk.length = <uint64_t>view.len
    walk.start = position
    walk.position = position
    walk.segment_bytes = segment_bytes
    walk.epoch = epoch
    walk.check_crc = check_crc
    return walk


cdef str why_stopped(int code):
    return "end" if code == SB_END else "invalid" if code == SB_INVALID else "limit"


def scan(data, position, epoch, segment_bytes, max_records=65536, check_crc=True):
    cdef Py_buffer view
    cdef sb_walk walk
    cdef sb_record record
    cdef uint64_t before
    cdef int code = SB_AGAIN
    cdef Py_ssize_t room = max_records
    cdef list records = []
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        walk = make_walk(&view, position, epoch, segment_bytes, check_crc)
        while room > 0:
            code = sb_walk_next(&walk, &record)
            if code != SB_OK:
                break
            before = walk.position - sb_padded(record.size)
            records.append(Record.of(walk.data + (before - walk.start)))
            room -= 1
        return records, walk.position, why_stopped(code)
    finally:
        PyBuffer_Release(&view)


def scan_ids(data, position, epoch, segment_bytes):
    cdef Py_buffer view
    cdef sb_walk walk
    cdef sb_record record
    cdef list ids = []
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        walk = make_walk(&view, position, epoch, segment_bytes, False)
        while sb_walk_next(&walk, &record) == SB_OK:
            if record.kind == SB_KIND_MESSAGE and not record.flags & SB_FLAG_DEDUP and record.attempts == 0:  # a send's own
                ids.append((record.incarnation, record.sequence, record.position))
        return ids, walk.position, walk.epoch
    finally:
        PyBuffer_Release(&view)


def skim(data, position, epoch, segment_bytes):
    cdef Py_buffer view
    cdef sb_walk walk
    cdef int why
    cdef uint64_t records
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        walk = make_walk(&view, position, epoch, segment_bytes, True)
        with nogil:
            records = sb_skim(&walk, &why)
        return walk.position, records, walk.epoch, why_stopped(why)
    finally:
        PyBuffer_Release(&view)


def find_record(data, position, segment_bytes, min_epoch, max_epoch, flushed_above=-1):
    cdef Py_buffer view
    cdef sb_walk walk
    cdef sb_record record
    cdef int64_t above = flushed_above
    cdef uint32_t lowest = min_epoch
    cdef uint32_t highest = max_epoch
    cdef int code
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        walk = make_walk(&view, position, min_epoch, segment_bytes, True)
        with nogil:
            code = sb_find_record(walk.data, walk.length, walk.start, walk.segment_bytes, lowest, highest, above,
                                  &record)
        return (record.position, record.size, record.position - record.unflushed) if code == SB_OK else None
    finally:
        PyBuffer_Release(&view)


def group_floor(data, position, segment_bytes, end):
    cdef Py_buffer view
    cdef sb_walk walk
    cdef uint64_t last = end
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        walk = make_walk(&view, position, 0, segment_bytes, False)
        with nogil:
            last = sb_group_floor(walk.data, walk.length, walk.start, walk.segment_bytes, last)
        return last
    finally:
        PyBuffer_Release(&view)


def dispatch_scan(data, position, epoch, segment_bytes, max_records=65536, keys=True, check_crc=True):
    cdef Py_buffer view
    cdef sb_walk walk
    cdef sb_dispatch d
    cdef uint32_t runs_max
    cdef int code
    cdef char *memory = NULL
    cdef bytes entries
    cdef list runs = []
    if max_records < 1:
        raise ValueError("max_records must be positive")
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        walk = make_walk(&view, position, epoch, segment_bytes, check_crc)
        memset(&d, 0, sizeof(d))
        d.mark_keys = keys
        d.max_records = min(max_records, view.len // SB_RECORD_HEADER + 1)
        runs_max = min(d.max_records, <uint32_t>SB_RUNS_MAX)
        d.slots = 16
        while d.slots < 2 * runs_max:
            d.slots *= 2
        memory = <char *>malloc(
            <size_t>d.max_records * (sizeof(sb_entry) + sizeof(uint64_t) + sizeof(uint32_t))
            + runs_max * sizeof(sb_run) + d.slots * sizeof(uint32_t)
        )
        if memory == NULL:
            raise MemoryError()
        # Widest alignment first.
        d.entry = <sb_entry *>memory
        d.marked = <uint64_t *>(d.entry + d.max_records)
        d.run = <sb_run *>(d.marked + d.max_records)
        d.run_of = <uint32_t *>(d.run + runs_max)
        d.slot = d.run_of + d.max_records
        with nogil:
            memset(d.slot, 0, d.slots * sizeof(uint32_t))
            code = sb_dispatch_collect(&d, &walk)
        for i in range(d.runs):
            entries = PyBytes_FromStringAndSize(
                NULL, <Py_ssize_t>((d.run[i].next_offset - d.run[i].first_offset) * sizeof(sb_entry))
            )
            d.run[i].out = <sb_entry *>PyBytes_AS_STRING(entries)
            runs.append((d.run[i].topic_id, d.run[i].queue_id, d.run[i].first_offset, entries))
        sb_dispatch_deal(&d)
        runs.sort()
        return runs, [d.marked[i] for i in range(d.marks)], walk.position, walk.epoch, why_stopped(code)
    finally:
        free(memory)
        PyBuffer_Release(&view)
