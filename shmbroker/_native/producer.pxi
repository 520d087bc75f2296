# producer.pxi: ProducerCore, the send path. One append attempt is made with the GIL held and never sleeps; whatever
# has to wait (lock, space, durability) waits without it.

cdef uint64_t LARGE_BYTES = 65536  # from here on copying is worth dropping the GIL


cdef object durability(Client client, uint64_t end, int64_t deadline_ns):
    """The status of an append that ends at ``end``: table 1.2 of the master's own disk. It stands in memory whatever
    comes now, so nothing that happens here is an error: a failed disk, a stopped broker are a timeout that comes at once."""
    cdef int code
    if not sb_load(&sb_marks(&client.region.r).sync_flush):
        return SEND_OK
    code = client.wait_position(SB_WAIT_FLUSH, end, deadline_ns)
    if code == SB_FENCED:
        raise code_error(&client.region.r, code, "sending")
    return SEND_OK if code == SB_OK else FLUSH_DISK_TIMEOUT


cdef class ProducerCore:
    """Sends messages. Subclass: shmbroker.producer.Producer, which resolves topics and chooses queues by policy."""
    cdef readonly Client client
    cdef readonly str group
    cdef dict routes
    cdef uint32_t next_queue
    cdef public int64_t send_timeout_ns
    cdef public int64_t sync_flush_timeout_ns
    cdef sb_item *batch_items  # taken by the call that uses it
    cdef bint shut

    def __cinit__(self, *args, **kwargs):
        self.batch_items = NULL

    def __init__(self, Client client not None, str group, *, double send_timeout, double sync_flush_timeout):
        self.client = client
        self.group = group
        self.routes = {}
        self.next_queue = _os.getpid()
        self.send_timeout_ns = <int64_t>(send_timeout * 1e9)
        self.sync_flush_timeout_ns = <int64_t>(sync_flush_timeout * 1e9)

    def __dealloc__(self):
        free(self.batch_items)

    def _rebind(self, Client client not None):
        """Go on with another attachment: the broker was restarted, or this process was forked."""
        self.client = client
        self.routes.clear()

    def _shut(self):
        self.shut = True

    cdef Client ready(self):
        """The attachment that this call uses to its end, whatever other threads do to self.client."""
        if self.shut:
            raise _errors.BrokerClosed("this producer was closed")
        if self.client.fork_generation != sb_fork_generation:
            self._rebind(self._attach_again())
        self.client.check()
        return self.client

    # -- for the subclass

    def _missing_topic(self, str topic):
        """Create it or raise TopicNotExist."""
        raise _errors.TopicNotExist(f"topic {topic!r} does not exist")

    def _choose_queue(self, Message message, uint32_t count, selector, argument, sharding_key, queue_id):
        raise NotImplementedError

    def _dedup_id(self, Message message, dedup_key):
        raise NotImplementedError

    def _due_ns(self, Message message, int64_t now_ns):
        """When a delayed message is due, by CLOCK_REALTIME; 0: at once."""
        raise NotImplementedError

    def _recall(self, str handle):
        raise NotImplementedError

    def _attach_again(self):
        """The Client of this process, which is a fork of the one that made the producer."""
        raise _errors.ForkedHandleError("this producer was made before a fork")

    def _send_again(self, send, timeout):
        """The broker has stopped, nothing was stored: send(timeout) once it is back, or raise BrokerClosed."""
        raise NotImplementedError

    # -- routes

    cdef TopicRoute route(self, sb_region *r, str topic):
        cdef TopicRoute route = <TopicRoute>self.routes.get(topic)
        if route is not None and route.generation == sb_load(&sb_marks(r).topic_generation):
            return route
        route = find_route(r, topic)
        if route is None:
            self._missing_topic(topic)
            route = find_route(r, topic)
            if route is None:
                raise _errors.TopicNotExist(f"topic {topic!r} was deleted while it was created")
        if not route.permission & 2:
            raise _errors.NoPermission(
                f"topic {topic!r} has permission {_naming.permission_name(route.permission)}: nobody may send to it")
        self.routes[topic] = route
        return route

    # -- filling

    cdef int fill(self, Client client, sb_item *item, Message message, int64_t born_ns) except -1:
        """Parts and CRC of one message: everything that needs no lock (R12)."""
        cdef sb_region *r = &client.region.r
        cdef Py_ssize_t length = 0
        cdef uint32_t crc = 0
        memset(item, 0, sizeof(sb_item))
        item.body = <const uint8_t *>PyBytes_AS_STRING(message.body)
        item.body_bytes = <uint32_t>min(len(message.body), 0xffffffff)
        if item.body_bytes > r.limits.max_message_bytes:
            raise _errors.MessageTooLarge(
                f"the body has {len(message.body)} bytes, max_message_bytes is {r.limits.max_message_bytes}. That can be at "
                f"most a quarter of ring_bytes ({r.ring_bytes}) and of segment_bytes ({r.segment_bytes}), header included: "
                "raise these with it, or split the message")
        if message.tags is not None and len(message.tags):
            item.tags = <const uint8_t *>PyUnicode_AsUTF8AndSize(message.tags, &length)
            item.tags_bytes = <uint32_t>length
            item.tag_hash = sb_tag_hash(item.tags, item.tags_bytes)
            crc = sb_crc32c(crc, item.tags, item.tags_bytes)
        if message.keys is not None and len(message.keys):
            item.keys = <const uint8_t *>PyUnicode_AsUTF8AndSize(message.keys, &length)
            item.keys_bytes = <uint32_t>length
            crc = sb_crc32c(crc, item.keys, item.keys_bytes)
        if message.encoded_properties is not None:
            item.properties = <const uint8_t *>PyBytes_AS_STRING(message.encoded_properties)
            item.properties_bytes = <uint32_t>len(message.encoded_properties)
            crc = sb_crc32c(crc, item.properties, item.properties_bytes)
        item.payload_crc = sb_crc32c(crc, item.body, item.body_bytes)
        item.kind = SB_KIND_MESSAGE
        if not message.wait_store_ok:
            item.flags = SB_FLAG_WAIT_STORE_NOT_OK
        item.born_ns = born_ns
        item.incarnation = client.incarnation
        return 0

    cdef int append(self, Client client, sb_item *items, uint32_t count, uint32_t options, int64_t deadline_ns,
                    uint64_t *end) except -100:
        """SB_OK, SB_DUPLICATE or SB_GONE (the route is old); raises for the rest, with nothing stored. Wakes who sleeps for it."""
        cdef sb_region *r = &client.region.r
        cdef uint64_t needed = 0, bytes_in_all = 0
        cdef uint32_t slot = client.slot, waiter, i
        cdef int code
        for i in range(count):
            bytes_in_all += items[i].body_bytes
        if bytes_in_all < LARGE_BYTES:
            code = sb_append(r, slot, items, count, NULL, 0, options, 0, end, &needed)
        else:
            client.enter()
            with nogil:
                code = sb_append(r, slot, items, count, NULL, 0, options, 0, end, &needed)
            client.exit()
        if code == SB_LOCKED or code == SB_NO_SPACE or code == SB_NO_INDEX or code == SB_NO_CAPACITY:
            if deadline_ns == 0:
                deadline_ns = sb_now_ns() + self.send_timeout_ns
            waiter = client.take_waiter()
            client.enter()
            try:
                code = SB_INTERRUPTED
                while code == SB_INTERRUPTED:
                    with nogil:
                        code = sb_append_wait(r, slot, items, count, NULL, 0, options, deadline_ns, end, &waiter)
                    if code == SB_INTERRUPTED:
                        check_signals()
            finally:
                client.give_waiter(waiter)
                client.exit()
        if code == SB_OK:
            sb_append_wake(r, items, count)
            sb_add(&sb_client_at(r, slot).sends, count)
            if sb_load(&sb_marks(r).fenced):  # SYNC: fenced (R13)
                raise code_error(r, SB_FENCED, "sending")
        elif code != SB_DUPLICATE and code != SB_GONE:
            raise code_error(r, code, "sending")
        return code

    # -- sending

    cdef uint32_t queue_for(self, TopicRoute route, Message message, selector, argument, sharding_key, queue_id) except? 0xffffffff:
        cdef uint32_t queue
        if selector is None and sharding_key is None and queue_id is None:
            queue = self.next_queue % route.count
            self.next_queue += 1
            return queue
        chosen = self._choose_queue(message, route.count, selector, argument, sharding_key, queue_id)
        if not isinstance(chosen, int) or not 0 <= chosen < route.count:
            raise _errors.QueueNotExist(f"topic {message.topic!r} has queues 0 to {route.count - 1}, not {chosen!r}")
        return chosen

    cdef SendResult store(self, SendResult result, Message message, timeout, selector, argument, sharding_key, queue_id, dedup_key):
        """Append; the status is still open. ``result`` carries the id from try to try, so that no try can make a second copy."""
        cdef Client client = self.ready()
        cdef sb_region *r = &client.region.r
        cdef TopicRoute route
        cdef sb_item item
        cdef uint32_t queue, options = 0
        cdef uint64_t end = 0
        cdef int64_t deadline = 0 if timeout is None else deadline_of(timeout)
        cdef int code = SB_GONE
        self.fill(client, &item, message, sb_realtime_ns())
        if message.delayed:
            self.delay(r, &item, message, result)
        if result.client is not None:
            options = SB_APPEND_RESEND
        elif dedup_key is None:
            client.sequence += 1
            result.incarnation = client.incarnation
            result.sequence = client.sequence
        else:
            result.incarnation, result.sequence = self._dedup_id(message, dedup_key)
        if dedup_key is not None:
            item.flags |= SB_FLAG_DEDUP
            options |= SB_APPEND_DEDUP
        result.client = client
        item.incarnation = result.incarnation
        item.sequence = result.sequence
        while code == SB_GONE:
            route = self.route(r, message.topic)
            queue = self.queue_for(route, message, selector, argument, sharding_key, queue_id)
            client.check()  # what ran since may have closed it
            item.topic_id = route.topic_id
            item.queue_id = <uint16_t>queue
            item.queue_slot = SB_NIL if result.due_ns else route.slots[queue]
            code = self.append(client, &item, 1, options, deadline, &end)
        result.status = SEND_OK
        result.topic = message.topic
        result.queue_id = queue
        result.queue_offset = 0 if result.due_ns else item.queue_offset
        result.position = item.position
        result.end_position = end
        if code == SB_DUPLICATE:
            self._earlier(result)
        return result

    cdef int delay(self, sb_region *r, sb_item *item, Message message, SendResult result) except -1:
        """Make it a timer, unless it is due at once."""
        cdef uint64_t size = (SB_RECORD_HEADER + item.tags_bytes + item.keys_bytes + item.properties_bytes
                              + <uint64_t>item.body_bytes)
        result.due_ns = self._due_ns(message, item.born_ns)
        if result.due_ns == 0:
            return 0
        if sb_padded(size) > min(r.segment_bytes, r.ring_bytes) // 4:
            raise code_error(r, SB_TOO_LARGE, "sending a delayed message")
        item.kind = SB_KIND_TIMER
        item.queue_offset = result.due_ns
        result.recaller = self._recall
        return 0

    def _earlier(self, SendResult result):
        """Fill in the place of the earlier send with this id: from the ring, else from the log."""
        raw = result.client.region.read_raw(result.position)
        if raw is None:
            raw = self._read_log(result.position)
        record = decode_record(raw, result.position)
        result.duplicate = True
        result.queue_id = record.queue_id
        result.due_ns = record.queue_offset if record.kind == SB_KIND_TIMER else 0
        result.queue_offset = 0 if result.due_ns else record.queue_offset
        result.recaller = self._recall
        result.end_position = result.position + record.padded

    def _read_log(self, uint64_t position):
        raise NotImplementedError

    cdef SendResult send_once(self, SendResult result, Message message, timeout, selector, argument, sharding_key,
                              queue_id, dedup_key):
        self.store(result, message, timeout, selector, argument, sharding_key, queue_id, dedup_key)
        if message.wait_store_ok:
            result.status = durability(result.client, result.end_position, sb_now_ns() + self.sync_flush_timeout_ns)
        return result

    def send(self, message, timeout=None, *, selector=None, argument=None, sharding_key=None, queue_id=None,
             dedup_key=None):
        cdef SendResult result = SendResult.__new__(SendResult)
        require_message(message, "message")
        try:
            return self.send_once(result, <Message>message, timeout, selector, argument, sharding_key, queue_id, dedup_key)
        except _errors.BrokerClosed:  # raised by store alone: nothing is stored
            return self._resend(result, message, timeout, selector, argument, sharding_key, queue_id, dedup_key)

    def _resend(self, SendResult result, message, timeout, selector, argument, sharding_key, queue_id, dedup_key):
        """Apart from send, whose every call would else pay for the closure."""
        return self._send_again(
            lambda left: self.send_once(result, message, left, selector, argument, sharding_key, queue_id, dedup_key), timeout)

    def send_oneway(self, message, *, selector=None, argument=None, sharding_key=None, queue_id=None):
        cdef SendResult result = SendResult.__new__(SendResult)
        require_message(message, "message")
        try:
            self.store(result, <Message>message, None, selector, argument, sharding_key, queue_id, None)
        except _errors.BrokerClosed:
            self._store_again(result, message, None, selector, argument, sharding_key, queue_id, None)

    def _store_only(self, Message message not None, timeout, selector, argument, sharding_key, queue_id, dedup_key):
        cdef SendResult result = SendResult.__new__(SendResult)
        try:
            return self.store(result, message, timeout, selector, argument, sharding_key, queue_id, dedup_key)
        except _errors.BrokerClosed:
            return self._store_again(result, message, timeout, selector, argument, sharding_key, queue_id, dedup_key)

    def _store_again(self, SendResult result, message, timeout, selector, argument, sharding_key, queue_id, dedup_key):
        return self._send_again(
            lambda left: self.store(result, message, left, selector, argument, sharding_key, queue_id, dedup_key), timeout)

    @staticmethod
    def _settle(result, int64_t deadline_ns):
        """The status of a stored send, waited for until ``deadline_ns`` of CLOCK_MONOTONIC. Keeps no producer alive."""
        cdef BatchResult batch
        cdef SendResult single
        if type(result) is BatchResult:
            batch = result
            batch.status = durability(batch.client, batch.end_position, deadline_ns)
        else:
            single = result
            single.status = durability(single.client, single.end_position, deadline_ns)
        return result

    def send_batch(self, messages, timeout=None, *, selector=None, argument=None, sharding_key=None, queue_id=None):
        cdef list batch = listed(messages, "a list of Message, or another iterable")  # nobody changes it while we read
        try:
            return self.send_batch_once(batch, timeout, selector, argument, sharding_key, queue_id)
        except _errors.BrokerClosed:
            return self._resend_batch(batch, timeout, selector, argument, sharding_key, queue_id)

    def _resend_batch(self, list batch, timeout, selector, argument, sharding_key, queue_id):
        return self._send_again(
            lambda left: self.send_batch_once(batch, left, selector, argument, sharding_key, queue_id), timeout)

    cdef BatchResult send_batch_once(self, list batch, timeout, selector, argument, sharding_key, queue_id):
        cdef Client client = self.ready()
        cdef uint32_t count = <uint32_t>min(len(batch), SB_GROUP_RECORDS_MAX + 1), i
        cdef Message first, message
        cdef TopicRoute route
        cdef sb_item *items
        cdef BatchResult result = BatchResult.__new__(BatchResult)
        cdef int64_t deadline = 0 if timeout is None else deadline_of(timeout), born_ns = sb_realtime_ns()
        cdef int code = SB_GONE
        if count == 0:
            raise _errors.MessageIllegal("an empty batch")
        if count > SB_GROUP_RECORDS_MAX:
            raise _errors.MessageTooLarge(f"{len(batch)} messages in one batch, at most {SB_GROUP_RECORDS_MAX}")
        require_message(batch[0], "messages[0]")
        first = <Message>batch[0]
        result.positions = <uint64_t *>malloc(count * sizeof(uint64_t))
        items = self.batch_items
        self.batch_items = NULL
        if items == NULL:
            items = <sb_item *>malloc(SB_GROUP_RECORDS_MAX * sizeof(sb_item))
        try:
            if items == NULL or result.positions == NULL:
                raise MemoryError
            for i in range(count):
                if not isinstance(batch[i], Message):
                    raise _rules.no_message(f"messages[{i}]", batch[i])
                message = <Message>batch[i]
                if message.topic is not first.topic and message.topic != first.topic:
                    raise _errors.MessageIllegal(
                        f"a batch has one topic: {first.topic!r} and {message.topic!r} were given (RocketMQ's rule)")
                if message.wait_store_ok != first.wait_store_ok:
                    raise _errors.MessageIllegal("a batch has one wait_store_ok (RocketMQ's rule)")
                if message.delayed:
                    raise _errors.MessageIllegal("a delayed message cannot be sent in a batch (RocketMQ's rule): send it alone")
                self.fill(client, &items[i], message, born_ns)
                items[i].sequence = client.sequence + 1 + i
            client.sequence += count
            while code == SB_GONE:
                route = self.route(&client.region.r, first.topic)
                result.queue_id = self.queue_for(route, first, selector, argument, sharding_key, queue_id)
                client.check()  # what ran since may have closed it
                for i in range(count):
                    items[i].topic_id = route.topic_id
                    items[i].queue_id = <uint16_t>result.queue_id
                    items[i].queue_slot = route.slots[result.queue_id]
                code = self.append(client, items, count, 0, deadline, &result.end_position)
            for i in range(count):
                result.positions[i] = items[i].position
            result.first_offset = items[0].queue_offset
            result.first_sequence = items[0].sequence
        finally:
            if self.batch_items == NULL:
                self.batch_items = items
            else:
                free(items)
        result.count = count
        result.topic = first.topic
        result.incarnation = client.incarnation
        result.client = client
        result.status = SEND_OK
        if first.wait_store_ok:
            result.status = durability(client, result.end_position, sb_now_ns() + self.sync_flush_timeout_ns)
        return result
