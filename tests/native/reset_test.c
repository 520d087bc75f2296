/* reset_test.c: a group begins a queue anew, in another table: what it held before is void, whoever is killed where. */
#include "broker.h"
#include "claim.h"
#include "failpoint.h"
#include "overflow.h"

#define GROUP 1u
#define GROUP_ID 11u
#define HOLDER 5u
#define MESSAGES 300u
#define WINDOW 64u
#define NOW 1000u
#define FAR 0x7fffffffu

static broker b;
static uint32_t table; /* of the group, as long as nobody resets it */

static uint64_t life_of(uint32_t i) { return sb_load(&sb_claims_at(&b.r, i)->state); }

static uint32_t found(void)
{
    uint32_t now = SB_NIL;
    CHECK_EQ(sb_claims_find(&b.r, GROUP, b.slot[0], &now), SB_OK);
    return now;
}

static sb_claim take(uint64_t offset)
{
    sb_claim claim;
    CHECK_EQ(sb_claim_take(&b.r, table, life_of(table), offset, HOLDER, NOW, FAR, &claim), SB_OK);
    sb_claim_advance(&b.r, table, life_of(table), offset + 1, FAR);
    return claim;
}

/* Offset 0 is held, in the overflow table; WINDOW messages behind it are acknowledged, the next is held as well. */
static void setup(sb_claim held[2])
{
    int created;
    sb_item item;
    broker_open(&b, (broker_shape){.ring_bytes = 1u << 18, .segment_bytes = 1u << 20, .queues = 1, .blocks = 64});
    for (uint32_t i = 0; i < MESSAGES; i++) {
        CHECK_EQ(broker_send(&b, 0, 100, 7, i + 1, 0, &item), SB_OK);
    }
    broker_settle(&b);
    sb_group_at(&b.r, GROUP)->group_id = GROUP_ID;
    sb_store(&sb_group_at(&b.r, GROUP)->state, SB_SLOT_LIVE);
    CHECK_EQ(sb_claims_open(&b.r, GROUP, b.slot[0], 0, sb_now_ns() + BROKER_SECOND_NS, &table, &created), SB_OK);
    held[0] = take(0);
    for (uint64_t o = 1; o < WINDOW; o++) {
        sb_claim claim = take(o);
        CHECK_EQ(sb_claim_ack(&b.r, table, o, claim.word, HOLDER), SB_OK);
    }
    CHECK_EQ(sb_claim_overflow(&b.r, table, life_of(table), WINDOW), SB_OK);
    held[1] = take(WINDOW);
    sb_add(&sb_claims_at(&b.r, table)->acked, WINDOW - 1);
}

static int reset(uint64_t base, sb_reset *done)
{
    uint64_t needed;
    return sb_claims_reset(&b.r, GROUP_ID, sb_queue_at(&b.r, b.slot[0])->topic_id, 0, base, sb_now_ns() + BROKER_SECOND_NS, done, &needed);
}

static uint32_t overflow_entries(void)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < b.r.limits.overflow_claims; i++) {
        count += (uint32_t)sb_load(&sb_overflow_at(&b.r, i)->owner) != 0;
    }
    return count;
}

static void what_was_held_and_acknowledged_before_is_void(void)
{
    sb_claim held[2], claim;
    sb_reset done;
    setup(held);
    const uint64_t old = life_of(table);
    CHECK_EQ(overflow_entries(), 1);
    CHECK_EQ(reset(10, &done), SB_OK);
    CHECK(done.before == WINDOW && done.after == 10);
    const uint32_t now = found();
    const sb_claims *c = sb_claims_at(&b.r, now);
    CHECK(now != table && !sb_claims_is_live(life_of(table)));
    CHECK(sb_load(&c->base) == 10 && sb_load(&c->reset_generation) == 1 && sb_load(&c->acked) == WINDOW - 1);
    CHECK_EQ(overflow_entries(), 0);
    CHECK_EQ(sb_claim_take(&b.r, table, old, WINDOW + 1, HOLDER, NOW, FAR, &claim), SB_GONE);
    for (size_t i = 0; i < 2; i++) { /* its holder finds the table given up, whatever it does with the words there */
        CHECK_EQ(sb_claim_ack(&b.r, now, held[i].offset, held[i].word, HOLDER), SB_GONE);
    }
    CHECK_EQ(sb_claim_take(&b.r, now, life_of(now), 10, HOLDER, NOW, FAR, &claim), SB_OK);
    CHECK_EQ(sb_claim_attempts(claim.word), 1);
    CHECK_EQ(reset(SB_NO_OFFSET, &done), SB_OK);
    CHECK(done.before == 10 && done.after == MESSAGES && sb_load(&sb_claims_at(&b.r, found())->reset_generation) == 2);
    broker_close(&b);
}

