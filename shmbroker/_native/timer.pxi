# timer.pxi: delayed messages: what the log says about them, and the one append by which they fire, or are recalled.

cdef extern from "layout.h" nogil:
    enum:
        SB_KIND_TIMER
        SB_KIND_FIRED
        SB_KIND_RECALL
    ctypedef struct sb_fired:
        uint64_t position
        uint64_t origin
        uint64_t back

cdef extern from "timer.h" nogil:
    ctypedef struct sb_timer_event:
        uint64_t at
        uint64_t position
        uint64_t due
        uint64_t origin
        uint64_t successor
        uint64_t end
        uint32_t kind
    int sb_timer_collect(sb_walk *walk, sb_timer_event *events, uint32_t room, uint32_t *count)

cdef enum:
    EVENTS_MAX = 4096  # of one timer_scan


def timer_scan(data, position, epoch, segment_bytes):
    cdef Py_buffer view
    cdef sb_walk walk
    cdef sb_timer_event *events = NULL
    cdef sb_timer_event *event
    cdef uint32_t count = 0, i
    cdef int code
    cdef list found = []
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        walk = make_walk(&view, position, epoch, segment_bytes, False)
        events = <sb_timer_event *>malloc(EVENTS_MAX * sizeof(sb_timer_event))
        if events == NULL:
            raise MemoryError
        with nogil:
            code = sb_timer_collect(&walk, events, EVENTS_MAX, &count)
        for i in range(count):
            event = &events[i]
            if event.kind == SB_KIND_TIMER:
                found.append((event.at, SB_KIND_TIMER, event.position, event.due, event.end - event.at))
            elif event.kind == SB_KIND_FIRED:
                found.append((event.at, SB_KIND_FIRED, event.position, event.origin, event.successor))
            else:
                found.append((event.at, SB_KIND_RECALL, event.position, event.end, 0))
        return found, walk.position, walk.epoch, why_stopped(code)
    finally:
        free(events)
        PyBuffer_Release(&view)


cdef int take_turn(sb_region *r, uint32_t owner, sb_item *items, uint32_t count, uint64_t turn, uint32_t options,
                   int64_t deadline, uint64_t *end, str doing) except -100:
    """Append if nobody has fired, recalled or carried on a timer since the word ``timer_turn`` was ``turn``, and move it.

    SB_OK | SB_LOST: somebody has | SB_GONE: a topic was deleted meanwhile. Raises for the rest.
    """
    cdef uint32_t waiter = SB_NIL
    cdef sb_effect effect
    cdef int code = SB_INTERRUPTED
    effect.word = &sb_marks(r).timer_turn
    effect.expected = turn
    effect.desired = turn + 1
    effect.claim = 0
    try:
        while code == SB_INTERRUPTED:
            check_signals()
            with nogil:
                code = sb_append_wait(r, owner, items, count, &effect, 1, options, deadline, end, &waiter)
    finally:
        if waiter != SB_NIL:
            sb_waiter_give(r, waiter)
    if code == SB_OK:
        sb_append_wake(r, items, count)
    elif code != SB_LOST and code != SB_GONE:
        raise code_error(r, code, doing)
    return code


cdef int read_timer(sb_item *item, bytes raw, uint64_t *position) except -1:
    """What a TIMER record, checked before, says of its message."""
    cdef sb_record header
    cdef const uint8_t *at = <const uint8_t *>PyBytes_AS_STRING(raw)
    if len(raw) < SB_RECORD_HEADER:
        raise ValueError("no record")
    memcpy(&header, at, SB_RECORD_HEADER)
    if header.kind != SB_KIND_TIMER or header.size > <uint64_t>len(raw):
        raise ValueError("no TIMER record")
    memset(item, 0, sizeof(sb_item))
    item.tags = at + SB_RECORD_HEADER
    item.tags_bytes = header.tags_bytes
    item.keys = item.tags + header.tags_bytes
    item.keys_bytes = header.keys_bytes
    item.properties = item.keys + header.keys_bytes
    item.properties_bytes = header.properties_bytes
    item.body = item.properties + header.properties_bytes
    item.body_bytes = <uint32_t>(at + header.size - item.body)
    item.payload_crc = sb_crc32c(0, item.tags, header.size - SB_RECORD_HEADER)
    item.tag_hash = header.tag_hash
    item.incarnation = header.incarnation
    item.sequence = header.sequence
    item.born_ns = header.born_ns
    item.topic_id = header.topic_id
    item.queue_id = header.queue_id
    item.attempts = header.attempts
    item.flags = header.flags & (SB_FLAG_DEDUP | SB_FLAG_WAIT_STORE_NOT_OK)
    item.queue_offset = header.queue_offset
    item.queue_slot = SB_NIL
    position[0] = header.position
    return 0


