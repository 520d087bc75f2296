/* claim.c: what a consumer does with one claim: take, ack, renew, release. Which one can be had: claim_search.c.
 * The table as a whole: claim_table.c.
 *
 * FREE --take--> HELD --ack--> ACKED --base passes--> FREE (next lap)
 *   ^              | release, expiry, death of the holder: the attempts stay (release: minus this one)
 *   +--------------+
 *
 * HELD without a deadline is prefetched: not delivered yet, so its attempt is not counted (R10). Another member takes it over
 * by CAS; whoever starts it, by CAS, counts the attempt and sets the deadline, and calls the listener just behind that. What
 * a kill leaves:
 *
 *   prefetched, taken over ── reaped, uncounted: nobody was shown the message
 *   started                ── reaped, counted: the listener may have run
 *   listener has returned  ── the same: delivered again
 *   acked                  ── done
 */
#include "claim.h"

#include "failpoint.h"
#include "overflow.h"

#define SPINS 2000 /* waits for another process's two or three instructions; beyond that it was stopped or killed there */

/* SB_OK | SB_NO_SPACE: beyond the window | SB_NOT_FOUND: before the base and not in the overflow table, so acked. */
static int find_place(const sb_region *r, uint32_t table, uint64_t offset, sb_place *place)
{
    sb_claims *c = sb_claims_at(r, table);
    uint64_t base = sb_load(&c->base); /* SYNC: base */
    if (offset >= base) {
        if (offset - base >= r->limits.claim_window) {
            return SB_NO_SPACE;
        }
        *place = (sb_place){.word = sb_claim_place(r, c, offset)};
        return SB_OK;
    }
    return sb_peek(&c->overflowed) ? sb_overflow_find(r, table, offset, place) : SB_NOT_FOUND;
}

/* A window word loaded before this says nothing about `offset` if the base has passed it meanwhile. */
static int passed(const sb_region *r, uint32_t table, const sb_place *place, uint64_t offset)
{
    return !place->entry && sb_load(&sb_claims_at(r, table)->base) > offset;
}

/* The place of `offset` and the word that is stored there in this life of the table: a CAS of exactly this word fails if the
 * place is another's by then. SB_OK | SB_LOST | SB_NO_SPACE | SB_GONE */
static inline int look(const sb_region *r, uint32_t table, uint64_t life, uint64_t offset, sb_place *place, uint64_t *stored)
{
    int code;
    do {
        code = find_place(r, table, offset, place);
        *stored = code == SB_OK ? sb_load(place->word) : 0;
    } while (code == SB_OK && passed(r, table, place, offset)); /* at most once: then it is in the overflow table, or done */
    if (sb_load(&sb_claims_at(r, table)->state) != life) {
        return SB_GONE;
    }
    SB_FAILPOINT(claim_chosen); /* nothing changed; but a process stopped here may go on in another life of the table */
    return code == SB_NOT_FOUND ? SB_LOST : code;
}

/* Who holds a claim stores it and then looks at the hint; who takes the hint down looks at the claims behind it. With a full
 * fence on both sides at least one of them sees the other. */
void sb_claim_note_deadline(sb_claims *c, uint32_t deadline_ms)
{
    sb_fence_behind_cas();
    uint64_t hint = sb_load(&c->deadline_ms);
    while (deadline_ms != 0 && (hint == 0 || (int32_t)(deadline_ms - (uint32_t)hint) < 0)) {
        if (sb_cas(&c->deadline_ms, &hint, deadline_ms)) {
            return;
        }
    }
}

uint32_t sb_claim_take_deadline(sb_claims *c, uint32_t now_ms)
{
    uint64_t hint = sb_load(&c->deadline_ms);
    if (hint == 0 || (int32_t)(now_ms - (uint32_t)hint) < 0) {
        return 0;
    }
    uint32_t due = (uint32_t)hint;
    (void)sb_cas(&c->deadline_ms, &hint, 0); /* if not, an earlier one was noted: that stays */
    sb_fence_behind_cas();
    return due;
}

/* Who prefetches stores the claim and then looks at the hint; who takes the hint down looks at the claims behind it. */
void sb_claim_note_prefetched(sb_claims *c)
{
    sb_fence_behind_cas();
    if (!sb_load(&c->prefetched)) {
        sb_store(&c->prefetched, 1);
    }
}

