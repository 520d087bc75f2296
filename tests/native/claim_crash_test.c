/* claim_crash_test.c: many claimers at once, killed ones and stopped ones. */
#include <pthread.h>

#include "claims.h"
#include "failpoint.h"

/* ---- many at once ---- */

#define RACERS 4u
#define RACE_MESSAGES 20000u

static uint8_t *acked_by; /* per offset: how often it was acked */

/* Consume until everything is acked; `hold_every`: hold some back, give some up, so that windows fill and claims move. */
static void consume_all(uint32_t slot, uint64_t messages, uint32_t hold_every)
{
    sb_claim kept[16];
    uint32_t kept_count = 0, turn = slot;
    uint64_t offsets[8];
    while (base() < messages || (sb_load(&claims()->overflowed) && entries())) {
        uint64_t from = sb_claim_next(&region, table);
        uint32_t taken = 0;
        uint32_t n = sb_claim_released(&region, table, NOW, offsets, 8);
        for (uint64_t o = from; n < 8 && o < from + 8 && o < messages; o++) {
            offsets[n++] = o;
        }
        for (uint32_t i = 0; i < n; i++) {
            sb_claim claim;
            int code = sb_claim_take(&region, table, life(), offsets[i], slot, NOW, FAR, &claim);
            if (code == SB_NO_SPACE) {
                (void)sb_claim_overflow(&region, table, life(), offsets[i]);
                break;
            }
            if (offsets[i] >= from) {
                sb_claim_advance(&region, table, life(), offsets[i] + 1, FAR);
            }
            if (code != SB_OK) {
                continue;
            }
            turn++;
            taken++;
            if (hold_every && turn % hold_every == 0 && kept_count < 16) {
                kept[kept_count++] = claim;
            } else if (hold_every && turn % 7 == 0) {
                CHECK_EQ(sb_claim_release(&region, table, claim.offset, claim.word, slot), SB_OK);
            } else {
                int done = sb_claim_ack(&region, table, claim.offset, claim.word, slot);
                CHECK(done == SB_OK);
                __atomic_add_fetch(&acked_by[claim.offset], 1, __ATOMIC_RELAXED);
                sb_claim_base(&region, table);
            }
        }
        if (kept_count && (kept_count == 16 || taken == 0)) {
            sb_claim claim = kept[0];
            memmove(kept, kept + 1, --kept_count * sizeof *kept);
            if (turn % 2 == 0) {
                CHECK_EQ(sb_claim_renew(&region, table, claim.offset, claim.word, slot, FAR - 1, &claim), SB_OK);
            }
            CHECK_EQ(sb_claim_ack(&region, table, claim.offset, claim.word, slot), SB_OK);
            __atomic_add_fetch(&acked_by[claim.offset], 1, __ATOMIC_RELAXED);
            sb_claim_base(&region, table);
        }
    }
}

typedef struct {
    uint32_t slot, hold_every;
} racer;

static void *race(void *argument)
{
    const racer *me = argument;
    consume_all(me->slot, RACE_MESSAGES, me->hold_every);
    return NULL;
}

