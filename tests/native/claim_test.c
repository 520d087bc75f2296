/* claim_test.c: one claim at a time, its hints, and its way to the overflow table. */
#include "claims.h"
#include "janitor.h"

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
    CHECK_EQ(sb_claim_skip(&region, table, life(), 1004), SB_OK);
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
    CHECK_EQ(sb_claim_take(&region, table, life(), 0, 3, LATER, LATER + 50, &again), SB_OK);
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
    CHECK_EQ(sb_claims_expire(&region, table, NOW, 1, &next), 0);
    CHECK_EQ(next, LATER - NOW);
    CHECK_EQ(sb_claims_expire(&region, table, LATER, 0, &next), 1);
    CHECK_EQ(next, 30);
    CHECK_EQ(sb_claims_expire(&region, table, FAR, 0, &next), 1);
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
    CHECK_EQ(sb_claim_take(&region, table, life(), 0, 1, now, deadline, &claim), SB_OK);
    CHECK_EQ(try_take(0, 2, 0xffffffffu), SB_LOST);
    CHECK_EQ(try_take(0, 2, 0xfu), SB_LOST);
    CHECK_EQ(sb_claims_expire(&region, table, now, 0, &next), 0);
    CHECK_EQ(next, 0x20);
    CHECK_EQ(try_take(0, 2, 0x10u), SB_OK);
    teardown();
}

static void the_claims_of_a_dead_slot_and_only_those_are_given_back(void)
{
    setup(0, 100);
    uint64_t offsets[8];
    (void)take(0, 1, LATER);
    sb_claim kept = take(1, 2, LATER);
    (void)take(2, 1, LATER);
    CHECK_EQ(sb_claims_reap(&region, table, 1, &undecided), 2);
    CHECK_EQ(sb_claims_reap(&region, table, 1, &undecided), 0);
    CHECK_EQ(sb_claim_released(&region, table, NOW, offsets, 8), 2);
    CHECK_EQ(offsets[0], 0);
    CHECK_EQ(offsets[1], 2);
    CHECK_EQ(sb_claim_attempts(take(0, 3, LATER).word), 2);
    CHECK_EQ(ack(&kept, 2), SB_OK);
    teardown();
}

/* ---- hints ---- */

/* A scan looks at the words below `next`; a claimer moves that behind its claims. */
static void a_scan_between_a_claim_and_its_announcement_does_not_lose_the_deadline(void)
{
    setup(0, 100);
    uint64_t offsets[8];
    sb_claim first = take(0, 1, LATER), second;
    CHECK_EQ(ack(&first, 1), SB_OK);
    CHECK_EQ(sb_claim_take(&region, table, life(), 1, 1, NOW, LATER + 20, &second), SB_OK);
    CHECK_EQ(sb_claim_released(&region, table, LATER, offsets, 8), 0);
    sb_claim_advance(&region, table, life(), 2, LATER + 20);
    CHECK_EQ(sb_load(&claims()->deadline_ms), LATER + 20);
    CHECK_EQ(sb_claim_released(&region, table, LATER + 20, offsets, 8), 1);
    teardown();
}

static void a_scan_that_has_found_enough_does_not_lose_the_deadlines_behind_it(void)
{
    setup(0, 100);
    uint64_t offsets[8];
    sb_claim again;
    (void)take(0, 1, LATER);
    (void)take(1, 1, LATER + 20);
    CHECK_EQ(sb_claim_released(&region, table, LATER, offsets, 1), 1);
    CHECK_EQ(sb_claim_take(&region, table, life(), 0, 2, LATER, LATER + 90, &again), SB_OK);
    uint64_t hint = sb_load(&claims()->deadline_ms);
    CHECK(hint != 0 && hint <= LATER + 20);
    teardown();
}

/* Killed between taking the hints down and claiming, or between a release and its hint. */
static void hints_that_a_dead_process_took_down_are_put_up_when_it_is_reaped(void)
{
    setup(0, 100);
    sb_claim released = take(0, 1, LATER);
    (void)take(1, 1, LATER + 20);
    CHECK_EQ(sb_claim_release(&region, table, 0, released.word, 1), SB_OK);
    sb_store(&claims()->released, 0);
    sb_store(&claims()->deadline_ms, 0);
    CHECK_EQ(sb_claims_reap(&region, table, 2, &undecided), 0);
    CHECK_EQ(sb_load(&claims()->released), 1);
    CHECK_EQ(sb_load(&claims()->deadline_ms), LATER + 20);
    teardown();
}

