/* repair_test.c: a process is killed at every store of an append that does everything at once: it ends a segment, crosses
 * the ring's end, fills and takes index blocks, serves four queues in turns, remembers ids and carries effects. Whoever
 * takes the lock next must find all of it or nothing (R3). */
#include "broker.h"
#include "claim.h"
#include "failpoint.h"
#include "janitor.h"
#include "undo.h"

#define RING 65536u
#define SEGMENT (5u * 16384u)
#define QUEUES 4u
#define RECORDS 40u
#define BODY 30u
#define HELD ((5ull << 2) | SB_CLAIM_HELD)

static broker b;
static uint8_t bodies[RECORDS][BODY];
static sb_item group[RECORDS];

/* What must be the same when nothing happened, or new by exactly the group. */
typedef struct {
    uint64_t tail, next[QUEUES], bytes[QUEUES], claim, plain;
} state;

static sb_word *claim_word(void) { return &sb_claims_at(&b.r, 0)->word[3]; }
static sb_word *plain_word(void) { return &sb_group_at(&b.r, 0)->subscription_generation; }

static state state_now(void)
{
    state s = {.tail = broker_tail(&b), .claim = sb_load(claim_word()), .plain = sb_load(plain_word())};
    for (uint32_t i = 0; i < QUEUES; i++) {
        s.next[i] = sb_load(&sb_queue_at(&b.r, b.slot[i])->next_offset);
        s.bytes[i] = sb_load(&sb_queue_at(&b.r, b.slot[i])->bytes);
    }
    return s;
}

/* Queue 0 holds all blocks but one, queues 1 and 2 stand before the end of theirs, queue 3 has none; the segment and the
 * ring end within the next 2,000 bytes; everything is flushed and dispatched, so blocks may be taken. */
static state setup(void)
{
    sb_item item;
    uint64_t sequence = 1;
    broker_open(&b, (broker_shape){.ring_bytes = RING, .segment_bytes = SEGMENT, .tail = 3 * (uint64_t)SEGMENT, .queues = QUEUES, .blocks = 8});
    const uint64_t ends = 4 * (uint64_t)SEGMENT; /* a multiple of the ring's size, too */
    for (uint32_t i = 0; i < 4 * SB_BLOCK_ENTRIES; i++) {
        broker_settle(&b);
        CHECK_EQ(broker_send(&b, 0, 1, 7, sequence++, 0, &item), SB_OK);
        if (i % 4 < 2 && i / 4 < SB_BLOCK_ENTRIES - 3) {
            CHECK_EQ(broker_send(&b, 1 + i % 4, 1, 7, sequence++, 0, &item), SB_OK);
        }
    }
    while (broker_tail(&b) < ends - 2000) {
        broker_settle(&b);
        CHECK_EQ(broker_send(&b, 0, ends - 2000 - broker_tail(&b) > 700 ? 500 : 20, 7, sequence++, 0, &item), SB_OK);
    }
    CHECK(ends - broker_tail(&b) > SB_RECORD_HEADER);
    broker_settle(&b);
    sb_store(claim_word(), HELD);
    for (uint32_t i = 0; i < RECORDS; i++) {
        group[i] = message_make(&b, i % QUEUES, bodies[i], BODY, 99, i + 1);
    }
    check_invariants(&b);
    return state_now();
}

static int append_group(void)
{
    uint64_t end, needed;
    const sb_effect effects[] = {{claim_word(), HELD, SB_CLAIM_ACKED, 1}, {plain_word(), 0, 6, 0}};
    return sb_append(&b.r, SB_NIL, group, RECORDS, effects, 2, SB_APPEND_DEDUP, sb_now_ns() + BROKER_SECOND_NS, &end, &needed);
}

static void append_in_child(void *unused)
{
    (void)unused;
    _exit(append_group() == SB_OK ? 0 : 1);
}

/* Kill a child at pass `at` of failpoint `id`; 0: it was not passed so often. */
static int kill_at(int id, long at)
{
    sb_failpoint_arm(id, SB_FP_KILL, at);
    int left = check_wait(check_fork(append_in_child, NULL));
    sb_failpoint_arm(id, SB_FP_OFF, 0);
    CHECK(left == 0 || left == -SIGKILL);
    return left != 0;
}

