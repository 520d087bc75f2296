# native.pxi: what the binding uses of the C headers for shared memory. Fields that Cython need not know are left out.

from posix.types cimport off_t
from libc.stdint cimport INT64_MAX, UINT32_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "codes.h" nogil:
    enum:
        SB_DUPLICATE
        SB_BEHIND
        SB_TIMEOUT
        SB_INTERRUPTED
        SB_LOCKED
        SB_NO_SPACE
        SB_NO_CAPACITY
        SB_READ_ONLY
        SB_NOT_RUNNING
        SB_FENCED
        SB_TOO_LARGE
        SB_LOST
        SB_TABLE_FULL
        SB_BROKEN
        SB_GONE
        SB_EXISTS
        SB_NO_INDEX
        SB_IN_USE

cdef extern from "layout.h" nogil:
    enum:
        SB_NIL
        SB_NO_QUEUE
        SB_ROLES_MAX
        SB_ID_WINDOW
        SB_BLOCK_ENTRIES
        SB_FLAG_DEDUP
        SB_FLAG_WAIT_STORE_NOT_OK
        SB_FLAG_LATE
        SB_STATE_STARTING
        SB_STATE_RUNNING
        SB_STATE_STOPPED
        SB_STORE_OK
        SB_STORE_FULL
        SB_STORE_READ_ONLY
        SB_SLOT_LIVE
        SB_CLIENT_FREE
        SB_CLIENT_LIVE
        SB_WAIT_FREE
        SB_WAIT_FLUSH
        SB_WAIT_REPLICATE
        SB_WAIT_SPACE
        SB_WAIT_DISPATCH
        SB_VISIBLE_APPEND
        SB_VISIBLE_FLUSH

    const uint64_t SB_MAGIC
    ctypedef uint64_t sb_word   # _Atomic; only used through sb_load and friends
    ctypedef uint32_t sb_half
    ctypedef struct sb_header:
        uint64_t magic
        uint32_t layout_version
        uint32_t record_version
        uint64_t fingerprint
        uint64_t control_bytes
        uint64_t ring_bytes
        uint64_t segment_bytes
        uint64_t tail_at
        uint64_t flushed_at
        uint64_t undo_at
        uint64_t lock_at
        uint64_t directory_device
        uint64_t directory_inode
        uint64_t pid_namespace
        uint64_t ipc_namespace
        uint8_t instance[16]
        uint8_t boot_id[16]
        char ring_name[64]
        uint32_t owner_uid
    ctypedef struct sb_limits:
        uint32_t clients, waiters, topics, queues, groups, claim_tables, claim_window, overflow_claims, ids, blocks
        uint32_t reserve_bytes
        uint32_t max_message_bytes
    ctypedef struct sb_watermarks:
        sb_word tail
        sb_word write_limit
        sb_word flushed
        sb_word dispatched
        sb_word replicated
        sb_word user_capacity
        sb_word system_capacity
        sb_word indexed
        sb_word kept
        sb_word snapshot
        sb_word state
        sb_word store_state
        sb_word store_errno
        sb_word fenced
        sb_word epoch
        sb_word sync_flush
        sb_word visible_after
        sb_word topic_generation
        sb_word supervisor_pid
        sb_word supervisor_start_ticks
        sb_word embedded
        sb_word next_topic_id
        sb_word next_group_id
        sb_word waiters_high
        sb_word damaged
        sb_word lock_takeovers
        sb_word timer_turn
        sb_word timers_kept
        sb_word timers_wanted
        sb_word timed
        sb_word timer_look
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct sb_locks:
        pthread_mutex_t append
        pthread_mutex_t definition
    ctypedef struct sb_control:
        sb_header header
        sb_watermarks marks
        sb_locks locks
    ctypedef struct sb_worker:
        sb_half sleep
        sb_half waiting
        sb_word pid
        sb_word start_ticks
        sb_word starts
        sb_word beat_ns
    ctypedef struct sb_client:
        sb_word state
        sb_word pid
        sb_word start_ticks
        sb_word incarnation
        sb_word attached_ns
        sb_word sends
        sb_word receives
        sb_word acks
        char name[48]
    ctypedef struct sb_waiter:
        sb_half state
        uint32_t kind
        uint32_t group
        sb_word target
    ctypedef struct sb_topic:
        sb_word state
        sb_word permission
        sb_word queue_count
        uint32_t topic_id
        char name[256]
        sb_word last_position
    ctypedef struct sb_queue:
        sb_word next_offset
        sb_word index_first
        sb_word first_offset
        sb_word state
        uint32_t topic_slot
        uint32_t topic_id
        uint32_t queue_id
        sb_word bytes
    ctypedef struct sb_group:
        sb_word state
        uint32_t group_id
        sb_word subscription_generation
        sb_word subscription_set
        char name[256]
        sb_word pause_generation
        sb_word members[64]
    ctypedef struct sb_known_id:
        uint64_t incarnation
        uint64_t sequence
        uint64_t position
    ctypedef struct sb_id:
        sb_word incarnation
        sb_word sequence
        sb_word position

