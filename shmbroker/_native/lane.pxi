# lane.pxi: ConsumeContext and Lane, what one listener thread has, and what is to be said of its messages. push.pxi works on it.

cdef int64_t ALL_SUCCEEDED = 0x7fffffff


cdef class ConsumeContext:
    """What a listener is told beside its messages, and what it may ask for; see _core.pyi."""
    cdef readonly str group
    cdef readonly str topic
    cdef readonly uint32_t queue_id
    cdef public int delay_level_when_next_consume
    cdef public int64_t ack_index
    cdef public double suspend_current_queue_time

    def __init__(self, str group not None):
        self.group = group
        self.ack_index = ALL_SUCCEEDED


@cython.final
cdef class Lane:
    """One listener thread's: what it has prefetched, and what its listener works on."""
    cdef list ahead                # prefetched, oldest first
    cdef _Source queue             # orderly: the one that it works on
    cdef Py_ssize_t begun          # how many of them were begun, or found to be another's
    cdef list batch                # what the listener has, if it takes lists
    cdef ReceivedMessage message   # what it has, if it takes single ones
    cdef ConsumeContext context
    cdef uint32_t deadline_ms      # of what the listener has; 0: nothing
    cdef readonly uint32_t renewals
    cdef bint alone                # no other lane of this process has claims that run
    cdef _Source acked_in
    cdef uint32_t acked, started   # not noted in the memory yet
    cdef list unwritten            # acked, to be written to the log
    cdef int64_t settled_ns

    def __init__(self, str group not None):
        self.ahead = []
        self.batch = []
        self.unwritten = []
        self.context = ConsumeContext(group)

    @property
    def empty(self):
        return self.begun >= len(self.ahead)

    @property
    def overran(self):
        """The listener's time is over: a death of this process would charge no attempt to what it has."""
        return self.deadline_ms != 0 and <int32_t>(<uint32_t>(sb_now_ns() // 1_000_000) - self.deadline_ms) >= 0


cdef inline bint is_suspect(ReceivedMessage message) except -1:
    """Its last delivery ended without an answer: perhaps it kills its process."""
    cdef uint32_t attempts = sb_claim_attempts(message.receipt)
    cdef dict answered = message.source.answered
    return attempts != 0 and (answered is None or attempts > answered.get(message.header().queue_offset, 0))


cdef inline int let_go(ReceivedMessage message) except -1:
    """It no longer counts against the limits of prefetching."""
    message.source.ahead -= 1
    message.source.ahead_bytes -= message.header().size
    return 0