static void check_all_or_nothing(const state *before, int published, uint64_t extra)
{
    state now = state_now();
    const uint64_t size = sb_padded(SB_RECORD_HEADER + BODY) * RECORDS;
    CHECK_EQ(now.tail, published ? 4 * (uint64_t)SEGMENT + size + extra : before->tail + extra);
    for (uint32_t i = 0; i < QUEUES; i++) {
        CHECK_EQ(now.next[i], before->next[i] + (published ? RECORDS / QUEUES : 0) + (i == 1 && extra));
        CHECK_EQ(now.bytes[i], before->bytes[i] + (published ? BODY * RECORDS / QUEUES : 0) + (i == 1 && extra ? 1 : 0));
    }
    CHECK_EQ(now.claim, published ? SB_CLAIM_ACKED : HELD);
    CHECK_EQ(now.plain, published ? 6 : 0);
}

/* The next append must work, whoever repairs, and leave everything in order. */
static void check_next_append(const state *before, int published, int locked, int janitor_first)
{
    sb_item own;
    if (janitor_first) {
        (void)sb_append_lock_check(&b.r);
        check_all_or_nothing(before, published, 0);
        check_invariants(&b);
    }
    CHECK_EQ(broker_send(&b, 1, 1, 8, 1, 0, &own), SB_OK);
    CHECK_EQ(sb_load(&sb_marks(&b.r)->lock_takeovers), locked);
    check_all_or_nothing(before, published, sb_padded(SB_RECORD_HEADER + 1));
    check_invariants(&b);
    CHECK_EQ(check_records(&b.r, before->tail), published ? RECORDS + 1 : 1);
    /* A second try with the same ids: the message is there once, whether the first had come true or not. */
    if (published) {
        uint64_t position = group[0].position;
        CHECK_EQ(append_group(), SB_DUPLICATE);
        CHECK(position == 0 && group[0].position == 4 * (uint64_t)SEGMENT);
    } else {
        broker_settle(&b);
        CHECK_EQ(append_group(), SB_OK);
        check_invariants(&b);
        CHECK_EQ(check_records(&b.r, before->tail), RECORDS + 1);
    }
}

static const struct {
    int id, published, locked;
} kills[] = {
    {SB_FP_append_locked, 0, 1},      {SB_FP_append_undo_written, 0, 1}, {SB_FP_append_armed, 0, 1},
    {SB_FP_append_write_limit, 0, 1}, {SB_FP_append_half_copied, 0, 1},  {SB_FP_append_copied, 0, 1},
    {SB_FP_append_effects, 0, 1},     {SB_FP_append_published, 1, 1},    {SB_FP_append_final, 1, 1},
    {SB_FP_append_disarmed, 1, 1},
};

static void all_or_nothing_wherever_the_writer_was_killed(void)
{
    for (size_t k = 0; k < sizeof kills / sizeof kills[0]; k++) {
        long passes = 0;
        for (long at = 1;; at += at < 12 ? 1 : 7) {
            state before = setup();
            int killed = kill_at(kills[k].id, at);
            if (killed) {
                passes = at;
                check_next_append(&before, kills[k].published, kills[k].locked, (int)(at % 2));
            }
            broker_close(&b);
            if (!killed) {
                break;
            }
        }
        CHECK(passes >= (kills[k].id == SB_FP_append_undo_written || kills[k].id == SB_FP_append_armed ? 100 : 1));
    }
}

