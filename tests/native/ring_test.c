/* ring_test.c: append and read, one process: content, ends of ring and segment, groups, limits, refusals, effects, ids. */
#include "broker.h"
#include "claim.h"
#include "janitor.h"

#define KIB 1024u
#define RING (64u * KIB)
#define SEGMENT (96u * KIB) /* not the ring's size: their ends meet at all distances */

static broker b;

static void setup(void)
{
    broker_open(&b, (broker_shape){.ring_bytes = RING, .segment_bytes = SEGMENT, .queues = 4, .blocks = 64, .reserve_bytes = 8 * KIB});
}

static sb_record header_at(uint64_t position)
{
    sb_record h;
    CHECK_EQ(sb_ring_peek(&b.r, position, &h), SB_OK);
    return h;
}

static sb_item sent(uint32_t queue, uint32_t bytes, uint64_t sequence)
{
    sb_item item;
    CHECK_EQ(broker_send(&b, queue, bytes, 7, sequence, 0, &item), SB_OK);
    return item;
}

/* Messages of `bytes` until exactly `room` bytes are left in the segment. */
static void fill_segment_up_to(uint64_t room)
{
    uint64_t sequence = 1000;
    for (;;) {
        broker_settle(&b);
        uint64_t left = SEGMENT - broker_tail(&b) % SEGMENT;
        if (left == room) {
            return;
        }
        CHECK(left > room);
        uint64_t size = left - room;
        size = size > 8 * KIB ? 4 * KIB : size;
        CHECK(size > SB_RECORD_HEADER);
        (void)sent(0, (uint32_t)size - SB_RECORD_HEADER, sequence++);
    }
}

static void what_was_appended_is_read_back(void)
{
    setup();
    const char *parts = "tagkey one\x02" "a\x01" "b\x02" "the body";
    const uint8_t *p = (const uint8_t *)parts;
    sb_item item = {.tags = p, .tags_bytes = 3, .keys = p + 3, .keys_bytes = 7, .properties = p + 10, .properties_bytes = 5,
                    .body = p + 15, .body_bytes = 8, .tag_hash = sb_tag_hash(p, 3), .incarnation = 9, .sequence = 5, .born_ns = 77,
                    .queue_slot = b.slot[2], .topic_id = 1, .queue_id = 2, .kind = SB_KIND_MESSAGE, .attempts = 3};
    item.payload_crc = sb_crc32c(0, p, 23);
    uint64_t end, needed;
    CHECK_EQ(sb_append(&b.r, SB_NIL, &item, 1, NULL, 0, 0, 0, &end, &needed), SB_OK);
    CHECK_EQ(item.position, 0);
    CHECK_EQ(item.queue_offset, 0);
    CHECK_EQ(end, sb_padded(SB_RECORD_HEADER + 23));
    uint8_t copy[256];
    uint32_t size;
    CHECK_EQ(sb_ring_read(&b.r, 0, copy, sizeof copy, &size), SB_OK);
    CHECK_EQ(size, SB_RECORD_HEADER + 23);
    CHECK(memcmp(copy + SB_RECORD_HEADER, parts, 23) == 0);
    sb_record h = header_at(0);
    CHECK(h.queue_id == 2 && h.topic_id == 1 && h.born_ns == 77 && h.incarnation == 9 && h.sequence == 5 && h.attempts == 3);
    CHECK(h.group_bytes == 0 && h.flags == 0 && h.tag_hash == item.tag_hash && h.epoch == 1 && h.unflushed == 0);
    CHECK_EQ(sb_ring_peek_properties(&b.r, &h, copy), SB_OK);
    CHECK(memcmp(copy, parts, 15) == 0);
    CHECK_EQ(sb_ring_read(&b.r, 0, copy, 90, &size), SB_NO_SPACE);
    CHECK_EQ(size, SB_RECORD_HEADER + 23);
    CHECK_EQ(sb_ring_read(&b.r, end, copy, sizeof copy, &size), SB_END);
    CHECK_EQ(sb_ring_read(&b.r, 4, copy, sizeof copy, &size), SB_INVALID);
    CHECK_EQ(sb_ring_read(&b.r, 8, copy, sizeof copy, &size), SB_INVALID);
    sb_store(&sb_marks(&b.r)->write_limit, RING + 1); /* somebody overwrites it since the peek */
    CHECK_EQ(sb_ring_peek_properties(&b.r, &h, copy), SB_BEHIND);
    broker_close(&b);
}

