/* broker.h: what the tests of the data path share: a broker's memory without a broker, messages whose content follows
 * from their id, and the invariants that hold whenever nobody is inside an append. */
#ifndef SHMBROKER_TEST_BROKER_H
#define SHMBROKER_TEST_BROKER_H

#include "check.h"
#include "definition.h"
#include "queue_index.h"
#include "record.h"
#include "ring.h"

#define BROKER_QUEUES_MAX 1024u
#define BROKER_SECOND_NS 1000000000ll

typedef struct {
    uint64_t ring_bytes, segment_bytes, tail;
    uint32_t queues; /* of the one topic, "test" */
    uint32_t spare_queues;
    uint32_t blocks, reserve_bytes;
} broker_shape;

typedef struct {
    sb_region r;
    uint32_t topic;
    uint32_t slot[BROKER_QUEUES_MAX]; /* of queue i */
} broker;

static inline void broker_open(broker *b, broker_shape shape)
{
    sb_limits l = check_limits();
    l.queues = shape.queues + shape.spare_queues;
    l.blocks = shape.blocks;
    l.reserve_bytes = shape.reserve_bytes;
    l.max_message_bytes = (uint32_t)(shape.ring_bytes / 4);
    uint64_t control_bytes = sb_control_size(&l);
    int control = memfd_create("control", MFD_CLOEXEC), ring = memfd_create("ring", MFD_CLOEXEC);
    CHECK(control_bytes != 0 && control >= 0 && ring >= 0);
    CHECK(ftruncate(control, (off_t)control_bytes) == 0 && ftruncate(ring, (off_t)shape.ring_bytes) == 0);
    CHECK_EQ(sb_region_map(&b->r, control, ring, 1), SB_OK);
    sb_header header = {.segment_bytes = shape.segment_bytes};
    CHECK_EQ(sb_region_format(&b->r, &header, &l, shape.tail, 1), SB_OK);
    CHECK(close(control) == 0 && close(ring) == 0);
    sb_watermarks *m = sb_marks(&b->r);
    sb_store(&m->user_capacity, UINT64_MAX);
    sb_store(&m->system_capacity, UINT64_MAX);
    uint64_t needed;
    CHECK_EQ(sb_topic_define(&b->r, "test", shape.queues, 0, 0, 0, sb_now_ns() + BROKER_SECOND_NS, &b->topic, &needed), SB_OK);
    CHECK_EQ(sb_topic_queues(&b->r, b->topic, b->slot, BROKER_QUEUES_MAX), shape.queues);
    sb_store(&m->state, SB_STATE_RUNNING);
}

static inline void broker_close(broker *b) { sb_region_unmap(&b->r); }

static inline uint64_t broker_tail(const broker *b) { return sb_load(&sb_marks(&b->r)->tail); }

/* What flusher and dispatcher would have done by now. */
static inline void broker_settle(const broker *b)
{
    sb_store(&sb_marks(&b->r)->flushed, broker_tail(b));
    sb_store(&sb_marks(&b->r)->dispatched, broker_tail(b));
}

/* -- messages whose bytes follow from their id -------------------------------------------------------------------- */

static inline void message_fill(uint8_t *body, uint32_t bytes, uint64_t incarnation, uint64_t sequence)
{
    uint64_t state = incarnation * 0x9e3779b97f4a7c15ull + sequence;
    for (uint32_t i = 0; i < bytes; i++) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        body[i] = (uint8_t)(state >> 56);
    }
}

/* A message for queue number `queue`; `body` has room for `bytes`. */
static inline sb_item message_make(const broker *b, uint32_t queue, uint8_t *body, uint32_t bytes, uint64_t incarnation, uint64_t sequence)
{
    message_fill(body, bytes, incarnation, sequence);
    return (sb_item){.body = body,
                     .body_bytes = bytes,
                     .payload_crc = sb_crc32c(0, body, bytes),
                     .incarnation = incarnation,
                     .sequence = sequence,
                     .queue_slot = b->slot[queue],
                     .topic_id = sb_topic_at(&b->r, b->topic)->topic_id,
                     .queue_id = (uint16_t)queue,
                     .kind = SB_KIND_MESSAGE};
}