/* The janitor's repair is itself killed: the words are partly put back and the undo area still stands. */
static void a_repair_that_was_cut_short_is_done_again(void)
{
    static const int ids[] = {SB_FP_append_half_copied, SB_FP_append_effects, SB_FP_append_published};
    for (size_t k = 0; k < sizeof ids / sizeof ids[0]; k++) {
        (void)setup();
        CHECK(kill_at(ids[k], 1));
        const uint64_t bytes = b.r.control_bytes;
        uint8_t *dead = malloc(bytes), *whole = malloc(bytes);
        CHECK(dead != NULL && whole != NULL);
        memcpy(dead, b.r.base, bytes);
        sb_undo_repair(&b.r);
        memcpy(whole, b.r.base, bytes);
        const sb_undo *u = &((sb_control *)(void *)dead)->undo;
        const uint64_t n = sb_load(&u->count);
        const int published = ids[k] == SB_FP_append_published;
        CHECK(n > 50);
        for (uint64_t done = 1; done <= n; done += 3) {
            memcpy(b.r.base, dead, bytes);
            for (uint64_t i = 0; i < done; i++) {
                const sb_undo_entry *e = &u->entry[published ? i : n - 1 - i];
                sb_store((sb_word *)(void *)(b.r.base + (e->at & ~7ull)), published ? e->after : e->before);
            }
            sb_undo_repair(&b.r);
            CHECK(memcmp(b.r.base, whole, bytes) == 0);
        }
        free(dead);
        free(whole);
        broker_close(&b);
    }
}

/* A claim that its holder acked between the killed append's note and its mark is the holder's. */
static void repair_leaves_a_claim_alone_that_was_never_marked(void)
{
    (void)setup();
    CHECK(kill_at(SB_FP_append_undo_written, 1));
    sb_store(claim_word(), SB_CLAIM_ACKED);
    CHECK_EQ(append_group(), SB_LOST);
    CHECK_EQ(sb_load(claim_word()), SB_CLAIM_ACKED);
    check_invariants(&b);
    broker_close(&b);
}

/* Nor is a word taken back that somebody else holds again after the append had finished with it. */
static void repair_leaves_a_claim_alone_that_went_on_after_the_append(void)
{
    (void)setup();
    sb_item own;
    CHECK(kill_at(SB_FP_append_final, 1));
    CHECK_EQ(sb_load(claim_word()), SB_CLAIM_ACKED);
    sb_store(claim_word(), HELD + 4096);
    CHECK_EQ(broker_send(&b, 1, 1, 8, 1, 0, &own), SB_OK);
    CHECK_EQ(sb_load(claim_word()), HELD + 4096);
    check_invariants(&b);
    broker_close(&b);
}

/* The undo area lies in shared memory: whatever it says, repair stays inside the control segment. */
static void a_garbled_undo_area_is_not_followed_outside(void)
{
    (void)setup();
    CHECK(kill_at(SB_FP_append_effects, 1));
    sb_undo *u = &b.r.control->undo;
    u->entry[0].at = b.r.control_bytes;
    u->entry[1].at = UINT64_MAX;
    u->entry[2].at = 0;
    uint64_t magic = b.r.control->header.magic;
    sb_store(&u->count, UINT64_MAX);
    sb_undo_repair(&b.r);
    CHECK_EQ(b.r.control->header.magic, magic);
    CHECK_EQ(sb_load(&u->count), 0);
    broker_close(&b);
}

static void wait_until_stopped(pid_t pid)
{
    int status;
    CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
}

static void a_stopped_writer_blocks_writers_until_their_deadline_and_nobody_else(void)
{
    state before = setup();
    sb_item own;
    sb_failpoint_arm(SB_FP_append_copied, SB_FP_STOP, 1);
    pid_t pid = check_fork(append_in_child, NULL);
    sb_failpoint_arm(SB_FP_append_copied, SB_FP_OFF, 0);
    wait_until_stopped(pid);
    uint8_t body[1];
    uint64_t end, needed;
    int64_t deadline = sb_now_ns() + 30000000;
    own = message_make(&b, 1, body, 1, 8, 1);
    CHECK_EQ(sb_append(&b.r, SB_NIL, &own, 1, NULL, 0, 0, 0, &end, &needed), SB_LOCKED);
    CHECK_EQ(sb_append(&b.r, SB_NIL, &own, 1, NULL, 0, 0, deadline, &end, &needed), SB_TIMEOUT);
    CHECK(sb_now_ns() >= deadline);
    CHECK_EQ(sb_mutex_holder(&b.r.control->locks.append), pid);
    CHECK_EQ(sb_append_lock_check(&b.r), 0); /* slow is not dead */
    CHECK(sb_load(&b.r.control->undo.count) > 0);
    CHECK_EQ(broker_tail(&b), before.tail);
    sb_record h;
    CHECK_EQ(sb_ring_peek(&b.r, before.tail, &h), SB_END);
    CHECK(kill(pid, SIGCONT) == 0);
    CHECK_EQ(check_wait(pid), 0);
    CHECK_EQ(broker_send(&b, 1, 1, 8, 1, 0, &own), SB_OK);
    CHECK_EQ(check_records(&b.r, before.tail), RECORDS + 1);
    CHECK_EQ(sb_load(&sb_marks(&b.r)->lock_takeovers), 0);
    check_invariants(&b);
    broker_close(&b);
}