cdef extern from "region.h" nogil:
    ctypedef struct sb_region:
        uint8_t *base
        sb_control *control
        uint8_t *ring
        uint64_t ring_bytes
        uint64_t ring_mask
        uint64_t control_bytes
        uint64_t segment_bytes
        sb_limits limits
        uint32_t epoch
    uint64_t sb_fingerprint()
    uint64_t sb_control_size(sb_limits *limits)
    int sb_region_map(sb_region *region, int control_fd, int ring_fd, int create)
    int sb_region_format(sb_region *region, const sb_header *header, const sb_limits *limits, uint64_t tail, uint32_t epoch)
    void sb_region_unmap(sb_region *region)
    sb_watermarks *sb_marks(const sb_region *r)
    sb_worker *sb_worker_at(const sb_region *r, uint32_t i)
    sb_client *sb_client_at(const sb_region *r, uint32_t i)
    sb_waiter *sb_waiter_at(const sb_region *r, uint32_t i)
    sb_topic *sb_topic_at(const sb_region *r, uint32_t i)
    sb_queue *sb_queue_at(const sb_region *r, uint32_t i)
    sb_group *sb_group_at(const sb_region *r, uint32_t i)
    uint64_t sb_load(const sb_word *w)
    uint64_t sb_load_last(const sb_word *w)
    void sb_store(sb_word *w, uint64_t v)
    void sb_raise(sb_word *w, uint64_t v)
    void sb_fence()
    void sb_add(sb_word *w, uint64_t n)
    int sb_cas(sb_word *w, uint64_t *expected, uint64_t v)

cdef extern from "ipc.h" nogil:
    int sb_fork_generation
    void sb_fork_watch()
    int64_t sb_now_ns()
    int64_t sb_realtime_ns()
    uint32_t sb_mutex_holder(const pthread_mutex_t *mutex)
    int sb_mutex_seal(pthread_mutex_t *mutex, int64_t deadline_ns) nogil
    uint64_t sb_start_ticks(uint32_t pid)

cdef extern from "wait.h" nogil:
    int sb_waiter_take(sb_region *r, uint32_t client, uint32_t *slot)
    void sb_waiter_give(sb_region *r, uint32_t slot)
    uint32_t sb_waiter_reap(sb_region *r, uint32_t client)
    int sb_poll_position(sb_region *r, uint32_t kind, uint64_t target, int64_t deadline_ns, int64_t pause_ns)
    int sb_wait_position(sb_region *r, uint32_t slot, uint32_t kind, uint64_t target, int64_t deadline_ns)
    void sb_wait_message_begin(sb_region *r, uint32_t slot, uint32_t group, const uint32_t *topics, uint32_t count)
    int sb_wait_message_sleep(sb_region *r, uint32_t slot, int64_t deadline_ns)
    void sb_wait_message_end(sb_region *r, uint32_t slot, const uint32_t *topics, uint32_t count)
    uint32_t sb_wake_position(sb_region *r, uint32_t kind, uint64_t reached)
    uint32_t sb_publish_flushed(sb_region *r, uint64_t position)
    uint32_t sb_publish_replicated(sb_region *r, uint64_t position)
    uint32_t sb_wake_everybody(sb_region *r)
    uint32_t sb_waiter_wake(sb_region *r, uint32_t slot)
    uint32_t sb_wake_group(sb_region *r, uint32_t topic, uint32_t group)
    uint32_t sb_wake_member(sb_region *r, uint32_t group, uint32_t client)
    uint32_t sb_wake_topics_since(sb_region *r, uint64_t since, uint64_t to)
    int sb_worker_sleep(sb_region *r, uint32_t role, uint32_t mode, uint64_t seen, int64_t deadline_ns)
    uint32_t sb_worker_post(sb_region *r, uint32_t role, int urgent)

