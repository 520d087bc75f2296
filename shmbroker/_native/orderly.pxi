# orderly.pxi: _Ownership, the queues that one consumer of a group owns (R23). Taking and giving up: queue_lock.c.
#
# A queue that nobody owns is taken by the first member that looks. Who looks and has two queues fewer than the richest
# member asks it for the difference, by the word `wanted` of each; it gives them up at once, or at the end of the batch that
# its listener works on, and leaves them alone for a moment. Nobody is ever waited for: a member that asks and is stopped
# then loses its turn, one that is stopped as an owner loses nothing. The GIL guards what threads share here.

cdef extern from "queue_lock.h" nogil:
    int sb_queue_bereave(sb_region *r, uint32_t table, uint32_t slot)
    int sb_queue_locks_make(int key, uint32_t tables, int *id)
    int sb_queue_locks_find(int key, uint32_t tables, int *id, uint32_t *uid)
    int sb_queue_locks_share(int id, uint32_t uid, uint32_t gid, int mode)
    int sb_queue_locks_remove(int id)
    int sb_queue_locks_test(int id, uint32_t tables)
    int sb_queue_own(sb_region *r, int id, uint32_t table, uint64_t life, uint32_t slot)
    void sb_queue_disown(sb_region *r, int id, uint32_t table, uint32_t slot, int named)

cdef int64_t YIELDED_NS = 100_000_000  # for so long a queue is left to who asked for it
cdef int64_t BALANCE_NS = 20_000_000   # between two looks at what others own


def make_queue_locks(int key, uint32_t tables):
    """Make the set of semaphores of a broker with so many claim tables. Raises OSError."""
    cdef int id = -1
    check_os(sb_queue_locks_make(key, tables, &id))
    return id


def find_queue_locks(int key, uint32_t tables):
    """Its id, and the number of the user that it belongs to. ``tables`` 0: whatever its size. Raises OSError."""
    cdef int id = -1
    cdef uint32_t uid = 0
    check_os(sb_queue_locks_find(key, tables, &id, &uid))
    return id, uid


def share_queue_locks(int found, uint32_t uid, uint32_t gid, int mode):
    check_os(sb_queue_locks_share(found, uid, gid, mode))


def remove_queue_locks(int found):
    check_os(sb_queue_locks_remove(found))


def test_queue_locks(int found, uint32_t tables):
    """Raises OSError unless the kernel gives back what a process that ends has held."""
    check_os(sb_queue_locks_test(found, tables))


cdef int check_os(int code) except -1:
    if code != SB_OK:
        raise OSError(-code, _os.strerror(-code))
    return 0


