# reader.pxi: _QueueReader, how messages of a group's queues are found, claimed and copied: from the ring, or from the files
# when the reader lags. Nothing in here sleeps, but for what is buried instead of delivered; the GIL is held throughout.

cdef enum:
    RUN_MAX = 128         # positions asked for at a time: an index block
    ENTRIES_AHEAD = 1024  # consume queue entries read at a time
    WINDOW_OVERLAP = 16 << 10  # bytes of a window that the next one has again: a record that its end cuts in two
    UNREADABLE_MS = 60_000  # so long nobody tries again to prefetch what could not be read

# One look for messages: how far they are visible, and from when until when what it finds is claimed (0: prefetched).
ctypedef struct Look:
    uint64_t limit
    int64_t bytes_left  # once it is used up, no more is claimed
    uint32_t now_ms, deadline_ms
    bint take_over  # what others have prefetched and not begun; else what nobody has
    bint in_order   # nothing behind what cannot be had, or
    bint spoiled    # cannot be read
    sb_claim claim
    bint claimed  # `claim` is held for a message that is not among those found yet

cdef inline const uint8_t *within(bytes window, uint64_t start, uint64_t position, uint64_t least, uint64_t *room) noexcept:
    """The bytes at ``position`` of a window that begins at ``start``, if at least ``least`` of them are in it; else NULL."""
    cdef uint64_t at = position - start
    if window is None or position < start or at + least > <uint64_t>len(window):
        return NULL
    room[0] = <uint64_t>len(window) - at
    return <const uint8_t *>PyBytes_AS_STRING(window) + at

cdef inline bint stops(int code) noexcept:
    """Nothing more can be claimed in this queue now; see ``claim``."""
    return code == SB_NO_SPACE or code == SB_GONE

cdef inline bint blocks(const Look *look, int code) noexcept:
    """Nor what stands behind it in this queue."""
    return stops(code) or (look.in_order and (code == SB_LOST or look.spoiled))

cdef uint64_t visible_limit(sb_region *r) noexcept:
    """Messages before it may be delivered. Loaded before anything it limits (R8)."""
    cdef sb_watermarks *m = sb_marks(r)
    cdef uint64_t after = sb_load(&m.visible_after)
    if after == SB_VISIBLE_APPEND:
        return sb_load(&m.tail)
    return sb_load(&m.flushed) if after == SB_VISIBLE_FLUSH else sb_load(&m.replicated)


