/* queue_index.c: reading side, see queue_index.h; the writing side is index_extend.c.
 * Nothing read here is believed by itself: the block is checked before and after, the walk is bounded, and the caller
 * compares the record it finds with the queue and offset it looked for. */
#include "queue_index.h"

#define TRIES 64

static int block_is(const sb_region *r, uint64_t b, uint64_t owner, uint64_t first)
{
    return b < r->limits.blocks && sb_load(&sb_block_at(r, (uint32_t)b)->owner) == owner &&
           sb_load(&sb_block_at(r, (uint32_t)b)->first) == first;
}

/* The block that holds `offset`, or SB_NIL when the chain moved underneath. */
static uint64_t find_block(const sb_region *r, const sb_queue *q, uint64_t owner, uint64_t offset, const sb_cursor *cursor)
{
    uint64_t b = sb_load(&q->oldest_block);
    if (cursor->block != SB_NIL && cursor->first <= offset && block_is(r, cursor->block, owner, cursor->first)) {
        b = cursor->block;
    }
    for (uint32_t steps = 0; b < r->limits.blocks && steps <= r->limits.blocks; steps++) {
        const sb_block *block = sb_block_at(r, (uint32_t)b);
        uint64_t first = sb_load(&block->first);
        if (sb_load(&block->owner) != owner || offset < first) {
            return SB_NIL;
        }
        if (offset - first < SB_BLOCK_ENTRIES) {
            return b;
        }
        b = sb_load(&block->next);
    }
    return SB_NIL;
}

int sb_index_lookup(const sb_region *r, uint32_t queue, uint64_t offset, uint64_t limit, uint32_t count, sb_cursor *cursor,
                    uint64_t *positions, uint32_t *found)
{
    *found = 0;
    if (queue >= r->limits.queues) {
        return SB_INVALID;
    }
    const sb_queue *q = sb_queue_at(r, queue);
    const uint64_t owner = ((uint64_t)(queue + 1) << 32) | q->topic_id;
    for (int attempt = 0; attempt < TRIES; attempt++) {
        uint64_t next = sb_load(&q->next_offset); /* SYNC: queue-next */
        if (offset >= next) {
            return SB_END;
        }
        if (offset < sb_load(&q->index_first)) {
            return SB_BEHIND;
        }
        uint64_t b = find_block(r, q, owner, offset, cursor);
        if (b == SB_NIL) {
            continue;
        }
        const sb_block *block = sb_block_at(r, (uint32_t)b);
        uint64_t first = sb_load(&block->first);
        if (offset < first || offset - first >= SB_BLOCK_ENTRIES) {
            continue;
        }
        uint64_t end = first + SB_BLOCK_ENTRIES < next ? first + SB_BLOCK_ENTRIES : next;
        uint32_t n = 0;
        for (uint64_t o = offset; o < end && n < count; o++) {
            uint64_t position = sb_load(&block->entry[o - first]);
            if (position >= limit) {
                break;
            }
            positions[n++] = position;
        }
        atomic_thread_fence(memory_order_acquire);
        if (!block_is(r, b, owner, first) || sb_load(&q->index_first) > offset) {
            continue; /* reused while we read */
        }
        cursor->block = (uint32_t)b;
        cursor->first = first;
        *found = n;
        return n ? SB_OK : SB_END;
    }
    return SB_AGAIN;
}
