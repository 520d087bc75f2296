/* overflow.h: claims older than their window (R9): a table shared by all claim tables, found by hash, freed by one CAS. */
#ifndef SHMBROKER_OVERFLOW_H
#define SHMBROKER_OVERFLOW_H

#include "claim.h"

/* Where the claim word of an offset lies: in the window (entry NULL, binding 0), or in an overflow entry. */
typedef struct {
    sb_word *word;
    uint64_t binding;   /* stored word = claim ^ binding */
    sb_overflow *entry;
    uint64_t owner;     /* the entry's owner word as it was seen: freeing it is a CAS of exactly this */
} sb_place;

/* Where the claim named by `receipt` stands at this moment: for a CAS of exactly `receipt ^ binding`. SB_OK | SB_GONE: it is
 * over, or not of this slot | SB_AGAIN: an append decides about it, and does not finish. In claim.c. */
int sb_claim_locate(const sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot, sb_place *place);
/* The entry of (table, offset), to be asked when the base has passed it or its word in the window is marked as moved: then
 * the entry is whole, even if it is not live yet. SB_OK | SB_NOT_FOUND. */
int sb_overflow_find(const sb_region *r, uint32_t table, uint64_t offset, sb_place *place);
/* Entry number `i`, if it is a live one of `table`: 1 and its offset. For scans over all of them. */
int sb_overflow_live(const sb_region *r, uint32_t table, uint32_t i, uint64_t *offset, sb_place *place);
/* Give back an entry whose claim is ACKED. Only the first of several callers does; one that is not live yet is left to the
 * next search for room. */
void sb_overflow_free(const sb_region *r, uint32_t table, const sb_place *place);

/* The caller holds the claim lock of `table`. reserve: SB_OK (entry number + 1 stands in moving_slot) | SB_TABLE_FULL.
 * publish: the entry is live. cancel: a reserved entry is free again. */
int sb_overflow_reserve(sb_region *r, uint32_t table, uint64_t offset, uint32_t *entry);
void sb_overflow_publish(sb_region *r, uint32_t table, uint32_t entry);
void sb_overflow_cancel(sb_region *r, uint32_t table, uint32_t entry);
int sb_overflow_is_reserved(const sb_region *r, uint32_t table, uint32_t entry);

#endif