static void what_there_is_not_is_not_reset(void)
{
    sb_claim held[2];
    sb_reset done;
    uint64_t needed;
    setup(held);
    const uint32_t topic_id = sb_queue_at(&b.r, b.slot[0])->topic_id;
    const int64_t deadline = sb_now_ns() + BROKER_SECOND_NS;
    const uint64_t tail = broker_tail(&b);
    CHECK_EQ(sb_claims_reset(&b.r, GROUP_ID + 1, topic_id, 0, 0, deadline, &done, &needed), SB_NOT_FOUND);
    CHECK_EQ(sb_claims_reset(&b.r, GROUP_ID, topic_id + 1, 0, 0, deadline, &done, &needed), SB_GONE);
    CHECK_EQ(sb_claims_reset(&b.r, GROUP_ID, topic_id, 1, 0, deadline, &done, &needed), SB_GONE);
    CHECK(broker_tail(&b) == tail && found() == table);
    broker_close(&b);
}

static void reset_and_die(void *failpoint)
{
    sb_reset done;
    sb_failpoint_arm(*(int *)failpoint, SB_FP_KILL, 1);
    _exit(reset(10, &done));
}

static void whoever_resets_and_is_killed_has_done_it_or_not(void)
{
    struct {
        int failpoint;
        uint64_t base;
    } cases[] = {{SB_FP_claim_remade, WINDOW},      {SB_FP_append_copied, WINDOW},  {SB_FP_append_effects, WINDOW},
                 {SB_FP_append_published, 10},      {SB_FP_append_unlocked, 10},    {SB_FP_claim_begun_anew, 10}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        sb_claim held[2];
        sb_reset done;
        setup(held);
        CHECK_EQ(check_wait(check_fork(reset_and_die, &cases[i].failpoint)), -SIGKILL);
        (void)sb_append_lock_check(&b.r);
        CHECK_EQ(sb_load(&sb_claims_at(&b.r, found())->base), cases[i].base);
        if (cases[i].base == WINDOW) { /* the holder knows of nothing */
            CHECK_EQ(sb_claim_ack(&b.r, table, 0, held[0].word, HOLDER), SB_OK);
            CHECK_EQ(sb_claim_ack(&b.r, table, WINDOW, held[1].word, HOLDER), SB_OK);
        }
        CHECK_EQ(reset(20, &done), SB_OK);
        CHECK_EQ(done.after, 20);
        broker_close(&b);
    }
}

static void reset_and_stop(void *stored)
{
    sb_reset done;
    sb_failpoint_arm(SB_FP_effect_stored, SB_FP_STOP, *(long *)stored);
    _exit(reset(10, &done));
}

static uint32_t live_tables(void)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < b.r.limits.claim_tables; i++) {
        count += (uint32_t)sb_claims_is_live(life_of(i));
    }
    return count;
}

/* Else retention would think that nobody needs the queue. */
static void whoever_looks_while_the_effects_are_stored_finds_a_table_or_that_the_definitions_moved(void)
{
    for (long stored = 1; stored <= 3; stored++) {
        sb_claim held[2];
        int status;
        setup(held);
        const uint64_t generation = sb_load(&sb_marks(&b.r)->topic_generation);
        const pid_t pid = check_fork(reset_and_stop, &stored);
        CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
        CHECK_EQ(live_tables(), stored < 3 ? 2 : 1); /* the new one first, the old one last */
        CHECK_EQ(sb_load(&sb_marks(&b.r)->topic_generation), generation + (stored > 1));
        CHECK(kill(pid, SIGKILL) == 0 && check_wait(pid) == -SIGKILL);
        (void)sb_append_lock_check(&b.r);
        CHECK(live_tables() == 1 && sb_load(&sb_claims_at(&b.r, found())->base) == 10);
        CHECK_EQ(sb_load(&sb_marks(&b.r)->topic_generation), generation + 1);
        broker_close(&b);
    }
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(what_was_held_and_acknowledged_before_is_void),
        TEST(what_there_is_not_is_not_reset),
        TEST(whoever_looks_while_the_effects_are_stored_finds_a_table_or_that_the_definitions_moved),
        TEST(whoever_resets_and_is_killed_has_done_it_or_not),
    };
    return CHECK_MAIN(tests);
}
