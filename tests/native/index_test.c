/* index_test.c: the per-queue index: walks, limits, blocks that are reused, and look-ups that race with all of it.
 * What a look-up answers is compared with the record at that place, and with what the writer knows to be appended. */
#include <pthread.h>
#include <sched.h>

#include "broker.h"

#define RING 65536u
#define SEGMENT 98304u

static broker b;

static void setup(uint32_t queues, uint32_t blocks)
{
    broker_open(&b, (broker_shape){.ring_bytes = RING, .segment_bytes = SEGMENT, .queues = queues, .blocks = blocks});
}

static uint64_t send(uint32_t queue)
{
    static uint64_t sequence;
    sb_item item;
    broker_settle(&b);
    CHECK_EQ(broker_send(&b, queue, 1, 7, ++sequence, 0, &item), SB_OK);
    return item.position;
}

static int look_up(uint32_t queue, uint64_t offset, uint64_t limit, uint32_t count, sb_cursor *cursor, uint64_t *positions, uint32_t *found)
{
    return sb_index_lookup(&b.r, b.slot[queue], offset, limit, count, cursor, positions, found);
}

static void a_walk_finds_every_message_in_order(void)
{
    static uint64_t sent[400];
    uint64_t positions[400];
    setup(3, 32);
    for (uint32_t i = 0; i < 400; i++) {
        sent[i] = send(1);
        if (i % 3 == 0) {
            (void)send(i % 2 ? 0 : 2);
        }
    }
    for (uint32_t count = 1; count <= 200; count += count < 4 ? 1 : 49) {
        sb_cursor cursor = {.block = SB_NIL};
        uint64_t offset = 0;
        uint32_t found;
        while (look_up(1, offset, broker_tail(&b), count, &cursor, positions, &found) == SB_OK) {
            CHECK(found >= 1 && found <= count);
            CHECK(memcmp(positions, sent + offset, found * sizeof *sent) == 0);
            offset += found;
        }
        CHECK_EQ(offset, 400);
    }
    broker_close(&b);
}

static void nothing_at_or_past_the_limit_is_told(void)
{
    uint64_t positions[8];
    uint32_t found;
    setup(1, 8);
    uint64_t first = send(0), second = send(0);
    sb_cursor cursor = {.block = SB_NIL};
    CHECK_EQ(look_up(0, 0, first, 8, &cursor, positions, &found), SB_END);
    CHECK_EQ(look_up(0, 0, first + 1, 8, &cursor, positions, &found), SB_OK);
    CHECK_EQ(found, 1);
    CHECK_EQ(look_up(0, 0, second, 8, &cursor, positions, &found), SB_OK);
    CHECK_EQ(found, 1);
    CHECK_EQ(look_up(0, 1, second, 8, &cursor, positions, &found), SB_END);
    CHECK_EQ(look_up(0, 2, UINT64_MAX, 8, &cursor, positions, &found), SB_END);
    CHECK_EQ(sb_index_lookup(&b.r, b.r.limits.queues, 0, UINT64_MAX, 8, &cursor, positions, &found), SB_INVALID);
    broker_close(&b);
}

static void a_cursor_of_any_age_or_origin_does_no_harm(void)
{
    uint64_t position;
    uint32_t found;
    setup(2, 16);
    static uint64_t sent[600];
    for (uint32_t i = 0; i < 600; i++) {
        sent[i] = send(0);
        (void)send(1);
    }
    const sb_cursor odd[] = {{SB_NIL, 0}, {0, 0}, {3, 128}, {15, 512}, {16, 0}, {UINT32_MAX - 1, UINT64_MAX}, {1, 1}};
    for (size_t c = 0; c < sizeof odd / sizeof odd[0]; c++) {
        for (uint64_t offset = 0; offset < 600; offset += 7) {
            sb_cursor cursor = odd[c];
            CHECK_EQ(look_up(0, offset, broker_tail(&b), 1, &cursor, &position, &found), SB_OK);
            CHECK_EQ(position, sent[offset]);
        }
    }
    broker_close(&b);
}

