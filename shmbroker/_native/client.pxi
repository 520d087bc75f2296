# client.pxi: Client, this process as an attached one: its slot, its ids, its wait slots.

cdef int64_t POLL_NS = 500_000  # how often a wait looks that got no wait slot
cdef Py_ssize_t SPARE_WAITERS = 2  # kept per process between waits; the rest belongs to everybody


cdef class Client:
    """This process attached to a region: one slot, one incarnation of ids. Not usable after a fork.

    Its slot goes back when it is closed and the last thread that waits through it has left.
    """
    cdef readonly Region region
    cdef readonly uint32_t slot
    cdef readonly uint32_t generation
    cdef readonly uint64_t incarnation
    cdef uint64_t sequence
    cdef int fork_generation
    cdef readonly bint closed
    cdef int users     # threads in a call that runs without the GIL
    cdef dict owning   # claim table -> the _Ownership of this process that has its queue, of orderly consumers
    cdef list waiters  # wait slots of this process that no thread uses at the moment

    def __init__(self, Region region not None, str name):
        cdef sb_region *r = region.open()
        cdef uint32_t pid = _os.getpid()
        cdef bytes encoded = name.encode()[:47]
        cdef int code
        if self.region is not None:
            raise TypeError("a Client is made once")
        self.closed = True
        self.region = region
        self.incarnation = int.from_bytes(_os.urandom(8), "little") or 1
        self.waiters = []
        self.owning = {}
        self.fork_generation = sb_fork_generation
        code = sb_client_join(r, pid, sb_start_ticks(pid), self.incarnation, encoded, &self.slot, &self.generation)
        if code == SB_TABLE_FULL:
            raise _errors.LimitReached(f"the broker has room for max_clients = {r.limits.clients} attached processes")
        region.waiter_owner = self.slot
        self.closed = False

    def __del__(self):
        self.close()

    def close(self):
        """Leave the broker: claims not acked go back to their groups."""
        if not self.closed:
            self.closed = True
            if self.users == 0:
                self.leave()

    cdef void leave(self):
        cdef uint32_t released = 0
        cdef sb_region *r = &self.region.r
        if self.fork_generation == sb_fork_generation and r.base != NULL:
            with nogil:
                sb_client_reap(r, self.slot, self.generation, &released)

    cdef sb_region *check(self) except NULL:
        if self.fork_generation != sb_fork_generation:
            raise _errors.ForkedHandleError(
                "this handle was made before a fork; in the child, ask the Broker for a new producer or consumer")
        if self.closed:
            raise _errors.BrokerClosed("this handle was closed, or the broker that it was attached to has stopped")
        return self.region.open()

    cdef void enter(self):
        """Before the GIL is dropped with the region in use."""
        self.users += 1

    cdef void exit(self):
        self.users -= 1
        if self.closed and self.users == 0:
            self.leave()

    cdef uint32_t take_waiter(self):
        """A wait slot, or SB_NIL if all are in use: the caller then polls."""
        cdef uint32_t slot = SB_NIL
        if self.waiters:
            return <uint32_t>self.waiters.pop()
        sb_waiter_take(&self.region.r, self.slot, &slot)
        return slot

    cdef void give_waiter(self, uint32_t slot):
        if slot == SB_NIL:
            return
        if len(self.waiters) < SPARE_WAITERS and not self.closed:
            self.waiters.append(slot)
        else:
            sb_waiter_give(&self.region.r, slot)

    cdef int wait_position(self, uint32_t kind, uint64_t target, int64_t deadline_ns) except -100:
        """SB_OK, SB_TIMEOUT, SB_READ_ONLY, SB_FENCED or SB_NOT_RUNNING. Looks at signals."""
        cdef sb_region *r = &self.region.r
        cdef uint32_t waiter
        cdef int code = SB_INTERRUPTED
        if self.closed or self.fork_generation != sb_fork_generation:
            return SB_NOT_RUNNING
        waiter = self.take_waiter()
        self.enter()
        try:
            while code == SB_INTERRUPTED:
                with nogil:
                    if waiter == SB_NIL:
                        code = sb_poll_position(r, kind, target, deadline_ns, POLL_NS)
                    else:
                        code = sb_wait_position(r, waiter, kind, target, deadline_ns)
                if code == SB_INTERRUPTED:
                    check_signals()
        finally:
            self.give_waiter(waiter)
            self.exit()
        return code

    def append_system(self, uint8_t kind, bodies, int64_t timeout_ns):
        """As Region.append_system, in this client's name: whoever closes the handle meanwhile does not free its wait slot."""
        self.check()
        self.enter()
        try:
            return self.region.append_system(kind, bodies, timeout_ns=timeout_ns)
        finally:
            self.exit()

    def recall(self, uint64_t position, uint64_t turn, int64_t timeout_ns):
        self.check()
        self.enter()
        try:
            return append_recall(&self.region.r, self.slot, position, turn, timeout_ns)
        finally:
            self.exit()

    def wait_flushed(self, uint64_t position, int64_t timeout_ns):
        cdef int code
        self.check()
        code = self.wait_position(SB_WAIT_FLUSH, position, sb_now_ns() + timeout_ns)
        if code != SB_OK and code != SB_TIMEOUT:
            raise code_error(&self.region.r, code, "waiting for the flush")
        return code == SB_OK
