# progress.pxi: claim tables as people see them, and as PROGRESS records (drawn in layout.h at sb_progress).

cdef extern from "claim.h" nogil:
    ctypedef struct sb_progress:
        uint32_t group_id
        uint32_t topic_id
        uint16_t queue_id
        uint16_t version
        uint32_t reset_generation
        uint64_t base
        uint32_t run_count
        uint32_t reserved
    ctypedef struct sb_progress_run:
        uint64_t first
        uint32_t count
        uint16_t attempts
        uint16_t kind
    ctypedef struct sb_claims:
        sb_word state
        uint32_t group_slot
        uint32_t queue_slot
        uint32_t group_id
        uint32_t topic_id
        uint32_t queue_id
        sb_word base
        sb_word deadline_ms
        sb_word reset_generation
        sb_word delivered
        sb_word acked
        sb_word redelivered
        sb_word refused
        sb_word recorded
        sb_word owner
        sb_word wanted
    enum:
        SB_PROGRESS_VERSION
        SB_RUN_ACKED
    uint64_t SB_NO_OFFSET
    ctypedef struct sb_reset:
        uint64_t before
        uint64_t after
    int sb_claims_reset(sb_region *r, uint32_t group_id, uint32_t topic_id, uint32_t queue_id, uint64_t base, int64_t deadline_ns,
                        sb_reset *done, uint64_t *needed)
    bint sb_claims_is_live(uint64_t life)
    uint64_t sb_claims_next_offset(const sb_claims *c)
    sb_claims *sb_claims_at(const sb_region *r, uint32_t i)
    int sb_claims_open(sb_region *r, uint32_t group, uint32_t queue, uint64_t base, int64_t deadline_ns, uint32_t *table,
                       int *created)
    uint32_t sb_claims_runs(sb_region *r, uint32_t table, uint64_t *base, sb_progress_run *runs, uint32_t room)
    uint32_t sb_claims_held(const sb_region *r, uint32_t table, uint64_t *oldest, uint32_t *holder)
    int sb_claims_merge(sb_region *r, uint32_t table, int created, const sb_progress *progress, const sb_progress_run *runs)

cdef uint64_t NEVER_RECORDED = 0xffffffffffffffff


cdef bytes progress_body(sb_region *r, uint32_t table):
    """One table's PROGRESS body; None if it is nobody's, or was given to another group or queue while we looked."""
    cdef sb_claims *c = sb_claims_at(r, table)
    cdef uint64_t life = sb_load(&c.state)
    cdef sb_progress progress
    cdef uint32_t room = 16, count
    cdef bytes body
    if not sb_claims_is_live(life):
        return None
    memset(&progress, 0, sizeof(progress))
    progress.group_id = c.group_id
    progress.topic_id = c.topic_id
    progress.queue_id = <uint16_t>c.queue_id
    progress.version = SB_PROGRESS_VERSION
    progress.reset_generation = <uint32_t>sb_load(&c.reset_generation)
    while True:
        body = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(sizeof(sb_progress) + room * sizeof(sb_progress_run)))
        count = sb_claims_runs(r, table, &progress.base,
                               <sb_progress_run *>(PyBytes_AS_STRING(body) + sizeof(sb_progress)), room)
        if sb_load_last(&c.state) != life:
            return None
        if count <= room:
            progress.run_count = count
            memcpy(PyBytes_AS_STRING(body), &progress, sizeof(progress))
            return body[:sizeof(sb_progress) + count * sizeof(sb_progress_run)]
        room = count + 16  # others claim and ack meanwhile


cdef uint64_t body_mark(bytes body):
    """What sb_claims.recorded holds for a table whose last record was ``body``."""
    return <uint64_t>len(body) << 32 | sb_crc32c(0, PyBytes_AS_STRING(body), <size_t>len(body))


cdef list progress_bodies(sb_region *r, bint only_changed):
    cdef uint32_t i
    cdef bytes body
    cdef list bodies = []
    for i in range(r.limits.claim_tables):
        body = progress_body(r, i)
        if body is not None and not (only_changed and sb_load(&sb_claims_at(r, i).recorded) == body_mark(body)):
            bodies.append(body)
    return bodies


cdef object progress_noted(sb_region *r, bodies):
    cdef uint32_t i
    cdef sb_claims *c
    cdef const sb_progress *p
    cdef bytes body
    for body in bodies:
        p = <const sb_progress *>PyBytes_AS_STRING(body)
        for i in range(r.limits.claim_tables):
            c = sb_claims_at(r, i)
            if (sb_claims_is_live(sb_load(&c.state)) and c.group_id == p.group_id and c.topic_id == p.topic_id
                    and c.queue_id == p.queue_id):
                sb_store(&c.recorded, body_mark(body))


