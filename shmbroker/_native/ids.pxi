# ids.pxi: remembered ids as bodies of IDS records (drawn in layout.h at sb_known_id; read in Python by record.py).

cdef enum:
    IDS_PER_BODY = 512  # looked at while the append lock is held: a few microseconds


cdef list dedup_id_bodies(sb_region *r, uint64_t newest):
    """See Region.dedup_ids in _core.pyi."""
    cdef sb_known_id ids[IDS_PER_BODY]
    cdef uint64_t next = 0
    cdef uint32_t count = 0
    cdef int64_t deadline = sb_now_ns() + DEFINE_TIMEOUT_NS
    cdef int code = SB_OK
    cdef list bodies = []
    while code == SB_OK:
        with nogil:
            code = sb_append_read_ids(r, newest, &next, ids, IDS_PER_BODY, &count, deadline)
        if count:
            bodies.append(PyBytes_FromStringAndSize(<const char *>ids, <Py_ssize_t>(count * sizeof(sb_known_id))))
    if code != SB_END:
        raise code_error(r, code, "reading the ids of dedup keys")
    return bodies