static void a_flipped_bit_in_the_ring_is_no_record(void)
{
    setup();
    sb_item item = sent(0, 100, 1);
    uint8_t copy[256];
    uint32_t size;
    for (uint32_t at = 0; at < SB_RECORD_HEADER + 100; at++) {
        b.r.ring[item.position + at] ^= 0x10;
        CHECK(sb_ring_read(&b.r, item.position, copy, sizeof copy, &size) != SB_OK);
        b.r.ring[item.position + at] ^= 0x10;
    }
    CHECK_EQ(sb_ring_read(&b.r, item.position, copy, sizeof copy, &size), SB_OK);
    broker_close(&b);
}

static void every_size_crosses_the_end_of_the_ring_and_stays_whole(void)
{
    setup();
    sb_word *kept = &sb_marks(&b.r)->kept;
    uint64_t sequence = 1;
    for (uint32_t bytes = 1; bytes < 6000; bytes += bytes < 300 ? 1 : 97) {
        broker_settle(&b);
        sb_item item = sent(bytes % 4, bytes, sequence++);
        if (item.position - sb_load(kept) > RING / 2) {
            sb_store(kept, item.position);
        }
        CHECK(check_records(&b.r, item.position) == 1);
    }
    CHECK(broker_tail(&b) > 4 * (uint64_t)RING);
    check_invariants(&b);
    broker_close(&b);
}

static void less_than_a_header_before_the_end_of_a_segment_is_zeros(void)
{
    for (uint32_t gap = 8; gap < SB_RECORD_HEADER; gap += 8) {
        setup();
        fill_segment_up_to(2048);
        sb_item last = sent(1, 2048 - SB_RECORD_HEADER - gap, 1);
        CHECK_EQ(broker_tail(&b), SEGMENT);
        for (uint64_t at = SEGMENT - gap; at < SEGMENT; at++) {
            CHECK_EQ(b.r.ring[at & b.r.ring_mask], 0);
        }
        sb_item next = sent(1, 1, 2);
        CHECK_EQ(next.position, SEGMENT);
        CHECK_EQ(check_records(&b.r, last.position), 2);
        broker_close(&b);
    }
}

static void exactly_a_header_before_the_end_of_a_segment_is_a_filler(void)
{
    setup();
    fill_segment_up_to(SB_RECORD_HEADER);
    uint64_t at = broker_tail(&b);
    sb_item next = sent(1, 1, 1);
    CHECK_EQ(next.position, SEGMENT);
    sb_record filler = header_at(at);
    CHECK(filler.kind == SB_KIND_FILLER && filler.size == SB_RECORD_HEADER && filler.queue_id == SB_NO_QUEUE);
    CHECK_EQ(check_records(&b.r, at), 1);
    check_invariants(&b);
    broker_close(&b);
}

static void a_group_that_does_not_fit_begins_the_next_segment(void)
{
    setup();
    fill_segment_up_to(1000);
    uint64_t at = broker_tail(&b), end, needed;
    uint8_t body[8][100];
    sb_item items[8];
    for (uint32_t i = 0; i < 8; i++) {
        items[i] = message_make(&b, i % 4, body[i], 100, 3, i + 1);
    }
    CHECK_EQ(sb_append(&b.r, SB_NIL, items, 8, NULL, 0, 0, 0, &end, &needed), SB_OK);
    sb_record filler = header_at(at), first = header_at(SEGMENT), second = header_at(items[1].position), last = header_at(items[7].position);
    CHECK(filler.kind == SB_KIND_FILLER && filler.size == 1000);
    CHECK_EQ(first.group_bytes, 8 * sb_padded(SB_RECORD_HEADER + 100));
    CHECK_EQ(first.flags, SB_FLAG_GROUP);
    CHECK(second.group_bytes == 0 && second.flags == SB_FLAG_GROUP);
    CHECK_EQ(last.flags, SB_FLAG_GROUP | SB_FLAG_GROUP_LAST);
    CHECK_EQ(end, SEGMENT + 8 * sb_padded(SB_RECORD_HEADER + 100));
    CHECK_EQ(check_records(&b.r, at), 8);
    check_invariants(&b);
    broker_close(&b);
}

