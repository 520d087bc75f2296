/* queue_lock_test.c: who owns a queue, what the kernel undoes, and which message its owner may have. */
#include <errno.h>
#include <sys/sem.h>

#include "claims.h"
#include "failpoint.h"
#include "janitor.h"
#include "queue_lock.h"
#include "wait.h"

#define SLOT 3u

static int locks;

static void setup_locks(void)
{
    setup(0, 100);
    locks = semget(IPC_PRIVATE, (int)region.limits.claim_tables + 1, 0600);
    CHECK(locks >= 0);
}

static void teardown_locks(void)
{
    CHECK_EQ(sb_queue_locks_remove(locks), SB_OK);
    teardown();
}

static int own(uint32_t slot) { return sb_queue_own(&region, locks, table, life(), slot); }
static uint64_t owner(void) { return sb_load(&claims()->owner); }

static void a_queue_has_one_owner_until_it_is_given_up(void)
{
    setup_locks();
    sb_store(&claims()->wanted, 9);
    CHECK_EQ(own(SLOT), SB_OK);
    CHECK_EQ(owner(), SLOT + 1);
    CHECK_EQ(sb_load(&claims()->wanted), 0);
    CHECK_EQ(own(SLOT), SB_LOCKED); /* not twice, by the same process either */
    CHECK_EQ(own(5), SB_LOCKED);
    CHECK_EQ(sb_queue_own(&region, locks, table + 1, sb_load(&sb_claims_at(&region, table + 1)->state), 5), SB_OK); /* another queue */
    sb_queue_disown(&region, locks, table, SLOT, 1);
    CHECK_EQ(owner(), 0);
    CHECK_EQ(own(5), SB_OK);
    teardown_locks();
}

static void own_and_die(void *point)
{
    sb_failpoint_arm(*(int *)point, SB_FP_KILL, 1);
    CHECK_EQ(own(SLOT), SB_OK);
    sb_queue_disown(&region, locks, table, SLOT, 1);
}

static void the_kernel_gives_back_what_a_killed_owner_had_and_the_janitor_takes_its_name_down(void)
{
    int points[] = {SB_FP_queue_taken, SB_FP_queue_owned, SB_FP_queue_nameless, SB_FP_queue_freed};
    for (size_t i = 0; i < sizeof points / sizeof points[0]; i++) {
        setup_locks();
        CHECK_EQ(check_wait(check_fork(own_and_die, &points[i])), -SIGKILL);
        CHECK_EQ(sb_queue_bereave(&region, table, SLOT), points[i] == SB_FP_queue_owned);
        CHECK_EQ(owner(), 0);
        CHECK_EQ(own(5), SB_OK);
        teardown_locks();
    }
}

static void of_another_owner_the_janitor_takes_nothing_down(void)
{
    setup_locks();
    CHECK_EQ(own(SLOT), SB_OK);
    CHECK_EQ(sb_queue_bereave(&region, table, SLOT + 1), 0);
    CHECK_EQ(owner(), SLOT + 1);
    teardown_locks();
}

static void who_names_itself_in_a_life_that_is_over_takes_the_name_down(void)
{
    setup_locks();
    const uint64_t over = life();
    sb_store(&claims()->state, sb_claims_life(SB_SLOT_LIVE, sb_claims_incarnation(over) + 1));
    CHECK_EQ(sb_queue_own(&region, locks, table, over, SLOT), SB_LOCKED);
    CHECK_EQ(owner(), 0);
    CHECK_EQ(own(5), SB_OK); /* the semaphore is free as well */
    teardown_locks();
}

/* The table of the setup is given up while its owner is at work; the next that is made. */
static uint32_t made_beside_the_owned(void)
{
    uint32_t made;
    int created;
    CHECK_EQ(own(SLOT), SB_OK);
    sb_claims_give_up(claims(), life());
    CHECK_EQ(sb_claims_open(&region, GROUP, QUEUE, 0, sb_now_ns() + 1000000000, &made, &created), SB_OK);
    return made;
}

