/* claim_test.c: claims, their table, its overflow and its repair; progress as runs is in progress_test.c. */
#include <errno.h>
#include <pthread.h>

#include "check.h"
#include "claim.h"
#include "failpoint.h"
#include "overflow.h"

#define WINDOW 64u
#define GROUP 1u
#define QUEUE 2u
#define NOW 1000u
#define LATER (NOW + 50u)
#define FAR 0x7fffffffu

static sb_region region;
static uint32_t table;

/* A region with one group, one queue of `messages` messages, and its claim table at `base`. */
static void setup(uint64_t base, uint64_t messages)
{
    int created;
    check_region(&region, check_limits());
    sb_group_at(&region, GROUP)->group_id = 11;
    sb_queue_at(&region, QUEUE)->topic_id = 22;
    sb_queue_at(&region, QUEUE)->queue_id = 3;
    sb_store(&sb_queue_at(&region, QUEUE)->next_offset, messages);
    CHECK_EQ(sb_claims_open(&region, GROUP, QUEUE, base, sb_now_ns() + 1000000000, &table, &created), SB_OK);
    CHECK(created);
}

static void teardown(void) { sb_region_unmap(&region); }

static sb_claims *claims(void) { return sb_claims_at(&region, table); }
static uint64_t base(void) { return sb_load(&claims()->base); }

static uint32_t entries(void) /* the counter in the table may be too high after a kill */
{
    uint32_t count = 0;
    uint64_t offset;
    sb_place place;
    for (uint32_t i = 0; i < region.limits.overflow_claims; i++) {
        count += (uint32_t)sb_overflow_live(&region, table, i, &offset, &place);
    }
    return count;
}

static sb_claim take(uint64_t offset, uint32_t slot, uint32_t deadline)
{
    sb_claim claim;
    CHECK_EQ(sb_claim_take(&region, table, offset, slot, NOW, deadline, &claim), SB_OK);
    sb_claim_advance(&region, table, offset + 1);
    return claim;
}

static int try_take(uint64_t offset, uint32_t slot, uint32_t now)
{
    sb_claim claim;
    return sb_claim_take(&region, table, offset, slot, now, now + 10, &claim);
}

static int ack(const sb_claim *claim, uint32_t slot)
{
    int code = sb_claim_ack(&region, table, claim->offset, claim->word, slot);
    sb_claim_base(&region, table);
    return code;
}

static void a_message_is_claimed_once_and_acked_once(void)
{
    setup(0, 100);
    sb_claim claim = take(0, 4, LATER);
    CHECK_EQ(sb_claim_attempts(claim.word), 1);
    CHECK_EQ(try_take(0, 5, NOW), SB_LOST);
    CHECK_EQ(ack(&claim, 5), SB_GONE); /* another's */
    CHECK_EQ(ack(&claim, 4), SB_OK);
    CHECK_EQ(base(), 1);
    CHECK_EQ(ack(&claim, 4), SB_GONE);
    CHECK_EQ(try_take(0, 5, NOW), SB_LOST);
    teardown();
}

static void the_base_moves_over_all_that_is_acked(void)
{
    setup(1000, 2000);
    sb_claim held[4];
    for (uint64_t i = 0; i < 4; i++) {
        held[i] = take(1000 + i, 1, LATER);
    }
    CHECK_EQ(ack(&held[2], 1), SB_OK);
    CHECK_EQ(ack(&held[1], 1), SB_OK);
    CHECK_EQ(base(), 1000);
    CHECK_EQ(ack(&held[0], 1), SB_OK);
    CHECK_EQ(base(), 1003);
    CHECK_EQ(sb_claim_skip(&region, table, 1004), SB_OK);
    CHECK_EQ(ack(&held[3], 1), SB_OK);
    CHECK_EQ(base(), 1005);
    teardown();
}

/* The place of offset 0 serves offset WINDOW one lap later. */
static void a_late_claimer_never_gets_the_word_of_another_offset(void)
{
    setup(0, 1000);
    CHECK_EQ(try_take(WINDOW, 1, NOW), SB_NO_SPACE);
    sb_claim first = take(0, 1, LATER);
    CHECK_EQ(ack(&first, 1), SB_OK);
    CHECK_EQ(try_take(0, 2, NOW), SB_LOST);
    sb_claim second = take(WINDOW, 1, LATER);
    CHECK(second.word != first.word); /* same slot, attempts and deadline: the generation tells them apart */
    CHECK_EQ(ack(&first, 1), SB_GONE);
    CHECK_EQ(sb_claim_release(&region, table, 0, first.word, 1), SB_GONE);
    CHECK_EQ(try_take(0, 2, FAR), SB_LOST); /* expired for whoever came that late, but not the word of offset 0 */
    CHECK_EQ(ack(&second, 1), SB_OK);
    teardown();
}