static void a_group_that_just_fits_ends_its_segment(void)
{
    setup();
    fill_segment_up_to(2 * 184);
    uint64_t at = broker_tail(&b), end, needed;
    uint8_t body[2][104];
    sb_item items[2] = {message_make(&b, 0, body[0], 104, 3, 1), message_make(&b, 1, body[1], 104, 3, 2)};
    CHECK_EQ(sb_append(&b.r, SB_NIL, items, 2, NULL, 0, 0, 0, &end, &needed), SB_OK);
    CHECK(items[0].position == at && end == SEGMENT);
    CHECK_EQ(check_records(&b.r, at), 2);
    broker_close(&b);
}

static void a_full_ring_refuses_and_says_what_it_waits_for(void)
{
    setup();
    sb_item item;
    uint64_t n = 0;
    const uint32_t bytes = 1024 - SB_RECORD_HEADER;
    int code;
    while ((code = broker_send(&b, 0, bytes, 7, n + 1, 0, &item)) == SB_OK) {
        n++;
    }
    CHECK_EQ(code, SB_NO_SPACE);
    CHECK_EQ(n, (RING - 8 * KIB) / 1024); /* to the last byte before the reserve */
    uint8_t body[1024];
    item = message_make(&b, 0, body, bytes, 7, n + 1);
    uint64_t end = 0, needed = 0, tail = broker_tail(&b);
    CHECK_EQ(sb_append(&b.r, SB_NIL, &item, 1, NULL, 0, 0, 0, &end, &needed), SB_NO_SPACE);
    CHECK_EQ(needed, 1024);
    CHECK_EQ(broker_tail(&b), tail);
    check_invariants(&b);
    for (uint32_t i = 0; i < 8; i++) { /* the reserve is for what must go on (R16) */
        CHECK_EQ(broker_send(&b, 0, bytes, 7, n + 1 + i, SB_APPEND_SYSTEM, &item), SB_OK);
    }
    CHECK_EQ(broker_send(&b, 0, bytes, 7, n + 9, SB_APPEND_SYSTEM, &item), SB_NO_SPACE);
    CHECK_EQ(broker_tail(&b), RING);
    CHECK_EQ(check_records(&b.r, 0), n + 8); /* nothing was overwritten */
    sb_store(&sb_marks(&b.r)->flushed, 1024 - 8);
    CHECK_EQ(broker_send(&b, 0, bytes, 7, n + 9, SB_APPEND_SYSTEM, &item), SB_NO_SPACE);
    sb_store(&sb_marks(&b.r)->flushed, 1024);
    CHECK_EQ(broker_send(&b, 0, bytes, 7, n + 9, SB_APPEND_SYSTEM, &item), SB_OK);
    uint32_t size;
    uint8_t copy[2048];
    CHECK_EQ(sb_ring_read(&b.r, 0, copy, sizeof copy, &size), SB_BEHIND);
    CHECK_EQ(check_records(&b.r, 1024), n + 8);
    broker_close(&b);
}

static void the_filler_counts_when_space_is_short(void)
{
    setup();
    fill_segment_up_to(512);
    uint64_t at = broker_tail(&b), end, needed = 0;
    sb_watermarks *m = sb_marks(&b.r);
    sb_store(&m->flushed, at - (RING - 8 * KIB) + 512 + 1024 - 8);
    uint8_t body[1024];
    sb_item item = message_make(&b, 0, body, 1024 - SB_RECORD_HEADER, 7, 1);
    CHECK_EQ(sb_append(&b.r, SB_NIL, &item, 1, NULL, 0, 0, 0, &end, &needed), SB_NO_SPACE);
    CHECK_EQ(needed, sb_load(&m->flushed) + 8);
    CHECK_EQ(broker_tail(&b), at);
    sb_store(&m->flushed, needed);
    CHECK_EQ(sb_append(&b.r, SB_NIL, &item, 1, NULL, 0, 0, 0, &end, &needed), SB_OK);
    CHECK_EQ(item.position, SEGMENT);
    broker_close(&b);
}

