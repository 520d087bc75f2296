/*
 * layout.h: every structure that lies in shared memory or in the commit log, drawn and asserted. Nothing else.
 *
 * Little-endian, 64-bit machines only (asserted at the foot). Two shared-memory objects belong to a broker:
 *
 *   control   header | watermarks | lock, undo | workers | clients | waiters | topics | queues | groups
 *             | claim tables | overflow claims | id window | index blocks
 *   ring      ring_bytes of records, mapped twice back to back, so that a record may cross the end of the ring
 *
 * Rules that hold for every word below
 *   - a *position* is a byte count since the log began; ring index = position & (ring_bytes - 1)
 *   - an *offset* of a queue is a count of messages; a *slot* is an index into one of the tables
 *   - each atomic word names its writer, or the lock that guards it; a release store names its acquire by a SYNC: label
 *   - whatever is read from here is checked before it is used as an index, a size or an address
 *
 * A change here is a change of SB_LAYOUT_VERSION (memory) or SB_RECORD_VERSION (log); see CONTRIBUTING.md.
 */
#ifndef SHMBROKER_LAYOUT_H
#define SHMBROKER_LAYOUT_H

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define SB_MAGIC 0x524b4f52424d4853ull /* "SHMBROKR" in memory order */
#define SB_LAYOUT_VERSION 2u
#define SB_RECORD_VERSION 1u

#define SB_LINE 128u /* two cache lines: neighbours are prefetched in pairs */
#define SB_NIL 0xffffffffu
#define SB_NAME_BYTES 256u        /* %RETRY% topics reach 255 bytes, and a NUL */
#define SB_GROUP_RECORDS_MAX 1024u /* records of one atomic group (R18) */
#define SB_COPY_BYTES 8192u /* a moved or fired message may be so much larger than one that is sent: errors, and what goes with it */
#define SB_UNDO_MAX 4096u
#define SB_ID_WINDOW 64u /* sequences remembered per client (R17) */
#define SB_BLOCK_ENTRIES 128u
#define SB_ROLES_MAX 8u
#define SB_SUBSCRIPTION_BYTES 2048u
#define SB_CLIENT_WORDS 64u /* bitmap words: at most 4096 clients */

typedef _Atomic uint64_t sb_word;
typedef _Atomic uint32_t sb_half;

/* --------------------------------------------------------------------------------------------------------------
 * The record: the same bytes in the ring, in the log's segments and in a slave.
 *
 *    0        4        8                16       20       24
 *    +--------+--------+----------------+--------+--------+
 *    | size   | crc    | position       | epoch  |unflushd|
 *    +--------+--------+----------------+--------+--------+--------
 * 24 | queue offset    | incarnation    | sequence        |
 *    +-----------------+--------+-------+-+---+--+--------+
 * 48 | born, ns        | topic  | queue   |kind|flag|
 *    +-----------------+--------+---+-----+---+--+----+---+
 * 64 | group bytes | tag hash | tags | keys | props | att| 0 |
 *    +-------------+----------+------+------+-------+----+---+
 * 80 | tags | keys | properties | body ...          | zeros to a multiple of 8
 *
 * size: header and payload without the padding. crc: CRC-32C of the payload, continued over bytes 8..79 of the header
 * (so the payload's part is computed before the append lock is taken, R12). position and epoch are compared as well
 * as covered (R2). unflushed: position - flushed at the moment of the append: says what the writer knew to be on the
 * disk (R1). born: CLOCK_REALTIME of the producer. tags, keys, props: byte counts. att: delivery attempts made before.
 * group bytes: in the first record of a group of several, the padded size of the whole group; else 0 (R18).
 * A record never crosses the end of a segment; fewer than 80 bytes left there are zeros that nobody reads, more are a
 * FILLER record.
 */
#define SB_RECORD_HEADER 80u
#define SB_RECORD_ALIGN 8u
#define SB_RECORD_COVERED 8u /* the header is covered from this byte on */

