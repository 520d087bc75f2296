/* prefetch_test.c: claims that nobody was shown yet (R10): uncounted, taken over, started just before the listener. */
#include <pthread.h>

#include "claims.h"
#include "failpoint.h"

static sb_claim prefetch(uint64_t offset, uint32_t slot) { return take(offset, slot, 0); }

static int start(const sb_claim *claim, uint32_t slot, sb_claim *started)
{
    return sb_claim_start(&region, table, claim->offset, claim->word, slot, LATER, started);
}

static void an_attempt_counts_when_the_listener_starts_and_not_before(void)
{
    setup(0, 100);
    sb_claim claim = prefetch(0, 1), started;
    CHECK_EQ(sb_claim_attempts(claim.word), 0);
    CHECK_EQ(try_take(0, 2, FAR), SB_LOST); /* it never expires */
    CHECK_EQ(start(&claim, 2, &started), SB_GONE); /* another's */
    CHECK_EQ(start(&claim, 1, &started), SB_OK);
    CHECK_EQ(sb_claim_attempts(started.word), 1);
    CHECK_EQ(sb_claim_deadline(started.word), LATER);
    CHECK_EQ(sb_load(&claims()->deadline_ms), LATER);
    CHECK_EQ(start(&claim, 1, &started), SB_GONE);
    CHECK_EQ(start(&started, 1, &started), SB_GONE); /* begun already */
    CHECK_EQ(ack(&claim, 1), SB_GONE);
    CHECK_EQ(ack(&started, 1), SB_OK);
    CHECK_EQ(base(), 1);
    teardown();
}

static void what_goes_back_before_it_was_started_was_not_delivered(void)
{
    setup(0, 100);
    sb_claim delivered = take(0, 1, LATER);
    CHECK_EQ(sb_claim_renew(&region, table, 0, delivered.word, 1, 0, &delivered), SB_OK); /* one attempt on its record */
    sb_claim claim = prefetch(0, 2);
    CHECK_EQ(sb_claim_attempts(claim.word), 1);
    CHECK_EQ(sb_claim_release(&region, table, 0, claim.word, 2), SB_OK);
    claim = prefetch(0, 2);
    CHECK_EQ(sb_claim_attempts(claim.word), 1);
    CHECK_EQ(sb_claims_reap(&region, table, 2, &undecided), 1);
    CHECK_EQ(sb_claim_attempts(take(0, 3, LATER).word), 2);
    teardown();
}

static void of_a_dead_process_what_was_started_counts_and_what_was_prefetched_does_not(void)
{
    setup(0, 100);
    sb_claim claim[3];
    for (uint64_t i = 0; i < 3; i++) {
        claim[i] = prefetch(i, 1);
    }
    CHECK_EQ(start(&claim[1], 1, &claim[1]), SB_OK);
    CHECK_EQ(sb_claims_reap(&region, table, 1, &undecided), 3);
    for (uint64_t i = 0; i < 3; i++) {
        CHECK_EQ(sb_claim_attempts(take(i, 2, LATER).word), i == 1 ? 2 : 1);
    }
    teardown();
}

static void an_idle_member_takes_over_what_another_has_prefetched_and_nothing_else(void)
{
    setup(0, 100);
    uint64_t offsets[8];
    sb_claim free_again, mine, started, held = take(0, 1, LATER), first = prefetch(1, 1), second = prefetch(2, 1);
    free_again = take(3, 1, LATER);
    CHECK_EQ(sb_claim_release(&region, table, 3, free_again.word, 1), SB_OK);
    CHECK_EQ(sb_claim_prefetched(&region, table, offsets, 8), 2);
    CHECK_EQ(offsets[0], 1);
    CHECK_EQ(offsets[1], 2);
    CHECK_EQ(sb_claim_take_over(&region, table, life(), 0, 2, 0, &mine), SB_LOST);
    CHECK_EQ(sb_claim_take_over(&region, table, life(), 3, 2, 0, &mine), SB_LOST);
    CHECK_EQ(sb_claim_take_over(&region, table, life(), 1, 2, 0, &mine), SB_OK);
    CHECK_EQ(start(&first, 1, &started), SB_GONE);
    CHECK_EQ(start(&mine, 2, &started), SB_OK);
    CHECK_EQ(sb_claim_attempts(started.word), 1);
    CHECK_EQ(start(&second, 1, &second), SB_OK);
    CHECK_EQ(sb_claim_take_over(&region, table, life(), 2, 2, 0, &mine), SB_LOST); /* the listener has it */
    CHECK_EQ(sb_claim_prefetched(&region, table, offsets, 8), 0);
    CHECK_EQ(sb_load(&claims()->prefetched), 0);
    CHECK_EQ(ack(&started, 2), SB_OK);
    CHECK_EQ(ack(&second, 1), SB_OK);
    CHECK_EQ(ack(&held, 1), SB_OK);
    CHECK_EQ(base(), 3);
    teardown();
}