static void a_release_gives_the_attempt_back_and_an_expiry_does_not(void)
{
    setup(0, 100);
    uint64_t offsets[8];
    sb_claim claim = take(0, 1, LATER);
    CHECK_EQ(sb_claim_released(&region, table, NOW, offsets, 8), 0);
    CHECK_EQ(sb_claim_release(&region, table, 0, claim.word, 1), SB_OK);
    CHECK_EQ(sb_claim_released(&region, table, NOW, offsets, 8), 1);
    CHECK_EQ(offsets[0], 0);
    claim = take(0, 2, LATER);
    CHECK_EQ(sb_claim_attempts(claim.word), 1);
    CHECK_EQ(sb_claim_released(&region, table, NOW, offsets, 8), 0);

    CHECK_EQ(try_take(0, 3, LATER - 1), SB_LOST);
    CHECK_EQ(sb_claim_released(&region, table, LATER - 1, offsets, 8), 0);
    CHECK_EQ(sb_claim_released(&region, table, LATER, offsets, 8), 1);
    sb_claim again;
    CHECK_EQ(sb_claim_take(&region, table, 0, 3, LATER, LATER + 50, &again), SB_OK);
    CHECK_EQ(sb_claim_attempts(again.word), 2);
    CHECK_EQ(ack(&claim, 2), SB_GONE);
    CHECK_EQ(ack(&again, 3), SB_OK);
    teardown();
}

static void a_renewal_voids_the_old_receipt(void)
{
    setup(0, 100);
    sb_claim claim = take(0, 1, LATER), renewed;
    CHECK_EQ(sb_claim_renew(&region, table, 0, claim.word, 1, LATER + 100, &renewed), SB_OK);
    CHECK_EQ(try_take(0, 2, LATER), SB_LOST);
    CHECK_EQ(ack(&claim, 1), SB_GONE);
    CHECK_EQ(sb_claim_attempts(renewed.word), 1);
    CHECK_EQ(sb_claim_renew(&region, table, 0, renewed.word, 1, 0, &claim), SB_OK); /* 0: available at once */
    sb_claim other = take(0, 2, LATER);
    CHECK_EQ(sb_claim_attempts(other.word), 2);
    CHECK_EQ(ack(&renewed, 1), SB_GONE);
    CHECK_EQ(ack(&other, 2), SB_OK);
    teardown();
}

static void the_janitor_frees_what_has_expired_and_knows_the_next_deadline(void)
{
    setup(0, 100);
    uint32_t next;
    uint64_t offsets[8];
    (void)take(0, 1, LATER);
    (void)take(1, 1, LATER + 30);
    (void)take(2, 1, 0); /* no deadline */
    CHECK_EQ(sb_claims_expire(&region, table, NOW, &next), 0);
    CHECK_EQ(next, LATER - NOW);
    CHECK_EQ(sb_claims_expire(&region, table, LATER, &next), 1);
    CHECK_EQ(next, 30);
    CHECK_EQ(sb_claims_expire(&region, table, FAR, &next), 1);
    CHECK_EQ(next, SB_NIL);
    CHECK_EQ(sb_claim_released(&region, table, FAR, offsets, 8), 2);
    CHECK_EQ(offsets[1], 1);
    teardown();
}

static void deadlines_hold_where_the_millisecond_counter_wraps(void)
{
    const uint32_t now = 0xfffffff0u;
    const uint32_t deadline = sb_claim_deadline_after(now, 0x20u - 1u);
    sb_claim claim;
    uint32_t next;
    setup(0, 100);
    CHECK_EQ(deadline, 0x10);
    CHECK_EQ(sb_claim_deadline_after(0xfffffff0u, 0x0fu), 1); /* 0 means none */
    CHECK_EQ(sb_claim_take(&region, table, 0, 1, now, deadline, &claim), SB_OK);
    CHECK_EQ(try_take(0, 2, 0xffffffffu), SB_LOST);
    CHECK_EQ(try_take(0, 2, 0xfu), SB_LOST);
    CHECK_EQ(sb_claims_expire(&region, table, now, &next), 0);
    CHECK_EQ(next, 0x20);
    CHECK_EQ(try_take(0, 2, 0x10u), SB_OK);
    teardown();
}

