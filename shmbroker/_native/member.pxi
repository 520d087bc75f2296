# member.pxi: _Member, a reader as a member of a group: what the group subscribes to, and so which queues it reads.

cdef enum:
    TOPICS_MAX = 64  # in one subscription

# (id of the client, group slot) -> consumers of this process in that group; guarded by the GIL.
cdef dict memberships = {}


cdef dict make_filters(filters):
    """topic -> tags, program or None, as the reader wants it."""
    if len(filters) > TOPICS_MAX:
        raise _errors.BadRequest(f"{len(filters)} topics in one subscription, at most {TOPICS_MAX}")
    return {topic: make_filter(wanted) for topic, wanted in filters.items()}


cdef class _Member(_QueueReader):
    """Base of the consumers that share a group's messages."""
    cdef dict filters         # topic -> _Filter or None
    cdef bint from_first      # where a group begins that has never consumed a topic; else `_start_offsets` says
    cdef bint shut, joined
    cdef uint32_t group_slot
    cdef uint64_t subscription_generation  # of the group's subscription that `filters` was made from
    cdef uint64_t generation  # of the definitions that `sources` was made from
    cdef dict unserved        # (topic, queue_id) -> slot of the queues that got no claim table

    def __init__(self, Client client not None, str group, *, bint from_first=True):
        super().__init__(client, group)
        self.from_first = from_first
        self.filters = {}
        self.unserved = {}

    # -- membership

    def _own_by(self, int locks):
        """From now on this member owns the queues that it consumes, by this set of semaphores; before it joins the group."""
        if self.ownership is not None:
            self.ownership.forget()
        self.ownership = _Ownership(locks)

    def _take_over(self, bytes text):
        """The group's subscription is this one now. Returns topic -> tags, program or None."""
        raise NotImplementedError

    def _start_offsets(self, uint32_t topic_id, uint32_t queues):
        """Where the group begins in a topic that it has never consumed: one offset for each queue."""
        raise NotImplementedError

    cdef int follow(self, sb_region *r) except -1:
        """`group set-subscription` moves the generation that `ready` looks at anyway, so this costs the others nothing."""
        cdef char text[SB_SUBSCRIPTION_BYTES]
        cdef uint64_t generation
        if self.joined and sb_load(&sb_group_at(r, self.group_slot).subscription_generation) != self.subscription_generation:
            generation = sb_group_subscription(r, self.group_slot, text)
            self.filters = make_filters(self._take_over(text))
            self.subscription_generation = generation
        return 0

    def _bind(self, Client client not None, filters, bytes text not None):
        """Become a member of the group: False if it is subscribed differently. filters: topic -> tags, program or None."""
        cdef sb_region *r = client.check()
        cdef bytes name = self.group.encode()
        cdef const char *c_text = text
        cdef const char *c_name = name
        cdef uint32_t slot = 0, group = 0
        cdef int code, self_counts, in_order = self.ownership is not None
        self.filters = make_filters(filters)
        self._leave()
        if sb_group_find(r, name, &group) != SB_OK:
            raise _errors.GroupNotExist(f"group {self.group!r} does not exist")
        slot = client.slot
        self_counts = (id(client), group) in memberships
        with nogil:
            code = sb_group_join(r, group, c_name, slot, c_text, in_order, self_counts, sb_now_ns() + DEFINE_TIMEOUT_NS,
                                 &self.subscription_generation)
        if code == SB_EXISTS:
            return False
        if code == SB_IN_USE:
            raise _errors.SubscriptionConflict(
                f"group {self.group!r}: its live members {'do not consume' if in_order else 'consume'} in order, this consumer "
                f"{'does' if in_order else 'does not'}. Order is kept only if all do: make all of them orderly=True, or none")
        if code == SB_GONE:
            raise _errors.GroupNotExist(f"group {self.group!r} was deleted while this consumer joined it")
        if code != SB_OK:
            raise code_error(r, code, f"joining group {self.group!r}")
        self.read_through(client)
        self.group_slot = group
        self.joined = True
        memberships[id(client), group] = memberships.get((id(client), group), 0) + 1
        self.refresh(r)
        return True

    def _look_at(self, Client client not None, str topic):
        """Read one topic in the name of the group, beside its members and their subscription: the dead letters."""
        cdef sb_region *r = client.check()
        cdef bytes name = self.group.encode()
        cdef uint32_t group = 0
        self._leave()
        if sb_group_find(r, name, &group) != SB_OK:
            raise _errors.GroupNotExist(f"group {self.group!r} does not exist")
        self.read_through(client)
        self.group_slot = group
        self.filters = {topic: None}
        self.refresh(r)

    def _leave(self):
        """No longer a member. With the last consumer of this process in the group goes back what they did not acknowledge:
        claims name their process, so that those of one among several consumers cannot be told from the others'."""
        if not self.joined:
            return
        self.joined = False
        key = (id(self.client), self.group_slot)
        memberships[key] -= 1
        if memberships[key] == 0:
            del memberships[key]
            if self.client.fork_generation == sb_fork_generation and not self.client.region.closed:
                # With the GIL: a consumer made meanwhile by another thread must not lose what it claims.
                sb_group_give_back(&self.client.region.r, self.group_slot, self.client.slot)
                sb_group_leave(&self.client.region.r, self.group_slot, self.client.slot)
        if self.ownership is not None and self.client.fork_generation == sb_fork_generation:
            self.ownership.give_up_idle([])

    def _shut(self):
        self.shut = True
        self._leave()

    def __del__(self):
        self._leave()  # dropped without close: it must not stay a member for the life of the process

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

    cdef bint is_paused(self, sb_region *r) noexcept:
        return self.joined and sb_group_is_paused(r, self.group_slot)

    # -- which queues

    cdef int refresh(self, sb_region *r) except -1:
        """Open the claim tables of all queues of the subscribed topics. Queues that stay keep their place. Those that there
        is no table for are left out, unless nothing else is left."""
        cdef uint64_t generation = sb_load(&sb_marks(r).topic_generation)  # first: what moves it later is met next time
        cdef dict known = {}
        cdef list sources = []
        cdef _Source source
        cdef TopicRoute route
        self.follow(r)
        self.unserved = {}
        for source in self.sources:
            if source.client is self.client and source.is_current(r):
                known[source.topic_id, source.queue_id] = source
        for topic, wanted in self.filters.items():
            route = find_route(r, topic)
            if route is None:
                continue  # deleted, or not there yet
            if not route.permission & 4:
                raise _errors.NoPermission(
                    f"topic {topic!r} has permission {_naming.permission_name(route.permission)}: nobody may consume it")
            self.open_sources(r, route, known, wanted, self.from_first, sources)
        if self.unserved and not sources:
            raise self.no_tables(r, list(self.unserved))
        retries = self.retry_topic()
        route = find_route(r, retries) if self.joined and retries not in self.filters else None
        if route is not None:  # from the first on: no retry may be skipped; and without a filter, the original passed it
            self.open_sources(r, route, known, None, True, sources)
        self.sources = sources
        self.generation = generation
        if self.ownership is not None:
            self.ownership.give_up_idle(sources)  # those that are none of ours any more
        return 0

    cdef str retry_topic(self):
        """Every member reads it, though nobody subscribes to it; it comes into being with the group's first retry."""
        return _naming.RETRY_PREFIX + self.group

    cdef int nothing_found(self, sb_region *r) except -1:
        cdef sb_queue *queue
        cdef list waiting
        if self.unserved:
            waiting = []
            for place, slot in self.unserved.items():
                queue = sb_queue_at(r, slot)
                if sb_load(&queue.next_offset) > sb_load(&queue.first_offset):
                    waiting.append(place)
            if waiting:
                self.refresh(r)  # perhaps there is a table by now: the next look finds what waits
                waiting = [place for place in waiting if place in self.unserved]
            if waiting:
                raise self.no_tables(r, waiting)
        return _QueueReader.nothing_found(self, r)

    cdef object no_tables(self, sb_region *r, list places):
        names = ", ".join(f"{topic}[{queue_id}]" for topic, queue_id in places[:5]) + (", ..." if places[5:] else "")
        return _errors.LimitReached(
            f"group {self.group!r} cannot consume {names}: the broker has room for claim_tables = {r.limits.claim_tables} "
            "queues, counted once for each group that consumes them. Start it anew with more, or delete groups or topics "
            "that nobody needs")

    cdef int open_sources(self, sb_region *r, TopicRoute route, dict known, _Filter wanted, bint from_first,
                          list sources) except -1:
        cdef uint32_t tables[SB_QUEUES_PER_TOPIC_MAX]
        cdef uint64_t lives[SB_QUEUES_PER_TOPIC_MAX]
        cdef uint64_t offsets[SB_QUEUES_PER_TOPIC_MAX]
        cdef const uint64_t *starts = NULL
        cdef uint32_t group = self.group_slot, i
        cdef int code
        cdef _Source source
        if not from_first and not sb_claims_knows_topic(r, group, route.slots[0]):
            for i, offset in enumerate(self._start_offsets(route.topic_id, route.count)):
                offsets[i] = offset
            starts = offsets
        with nogil:
            code = sb_claims_open_topic(r, group, route.slots, route.count, starts, sb_now_ns() + DEFINE_TIMEOUT_NS, tables, lives)
        if code != SB_OK and code != SB_TABLE_FULL:
            raise code_error(r, code, f"subscribing group {self.group!r} to {route.name!r}")
        for i in range(route.count):
            if code == SB_TABLE_FULL or lives[i] == 0:
                self.unserved[route.name, i] = route.slots[i]
                continue
            source = known.get((route.topic_id, i))
            if source is None or source.life != lives[i] or source.table != tables[i]:  # reset since we looked
                source = self.make_source(r, route, i, tables[i], lives[i])
            source.filter = wanted
            sources.append(source)
        return 0

    cdef _Source make_source(self, sb_region *r, TopicRoute route, uint32_t queue_id, uint32_t table, uint64_t life):
        cdef _Source source = _Source.__new__(_Source)
        source.client = self.client
        source.group = self.group
        source.topic = route.name
        source.table = table
        source.life = life
        source.group_slot = self.group_slot
        source.queue_slot = route.slots[queue_id]
        source.topic_slot = sb_queue_at(r, source.queue_slot).topic_slot
        source.topic_id = route.topic_id
        source.queue_id = queue_id
        source.retries = route.name == self.retry_topic()
        source.cursor.block = SB_NIL
        return source
