/* index_extend.c: the writing side of queue_index.h, under the append lock and within its undo.
 *
 *   queue: oldest_block -> block -> block -> newest_block -> nil          one chain a queue, by sb_block.next
 *   list:  oldest_full -> fresh ... -> block -> block -> newest_full      all reusable blocks, by sb_block.next_full
 *
 * A block joins the list when its queue has gone on to the next one, so the list is in the order of filling and its head
 * is the first that the dispatcher passes. The pool holds a full ring of the smallest records and one block a queue.
 */
#include "queue_index.h"
#include "undo.h"

static int push_full(sb_region *r, uint64_t block)
{
    sb_block_list *list = &r->control->block_list;
    uint64_t last = sb_peek(&list->newest_full);
    int code = sb_undo_store(r, &sb_block_at(r, (uint32_t)block)->next_full, SB_NIL);
    if (code == SB_OK) {
        code = last < r->limits.blocks ? sb_undo_store(r, &sb_block_at(r, (uint32_t)last)->next_full, block)
                                       : sb_undo_store(r, &list->oldest_full, block);
    }
    return code == SB_OK ? sb_undo_store(r, &list->newest_full, block) : code;
}

/* A block's former queue loses it for good, outside the undo scope: its entries are overwritten next whether or not this
 * append comes true, and the consume queue has them (R7). Killed between these stores: the block still stands first in the
 * list, in its chain or not, and the next append that needs one goes on from there. */
static void take_from_queue(sb_region *r, uint64_t block, sb_block *b)
{
    uint64_t owner = sb_peek(&b->owner), next = sb_peek(&b->next);
    uint32_t slot = (uint32_t)(owner >> 32) - 1;
    if (owner && slot < r->limits.queues && sb_peek(&sb_queue_at(r, slot)->oldest_block) == block) {
        sb_queue *q = sb_queue_at(r, slot);
        sb_store(&q->index_first,
                 next < r->limits.blocks ? sb_peek(&sb_block_at(r, (uint32_t)next)->first) : sb_peek(&q->next_offset));
        sb_store(&q->oldest_block, next);
    }
    sb_store(&b->owner, 0); /* readers of its former queue fail their second look */
}

/* Take the block that filled first, if the dispatcher has passed it. */
static int pop_full(sb_region *r, uint64_t *block, uint64_t *needed)
{
    sb_block_list *list = &r->control->block_list;
    uint64_t head = sb_peek(&list->oldest_full);
    if (head >= r->limits.blocks) {
        return SB_BROKEN; /* there is one block a queue more than a full ring needs */
    }
    sb_block *b = sb_block_at(r, (uint32_t)head);
    uint64_t next_full = sb_peek(&b->next_full);
    if (sb_peek(&b->owner) && sb_load(&sb_marks(r)->dispatched) <= sb_peek(&b->last_position)) { /* SYNC: dispatched */
        *needed = sb_peek(&b->last_position) + 1;
        return SB_NO_INDEX;
    }
    take_from_queue(r, head, b);
    int code = sb_undo_store(r, &list->oldest_full, next_full);
    if (code == SB_OK && next_full >= r->limits.blocks) {
        code = sb_undo_store(r, &list->newest_full, SB_NIL);
    }
    *block = head;
    return code;
}

/* A block for `offset` at the end of the queue's chain. */
static int extend_index(sb_region *r, sb_queue *q, uint64_t owner, uint64_t offset, uint64_t position, uint64_t *needed)
{
    uint64_t block, old = sb_peek(&q->newest_block);
    int code = pop_full(r, &block, needed);
    if (code != SB_OK) {
        return code;
    }
    sb_block *b = sb_block_at(r, (uint32_t)block);
    code = sb_undo_store(r, &b->first, offset & ~(uint64_t)(SB_BLOCK_ENTRIES - 1));
    code = code == SB_OK ? sb_undo_store(r, &b->next, SB_NIL) : code;
    code = code == SB_OK ? sb_undo_store(r, &b->owner, owner) : code;
    int chained = 0;
    if (code == SB_OK && old < r->limits.blocks && old != block) {
        sb_word *last = &sb_block_at(r, (uint32_t)old)->last_position;
        if (sb_peek(last) > position) {
            sb_store(last, position); /* left by an append that did not come true: nobody would ever pass it */
        }
        code = push_full(r, old);
        if (code == SB_OK && sb_peek(&sb_block_at(r, (uint32_t)old)->owner) == owner) {
            chained = 1;
            code = sb_undo_store(r, &sb_block_at(r, (uint32_t)old)->next, block);
        }
    }
    if (code == SB_OK && (!chained || sb_peek(&q->oldest_block) >= r->limits.blocks)) {
        uint64_t oldest = chained ? old : block;
        uint64_t first = chained ? sb_peek(&sb_block_at(r, (uint32_t)old)->first) : offset;
        code = sb_undo_store(r, &q->index_first, first);
        code = code == SB_OK ? sb_undo_store(r, &q->oldest_block, oldest) : code;
    }
    return code == SB_OK ? sb_undo_store(r, &q->newest_block, block) : code;
}

int sb_index_add(sb_region *r, sb_queue *q, uint64_t owner, uint64_t offset, uint64_t position, uint64_t *needed)
{
    uint64_t newest = sb_peek(&q->newest_block);
    sb_block *b = newest < r->limits.blocks ? sb_block_at(r, (uint32_t)newest) : NULL;
    if (!b || sb_peek(&b->owner) != owner || offset - sb_peek(&b->first) >= SB_BLOCK_ENTRIES) {
        int code = extend_index(r, q, owner, offset, position, needed);
        if (code != SB_OK) {
            return code;
        }
        b = sb_block_at(r, (uint32_t)sb_peek(&q->newest_block));
    }
    sb_store(&b->entry[offset - sb_peek(&b->first)], position);
    sb_store(&b->last_position, position);
    return SB_OK;
}

int sb_index_restore(sb_region *r, uint32_t queue, uint64_t offset, const uint64_t *positions, uint32_t count)
{
    if (queue >= r->limits.queues || sb_peek(&sb_queue_at(r, queue)->next_offset) != offset + count) {
        return SB_INVALID;
    }
    sb_queue *q = sb_queue_at(r, queue);
    const uint64_t owner = ((uint64_t)(queue + 1) << 32) | q->topic_id;
    uint64_t needed;
    int code = SB_OK;
    for (uint32_t i = 0; i < count && code == SB_OK; i++) {
        code = sb_index_add(r, q, owner, offset + i, positions[i], &needed);
        sb_store(&r->control->undo.count, 0); /* nothing to undo: a start that fails leaves no memory */
    }
    return code;
}
