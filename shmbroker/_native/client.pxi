# client.pxi: Client, this process as an attached one: its slot, its ids, its wait slots.


cdef class Client:
    """This process attached to a region: one slot, one incarnation of ids. Not usable after a fork."""
    cdef readonly Region region
    cdef readonly uint32_t slot
    cdef readonly uint32_t generation
    cdef readonly uint64_t incarnation
    cdef uint64_t sequence
    cdef int fork_generation
    cdef readonly bint closed
    cdef list waiters  # wait slots of this process that no thread uses at the moment

    def __init__(self, Region region not None, str name):
        cdef sb_region *r = region.open()
        cdef uint32_t pid = _os.getpid()
        cdef bytes encoded = name.encode()[:47]
        cdef int code
        self.closed = True
        self.region = region
        self.incarnation = int.from_bytes(_os.urandom(8), "little") or 1
        self.waiters = []
        self.fork_generation = sb_fork_generation
        code = sb_client_join(r, pid, sb_start_ticks(pid), self.incarnation, encoded, &self.slot, &self.generation)
        if code == SB_TABLE_FULL:
            raise _errors.LimitReached(f"the broker has room for max_clients = {r.limits.clients} attached processes")
        self.closed = False

    def close(self):
        """Leave the broker: claims not acked go back to their groups."""
        cdef uint32_t released = 0
        cdef sb_region *r = &self.region.r
        if not self.closed and self.fork_generation == sb_fork_generation and not self.region.closed:
            self.closed = True
            with nogil:
                sb_client_reap(r, self.slot, self.generation, &released)
        self.closed = True

    cdef sb_region *check(self) except NULL:
        if self.fork_generation != sb_fork_generation:
            raise _errors.ForkedHandleError(
                "this handle was made before a fork; in the child, ask the Broker for a new producer or consumer")
        if self.closed:
            raise _errors.BrokerClosed("this handle was closed")
        return self.region.open()

    cdef uint32_t take_waiter(self) except? 0xffffffff:
        cdef uint32_t slot = SB_NIL
        if self.waiters:
            return <uint32_t>self.waiters.pop()
        if sb_waiter_take(&self.region.r, self.slot, &slot) != SB_OK:
            raise _errors.LimitReached(
                f"more than max_waiters = {self.region.r.limits.waiters} threads wait in the broker at one time")
        return slot

    cdef void give_waiter(self, uint32_t slot):
        if slot != SB_NIL:
            self.waiters.append(slot)

    cdef int wait_position(self, uint32_t kind, uint64_t target, int64_t deadline_ns) except -100:
        """SB_OK, SB_TIMEOUT, SB_READ_ONLY, SB_FENCED or SB_NOT_RUNNING. Looks at signals."""
        cdef sb_region *r = self.check()
        cdef uint32_t waiter = self.take_waiter()
        cdef int code = SB_INTERRUPTED
        try:
            while code == SB_INTERRUPTED:
                with nogil:
                    code = sb_wait_position(r, waiter, kind, target, deadline_ns)
                if code == SB_INTERRUPTED:
                    check_signals()
        finally:
            self.give_waiter(waiter)
        return code

    def wait_flushed(self, uint64_t position, int64_t timeout_ns):
        cdef int code = self.wait_position(SB_WAIT_FLUSH, position, sb_now_ns() + timeout_ns)
        if code != SB_OK and code != SB_TIMEOUT:
            raise code_error(&self.region.r, code, "waiting for the flush")
        return code == SB_OK