typedef struct {
    uint32_t size;
    uint32_t crc;
    uint64_t position;
    uint32_t epoch;
    uint32_t unflushed;
    uint64_t queue_offset;
    uint64_t incarnation;
    uint64_t sequence;
    int64_t born_ns;
    uint32_t topic_id;
    uint16_t queue_id;
    uint8_t kind;
    uint8_t flags;
    uint32_t group_bytes;
    uint32_t tag_hash;
    uint16_t tags_bytes;
    uint16_t keys_bytes;
    uint16_t properties_bytes;
    uint8_t attempts;
    uint8_t reserved;
} sb_record;

enum sb_kind {
    SB_KIND_MESSAGE = 1,        /* the only kind that has a queue */
    SB_KIND_FILLER = 2,         /* ends a segment; its payload is zeros and not covered by the CRC */
    SB_KIND_EPOCH = 3,          /* JSON: a new epoch begins here (R2) */
    SB_KIND_TOPIC = 4,          /* JSON: definition or deletion of a topic */
    SB_KIND_GROUP = 5,          /* JSON: definition or deletion of a consumer group */
    SB_KIND_PROGRESS = 6,       /* binary: how far one group is in one queue (R14) */
    SB_KIND_SNAPSHOT_BEGIN = 7, /* JSON: what follows up to the matching end restores everything (R4) */
    SB_KIND_SNAPSHOT_END = 8,
    SB_KIND_IDS = 9,            /* binary: ids of dedup keys, in a snapshot (R17) */
    SB_KIND_TIMER = 10,         /* a message in no queue yet. queue_offset: CLOCK_REALTIME ns at which it is due */
    SB_KIND_FIRED = 11,         /* binary: TIMER records that are done with, their messages are in this group (sb_fired) */
    SB_KIND_RECALL = 12,        /* binary: the position of a TIMER record that is not to fire */
    SB_KIND_LAST = 12
};

#define SB_FLAG_GROUP 0x01u /* one of several records published together; the first carries group_bytes */
#define SB_FLAG_DEDUP 0x02u /* the id was derived from a dedup key: remembered in the hash window (R17) */
#define SB_FLAG_GROUP_LAST 0x04u
#define SB_FLAG_WAIT_STORE_NOT_OK 0x08u /* the sender asked for no durability wait (RocketMQ's WAIT=false) */
#define SB_FLAG_LATE 0x10u /* a delayed message that fired, a retry, a dead letter: its id is older than those around it */
#define SB_NO_QUEUE 0xffffu

/* --------------------------------------------------------------------------------------------------------------
 * Control segment, bytes 0..255: frozen for all versions, so that a newer build can flush an older ring (R22).
 * Words that move lie elsewhere; the header says where (byte offsets from the start of the control segment).
 */
typedef struct {
    uint64_t magic;
    uint32_t layout_version;
    uint32_t record_version;
    uint64_t fingerprint; /* sizes of all structures and of the C library's: differs -> LayoutMismatch */
    uint64_t control_bytes;
    uint64_t ring_bytes; /* a power of two */
    uint64_t segment_bytes;
    uint64_t tail_at;    /* 64-bit words */
    uint64_t flushed_at;
    uint64_t undo_at;    /* sb_undo */
    uint64_t lock_at;    /* the append lock */
    uint64_t directory_device;
    uint64_t directory_inode;
    uint64_t pid_namespace; /* inode numbers (R19) */
    uint64_t ipc_namespace;
    uint8_t instance[16];
    uint8_t boot_id[16];
    char ring_name[64];
    uint32_t owner_uid;
    uint32_t reserved[11];
} sb_header;

