/* claim.h: which consumer has which message (R9). One word per message in flight; no lock on the way. */
#ifndef SHMBROKER_CLAIM_H
#define SHMBROKER_CLAIM_H

#include "ipc.h"
#include "region.h"

#define SB_CLAIM_ATTEMPTS_MAX 255u
#define SB_CLAIM_GENERATION_MASK 0x3ffu
#define SB_CLAIM_SLOT_MAX 4094u

typedef struct {
    uint64_t offset;
    uint64_t word; /* the claim as taken: its generation is the receipt */
} sb_claim;

/* Find or create the claim table of (group, queue); a new one starts at `base`. SB_OK | SB_TABLE_FULL | SB_TIMEOUT ... */
int sb_claims_open(sb_region *r, uint32_t group, uint32_t queue, uint64_t base, int64_t deadline_ns, uint32_t *table);

/* Claim offset `offset` (known to hold a visible message) for client slot `slot` until `deadline_ms`. attempts of the
 * result counts this delivery. SB_OK | SB_LOST: somebody else has it or had it | SB_NO_SPACE: beyond the window. */
int sb_claim_take(sb_region *r, uint32_t table, uint64_t offset, uint32_t slot, uint32_t deadline_ms, sb_claim *claim);
/* The same, straight to ACKED: a filtered-out message. */
int sb_claim_skip(sb_region *r, uint32_t table, uint64_t offset);
/* Offsets below next that are FREE again (released or expired), oldest first, at most `count`. Overflow included. */
uint32_t sb_claim_released(sb_region *r, uint32_t table, uint64_t *offsets, uint32_t count);
/* next >= offset from now on. */
void sb_claim_advance(sb_region *r, uint32_t table, uint64_t offset);
/* The window is full and its oldest is not acked: move it to the overflow table. SB_OK | SB_TABLE_FULL | SB_LOCKED. */
int sb_claim_overflow(sb_region *r, uint32_t table);

/* SB_OK | SB_GONE: the claim is no longer `slot`'s, or its generation has passed. */
int sb_claim_ack(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot);
/* New deadline (0 ms from now: available at once, as a release). The result's word is the new receipt; the old is void. */
int sb_claim_renew(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot, uint32_t deadline_ms, sb_claim *renewed);
/* Give back without counting the attempt (never shown to the application). */
int sb_claim_release(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot);
/* Move the base over all that is acked, by try-lock; repairs after a dead holder. */
void sb_claim_base(sb_region *r, uint32_t table);

/* Janitor. */
uint32_t sb_claims_reap(sb_region *r, uint32_t table, uint32_t slot);                  /* all claims of a dead slot */
uint32_t sb_claims_expire(sb_region *r, uint32_t table, uint32_t now_ms, uint32_t *next_ms); /* *next: ms until the next deadline, SB_NIL none */

#endif