static void what_left_the_index_is_behind_and_never_nothing(void)
{
    uint64_t position;
    uint32_t found;
    setup(2, 4);
    for (uint32_t i = 0; i < 1000; i++) {
        (void)send(0);
        (void)send(1);
    }
    for (uint32_t q = 0; q < 2; q++) {
        uint64_t first = sb_load(&sb_queue_at(&b.r, b.slot[q])->index_first);
        CHECK(first > 0 && first % SB_BLOCK_ENTRIES == 0);
        for (uint64_t offset = 0; offset < 1000; offset++) {
            sb_cursor cursor = {.block = SB_NIL};
            CHECK_EQ(look_up(q, offset, broker_tail(&b), 1, &cursor, &position, &found), offset < first ? SB_BEHIND : SB_OK);
        }
    }
    check_invariants(&b);
    broker_close(&b);
}

/* Recovery gives a queue its next offset; nothing of it is in memory. */
static void a_restored_queue_begins_in_the_middle_of_a_block(void)
{
    uint64_t position;
    uint32_t found;
    setup(1, 8);
    sb_queue *q = sb_queue_at(&b.r, b.slot[0]);
    sb_store(&q->next_offset, 300);
    sb_store(&q->index_first, 300);
    sb_cursor cursor = {.block = SB_NIL};
    CHECK_EQ(look_up(0, 299, UINT64_MAX, 1, &cursor, &position, &found), SB_BEHIND);
    CHECK_EQ(look_up(0, 300, UINT64_MAX, 1, &cursor, &position, &found), SB_END);
    for (uint32_t i = 0; i < 200; i++) {
        uint64_t sent = send(0);
        CHECK_EQ(look_up(0, 300 + i, UINT64_MAX, 1, &cursor, &position, &found), SB_OK);
        CHECK_EQ(position, sent);
    }
    CHECK_EQ(look_up(0, 299, UINT64_MAX, 1, &cursor, &position, &found), SB_BEHIND);
    check_invariants(&b);
    broker_close(&b);
}

/* What the consume queue did not get before the memory was lost; new messages follow without a seam. */
static void a_restored_index_tells_the_old_places_and_goes_on(void)
{
    uint64_t position, places[200];
    uint32_t found;
    setup(1, 8);
    sb_queue *q = sb_queue_at(&b.r, b.slot[0]);
    sb_store(&q->next_offset, 500);
    sb_store(&q->index_first, 500);
    for (uint32_t i = 0; i < 200; i++) {
        places[i] = 8u * i;
    }
    sb_store(&sb_marks(&b.r)->tail, 4096);
    sb_store(&sb_marks(&b.r)->flushed, 4096);
    sb_store(&sb_marks(&b.r)->write_limit, 4096);
    CHECK_EQ(sb_index_restore(&b.r, b.slot[0], 299, places, 200), SB_INVALID);
    CHECK_EQ(sb_index_restore(&b.r, b.slot[0], 300, places, 200), SB_OK);
    CHECK_EQ(sb_load(&b.r.control->undo.count), 0);
    sb_cursor cursor = {.block = SB_NIL};
    CHECK_EQ(look_up(0, 299, UINT64_MAX, 1, &cursor, &position, &found), SB_BEHIND);
    for (uint32_t i = 0; i < 300; i++) {
        uint64_t place = i < 200 ? places[i] : send(0);
        CHECK_EQ(look_up(0, 300 + i, UINT64_MAX, 1, &cursor, &position, &found), SB_OK);
        CHECK_EQ(position, place);
    }
    broker_close(&b);
}