/* Limits, fixed at creation and fingerprinted with the header: how many of each table there are, and where. */
typedef struct {
    uint32_t clients, waiters, topics, queues, groups, claim_tables, claim_window, overflow_claims, ids, blocks;
    uint32_t reserve_bytes;     /* of the ring, kept for system appends (R16) */
    uint32_t max_message_bytes;
    uint64_t workers_at, clients_at, waiters_at, topics_at, queues_at, groups_at, claims_at, claim_stride, overflow_at;
    uint64_t ids_at, blocks_at, end_at;
} sb_limits;

/* Watermarks only grow; each stands alone. */
typedef struct {
    _Alignas(SB_LINE) sb_word tail; /* writer: append, under the lock. Records before it exist. SYNC: tail */
    sb_word write_limit;            /* writer: append, before it overwrites ring bytes. SYNC: write_limit (R8) */
    _Alignas(SB_LINE) sb_word flushed;    /* writer: flusher, after fdatasync succeeded. SYNC: flushed */
    _Alignas(SB_LINE) sb_word dispatched; /* writer: dispatcher. Consume queues hold all before it. SYNC: dispatched */
    _Alignas(SB_LINE) sb_word replicated; /* writer: replicator (lowest over the in-sync slaves) */
    _Alignas(SB_LINE) sb_word user_capacity; /* writer: flusher. User appends end at or before it: disk space stands ready */
    sb_word system_capacity;                 /* the same for system appends: reserve segments included (R16) */
    _Alignas(SB_LINE) sb_word indexed;       /* writer: dispatcher. Key index holds all before it */
    sb_word kept;                            /* writer: retention. First position that still has a segment */
    sb_word snapshot;                        /* writer: dispatcher. Begin of the newest complete snapshot */
    _Alignas(SB_LINE) sb_word state;   /* enum sb_state; writer: supervisor */
    sb_word store_state;               /* enum sb_store_state; writer: flusher */
    sb_word store_errno;               /* why; valid when store_state is not SB_STORE_OK */
    sb_word fenced;                    /* non-zero: another directory was promoted (R13) */
    sb_word epoch;                     /* set before RUNNING, constant while it runs */
    sb_word sync_flush;                /* 1: SYNC_FLUSH */
    sb_word visible_after;             /* enum sb_visible */
    sb_word topic_generation;          /* writer: definition lock. Handles cached by clients are re-read when it moves */
    sb_word supervisor_pid;
    sb_word supervisor_start_ticks;
    sb_word embedded;                  /* 1: leave when the last client goes */
    sb_word next_topic_id;             /* definition lock */
    sb_word next_group_id;             /* definition lock */
    sb_word waiters_high;              /* wait slots ever taken: scans stop here; only grows */
    sb_word lock_takeovers;            /* append lock found with a dead owner, counted for `status` */
    sb_word damaged;                   /* 1 + position of the first damage that somebody met in the log, by CAS; 0 none */
    sb_word timer_turn;                /* append effect of whoever fires, recalls or carries on timers: decides who was first */
    sb_word timers_kept;               /* writer: scheduler. No TIMER record before it is pending, and none unknown to it */
    sb_word timers_wanted;             /* writer: retention. It would give up the log before this, but for the timers */
    _Alignas(SB_LINE) sb_word timed;   /* append lock, before tail: 1 + position of the newest TIMER, FIRED or RECALL. SYNC: timed */
    sb_word timer_look;                /* writer: scheduler. CLOCK_REALTIME ns of its next look: earlier timers post it */
    sb_word ids_remembered;            /* append lock, undo scope: the next entry of the id window, modulo its size */
} sb_watermarks;

enum sb_state { SB_STATE_STARTING = 1, SB_STATE_RUNNING = 2, SB_STATE_DRAINING = 3, SB_STATE_STOPPED = 4 };
enum sb_store_state { SB_STORE_OK = 0, SB_STORE_FULL = 1, SB_STORE_READ_ONLY = 2 };
enum sb_visible { SB_VISIBLE_APPEND = 0, SB_VISIBLE_FLUSH = 1, SB_VISIBLE_REPLICATE = 2 };

