# received.pxi: ReceivedMessage, a lazy view of one delivered record, and where it came from.

cdef extern from "claim.h" nogil:
    ctypedef struct sb_claim:
        uint64_t offset
        uint64_t word
    uint32_t sb_claim_attempts(uint64_t word)
    bint sb_claim_is_prefetched(uint64_t word)
    uint32_t sb_claim_deadline_after(uint32_t now_ms, uint32_t invisible_ms)
    int sb_claim_take(sb_region *r, uint32_t table, uint64_t life, uint64_t offset, uint32_t slot, uint32_t now_ms,
                      uint32_t deadline_ms, sb_claim *claim)
    int sb_claim_take_over(sb_region *r, uint32_t table, uint64_t life, uint64_t offset, uint32_t slot, uint32_t deadline_ms,
                           sb_claim *claim)
    uint32_t sb_claim_prefetched(sb_region *r, uint32_t table, uint64_t *offsets, uint32_t count)
    int sb_claim_start(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot, uint32_t deadline_ms,
                       sb_claim *started)
    int sb_claim_skip(sb_region *r, uint32_t table, uint64_t life, uint64_t offset)
    uint32_t sb_claim_released(sb_region *r, uint32_t table, uint32_t now_ms, uint64_t *offsets, uint32_t count)
    int sb_claim_oldest(sb_region *r, uint32_t table, uint64_t life, uint64_t offset_from, uint32_t now_ms, uint64_t *offset)
    void sb_claim_advance(sb_region *r, uint32_t table, uint64_t life, uint64_t offset, uint32_t deadline_ms)
    uint64_t sb_claim_next(const sb_region *r, uint32_t table)
    int sb_claim_ack(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot)
    int sb_claim_renew(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot, uint32_t deadline_ms,
                       sb_claim *renewed)
    int sb_claim_release(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot)
    void sb_claim_base(sb_region *r, uint32_t table)
    int sb_claim_overflow(sb_region *r, uint32_t table, uint64_t life, uint64_t wanted)
    int sb_claims_claimable(sb_region *r, uint32_t table, uint32_t now_ms)
    int sb_claims_open_topic(sb_region *r, uint32_t group, const uint32_t *queues, uint32_t count, const uint64_t *starts,
                             int64_t deadline_ns, uint32_t *tables, uint64_t *lives)
    bint sb_claims_knows_topic(const sb_region *r, uint32_t group, uint32_t queue)

cdef extern from "queue_index.h" nogil:
    ctypedef struct sb_cursor:
        uint32_t block
        uint64_t first
    int sb_index_lookup(const sb_region *r, uint32_t queue, uint64_t offset, uint64_t limit, uint32_t count,
                        sb_cursor *cursor, uint64_t *positions, uint32_t *found)


@cython.final
cdef class _Source:
    """One queue as one consumer reads it, with its claim table."""
    cdef Client client
    cdef str group
    cdef str topic
    cdef uint32_t group_slot, topic_slot, queue_slot, table
    cdef uint64_t life  # of the table: what its state word says as long as it is this group's and queue's
    cdef uint32_t topic_id, queue_id
    cdef sb_cursor cursor
    cdef uint64_t position  # of a pull consumer: the next offset that it reads
    cdef _Filter filter  # None: every message
    cdef bint retries      # the group's own %RETRY% topic: copies that say where they come from, with the deliveries so far
    cdef bytes entries     # packed consume queue entries, read ahead for a consumer that lags; None: none
    cdef uint64_t entries_first
    cdef uint32_t ahead        # messages that a push consumer has prefetched and is not done with, and their bytes
    cdef int64_t ahead_bytes
    cdef bint owned            # orderly: its semaphore is this process's, through this consumer
    cdef bint busy             # orderly: a thread of this consumer works on it
    cdef int64_t yielded_ns    # orderly: when it was given up for somebody who asked for it
    cdef dict answered         # orderly: offset -> attempts of those whose last delivery ended with an answer; None: none

    cdef inline bint is_current(self, sb_region *r) noexcept:
        """The table still belongs to this group and queue; it is given to others when one of them is deleted."""
        return sb_load(&sb_claims_at(r, self.table).state) == self.life

    cdef bint is_deleted(self, sb_region *r) noexcept:
        """The topic has gone, though nobody may have given up the table yet; then the index is perhaps another topic's."""
        cdef sb_queue *queue = sb_queue_at(r, self.queue_slot)
        return sb_load(&queue.state) != SB_SLOT_LIVE or queue.topic_id != self.topic_id or not self.is_current(r)

    cdef inline bint is_message(self, const sb_record *h, uint64_t offset) noexcept:
        return (h.kind == SB_KIND_MESSAGE and h.topic_id == self.topic_id and h.queue_id == self.queue_id
                and h.queue_offset == offset)

    cdef int give_back(self, uint64_t offset, uint64_t receipt) noexcept:
        """A claim that the application was not told of goes back to the group, uncounted."""
        cdef sb_region *r = &self.client.region.r
        if self.is_current(r):
            sb_claim_release(r, self.table, offset, receipt, self.client.slot)
            sb_wake_group(r, self.topic_slot, self.group_slot)
        return 0