static int take(sb_region *r, uint32_t table, uint64_t life, uint64_t offset, uint32_t slot, uint32_t now_ms, uint32_t deadline_ms,
                int prefetched, sb_claim *claim)
{
    sb_claims *c = sb_claims_at(r, table);
    sb_place place;
    uint64_t stored;
    int code = look(r, table, life, offset, &place, &stored);
    if (code != SB_OK) {
        return code;
    }
    uint64_t w = stored ^ place.binding;
    if (prefetched ? !sb_claim_is_prefetched(w) : !sb_claim_available(r, life, w, offset, now_ms)) {
        return SB_LOST;
    }
    uint32_t before = sb_claim_attempts(w);
    uint32_t attempts = deadline_ms && before < SB_CLAIM_ATTEMPTS_MAX ? before + 1 : before;
    uint64_t held = sb_claim_word(SB_CLAIM_HELD, slot + 1, attempts, sb_claim_generation(w) + 1, deadline_ms);
    if (!sb_cas(place.word, &stored, held ^ place.binding)) {
        return SB_LOST;
    }
    SB_FAILPOINT(claim_taken); /* a kill leaves a claim that nobody was told of: reaped, the attempt counts unless prefetched */
    if (!deadline_ms) {
        sb_claim_note_prefetched(c);
    } else {
        sb_claim_note_deadline(c, deadline_ms);
        if (before) {
            sb_add(&c->redelivered, 1);
        }
    }
    *claim = (sb_claim){.offset = offset, .word = held};
    return SB_OK;
}

int sb_claim_take(sb_region *r, uint32_t table, uint64_t life, uint64_t offset, uint32_t slot, uint32_t now_ms, uint32_t deadline_ms,
                  sb_claim *claim)
{
    return take(r, table, life, offset, slot, now_ms, deadline_ms, 0, claim);
}

int sb_claim_take_over(sb_region *r, uint32_t table, uint64_t life, uint64_t offset, uint32_t slot, uint32_t deadline_ms, sb_claim *claim)
{
    return take(r, table, life, offset, slot, 0, deadline_ms, 1, claim);
}

int sb_claim_skip(sb_region *r, uint32_t table, uint64_t life, uint64_t offset)
{
    sb_place place;
    uint64_t stored;
    int code = look(r, table, life, offset, &place, &stored);
    if (code != SB_OK) {
        return code;
    }
    uint64_t w = stored ^ place.binding;
    if (sb_claim_state(w) != SB_CLAIM_FREE || sb_claim_deadline(w) != sb_claim_lap(r, life, offset)) {
        return SB_LOST;
    }
    if (!sb_cas(place.word, &stored, (w | SB_CLAIM_ACKED) ^ place.binding)) { /* FREE is 0: attempts, generation, lap stay */
        return SB_LOST;
    }
    if (place.entry) {
        sb_overflow_free(r, table, &place);
    }
    return SB_OK;
}

/* Whoever took a hint down before it could see these claims, since they lay behind `next`, is made good here. */
void sb_claim_advance(sb_region *r, uint32_t table, uint64_t life, uint64_t offset, uint32_t deadline_ms)
{
    sb_claims *c = sb_claims_at(r, table);
    uint64_t wanted = sb_claims_next_word(life, offset), next = sb_load(&c->next);
    while (((next ^ wanted) & SB_CLAIMS_NEXT_LIFE) == 0 && next < wanted && !sb_cas(&c->next, &next, wanted)) {
    }
    sb_fence();
    if (deadline_ms) {
        sb_claim_note_deadline(c, deadline_ms);
    } else {
        sb_claim_note_prefetched(c);
    }
}

uint64_t sb_claim_next(const sb_region *r, uint32_t table)
{
    const sb_claims *c = sb_claims_at(r, table);
    uint64_t next = sb_claims_next_offset(c), base = sb_load(&c->base);
    return next > base ? next : base;
}

static uint64_t moving_form(uint64_t receipt) { return (receipt & ~SB_CLAIM_STATE_MASK) | SB_CLAIM_MOVING; }