/* Undo area (R3): under the append lock, filled before the first effect of an append.
 * repair: tail == undo.tail -> every word gets `before`; tail moved -> every word gets `after`. Idempotent. */
typedef struct {
    uint64_t at; /* byte offset of a 64-bit word in the control segment; + 1: a claim, others may CAS it */
    uint64_t before;
    uint64_t after;
} sb_undo_entry;

typedef struct {
    _Alignas(SB_LINE) sb_word count; /* 0: nothing to undo; stored last when arming, first when disarming */
    sb_word tail;                    /* tail as it was before this append */
    _Alignas(SB_LINE) sb_undo_entry entry[SB_UNDO_MAX];
} sb_undo;

typedef struct {
    _Alignas(SB_LINE) pthread_mutex_t append;     /* robust, process-shared */
    _Alignas(SB_LINE) pthread_mutex_t definition; /* topics, groups, claim tables: rare */
} sb_locks;

/* A worker process of one role. */
typedef struct {
    _Alignas(SB_LINE) sb_half sleep; /* enum sb_sleep; set by the worker, CAS to awake by whoever posts. SYNC: worker-sleep */
    sb_half waiting;                 /* 1 while the worker is inside its wait: the janitor's backstop looks here */
    sem_t wake;
    sb_word pid;
    sb_word start_ticks;
    sb_word starts;  /* how often this role was started */
    sb_word beat_ns; /* CLOCK_MONOTONIC, once per loop */
} sb_worker;

enum sb_role {
    SB_ROLE_SUPERVISOR = 0, SB_ROLE_FLUSHER = 1, SB_ROLE_DISPATCHER = 2, SB_ROLE_JANITOR = 3,
    SB_ROLE_REPLICATOR = 4, SB_ROLE_SCHEDULER = 5, SB_ROLE_CHECKER = 6
};
enum sb_sleep {
    SB_AWAKE = 0,
    SB_SLEEP_IDLE = 1, /* any append posts */
    SB_SLEEP_TICK = 2, /* only urgent work posts */
    SB_SLEEP_TIMER = 3 /* a timer that is due before `timer_look` posts */
};

/* An attached process. */
typedef struct {
    _Alignas(SB_LINE) sb_word state; /* enum sb_client_state | generation << 8; CAS */
    sb_word pid;
    sb_word start_ticks; /* identity with the header's boot id and pid namespace: never pid alone (D1) */
    sb_word incarnation; /* first half of the ids of its messages */
    sb_word attached_ns;
    sb_word sends; /* writer: the client; for `status` */
    sb_word receives;
    sb_word acks;
    char name[48]; /* group or program, for `status` */
    _Alignas(SB_LINE) sb_word window[SB_ID_WINDOW]; /* position of sequence s at s % 64; checked against the record (R17) */
    sb_word window_sequence[SB_ID_WINDOW];          /* and which sequence that was */
} sb_client;

enum sb_client_state { SB_CLIENT_FREE = 0, SB_CLIENT_JOINING = 1, SB_CLIENT_LIVE = 2, SB_CLIENT_DEAD = 3 };

/* A thread that waits (R6). state: owner client slot + 1 in the upper 24 bits, enum sb_wait in the lower 8. */
typedef struct {
    _Alignas(SB_LINE) sb_half state; /* SYNC: waiter */
    sb_half kind;                    /* enum sb_wait_kind. This and the next two: writer: the waiter, before state */
    sb_half group;                   /* consumers: slot of the group */
    sb_half hub;                     /* slot + 1 whose semaphore is posted instead; 0: its own. Writer: as kind */
    sb_word target;                  /* flush, replication, space: a position */
    sb_word posted_ns;               /* when it was posted, for the janitor's backstop */
    sem_t wake;
} sb_waiter;