static void the_claims_of_a_dead_slot_and_only_those_are_given_back(void)
{
    setup(0, 100);
    uint64_t offsets[8];
    (void)take(0, 1, 0);
    sb_claim kept = take(1, 2, LATER);
    (void)take(2, 1, LATER);
    CHECK_EQ(sb_claims_reap(&region, table, 1), 2);
    CHECK_EQ(sb_claims_reap(&region, table, 1), 0);
    CHECK_EQ(sb_claim_released(&region, table, NOW, offsets, 8), 2);
    CHECK_EQ(offsets[0], 0);
    CHECK_EQ(offsets[1], 2);
    CHECK_EQ(sb_claim_attempts(take(0, 3, LATER).word), 2);
    CHECK_EQ(ack(&kept, 2), SB_OK);
    teardown();
}

/* ---- overflow ---- */

static void a_full_window_moves_its_oldest_claims_aside_and_goes_on(void)
{
    setup(0, 1000);
    sb_claim oldest = take(0, 1, LATER), second = take(1, 1, LATER);
    for (uint64_t o = 2; o < WINDOW; o++) {
        sb_claim claim = take(o, 2, LATER);
        CHECK_EQ(ack(&claim, 2), SB_OK);
    }
    CHECK_EQ(try_take(WINDOW, 2, NOW), SB_NO_SPACE);
    CHECK_EQ(sb_claim_overflow(&region, table, WINDOW - 1), SB_OK); /* no need, nothing done */
    CHECK_EQ(base(), 0);
    CHECK_EQ(sb_claim_overflow(&region, table, WINDOW), SB_OK);
    CHECK_EQ(base(), WINDOW);
    CHECK_EQ(sb_load(&claims()->overflowed), 2);
    CHECK_EQ(try_take(0, 2, NOW), SB_LOST);
    (void)take(WINDOW, 2, LATER);
    CHECK_EQ(ack(&oldest, 1), SB_OK);
    CHECK_EQ(ack(&oldest, 1), SB_GONE);
    CHECK_EQ(sb_load(&claims()->overflowed), 1);

    sb_claim renewed;
    CHECK_EQ(sb_claim_renew(&region, table, 1, second.word, 1, LATER + 5, &renewed), SB_OK);
    CHECK_EQ(try_take(1, 2, LATER + 4), SB_LOST);
    uint64_t offsets[8];
    CHECK_EQ(sb_claim_released(&region, table, LATER + 5, offsets, 8), 2);
    CHECK_EQ(offsets[0], 1);
    CHECK_EQ(offsets[1], WINDOW);
    sb_claim again;
    CHECK_EQ(sb_claim_take(&region, table, 1, 3, LATER + 5, LATER + 90, &again), SB_OK);
    CHECK_EQ(sb_claim_attempts(again.word), 2);
    CHECK_EQ(sb_claims_reap(&region, table, 3), 1);
    again = take(1, 2, LATER);
    CHECK_EQ(sb_claim_attempts(again.word), 3);
    CHECK_EQ(ack(&again, 2), SB_OK);
    CHECK_EQ(sb_load(&claims()->overflowed), 0);
    teardown();
}

static void only_a_full_overflow_table_stops_a_queue_and_an_ack_frees_it(void)
{
    setup(0, 10000);
    const uint32_t room = region.limits.overflow_claims;
    sb_claim *held = calloc(WINDOW + room + 1, sizeof *held);
    uint64_t next = 0;
    for (; next < WINDOW + room; next++) {
        if (next >= base() + WINDOW) {
            CHECK_EQ(sb_claim_overflow(&region, table, next), SB_OK);
        }
        held[next] = take(next, 1, LATER);
    }
    CHECK_EQ(try_take(next, 1, NOW), SB_NO_SPACE);
    CHECK_EQ(sb_claim_overflow(&region, table, next), SB_TABLE_FULL);
    CHECK_EQ(sb_claim_overflow(&region, table, next), SB_TABLE_FULL);
    CHECK_EQ(base(), room);
    CHECK_EQ(sb_load(&claims()->overflowed), room);
    CHECK_EQ(ack(&held[7], 1), SB_OK);
    CHECK_EQ(sb_claim_overflow(&region, table, next), SB_OK);
    held[next] = take(next, 1, LATER);
    for (uint64_t o = 0; o <= next; o++) {
        CHECK_EQ(ack(&held[o], 1), o == 7 ? SB_GONE : SB_OK);
    }
    CHECK_EQ(base(), next + 1);
    CHECK_EQ(sb_load(&claims()->overflowed), 0);
    free(held);
    teardown();
}