int sb_claim_locate(const sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot, sb_place *place)
{
    if (sb_claim_state(receipt) != SB_CLAIM_HELD || sb_claim_holder(receipt) != slot + 1) {
        return SB_GONE;
    }
    const uint64_t life = sb_load(&sb_claims_at(r, table)->state);
    for (int spin = 0; spin < SPINS; spin++) {
        if (find_place(r, table, offset, place) != SB_OK) {
            return SB_GONE;
        }
        uint64_t w = sb_load(place->word) ^ place->binding;
        if (w != receipt && passed(r, table, place, offset)) {
            continue; /* look in the overflow table */
        }
        if (w != receipt && sb_claim_left_window(r, life, w, offset)) { /* its entry is whole, though the base may not be behind it yet */
            if (sb_overflow_find(r, table, offset, place) != SB_OK) {
                return SB_GONE;
            }
            w = sb_load(place->word) ^ place->binding;
        }
        if (w == receipt) {
            return SB_OK;
        }
        if (w != moving_form(receipt)) {
            return SB_GONE;
        }
        sb_pause(); /* an append is about to decide about this very claim */
    }
    return SB_AGAIN;
}

/* CAS the claim named by `receipt` to `desired`. Answers SB_OK and where it was. */
static int change(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot, uint64_t desired, sb_place *place)
{
    for (;;) { /* it changes its place once at most, and is decided about by one append */
        int code = sb_claim_locate(r, table, offset, receipt, slot, place);
        if (code != SB_OK) {
            return code;
        }
        uint64_t stored = receipt ^ place->binding;
        if (sb_cas(place->word, &stored, desired ^ place->binding)) {
            return SB_OK;
        }
    }
}

int sb_claim_ack(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot)
{
    sb_place place;
    int code = change(r, table, offset, receipt, slot, sb_claim_acked(r, sb_load(&sb_claims_at(r, table)->state), receipt, offset), &place);
    if (code != SB_OK) {
        return code;
    }
    SB_FAILPOINT(claim_acked); /* a kill leaves the base behind (next acker, janitor) or an acked entry (next search for room) */
    if (place.entry) {
        sb_overflow_free(r, table, &place);
    }
    return SB_OK;
}

static int give_back(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot, uint32_t attempts)
{
    sb_place place;
    uint32_t lap = sb_claim_lap(r, sb_load(&sb_claims_at(r, table)->state), offset);
    uint64_t freed = sb_claim_word(SB_CLAIM_FREE, 0, attempts, sb_claim_generation(receipt), lap);
    int code = change(r, table, offset, receipt, slot, freed, &place);
    if (code == SB_OK) {
        SB_FAILPOINT(claim_freed); /* nobody looks for it until the janitor has seen it */
        sb_store(&sb_claims_at(r, table)->released, 1);
    }
    return code;
}

int sb_claim_renew(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot, uint32_t deadline_ms, sb_claim *renewed)
{
    if (deadline_ms == 0) {
        return give_back(r, table, offset, receipt, slot, sb_claim_attempts(receipt));
    }
    sb_place place;
    uint64_t held = sb_claim_word(SB_CLAIM_HELD, slot + 1, sb_claim_attempts(receipt), sb_claim_generation(receipt) + 1, deadline_ms);
    int code = change(r, table, offset, receipt, slot, held, &place);
    if (code == SB_OK) {
        sb_claim_note_deadline(sb_claims_at(r, table), deadline_ms);
        *renewed = (sb_claim){.offset = offset, .word = held};
    }
    return code;
}

int sb_claim_start(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot, uint32_t deadline_ms, sb_claim *started)
{
    if (!sb_claim_is_prefetched(receipt) || !deadline_ms) {
        return SB_GONE;
    }
    sb_claims *c = sb_claims_at(r, table);
    sb_place place;
    uint32_t before = sb_claim_attempts(receipt);
    uint64_t held = sb_claim_word(SB_CLAIM_HELD, slot + 1, before < SB_CLAIM_ATTEMPTS_MAX ? before + 1 : before,
                                  sb_claim_generation(receipt) + 1, deadline_ms);
    int code = change(r, table, offset, receipt, slot, held, &place);
    if (code != SB_OK) {
        return code;
    }
    SB_FAILPOINT(claim_started); /* a kill leaves a counted attempt, though the listener has not been called */
    sb_claim_note_deadline(c, deadline_ms);
    if (before) {
        sb_add(&c->redelivered, 1);
    }
    *started = (sb_claim){.offset = offset, .word = held};
    return SB_OK;
}

int sb_claim_release(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot)
{
    uint32_t attempts = sb_claim_attempts(receipt);
    return give_back(r, table, offset, receipt, slot, attempts && !sb_claim_is_prefetched(receipt) ? attempts - 1 : attempts);
}