static void capacity_bounds_users_and_system_apart(void)
{
    setup();
    sb_item item;
    sb_store(&sb_marks(&b.r)->user_capacity, 1024);
    sb_store(&sb_marks(&b.r)->system_capacity, 2048);
    CHECK_EQ(broker_send(&b, 0, 1024 - SB_RECORD_HEADER + 1, 7, 1, 0, &item), SB_NO_CAPACITY);
    CHECK_EQ(broker_send(&b, 0, 1024 - SB_RECORD_HEADER, 7, 1, 0, &item), SB_OK);
    CHECK_EQ(broker_send(&b, 0, 1, 7, 2, 0, &item), SB_NO_CAPACITY);
    CHECK_EQ(broker_send(&b, 0, 1024 - SB_RECORD_HEADER, 7, 2, SB_APPEND_SYSTEM, &item), SB_OK);
    CHECK_EQ(broker_send(&b, 0, 1, 7, 3, SB_APPEND_SYSTEM, &item), SB_NO_CAPACITY);
    CHECK_EQ(check_records(&b.r, 0), 2);
    check_invariants(&b);
    broker_close(&b);
}

static void states_decide_who_may_append(void)
{
    static const struct {
        uint64_t state, store, fenced;
        int user, system;
    } cases[] = {
        {SB_STATE_STARTING, SB_STORE_OK, 0, SB_NOT_RUNNING, SB_OK}, {SB_STATE_RUNNING, SB_STORE_OK, 0, SB_OK, SB_OK},
        {SB_STATE_DRAINING, SB_STORE_OK, 0, SB_NOT_RUNNING, SB_OK}, {SB_STATE_STOPPED, SB_STORE_OK, 0, SB_NOT_RUNNING, SB_NOT_RUNNING},
        {SB_STATE_RUNNING, SB_STORE_FULL, 0, SB_OK, SB_OK}, /* capacity decides, not the word */
        {SB_STATE_RUNNING, SB_STORE_READ_ONLY, 0, SB_READ_ONLY, SB_READ_ONLY}, {SB_STATE_RUNNING, SB_STORE_OK, 1, SB_FENCED, SB_FENCED},
    };
    setup();
    sb_watermarks *m = sb_marks(&b.r);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        sb_item item;
        sb_store(&m->state, cases[i].state);
        sb_store(&m->store_state, cases[i].store);
        sb_store(&m->fenced, cases[i].fenced);
        uint64_t before = broker_tail(&b);
        CHECK_EQ(broker_send(&b, 0, 10, 7, 10 + i, 0, &item), cases[i].user);
        CHECK_EQ(broker_tail(&b) != before, cases[i].user == SB_OK);
        CHECK_EQ(broker_send(&b, 0, 10, 8, 10 + i, SB_APPEND_SYSTEM, &item), cases[i].system);
    }
    check_invariants(&b);
    broker_close(&b);
}

static void a_group_over_its_limits_is_refused_whole(void)
{
    static uint8_t body[RING];
    static sb_item many[SB_GROUP_RECORDS_MAX + 1];
    setup();
    sb_item item;
    const uint32_t most = RING / 4 - SB_RECORD_HEADER;
    CHECK_EQ(broker_send(&b, 0, most + 1, 7, 1, 0, &item), SB_TOO_LARGE);
    CHECK_EQ(broker_send(&b, 0, most, 7, 1, 0, &item), SB_OK);
    uint64_t tail = broker_tail(&b), end, needed;
    broker_settle(&b);
    for (uint32_t i = 0; i < SB_GROUP_RECORDS_MAX + 1; i++) {
        many[i] = message_make(&b, i % 4, body + i, 1, 8, i);
    }
    CHECK_EQ(sb_append(&b.r, SB_NIL, many, SB_GROUP_RECORDS_MAX + 1, NULL, 0, 0, 0, &end, &needed), SB_TOO_LARGE);
    CHECK_EQ(sb_append(&b.r, SB_NIL, many, 256, NULL, 0, 0, 0, &end, &needed), SB_TOO_LARGE); /* 88 bytes each */
    CHECK_EQ(broker_tail(&b), tail);
    CHECK_EQ(sb_append(&b.r, SB_NIL, many, 186, NULL, 0, 0, 0, &end, &needed), SB_OK);
    CHECK_EQ(check_records(&b.r, 0), 187);
    check_invariants(&b);
    broker_close(&b);
}