static void a_table_that_was_given_up_under_its_owner_is_the_last_to_be_taken(void)
{
    setup_locks();
    for (uint32_t i = table + 1; i < region.limits.claim_tables; i++) { /* there is no other */
        sb_store(&sb_claims_at(&region, i)->state, sb_claims_life(SB_SLOT_LIVE, 1));
    }
    CHECK_EQ(made_beside_the_owned(), table);
    CHECK_EQ(owner(), 0);
    teardown_locks();
    setup_locks();
    CHECK(made_beside_the_owned() != table);
    CHECK_EQ(owner(), SLOT + 1);
    sb_queue_disown(&region, locks, table, SLOT, 1);
    CHECK_EQ(owner(), 0);
    teardown_locks();
}

static void a_dead_owner_is_not_named_by_a_table_that_was_given_up(void)
{
    setup_locks();
    uint32_t slot, generation, released;
    CHECK_EQ(sb_client_join(&region, 1, 1, 1, "dead", &slot, &generation), SB_OK);
    CHECK_EQ(own(slot), SB_OK);
    sb_claims_give_up(claims(), life());
    CHECK_EQ(sb_client_reap(&region, slot, generation, &released), SB_OK);
    CHECK_EQ(owner(), 0);
    teardown_locks();
}

/* A pass of the janitor posts the owner, or another member; both sleep. */
static void pass_wakes(int of_owner, int of_other)
{
    uint32_t expired, next_ms, waiter[2], topic = 0;
    int posted[2];
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(sb_waiter_take(&region, i ? 5 : SLOT, &waiter[i]), SB_OK);
        sb_wait_message_begin(&region, waiter[i], GROUP, &topic, 1);
    }
    sb_janitor_pass(&region, (int64_t)NOW * 1000000, table + 1, &expired, &next_ms);
    for (uint32_t i = 0; i < 2; i++) {
        posted[i] = sb_waiter_is_posted(&region, waiter[i]);
        sb_wait_message_end(&region, waiter[i], &topic, 1);
        sb_waiter_give(&region, waiter[i]);
    }
    CHECK_EQ(posted[0], of_owner);
    CHECK_EQ(posted[1], of_other);
}

static void for_an_owned_queue_the_janitor_wakes_nobody_but_its_owner_who_can_go_on(void)
{
    setup_locks();
    CHECK_EQ(own(SLOT), SB_OK);
    pass_wakes(1, 0);
    sb_claim first = take(0, SLOT, LATER);
    pass_wakes(0, 0); /* it is at work, with a backlog behind */
    CHECK_EQ(ack(&first, SLOT), SB_OK);
    pass_wakes(1, 0);
    teardown_locks();
}

static void whose_semaphores_were_removed_is_told_so(void)
{
    setup(0, 100);
    locks = semget(IPC_PRIVATE, (int)region.limits.claim_tables + 1, 0600);
    CHECK_EQ(own(SLOT), SB_OK);
    CHECK_EQ(sb_queue_locks_remove(locks), SB_OK);
    CHECK_EQ(own(5), SB_GONE);
    sb_queue_disown(&region, locks, table, SLOT, 1); /* does no harm */
    CHECK_EQ(owner(), 0);
    CHECK_EQ(sb_queue_locks_test(locks, region.limits.claim_tables), -EINVAL);
    teardown();
}

static void a_set_is_made_once_and_known_by_its_size_and_its_user(void)
{
    int made, found, key = (int)getpid() | 0x40000000;
    uint32_t uid;
    CHECK_EQ(sb_queue_locks_make(key, 16, &made), SB_OK);
    CHECK_EQ(sb_queue_locks_make(key, 16, &found), -EEXIST);
    CHECK_EQ(sb_queue_locks_find(key, 16, &found, &uid), SB_OK);
    CHECK_EQ(found, made);
    CHECK_EQ(uid, geteuid());
    CHECK_EQ(sb_queue_locks_find(key, 17, &found, &uid), -EEXIST); /* another program's */
    CHECK_EQ(sb_queue_locks_test(made, 16), SB_OK);
    CHECK_EQ(sb_queue_locks_share(made, geteuid(), getegid(), 0660), SB_OK);
    CHECK_EQ(sb_queue_locks_remove(made), SB_OK);
    CHECK_EQ(sb_queue_locks_find(key, 16, &found, &uid), -ENOENT);
}

static void hold_the_last(void *argument)
{
    struct sembuf take = {.sem_num = *(unsigned short *)argument, .sem_op = 1, .sem_flg = SEM_UNDO};
    CHECK_EQ(semop(locks, &take, 1), 0);
}

