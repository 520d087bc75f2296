# region.pxi: Region, the mapped memory of a broker, as workers, the janitor and the command line see it.

from cpython.buffer cimport PyBUF_WRITABLE

import mmap as _mmap

sb_fork_watch()

FINGERPRINT = sb_fingerprint()

cdef int64_t SLICE_NS = 100_000_000  # no native wait is longer before signals are looked at
cdef int64_t DEFINE_TIMEOUT_NS = 3_000_000_000

cdef dict ROLES = {
    "supervisor": 0, "flusher": 1, "dispatcher": 2, "janitor": 3, "replicator": 4, "scheduler": 5, "checker": 6,
}
cdef tuple LIMIT_NAMES = (  # as in sb_limits
    "clients", "waiters", "topics", "queues", "groups", "claim_tables", "claim_window", "overflow_claims", "ids", "blocks",
    "reserve_bytes", "max_message_bytes",
)


cdef class _RingBuffer:
    """Read-only buffer over the ring mapped twice; keeps the region mapped."""
    cdef Region region
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]

    def __cinit__(self, Region region):
        self.region = region
        self.shape[0] = <Py_ssize_t>(2 * region.r.ring_bytes)
        self.strides[0] = 1

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError("the ring is written by append alone")
        buffer.buf = self.region.r.ring
        buffer.format = "B"
        buffer.internal = NULL
        buffer.itemsize = 1
        buffer.len = self.shape[0]
        buffer.ndim = 1
        buffer.obj = self
        buffer.readonly = 1
        buffer.shape = self.shape
        buffer.strides = self.strides
        buffer.suboffsets = NULL

    def __releasebuffer__(self, Py_buffer *buffer):
        pass