/* A SimpleConsumer that is idle: receiving is delivering. */
static void taken_over_with_a_deadline_it_is_delivered(void)
{
    setup(0, 100);
    sb_claim claim = prefetch(0, 1), mine;
    CHECK_EQ(sb_claim_take_over(&region, table, life(), 0, 2, LATER, &mine), SB_OK);
    CHECK_EQ(sb_claim_attempts(mine.word), 1);
    CHECK_EQ(start(&claim, 1, &claim), SB_GONE);
    CHECK_EQ(ack(&mine, 2), SB_OK);
    teardown();
}

static void the_hint_of_prefetched_claims_outlives_scans_that_came_too_early_or_died(void)
{
    setup(0, 100);
    uint64_t offsets[8];
    uint32_t next;
    sb_claim claim;
    CHECK_EQ(sb_claim_take(&region, table, life(), 0, 1, NOW, 0, &claim), SB_OK);
    CHECK_EQ(sb_claim_prefetched(&region, table, offsets, 8), 0); /* still behind `next` */
    sb_claim_advance(&region, table, life(), 1, 0);
    CHECK_EQ(sb_claim_prefetched(&region, table, offsets, 8), 1);
    CHECK_EQ(sb_claim_prefetched(&region, table, offsets, 8), 1); /* nobody took it: it is still to be had */
    sb_store(&claims()->prefetched, 0);                           /* a scanner died behind taking it down */
    CHECK_EQ(sb_claims_expire(&region, table, NOW, 1, &next), 0);
    CHECK_EQ(sb_claim_prefetched(&region, table, offsets, 8), 1);
    teardown();
}

static void what_was_prefetched_long_ago_is_found_in_the_overflow_table(void)
{
    setup(0, 1000);
    uint64_t offsets[8];
    sb_claim old = prefetch(0, 1), mine;
    for (uint64_t o = 1; o < WINDOW; o++) {
        CHECK_EQ(sb_claim_skip(&region, table, life(), o), SB_OK);
    }
    CHECK_EQ(sb_claim_overflow(&region, table, life(), WINDOW), SB_OK);
    CHECK_EQ(base(), WINDOW);
    CHECK_EQ(sb_claim_prefetched(&region, table, offsets, 8), 1);
    CHECK_EQ(offsets[0], 0);
    CHECK_EQ(sb_claim_take_over(&region, table, life(), 0, 2, 0, &mine), SB_OK);
    CHECK_EQ(start(&old, 1, &old), SB_GONE);
    CHECK_EQ(start(&mine, 2, &mine), SB_OK);
    CHECK_EQ(ack(&mine, 2), SB_OK);
    CHECK_EQ(sb_load(&claims()->overflowed), 0);
    teardown();
}

/* ---- many at once, and killed ones ---- */

#define MEMBERS 4u
#define MESSAGES 5000u
#define AHEAD 8u

static uint8_t *acked_by; /* per offset: how often it was acked, and with which attempt */
static uint8_t *attempt_of;

/* Prefetch, then start and ack one by one; when there is nothing fresh, take over what others have not begun. */
static void work(uint32_t slot, uint64_t messages)
{
    sb_claim ahead[AHEAD];
    uint64_t offsets[AHEAD];
    while (base() < messages || (sb_load(&claims()->overflowed) && entries())) {
        uint32_t count = 0, n = sb_claim_released(&region, table, NOW, offsets, AHEAD);
        uint64_t from = sb_claim_next(&region, table);
        for (uint64_t o = from; n < AHEAD && o < messages && o < from + AHEAD; o++) {
            offsets[n++] = o;
        }
        for (uint32_t i = 0; i < n; i++) {
            int code = sb_claim_take(&region, table, life(), offsets[i], slot, NOW, 0, &ahead[count]);
            if (code == SB_NO_SPACE) {
                (void)sb_claim_overflow(&region, table, life(), offsets[i]);
                break;
            }
            count += code == SB_OK;
            if (offsets[i] >= from) {
                sb_claim_advance(&region, table, life(), offsets[i] + 1, 0);
            }
        }
        if (!count && sb_claim_prefetched(&region, table, offsets, 1)) {
            count += sb_claim_take_over(&region, table, life(), offsets[0], slot, 0, &ahead[0]) == SB_OK;
        }
        for (uint32_t i = 0; i < count; i++) {
            sb_claim started;
            int code = start(&ahead[i], slot, &started);
            if (code == SB_OK) {
                CHECK_EQ(sb_claim_ack(&region, table, started.offset, started.word, slot), SB_OK);
                attempt_of[started.offset] = (uint8_t)sb_claim_attempts(started.word);
                __atomic_add_fetch(&acked_by[started.offset], 1, __ATOMIC_RELAXED);
            } else {
                CHECK_EQ(code, SB_GONE);
            }
        }
        sb_claim_base(&region, table);
    }
}