/* Killed while it creates a topic: all its queues with its record, or no trace of it but a free slot. */
static void define_in_child(void *unused)
{
    (void)unused;
    uint32_t slot;
    uint64_t needed;
    _exit(sb_topic_define(&b.r, "second", 5, 0, 0, 1, sb_now_ns() + BROKER_SECOND_NS, &slot, &needed) == SB_OK ? 0 : 1);
}

static void a_topic_whose_creator_was_killed_exists_whole_or_not_at_all(void)
{
    for (size_t k = 0; k < sizeof kills / sizeof kills[0]; k++) {
        if (kills[k].id == SB_FP_append_armed) {
            continue; /* not on this path: its effects are stored after tail */
        }
        uint32_t slot, slots[8];
        uint64_t needed;
        broker_open(&b, (broker_shape){.ring_bytes = RING, .segment_bytes = SEGMENT, .queues = QUEUES, .spare_queues = 5, .blocks = 16});
        sb_failpoint_arm(kills[k].id, SB_FP_KILL, 1);
        CHECK_EQ(check_wait(check_fork(define_in_child, NULL)), -SIGKILL);
        sb_failpoint_arm(kills[k].id, SB_FP_OFF, 0);
        (void)sb_append_lock_check(&b.r);
        CHECK_EQ(sb_topic_find(&b.r, "second", &slot), kills[k].published ? SB_OK : SB_NOT_FOUND);
        CHECK_EQ(sb_topic_define(&b.r, "second", 5, 0, 0, 1, sb_now_ns() + BROKER_SECOND_NS, &slot, &needed), SB_OK);
        CHECK_EQ(sb_topic_queues(&b.r, slot, slots, 8), 5);
        check_invariants(&b);
        broker_close(&b);
    }
}

/* The dead sender's message has an offset, but never existed: the message sent next gets that offset. */
static void a_group_made_behind_the_last_message_does_not_count_one_that_never_was(void)
{
    const int kills[] = {SB_FP_append_effects, SB_FP_append_published};
    for (uint64_t published = 0; published < 2; published++) {
        uint32_t tables[QUEUES];
        uint64_t lives[QUEUES];
        setup();
        sb_group_at(&b.r, 1)->group_id = 11;
        const uint64_t last[QUEUES] = {SB_NO_OFFSET};
        const uint64_t before = sb_load(&sb_queue_at(&b.r, b.slot[0])->next_offset);
        CHECK(kill_at(kills[published], 1));
        CHECK(sb_load(&sb_queue_at(&b.r, b.slot[0])->next_offset) > before);
        CHECK_EQ(sb_claims_open_topic(&b.r, 1, b.slot, QUEUES, last, sb_now_ns() + BROKER_SECOND_NS, tables, lives), SB_OK);
        CHECK_EQ(sb_load(&sb_claims_at(&b.r, tables[0])->base), before + published * (RECORDS / QUEUES));
        check_invariants(&b);
        broker_close(&b);
    }
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(all_or_nothing_wherever_the_writer_was_killed),
        TEST(a_repair_that_was_cut_short_is_done_again),
        TEST(repair_leaves_a_claim_alone_that_was_never_marked),
        TEST(repair_leaves_a_claim_alone_that_went_on_after_the_append),
        TEST(a_garbled_undo_area_is_not_followed_outside),
        TEST(a_stopped_writer_blocks_writers_until_their_deadline_and_nobody_else),
        TEST(a_topic_whose_creator_was_killed_exists_whole_or_not_at_all),
        TEST(a_group_made_behind_the_last_message_does_not_count_one_that_never_was),
    };
    return CHECK_MAIN(tests);
}
