# consumer.pxi: ConsumerCore, the receive and ack path. With the GIL held nothing sleeps; whoever waits drops it.

from libc.stdint cimport int32_t
from posix.unistd cimport usleep

cdef extern from "membership.h" nogil:
    int sb_group_join(sb_region *r, uint32_t group, uint32_t slot, uint64_t hash, const char *text, int self_counts,
                      int64_t deadline_ns)
    void sb_group_leave(sb_region *r, uint32_t group, uint32_t slot)

cdef enum:
    TOPICS_MAX = 64       # in one subscription
    RUN_MAX = 128         # positions asked for at a time: an index block
    READ_AHEAD_MIN = 64   # messages read at a time from the files

cdef int64_t SPIN_NS = 50_000       # without the GIL, between two looks at signals and the clock
cdef int64_t STALLED_NS = 2_000_000 # until a message that only the files have is asked for again
cdef double INVISIBLE_MAX = 12 * 3600.0

# One look for messages: how far they are visible, and from when until when what it finds is claimed.
ctypedef struct Look:
    uint64_t limit
    uint32_t now_ms
    uint32_t deadline_ms

# (id of the client, group slot) -> consumers of this process in that group; guarded by the GIL.
cdef dict memberships = {}


cdef uint64_t visible_limit(sb_region *r) noexcept:
    """Messages before it may be delivered. Loaded before anything it limits (R8)."""
    cdef sb_watermarks *m = sb_marks(r)
    cdef uint64_t after = sb_load(&m.visible_after)
    if after == SB_VISIBLE_APPEND:
        return sb_load(&m.tail)
    return sb_load(&m.flushed) if after == SB_VISIBLE_FLUSH else sb_load(&m.replicated)