static void a_group_that_overflows_the_undo_area_leaves_nothing(void)
{
    static uint8_t body[SB_GROUP_RECORDS_MAX];
    static sb_item many[SB_GROUP_RECORDS_MAX];
    broker_open(&b, (broker_shape){.ring_bytes = 1024 * KIB, .segment_bytes = 1024 * KIB, .queues = 4, .blocks = 512});
    for (uint32_t i = 0; i < SB_GROUP_RECORDS_MAX; i++) {
        many[i] = message_make(&b, i % 4, body + i, 1, 8, i); /* no two neighbours share a queue: all counters are logged */
    }
    uint64_t end, needed;
    CHECK_EQ(sb_append(&b.r, SB_NIL, many, SB_GROUP_RECORDS_MAX, NULL, 0, SB_APPEND_DEDUP, 0, &end, &needed), SB_TOO_LARGE);
    CHECK_EQ(broker_tail(&b), 0);
    check_invariants(&b);
    for (uint32_t i = 0; i < 4; i++) {
        CHECK_EQ(sb_load(&sb_queue_at(&b.r, b.slot[i])->next_offset), 0);
        CHECK_EQ(sb_load(&sb_queue_at(&b.r, b.slot[i])->bytes), 0);
    }
    CHECK_EQ(sb_append(&b.r, SB_NIL, many, SB_GROUP_RECORDS_MAX, NULL, 0, 0, 0, &end, &needed), SB_OK);
    check_invariants(&b);
    broker_close(&b);
}

/* -- the index pool ----------------------------------------------------------------------------------------------- */

/* One queue uses up all blocks; flushed is told, dispatched is not. Returns the messages it took. */
static uint64_t use_up_the_blocks(uint32_t queue)
{
    sb_item item;
    uint64_t n = 0;
    int code;
    do {
        sb_store(&sb_marks(&b.r)->flushed, broker_tail(&b));
        code = broker_send(&b, queue, 1, 7, ++n, 0, &item);
    } while (code == SB_OK);
    CHECK_EQ(code, SB_NO_INDEX);
    return n - 1;
}

static void an_empty_index_pool_waits_for_the_dispatcher(void)
{
    broker_open(&b, (broker_shape){.ring_bytes = RING, .segment_bytes = SEGMENT, .queues = 2, .blocks = 8});
    CHECK_EQ(use_up_the_blocks(0), 8 * SB_BLOCK_ENTRIES);
    uint64_t tail = broker_tail(&b), end, needed = 0;
    uint8_t body[1];
    sb_item item = message_make(&b, 0, body, 1, 7, 99);
    CHECK_EQ(sb_append(&b.r, SB_NIL, &item, 1, NULL, 0, 0, 0, &end, &needed), SB_NO_INDEX);
    CHECK_EQ(broker_tail(&b), tail);
    CHECK_EQ(sb_load(&sb_queue_at(&b.r, b.slot[0])->next_offset), 8 * SB_BLOCK_ENTRIES);
    check_invariants(&b);
    sb_store(&sb_marks(&b.r)->dispatched, needed - 1);
    CHECK_EQ(sb_append(&b.r, SB_NIL, &item, 1, NULL, 0, 0, 0, &end, &needed), SB_NO_INDEX);
    sb_store(&sb_marks(&b.r)->dispatched, needed);
    CHECK_EQ(sb_append(&b.r, SB_NIL, &item, 1, NULL, 0, 0, 0, &end, &needed), SB_OK);
    CHECK_EQ(sb_load(&sb_queue_at(&b.r, b.slot[0])->index_first), SB_BLOCK_ENTRIES);
    check_invariants(&b);
    broker_close(&b);
}

