# move.pxi: a received message goes on as a copy: retry, dead letter. The append itself: move.h.

cdef extern from "move.h" nogil:
    ctypedef struct sb_received:
        uint32_t slot, table
        uint64_t offset, receipt
    int sb_move(sb_region *r, const sb_received *received, sb_item *copy, int64_t deadline_ns, uint64_t *end, uint32_t *waiter)


def move_message(Client client not None, ReceivedMessage message not None, str topic not None, bytes properties not None, *,
                 uint32_t attempts, uint64_t due_ns, int64_t timeout_ns):
    cdef const sb_record *h = message.header()
    cdef sb_region *r = client.check()
    cdef _Source source = message.source
    cdef TopicRoute route
    cdef sb_item item
    cdef sb_received received
    cdef const uint8_t *payload = <const uint8_t *>PyBytes_AS_STRING(message.record) + SB_RECORD_HEADER
    cdef uint32_t queue, before = <uint32_t>h.tags_bytes + h.keys_bytes + h.properties_bytes, waiter = SB_NIL
    cdef uint64_t end = 0
    cdef int64_t deadline_ns = sb_now_ns() + timeout_ns
    cdef int code = SB_INTERRUPTED
    if source.client is not client or not source.is_current(r):
        raise expired_error("move", [message])
    if sb_load(&sb_marks(r).state) != SB_STATE_RUNNING:
        raise _errors.BrokerClosed(f"moving a message to {topic!r}: the broker is stopping. Nothing was changed")
    route = find_route(r, topic)
    if route is None:
        return None
    if not route.permission & 2:
        raise _errors.NoPermission(
            f"topic {topic!r} has permission {_naming.permission_name(route.permission)}: nobody may send to it")
    queue = <uint32_t>(h.queue_offset % route.count)
    memset(&item, 0, sizeof(item))
    item.tags = payload
    item.tags_bytes = h.tags_bytes
    item.tag_hash = h.tag_hash
    item.keys = payload + h.tags_bytes
    item.keys_bytes = h.keys_bytes
    item.properties = <const uint8_t *>PyBytes_AS_STRING(properties)
    item.properties_bytes = <uint32_t>len(properties)
    item.body = payload + before
    item.body_bytes = h.size - SB_RECORD_HEADER - before
    if len(properties) > 0xffff:
        raise _errors.PropertiesTooLarge(f"{len(properties)} bytes of properties: a record has room for 65535")
    item.payload_crc = sb_crc32c(0, item.tags, h.tags_bytes + h.keys_bytes)  # they lie side by side
    item.payload_crc = sb_crc32c(item.payload_crc, item.properties, item.properties_bytes)
    item.payload_crc = sb_crc32c(item.payload_crc, item.body, item.body_bytes)
    item.born_ns = h.born_ns
    item.incarnation = h.incarnation
    item.sequence = h.sequence
    item.attempts = <uint8_t>min(attempts, 255)
    item.topic_id = route.topic_id
    item.queue_id = <uint16_t>queue
    item.kind = SB_KIND_TIMER if due_ns else SB_KIND_MESSAGE
    item.flags = 0 if due_ns else SB_FLAG_LATE
    item.queue_slot = SB_NIL if due_ns else route.slots[queue]
    item.queue_offset = due_ns
    received = sb_received(slot=client.slot, table=source.table, offset=h.queue_offset, receipt=message.receipt)
    client.enter()
    try:
        while code == SB_INTERRUPTED:
            with nogil:
                code = sb_move(r, &received, &item, deadline_ns, &end, &waiter)
            if code == SB_INTERRUPTED:
                check_signals()
    finally:
        client.give_waiter(waiter)
        client.exit()
    if code == SB_NOT_FOUND:
        return None
    if code == SB_GONE:
        raise expired_error("move", [message])
    if code == SB_AGAIN:
        raise _errors.BrokerBusy(f"{message!r} is being moved by a process that does not go on. Nothing was changed")
    if code != SB_OK:
        raise code_error(r, code, f"moving a message to {topic!r}")
    sb_add(&sb_claims_at(r, source.table).acked, 1)
    if sb_load(&sb_marks(r).fenced):  # SYNC: fenced (R13)
        raise code_error(r, SB_FENCED, f"moving a message to {topic!r}")
    return end


def durable_status(Client client not None, uint64_t end_position, int64_t timeout_ns):
    return durability(client, end_position, sb_now_ns() + timeout_ns)