cdef class ConsumerCore:
    """Receives and acknowledges. Subclass: shmbroker.consumer.SimpleConsumer, which reads files and reports losses."""
    cdef readonly Client client
    cdef readonly str group
    cdef public bint spin
    cdef readonly uint64_t lost  # messages that retention took before this consumer could read them
    cdef dict filters            # topic -> TagFilter or None
    cdef bint from_last
    cdef list sources
    cdef uint32_t group_slot
    cdef uint64_t generation     # of the definitions that `sources` was made from
    cdef uint32_t turn
    cdef bint shut, joined, stalled

    def __init__(self, Client client not None, str group, *, bint spin=False, bint from_last=False):
        self.client = client
        self.group = group
        self.spin = spin
        self.from_last = from_last
        self.filters = {}
        self.sources = []

    # -- for the subclass

    def _read_behind(self, uint32_t topic_id, uint32_t queue_id, uint64_t offset, uint32_t count):
        """[(offset, record or None if retention took it)] at or after ``offset``, from the files; [] if not there yet."""
        raise NotImplementedError

    def _read_at(self, uint64_t position):
        """The record at a position that the ring has passed, from the files; None if retention took it."""
        raise NotImplementedError

    def _report_lost(self, str topic, uint32_t queue_id, uint64_t first, uint64_t count):
        raise NotImplementedError

    def _reattach(self):
        """The broker has stopped: bind to its successor, or raise BrokerClosed."""
        raise NotImplementedError

    def _bind(self, Client client not None, filters, bytes text not None, uint64_t text_hash):
        """Become a member of the group: False if a live member subscribes differently. filters: topic -> tags or None."""
        cdef sb_region *r = client.check()
        cdef bytes name = self.group.encode()
        cdef const char *c_text = text
        cdef uint32_t slot = 0, group = 0
        cdef int code, self_counts
        if len(filters) > TOPICS_MAX:
            raise _errors.BadRequest(f"{len(filters)} topics in one subscription, at most {TOPICS_MAX}")
        self.filters = {topic: None if tags is None else TagFilter(tags) for topic, tags in filters.items()}
        self._leave()
        if sb_group_find(r, name, &group) != SB_OK:
            raise _errors.GroupNotExist(f"group {self.group!r} does not exist")
        slot = client.slot
        self_counts = (id(client), group) in memberships
        with nogil:
            code = sb_group_join(r, group, slot, text_hash, c_text, self_counts, sb_now_ns() + DEFINE_TIMEOUT_NS)
        if code == SB_EXISTS:
            return False
        if code != SB_OK:
            raise code_error(r, code, f"joining group {self.group!r}")
        self.client = client
        self.group_slot = group
        self.joined = True
        memberships[id(client), group] = memberships.get((id(client), group), 0) + 1
        self.refresh(r)
        return True

    def _leave(self):
        """No longer a member; what this process holds in the group stays its own until acked or expired."""
        if not self.joined:
            return
        self.joined = False
        key = (id(self.client), self.group_slot)
        memberships[key] -= 1
        if memberships[key] == 0:
            del memberships[key]
            if self.client.fork_generation == sb_fork_generation and not self.client.region.closed:
                sb_group_leave(&self.client.region.r, self.group_slot, self.client.slot)

    def _shut(self):
        self.shut = True
        self._leave()

    cdef sb_region *ready(self) except NULL:
        cdef sb_region *r
        if self.shut:
            raise _errors.BrokerClosed("this consumer was closed")
        r = self.client.check()
        if sb_load(&sb_marks(r).state) != SB_STATE_RUNNING:
            raise _errors.BrokerClosed("receiving: the broker is stopping or has stopped")
        if sb_load(&sb_marks(r).topic_generation) != self.generation:
            self.refresh(r)
        return r

    # -- which queues

    cdef int refresh(self, sb_region *r) except -1:
        """Open the claim tables of all queues of the subscribed topics. Queues that stay keep their place."""
        cdef uint64_t generation = sb_load(&sb_marks(r).topic_generation)
        cdef dict known = {}
        cdef list sources = []
        cdef Source source
        cdef TopicRoute route
        cdef uint32_t i
        for source in self.sources:
            if source.client is self.client and source.is_current(r):
                known[source.topic_id, source.queue_id] = source
        for topic, tag_filter in self.filters.items():
            route = find_route(r, topic)
            if route is None:
                continue  # deleted, or not there yet
            if not route.permission & 4:
                raise _errors.NoPermission(f"topic {topic!r} has permission {route.permission}: no read (4)")
            for i in range(route.count):
                source = known.get((route.topic_id, i))
                if source is None:
                    source = self.open_source(r, route, i, tag_filter)
                sources.append(source)
        self.sources = sources
        self.generation = generation
        return 0

    cdef Source open_source(self, sb_region *r, TopicRoute route, uint32_t queue_id, TagFilter tag_filter):
        cdef Source source = Source.__new__(Source)
        cdef sb_queue *queue = sb_queue_at(r, route.slots[queue_id])
        cdef uint64_t base = sb_load(&queue.next_offset) if self.from_last else sb_load(&queue.first_offset)
        cdef uint32_t group = self.group_slot, slot = route.slots[queue_id], table = 0
        cdef int code, created = 0
        with nogil:
            code = sb_claims_open(r, group, slot, base, sb_now_ns() + DEFINE_TIMEOUT_NS, &table, &created)
        if code == SB_TABLE_FULL:
            raise _errors.LimitReached(
                f"group {self.group!r} in topic {route.name!r}: the broker has room for claim_tables = "
                f"{r.limits.claim_tables} queues, counted once for each group that consumes them")
        if code != SB_OK:
            raise code_error(r, code, f"subscribing group {self.group!r} to {route.name!r}")
        source.client = self.client
        source.group = self.group
        source.topic = route.name
        source.table = table
        source.group_slot = group
        source.queue_slot = slot
        source.topic_slot = queue.topic_slot
        source.group_id = sb_group_at(r, group).group_id
        source.topic_id = route.topic_id
        source.queue_id = queue_id
        source.cursor.block = SB_NIL
        source.filter = tag_filter
        source.ahead = {}
        return source

    # -- one message

    cdef int claim(self, sb_region *r, Source source, uint64_t offset, Look *look, sb_claim *claim) noexcept:
        """SB_OK, SB_LOST, or SB_NO_SPACE: window and overflow table are full of unacked claims (status names whose)."""
        cdef uint32_t slot = self.client.slot
        cdef int code = sb_claim_take(r, source.table, offset, slot, look.now_ms, look.deadline_ms, claim)
        if code == SB_NO_SPACE:
            if sb_claim_overflow(r, source.table, offset) == SB_OK:
                code = sb_claim_take(r, source.table, offset, slot, look.now_ms, look.deadline_ms, claim)
            else:
                sb_add(&sb_claims_at(r, source.table).refused, 1)
        return code

    cdef int skip(self, sb_region *r, Source source, uint64_t offset) noexcept:
        cdef int code = sb_claim_skip(r, source.table, offset)
        if code == SB_NO_SPACE:
            sb_claim_base(r, source.table)
            if sb_claim_overflow(r, source.table, offset) == SB_OK:
                code = sb_claim_skip(r, source.table, offset)
        return code

    cdef int accept(self, sb_region *r, Source source, bytes record, sb_claim *claim, list out) except -1:
        """A claimed record becomes a received message, unless the tag only had the same hash."""
        cdef ReceivedMessage message
        if source.filter is not None and not source.filter.matches(record):
            sb_claim_ack(r, source.table, claim.offset, claim.word, self.client.slot)
            return 0
        message = ReceivedMessage.__new__(ReceivedMessage)
        message.record = record
        message.source = source
        message.receipt = claim.word
        message.fork_generation = sb_fork_generation
        out.append(message)
        return 0

    cdef int lose(self, sb_region *r, Source source, sb_claim *claim) except -1:
        """Claimed, but the log no longer has it: counted and said, never silent."""
        sb_claim_ack(r, source.table, claim.offset, claim.word, self.client.slot)
        self.lost += 1
        self._report_lost(source.topic, source.queue_id, claim.offset, 1)
        return 0

    cdef int deliver(self, sb_region *r, Source source, uint64_t offset, uint64_t position, Look *look, list out) except -100:
        """Filter, claim, copy the message that the index places at ``position``. SB_NO_SPACE: stop."""
        cdef sb_record header
        cdef sb_claim claim
        cdef uint32_t size = 0
        cdef bytes record = None
        cdef int code = sb_ring_peek(r, position, &header)
        if code == SB_OK and source.filter is not None and not source.filter.may_match(header.tag_hash):
            return self.skip(r, source, offset)
        cdef int claimed = self.claim(r, source, offset, look, &claim)
        if claimed != SB_OK:
            return claimed
        if code == SB_OK:
            record = PyBytes_FromStringAndSize(NULL, header.size)
            code = sb_ring_read(r, position, <uint8_t *>PyBytes_AS_STRING(record), header.size, &size)
        if code != SB_OK:
            record = self._read_at(position)
            if record is None:
                self.lose(r, source, &claim)
                return SB_OK
        if not self.is_message(source, record, offset):
            raise _errors.CorruptLog(
                f"the record at position {position} is not message {offset} of queue {source.queue_id} of topic {source.topic!r}",
                position=position)
        self.accept(r, source, record, &claim, out)
        return SB_OK

    cdef bint is_message(self, Source source, bytes record, uint64_t offset):
        cdef const sb_record *h = <const sb_record *>PyBytes_AS_STRING(record)
        return (h.kind == SB_KIND_MESSAGE and h.topic_id == source.topic_id and h.queue_id == source.queue_id
                and h.queue_offset == offset)

    # -- one queue

    cdef int collect_from(self, sb_region *r, Source source, Look *look, Py_ssize_t room, list out) except -1:
        """Released messages, oldest first, then fresh ones, until ``out`` has ``room``."""
        cdef uint64_t offsets[RUN_MAX]
        cdef uint64_t offset
        cdef uint32_t found, i, taken = 0
        cdef Py_ssize_t before = len(out)
        cdef int code
        found = sb_claim_released(r, source.table, look.now_ms, offsets, <uint32_t>min(room - len(out), RUN_MAX))
        for i in range(found):
            self.collect_run(r, source, offsets[i], look, len(out) + 1, out)
        if len(out) < room:
            offset = sb_claim_next(r, source.table)
            self.collect_run(r, source, offset, look, room, out)
        taken = <uint32_t>(len(out) - before)
        if taken:
            sb_add(&sb_claims_at(r, source.table).delivered, taken)
            sb_add(&sb_client_at(r, self.client.slot).receives, taken)
        return 0

    cdef int collect_run(self, sb_region *r, Source source, uint64_t offset, Look *look, Py_ssize_t room,
                         list out) except -1:
        """Consecutive messages from ``offset`` on."""
        cdef uint64_t positions[RUN_MAX]
        cdef uint64_t start = offset
        cdef uint32_t found = 0, i
        cdef int code = SB_OK
        cdef Py_ssize_t want
        cdef bint alone = offset < sb_claim_next(r, source.table)  # a released one: only this
        while len(out) < room and code != SB_NO_SPACE:
            want = 1 if alone else RUN_MAX if source.filter is not None else min(room - len(out), RUN_MAX)
            code = sb_index_lookup(r, source.queue_slot, offset, look.limit, <uint32_t>want, &source.cursor, positions, &found)
            if code == SB_BEHIND:
                code = self.collect_behind(r, source, &offset, look, 1 if alone else want, room, out)
            elif code == SB_OK:
                for i in range(found):
                    code = self.deliver(r, source, offset, positions[i], look, out)
                    if code == SB_NO_SPACE:
                        break
                    offset += 1
                    if len(out) >= room:
                        break
            elif code == SB_AGAIN:
                continue
            else:
                break
            if alone:
                break
        if offset > start and not alone:
            sb_claim_advance(r, source.table, offset)
        if source.filter is not None:
            sb_claim_base(r, source.table)
        return 0

    cdef int collect_behind(self, sb_region *r, Source source, uint64_t *offset, Look *look, Py_ssize_t want,
                            Py_ssize_t room, list out) except -100:
        """The same from the files, for offsets that have left the index. Moves *offset on. SB_END: nothing there."""
        cdef uint64_t first = sb_load(&sb_queue_at(r, source.queue_slot).first_offset), end, lost_from = offset[0]
        cdef uint64_t lost = 0
        cdef sb_claim claim
        cdef bytes record
        cdef int code = SB_OK
        while offset[0] < first and code != SB_NO_SPACE:  # deleted by the operator's order before the group had them
            code = self.skip(r, source, offset[0])
            if code != SB_NO_SPACE:
                lost += code == SB_OK
                offset[0] += 1
        if lost:
            self.lost += lost
            self._report_lost(source.topic, source.queue_id, lost_from, lost)
            sb_claim_base(r, source.table)
        if code == SB_NO_SPACE or offset[0] != lost_from:
            return code if code == SB_NO_SPACE else SB_OK
        if offset[0] not in source.ahead:
            source.ahead = dict(self._read_behind(source.topic_id, source.queue_id, offset[0], max(want, READ_AHEAD_MIN)))
            if not source.ahead:
                self.stalled = True
                return SB_END
        end = max(source.ahead) + 1
        while offset[0] < end and len(out) < room:
            if offset[0] not in source.ahead:  # an offset that no message has (R4)
                code = self.skip(r, source, offset[0])
            else:
                code = self.claim(r, source, offset[0], look, &claim)
                if code != SB_NO_SPACE:
                    record = source.ahead.pop(offset[0])
                if code == SB_OK and record is None:
                    self.lose(r, source, &claim)
                elif code == SB_OK:
                    self.accept(r, source, record, &claim, out)
            if code == SB_NO_SPACE:
                return code
            offset[0] += 1
            want -= 1
            if want == 0:
                break
        return SB_OK

    # -- receive

    cdef list collect(self, sb_region *r, Py_ssize_t room, uint32_t invisible_ms):
        cdef list out = []
        cdef list sources = self.sources
        cdef Py_ssize_t count = len(sources), i
        cdef Look look
        look.limit = visible_limit(r)  # SYNC: tail
        look.now_ms = <uint32_t>(sb_now_ns() // 1_000_000)
        look.deadline_ms = sb_claim_deadline_after(look.now_ms, invisible_ms)
        self.turn += 1
        self.stalled = False
        for i in range(count):
            self.collect_from(r, <Source>sources[(self.turn + i) % count], &look, room, out)
            if len(out) >= room:
                break
        return out

    def receive(self, Py_ssize_t max_messages=1, double wait=0.0, double invisible=60.0):
        cdef int64_t deadline_ns
        cdef list out
        if max_messages < 1 or not wait >= 0.0 or not 0.001 <= invisible <= INVISIBLE_MAX:
            raise _errors.BadRequest(
                f"receive(max_messages={max_messages}, wait={wait}, invisible={invisible}): at least one message, "
                "no negative wait, and an invisible time from 0.001 to 43200 seconds")
        try:
            out = self.collect(self.ready(), max_messages, <uint32_t>(invisible * 1000.0))
            if out or wait == 0.0:
                return out
            deadline_ns = sb_now_ns() + <int64_t>(min(wait, 1e9) * 1e9)
            return self.wait_for(deadline_ns, max_messages, <uint32_t>(invisible * 1000.0))
        except _errors.BrokerClosed:
            if self.shut:
                raise
        self._reattach()
        return self.collect(self.ready(), max_messages, <uint32_t>(invisible * 1000.0))

    cdef list wait_for(self, int64_t deadline_ns, Py_ssize_t room, uint32_t invisible_ms):
        cdef sb_region *r = self.ready()
        cdef uint32_t waiter = self.client.take_waiter()
        cdef uint32_t topics[TOPICS_MAX]
        cdef uint32_t count
        cdef int64_t until
        cdef int code = SB_OK
        cdef bint slept = False
        cdef list out
        try:
            while True:
                r = self.ready()
                if self.spin:
                    out = self.collect(r, room, invisible_ms)
                    if out or sb_now_ns() >= deadline_ns:
                        return out
                    self.poll(r, min(deadline_ns, sb_now_ns() + SPIN_NS))
                    check_signals()
                    continue
                count = self.topic_slots(topics)
                sb_wait_message_begin(r, waiter, self.group_slot, topics, count)
                try:  # once more, now that whoever appends sees us
                    out = self.collect(r, room, invisible_ms)
                    until = min(deadline_ns, self.next_deadline(r))
                    if not out and sb_now_ns() < deadline_ns:
                        with nogil:
                            code = sb_wait_message_sleep(r, waiter, until)
                        slept = True
                finally:
                    sb_wait_message_end(r, waiter, topics, count)
                if out and slept:
                    self.wake_next(r)
                if out or sb_now_ns() >= deadline_ns:
                    return out
                if code == SB_INTERRUPTED:
                    check_signals()
        finally:
            self.client.give_waiter(waiter)

    cdef uint32_t topic_slots(self, uint32_t *slots) noexcept:
        cdef uint32_t count = 0
        cdef Source source
        for source in self.sources:
            if (count == 0 or slots[count - 1] != source.topic_slot) and count < TOPICS_MAX:
                slots[count] = source.topic_slot
                count += 1
        return count

    cdef int64_t next_deadline(self, sb_region *r) noexcept:
        """When the next claim of another member expires: exact without the janitor's help."""
        cdef int64_t now = sb_now_ns(), best = NO_DEADLINE, left
        cdef uint64_t hint
        cdef Source source
        if self.stalled:
            best = now + STALLED_NS
        for source in self.sources:
            hint = sb_load(&sb_claims_at(r, source.table).deadline_ms)
            if hint:
                left = <int32_t>(<uint32_t>hint - <uint32_t>(now // 1_000_000))
                best = min(best, now + 1_000_000 * max(1, left))
        return best

    cdef int wake_next(self, sb_region *r) except -1:
        """We were woken, and there is more than we took: pass the wake-up on (R6)."""
        cdef uint32_t now_ms = <uint32_t>(sb_now_ns() // 1_000_000)
        cdef Source source
        for source in self.sources:
            if sb_claims_claimable(r, source.table, now_ms):
                sb_wake_group(r, source.topic_slot, self.group_slot)
                return 0
        return 0

    cdef int poll(self, sb_region *r, int64_t until) except -1:
        """Burn a core until something looks claimable."""
        cdef uint32_t tables[256]
        cdef uint32_t count = 0, i
        cdef bint found = False
        cdef Source source
        for source in self.sources:
            if count < 256:
                tables[count] = source.table
                count += 1
        with nogil:
            while not found and sb_now_ns() < until:
                for i in range(count):
                    if sb_claims_claimable(r, tables[i], <uint32_t>(sb_now_ns() // 1_000_000)):
                        found = True
                        break
        return 0

    # -- ack

    cdef int decide(self, sb_region *r, ReceivedMessage message, bint renew, uint32_t deadline_ms) except -100:
        """Ack or renew by receipt. SB_OK or SB_GONE."""
        cdef const sb_record *h = message.header()
        cdef Source source = message.source
        cdef sb_claim renewed
        cdef int code = SB_AGAIN, tries = 0
        if source.client is not self.client or not source.is_current(r):
            return SB_GONE
        renewed.word = 0
        while code == SB_AGAIN:
            if renew:
                code = sb_claim_renew(r, source.table, h.queue_offset, message.receipt, self.client.slot, deadline_ms, &renewed)
            else:
                code = sb_claim_ack(r, source.table, h.queue_offset, message.receipt, self.client.slot)
            if code == SB_AGAIN:  # an append that decides about this claim was stopped in the middle
                tries += 1
                if tries > 1000:
                    raise _errors.BrokerBusy(f"{message!r} is being moved by a process that does not go on. Nothing was changed")
                with nogil:
                    usleep(1000)
        if code == SB_OK and renew:
            message.receipt = renewed.word
        return code

    def ack(self, messages):
        cdef sb_region *r = self.client.check()
        cdef ReceivedMessage message
        cdef Source source = None
        cdef uint32_t count = 0
        cdef list expired = None
        if self.shut:
            raise _errors.BrokerClosed("this consumer was closed")
        if type(messages) is ReceivedMessage:
            message = <ReceivedMessage>messages
            source = message.source
            if self.decide(r, message, False, 0) == SB_OK:
                count = 1
            else:
                expired = [message]
        else:
            for entry in messages:
                message = <ReceivedMessage?>entry
                if message.source is not source:
                    self.acked(r, source, count)
                    source = message.source
                    count = 0
                if self.decide(r, message, False, 0) == SB_OK:
                    count += 1
                elif expired is None:
                    expired = [message]
                else:
                    expired.append(message)
        self.acked(r, source, count)
        if sb_load(&sb_marks(r).fenced):  # SYNC: fenced (R13)
            raise code_error(r, SB_FENCED, "acknowledging")
        if expired is not None:
            raise expired_error("ack", expired)

    cdef int acked(self, sb_region *r, Source source, uint32_t count) except -1:
        if count:
            sb_claim_base(r, source.table)
            sb_add(&sb_claims_at(r, source.table).acked, count)
            sb_add(&sb_client_at(r, self.client.slot).acks, count)
        return 0

    def change_invisible_duration(self, ReceivedMessage message not None, double seconds):
        cdef sb_region *r = self.client.check()
        cdef uint32_t deadline_ms = 0
        if self.shut:
            raise _errors.BrokerClosed("this consumer was closed")
        if not 0.0 <= seconds <= INVISIBLE_MAX:
            raise _errors.BadRequest(f"an invisible time of {seconds} seconds: from 0 (available at once) to 43200")
        if seconds > 0.0:
            deadline_ms = sb_claim_deadline_after(<uint32_t>(sb_now_ns() // 1_000_000), <uint32_t>(seconds * 1000.0))
        if self.decide(r, message, True, deadline_ms) != SB_OK:
            raise expired_error("change of the invisible duration", [message])
        if deadline_ms == 0:
            sb_wake_group(r, message.source.topic_slot, message.source.group_slot)


cdef object expired_error(str doing, list messages):
    names = ", ".join(f"{m.topic}[{m.queue_id}] offset {m.queue_offset}" for m in messages[:5])
    more = f" and {len(messages) - 5} more" if len(messages) > 5 else ""
    return _errors.ReceiptExpired(
        f"{doing}: no longer this consumer's (acknowledged already, or the invisible time is over and it was or will be "
        f"delivered again): {names}{more}", messages)