/* The refused append had taken a block from queue 0 and begun to overwrite it before it found no second one. */
static void an_append_refused_halfway_spoils_no_index(void)
{
    broker_open(&b, (broker_shape){.ring_bytes = RING, .segment_bytes = SEGMENT, .queues = 2, .blocks = 8});
    CHECK_EQ(use_up_the_blocks(0), 8 * SB_BLOCK_ENTRIES);
    sb_store(&sb_marks(&b.r)->dispatched, (uint64_t)SB_BLOCK_ENTRIES * 88); /* exactly one block may go */
    static uint8_t body[186];
    static sb_item items[186];
    for (uint32_t i = 0; i < 186; i++) {
        items[i] = message_make(&b, 1, body + i, 1, 8, i);
    }
    uint64_t end, needed, tail = broker_tail(&b);
    CHECK_EQ(sb_append(&b.r, SB_NIL, items, 186, NULL, 0, 0, 0, &end, &needed), SB_NO_INDEX);
    CHECK_EQ(broker_tail(&b), tail);
    check_invariants(&b); /* whoever still has the block, its entries are that queue's */
    CHECK(needed <= tail);
    sb_store(&sb_marks(&b.r)->dispatched, needed);
    CHECK_EQ(sb_append(&b.r, SB_NIL, items, 186, NULL, 0, 0, 0, &end, &needed), SB_OK);
    check_invariants(&b);
    broker_close(&b);
}

/* -- effects ------------------------------------------------------------------------------------------------------ */

static void effects_come_true_with_the_records_or_not_at_all(void)
{
    setup();
    sb_claims *claims = sb_claims_at(&b.r, 0);
    const uint64_t held = (5ull << 2) | SB_CLAIM_HELD, acked = SB_CLAIM_ACKED;
    sb_store(&claims->word[3], held);
    sb_store(&claims->word[4], held + 4);
    sb_word *plain = &sb_group_at(&b.r, 0)->subscription_generation;
    uint8_t body[10];
    sb_item item = message_make(&b, 0, body, 10, 7, 1);
    uint64_t end, needed;
    sb_effect lost[] = {{&claims->word[3], held, acked, 1}, {plain, 0, 6, 0}, {&claims->word[4], held, acked, 1}};
    CHECK_EQ(sb_append(&b.r, SB_NIL, &item, 1, lost, 3, 0, 0, &end, &needed), SB_LOST);
    CHECK(sb_load(&claims->word[3]) == held && sb_load(&claims->word[4]) == held + 4 && sb_load(plain) == 0);
    CHECK_EQ(broker_tail(&b), 0);
    sb_effect lost_plain[] = {{&claims->word[3], held, acked, 1}, {plain, 5, 6, 0}};
    CHECK_EQ(sb_append(&b.r, SB_NIL, &item, 1, lost_plain, 2, 0, 0, &end, &needed), SB_LOST);
    CHECK(sb_load(&claims->word[3]) == held && sb_load(plain) == 0 && broker_tail(&b) == 0);
    check_invariants(&b);
    sb_effect won[] = {{&claims->word[3], held, acked, 1}, {plain, 0, 6, 0}, {&claims->word[4], held + 4, 0, 1}};
    CHECK_EQ(sb_append(&b.r, SB_NIL, &item, 1, won, 3, 0, 0, &end, &needed), SB_OK);
    CHECK(sb_load(&claims->word[3]) == acked && sb_load(&claims->word[4]) == 0 && sb_load(plain) == 6);
    check_invariants(&b);
    broker_close(&b);
}

static void effects_go_back_when_the_index_is_full(void)
{
    broker_open(&b, (broker_shape){.ring_bytes = RING, .segment_bytes = SEGMENT, .queues = 2, .blocks = 8});
    (void)use_up_the_blocks(0);
    sb_claims *claims = sb_claims_at(&b.r, 0);
    const uint64_t held = (5ull << 2) | SB_CLAIM_HELD;
    sb_store(&claims->word[3], held);
    uint8_t body[10];
    sb_item item = message_make(&b, 0, body, 10, 7, 1);
    uint64_t end, needed;
    sb_effect effect = {&claims->word[3], held, SB_CLAIM_ACKED, 1};
    CHECK_EQ(sb_append(&b.r, SB_NIL, &item, 1, &effect, 1, 0, 0, &end, &needed), SB_NO_INDEX);
    CHECK_EQ(sb_load(&claims->word[3]), held);
    check_invariants(&b);
    broker_close(&b);
}

