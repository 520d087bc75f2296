/* queue_index.h: where the messages of a queue lie, for as long as the ring has them (R7).
 * A pool of fixed blocks, chained per queue; written by append under its lock, read by anybody without one. */
#ifndef SHMBROKER_QUEUE_INDEX_H
#define SHMBROKER_QUEUE_INDEX_H

#include "region.h"

/* A reader's place in one queue's chain, private to the reader: saves the walk from the oldest block. */
typedef struct {
    uint32_t block; /* SB_NIL: none */
    uint64_t first;
} sb_cursor;

/* Positions of messages offset, offset + 1, ... of a queue, at most `count`, those before `limit` (a watermark that the
 * caller loaded BEFORE this call, R8). SB_OK: *found >= 1 | SB_END: nothing visible at offset | SB_BEHIND: before the
 * oldest block, look in the consume queue | SB_AGAIN: the chain moved underneath, call again. */
int sb_index_lookup(const sb_region *r, uint32_t queue, uint64_t offset, uint64_t limit, uint32_t count,
                    sb_cursor *cursor, uint64_t *positions, uint32_t *found);

/* Append, under its lock: queue `q`, whose blocks carry `owner` (slot + 1, topic id), has its message `offset` at
 * `position`. SB_OK | SB_NO_INDEX (*needed: `dispatched` must reach it) | SB_TOO_LARGE (undo full) | SB_BROKEN */
int sb_index_add(sb_region *r, sb_queue *q, uint64_t owner, uint64_t offset, uint64_t position, uint64_t *needed);
/* Recovery, nobody else attached: the queue's last `count` messages, from `offset` to its next, lie at these positions. The
 * ring does not have them, so readers take them from the files. SB_OK | SB_NO_INDEX | SB_INVALID | SB_BROKEN */
int sb_index_restore(sb_region *r, uint32_t queue, uint64_t offset, const uint64_t *positions, uint32_t count);

#endif