static void a_deleted_topic_leaves_nothing_to_the_next_user_of_its_queues(void)
{
    uint64_t position, needed;
    uint32_t found;
    setup(4, 16);
    for (uint32_t i = 0; i < 300; i++) {
        (void)send(i % 4);
    }
    for (uint32_t round = 0; round < 10; round++) {
        const int64_t deadline = sb_now_ns() + BROKER_SECOND_NS;
        CHECK_EQ(sb_topic_delete(&b.r, "test", deadline, &needed), SB_OK);
        CHECK_EQ(sb_topic_define(&b.r, "test", 4, 0, 0, 1, deadline, &b.topic, &needed), SB_OK);
        CHECK_EQ(sb_topic_queues(&b.r, b.topic, b.slot, BROKER_QUEUES_MAX), 4);
        for (uint32_t q = 0; q < 4; q++) {
            sb_cursor cursor = {.block = SB_NIL};
            CHECK_EQ(look_up(q, 0, UINT64_MAX, 1, &cursor, &position, &found), SB_END);
            uint64_t sent = 0;
            for (uint32_t i = 0; i <= round * 40; i++) {
                sent = send(q);
            }
            CHECK_EQ(look_up(q, round * 40, UINT64_MAX, 1, &cursor, &position, &found), SB_OK);
            CHECK_EQ(position, sent);
        }
        check_invariants(&b);
    }
    broker_close(&b);
}

static void a_thousand_queues_share_one_pool(void)
{
    uint64_t position;
    uint32_t found;
    setup(1000, 1000 + RING / 88 / SB_BLOCK_ENTRIES + 1); /* what config.py reckons */
    for (uint32_t lap = 0; lap < 3; lap++) {
        for (uint32_t q = 0; q < 1000; q++) {
            uint64_t sent = send(q);
            sb_cursor cursor = {.block = SB_NIL};
            CHECK_EQ(look_up(q, q == 17 ? lap * 501 : lap, broker_tail(&b), 1, &cursor, &position, &found), SB_OK);
            CHECK_EQ(position, sent);
        }
        for (uint32_t i = 0; i < 500; i++) {
            (void)send(17); /* one hot queue among them */
        }
        check_invariants(&b);
        for (uint32_t q = 0; q < 1000; q += q == 16 ? 2 : 1) {
            sb_cursor cursor = {.block = SB_NIL};
            CHECK_EQ(look_up(q, 0, broker_tail(&b), 1, &cursor, &position, &found), SB_OK); /* a sparse queue keeps its block */
        }
    }
    broker_close(&b);
}

/* -- races -------------------------------------------------------------------------------------------------------- */

#define RACE_QUEUES 5u
#define READERS 2

static struct {
    uint64_t messages;
    _Atomic uint64_t known[RACE_QUEUES]; /* offsets before it were appended */
    _Atomic int done;
    _Atomic uint64_t answers[4]; /* OK, END, BEHIND, AGAIN */
    _Atomic uint64_t compared;
} race;

static void *write_race(void *seed_argument)
{
    uint64_t seed = (uint64_t)(uintptr_t)seed_argument;
    for (uint64_t i = 0; i < race.messages; i++) {
        sb_item items[12];
        uint8_t body[12];
        uint32_t count = 1 + (uint32_t)(i % 12);
        for (uint32_t k = 0; k < count; k++) { /* queue 0 is hot, the last one sparse */
            seed = seed * 6364136223846793005ull + 1442695040888963407ull;
            uint32_t draw = (uint32_t)(seed >> 59);
            items[k] = message_make(&b, draw < 20 ? 0 : draw < 31 ? draw % (RACE_QUEUES - 2) + 1 : RACE_QUEUES - 1, body + k, 1, seed, i);
        }
        uint64_t end, needed;
        int code;
        do {
            code = sb_append(&b.r, SB_NIL, items, count, NULL, 0, 0, sb_now_ns() + 20 * BROKER_SECOND_NS, &end, &needed);
            if (code == SB_NO_SPACE || code == SB_NO_INDEX) {
                sb_raise(&sb_marks(&b.r)->flushed, broker_tail(&b));
                sb_raise(&sb_marks(&b.r)->dispatched, broker_tail(&b));
                (void)sched_yield();
            }
        } while (code == SB_NO_SPACE || code == SB_NO_INDEX);
        CHECK_EQ(code, SB_OK);
        for (uint32_t k = 0; k < count; k++) {
            sb_raise(&race.known[items[k].queue_id], items[k].queue_offset + 1);
        }
    }
    return NULL;
}

