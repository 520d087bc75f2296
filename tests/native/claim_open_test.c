/* claim_open_test.c: claim tables are found, made, and made anew for others. */
#include "claims.h"

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

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(a_table_is_found_again_and_none_is_left_says_so),
        TEST(a_dead_owner_of_the_definition_lock_does_not_stop_opening),
    };
    return CHECK_MAIN(tests);
}