static void the_test_of_the_kernel_waits_for_others_that_test_at_the_same_time(void)
{
    setup_locks();
    unsigned short last = (unsigned short)region.limits.claim_tables;
    pid_t other = check_fork(hold_the_last, &last);
    CHECK_EQ(sb_queue_locks_test(locks, region.limits.claim_tables), SB_OK);
    CHECK_EQ(check_wait(other), 0);
    teardown_locks();
}

static int oldest(uint64_t from, uint64_t *offset) { return sb_claim_oldest(&region, table, life(), from, NOW, offset); }

static void an_owner_may_have_the_oldest_that_is_not_acknowledged_and_nothing_behind_one_that_is_held(void)
{
    setup(0, 100);
    uint64_t offset;
    CHECK_EQ(oldest(0, &offset), SB_END);
    CHECK_EQ(offset, 0);
    sb_claim claim[4];
    for (uint64_t i = 0; i < 4; i++) {
        claim[i] = take(i, 1, i == 2 ? NOW : LATER); /* the third is over */
    }
    CHECK_EQ(oldest(0, &offset), SB_LOST);
    CHECK_EQ(ack(&claim[1], 1), SB_OK);
    CHECK_EQ(ack(&claim[0], 1), SB_OK);
    CHECK_EQ(oldest(0, &offset), SB_OK);
    CHECK_EQ(offset, 2);
    CHECK_EQ(oldest(3, &offset), SB_LOST);
    CHECK_EQ(sb_claim_release(&region, table, 3, claim[3].word, 1), SB_OK);
    CHECK_EQ(oldest(3, &offset), SB_OK);
    CHECK_EQ(oldest(4, &offset), SB_END);
    CHECK_EQ(offset, 4);
    teardown();
}

static void one_that_has_left_the_window_comes_first(void)
{
    setup(0, 1000);
    uint64_t offset;
    sb_claim first = take(0, 1, LATER);
    for (uint64_t o = 1; o < WINDOW; o++) {
        sb_claim claim = take(o, 2, LATER);
        CHECK_EQ(ack(&claim, 2), SB_OK);
    }
    CHECK_EQ(sb_claim_overflow(&region, table, life(), WINDOW), SB_OK);
    CHECK_EQ(base(), WINDOW);
    CHECK_EQ(oldest(0, &offset), SB_LOST);
    CHECK_EQ(offset, 0);
    CHECK_EQ(sb_claim_release(&region, table, 0, first.word, 1), SB_OK);
    CHECK_EQ(oldest(0, &offset), SB_OK);
    CHECK_EQ(offset, 0);
    CHECK_EQ(oldest(1, &offset), SB_END);
    CHECK_EQ(offset, WINDOW);
    teardown();
}

static void at_the_end_of_the_window_there_is_nothing_to_be_had(void)
{
    setup(0, 1000);
    uint64_t offset;
    (void)take(0, 1, LATER);
    for (uint64_t o = 1; o < WINDOW; o++) {
        sb_claim claim = take(o, 2, LATER);
        CHECK_EQ(ack(&claim, 2), SB_OK);
    }
    CHECK_EQ(oldest(1, &offset), SB_LOST);
    CHECK_EQ(offset, WINDOW);
    teardown();
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(a_queue_has_one_owner_until_it_is_given_up),
        TEST(the_kernel_gives_back_what_a_killed_owner_had_and_the_janitor_takes_its_name_down),
        TEST(of_another_owner_the_janitor_takes_nothing_down),
        TEST(who_names_itself_in_a_life_that_is_over_takes_the_name_down),
        TEST(a_table_that_was_given_up_under_its_owner_is_the_last_to_be_taken),
        TEST(a_dead_owner_is_not_named_by_a_table_that_was_given_up),
        TEST(for_an_owned_queue_the_janitor_wakes_nobody_but_its_owner_who_can_go_on),
        TEST(whose_semaphores_were_removed_is_told_so),
        TEST(a_set_is_made_once_and_known_by_its_size_and_its_user),
        TEST(the_test_of_the_kernel_waits_for_others_that_test_at_the_same_time),
        TEST(an_owner_may_have_the_oldest_that_is_not_acknowledged_and_nothing_behind_one_that_is_held),
        TEST(one_that_has_left_the_window_comes_first),
        TEST(at_the_end_of_the_window_there_is_nothing_to_be_had),
    };
    return CHECK_MAIN(tests);
}
