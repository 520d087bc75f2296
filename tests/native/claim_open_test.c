/* claim_open_test.c: claim tables are found, made, and made anew for others. */
#include "claims.h"
#include "failpoint.h"

static void a_table_is_found_again_and_none_is_left_says_so(void)
{
    setup(5, 100);
    uint32_t again, found;
    int created;
    CHECK_EQ(sb_claims_open(&region, GROUP, QUEUE, 77, sb_now_ns() + 1000000000, &again, &created), SB_OK);
    CHECK(again == table && !created && base() == 5);
    CHECK_EQ(sb_claims_find(&region, GROUP, QUEUE + 1, &found), SB_NOT_FOUND);
    CHECK_EQ(sb_claims_find(&region, 99999, QUEUE, &found), SB_NOT_FOUND);
    for (uint32_t q = 3; q < 3 + region.limits.claim_tables; q++) {
        sb_queue_at(&region, q)->topic_id = 23 + q;
        int code = sb_claims_open(&region, GROUP, q, 0, sb_now_ns() + 1000000000, &found, &created);
        CHECK_EQ(code, q < 2 + region.limits.claim_tables ? SB_OK : SB_TABLE_FULL);
    }
    teardown();
}

static void die_with_the_definition_lock(void *unused)
{
    (void)unused;
    CHECK_EQ(sb_mutex_try(&region.control->locks.definition), SB_OK);
    raise(SIGKILL);
}

static void a_dead_owner_of_the_definition_lock_does_not_stop_opening(void)
{
    setup(0, 100);
    int created;
    CHECK_EQ(check_wait(check_fork(die_with_the_definition_lock, NULL)), -SIGKILL);
    sb_queue_at(&region, QUEUE + 1)->topic_id = 99;
    CHECK_EQ(sb_claims_open(&region, GROUP, QUEUE + 1, 0, sb_now_ns() + 1000000000, &table, &created), SB_OK);
    CHECK(created);
    teardown();
}

/* ---- made anew, for others ---- */

/* The topic is deleted, and its table goes to the next queue, of another topic, that somebody of the group consumes. */
static uint32_t make_anew(void)
{
    uint32_t made;
    int created;
    sb_claims_give_up(claims(), life());
    sb_queue_at(&region, QUEUE + 1)->topic_id = 99;
    sb_store(&sb_queue_at(&region, QUEUE + 1)->next_offset, 100);
    CHECK_EQ(sb_claims_open(&region, GROUP, QUEUE + 1, 0, sb_now_ns() + 1000000000, &made, &created), SB_OK);
    CHECK(created);
    return made;
}

static void a_table_made_anew_is_closed_to_whoever_knew_it_before(void)
{
    sb_claim claim;
    setup(0, 100);
    const uint64_t old = life();
    CHECK_EQ(make_anew(), table);
    CHECK_EQ(sb_claim_take(&region, table, old, 0, 7, NOW, LATER, &claim), SB_GONE);
    CHECK_EQ(sb_claim_skip(&region, table, old, 0), SB_GONE);
    CHECK_EQ(sb_claim_overflow(&region, table, old, 2 * WINDOW), SB_GONE);
    sb_claim_advance(&region, table, old, 50, LATER);
    CHECK_EQ(sb_claim_next(&region, table), 0);
    sb_claims_give_up(claims(), old);
    CHECK(sb_claims_is_live(life()));
    claim = take(0, 1, LATER);
    CHECK_EQ(sb_claim_attempts(claim.word), 1);
    CHECK_EQ(ack(&claim, 1), SB_OK);
    CHECK_EQ(base(), 1);
    teardown();
}

static void skip_and_stop(void *unused)
{
    (void)unused;
    sb_failpoint_arm(SB_FP_claim_chosen, SB_FP_STOP, 1);
    _exit(sb_claim_skip(&region, table, life(), 0) == SB_LOST ? 0 : 1);
}

static void take_and_stop(void *now_ms)
{
    sb_claim claim;
    sb_failpoint_arm(SB_FP_claim_chosen, SB_FP_STOP, 1);
    _exit(sb_claim_take(&region, table, life(), 0, 1, *(uint32_t *)now_ms, LATER, &claim) == SB_LOST ? 0 : 1);
}