static void compare_with_record(uint32_t queue, uint64_t offset, uint64_t position)
{
    uint8_t record[256];
    uint32_t size;
    sb_record h;
    int code = sb_ring_read(&b.r, position, record, sizeof record, &size);
    if (code == SB_BEHIND) {
        return;
    }
    CHECK_EQ(code, SB_OK);
    memcpy(&h, record, sizeof h);
    CHECK_EQ(h.queue_id, queue);
    CHECK_EQ(h.queue_offset, offset);
    CHECK(message_is_whole(record, size));
    atomic_fetch_add(&race.compared, 1);
}

static void *read_race(void *seed_argument)
{
    uint64_t seed = (uint64_t)(uintptr_t)seed_argument;
    sb_cursor cursors[RACE_QUEUES];
    for (uint32_t q = 0; q < RACE_QUEUES; q++) {
        cursors[q] = (sb_cursor){.block = SB_NIL};
    }
    while (!atomic_load(&race.done)) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        uint32_t queue = (uint32_t)(seed >> 40) % RACE_QUEUES, found = 0, count = 1 + (uint32_t)(seed >> 50) % 16;
        uint64_t known = atomic_load(&race.known[queue]), positions[16];
        uint64_t back = (seed >> 33) % ((seed >> 20) % 8 ? 150 : 2000);
        uint64_t offset = known > back ? known - back : 0;
        if (seed >> 63) { /* the block that is taken next */
            offset = sb_load(&sb_queue_at(&b.r, b.slot[queue])->index_first) + back % 4;
        }
        uint64_t limit = broker_tail(&b); /* before the look-up (R8) */
        int code = look_up(queue, offset, limit, count, &cursors[queue], positions, &found);
        switch (code) {
        case SB_OK:
            for (uint32_t i = 0; i < found; i++) {
                CHECK(positions[i] < limit);
                CHECK(i == 0 || positions[i] > positions[i - 1]);
                compare_with_record(queue, offset + i, positions[i]);
            }
            break;
        case SB_END:
            CHECK(offset >= known); /* never 'nothing' for what is there */
            break;
        case SB_BEHIND:
            CHECK(sb_load(&sb_queue_at(&b.r, b.slot[queue])->index_first) > offset);
            break;
        default:
            CHECK_EQ(code, SB_AGAIN);
        }
        atomic_fetch_add(&race.answers[code == SB_OK ? 0 : code - 1], 1);
    }
    return NULL;
}

static void run_race(uint32_t blocks, uint64_t messages)
{
    setup(RACE_QUEUES, blocks);
    memset(&race, 0, sizeof race);
    race.messages = messages;
    pthread_t writers[2], readers[READERS];
    for (uintptr_t i = 0; i < READERS; i++) {
        CHECK(pthread_create(&readers[i], NULL, read_race, (void *)(i + 77)) == 0);
    }
    for (uintptr_t i = 0; i < 2; i++) {
        CHECK(pthread_create(&writers[i], NULL, write_race, (void *)(i + 1)) == 0);
    }
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_join(writers[i], NULL) == 0);
    }
    while (atomic_load(&race.compared) < 1000) {
        (void)sched_yield();
    }
    atomic_store(&race.done, 1);
    for (int i = 0; i < READERS; i++) {
        CHECK(pthread_join(readers[i], NULL) == 0);
    }
    check_invariants(&b);
    CHECK(atomic_load(&race.answers[3]) * 100 <= atomic_load(&race.answers[0]) + 1000); /* SB_AGAIN is an exception */
    broker_close(&b);
}

static void look_ups_race_with_appends_and_block_reuse(void)
{
    run_race(RACE_QUEUES + 2, 4000);
    run_race(64, 4000);
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(a_walk_finds_every_message_in_order),
        TEST(nothing_at_or_past_the_limit_is_told),
        TEST(a_cursor_of_any_age_or_origin_does_no_harm),
        TEST(what_left_the_index_is_behind_and_never_nothing),
        TEST(a_restored_queue_begins_in_the_middle_of_a_block),
        TEST(a_restored_index_tells_the_old_places_and_goes_on),
        TEST(a_deleted_topic_leaves_nothing_to_the_next_user_of_its_queues),
        TEST(a_thousand_queues_share_one_pool),
        TEST(look_ups_race_with_appends_and_block_reuse),
    };
    return CHECK_MAIN(tests);
}
