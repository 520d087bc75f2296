/* claim_search.c: which messages of a queue can be had by somebody who looks for some: given back, prefetched, or the oldest. */
#include "claim.h"

#include "overflow.h"

/* Keep the `count` smallest, sorted. */
static uint32_t insert_sorted(uint64_t *offsets, uint32_t found, uint32_t count, uint64_t offset)
{
    uint32_t i = found;
    if (found == count) {
        if (!count || offsets[count - 1] <= offset) {
            return found;
        }
        i = count - 1;
    }
    for (; i > 0 && offsets[i - 1] > offset; i--) {
        offsets[i] = offsets[i - 1];
    }
    offsets[i] = offset;
    return found < count ? found + 1 : found;
}

/* The hints are taken down before the scan and put up again by whoever releases or claims after it, so nothing is missed;
 * as long as a scan finds anything the hint stays up, so a scanner that dies before its claims misses nothing either. */
uint32_t sb_claim_released(sb_region *r, uint32_t table, uint32_t now_ms, uint64_t *offsets, uint32_t count)
{
    sb_claims *c = sb_claims_at(r, table);
    uint32_t due = sb_claim_take_deadline(c, now_ms);
    if (!due && !sb_load(&c->released)) {
        return 0;
    }
    (void)atomic_exchange_explicit(&c->released, 0, memory_order_acq_rel);
    const uint64_t life = sb_load(&c->state); /* behind the hints: whoever makes the table anew from now on puts up its own */
    uint32_t found = 0;
    uint64_t offset;
    sb_place place;
    for (uint32_t i = 0; sb_load(&c->overflowed) && i < r->limits.overflow_claims; i++) {
        if (sb_overflow_live(r, table, i, &offset, &place)) {
            uint64_t w = sb_load(place.word) ^ place.binding;
            if (sb_claim_available(r, life, w, offset, now_ms)) {
                found = insert_sorted(offsets, found, count, offset);
            } else if (sb_claim_state(w) == SB_CLAIM_HELD) {
                sb_claim_note_deadline(c, sb_claim_deadline(w));
            }
        }
    }
    uint64_t base = sb_load(&c->base), end = sb_claims_next_offset(c);
    end = end > base + r->limits.claim_window ? base + r->limits.claim_window : end;
    for (offset = base; offset < end && found < count; offset++) {
        uint64_t w = sb_load(sb_claim_place(r, c, offset));
        if (sb_claim_available(r, life, w, offset, now_ms)) {
            offsets[found++] = offset;
        } else if (sb_claim_state(w) == SB_CLAIM_HELD) {
            sb_claim_note_deadline(c, sb_claim_deadline(w));
        }
    }
    if (found) {
        sb_store(&c->released, 1);
    }
    if (found == count) { /* perhaps not all were looked at */
        sb_claim_note_deadline(c, due);
    }
    return found;
}

int sb_claim_oldest(sb_region *r, uint32_t table, uint64_t life, uint64_t from, uint32_t now_ms, uint64_t *offset)
{
    sb_claims *c = sb_claims_at(r, table);
    uint64_t word = 0, base = sb_load(&c->base), at; /* SYNC: base */
    sb_place place;
    *offset = UINT64_MAX;
    for (uint32_t i = 0; sb_load(&c->overflowed) && i < r->limits.overflow_claims; i++) {
        if (sb_overflow_live(r, table, i, &at, &place) && at >= from && at < *offset) {
            uint64_t w = sb_load(place.word) ^ place.binding;
            if (sb_claim_state(w) != SB_CLAIM_ACKED) {
                *offset = at;
                word = w;
            }
        }
    }
    for (at = from > base ? from : base; *offset == UINT64_MAX; at++) {
        word = sb_load(sb_claim_place(r, c, at));
        if (at - base >= r->limits.claim_window || !(sb_claim_state(word) == SB_CLAIM_ACKED || sb_claim_is_moved(word))) {
            *offset = at;
        }
    }
    if ((*offset >= base && *offset - base >= r->limits.claim_window) || !sb_claim_available(r, life, word, *offset, now_ms)) {
        return SB_LOST;
    }
    return sb_claim_state(word) == SB_CLAIM_FREE && *offset >= sb_claims_next_offset(c) ? SB_END : SB_OK;
}

/* As with `released`: the hint goes down before the walk, and up again if the walk has left any behind. */
uint32_t sb_claim_prefetched(sb_region *r, uint32_t table, uint64_t *offsets, uint32_t count)
{
    sb_claims *c = sb_claims_at(r, table);
    if (!sb_load(&c->prefetched)) {
        return 0;
    }
    (void)atomic_exchange_explicit(&c->prefetched, 0, memory_order_acq_rel);
    sb_fence_behind_cas();
    uint32_t found = 0;
    uint64_t offset;
    sb_place place;
    for (uint32_t i = 0; sb_load(&c->overflowed) && i < r->limits.overflow_claims; i++) {
        if (sb_overflow_live(r, table, i, &offset, &place) && sb_claim_is_prefetched(sb_load(place.word) ^ place.binding)) {
            found = insert_sorted(offsets, found, count, offset);
        }
    }
    uint64_t base = sb_load(&c->base), end = sb_claims_next_offset(c);
    end = end > base + r->limits.claim_window ? base + r->limits.claim_window : end;
    for (offset = base; offset < end && found < count; offset++) {
        if (sb_claim_is_prefetched(sb_load(sb_claim_place(r, c, offset)))) {
            offsets[found++] = offset;
        }
    }
    if (found) {
        sb_store(&c->prefetched, 1); /* there may be more, and these may stay prefetched */
    }
    return found;
}