cdef object append_fired(sb_region *r, uint32_t owner, list records, origins, uint64_t turn, int64_t timeout_ns):
    """See Region.fire and Region.carry_on in _core.pyi."""
    cdef uint32_t count = <uint32_t>len(records), items_count = 0, slots[SB_QUEUES_PER_TOPIC_MAX], found = 0, topic = 0, slot = 0, i
    cdef uint64_t position = 0, end = 0, back = 0
    cdef bint carry = origins is not None
    cdef int64_t deadline = sb_now_ns() + timeout_ns
    cdef int code = SB_GONE
    cdef sb_item *items = NULL
    cdef sb_fired *entries = NULL
    cdef sb_item *item
    if not 0 < count < SB_GROUP_RECORDS_MAX:
        raise ValueError(f"{count} timers in one append")
    try:
        items = <sb_item *>malloc((count + 1) * sizeof(sb_item))
        entries = <sb_fired *>malloc(count * sizeof(sb_fired))
        if items == NULL or entries == NULL:
            raise MemoryError
        while code == SB_GONE:
            items_count, topic, found = 0, 0, 0
            for i in range(count):
                item = &items[items_count]
                read_timer(item, records[i], &position)
                entries[i] = sb_fired(position=position, origin=origins[i] if carry else 0, back=0)
                if carry:
                    item.kind = SB_KIND_TIMER
                    item.flags |= SB_FLAG_LATE
                    items_count += 1
                    continue
                if item.topic_id != topic:  # no topic has the id 0
                    topic, found = item.topic_id, 0
                    if sb_topic_by_id(r, topic, &slot) == SB_OK:
                        found = sb_topic_queues(r, slot, slots, SB_QUEUES_PER_TOPIC_MAX)
                if item.queue_id == SB_NO_QUEUE and found:
                    item.queue_id = <uint16_t>((position // SB_RECORD_ALIGN + i) % found)
                if item.queue_id < found:  # else it was deleted, and its messages with it
                    item.kind = SB_KIND_MESSAGE
                    item.flags |= SB_FLAG_LATE
                    item.queue_slot = slots[item.queue_id]
                    items_count += 1
            if carry:
                back = 0
                for i in range(count, 0, -1):
                    back += sb_padded(SB_RECORD_HEADER + items[i - 1].tags_bytes + items[i - 1].keys_bytes
                                      + items[i - 1].properties_bytes + <uint64_t>items[i - 1].body_bytes)
                    entries[i - 1].back = back
            item = &items[items_count]
            memset(item, 0, sizeof(sb_item))
            item.body = <const uint8_t *>entries
            item.body_bytes = <uint32_t>(count * sizeof(sb_fired))
            item.payload_crc = sb_crc32c(0, entries, item.body_bytes)
            item.born_ns = sb_realtime_ns()
            item.queue_slot = SB_NIL
            item.queue_id = SB_NO_QUEUE
            item.kind = SB_KIND_FIRED
            code = take_turn(r, owner, items, items_count + 1, turn, SB_APPEND_SYSTEM if carry else 0, deadline, &end,
                             "firing delayed messages")
        return None if code == SB_LOST else items_count
    finally:
        free(items)
        free(entries)


cdef object append_recall(sb_region *r, uint32_t owner, uint64_t position, uint64_t turn, int64_t timeout_ns):
    """See Client.recall in _core.pyi."""
    cdef sb_item item
    cdef uint64_t end = 0
    memset(&item, 0, sizeof(sb_item))
    item.body = <const uint8_t *>&position
    item.body_bytes = sizeof(position)
    item.payload_crc = sb_crc32c(0, &position, sizeof(position))
    item.born_ns = sb_realtime_ns()
    item.queue_slot = SB_NIL
    item.queue_id = SB_NO_QUEUE
    item.kind = SB_KIND_RECALL
    if take_turn(r, owner, &item, 1, turn, SB_APPEND_SYSTEM, sb_now_ns() + timeout_ns, &end, "recalling a message") != SB_OK:
        return None
    return end
