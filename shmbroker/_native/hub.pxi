# hub.pxi: Hub and MessageWait, how an event loop waits: one thread sleeps for all of its coroutines.
#
# A wait of the loop has a wait slot, as a waiting thread has one, but posts of it go to the semaphore that the hub's thread
# sleeps at. Everything but ``sleep`` is called on the loop's thread; the GIL guards what both look at.

cdef extern from "wait.h" nogil:
    void sb_hub_join(sb_region *r, uint32_t hub, uint32_t slot)
    int sb_hub_sleep(sb_region *r, uint32_t hub, int64_t deadline_ns)
    void sb_hub_post(sb_region *r, uint32_t hub)
    int sb_waiter_is_posted(const sb_region *r, uint32_t slot)
    int sb_wait_position_begin(sb_region *r, uint32_t slot, uint32_t kind, uint64_t target)
    void sb_wait_position_end(sb_region *r, uint32_t slot)
    int sb_position_look(sb_region *r, uint32_t kind, uint64_t target)

cdef extern from "codes.h" nogil:
    enum:
        SB_AGAIN

cdef enum:
    SPARE_JOINED = 8  # joined slots that a hub keeps between two waits


@cython.final
cdef class Hub:
    """Where one event loop waits in one broker's memory; see _core.pyi."""
    cdef readonly Client client
    cdef uint32_t slot      # whose semaphore its thread sleeps at
    cdef uint32_t flushes   # the slot of the one wait for the disk that stands for all of them
    cdef bint flush_begun, closing
    cdef int slotless       # waits that got no slot: the thread looks every millisecond
    cdef list spares        # joined slots that nobody uses at the moment

    def __init__(self, Client client not None):
        client.check()
        self.client = client
        self.spares = []
        self.flushes = SB_NIL
        self.slot = client.take_waiter()
        client.enter()

    def sleep(self, double seconds):
        cdef sb_region *r = &self.client.region.r
        cdef int64_t pause_ns = <int64_t>(seconds * 1e9)
        if self.closing or self.client.closed:
            return False
        if self.slot == SB_NIL or self.slotless:
            with nogil:
                usleep(1000)
        else:
            with nogil:
                sb_hub_sleep(r, self.slot, sb_now_ns() + pause_ns)
        return not self.closing and not self.client.closed

    def close(self):
        self.closing = True
        if self.slot != SB_NIL:
            sb_hub_post(&self.client.region.r, self.slot)

    def leave(self):
        cdef sb_region *r = &self.client.region.r
        self.end_flush()
        for slot in [*self.spares, self.flushes, self.slot]:
            if slot != SB_NIL:
                sb_waiter_give(r, slot)
        self.spares = []
        self.flushes = self.slot = SB_NIL
        self.client.exit()

    cdef uint32_t take(self):
        """A joined slot, or SB_NIL."""
        cdef sb_region *r = &self.client.region.r
        cdef uint32_t slot = SB_NIL
        if self.spares:
            return <uint32_t>self.spares.pop()
        if self.slot != SB_NIL and not self.closing and sb_waiter_take(r, self.client.slot, &slot) == SB_OK:
            sb_hub_join(r, self.slot, slot)
        return slot

    cdef void give(self, uint32_t slot):
        if len(self.spares) < SPARE_JOINED and self.slot != SB_NIL:
            self.spares.append(slot)
        else:
            sb_waiter_give(&self.client.region.r, slot)

    # -- the disk

    def begin_flush(self, uint64_t end):
        cdef sb_region *r = &self.client.region.r
        cdef int code
        self.end_flush()
        if self.flushes == SB_NIL:
            self.flushes = self.take()
        if self.flushes == SB_NIL:
            code = sb_position_look(r, SB_WAIT_FLUSH, end)
            self.slotless += 1
        else:
            code = sb_wait_position_begin(r, self.flushes, SB_WAIT_FLUSH, end)
        self.flush_begun = True
        return code != SB_AGAIN

    def end_flush(self):
        if not self.flush_begun:
            return
        self.flush_begun = False
        if self.flushes == SB_NIL:
            self.slotless -= 1
        else:
            sb_wait_position_end(&self.client.region.r, self.flushes)

    def flush_decided(self, uint64_t end):
        return self.client.closed or sb_position_look(&self.client.region.r, SB_WAIT_FLUSH, end) != SB_AGAIN


@cython.final
cdef class MessageWait:
    """One coroutine's wait for a message, from its flag on; see _core.pyi."""
    cdef Hub hub
    cdef ConsumerCore consumer
    cdef uint32_t slot
    cdef uint32_t topics[TOPICS_MAX + 1]
    cdef uint32_t count
    cdef bint begun, woken

    def __init__(self, Hub hub not None, ConsumerCore consumer not None):
        cdef sb_region *r = consumer.ready()
        if consumer.client is not hub.client:
            raise _errors.BrokerClosed("this consumer has gone over to another broker")
        self.hub = hub
        self.consumer = consumer
        self.slot = hub.take()
        hub.client.enter()
        if self.slot == SB_NIL:
            hub.slotless += 1
        else:
            self.count = consumer.begin_wait(r, self.slot, self.topics)
        self.begun = True

    @property
    def polls(self):
        return self.slot == SB_NIL

    @property
    def posted(self):
        return self.slot != SB_NIL and sb_waiter_is_posted(&self.hub.client.region.r, self.slot)

    @property
    def seconds(self):
        """Until it should look by itself: a claim of another member expires."""
        cdef int64_t deadline = self.consumer.next_deadline(&self.hub.client.region.r)
        return (deadline - sb_now_ns()) / 1e9

    def end(self):
        cdef sb_region *r = &self.hub.client.region.r
        if not self.begun:
            return
        self.begun = False
        if self.slot == SB_NIL:
            self.hub.slotless -= 1
        else:
            self.woken = sb_waiter_is_posted(r, self.slot)
            sb_wait_message_end(r, self.slot, self.topics, self.count)
            self.hub.give(self.slot)
        self.hub.client.exit()

    def pass_on(self):
        if self.woken and not self.hub.client.closed and self.consumer.client is self.hub.client:
            self.consumer.wake_next(&self.hub.client.region.r)
