/* stress_test.c: writers that are killed again and again, readers that follow the log, a flusher that frees the ring when
 * all readers have read it. Every acknowledged message is read by every reader, once, whole and in its writer's order;
 * of the message in a killed writer's hands there is all or nothing, and of its batch all or none. */
#include <sched.h>

#include "broker.h"
#include "wait.h"

#define WRITERS 4u
#define READERS 4u
#define LIVES 6u /* how often each writer is killed and born again */
#define GROUP 5u
#define RING 65536u
#define SEGMENT 98304u

static broker b;

typedef struct {
    _Atomic uint64_t acked[WRITERS][LIVES + 1]; /* last sequence that sb_append has confirmed */
    _Atomic uint64_t read[READERS];            /* position up to which a reader has read */
    _Atomic uint64_t seen[READERS][WRITERS][LIVES + 1];
    _Atomic uint64_t end; /* of the log, when all writers are gone; 0: not yet */
    uint64_t per_life;
} board;
static board *shared;

typedef struct {
    uint32_t writer, life;
} role;

static uint64_t incarnation_of(uint32_t writer, uint32_t life) { return (uint64_t)(writer + 1) << 32 | life; }

/* Sequences 1, 2, 3, ...; every seventh append is a group of five over all queues. */
static void write_all(void *argument)
{
    const role *me = argument;
    static uint8_t bodies[GROUP][3000];
    uint64_t sequence = 0;
    uint32_t slot = SB_NIL;
    for (uint64_t i = 0; me->life < LIVES || i < shared->per_life; i++) {
        sb_item items[GROUP];
        uint32_t count = i % 7 == 6 ? GROUP : 1;
        for (uint32_t k = 0; k < count; k++) {
            uint32_t bytes = (uint32_t)(i * 7919 % (i % 3 ? 100 : 3000));
            items[k] = message_make(&b, (uint32_t)(i + k) % 4, bodies[k], bytes, incarnation_of(me->writer, me->life), sequence + 1 + k);
        }
        uint64_t end;
        int code;
        do {
            code = sb_append_wait(&b.r, me->writer, items, count, NULL, 0, 0, sb_now_ns() + 60 * BROKER_SECOND_NS, &end, &slot);
        } while (code == SB_INTERRUPTED);
        CHECK_EQ(code, SB_OK);
        sequence += count;
        atomic_store(&shared->acked[me->writer][me->life], sequence);
        sb_append_wake(&b.r, items, count);
    }
}

static void check_message(uint32_t reader, const uint8_t *record, uint32_t size, uint64_t *next_offset)
{
    sb_record h;
    memcpy(&h, record, sizeof h);
    CHECK(message_is_whole(record, size));
    uint64_t writer = (h.incarnation >> 32) - 1, life = h.incarnation & 0xffffffff;
    CHECK(writer < WRITERS && life <= LIVES);
    CHECK_EQ(h.sequence, atomic_load(&shared->seen[reader][writer][life]) + 1);
    atomic_store(&shared->seen[reader][writer][life], h.sequence);
    CHECK(h.queue_id < 4);
    CHECK_EQ(h.queue_offset, next_offset[h.queue_id]++);
}

static void read_all(void *argument)
{
    const uint32_t reader = *(uint32_t *)argument;
    static uint8_t record[RING];
    uint64_t position = 0, group_end = 0, next_offset[4] = {0};
    for (;;) {
        uint32_t size;
        int code = sb_ring_read(&b.r, position, record, sizeof record, &size);
        if (code == SB_END) {
            uint64_t end = atomic_load(&shared->end);
            if (end && position >= end) {
                CHECK_EQ(group_end, 0);
                return;
            }
            (void)sched_yield();
            continue;
        }
        CHECK_EQ(code, SB_OK);
        sb_record h;
        memcpy(&h, record, sizeof h);
        if (h.group_bytes) {
            CHECK_EQ(group_end, 0);
            group_end = sb_record_next(position, h.group_bytes, SEGMENT);
            CHECK(group_end <= broker_tail(&b)); /* a group is there at once */
        }
        CHECK_EQ((h.flags & SB_FLAG_GROUP) != 0, group_end != 0);
        if (h.kind == SB_KIND_MESSAGE) {
            check_message(reader, record, size, next_offset);
        }
        position = sb_record_next(position, size, SEGMENT);
        group_end = position == group_end ? 0 : group_end;
        atomic_store(&shared->read[reader], position);
    }
}