static uint32_t pass(uint32_t now_ms, uint32_t turn, uint32_t *next_ms)
{
    uint32_t expired;
    sb_janitor_pass(&region, now_ms * 1000000ll, turn, &expired, next_ms);
    return expired;
}

/* Else a broker with many groups costs a processor's time for nothing. The turns make good what was never hinted at: offset
 * 1 stands for one that was released by a process that was stopped before it said so. */
static void the_janitor_looks_at_a_table_when_a_deadline_is_over_and_otherwise_in_turn(void)
{
    uint32_t next;
    setup(0, 100);
    sb_store(&sb_queue_at(&region, QUEUE)->state, SB_SLOT_LIVE);
    sb_store(&sb_group_at(&region, GROUP)->state, SB_SLOT_LIVE);
    (void)take(0, 1, LATER);
    sb_claim_advance(&region, table, life(), 2, 0);
    CHECK_EQ(pass(NOW, table + 1, &next), 0);
    CHECK_EQ(next, LATER - NOW);
    CHECK_EQ(sb_load(&claims()->released), 0);
    CHECK_EQ(pass(NOW, table, &next), 0);
    CHECK_EQ(sb_load(&claims()->released), 1);
    sb_store(&claims()->released, 0);
    CHECK_EQ(pass(LATER, table + 1, &next), 1);
    CHECK_EQ(next, SB_NIL);
    CHECK_EQ(sb_load(&claims()->released), 1);
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
    CHECK_EQ(sb_claim_overflow(&region, table, life(), WINDOW - 1), SB_OK); /* no need, nothing done */
    CHECK_EQ(base(), 0);
    CHECK_EQ(sb_claim_overflow(&region, table, life(), WINDOW), SB_OK);
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
    CHECK_EQ(sb_claim_take(&region, table, life(), 1, 3, LATER + 5, LATER + 90, &again), SB_OK);
    CHECK_EQ(sb_claim_attempts(again.word), 2);
    CHECK_EQ(sb_claims_reap(&region, table, 3, &undecided), 1);
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
            CHECK_EQ(sb_claim_overflow(&region, table, life(), next), SB_OK);
        }
        held[next] = take(next, 1, LATER);
    }
    CHECK_EQ(try_take(next, 1, NOW), SB_NO_SPACE);
    CHECK_EQ(sb_claim_overflow(&region, table, life(), next), SB_TABLE_FULL);
    CHECK_EQ(sb_claim_overflow(&region, table, life(), next), SB_TABLE_FULL);
    CHECK_EQ(base(), room);
    CHECK_EQ(sb_load(&claims()->overflowed), room);
    CHECK_EQ(ack(&held[7], 1), SB_OK);
    CHECK_EQ(sb_claim_overflow(&region, table, life(), next), SB_OK);
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
            CHECK_EQ(sb_claim_skip(&region, table, life(), o), SB_OK);
        }
        CHECK_EQ(sb_claim_overflow(&region, table, life(), WINDOW), SB_OK);
        CHECK_EQ(base(), WINDOW);
    }
    CHECK_EQ(held[0].word, held[1].word);
    table = first;
    CHECK_EQ(ack(&held[0], 1), SB_OK);
    CHECK_EQ(ack(&held[0], 1), SB_GONE);
    table = other;
    CHECK_EQ(sb_claims_reap(&region, first, 1, &undecided), 0);
    CHECK_EQ(ack(&held[1], 1), SB_OK);
    teardown();
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
        TEST(a_scan_between_a_claim_and_its_announcement_does_not_lose_the_deadline),
        TEST(a_scan_that_has_found_enough_does_not_lose_the_deadlines_behind_it),
        TEST(hints_that_a_dead_process_took_down_are_put_up_when_it_is_reaped),
        TEST(the_janitor_looks_at_a_table_when_a_deadline_is_over_and_otherwise_in_turn),
        TEST(a_full_window_moves_its_oldest_claims_aside_and_goes_on),
        TEST(only_a_full_overflow_table_stops_a_queue_and_an_ack_frees_it),
        TEST(tables_share_the_overflow_and_do_not_take_each_others_claims),
    };
    return CHECK_MAIN(tests);
}