static void *member(void *slot)
{
    work(*(const uint32_t *)slot, MESSAGES);
    return NULL;
}

static void racing_members_start_each_message_once_and_count_one_attempt(void)
{
    pthread_t threads[MEMBERS];
    uint32_t slots[MEMBERS];
    setup(0, MESSAGES);
    acked_by = check_shared(MESSAGES);
    attempt_of = check_shared(MESSAGES);
    for (uint32_t i = 0; i < MEMBERS; i++) {
        slots[i] = i;
        CHECK(pthread_create(&threads[i], NULL, member, &slots[i]) == 0);
    }
    for (uint32_t i = 0; i < MEMBERS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    for (uint64_t o = 0; o < MESSAGES; o++) {
        CHECK_EQ(acked_by[o], 1);
        CHECK_EQ(attempt_of[o], 1);
    }
    teardown();
}

#define CRASH_MESSAGES 300u

static void crash(void *argument)
{
    const int *point = argument;
    sb_failpoint_arm(point[0], SB_FP_KILL, point[1]);
    work(7, CRASH_MESSAGES);
    _exit(3); /* the failpoint was not passed often enough */
}

/* At each edge: nothing is lost, and at most the one message that the dead one had begun has a second attempt. */
static void a_kill_at_any_edge_counts_only_the_message_that_was_begun(void)
{
    const int edges[] = {SB_FP_claim_taken, SB_FP_claim_started, SB_FP_claim_acked};
    const int passes[] = {1, 2, 9, 30};
    for (size_t e = 0; e < sizeof edges / sizeof edges[0]; e++) {
        for (size_t p = 0; p < sizeof passes / sizeof passes[0]; p++) {
            setup(0, CRASH_MESSAGES);
            acked_by = check_shared(CRASH_MESSAGES);
            attempt_of = check_shared(CRASH_MESSAGES);
            int point[] = {edges[e], passes[p]};
            CHECK_EQ(check_wait(check_fork(crash, point)), -SIGKILL);
            (void)sb_claims_reap(&region, table, 7, &undecided);
            work(2, CRASH_MESSAGES);
            uint32_t unrecorded = 0, twice = 0;
            for (uint64_t o = 0; o < CRASH_MESSAGES; o++) {
                CHECK(acked_by[o] <= 1);
                CHECK(attempt_of[o] <= 2);
                unrecorded += acked_by[o] == 0;
                twice += attempt_of[o] == 2;
            }
            CHECK_EQ(unrecorded, edges[e] == SB_FP_claim_acked); /* killed between its ack and our count of it */
            CHECK_EQ(twice, edges[e] == SB_FP_claim_started);
            CHECK_EQ(base(), CRASH_MESSAGES);
            CHECK(munmap(acked_by, CRASH_MESSAGES) == 0 && munmap(attempt_of, CRASH_MESSAGES) == 0);
            teardown();
        }
    }
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(an_attempt_counts_when_the_listener_starts_and_not_before),
        TEST(what_goes_back_before_it_was_started_was_not_delivered),
        TEST(of_a_dead_process_what_was_started_counts_and_what_was_prefetched_does_not),
        TEST(an_idle_member_takes_over_what_another_has_prefetched_and_nothing_else),
        TEST(taken_over_with_a_deadline_it_is_delivered),
        TEST(the_hint_of_prefetched_claims_outlives_scans_that_came_too_early_or_died),
        TEST(what_was_prefetched_long_ago_is_found_in_the_overflow_table),
        TEST(racing_members_start_each_message_once_and_count_one_attempt),
        TEST(a_kill_at_any_edge_counts_only_the_message_that_was_begun),
    };
    return CHECK_MAIN(tests);
}