static void flush_all(void *unused)
{
    (void)unused;
    uint64_t flushed = 0;
    for (;;) {
        uint64_t lowest = UINT64_MAX;
        for (uint32_t i = 0; i < READERS; i++) {
            uint64_t at = atomic_load(&shared->read[i]);
            lowest = at < lowest ? at : lowest;
        }
        uint64_t end = atomic_load(&shared->end);
        if (end && lowest >= end) {
            return;
        }
        if (lowest > flushed) {
            flushed = lowest;
            sb_store(&sb_marks(&b.r)->dispatched, flushed);
            (void)sb_wake_position(&b.r, SB_WAIT_DISPATCH, flushed);
            (void)sb_publish_flushed(&b.r, flushed);
        } else {
            (void)sched_yield();
        }
    }
}

/* What the janitor does, at the places where it matters here. */
static void bury(pid_t pid, uint32_t writer)
{
    CHECK_EQ(check_wait(pid), -SIGKILL);
    (void)sb_append_lock_check(&b.r);
    (void)sb_waiter_reap(&b.r, writer);
}

static void writers_may_die_at_any_time(void)
{
    broker_open(&b, (broker_shape){.ring_bytes = RING, .segment_bytes = SEGMENT, .queues = 4, .blocks = 16, .reserve_bytes = 4096});
    shared = check_shared(sizeof *shared);
    shared->per_life = 300;
    static role roles[WRITERS];
    static uint32_t numbers[READERS] = {0, 1, 2, 3};
    pid_t writers[WRITERS], readers[READERS], flusher = check_fork(flush_all, NULL);
    for (uint32_t i = 0; i < READERS; i++) {
        readers[i] = check_fork(read_all, &numbers[i]);
    }
    for (uint32_t i = 0; i < WRITERS; i++) {
        roles[i] = (role){.writer = i, .life = 0};
        writers[i] = check_fork(write_all, &roles[i]);
    }
    for (uint32_t kill_number = 0; kill_number < WRITERS * LIVES; kill_number++) {
        uint32_t i = kill_number % WRITERS;
        while (atomic_load(&shared->acked[i][roles[i].life]) < 40 + kill_number * 7) {
            CHECK_EQ(waitpid(flusher, NULL, WNOHANG), 0);
            (void)sched_yield();
        }
        CHECK(kill(writers[i], SIGKILL) == 0);
        bury(writers[i], i);
        roles[i].life++;
        writers[i] = check_fork(write_all, &roles[i]);
    }
    for (uint32_t i = 0; i < WRITERS; i++) {
        CHECK_EQ(check_wait(writers[i]), 0);
    }
    atomic_store(&shared->end, broker_tail(&b));
    for (uint32_t i = 0; i < READERS; i++) {
        CHECK_EQ(check_wait(readers[i]), 0);
    }
    CHECK_EQ(check_wait(flusher), 0);
    uint64_t total = 0;
    for (uint32_t w = 0; w < WRITERS; w++) {
        for (uint32_t life = 0; life <= LIVES; life++) {
            uint64_t acked = atomic_load(&shared->acked[w][life]), seen = atomic_load(&shared->seen[0][w][life]);
            CHECK(seen == acked || seen == acked + 1 || seen == acked + GROUP); /* the one in doubt: whole or not at all */
            total += seen;
            for (uint32_t reader = 1; reader < READERS; reader++) {
                CHECK_EQ(atomic_load(&shared->seen[reader][w][life]), seen);
            }
        }
    }
    uint64_t offsets = 0;
    for (uint32_t q = 0; q < 4; q++) {
        offsets += sb_load(&sb_queue_at(&b.r, b.slot[q])->next_offset);
    }
    CHECK_EQ(offsets, total);
    CHECK(broker_tail(&b) > 10 * (uint64_t)RING);
    check_invariants(&b);
    broker_close(&b);
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(writers_may_die_at_any_time),
    };
    return CHECK_MAIN(tests);
}