/* -- ids ---------------------------------------------------------------------------------------------------------- */

static void a_dedup_id_is_stored_once_even_after_the_ring_has_passed_it(void)
{
    setup();
    sb_item first, again, other;
    CHECK_EQ(broker_send(&b, 0, 10, 500, 900, SB_APPEND_DEDUP, &first), SB_OK);
    CHECK_EQ(broker_send(&b, 1, 10, 500, 900, SB_APPEND_DEDUP, &again), SB_DUPLICATE);
    CHECK_EQ(again.position, first.position);
    CHECK_EQ(broker_send(&b, 0, 10, 500, 901, SB_APPEND_DEDUP, &other), SB_OK);
    for (uint32_t i = 0; i < 100; i++) {
        broker_settle(&b);
        (void)sent(0, 4000, i);
    }
    CHECK_EQ(broker_send(&b, 0, 10, 500, 900, SB_APPEND_DEDUP, &again), SB_DUPLICATE);
    CHECK_EQ(again.position, first.position);
    check_invariants(&b);
    broker_close(&b);
}

static void the_last_dedup_ids_are_remembered_no_fewer_and_no_more(void)
{
    setup();
    sb_item first, again;
    uint32_t ids = b.r.limits.ids;
    for (uint32_t lap = 0; lap < 3; lap++) {
        uint64_t base = 1000 + (uint64_t)lap * 10 * ids;
        for (uint32_t i = 0; i < ids; i++) {
            broker_settle(&b);
            CHECK_EQ(broker_send(&b, 0, 10, 500, base + i, SB_APPEND_DEDUP, &first), SB_OK);
        }
        for (uint32_t i = 0; i < ids; i++) {
            CHECK_EQ(broker_send(&b, 0, 10, 500, base + i, SB_APPEND_DEDUP, &again), SB_DUPLICATE);
        }
        broker_settle(&b);
        CHECK_EQ(broker_send(&b, 0, 10, 500, base + ids, SB_APPEND_DEDUP, &first), SB_OK);
        CHECK_EQ(broker_send(&b, 0, 10, 500, base + 1, SB_APPEND_DEDUP, &again), SB_DUPLICATE);
        CHECK_EQ(broker_send(&b, 0, 10, 500, base, SB_APPEND_DEDUP, &again), SB_OK);
    }
    check_invariants(&b);
    broker_close(&b);
}

static void a_client_is_told_of_its_own_resend(void)
{
    setup();
    uint32_t client, generation;
    CHECK_EQ(sb_client_join(&b.r, 1, 1, 77, "me", &client, &generation), SB_OK);
    uint8_t body[100];
    uint64_t end, needed;
    sb_item item = message_make(&b, 0, body, 100, 77, 5);
    CHECK_EQ(sb_append(&b.r, client, &item, 1, NULL, 0, SB_APPEND_RESEND, 0, &end, &needed), SB_OK);
    uint64_t position = item.position;
    (void)sent(1, 100, 5); /* the same sequence, another incarnation */
    item = message_make(&b, 0, body, 100, 77, 5);
    CHECK_EQ(sb_append(&b.r, client, &item, 1, NULL, 0, SB_APPEND_RESEND, 0, &end, &needed), SB_DUPLICATE);
    CHECK_EQ(item.position, position);
    for (uint32_t i = 0; i < 40; i++) { /* the ring passes it: the window is believed */
        broker_settle(&b);
        (void)sent(0, 4000, i);
    }
    CHECK_EQ(sb_append(&b.r, client, &item, 1, NULL, 0, SB_APPEND_RESEND, 0, &end, &needed), SB_DUPLICATE);
    item.sequence = 5 + SB_ID_WINDOW;
    CHECK_EQ(sb_append(&b.r, client, &item, 1, NULL, 0, SB_APPEND_RESEND, 0, &end, &needed), SB_OK);
    broker_close(&b);
}