@cython.final
cdef class _Ownership:
    """Which queues a consumer owns, by the set of semaphores ``id``."""
    cdef int id
    cdef list owned      # _Source
    cdef bint off        # takes none: the consumer is paused or ends
    cdef int64_t balanced_ns
    cdef uint32_t waiter  # of its consumer's thread that waits, SB_NIL if none does

    def __cinit__(self, int id):
        self.id = id
        self.owned = []
        self.waiter = SB_NIL

    cdef int own(self, sb_region *r, _Source source) except -100:
        """SB_OK: this consumer owns the queue, from now on perhaps | SB_LOCKED: it does not | SB_GONE: no such set any more.
        Whoever is named as the owner is alive, or about to be taken down by the janitor: nobody else is asked then."""
        cdef sb_claims *c = sb_claims_at(r, source.table)
        cdef int code
        if source.owned:
            return SB_OK
        if self.off or sb_load(&c.owner) or not source.is_current(r) or sb_now_ns() - source.yielded_ns < YIELDED_NS:
            return SB_LOCKED
        code = sb_queue_own(r, self.id, source.table, source.life, source.client.slot)
        if code == SB_OK:
            source.owned = True
            source.client.owning[source.table] = self
            self.owned.append(source)
        return code

    cdef int give_up(self, _Source source) except -1:
        """Whoever asked for it is told; else another member."""
        cdef sb_region *r = &source.client.region.r
        cdef bint mapped = not source.client.closed, current = mapped and source.is_current(r)
        cdef uint64_t wanted = sb_load(&sb_claims_at(r, source.table).wanted) if current else 0
        source.owned = False
        self.owned.remove(source)
        source.client.owning.pop(source.table, None)
        sb_queue_disown(r, self.id, source.table, source.client.slot, mapped)
        if wanted:
            source.yielded_ns = sb_now_ns()
        if current and not (wanted and sb_wake_member(r, source.group_slot, <uint32_t>wanted - 1)):
            sb_wake_group(r, source.topic_slot, source.group_slot)
        return 0

    cdef int forget(self) except -1:
        """The set of semaphores has gone, or its broker."""
        cdef _Source source
        for source in self.owned:
            source.owned = False
            source.client.owning.pop(source.table, None)
            if not source.client.closed:
                sb_queue_bereave(&source.client.region.r, source.table, source.client.slot)
        self.owned = []
        return 0

    cdef int tell(self, sb_region *r, _Source source, uint64_t owner) except -1:
        """There is something for the owner of this queue. One of this process is woken by its own wait slot: any other of the
        process is perhaps that of who tells it, which would wake itself for ever."""
        cdef _Ownership sibling
        if owner != <uint64_t>source.client.slot + 1:
            sb_wake_member(r, source.group_slot, <uint32_t>owner - 1)
            return 0
        sibling = source.client.owning.get(source.table)
        if sibling is not None and sibling is not self and sibling.waiter != SB_NIL:
            sb_waiter_wake(r, sibling.waiter)
        return 0

    cdef int give_up_idle(self, list keep) except -1:
        """All that no thread works on, but for those in ``keep``. The others follow when their threads come to an end."""
        cdef _Source source
        for source in self.owned[:]:
            if not source.busy and source not in keep:
                self.give_up(source)
        return 0

    cdef bint is_asked_for(self, sb_region *r, _Source source) noexcept:
        return self.off or (source.owned and sb_load(&sb_claims_at(r, source.table).wanted) != 0)

    cdef int serve(self, sb_region *r, list sources) except -1:
        """At the end of a batch: give up what others ask for, and take what was given up for this process."""
        cdef _Source source
        cdef uint64_t me
        for source in sources:
            if source.owned:
                if not source.busy and self.is_asked_for(r, source):
                    self.give_up(source)
            elif sb_load(&sb_claims_at(r, source.table).owner) == 0:
                me = <uint64_t>source.client.slot + 1
                if sb_load(&sb_claims_at(r, source.table).wanted) == me:
                    self.own(r, source)
        return 0

    cdef int balance(self, sb_region *r, list sources) except -1:
        """Ask the richest members for queues, until none has two more than this one."""
        cdef dict counts = {}  # slot + 1 -> queues it owns and nobody asks for, or asks for
        cdef _Source source
        cdef uint64_t me = 0, owner, richest, nobody
        cdef int64_t now = sb_now_ns()
        if self.off or now - self.balanced_ns < BALANCE_NS:
            return 0
        self.balanced_ns = now
        for source in sources:
            me = <uint64_t>source.client.slot + 1
            owner = self.heir(r, source)
            counts[owner] = counts.get(owner, 0) + 1
        counts.pop(0, None)
        counts.setdefault(me, 0)
        for source in sources:
            owner = self.heir(r, source)
            richest = max(counts, key=counts.__getitem__)
            if counts[richest] - counts[me] < 2:
                break
            nobody = 0
            if owner == richest and sb_cas(&sb_claims_at(r, source.table).wanted, &nobody, me):
                counts[richest] -= 1
                counts[me] += 1
                sb_wake_member(r, source.group_slot, <uint32_t>owner - 1)
        return 0

    cdef uint64_t heir(self, sb_region *r, _Source source) noexcept:
        """Who is to own it, if nobody dies: slot + 1."""
        cdef sb_claims *c = sb_claims_at(r, source.table)
        cdef uint64_t owner = sb_load(&c.owner), wanted = sb_load(&c.wanted)
        return wanted if owner and wanted else owner
