# pull.pxi: PullCore, a reader that claims nothing: it has a position in each queue, and says how far its group is done.


cdef int64_t PULL_LOOK_NS = 50_000_000  # the janitor mends lost wake-ups for those who claim; these look by themselves


cdef class PullCore(ConsumerCore):
    """Reads assigned queues from positions of its own; see _core.pyi. Subclass: shmbroker.pull_consumer. One thread at a time."""
    cdef set assigned      # (topic, queue_id)
    cdef uint32_t group_id
    cdef bytes store       # whose log the positions are in

    def _assign(self, Client client not None, filters, assigned, bytes store not None):
        """Read these queues from now on. filters: topic -> tags, program or None. Queues of the same ``store`` that stay keep
        their position."""
        cdef sb_region *r = client.check()
        cdef bytes name = self.group.encode()
        cdef uint32_t group = 0
        if sb_group_find(r, name, &group) != SB_OK:
            raise _errors.GroupNotExist(f"group {self.group!r} does not exist")
        self.filters = make_filters(filters)
        self.assigned = set(assigned)
        self.read_through(client)
        if store != self.store:
            self.sources, self.store = [], store
        self.group_slot = group
        self.group_id = sb_group_at(r, group).group_id
        self.refresh(r)

    cdef int refresh(self, sb_region *r) except -1:
        cdef list before = self.sources
        cdef sb_group *g = sb_group_at(r, self.group_slot)
        cdef _Source source
        if sb_load(&g.state) != SB_SLOT_LIVE or g.group_id != self.group_id:
            raise _errors.GroupNotExist(f"group {self.group!r} was deleted")
        ConsumerCore.refresh(self, r)  # the claim tables of all queues of these topics: the group is one that consumes them
        if any(place in self.assigned for place in self.unserved):
            raise self.no_tables(r, [place for place in self.unserved if place in self.assigned])
        places = {((<_Source>old).topic_id, (<_Source>old).queue_id): old for old in before}
        self.sources = [one for one in self.sources if ((<_Source>one).topic, (<_Source>one).queue_id) in self.assigned]
        for source in self.sources:
            old = places.get((source.topic_id, source.queue_id))
            if old is None or ((<_Source>old).client is self.client and old is not source):  # new, or its group was reset
                source.position = sb_load(&sb_claims_at(r, source.table).base)
            elif old is not source:  # another life of the broker, which has perhaps lost the log's last moments
                source.position = min((<_Source>old).position, sb_load(&sb_queue_at(r, source.queue_slot).next_offset))
        return 0

    # -- reading

    def _poll(self, Py_ssize_t room, double wait):
        """The next messages, at most ``room``. Positions are behind them, unless this raises."""
        self.ready()
        cdef list sources = self.sources, positions = [(<_Source>one).position for one in sources]
        try:
            return self.deliver_within(wait, room, 0)
        except _errors.CorruptLog:  # which is passed over, once there is nothing sound before it
            raise
        except BaseException:
            for one, position in zip(sources, positions, strict=True):
                (<_Source>one).position = position
            raise

    cdef bint is_paused(self, sb_region *r) noexcept:
        return sb_group_is_paused(r, self.group_slot)

    cdef int claim(self, sb_region *r, _Source source, uint64_t offset, Look *look) noexcept:
        look.claim.offset = offset
        look.claim.word = 0  # no receipt: whatever is done with it is refused
        return SB_OK

    cdef int skip(self, sb_region *r, _Source source, uint64_t offset) noexcept:
        return SB_OK

    cdef int collect_from(self, sb_region *r, _Source source, Look *look, Py_ssize_t room, list out) except -1:
        return self.collect_run(r, source, source.position, look, room, out)

    cdef int take_over_from(self, sb_region *r, _Source source, Look *look, Py_ssize_t room, list out) except -1:
        return 0

    cdef bint was_claimed(self, sb_region *r, _Source source, uint64_t offset) noexcept:
        return False

    cdef int come_to(self, sb_region *r, _Source source, uint64_t offset, Look *look) except -1:
        source.position = offset
        return 0

    # -- waiting

    cdef uint32_t wait_group(self, uint32_t waiter) noexcept:
        return 0x80000000u | waiter  # a wake-up of one member is not enough: who else reads the queue is none of its business

    cdef int64_t next_deadline(self, sb_region *r) noexcept:
        return min(sb_now_ns() + PULL_LOOK_NS, ConsumerCore.next_deadline(self, r))

    cdef int wake_next(self, sb_region *r) except -1:
        return 0

    # -- positions

    def _positions(self):
        """(topic, queue_id, topic_id, position, committed, first_offset, next_offset) of each assigned queue."""
        cdef sb_region *r = self.ready()
        cdef _Source source
        cdef sb_queue *queue
        cdef list places = []
        for source in self.sources:
            queue = sb_queue_at(r, source.queue_slot)
            places.append((source.topic, source.queue_id, source.topic_id, source.position,
                           sb_load(&sb_claims_at(r, source.table).base), sb_load(&queue.first_offset), sb_load(&queue.next_offset)))
        return places

    def _seek(self, str topic, uint32_t queue_id, uint64_t offset):
        cdef _Source source
        self.ready()
        for source in self.sources:
            if source.topic == topic and source.queue_id == queue_id:
                source.position = offset

    def _commit(self):
        """The group is done with all before the positions. Returns the PROGRESS bodies that say so."""
        cdef sb_region *r = self.ready()
        cdef _Source source
        cdef uint64_t offset, skipped
        cdef int code
        cdef list bodies = []
        for source in self.sources:
            offset = sb_load(&sb_claims_at(r, source.table).base)
            code = SB_OK
            skipped = 0
            while offset < source.position and not stops(code):
                code = _QueueReader.skip(self, r, source, offset)  # what a member has claimed stays its own
                skipped += code == SB_OK
                offset += not stops(code)
            sb_claim_base(r, source.table)
            sb_add(&sb_claims_at(r, source.table).acked, skipped)
            if code == SB_NO_SPACE:
                raise _errors.BrokerBusy(
                    f"committing {source.topic}[{source.queue_id}] offset {source.position}: members of group {self.group!r} hold "
                    f"so many older messages that there is no room for more: done up to {offset}. Commit again later")
            bodies.append(progress_body(r, source.table))
        self.still_recorded(r, "committing")
        return [body for body in bodies if body is not None]
