/* claims.h: what the tests of claims share: a group, a queue that has messages without bytes, and the claim table of both. */
#ifndef SHMBROKER_TEST_CLAIMS_H
#define SHMBROKER_TEST_CLAIMS_H

#include "check.h"
#include "claim.h"
#include "overflow.h"

#define WINDOW 64u
#define GROUP 1u
#define QUEUE 2u
#define NOW 1000u
#define LATER (NOW + 50u)
#define FAR 0x7fffffffu

static sb_region region;
static uint32_t table;
static uint32_t undecided __attribute__((unused)); /* answer of sb_claims_reap */

/* A region with one group, one queue of `messages` messages, and its claim table at `base`. */
static inline void setup(uint64_t base, uint64_t messages)
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

static inline void teardown(void) { sb_region_unmap(&region); }

static inline sb_claims *claims(void) { return sb_claims_at(&region, table); }
static inline uint64_t life(void) { return sb_load(&claims()->state); }
static inline uint64_t base(void) { return sb_load(&claims()->base); }

static inline uint32_t entries(void) /* the counter in the table may be too high after a kill */
{
    uint32_t count = 0;
    uint64_t offset;
    sb_place place;
    for (uint32_t i = 0; i < region.limits.overflow_claims; i++) {
        count += (uint32_t)sb_overflow_live(&region, table, i, &offset, &place);
    }
    return count;
}

static inline sb_claim take(uint64_t offset, uint32_t slot, uint32_t deadline)
{
    sb_claim claim;
    CHECK_EQ(sb_claim_take(&region, table, life(), offset, slot, NOW, deadline, &claim), SB_OK);
    sb_claim_advance(&region, table, life(), offset + 1, deadline);
    return claim;
}

static inline int try_take(uint64_t offset, uint32_t slot, uint32_t now)
{
    sb_claim claim;
    return sb_claim_take(&region, table, life(), offset, slot, now, now + 10, &claim);
}

static inline int ack(const sb_claim *claim, uint32_t slot)
{
    int code = sb_claim_ack(&region, table, claim->offset, claim->word, slot);
    sb_claim_base(&region, table);
    return code;
}

#endif
