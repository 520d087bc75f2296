/* ring.h: append and read. The data path: producer -> sb_append -> ring -> flusher | consumer. */
#ifndef SHMBROKER_RING_H
#define SHMBROKER_RING_H

#include "ipc.h"
#include "region.h"

/* One record to append. The caller fills the payload's parts and their CRC before the lock is taken (R12). */
typedef struct {
    const uint8_t *tags, *keys, *properties, *body;
    uint32_t tags_bytes, keys_bytes, properties_bytes, body_bytes;
    uint32_t payload_crc;
    uint32_t tag_hash;
    uint64_t incarnation, sequence;
    int64_t born_ns;
    uint32_t queue_slot; /* SB_NIL: a system record */
    uint32_t topic_id;
    uint16_t queue_id;
    uint8_t kind, flags, attempts;
    uint64_t position, queue_offset; /* answers */
} sb_item;

/* A change of a shared word that becomes true together with the records (R3). The word is a claim when `claim` is set:
 * it passes through MOVING, which nobody else may change. */
typedef struct {
    sb_word *word;
    uint64_t expected, desired;
    int claim;
} sb_effect;

#define SB_APPEND_SYSTEM 1u /* may use the reserves of ring and disk (R16) */
#define SB_APPEND_RESEND 2u /* look for the id first (R17) */
#define SB_APPEND_DEDUP 4u  /* look in, and remember in, the hash window */

/* Append `count` records and apply `effects` as one atomic group, or nothing at all. One attempt, never sleeps while
 * it waits for space. deadline_ns: for the append lock; 0: only try.
 * SB_OK | SB_DUPLICATE | SB_LOCKED | SB_TIMEOUT | SB_INTERRUPTED | SB_NO_SPACE (*needed: `flushed` must reach it) |
 * SB_NO_INDEX (*needed: `dispatched` must pass it) | SB_NO_CAPACITY | SB_READ_ONLY | SB_NOT_RUNNING | SB_FENCED | SB_TOO_LARGE | SB_LOST | SB_BROKEN */
int sb_append(sb_region *r, uint32_t client, sb_item *items, uint32_t count, const sb_effect *effects, uint32_t effect_count,
              uint32_t options, int64_t deadline_ns, uint64_t *end, uint64_t *needed);
/* The same, waiting for lock, space, index or disk until the deadline; then the code says what was missing. Returns
 * SB_INTERRUPTED at least every 100 ms so that the caller may look at signals: call again. *waiter: a wait slot taken when
 * first needed (SB_NIL before), the caller gives it back; if all are taken it polls. */
int sb_append_wait(sb_region *r, uint32_t client, sb_item *items, uint32_t count, const sb_effect *effects, uint32_t effect_count,
                   uint32_t options, int64_t deadline_ns, uint64_t *end, uint32_t *waiter);
void sb_append_wake(sb_region *r, const sb_item *items, uint32_t count); /* post whoever sleeps for what was appended */

/* Recovery: remember an id of the log's newest records in the hash window. given: it was not made of a dedup key. */
int sb_remember_id(sb_region *r, uint64_t incarnation, uint64_t sequence, uint64_t position, int given);

/* Wait for the append lock and give it back: behind it no append is half made. SB_OK | SB_TIMEOUT | SB_BROKEN */
int sb_append_settle(sb_region *r, int64_t deadline_ns);
/* Next offsets of `count` queues, given by slot, at one moment between two appends; queues NULL: of the slots 0, 1, ...
 * Whoever looks without the lock may see what an append counted that dies before it exists. Codes as above. */
int sb_append_read_offsets(sb_region *r, const uint32_t *queues, uint32_t count, int64_t deadline_ns, uint64_t *next);
/* The ids of dedup keys among the `newest` remembered, oldest first, from the `*next`-th ever remembered on: *count of them,
 * at most `room`. SB_OK: and there may be more from the new *next on | SB_END: those were all | SB_TIMEOUT | SB_BROKEN */
int sb_append_read_ids(sb_region *r, uint64_t newest, uint64_t *next, sb_known_id *ids, uint32_t room, uint32_t *count,
                       int64_t deadline_ns);
/* Try-lock, repair if its owner died, unlock. Returns 1 if a dead owner was found. */
int sb_append_lock_check(sb_region *r);

/* Checked private copy of the record at `position` into `buffer` (capacity `room`): SB_OK, *size set | SB_BEHIND: the
 * ring has passed it | SB_END: not there yet | SB_NO_SPACE: *size tells the room needed | SB_INVALID: no such record.
 * Size, CRC, epoch and position of the copy have been checked. SYNC: write_limit */
int sb_ring_read(const sb_region *r, uint64_t position, uint8_t *buffer, uint64_t room, uint32_t *size);
/* Only the header, validated against write_limit but not by the CRC: for filters. */
int sb_ring_peek(const sb_region *r, uint64_t position, sb_record *header);
/* Copy tags, keys and properties of the record whose header a peek has found, for filters as well: SB_OK | SB_BEHIND. */
int sb_ring_peek_properties(const sb_region *r, const sb_record *header, uint8_t *buffer);

#endif