@cython.freelist(1024)
@cython.no_gc  # refers to bytes and to a _Source, which never refers back
cdef class ReceivedMessage:
    """A delivered message: a lazy view of a private copy of its record; see _core.pyi."""
    cdef bytes record
    cdef _Source source
    cdef uint64_t receipt  # the claim word
    cdef int fork_generation

    def __init__(self):
        raise TypeError("received messages come from a consumer's receive()")

    cdef const sb_record *header(self) except NULL:
        if self.fork_generation != sb_fork_generation:
            raise _errors.ForkedHandleError(
                "this message was received before a fork: it belongs to the parent, which acknowledges it")
        return <const sb_record *>PyBytes_AS_STRING(self.record)

    cdef bytes part(self, Py_ssize_t start, Py_ssize_t size):
        return PyBytes_FromStringAndSize(PyBytes_AS_STRING(self.record) + SB_RECORD_HEADER + start, size)

    @property
    def topic(self):
        self.header()
        return self.properties.get("RETRY_TOPIC", self.source.topic) if self.source.retries else self.source.topic

    @property
    def group(self):
        self.header()
        return self.source.group

    @property
    def queue_id(self):
        return self.header().queue_id

    @property
    def queue_offset(self):
        return self.header().queue_offset

    @property
    def position(self):
        return self.header().position

    @property
    def message_id(self):
        cdef const sb_record *h = self.header()
        return id_text(h.incarnation, h.sequence)

    @property
    def tags(self):
        return self.part(0, self.header().tags_bytes).decode()

    @property
    def keys(self):
        cdef const sb_record *h = self.header()
        return self.part(h.tags_bytes, h.keys_bytes).decode()

    @property
    def properties(self):
        cdef const sb_record *h = self.header()
        return parse_properties(self.part(h.tags_bytes + h.keys_bytes, h.properties_bytes))

    @property
    def body(self):
        cdef const sb_record *h = self.header()
        cdef Py_ssize_t start = <Py_ssize_t>h.tags_bytes + h.keys_bytes + h.properties_bytes
        return self.part(start, h.size - SB_RECORD_HEADER - start)

    cdef uint32_t attempts(self) except? 0xffffffff:
        """Deliveries to this group, this claim included unless it is only prefetched."""
        cdef uint32_t before = self.header().attempts if self.source.retries else 0
        return before + sb_claim_attempts(self.receipt)

    @property
    def delivery_attempt(self):
        return self.attempts()

    @property
    def born_timestamp(self):
        return self.header().born_ns / 1e9

    @property
    def store_size(self):
        return self.header().size

    def __reduce__(self):
        raise TypeError("a received message belongs to its consumer and cannot be pickled: pass what is needed, as its body")

    def __repr__(self):
        if self.fork_generation != sb_fork_generation:
            return "ReceivedMessage(of another process)"
        return (f"ReceivedMessage({self.message_id}, {self.topic}[{self.queue_id}] offset {self.queue_offset}, "
                f"attempt {self.delivery_attempt})")


cdef int give_back(list messages) except -1:
    """Claims of messages that the application was not told of go back to the group, uncounted."""
    cdef ReceivedMessage message
    for message in messages:
        message.source.give_back(message.header().queue_offset, message.receipt)
    return 0