static void race_threads(uint32_t hold_every)
{
    pthread_t threads[RACERS];
    racer racers[RACERS];
    setup(0, RACE_MESSAGES);
    acked_by = check_shared(RACE_MESSAGES);
    for (uint32_t i = 0; i < RACERS; i++) {
        racers[i] = (racer){.slot = i, .hold_every = hold_every};
        CHECK(pthread_create(&threads[i], NULL, race, &racers[i]) == 0);
    }
    for (uint32_t i = 0; i < RACERS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    for (uint64_t o = 0; o < RACE_MESSAGES; o++) {
        CHECK_EQ(acked_by[o], 1);
    }
    CHECK_EQ(base(), RACE_MESSAGES);
    teardown();
}

static void racing_threads_ack_each_message_exactly_once(void) { race_threads(0); }
static void racing_threads_that_hold_release_and_overflow_ack_each_message_exactly_once(void) { race_threads(5); }

/* ---- killed and stopped processes ---- */

#define CRASH_MESSAGES 600u

static int failpoint_named(const char *name)
{
    int id = 0;
    while (strcmp(sb_failpoint_name(id), name) != 0) {
        CHECK(++id < SB_FP_COUNT);
    }
    return id;
}

static void crash_consumer(void *argument)
{
    const int *point = argument;
    sb_failpoint_arm(point[0], SB_FP_KILL, point[1]);
    consume_all(7, CRASH_MESSAGES, 3);
    _exit(3); /* the failpoint was not passed often enough */
}

/* At each edge: what the dead one had acked stays acked, what it held comes back, nothing is lost or acked twice. */
static void a_kill_at_any_edge_loses_nothing_and_repeats_no_ack(void)
{
    const char *const edges[] = {"claim.taken", "claim.acked",    "claim.pending", "claim.half_reset",
                                 "claim.base",  "claim.reserved", "claim.moving",  "claim.moved"};
    const int passes[] = {1, 2, 5, 9};
    for (size_t e = 0; e < sizeof edges / sizeof edges[0]; e++) {
        for (size_t p = 0; p < sizeof passes / sizeof passes[0]; p++) {
            setup(0, CRASH_MESSAGES);
            acked_by = check_shared(CRASH_MESSAGES);
            int point[] = {failpoint_named(edges[e]), passes[p]};
            sb_claim blocker = take(0, 1, FAR); /* makes the window fill, so that claims move */
            CHECK_EQ(check_wait(check_fork(crash_consumer, point)), -SIGKILL);
            (void)sb_claims_reap(&region, table, 7, &undecided);
            uint32_t next;
            (void)sb_claims_expire(&region, table, NOW, 1, &next);
            CHECK_EQ(sb_claim_ack(&region, table, 0, blocker.word, 1), SB_OK);
            acked_by[0]++;
            sb_claim_base(&region, table);
            consume_all(2, CRASH_MESSAGES, 4);
            uint32_t unrecorded = 0;
            for (uint64_t o = 0; o < CRASH_MESSAGES; o++) {
                CHECK(acked_by[o] <= 1);
                unrecorded += acked_by[o] == 0;
            }
            CHECK(unrecorded <= (strcmp(edges[e], "claim.acked") == 0)); /* killed between its ack and our count of it */
            CHECK_EQ(base(), CRASH_MESSAGES);
            CHECK_EQ(sb_load(&claims()->moving_slot), 0);
            CHECK(munmap(acked_by, CRASH_MESSAGES) == 0);
            teardown();
        }
    }
}

static void stop_with_the_claim_lock(void *unused)
{
    (void)unused;
    sb_claim claim = take(0, 7, FAR);
    sb_failpoint_arm(SB_FP_claim_half_reset, SB_FP_STOP, 1);
    CHECK_EQ(ack(&claim, 7), SB_OK);
}

static void a_stopped_holder_of_the_claim_lock_stops_no_claim_and_no_ack(void)
{
    setup(0, 100);
    pid_t pid = check_fork(stop_with_the_claim_lock, NULL);
    int status;
    CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
    for (uint64_t o = 1; o < WINDOW; o++) {
        sb_claim claim = take(o, 1, LATER);
        CHECK_EQ(ack(&claim, 1), SB_OK);
    }
    CHECK_EQ(base(), 0);
    CHECK_EQ(try_take(WINDOW, 1, NOW), SB_NO_SPACE);
    CHECK_EQ(sb_claim_overflow(&region, table, life(), WINDOW), SB_LOCKED);
    CHECK(kill(pid, SIGCONT) == 0);
    CHECK_EQ(check_wait(pid), 0);
    CHECK_EQ(base(), WINDOW); /* it looked again after it had unlocked */
    teardown();
}

static void take_forever(void *unused)
{
    (void)unused;
    consume_all(7, CRASH_MESSAGES, 6);
}

static void kills_at_random_moments_lose_nothing(void)
{
    unsigned seed = 20261121;
    for (int round = 0; round < 60; round++) {
        setup(0, CRASH_MESSAGES);
        acked_by = check_shared(CRASH_MESSAGES);
        sb_claim blocker = take(0, 1, FAR);
        pid_t pid = check_fork(take_forever, NULL);
        uint64_t until = (uint64_t)(rand_r(&seed) % (int)CRASH_MESSAGES);
        while (sb_claim_next(&region, table) < until) {
            sb_pause();
        }
        CHECK(kill(pid, SIGKILL) == 0);
        CHECK_EQ(check_wait(pid), -SIGKILL);
        (void)sb_claims_reap(&region, table, 7, &undecided);
        CHECK_EQ(sb_claim_ack(&region, table, 0, blocker.word, 1), SB_OK);
        acked_by[0]++;
        consume_all(2, CRASH_MESSAGES, 0);
        uint32_t unrecorded = 0;
        for (uint64_t o = 0; o < CRASH_MESSAGES; o++) {
            CHECK(acked_by[o] <= 1);
            unrecorded += acked_by[o] == 0;
        }
        CHECK(unrecorded <= 1);
        CHECK(munmap(acked_by, CRASH_MESSAGES) == 0);
        teardown();
    }
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(racing_threads_ack_each_message_exactly_once),
        TEST(racing_threads_that_hold_release_and_overflow_ack_each_message_exactly_once),
        TEST(a_kill_at_any_edge_loses_nothing_and_repeats_no_ack),
        TEST(a_stopped_holder_of_the_claim_lock_stops_no_claim_and_no_ack),
        TEST(kills_at_random_moments_lose_nothing),
    };
    return CHECK_MAIN(tests);
}