static pid_t stopped(void (*body)(void *), void *argument)
{
    int status;
    pid_t pid = check_fork(body, argument);
    CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
    return pid;
}

/* Stopped with the word in its hands, it goes on when the word is the same offset's, of another topic. */
static void a_stalled_claimer_neither_acks_nor_claims_a_message_of_another_topic(void)
{
    struct {
        void (*body)(void *);
        uint32_t now;
    } cases[] = {{skip_and_stop, NOW}, {take_and_stop, NOW}, {take_and_stop, LATER}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int expired = cases[i].now == LATER; /* held in both lives, by the same slot for as long */
        sb_claim claim = {.offset = 0};
        setup(0, 100);
        if (expired) {
            (void)take(0, 1, LATER);
        }
        pid_t pid = stopped(cases[i].body, &cases[i].now);
        CHECK_EQ(make_anew(), table);
        if (expired) {
            claim = take(0, 1, LATER);
        }
        CHECK(kill(pid, SIGCONT) == 0);
        CHECK_EQ(check_wait(pid), 0);
        if (!expired) {
            claim = take(0, 1, LATER);
        }
        CHECK_EQ(sb_claim_attempts(claim.word), 1);
        CHECK_EQ(ack(&claim, 1), SB_OK);
        teardown();
    }
}

static void ack_and_stop(void *unused)
{
    (void)unused;
    sb_claim claim = take(0, 7, LATER);
    sb_failpoint_arm(SB_FP_claim_half_reset, SB_FP_STOP, 1);
    CHECK_EQ(ack(&claim, 7), SB_OK);
}

static void a_table_whose_base_is_being_moved_by_a_stopped_process_is_not_made_anew(void)
{
    setup(0, 100);
    pid_t pid = stopped(ack_and_stop, NULL);
    uint32_t other = make_anew();
    CHECK(other != table);
    CHECK(kill(pid, SIGCONT) == 0);
    CHECK_EQ(check_wait(pid), 0);
    sb_claims_give_up(sb_claims_at(&region, other), sb_load(&sb_claims_at(&region, other)->state));
    CHECK_EQ(make_anew(), table);
    CHECK_EQ(base(), 0);
    CHECK_EQ(try_take(0, 1, NOW), SB_OK);
    teardown();
}

static void overflow_and_die(void *edge)
{
    sb_failpoint_arm(*(int *)edge, SB_FP_KILL, 1);
    (void)sb_claim_overflow(&region, table, life(), WINDOW);
}

static void what_a_dead_process_was_moving_aside_goes_with_its_table(void)
{
    int edges[] = {SB_FP_claim_reserved, SB_FP_claim_moving, SB_FP_claim_moved};
    for (size_t e = 0; e < sizeof edges / sizeof edges[0]; e++) {
        setup(0, 100);
        (void)take(0, 1, LATER);
        CHECK_EQ(check_wait(check_fork(overflow_and_die, &edges[e])), -SIGKILL);
        CHECK_EQ(make_anew(), table);
        for (uint32_t i = 0; i < region.limits.overflow_claims; i++) {
            CHECK_EQ((uint32_t)sb_load(&sb_overflow_at(&region, i)->owner), 0);
        }
        CHECK_EQ(base(), 0);
        CHECK_EQ(try_take(0, 1, NOW), SB_OK);
        teardown();
    }
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(a_table_is_found_again_and_none_is_left_says_so),
        TEST(a_dead_owner_of_the_definition_lock_does_not_stop_opening),
        TEST(a_table_made_anew_is_closed_to_whoever_knew_it_before),
        TEST(a_stalled_claimer_neither_acks_nor_claims_a_message_of_another_topic),
        TEST(a_table_whose_base_is_being_moved_by_a_stopped_process_is_not_made_anew),
        TEST(what_a_dead_process_was_moving_aside_goes_with_its_table),
    };
    return CHECK_MAIN(tests);
}