cdef object merge_progress(sb_region *r, bytes body):
    cdef const sb_progress *p = <const sb_progress *>PyBytes_AS_STRING(body)
    cdef uint32_t group = 0, topic = 0, table = 0, n
    cdef uint32_t slots[SB_QUEUES_PER_TOPIC_MAX]
    cdef int created = 0, code
    if (<size_t>len(body) < sizeof(sb_progress) or p.version != SB_PROGRESS_VERSION
            or <size_t>len(body) != sizeof(sb_progress) + <size_t>p.run_count * sizeof(sb_progress_run)):
        raise ValueError(f"{len(body)} bytes are no progress record")
    if sb_group_by_id(r, p.group_id, &group) != SB_OK:
        raise _errors.GroupNotExist(f"progress of group id {p.group_id}, which does not exist")
    if sb_topic_by_id(r, p.topic_id, &topic) != SB_OK:
        raise _errors.TopicNotExist(f"progress in topic id {p.topic_id}, which does not exist")
    n = sb_topic_queues(r, topic, slots, SB_QUEUES_PER_TOPIC_MAX)
    if p.queue_id >= n:
        raise _errors.QueueNotExist(f"progress in queue {p.queue_id} of topic id {p.topic_id}, which has {n} queues")
    code = sb_claims_open(r, group, slots[p.queue_id], p.base, sb_now_ns() + DEFINE_TIMEOUT_NS, &table, &created)
    if code == SB_TABLE_FULL:
        raise _errors.LimitReached(f"group progress needs more than claim_tables = {r.limits.claim_tables}")
    if code == SB_OK:
        code = sb_claims_merge(r, table, created, p, <const sb_progress_run *>(PyBytes_AS_STRING(body) + sizeof(sb_progress)))
        if code == SB_TABLE_FULL:
            raise _errors.LimitReached(
                f"unacknowledged messages need more than overflow_claims = {r.limits.overflow_claims}")
        if code == SB_INVALID:
            raise ValueError("a progress record's runs contradict each other")
    if code != SB_OK:
        raise code_error(r, code, "restoring progress")


cdef object reset_error(sb_region *r, int code, uint32_t group_id, uint32_t topic_id, uint32_t queue_id):
    if code == SB_NOT_FOUND:
        return _errors.GroupNotExist(f"there is no group with id {group_id} (any more)")
    if code == SB_GONE:
        return _errors.QueueNotExist(f"there is no queue {queue_id} of a topic with id {topic_id} (any more)")
    if code == SB_TABLE_FULL:
        return _errors.LimitReached(
            f"a reset needs a free claim table, and all claim_tables = {r.limits.claim_tables} are in use. Start the broker anew "
            "with more, or delete groups or topics that nobody needs")
    return code_error(r, code, "resetting a group")


cdef dict progress_dict(sb_region *r, uint32_t table, bytes body):
    """See Region.progress in _core.pyi."""
    cdef sb_claims *c = sb_claims_at(r, table)
    cdef const sb_progress *p = <const sb_progress *>PyBytes_AS_STRING(body)
    cdef const sb_progress_run *runs = <const sb_progress_run *>(PyBytes_AS_STRING(body) + sizeof(sb_progress))
    cdef sb_queue *queue = sb_queue_at(r, c.queue_slot)
    cdef uint32_t i, holder = 0, held
    cdef uint64_t oldest = 0, offset
    cdef list acked = [], overflow = []
    cdef dict attempts = {}
    for i in range(p.run_count):
        if runs[i].kind == SB_RUN_ACKED:
            acked.append((runs[i].first, runs[i].count))
            continue
        for offset in range(runs[i].first, runs[i].first + runs[i].count):
            attempts[offset] = runs[i].attempts
            if offset < p.base:
                overflow.append(offset)
    held = sb_claims_held(r, table, &oldest, &holder)
    return {
        "group": sb_group_at(r, c.group_slot).name.decode("ascii", "replace"), "group_id": c.group_id,
        "topic": sb_topic_at(r, queue.topic_slot).name.decode("ascii", "replace"), "topic_id": c.topic_id,
        "queue_id": c.queue_id, "table": table, "base": p.base, "next": max(sb_claims_next_offset(c), p.base),
        "next_offset": sb_load(&queue.next_offset), "acked": acked, "attempts": attempts, "overflow": overflow,
        "held": held, "oldest_held": oldest if held else None, "oldest_holder": holder if held else None,
        "delivered": sb_load(&c.delivered), "redelivered": sb_load(&c.redelivered), "refused": sb_load(&c.refused),
        "reset_generation": p.reset_generation, "owner": <int64_t>sb_load(&c.owner) - 1 if sb_load(&c.owner) else None,
    }


cdef list consumed_places(sb_region *r):
    cdef uint32_t i
    cdef sb_claims *c
    cdef list places = []
    for i in range(r.limits.claim_tables):
        c = sb_claims_at(r, i)
        if sb_claims_is_live(sb_load(&c.state)):
            places.append((c.group_id, c.topic_id, c.queue_id))
    return places


cdef list progress_tables(sb_region *r):
    """Each of them. A reset moves one to another place: a list that lacked it would make retention think that nobody needs it."""
    cdef uint32_t i
    cdef bytes body
    cdef list tables
    cdef uint64_t generation
    while True:
        generation = sb_load(&sb_marks(r).topic_generation)
        tables = []
        for i in range(r.limits.claim_tables):
            body = progress_body(r, i)
            if body is not None:
                tables.append(progress_dict(r, i, body))
        if sb_load_last(&sb_marks(r).topic_generation) == generation:
            return tables
