/* overflow.c: see overflow.h.
 *
 * An entry's owner word tells its whole life: free (low half 0) -> reserved by one table (under that table's claim lock)
 * -> live -> free. The upper half counts the reservations, so a CAS of an owner word seen earlier never frees an entry
 * that has been given to somebody else in between. sb_claims.overflowed counts up before a reservation and down after a
 * release: a kill in between leaves it too high, which costs a useless search, never too low. */
#include "overflow.h"

#define RESERVED 0x80000000u

static uint32_t low(uint64_t owner) { return (uint32_t)owner; }
static uint64_t taken(uint64_t owner) { return owner & 0xffffffff00000000ull; }

static uint32_t home(const sb_region *r, uint32_t table, uint64_t offset)
{
    return (uint32_t)((offset * 0x9e3779b97f4a7c15ull + (uint64_t)table * 0xc2b2ae3d27d4eb4full) >> 32) % r->limits.overflow_claims;
}

static int look(const sb_region *r, uint32_t table, uint32_t i, uint32_t also, uint64_t *offset, sb_place *place)
{
    sb_overflow *e = sb_overflow_at(r, i);
    uint64_t owner = sb_load(&e->owner); /* SYNC: overflow */
    if ((low(owner) & ~also) != table + 1) {
        return 0;
    }
    *offset = sb_load(&e->offset);
    if ((low(sb_load(&e->owner)) & ~also) != table + 1 || taken(sb_load(&e->owner)) != taken(owner)) {
        return 0; /* freed while we looked: its claim is acked */
    }
    *place = (sb_place){.word = &e->claim, .binding = sb_claim_binding(table, *offset), .entry = e, .owner = owner & ~(uint64_t)also};
    return 1;
}

int sb_overflow_live(const sb_region *r, uint32_t table, uint32_t i, uint64_t *offset, sb_place *place)
{
    return look(r, table, i, 0, offset, place);
}

int sb_overflow_find(const sb_region *r, uint32_t table, uint64_t offset, sb_place *place)
{
    uint32_t i = home(r, table, offset);
    for (uint32_t n = 0; n < r->limits.overflow_claims; n++) {
        uint64_t there;
        if (look(r, table, i, RESERVED, &there, place) && there == offset) {
            return SB_OK;
        }
        i = i + 1 < r->limits.overflow_claims ? i + 1 : 0;
    }
    return SB_NOT_FOUND;
}

static void count_down(const sb_region *r, uint32_t table) { atomic_fetch_sub_explicit(&sb_claims_at(r, table)->overflowed, 1, memory_order_release); }

void sb_overflow_free(const sb_region *r, uint32_t table, const sb_place *place)
{
    uint64_t owner = place->owner;
    if (sb_cas(&place->entry->owner, &owner, taken(owner))) {
        count_down(r, table);
    }
}

/* An entry whose acker died between its two steps is free for whoever comes along. */
static uint64_t free_if_acked(const sb_region *r, sb_overflow *e, uint64_t owner)
{
    uint32_t table = (low(owner) & ~RESERVED) - 1;
    if (low(owner) == 0 || (low(owner) & RESERVED) || table >= r->limits.claim_tables ||
        sb_claim_state(sb_load(&e->claim)) != SB_CLAIM_ACKED) {
        return owner;
    }
    sb_place place = {.entry = e, .owner = owner};
    sb_overflow_free(r, table, &place);
    return sb_load(&e->owner);
}

int sb_overflow_reserve(sb_region *r, uint32_t table, uint64_t offset, uint32_t *entry)
{
    sb_claims *c = sb_claims_at(r, table);
    uint32_t i = home(r, table, offset);
    sb_add(&c->overflowed, 1);
    for (uint32_t n = 0; n < r->limits.overflow_claims; n++) {
        sb_overflow *e = sb_overflow_at(r, i);
        uint64_t owner = free_if_acked(r, e, sb_load(&e->owner));
        if (low(owner) == 0) {
            sb_store(&c->moving_slot, (uint64_t)i + 1); /* first, so that repair knows which entry may be half ours */
            if (sb_cas(&e->owner, &owner, taken(owner) + (1ull << 32) + (RESERVED | (table + 1)))) {
                *entry = i;
                return SB_OK;
            }
        }
        i = i + 1 < r->limits.overflow_claims ? i + 1 : 0;
    }
    sb_store(&c->moving_slot, 0);
    count_down(r, table);
    return SB_TABLE_FULL;
}

int sb_overflow_is_reserved(const sb_region *r, uint32_t table, uint32_t entry)
{
    return low(sb_load(&sb_overflow_at(r, entry)->owner)) == (RESERVED | (table + 1));
}

void sb_overflow_publish(sb_region *r, uint32_t table, uint32_t entry)
{
    sb_overflow *e = sb_overflow_at(r, entry);
    sb_store(&e->owner, taken(sb_load(&e->owner)) | (table + 1)); /* SYNC: overflow */
}

void sb_overflow_cancel(sb_region *r, uint32_t table, uint32_t entry)
{
    sb_overflow *e = sb_overflow_at(r, entry);
    sb_store(&e->owner, taken(sb_load(&e->owner)));
    count_down(r, table);
}