/* Are these the bytes that message_make gave to this record? */
static inline int message_is_whole(const uint8_t *record, uint32_t size)
{
    sb_record h;
    memcpy(&h, record, sizeof h);
    uint32_t bytes = size - SB_RECORD_HEADER;
    uint8_t *expected = malloc(bytes + 1u);
    CHECK(expected != NULL);
    message_fill(expected, bytes, h.incarnation, h.sequence);
    int same = memcmp(expected, record + SB_RECORD_HEADER, bytes) == 0;
    free(expected);
    return same;
}

/* Append one message of `bytes`; the code of sb_append. */
static inline int broker_send(broker *b, uint32_t queue, uint32_t bytes, uint64_t incarnation, uint64_t sequence, uint32_t options, sb_item *sent)
{
    uint8_t *body = malloc(bytes + 1u);
    CHECK(body != NULL);
    uint64_t end, needed;
    *sent = message_make(b, queue, body, bytes, incarnation, sequence);
    int code = sb_append(&b->r, SB_NIL, sent, 1, NULL, 0, options, sb_now_ns() + BROKER_SECOND_NS, &end, &needed);
    free(body);
    return code;
}

/* -- invariants --------------------------------------------------------------------------------------------------- */

static inline uint64_t owner_word(const sb_region *r, uint32_t slot)
{
    return ((uint64_t)(slot + 1) << 32) | sb_queue_at(r, slot)->topic_id;
}

static inline void check_queue(const sb_region *r, uint32_t slot, uint8_t *seen)
{
    const sb_queue *q = sb_queue_at(r, slot);
    const uint64_t next = sb_load(&q->next_offset), first = sb_load(&q->index_first), newest = sb_load(&q->newest_block);
    const sb_watermarks *m = sb_marks(r);
    if (newest >= r->limits.blocks) {
        CHECK_EQ(next, first);
        return;
    }
    CHECK_EQ(seen[newest]++, 0); /* not in the list of full blocks, and nobody else's newest */
    if (sb_load(&sb_block_at(r, (uint32_t)newest)->owner) != owner_word(r, slot)) {
        CHECK_EQ(next, 0); /* its former user's: replaced by the first append */
        return;
    }
    uint64_t at = sb_load(&q->oldest_block), expected = first;
    while (expected < next) {
        CHECK(at < r->limits.blocks);
        const sb_block *block = sb_block_at(r, (uint32_t)at);
        CHECK_EQ(sb_load(&block->owner), owner_word(r, slot));
        uint64_t base = sb_load(&block->first);
        CHECK(expected >= base && (expected == first || expected == base));
        for (; expected < next && expected - base < SB_BLOCK_ENTRIES; expected++) {
            uint64_t position = sb_load(&block->entry[expected - base]);
            sb_record h;
            CHECK(position < sb_load(&m->tail));
            if (sb_load(&m->write_limit) - position > r->ring_bytes) {
                continue; /* the ring has passed it */
            }
            CHECK_EQ(sb_ring_peek(r, position, &h), SB_OK);
            CHECK_EQ(h.queue_offset, expected);
            CHECK_EQ(h.topic_id, q->topic_id);
            CHECK_EQ(h.queue_id, q->queue_id);
        }
        if (expected < next) {
            at = sb_load(&block->next);
        } else {
            CHECK_EQ(at, newest);
        }
    }
}