cdef class Region:
    """The two mapped shared-memory objects of a broker. See _core.pyi for units."""
    cdef sb_region r
    cdef readonly bint closed
    cdef uint32_t waiter_owner  # whose death frees the wait slots that are taken through this object
    cdef object __weakref__

    def __dealloc__(self):
        sb_region_unmap(&self.r)

    def close(self):
        """No more calls through this object. The mapping goes when the last view of it goes."""
        self.closed = True

    cdef sb_region *open(self) except NULL:
        if self.closed or self.r.base == NULL:
            raise _errors.BrokerClosed("the broker's memory was closed in this process")
        return &self.r

    @staticmethod
    def sizes(limits, uint64_t ring_bytes):
        cdef sb_limits sized = make_limits(limits)
        return sb_control_size(&sized), ring_bytes

    @staticmethod
    def create(int control_fd, int ring_fd, limits, uint64_t ring_bytes, uint64_t segment_bytes, *, uint64_t tail,
               uint32_t epoch, bytes instance, bytes boot_id, directory, namespaces, str ring_name):
        cdef Region region = Region.__new__(Region)
        cdef sb_header h
        cdef sb_limits sized = make_limits(limits)
        cdef bytes name = ring_name.encode()
        if len(instance) != 16 or len(boot_id) != 16 or len(name) >= sizeof(h.ring_name):
            raise ValueError("instance and boot_id are 16 bytes, ring_name at most 63")
        memset(&h, 0, sizeof(h))
        h.segment_bytes = segment_bytes
        h.directory_device, h.directory_inode = directory
        h.pid_namespace, h.ipc_namespace = namespaces
        h.owner_uid = _os.geteuid()
        memcpy(h.instance, <const char *>instance, 16)
        memcpy(h.boot_id, <const char *>boot_id, 16)
        memcpy(h.ring_name, <const char *>name, len(name))
        if sb_region_map(&region.r, control_fd, ring_fd, 1) != SB_OK:
            raise _errors.LayoutMismatch("cannot map the broker's memory: wrong sizes")
        region.waiter_owner = sized.clients + <uint32_t>ROLES["supervisor"]
        if region.r.ring_bytes != ring_bytes or sb_region_format(&region.r, &h, &sized, tail, epoch) != SB_OK:
            raise _errors.LayoutMismatch("the memory objects do not have the sizes that these limits need")
        return region

    @staticmethod
    def attach(int control_fd, int ring_fd):
        cdef Region region = Region.__new__(Region)
        header = Region.read_header(control_fd)
        if header["magic"] != SB_MAGIC or header["layout_version"] != SB_LAYOUT_VERSION or header["fingerprint"] != FINGERPRINT:
            raise _errors.LayoutMismatch(
                f"the broker's memory has layout {header['layout_version']}, fingerprint {header['fingerprint']:016x}; "
                f"this build of shmbroker has layout {SB_LAYOUT_VERSION}, fingerprint {FINGERPRINT:016x}. "
                "Stop all processes of the broker and start them with one version")
        if sb_region_map(&region.r, control_fd, ring_fd, 0) != SB_OK:
            raise _errors.LayoutMismatch("the broker's memory does not pass its checks: sizes, limits or watermarks make no sense")
        region.waiter_owner = region.r.limits.clients + <uint32_t>ROLES["supervisor"]
        return region

    @staticmethod
    def seal(int control_fd, int64_t timeout_ns):
        cdef unsigned char[::1] control = _mmap.mmap(control_fd, 0)
        cdef uint64_t at = Region.read_header(control_fd)["lock_at"]
        cdef pthread_mutex_t *mutex
        cdef int code
        if at % 8 or at < sizeof(sb_header) or at > <uint64_t>control.shape[0] - sizeof(pthread_mutex_t):
            raise _errors.LayoutMismatch(f"the control segment's header names an append lock at byte {at}")
        mutex = <pthread_mutex_t *>&control[<Py_ssize_t>at]
        with nogil:
            code = sb_mutex_seal(mutex, sb_now_ns() + timeout_ns)
        if code == SB_TIMEOUT:
            raise _errors.NotReady(
                f"process {sb_mutex_holder(mutex)} holds the append lock of memory of another version and does not go on: "
                "kill -CONT or kill -9 it")
        if code != SB_OK:
            raise _errors.NotReady("no thread could be started to seal the append lock of memory of another version")

    @staticmethod
    def read_header(int control_fd):
        cdef sb_header h
        data = _os.pread(control_fd, sizeof(h), 0)
        if len(data) != sizeof(h):
            raise _errors.LayoutMismatch(f"the control segment has {len(data)} bytes: too short for a header")
        memcpy(&h, <const char *>data, sizeof(h))
        header = header_dict(&h)
        for name in ("tail", "flushed"):
            header[name] = int.from_bytes(_os.pread(control_fd, 8, header[name + "_at"] & 0x7fffffffffff), "little")
        return header

    @property
    def ring_bytes(self):
        return self.r.ring_bytes

    @property
    def segment_bytes(self):
        return self.r.segment_bytes

    @property
    def max_message_bytes(self):
        return self.r.limits.max_message_bytes

    @property
    def header(self):
        return header_dict(&self.open().control.header)

    @property
    def limits(self):
        cdef sb_limits *limits = &self.open().limits
        return {
            "clients": limits.clients, "waiters": limits.waiters, "topics": limits.topics,
            "queues": limits.queues, "groups": limits.groups,
            "claim_tables": limits.claim_tables, "claim_window": limits.claim_window, "overflow_claims": limits.overflow_claims,
            "ids": limits.ids, "blocks": limits.blocks, "reserve_bytes": limits.reserve_bytes,
            "max_message_bytes": limits.max_message_bytes,
        }

    def get(self, str word):
        return sb_load_last(mark(self.open(), word))  # SYNC: write_limit, of what was read in ring_view()

    def set(self, str word, uint64_t value):
        cdef sb_region *r = self.open()
        if word != "replicated":
            sb_store(mark(r, word), value)
        if word == "dispatched":
            sb_wake_position(r, SB_WAIT_DISPATCH, value)
        elif word == "replicated":
            sb_publish_replicated(r, value)
        elif word == "state" or word == "fenced":
            sb_wake_everybody(r)

    def raise_to(self, str word, uint64_t value):
        cdef sb_word *w = mark(self.open(), word)
        sb_raise(w, value)
        return sb_load(w)

    def note_damage(self, uint64_t position):
        note_damage(self.open(), position)

    def ring_view(self):
        self.open()
        return memoryview(_RingBuffer(self))

    def read_raw(self, uint64_t position):
        cdef sb_region *r = self.open()
        cdef uint32_t size = 4096
        cdef bytes buffer
        cdef int code = SB_NO_SPACE
        while code == SB_NO_SPACE:
            buffer = PyBytes_FromStringAndSize(NULL, size)
            code = sb_ring_read(r, position, <uint8_t *>PyBytes_AS_STRING(buffer), <uint64_t>len(buffer), &size)
        return buffer[:size] + bytes(-size % SB_RECORD_ALIGN) if code == SB_OK else None

    # -- workers

    def worker_register(self, str role):
        """This process is the worker of that role now; wait slots of its predecessor are freed."""
        cdef sb_region *r = self.open()
        cdef uint32_t index = ROLES[role]
        cdef sb_worker *w = sb_worker_at(r, index)
        self.waiter_owner = r.limits.clients + index
        sb_waiter_reap(r, self.waiter_owner)
        sb_store(&w.pid, _os.getpid())
        sb_store(&w.start_ticks, sb_start_ticks(_os.getpid()))
        sb_add(&w.starts, 1)
        sb_store(&w.beat_ns, sb_now_ns())

    def worker_sleep(self, str role, uint32_t mode, uint64_t seen_position, int64_t timeout_ns):
        cdef sb_region *r = self.open()
        cdef uint32_t index = ROLES[role]
        cdef int64_t deadline = sb_now_ns() + timeout_ns
        cdef int code
        with nogil:
            code = sb_worker_sleep(r, index, mode, seen_position, deadline)
        if code == SB_INTERRUPTED:
            check_signals()
        return code == SB_OK

    def worker_wake(self, str role):
        return sb_worker_post(self.open(), ROLES[role], 1)

    def worker_beat(self, str role):
        sb_store(&sb_worker_at(self.open(), ROLES[role]).beat_ns, sb_now_ns())

    def workers(self):
        cdef sb_region *r = self.open()
        cdef sb_worker *w
        result = []
        for role, index in ROLES.items():
            w = sb_worker_at(r, index)
            if sb_load(&w.starts):
                result.append({
                    "role": role, "pid": sb_load(&w.pid), "start_ticks": sb_load(&w.start_ticks), "starts": sb_load(&w.starts),
                    "beat_ns": sb_load(&w.beat_ns), "asleep": bool(w.waiting),
                })
        return result

    def publish_flushed(self, uint64_t position):
        return sb_publish_flushed(self.open(), position)

    def publish_store_state(self, uint64_t state, uint64_t error):
        cdef sb_region *r = self.open()
        sb_store(&sb_marks(r).store_errno, error)
        sb_store(&sb_marks(r).store_state, state)
        sb_wake_everybody(r)

    def append_system(self, uint8_t kind, bodies, *, uint16_t queue_id=SB_NO_QUEUE, uint32_t topic_id=0, int64_t timeout_ns=0):
        cdef sb_region *r = self.open()
        cdef uint32_t count = <uint32_t>len(bodies), waiter = SB_NIL, owner = self.waiter_owner, i
        cdef sb_item *items
        cdef uint64_t end = 0, start
        cdef int64_t deadline = sb_now_ns() + timeout_ns
        cdef int code = SB_INTERRUPTED
        cdef bytes body
        cdef list held = [bytes(b) for b in bodies]
        if not held:
            raise ValueError("an append has at least one record")
        items = <sb_item *>malloc(count * sizeof(sb_item))
        if items == NULL:
            raise MemoryError
        try:
            memset(items, 0, count * sizeof(sb_item))
            for i in range(count):
                body = held[i]
                items[i].body = <const uint8_t *>PyBytes_AS_STRING(body)
                items[i].body_bytes = <uint32_t>len(body)
                items[i].payload_crc = sb_crc32c(0, items[i].body, items[i].body_bytes)
                items[i].born_ns = sb_realtime_ns()
                items[i].queue_slot = SB_NIL
                items[i].queue_id = queue_id
                items[i].topic_id = topic_id
                items[i].kind = kind
            while code == SB_INTERRUPTED:
                check_signals()
                with nogil:
                    code = sb_append_wait(r, owner, items, count, NULL, 0, SB_APPEND_SYSTEM, deadline, &end, &waiter)
            if code != SB_OK:
                raise code_error(r, code, "appending a system record")
            sb_append_wake(r, items, count)
            start = items[0].position
            return start, end
        finally:
            if waiter != SB_NIL:
                sb_waiter_give(r, waiter)
            free(items)

    def fire(self, list records not None, uint64_t turn, int64_t timeout_ns):
        return append_fired(self.open(), self.waiter_owner, records, None, turn, timeout_ns)

    def carry_on(self, list records not None, list origins not None, uint64_t turn, int64_t timeout_ns):
        return append_fired(self.open(), self.waiter_owner, records, origins, turn, timeout_ns) is not None

    # -- definitions

    cdef int define(self, str what, str name, uint32_t queues, uint32_t permission, uint32_t number, bint record,
                    uint32_t *slot, const char *text=NULL) except -100:
        """Define, delete (a group with the topic ``text``) or set a group's ``text``, waiting for lock, room and disk; looks at
        signals at least every 100 ms."""
        cdef sb_region *r = self.open()
        cdef bytes encoded = name.encode()
        cdef const char *c_name = encoded
        cdef bint topic = what.endswith("topic"), delete = what.startswith("deleting"), retry = "retry" in what
        cdef bint pausing = what.startswith("pausing"), resuming = what.startswith("resuming")
        cdef int64_t deadline = sb_now_ns() + DEFINE_TIMEOUT_NS, slice
        cdef uint64_t needed = 0
        cdef int code = SB_TIMEOUT
        while True:
            check_signals()
            slice = min(deadline, sb_now_ns() + SLICE_NS)
            with nogil:
                if pausing or resuming:
                    code = sb_group_set_paused(r, c_name, pausing, number, record, slice, &needed)
                elif topic and delete:
                    code = sb_topic_delete(r, c_name, slice, &needed)
                elif topic:
                    code = sb_topic_define(r, c_name, queues, permission, number, record, slice, slot, &needed)
                elif delete:
                    code = sb_group_delete(r, c_name, text, slice, &needed)
                elif text != NULL and retry:
                    code = sb_group_set_retry(r, c_name, text, number, record, slice, &needed)
                elif text != NULL:
                    code = sb_group_set_subscription(r, c_name, text, number, record, slice, &needed)
                else:
                    code = sb_group_define(r, c_name, number, record, slice, slot, &needed)
            if not self.comes_to_pass(code, deadline, slice, needed):
                break
        if code == SB_TABLE_FULL or code == SB_OK or code == SB_NOT_FOUND or code == SB_IN_USE:
            return code
        raise code_error(r, code, f"{what} {name!r}")

    cdef bint comes_to_pass(self, int code, int64_t deadline, int64_t slice, uint64_t needed) except -1:
        """Whether a change of definitions that was answered so is worth another try; waits for room, or for the disk."""
        if sb_now_ns() >= deadline:
            return False
        if code == SB_NO_SPACE:
            self.wait_for("flushed", needed, slice - sb_now_ns())
        elif code == SB_NO_CAPACITY and sb_load(&sb_marks(&self.r).store_state) != SB_STORE_FULL:
            self.wait_for("flushed", sb_load(&sb_marks(&self.r).tail) + 1, min(slice - sb_now_ns(), 2_000_000))
        else:
            return code == SB_TIMEOUT
        return True

    def define_topic(self, str name, uint32_t queues, uint32_t permission=0, uint32_t topic_id=0, next_offsets=None,
                     bint record=True):
        cdef sb_region *r = self.open()
        cdef uint32_t slot = 0
        if self.define("defining topic", name, queues, permission, topic_id, record, &slot) == SB_TABLE_FULL:
            raise _errors.LimitReached(
                f"topic {name!r} with {queues} queues does not fit: the broker has room for max_topics = {r.limits.topics} "
                f"topics and max_queues = {r.limits.queues} queues in all")
        topic_id = sb_topic_at(r, slot).topic_id
        for queue_id, next_offset in enumerate(next_offsets or ()):
            self.restore_queue(topic_id, queue_id, next_offset, 0)
        return topic_id

    def delete_topic(self, str name):
        cdef uint32_t slot = 0
        if self.define("deleting topic", name, 0, 0, 0, True, &slot) == SB_NOT_FOUND:
            raise _errors.TopicNotExist(f"topic {name!r} does not exist")

    def define_group(self, str name, uint32_t group_id=0, bint record=True):
        cdef sb_region *r = self.open()
        cdef uint32_t slot = 0
        if self.define("defining group", name, 0, 0, group_id, record, &slot) == SB_TABLE_FULL:
            raise _errors.LimitReached(f"group {name!r} does not fit: the broker has room for max_groups = {r.limits.groups}")
        return sb_group_at(r, slot).group_id

    def set_subscription(self, str name, bytes text not None, uint32_t generation=0, bint record=True):
        cdef uint32_t slot = 0
        if self.define("subscribing group", name, 0, 0, generation, record, &slot, text) == SB_NOT_FOUND:
            raise _errors.GroupNotExist(f"group {name!r} does not exist")

    def set_retry(self, str name, bytes text not None, uint32_t generation=0, bint record=True):
        cdef uint32_t slot = 0
        if self.define("setting the retry policy of group", name, 0, 0, generation, record, &slot, text) == SB_NOT_FOUND:
            raise _errors.GroupNotExist(f"group {name!r} does not exist")

    def set_paused(self, str name, bint paused, uint32_t generation=0, bint record=True):
        cdef uint32_t slot = 0
        cdef str what = "pausing group" if paused else "resuming group"
        if self.define(what, name, 0, 0, generation, record, &slot) == SB_NOT_FOUND:
            raise _errors.GroupNotExist(f"group {name!r} does not exist")
        if record:
            sb_wake_everybody(&self.r)  # who sleeps in a paused group hears of no message

    def retry_text(self, str name):
        cdef char text[SB_SUBSCRIPTION_BYTES]
        cdef uint32_t slot = 0
        cdef bytes encoded = name.encode()
        if sb_group_find(self.open(), encoded, &slot) != SB_OK:
            raise _errors.GroupNotExist(f"group {name!r} does not exist")
        sb_group_retry(&self.r, slot, text)
        return text.decode("ascii", "replace")

    def wake_everybody(self):
        sb_wake_everybody(self.open())

    def delete_group(self, str name, str retry_topic):
        cdef uint32_t slot = 0
        cdef bytes topic = retry_topic.encode()
        cdef int code = self.define("deleting group", name, 0, 0, 0, True, &slot, topic)
        if code == SB_NOT_FOUND:
            raise _errors.GroupNotExist(f"group {name!r} does not exist")
        if code == SB_IN_USE:
            raise _errors.GroupInUse(f"group {name!r}: live processes consume in it{self.members_text(name)}; stop them first")

    cdef str members_text(self, str name):
        """``: 4711 (billing), 4712 (billing)``; nothing if they have left meanwhile."""
        members = {slot for group in self.groups() if group["name"] == name for slot in group["members"]}
        found = [f"{client['pid']} ({client['name']})" for client in self.clients() if client["slot"] in members]
        return ": " + ", ".join(found) if found else ""

    def wait_for(self, str word, uint64_t target, int64_t timeout_ns):
        """Wait until ``flushed``, ``replicated`` or ``dispatched`` has reached ``target``: True, or False at the deadline."""
        cdef sb_region *r = self.open()
        cdef uint32_t kind = {"flushed": SB_WAIT_FLUSH, "replicated": SB_WAIT_REPLICATE, "dispatched": SB_WAIT_DISPATCH}[word]
        cdef uint32_t waiter = SB_NIL
        cdef int64_t deadline = sb_now_ns() + timeout_ns
        cdef int code = sb_waiter_take(r, self.waiter_owner, &waiter)
        if code != SB_OK:
            raise code_error(r, code, "waiting")
        try:
            code = SB_INTERRUPTED
            while code == SB_INTERRUPTED:
                check_signals()
                with nogil:
                    code = sb_wait_position(r, waiter, kind, target, deadline)
        finally:
            sb_waiter_give(r, waiter)
        if code == SB_OK or code == SB_TIMEOUT:
            return code == SB_OK
        raise code_error(r, code, f"waiting for {word}")

    def topics(self, *, bint exact=False):
        """exact: the next offsets of one moment between two appends (for a snapshot); else as they are."""
        cdef sb_region *r = self.open()
        cdef uint64_t *offsets = NULL
        cdef int64_t deadline = sb_now_ns() + DEFINE_TIMEOUT_NS
        cdef int code
        if not exact:
            return self.list_topics(NULL)
        offsets = <uint64_t *>malloc(r.limits.queues * sizeof(uint64_t))
        if offsets == NULL:
            raise MemoryError
        try:
            with nogil:
                code = sb_append_read_offsets(r, NULL, r.limits.queues, deadline, offsets)
            if code != SB_OK:
                raise code_error(r, code, "reading the queues' offsets")
            return self.list_topics(offsets)
        finally:
            free(offsets)

    cdef list list_topics(self, const uint64_t *offsets):
        cdef sb_region *r = self.open()
        cdef uint32_t i, n, q
        cdef uint32_t slots[SB_QUEUES_PER_TOPIC_MAX]
        cdef sb_topic *t
        cdef sb_queue *queue
        cdef uint64_t next_offset
        result = []
        for i in range(r.limits.topics):
            t = sb_topic_at(r, i)
            if sb_load(&t.state) != SB_SLOT_LIVE:
                continue
            n = sb_topic_queues(r, i, slots, SB_QUEUES_PER_TOPIC_MAX)
            queues = []
            for q in range(n):
                queue = sb_queue_at(r, slots[q])
                next_offset = sb_load(&queue.next_offset)
                if offsets != NULL:  # counters only grow: a smaller one is that of a queue made here since
                    next_offset = min(next_offset, offsets[slots[q]])
                queues.append({
                    "queue_id": q, "slot": slots[q], "next_offset": next_offset,
                    "first_offset": sb_load(&queue.first_offset), "index_first": sb_load(&queue.index_first),
                    "bytes": sb_load(&queue.bytes),
                })
            result.append({
                "name": t.name.decode("ascii", "replace"), "topic_id": t.topic_id, "permission": sb_load(&t.permission),
                "slot": i, "queues": queues,
            })
        return result

    def groups(self):
        cdef sb_region *r = self.open()
        cdef uint32_t i
        cdef uint64_t generation, retry_generation
        cdef char text[SB_SUBSCRIPTION_BYTES]
        cdef char retry[SB_SUBSCRIPTION_BYTES]
        cdef sb_group *g
        result = []
        for i in range(r.limits.groups):
            g = sb_group_at(r, i)
            if sb_load(&g.state) == SB_SLOT_LIVE:
                generation = sb_group_subscription(r, i, text)
                retry_generation = sb_group_retry(r, i, retry)
                result.append({
                    "name": g.name.decode("ascii", "replace"), "group_id": g.group_id, "slot": i,
                    "subscription": text.decode("ascii", "replace"), "subscription_set": bool(sb_load(&g.subscription_set)),
                    "subscription_generation": generation,
                    "retry": retry.decode("ascii", "replace"), "retry_generation": retry_generation,
                    "paused": sb_group_is_paused(r, i), "pause_generation": sb_load(&g.pause_generation),
                    "members": [c for c in range(r.limits.clients) if sb_load(&g.members[c // 64]) >> (c % 64) & 1],
                })
        return result

    cdef sb_queue *queue_of(self, uint32_t topic_id, uint32_t queue_id) except NULL:
        cdef sb_region *r = self.open()
        cdef uint32_t slot = 0, n
        cdef uint32_t slots[SB_QUEUES_PER_TOPIC_MAX]
        if sb_topic_by_id(r, topic_id, &slot) != SB_OK:
            raise _errors.TopicNotExist(f"there is no topic with id {topic_id}")
        n = sb_topic_queues(r, slot, slots, SB_QUEUES_PER_TOPIC_MAX)
        if queue_id >= n:
            raise _errors.QueueNotExist(f"topic id {topic_id} has {n} queues, not number {queue_id}")
        return sb_queue_at(r, slots[queue_id])

    def restore_queue(self, uint32_t topic_id, uint32_t queue_id, uint64_t next_offset, uint64_t first_offset):
        cdef sb_queue *q = self.queue_of(topic_id, queue_id)
        sb_raise(&q.next_offset, next_offset)
        sb_raise(&q.index_first, next_offset)  # nothing of it is in the ring: readers use the consume queue
        sb_raise(&q.first_offset, first_offset)

    def restore_index(self, uint32_t topic_id, uint32_t queue_id, uint64_t offset, bytes positions not None):
        cdef sb_region *r = self.open()
        cdef uint32_t slot = <uint32_t>(self.queue_of(topic_id, queue_id) - sb_queue_at(r, 0))
        cdef uint32_t count = <uint32_t>(len(positions) // sizeof(uint64_t))
        cdef int code = sb_index_restore(r, slot, offset, <const uint64_t *>PyBytes_AS_STRING(positions), count)
        if code != SB_OK:
            raise code_error(r, code, f"restoring the index of queue {queue_id} of topic id {topic_id}")

    def set_first_offset(self, uint32_t topic_id, uint32_t queue_id, uint64_t first_offset):
        sb_raise(&self.queue_of(topic_id, queue_id).first_offset, first_offset)

    def dedup_ids(self, uint64_t newest):
        return dedup_id_bodies(self.open(), newest)

    def remember_id(self, uint64_t incarnation, uint64_t sequence, uint64_t position, *, bint given=False):
        cdef int code = sb_remember_id(self.open(), incarnation, sequence, position, given)
        if code != SB_OK:
            raise code_error(&self.r, code, "remembering an id")

    # -- group progress: progress.pxi

    def progress(self):
        return progress_tables(self.open())

    def consumed_queues(self):
        return consumed_places(self.open())

    def progress_records(self, bint only_changed):
        return progress_bodies(self.open(), only_changed)

    def progress_recorded(self, bodies):
        progress_noted(self.open(), bodies)

    def restore_progress(self, bytes body not None):
        merge_progress(self.open(), body)

    def reset_progress(self, uint32_t group_id, uint32_t topic_id, uint32_t queue_id, uint64_t offset):
        cdef sb_region *r = self.open()
        cdef int64_t deadline = sb_now_ns() + DEFINE_TIMEOUT_NS, slice
        cdef uint64_t needed = 0
        cdef sb_reset done
        cdef int code
        while True:
            check_signals()
            slice = min(deadline, sb_now_ns() + SLICE_NS)
            with nogil:
                code = sb_claims_reset(r, group_id, topic_id, queue_id, offset, slice, &done, &needed)
            if not self.comes_to_pass(code, deadline, slice, needed):
                break
        if code != SB_OK:
            raise reset_error(r, code, group_id, topic_id, queue_id)
        return (None if done.before == SB_NO_OFFSET else done.before), done.after

    # -- janitor

    def clients(self):
        cdef sb_region *r = self.open()
        cdef uint32_t i
        cdef uint64_t word
        cdef sb_client *c
        result = []
        for i in range(r.limits.clients):
            c = sb_client_at(r, i)
            word = sb_load(&c.state)
            if sb_client_state_of(word) == SB_CLIENT_FREE:
                continue
            result.append({
                "slot": i, "generation": sb_client_generation_of(word), "pid": sb_client_pid_of(word),
                "live": sb_client_state_of(word) == SB_CLIENT_LIVE, "start_ticks": sb_load(&c.start_ticks),
                "name": c.name.decode("utf-8", "replace"), "sends": sb_load(&c.sends), "receives": sb_load(&c.receives),
                "acks": sb_load(&c.acks), "attached_ns": sb_load(&c.attached_ns), "incarnation": sb_load(&c.incarnation),
            })
        return result

    def client_states(self):
        cdef sb_region *r = self.open()
        cdef uint32_t i
        cdef bytes states = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(r.limits.clients * sizeof(uint64_t)))
        for i in range(r.limits.clients):
            (<uint64_t *>PyBytes_AS_STRING(states))[i] = sb_load(&sb_client_at(r, i).state)
        return states

    def reap(self, uint32_t slot, uint32_t generation):
        cdef uint32_t released = 0
        cdef sb_region *r = self.open()
        with nogil:
            sb_client_reap(r, slot, generation, &released)
        return released

    def janitor_pass(self, int64_t now_ns, uint32_t turn=0):
        cdef uint32_t expired = 0, next_ms = 0
        cdef sb_region *r = self.open()
        with nogil:
            sb_janitor_pass(r, now_ns, turn, &expired, &next_ms)
        return expired, (-1 if next_ms == SB_NIL else <int64_t>next_ms * 1_000_000)

    def lock_holder(self):
        return sb_mutex_holder(&self.open().control.locks.append)

    def waiters(self):
        cdef sb_region *r = self.open()
        cdef uint32_t i
        cdef sb_waiter *w
        kinds = {1: "flush", 2: "replicate", 3: "space", 4: "message", 5: "dispatch"}
        states = {1: "idle", 2: "waiting", 3: "posted"}
        result = []
        for i in range(r.limits.waiters):
            w = sb_waiter_at(r, i)
            if <uint32_t>w.state & 0xff:
                result.append({
                    "slot": i, "client": (<uint32_t>w.state >> 8) - 1, "state": states.get(<uint32_t>w.state & 0xff, "?"),
                    "kind": kinds.get(w.kind, "?"), "target": sb_load(&w.target),
                })
        return result


def failpoint_names():
    return [sb_failpoint_name(i).decode() for i in range(SB_FP_COUNT)]


def failpoint_arm(str name, str action, long at):
    names = failpoint_names()
    if name not in names or action not in ("off", "kill", "stop", "exit"):
        raise ValueError(f"no native failpoint {name!r} with action {action!r}")
    sb_failpoint_arm(names.index(name), ("off", "kill", "stop", "exit").index(action), at)