cdef class _QueueReader:
    """Base of the consumers. Their Python classes read the files and report losses."""
    cdef readonly Client client
    cdef readonly str group
    cdef readonly uint64_t lost  # messages that retention took before this consumer could read them
    cdef list sources
    cdef uint32_t turn
    cdef bint stalled            # the files did not have yet what the index no longer has
    cdef list spent              # claimed messages that have had all their deliveries; None: none
    cdef object corrupt          # the CorruptLog that a message met; told once there is nothing sound to deliver
    cdef _Ownership ownership    # of a consumer in order; None: the members share every queue
    cdef bytes window            # a piece of the log, from the files, for a consumer that lags behind the ring
    cdef uint64_t window_start
    cdef bytes older             # the one before: its queues do not cross from one to the next all at once
    cdef uint64_t older_start
    # Limits of one look for messages; a push consumer sets its own (push.pxi).
    cdef int64_t bytes_ahead                # bytes of records claimed by it
    cdef Py_ssize_t idle_room               # messages taken over from others who have not begun them
    cdef uint32_t queue_room                # messages of one queue prefetched and not done with,
    cdef int64_t queue_bytes                # and their bytes

    def __init__(self, Client client not None, str group):
        self.client = client
        self.group = group
        self.sources = []
        self.bytes_ahead = self.queue_bytes = INT64_MAX
        self.idle_room = RUN_MAX
        self.queue_room = UINT32_MAX

    cdef void read_through(self, Client client) noexcept:
        """From now on. Its log may be another one: somebody may have emptied the directory."""
        self.client = client
        self.window = self.older = None

    # -- for the subclass in Python

    def _read_entries(self, uint32_t topic_id, uint32_t queue_id, uint64_t offset, uint32_t count):
        """Packed consume queue entries from ``offset`` on, at most ``count``; b"" if there are none yet."""
        raise NotImplementedError

    def _hole_at(self, uint32_t topic_id, uint32_t queue_id, uint64_t offset):
        """The first offset behind a hole, and whether the log knows that no message is missing; None if there is none yet.
        Raises CorruptLog if it is no hole: the log has messages for it."""
        raise NotImplementedError

    def _read_window(self, uint64_t position):
        """A large piece of the log's files, from the record at ``position`` on; b"" if retention took it."""
        raise NotImplementedError

    def _read_at(self, uint64_t position):
        """The record at a position that the ring has passed, from the files; None if retention took it."""
        raise NotImplementedError

    def _report_lost(self, str topic, uint32_t queue_id, uint64_t first, uint64_t count):
        raise NotImplementedError

    def _max_deliveries(self, ReceivedMessage message):
        """How often this message, which was delivered before, may be delivered to the group."""
        raise NotImplementedError

    def _locks_removed(self):
        """Somebody has removed the semaphores that say who owns a queue."""
        raise NotImplementedError

    def _bury(self, list messages):
        """These have had all their deliveries: put them into the group's dead-letter queue; hold what cannot be moved now."""
        raise NotImplementedError

    # -- one message

    cdef int claim(self, sb_region *r, _Source source, uint64_t offset, Look *look) noexcept:
        """SB_OK, SB_LOST, or there is nothing to be had here now. SB_NO_SPACE: window and overflow table are full of unacked
        claims (status names whose); SB_GONE: the topic or the group was deleted."""
        cdef uint32_t table = source.table, slot = self.client.slot
        cdef int code
        if look.take_over:
            code = sb_claim_take_over(r, table, source.life, offset, slot, look.deadline_ms, &look.claim)
        else:
            code = sb_claim_take(r, table, source.life, offset, slot, look.now_ms, look.deadline_ms, &look.claim)
        if code == SB_NO_SPACE and not look.take_over:
            if sb_claim_overflow(r, table, source.life, offset) == SB_OK:
                code = sb_claim_take(r, table, source.life, offset, slot, look.now_ms, look.deadline_ms, &look.claim)
            else:
                sb_add(&sb_claims_at(r, table).refused, 1)
        look.claimed = code == SB_OK
        return code

    cdef int skip(self, sb_region *r, _Source source, uint64_t offset) noexcept:
        cdef int code = sb_claim_skip(r, source.table, source.life, offset)
        if code == SB_NO_SPACE:
            sb_claim_base(r, source.table)
            if sb_claim_overflow(r, source.table, source.life, offset) == SB_OK:
                code = sb_claim_skip(r, source.table, source.life, offset)
        return code

    cdef int accept(self, sb_region *r, _Source source, bytes record, sb_claim *claim, list out) except -1:
        """A claimed record becomes a received message, unless the filter that looked at it before has seen too little."""
        cdef ReceivedMessage message
        if source.filter is not None and not source.filter.matches(record):
            sb_claim_ack(r, source.table, claim.offset, claim.word, self.client.slot)
            return 0
        message = ReceivedMessage.__new__(ReceivedMessage)
        message.record = record
        message.source = source
        message.receipt = claim.word
        message.fork_generation = sb_fork_generation
        if self.is_spent(message):
            self.spent = self.spent or []
            self.spent.append(message)
        else:
            out.append(message)
        return 0

    cdef bint is_spent(self, ReceivedMessage message) except -1:
        """It has had all its deliveries, however they ended: by an answer, a timeout or the death of a process."""
        cdef uint32_t delivered = message.attempts()
        if delivered and not sb_claim_is_prefetched(message.receipt):
            delivered -= 1  # the one that would be made now
        return delivered > 0 and delivered >= <uint32_t>self._max_deliveries(message)

    cdef int lose(self, sb_region *r, _Source source, sb_claim *claim) except -1:
        """Claimed, but the log no longer has it: counted and said, never silent."""
        sb_claim_ack(r, source.table, claim.offset, claim.word, self.client.slot)
        self.lost += 1
        self._report_lost(source.topic, source.queue_id, claim.offset, 1)
        return 0

    cdef int deliver(self, sb_region *r, _Source source, uint64_t offset, uint64_t position, Look *look, list out) except -100:
        """Filter, claim, copy the message that index or consume queue place at ``position``. Answers as ``claim``."""
        cdef sb_record header
        cdef int code, from_files
        cdef uint32_t size
        if look.bytes_left <= 0:
            return SB_NO_SPACE
        code = sb_ring_peek(r, position, &header)
        from_files = code != SB_OK
        if from_files:
            code = self.peek_window(r, position, &header)
        if code == SB_OK and source.filter is not None and not self.may_match(r, source.filter, &header, from_files):
            # Nobody looks at it again: so it must be this message, and whole. Else it is fetched, which says what is wrong.
            if source.is_message(&header, offset) and (not from_files or self.window_record(r, position, header.size) != NULL):
                return self.skip(r, source, offset)
        size = header.size if code == SB_OK else 0
        code = self.claim(r, source, offset, look)
        if code == SB_OK:
            code = self.fetch(r, source, position, size, look, out)
            look.claimed = False
            look.bytes_left -= size
        return code

    cdef bint may_match(self, sb_region *r, _Filter wanted, const sb_record *header, bint from_files) noexcept:
        """What a peek has found, before anything is claimed or copied; in doubt it may."""
        cdef uint64_t room = 0
        cdef const uint8_t *payload = NULL
        if not wanted.looks_inside:
            return wanted.may_match(header, NULL)
        if from_files:
            payload = self.in_window(header.position + SB_RECORD_HEADER, header.size - SB_RECORD_HEADER, &room)
        elif sb_ring_peek_properties(r, header, (<_SqlFilter>wanted).properties) == SB_OK:
            payload = (<_SqlFilter>wanted).properties
        return payload == NULL or wanted.may_match(header, payload)

    cdef int fetch(self, sb_region *r, _Source source, uint64_t position, uint32_t size, Look *look, list out) except -100:
        """Copy a claimed message of ``size`` bytes (0: not known). What cannot be read stays claimed until its invisible
        time is over; its neighbours are delivered. SB_OK or SB_GONE."""
        cdef sb_claim *claim = &look.claim
        cdef bytes record = None
        cdef const uint8_t *data
        cdef int code = SB_END
        if size:
            record = PyBytes_FromStringAndSize(NULL, size)
            code = sb_ring_read(r, position, <uint8_t *>PyBytes_AS_STRING(record), size, &size)
            if code != SB_OK:
                data = self.window_record(r, position, <uint32_t>len(record))
                if data != NULL:
                    memcpy(PyBytes_AS_STRING(record), data, len(record))
                    code = SB_OK
        if code != SB_OK:
            try:
                record = self._read_at(position)  # says what is wrong, if it is not just larger than a window
            except _errors.CorruptLog as error:
                self.corrupt = error
                note_damage(r, position)
                self.set_aside(r, source, look)
                return SB_OK
        if record is not None and source.is_message(<const sb_record *>PyBytes_AS_STRING(record), claim.offset):
            self.accept(r, source, record, claim, out)
        elif source.is_deleted(r):
            return SB_GONE
        elif record is None:
            self.lose(r, source, claim)
        else:
            self.corrupt = _errors.CorruptLog(
                f"the record at position {position} is not message {claim.offset} of queue {source.queue_id} of topic "
                f"{source.topic!r}: `shmbroker log rebuild` compares the consume queue with the log", position=position)
            self.set_aside(r, source, look)
        return SB_OK

    cdef void set_aside(self, sb_region *r, _Source source, Look *look) noexcept:
        """What cannot be read must not be prefetched again and again: it is held for a while."""
        look.spoiled = True
        if look.deadline_ms == 0:
            sb_claim_renew(r, source.table, look.claim.offset, look.claim.word, self.client.slot,
                           sb_claim_deadline_after(look.now_ms, UNREADABLE_MS), &look.claim)

    # What has left the ring is on the disk, and what is there does not change: a window stays true as long as it is kept.

    cdef const uint8_t *in_window(self, uint64_t position, uint64_t least, uint64_t *room) noexcept:
        """The bytes at ``position`` in a window that holds at least ``least`` of them; else NULL."""
        cdef const uint8_t *data = within(self.window, self.window_start, position, least, room)
        return data if data != NULL else within(self.older, self.older_start, position, least, room)

    cdef int peek_window(self, sb_region *r, uint64_t position, sb_record *header) except -100:
        """The header of the record at ``position``, with the whole of it in a window. SB_END: larger than a window."""
        cdef int code = self.peek_windows(r, position, header)
        if code == SB_END:
            self.read_window(self.next_window(r, position))
            code = self.peek_windows(r, position, header)
        if code == SB_END and self.window_start != position:
            self.read_window(position)
            code = self.peek_windows(r, position, header)
        return code

    cdef int peek_windows(self, sb_region *r, uint64_t position, sb_record *header) noexcept:
        cdef uint64_t room = 0
        cdef const uint8_t *data = self.in_window(position, SB_RECORD_HEADER, &room)
        cdef int code = sb_record_check(data, room, position, r.segment_bytes, 0, r.epoch, 0) if data != NULL else SB_END
        if code == SB_OK:
            memcpy(header, data, sizeof(sb_record))
        return code

    cdef int read_window(self, uint64_t position) except -1:
        self.older, self.older_start = self.window, self.window_start
        self.window, self.window_start = self._read_window(position), position
        return 0

    cdef uint64_t next_window(self, sb_region *r, uint64_t position) noexcept:
        """Where to begin: a little before the end of the last one, if ``position`` lies not far behind that. The queues do
        not reach it in the order of their messages, and what is left out would be read again for those that come later."""
        cdef uint64_t size = <uint64_t>len(self.window) if self.window is not None else 0, end = self.window_start + size
        if not end <= position < end + size // 2:
            return position
        return end if end % r.segment_bytes == 0 else end - min(size, WINDOW_OVERLAP)

    cdef const uint8_t *window_record(self, sb_region *r, uint64_t position, uint32_t size) noexcept:
        """A record that ``peek_window`` has seen, checked; NULL: it does not hold, or is not in the window any more."""
        cdef uint64_t room = 0
        cdef const uint8_t *data = self.in_window(position, sb_padded(size), &room)
        if data == NULL or sb_record_check(data, room, position, r.segment_bytes, 0, r.epoch, 1) != SB_OK:
            return NULL
        return data

    # -- one queue

    cdef int collect_from(self, sb_region *r, _Source source, Look *look, Py_ssize_t room, list out) except -1:
        """Released messages, oldest first, then fresh ones, until ``out`` has ``room``."""
        cdef uint64_t offset, offsets[RUN_MAX]
        cdef uint32_t found, i, taken = 0
        cdef Py_ssize_t before = len(out)
        found = sb_claim_released(r, source.table, look.now_ms, offsets, <uint32_t>min(room - len(out), RUN_MAX))
        for i in range(found):
            self.collect_run(r, source, offsets[i], look, len(out) + 1, out)
        if len(out) < room:
            offset = sb_claim_next(r, source.table)
            self.collect_run(r, source, offset, look, room, out)
        taken = <uint32_t>(len(out) - before)
        if taken and look.deadline_ms:  # what is prefetched is not delivered yet
            self.delivered(r, source, taken)
        return 0

    cdef int take_over_from(self, sb_region *r, _Source source, Look *look, Py_ssize_t room, list out) except -1:
        """What other members have prefetched here and not begun, oldest first."""
        cdef uint64_t offsets[RUN_MAX]
        cdef uint32_t found, i
        cdef Py_ssize_t before = len(out)
        found = sb_claim_prefetched(r, source.table, offsets, <uint32_t>min(room - before, RUN_MAX))
        for i in range(found):
            self.collect_run(r, source, offsets[i], look, len(out) + 1, out)
        if len(out) > before and look.deadline_ms:
            self.delivered(r, source, <uint32_t>(len(out) - before))
        return 0

    cdef int collect_in_order(self, sb_region *r, _Source source, Look *look, Py_ssize_t room, list out) except -1:
        """From the oldest that is not acknowledged on, and nothing behind one that somebody has."""
        cdef uint64_t start = 0, offset = 0, tried = 0xffffffffffffffff
        cdef Py_ssize_t before
        cdef int code = SB_OK
        while len(out) < room and code == SB_OK and not look.spoiled:
            code = sb_claim_oldest(r, source.table, source.life, start, look.now_ms, &offset)
            if code == SB_LOST or offset == tried:
                break
            tried = offset
            before = self.taken(out)
            self.collect_run(r, source, offset, look, room if code == SB_END else len(out) + 1, out)
            if self.taken(out) > before:
                start = offset + 1  # it is ours; else it was passed over, or could not be claimed
        return 0

    cdef Py_ssize_t taken(self, list out):
        return len(out) + (len(self.spent) if self.spent is not None else 0)

    cdef int look_in(self, sb_region *r, _Source source, Look *look, Py_ssize_t room, list out) except -1:
        try:
            if look.take_over:
                self.take_over_from(r, source, look, room, out)
            elif look.in_order:
                self.collect_in_order(r, source, look, room, out)
            else:
                self.collect_from(r, source, look, room, out)
        except _errors.CorruptLog as error:  # of one queue's files: the other queues go on
            self.corrupt = error
        except BaseException:  # Ctrl-C, no descriptors left: nobody is told of what was found
            if look.claimed:
                source.give_back(look.claim.offset, look.claim.word)
            give_back(out)
            if self.spent is not None:
                give_back(self.spent)
                self.spent = None
            raise
        return 0

    cdef void delivered(self, sb_region *r, _Source source, uint32_t count) noexcept:
        sb_add(&sb_claims_at(r, source.table).delivered, count)
        sb_add(&sb_client_at(r, self.client.slot).receives, count)

    cdef int collect_run(self, sb_region *r, _Source source, uint64_t offset, Look *look, Py_ssize_t room,
                         list out) except -1:
        """Consecutive messages from ``offset`` on."""
        cdef uint64_t start = offset, first, positions[RUN_MAX]
        cdef uint32_t found = 0, i
        cdef int code = SB_OK
        cdef Py_ssize_t want
        cdef bint alone = self.was_claimed(r, source, offset)  # a released one: only this
        while len(out) < room and not blocks(look, code):
            first = sb_load(&sb_queue_at(r, source.queue_slot).first_offset)
            if offset < first:  # retention has taken them, though the index may still know where they were
                code = self.pass_to(r, source, &offset, first, True)
                if alone:
                    break
                continue
            want = 1 if alone else RUN_MAX if source.filter is not None else min(room - len(out), RUN_MAX)
            code = sb_index_lookup(r, source.queue_slot, offset, look.limit, <uint32_t>want, &source.cursor, positions, &found)
            if code == SB_BEHIND or code == SB_AGAIN:  # left the index, or does not come to rest there: the files know
                code = self.collect_behind(r, source, &offset, look, want, room, out)
                if code == SB_END:
                    break
            elif code == SB_OK:
                for i in range(found):
                    code = self.deliver(r, source, offset, positions[i], look, out)
                    if blocks(look, code):
                        break
                    offset += 1
                    if len(out) >= room:
                        break
            else:
                break
            if alone:
                break
        if offset > start and not alone:
            self.come_to(r, source, offset, look)
        if source.filter is not None:
            sb_claim_base(r, source.table)
        return 0

    cdef bint was_claimed(self, sb_region *r, _Source source, uint64_t offset) noexcept:
        return offset < sb_claim_next(r, source.table)

    cdef int come_to(self, sb_region *r, _Source source, uint64_t offset, Look *look) except -1:
        """Fresh messages were looked at up to there."""
        sb_claim_advance(r, source.table, source.life, offset, look.deadline_ms)
        return 0

    cdef int collect_behind(self, sb_region *r, _Source source, uint64_t *offset, Look *look, Py_ssize_t want,
                            Py_ssize_t room, list out) except -100:
        """The same by the consume queue, for offsets that have left the index. Moves *offset on. SB_END: nothing there."""
        cdef uint64_t first = sb_load(&sb_queue_at(r, source.queue_slot).first_offset)
        cdef uint64_t limit = min(sb_load(&sb_marks(r).dispatched), look.limit), position = 0
        cdef int code = SB_OK
        if offset[0] < first:
            return self.pass_to(r, source, offset, first, True)  # retention has taken them
        while want > 0 and len(out) < room:
            code = self.entry_at(source, offset[0], limit, &position)
            if code == SB_NOT_FOUND:
                code = self.pass_hole(r, source, offset)
                if code != SB_OK:
                    return code
                continue
            if code == SB_OK:
                code = self.deliver(r, source, offset[0], position, look, out)
            if code == SB_END or blocks(look, code):
                return code
            offset[0] += 1
            want -= 1
        return SB_OK

    cdef int entry_at(self, _Source source, uint64_t offset, uint64_t limit, uint64_t *position) except -100:
        """SB_OK | SB_END: not dispatched yet | SB_NOT_FOUND: a hole."""
        cdef const sb_entry *entry
        if source.entries is None or offset < source.entries_first or (
                offset - source.entries_first >= <uint64_t>len(source.entries) // sizeof(sb_entry)):
            source.entries = self._read_entries(source.topic_id, source.queue_id, offset, ENTRIES_AHEAD)
            source.entries_first = offset
        if len(source.entries) == 0:  # the file ends before it
            return SB_NOT_FOUND
        entry = <const sb_entry *>PyBytes_AS_STRING(source.entries) + (offset - source.entries_first)
        position[0] = entry.position
        if entry.size == 0:
            return SB_NOT_FOUND
        if entry.position < limit:
            return SB_OK
        source.entries = None
        self.stalled = True
        return SB_END

    cdef int pass_hole(self, sb_region *r, _Source source, uint64_t *offset) except -100:
        """Offsets that no message has (R4). SB_OK | SB_END: nothing behind them yet | SB_NO_SPACE | SB_GONE."""
        try:
            hole = self._hole_at(source.topic_id, source.queue_id, offset[0])
        except _errors.CorruptLog:
            if source.is_deleted(r):  # its files went first
                return SB_GONE
            raise
        if hole is None or <uint64_t>hole[0] == offset[0]:
            source.entries = None  # it came while we looked, or is still to come
            self.stalled = hole is None
            return SB_END if hole is None else SB_OK
        return self.pass_to(r, source, offset, hole[0], not hole[1])

    cdef int pass_to(self, sb_region *r, _Source source, uint64_t *offset, uint64_t end, bint lost) except -100:
        """Nobody gets the offsets before ``end``. What of them is ``lost``, since the group is not known to have had it, is
        counted and said."""
        cdef uint64_t start = offset[0], skipped = 0
        cdef int code = SB_OK
        while offset[0] < end and not stops(code):
            code = self.skip(r, source, offset[0])
            if not stops(code):
                skipped += code == SB_OK
                offset[0] += 1
        if lost and skipped and not source.is_deleted(r):
            self.lost += skipped
            self._report_lost(source.topic, source.queue_id, start, skipped)
            sb_claim_base(r, source.table)
        return code if stops(code) else SB_OK

    cdef int bury(self, list out) except -1:
        cdef list spent = self.spent
        self.spent = None
        try:
            self._bury(spent)
        except BaseException:
            give_back(out)
            raise
        return 0

    cdef list collect(self, sb_region *r, Py_ssize_t room, uint32_t invisible_ms):
        """Claimed messages, at most ``room``. invisible_ms 0: they are prefetched, not delivered."""
        cdef list out = []
        cdef Look look
        look.claimed = look.take_over = look.in_order = look.spoiled = False
        look.bytes_left = self.bytes_ahead
        look.limit = visible_limit(r)  # SYNC: tail
        look.now_ms = <uint32_t>(sb_now_ns() // 1_000_000)
        look.deadline_ms = sb_claim_deadline_after(look.now_ms, invisible_ms) if invisible_ms else 0
        self.turn += 1
        self.stalled = False
        if self.is_paused(r):
            return out
        if self.ownership is None:
            self.collect_shared(r, room, &look, out)
        else:
            self.collect_owned(r, room, &look, out)
        if self.spent is not None:
            self.bury(out)
        if not out:
            self.nothing_found(r)
        return out

    cdef int collect_shared(self, sb_region *r, Py_ssize_t room, Look *look, list out) except -1:
        cdef list sources = self.sources
        cdef Py_ssize_t count = len(sources), i, most
        cdef _Source source
        for i in range(count):
            if len(out) >= room:
                break
            source = <_Source>sources[(self.turn + i) % count]
            most = min(room, len(out) + <Py_ssize_t>self.queue_room - source.ahead)
            if most <= len(out) or source.ahead_bytes >= self.queue_bytes:
                self.stalled = True  # until some of these are done with: nobody wakes us for that
            else:
                self.look_in(r, source, look, most, out)
        if not out:
            look.take_over = True
            for source in sources:
                if len(out) < self.idle_room:
                    self.look_in(r, source, look, min(room, self.idle_room), out)
        return 0

    cdef int collect_owned(self, sb_region *r, Py_ssize_t room, Look *look, list out) except -1:
        """Messages of one queue that this consumer owns and none of its threads works on. Nobody else is as near to the
        queues: it takes those that are free, gives up those that others ask for, and wakes the owners of what waits."""
        cdef list sources = self.sources
        cdef Py_ssize_t count = len(sources), i
        cdef _Source source
        cdef int code
        look.in_order = True
        self.ownership.serve(r, sources)
        for i in range(count):
            source = <_Source>sources[(self.turn + i) % count]
            code = self.ownership.own(r, source)
            if code == SB_GONE:
                self._locks_removed()
                return 0
            if code == SB_OK and not source.busy:
                look.spoiled = False
                self.look_in(r, source, look, min(room, <Py_ssize_t>self.queue_room), out)
                if out:
                    source.busy = True
                    break
        self.ownership.balance(r, sources)
        if not out:
            self.tell_owners(r, look.limit)
        return 0

    cdef int tell_owners(self, sb_region *r, uint64_t limit) except -1:
        """Whoever appends wakes any member, which is perhaps not the owner of that queue."""
        cdef uint32_t now_ms = <uint32_t>(sb_now_ns() // 1_000_000)
        cdef uint64_t owner
        cdef _Source source
        for source in self.sources:
            owner = sb_load(&sb_claims_at(r, source.table).owner)
            if owner and not source.owned and self.is_ready(r, source, limit, now_ms):
                self.ownership.tell(r, source, owner)
        return 0

    cdef bint is_ready(self, sb_region *r, _Source source, uint64_t limit, uint32_t now_ms) noexcept:
        """Its oldest message can be had by the owner. Exact, or members that wait for others would wake each other for ever."""
        cdef uint64_t offset = 0, position
        cdef uint32_t found = 0
        cdef int code
        if not source.is_current(r) or sb_claim_oldest(r, source.table, source.life, 0, now_ms, &offset) == SB_LOST:
            return False
        code = sb_index_lookup(r, source.queue_slot, offset, limit, 1, &source.cursor, &position, &found)
        return code == SB_OK or code == SB_BEHIND

    cdef bint is_paused(self, sb_region *r) noexcept:
        """Nobody of the group gets anything now."""
        return False

    cdef int nothing_found(self, sb_region *r) except -1:
        """Whatever kept messages from being found is said once nothing else is to be had."""
        if self.corrupt is not None:
            error, self.corrupt = self.corrupt, None
            raise error
        return 0