enum sb_wait { SB_WAIT_FREE = 0, SB_WAIT_IDLE = 1, SB_WAIT_WAITING = 2, SB_WAIT_POSTED = 3 };
enum sb_wait_kind { SB_WAIT_FLUSH = 1, SB_WAIT_REPLICATE = 2, SB_WAIT_SPACE = 3, SB_WAIT_MESSAGE = 4, SB_WAIT_DISPATCH = 5 };
#define SB_WAITER_WORDS 8u /* bitmap words: at most 512 waiters */

typedef struct {
    _Alignas(SB_LINE) sb_word state; /* enum sb_slot_state; set by the append that carries the definition record */
    sb_word permission;              /* RocketMQ's bits: 4 read, 2 write. This and the next two: append effects */
    sb_word queue_count;
    sb_word first_queue;             /* slot; the others by sb_queue.next_in_topic */
    uint32_t topic_id;               /* never reused */
    uint32_t reserved;
    char name[SB_NAME_BYTES];
    _Alignas(SB_LINE) sb_word sleepers[SB_WAITER_WORDS]; /* bit w: waiter w sleeps for this topic. SYNC: sleepers */
    sb_word last_position; /* position of the topic's newest message: what the flusher looks at when it wakes consumers */
} sb_topic;

enum sb_slot_state { SB_SLOT_FREE = 0, SB_SLOT_LIVE = 1, SB_SLOT_DELETED = 2 };

typedef struct {
    _Alignas(SB_LINE) sb_word next_offset; /* append lock. SYNC: queue-next */
    sb_word index_first;                   /* append lock. Entries before it left the index: consume queue */
    sb_word oldest_block;                  /* append lock */
    sb_word newest_block;                  /* append lock */
    sb_word first_offset;                  /* writer: retention. First offset that the log still has */
    sb_word state;                         /* enum sb_slot_state; append effect */
    sb_word next_in_topic;                 /* slot of the topic's next queue; append effect */
    uint32_t topic_slot;
    uint32_t topic_id;
    uint32_t queue_id;
    uint32_t reserved;
    sb_word bytes; /* append lock; payload bytes ever appended, for lag in bytes */
} sb_queue;

/* A block of a queue's index (R7). Full blocks hang in one list in the order in which they filled. */
typedef struct {
    _Alignas(64) sb_word owner; /* queue slot + 1 in the upper 32 bits, topic id in the lower; 0: never used */
    sb_word first;              /* offset of entry 0 */
    sb_word next;               /* next block of this queue */
    sb_word next_full;          /* next block in the list of reusable blocks */
    sb_word last_position;      /* position of the newest entry: reusable when ring and dispatcher have passed it */
    sb_word reserved[3];
    sb_word entry[SB_BLOCK_ENTRIES]; /* positions */
} sb_block;

typedef struct {
    _Alignas(SB_LINE) sb_word oldest_full; /* append lock: head of the list (fresh blocks stand first) */
    sb_word newest_full;
    sb_word listed;
} sb_block_list;

typedef struct {
    _Alignas(SB_LINE) sb_word state; /* enum sb_slot_state; append effect */
    uint32_t group_id;
    uint32_t in_order; /* its live members own queues, and consume them in order; definition lock */
    sb_word subscription_generation; /* its lowest bit says which text is in force; definition lock, or append effect.
                                        SYNC: subscription */
    sb_word subscription_set;        /* 1: by `group set-subscription`, as a record of the log says; append effect */
    char name[SB_NAME_BYTES];
    char subscription[2][SB_SUBSCRIPTION_BYTES]; /* JSON, empty before the first; only the one not in force is written */
    sb_word pause_generation; /* odd: paused, its members get nothing; append effect. SYNC: pause */
    sb_word retry_generation;                 /* the same for the retry policy; append effect. SYNC: subscription */
    char retry[2][SB_SUBSCRIPTION_BYTES];     /* JSON, empty: the default policy */
    sb_word members[SB_CLIENT_WORDS];         /* bit c: client slot c consumes in this group */
} sb_group;