cdef extern from "ring.h" nogil:
    ctypedef struct sb_item:
        const uint8_t *tags
        const uint8_t *keys
        const uint8_t *properties
        const uint8_t *body
        uint32_t tags_bytes, keys_bytes, properties_bytes, body_bytes
        uint32_t payload_crc
        uint32_t tag_hash
        uint64_t incarnation, sequence
        int64_t born_ns
        uint32_t queue_slot
        uint32_t topic_id
        uint16_t queue_id
        uint8_t kind, flags, attempts
        uint64_t position, queue_offset
    ctypedef struct sb_effect:
        sb_word *word
        uint64_t expected, desired
        int claim
    enum:
        SB_APPEND_SYSTEM
        SB_APPEND_RESEND
        SB_APPEND_DEDUP
    int sb_append(sb_region *r, uint32_t client, sb_item *items, uint32_t count, const sb_effect *effects,
                  uint32_t effect_count, uint32_t options, int64_t deadline_ns, uint64_t *end, uint64_t *needed)
    int sb_append_wait(sb_region *r, uint32_t client, sb_item *items, uint32_t count, const sb_effect *effects,
                       uint32_t effect_count, uint32_t options, int64_t deadline_ns, uint64_t *end, uint32_t *waiter)
    void sb_append_wake(sb_region *r, const sb_item *items, uint32_t count)
    int sb_append_read_offsets(sb_region *r, const uint32_t *queues, uint32_t count, int64_t deadline_ns, uint64_t *next)
    int sb_append_lock_check(sb_region *r)
    int sb_ring_read(const sb_region *r, uint64_t position, uint8_t *buffer, uint64_t room, uint32_t *size)
    int sb_ring_peek(const sb_region *r, uint64_t position, sb_record *header)
    int sb_ring_peek_properties(const sb_region *r, const sb_record *header, uint8_t *buffer)
    int sb_remember_id(sb_region *r, uint64_t incarnation, uint64_t sequence, uint64_t position, int given)
    int sb_append_read_ids(sb_region *r, uint64_t newest, uint64_t *next, sb_known_id *ids, uint32_t room, uint32_t *count,
                           int64_t deadline_ns)

cdef extern from "definition.h" nogil:
    enum:
        SB_QUEUES_PER_TOPIC_MAX
    int sb_topic_find(const sb_region *r, const char *name, uint32_t *slot)
    int sb_topic_by_id(const sb_region *r, uint32_t topic_id, uint32_t *slot)
    int sb_group_find(const sb_region *r, const char *name, uint32_t *slot)
    int sb_group_by_id(const sb_region *r, uint32_t group_id, uint32_t *slot)
    uint32_t sb_topic_queues(const sb_region *r, uint32_t topic, uint32_t *slots, uint32_t room)
    int sb_topic_define(sb_region *r, const char *name, uint32_t queues, uint32_t permission, uint32_t topic_id, int record,
                        int64_t deadline_ns, uint32_t *slot, uint64_t *needed)
    int sb_topic_delete(sb_region *r, const char *name, int64_t deadline_ns, uint64_t *needed)
    int sb_group_define(sb_region *r, const char *name, uint32_t group_id, int record, int64_t deadline_ns, uint32_t *slot,
                        uint64_t *needed)
    int sb_group_set_subscription(sb_region *r, const char *name, const char *text, uint64_t generation, int record,
                                  int64_t deadline_ns, uint64_t *needed)
    int sb_group_set_retry(sb_region *r, const char *name, const char *text, uint64_t generation, int record,
                           int64_t deadline_ns, uint64_t *needed)
    int sb_group_set_paused(sb_region *r, const char *name, int paused, uint64_t generation, int record, int64_t deadline_ns,
                            uint64_t *needed)
    int sb_group_delete(sb_region *r, const char *name, const char *retry_topic, int64_t deadline_ns, uint64_t *needed)
    int sb_definition_lock(sb_region *r, int64_t deadline_ns)
    void sb_definition_unlock(sb_region *r)

cdef extern from "membership.h" nogil:
    int sb_group_join(sb_region *r, uint32_t group, const char *name, uint32_t slot, const char *text, int in_order,
                      int self_counts, int64_t deadline_ns, uint64_t *generation)
    void sb_group_leave(sb_region *r, uint32_t group, uint32_t slot)
    uint64_t sb_group_subscription(const sb_region *r, uint32_t group, char *text)
    bint sb_group_is_paused(const sb_region *r, uint32_t group)
    uint64_t sb_group_retry(const sb_region *r, uint32_t group, char *text)

cdef extern from "queue_index.h" nogil:
    int sb_index_restore(sb_region *r, uint32_t queue, uint64_t offset, const uint64_t *positions, uint32_t count)

cdef extern from "janitor.h" nogil:
    int sb_client_join(sb_region *r, uint32_t pid, uint64_t start_ticks, uint64_t incarnation, const char *name,
                       uint32_t *slot, uint32_t *generation)
    int sb_client_reap(sb_region *r, uint32_t slot, uint32_t generation, uint32_t *released)
    uint32_t sb_group_give_back(sb_region *r, uint32_t group, uint32_t slot)
    void sb_janitor_pass(sb_region *r, int64_t now_ns, uint32_t turn, uint32_t *expired, uint32_t *next_ms)
    uint32_t sb_client_state_of(uint64_t word)
    uint32_t sb_client_generation_of(uint64_t word)
    uint32_t sb_client_pid_of(uint64_t word)

cdef extern from "failpoint.h" nogil:
    enum:
        SB_FP_COUNT
    const char *sb_failpoint_name(int id)
    void sb_failpoint_arm(int id, int action, long at)