static void tables_share_the_overflow_and_do_not_take_each_others_claims(void)
{
    setup(0, 1000);
    uint32_t first = table, other;
    int created;
    sb_queue_at(&region, QUEUE + 1)->topic_id = 22;
    sb_queue_at(&region, QUEUE + 1)->queue_id = 4;
    sb_store(&sb_queue_at(&region, QUEUE + 1)->next_offset, 1000);
    CHECK_EQ(sb_claims_open(&region, GROUP, QUEUE + 1, 0, sb_now_ns() + 1000000000, &other, &created), SB_OK);
    CHECK(created && other != first);
    sb_claim held[2];
    for (int t = 0; t < 2; t++) { /* the same offset, slot, generation and deadline in both */
        table = t ? other : first;
        held[t] = take(0, 1, LATER);
        for (uint64_t o = 1; o < WINDOW; o++) {
            CHECK_EQ(sb_claim_skip(&region, table, o), SB_OK);
        }
        CHECK_EQ(sb_claim_overflow(&region, table, WINDOW), SB_OK);
        CHECK_EQ(base(), WINDOW);
    }
    CHECK_EQ(held[0].word, held[1].word);
    table = first;
    CHECK_EQ(ack(&held[0], 1), SB_OK);
    CHECK_EQ(ack(&held[0], 1), SB_GONE);
    table = other;
    CHECK_EQ(sb_claims_reap(&region, first, 1), 0);
    CHECK_EQ(ack(&held[1], 1), SB_OK);
    teardown();
}

/* ---- tables ---- */

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
            int code = sb_claim_take(&region, table, offsets[i], slot, NOW, FAR, &claim);
            if (code == SB_NO_SPACE) {
                (void)sb_claim_overflow(&region, table, offsets[i]);
                break;
            }
            if (offsets[i] >= from) {
                sb_claim_advance(&region, table, offsets[i] + 1);
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
            (void)sb_claims_reap(&region, table, 7);
            uint32_t next;
            (void)sb_claims_expire(&region, table, NOW, &next);
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
    CHECK_EQ(sb_claim_overflow(&region, table, WINDOW), SB_LOCKED);
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
        while (sb_load(&claims()->next) < until) {
            sb_pause();
        }
        CHECK(kill(pid, SIGKILL) == 0);
        CHECK_EQ(check_wait(pid), -SIGKILL);
        (void)sb_claims_reap(&region, table, 7);
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
        TEST(a_message_is_claimed_once_and_acked_once),
        TEST(the_base_moves_over_all_that_is_acked),
        TEST(a_late_claimer_never_gets_the_word_of_another_offset),
        TEST(a_release_gives_the_attempt_back_and_an_expiry_does_not),
        TEST(a_renewal_voids_the_old_receipt),
        TEST(the_janitor_frees_what_has_expired_and_knows_the_next_deadline),
        TEST(deadlines_hold_where_the_millisecond_counter_wraps),
        TEST(the_claims_of_a_dead_slot_and_only_those_are_given_back),
        TEST(a_full_window_moves_its_oldest_claims_aside_and_goes_on),
        TEST(only_a_full_overflow_table_stops_a_queue_and_an_ack_frees_it),
        TEST(tables_share_the_overflow_and_do_not_take_each_others_claims),
        TEST(a_table_is_found_again_and_none_is_left_says_so),
        TEST(a_dead_owner_of_the_definition_lock_does_not_stop_opening),
        TEST(racing_threads_ack_each_message_exactly_once),
        TEST(racing_threads_that_hold_release_and_overflow_ack_each_message_exactly_once),
        TEST(a_kill_at_any_edge_loses_nothing_and_repeats_no_ack),
        TEST(a_stopped_holder_of_the_claim_lock_stops_no_claim_and_no_ack),
        TEST(kills_at_random_moments_lose_nothing),
    };
    return CHECK_MAIN(tests);
}