/* Every block exactly once: in the list of full ones, or some queue's newest. */
static inline void check_blocks(const sb_region *r)
{
    uint8_t *seen = calloc(r->limits.blocks, 1);
    CHECK(seen != NULL);
    uint64_t last = SB_NIL;
    for (uint64_t at = sb_load(&r->control->block_list.oldest_full); at != SB_NIL; at = sb_load(&sb_block_at(r, (uint32_t)at)->next_full)) {
        CHECK(at < r->limits.blocks);
        CHECK_EQ(seen[at]++, 0);
        last = at;
    }
    CHECK_EQ(sb_load(&r->control->block_list.newest_full), last);
    for (uint32_t slot = 0; slot < r->limits.queues; slot++) {
        check_queue(r, slot, seen);
    }
    for (uint32_t i = 0; i < r->limits.blocks; i++) {
        CHECK_EQ(seen[i], 1);
    }
    free(seen);
}

/* Every record from `position` (a record's start that the ring still has) up to tail: whole, in whole groups, each queue's
 * offsets without gaps, each findable by the index unless that has let it go. Returns how many messages. */
static inline uint64_t check_records(const sb_region *r, uint64_t position)
{
    const uint64_t tail = sb_load(&sb_marks(r)->tail);
    uint8_t *buffer = malloc(r->ring_bytes / 2);
    uint64_t *next = calloc(r->limits.queues, sizeof *next), messages = 0, group_end = 0;
    CHECK(buffer != NULL && next != NULL);
    while (position < tail) {
        uint32_t size = 0, slot = 0, found = 0;
        sb_record h;
        CHECK_EQ(sb_ring_read(r, position, buffer, r->ring_bytes / 2, &size), SB_OK);
        CHECK_EQ(sb_record_check(buffer, r->ring_bytes / 2, position, r->segment_bytes, 1, r->epoch, 0), SB_OK);
        memcpy(&h, buffer, sizeof h);
        uint64_t end = sb_record_next(position, size, r->segment_bytes);
        if (h.group_bytes) {
            CHECK(group_end == 0);
            group_end = sb_record_next(position, h.group_bytes, r->segment_bytes);
            CHECK(group_end <= tail);
        }
        CHECK_EQ((h.flags & SB_FLAG_GROUP) != 0, group_end != 0);
        CHECK_EQ((h.flags & SB_FLAG_GROUP_LAST) != 0, group_end == end);
        group_end = group_end == end ? 0 : group_end;
        if (h.kind == SB_KIND_MESSAGE) {
            CHECK(message_is_whole(buffer, size));
            while (slot < r->limits.queues && (sb_queue_at(r, slot)->topic_id != h.topic_id || sb_queue_at(r, slot)->queue_id != h.queue_id)) {
                slot++;
            }
            CHECK(slot < r->limits.queues);
            CHECK(next[slot] == 0 || next[slot] == h.queue_offset);
            CHECK(h.queue_offset < sb_load(&sb_queue_at(r, slot)->next_offset));
            next[slot] = h.queue_offset + 1;
            if (h.queue_offset >= sb_load(&sb_queue_at(r, slot)->index_first)) {
                sb_cursor cursor = {.block = SB_NIL};
                uint64_t place = 0;
                CHECK_EQ(sb_index_lookup(r, slot, h.queue_offset, tail, 1, &cursor, &place, &found), SB_OK);
                CHECK_EQ(place, position);
            }
            messages++;
        }
        position = end;
    }
    CHECK_EQ(position, tail);
    CHECK_EQ(group_end, 0);
    free(next);
    free(buffer);
    return messages;
}

/* All of it, with nobody inside an append. */
static inline void check_invariants(const broker *b)
{
    const sb_region *r = &b->r;
    const sb_watermarks *m = sb_marks(r);
    CHECK_EQ(sb_load(&r->control->undo.count), 0);
    CHECK(sb_load(&m->flushed) <= sb_load(&m->tail) && sb_load(&m->tail) <= sb_load(&m->write_limit));
    CHECK_EQ(sb_load(&m->tail) % SB_RECORD_ALIGN, 0);
    check_blocks(r);
}

#endif