/* Claims of one group in one queue (R9).
 * word, from the lowest bit: state 2 | slot + 1: 12 | attempts 8 | generation 10 | deadline 32 (ms of CLOCK_MONOTONIC, wrapping)
 *   FREE: nobody has it; the deadline field holds the lap (offset / window, with the table's incarnation folded in), so that
 *         a late claimer cannot take the word for another offset, or for one of another group or queue. HELD: claimed by `slot` until `deadline`
 *         (0: prefetched, not delivered: the attempts do not count this claim, another member may take it over).
 *   MOVING: an append decides about it, nobody else may change it; with slot field 0xfff: the claim went to the overflow
 *         table. ACKED: done, the deadline field holds the lap; the base may pass it.
 */
typedef struct {
    _Alignas(SB_LINE) pthread_mutex_t lock; /* robust; by try-lock, for moving the base and for making the table anew */
    sb_word state; /* enum sb_slot_state | incarnation << 8. Made under the definition lock and the claim lock */
    uint32_t group_slot; /* these five: written before state is LIVE */
    uint32_t queue_slot;
    uint32_t group_id;
    uint32_t topic_id;
    uint32_t queue_id;
    uint32_t reserved;
    _Alignas(SB_LINE) sb_word base; /* claim lock. All before it are acked or in the overflow table. SYNC: base */
    sb_word pending_base;           /* claim lock: being reset up to here (repair) */
    sb_word next;                   /* hint: first offset never claimed << 12 | incarnation's last 12 bits; grows, by CAS */
    sb_word released;               /* hint: some words below next are FREE */
    sb_word deadline_ms;            /* hint: earliest deadline, 0 none */
    sb_word prefetched;             /* hint: some claims are held without a deadline, for an idle member to take over */
    sb_word reset_generation;       /* R14 */
    sb_word moving_slot;            /* claim lock: overflow slot + 1 being filled (repair) */
    sb_word delivered, acked, redelivered, refused; /* statistics */
    sb_word overflowed;             /* claims of this table in the overflow table */
    sb_word recorded;               /* writer: dispatcher: size and CRC of the progress record last written to the log */
    sb_word owner;                  /* orderly groups: client slot + 1 of who owns the queue, by its semaphore; 0 nobody.
                                     SYNC: queue-owner */
    sb_word wanted;                 /* client slot + 1 of who asks the owner for it, by CAS from 0; the next owner clears it */
    _Alignas(SB_LINE) sb_word word[]; /* claim_window of them */
} sb_claims;

#define SB_CLAIM_STATE_MASK 3ull
enum sb_claim_state { SB_CLAIM_FREE = 0, SB_CLAIM_HELD = 1, SB_CLAIM_MOVING = 2, SB_CLAIM_ACKED = 3 };

typedef struct {
    sb_word owner; /* how often it was taken << 32 | being filled << 31 | claim table + 1 (0 free); CAS. SYNC: overflow */
    sb_word offset;
    sb_word claim; /* as above, xor sb_claim_binding */
    sb_word reserved;
} sb_overflow;

/* Body of a PROGRESS record (R14), little-endian: this header, then its runs, sorted by offset and disjoint.
 *
 *    0        4        8     10      12       16       24       28
 *    +--------+--------+-----+-------+--------+--------+--------+--------+
 *    | group  | topic  |queue|version| reset  | base   | runs   | 0      |
 *    +--------+--------+-----+-------+--------+--------+--------+--------+
 *    | first           | count  | attempts | kind |   ... runs times
 *    +-----------------+--------+----------+------+
 * Below base everything is acked but the UNACKED runs (overflow). From base on nothing is but the ACKED runs; UNACKED
 * runs there carry the attempts of what was delivered. Merge: larger base, or of the acks, larger attempts; a larger
 * reset generation replaces a smaller one.
 */
#define SB_PROGRESS_VERSION 1u
typedef struct {
    uint32_t group_id, topic_id;
    uint16_t queue_id, version;
    uint32_t reset_generation;
    uint64_t base;
    uint32_t run_count, reserved;
} sb_progress;