/* A refused append may have overwritten old ring bytes (write_limit is ahead of tail): a record that lies there is
 * compared with nothing. */
static void a_resend_is_known_after_a_refused_append_overwrote_the_record(void)
{
    broker_open(&b, (broker_shape){.ring_bytes = RING, .segment_bytes = SEGMENT, .queues = 2, .blocks = 8});
    uint32_t client, generation;
    CHECK_EQ(sb_client_join(&b.r, 1, 1, 77, "me", &client, &generation), SB_OK);
    uint8_t body[100];
    uint64_t end, needed;
    CHECK_EQ(use_up_the_blocks(0), 8 * SB_BLOCK_ENTRIES);
    uint64_t lap = broker_tail(&b) / RING;
    sb_store(&sb_marks(&b.r)->dispatched, broker_tail(&b));
    sb_item item = message_make(&b, 1, body, 100, 77, 5);
    CHECK_EQ(sb_append(&b.r, client, &item, 1, NULL, 0, SB_APPEND_RESEND, 0, &end, &needed), SB_OK);
    CHECK(lap == item.position / RING);
    uint64_t position = item.position;
    sb_store(&sb_marks(&b.r)->dispatched, 0);
    /* Queue 1's block takes 127 more; a lap later a full block must be found, and none may go. */
    for (uint32_t i = 0; broker_tail(&b) < position + RING - 100; i++) {
        sb_store(&sb_marks(&b.r)->flushed, broker_tail(&b));
        uint64_t left = position + RING - broker_tail(&b);
        uint64_t segment_left = SEGMENT - broker_tail(&b) % SEGMENT;
        left = left < segment_left ? left : segment_left;
        sb_item step;
        CHECK_EQ(broker_send(&b, 1, left > 2000 ? 1000 : (uint32_t)left - SB_RECORD_HEADER, 8, i, 0, &step), SB_OK);
    }
    sb_store(&sb_marks(&b.r)->flushed, broker_tail(&b));
    sb_item refused;
    CHECK_EQ(broker_send(&b, 0, 500, 8, 1000, 0, &refused), SB_NO_INDEX);
    CHECK(sb_load(&sb_marks(&b.r)->write_limit) > position + RING && broker_tail(&b) <= position + RING);
    item = message_make(&b, 1, body, 100, 77, 5);
    CHECK_EQ(sb_append(&b.r, client, &item, 1, NULL, 0, SB_APPEND_RESEND, 0, &end, &needed), SB_DUPLICATE);
    CHECK_EQ(item.position, position);
    broker_close(&b);
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(what_was_appended_is_read_back),
        TEST(a_flipped_bit_in_the_ring_is_no_record),
        TEST(every_size_crosses_the_end_of_the_ring_and_stays_whole),
        TEST(less_than_a_header_before_the_end_of_a_segment_is_zeros),
        TEST(exactly_a_header_before_the_end_of_a_segment_is_a_filler),
        TEST(a_group_that_does_not_fit_begins_the_next_segment),
        TEST(a_group_that_just_fits_ends_its_segment),
        TEST(a_full_ring_refuses_and_says_what_it_waits_for),
        TEST(the_filler_counts_when_space_is_short),
        TEST(capacity_bounds_users_and_system_apart),
        TEST(states_decide_who_may_append),
        TEST(a_group_over_its_limits_is_refused_whole),
        TEST(a_group_that_overflows_the_undo_area_leaves_nothing),
        TEST(an_empty_index_pool_waits_for_the_dispatcher),
        TEST(an_append_refused_halfway_spoils_no_index),
        TEST(effects_come_true_with_the_records_or_not_at_all),
        TEST(effects_go_back_when_the_index_is_full),
        TEST(a_dedup_id_is_stored_once_even_after_the_ring_has_passed_it),
        TEST(the_last_dedup_ids_are_remembered_no_fewer_and_no_more),
        TEST(a_client_is_told_of_its_own_resend),
        TEST(a_resend_is_known_after_a_refused_append_overwrote_the_record),
    };
    return CHECK_MAIN(tests);
}