enum sb_run_kind { SB_RUN_ACKED = 1, SB_RUN_UNACKED = 2 };
typedef struct {
    uint64_t first;
    uint32_t count;
    uint16_t attempts;
    uint16_t kind;
} sb_progress_run;

/* The last ids remembered, no fewer and no more than there are entries: dedup keys, and the last ids before a restart
 * (R17). Entries are used in a circle. Ids that hash to the number n hang in a chain, newest first, whose head is kept
 * in entry n. Append lock, undo scope. */
typedef struct {
    sb_word incarnation;
    sb_word sequence;
    sb_word position; /* of the record; | SB_ID_GIVEN: it has no dedup key, the id is remembered since a restart only */
    sb_word links; /* upper half: head of chain n; lower: next in the chain of this id; entry + 1, 0 none */
} sb_id;
#define SB_ID_GIVEN 1ull

/* Body of an IDS record, little-endian: as many of these as it is long. */
typedef struct {
    uint64_t incarnation, sequence, position;
} sb_known_id;

/* Body of a FIRED record, little-endian: as many of these as it is long. back 0: the message is in this group, or its
 * topic is no more. Else the timer was carried on: the TIMER record `back` bytes before this record takes its place, and
 * `origin` is the position of the first that was in it, by which its handle names it. */
typedef struct {
    uint64_t position, origin, back;
} sb_fired;

typedef struct {
    sb_header header;
    _Alignas(SB_LINE) sb_limits limits;
    sb_watermarks marks;
    sb_locks locks;
    sb_block_list block_list;
    sb_undo undo;
} sb_control;

_Static_assert(sizeof(sb_record) == SB_RECORD_HEADER, "record header");
_Static_assert(offsetof(sb_record, position) == SB_RECORD_COVERED, "the CRC covers position and all behind it");
_Static_assert(offsetof(sb_record, queue_offset) == 24 && offsetof(sb_record, born_ns) == 48, "record drawing");
_Static_assert(offsetof(sb_record, topic_id) == 56 && offsetof(sb_record, kind) == 62, "record drawing");
_Static_assert(offsetof(sb_record, group_bytes) == 64 && offsetof(sb_record, attempts) == 78, "record drawing");
_Static_assert(sizeof(sb_header) == 256, "frozen header");
_Static_assert(sizeof(sb_word) == 8 && sizeof(sb_half) == 4, "atomics are plain words");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "atomics must work between processes");
#if defined(__aarch64__)
_Static_assert(sizeof(sem_t) == 32 && sizeof(pthread_mutex_t) == 48, "glibc, 64 bit");
#else
_Static_assert(sizeof(sem_t) == 32 && sizeof(pthread_mutex_t) == 40, "glibc, 64 bit");
#endif
_Static_assert(sizeof(sb_worker) == 128 && sizeof(sb_waiter) == 128 && sizeof(sb_queue) == 128, "one slot, one pair of lines");
_Static_assert(sizeof(sb_client) == 128 + 16 * SB_ID_WINDOW, "client slot");
_Static_assert(sizeof(sb_topic) % SB_LINE == 0 && sizeof(sb_group) % SB_LINE == 0, "tables stay aligned");
_Static_assert(sizeof(sb_block) == 64 + 8 * SB_BLOCK_ENTRIES, "index block");
_Static_assert(sizeof(sb_known_id) == 24, "ids body");
_Static_assert(sizeof(sb_fired) == 24, "fired body");
_Static_assert(sizeof(sb_progress) == 32 && offsetof(sb_progress, base) == 16 && sizeof(sb_progress_run) == 16, "progress body");
_Static_assert(sizeof(sb_claims) % SB_LINE == 0 && sizeof(sb_overflow) == 32 && sizeof(sb_id) == 32, "tables");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the log is little-endian");

#endif
