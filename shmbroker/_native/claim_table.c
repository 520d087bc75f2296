/* claim_table.c: a claim table as a whole: moving its base, overflow, repair, and the janitor's part. Made in claim_open.c.
 *
 * Under the claim lock (robust, only ever try-locked, R12): base, pending_base, moving_slot. The order of stores, and what
 * a kill at each edge leaves, stands in move_base() and move_oldest(); repair() is run by the next one who gets the lock.
 * Words that the base passes are ACKED, or MOVING with the mark MOVED: nobody but the holder of the lock changes those. */
#include "claim.h"

#include "failpoint.h"
#include "overflow.h"

#define MOVES_MAX 64u  /* claims moved to the overflow table by one call */
#define PASSES_MAX 16u /* of the base in one call; whoever comes next goes on */

static int is_passable(uint64_t w) { return sb_claim_state(w) == SB_CLAIM_ACKED || sb_claim_is_moved(w); }

/* Finish [base, pending_base): twice does no harm, a word of the next lap is left alone. */
static void reset_words(const sb_region *r, sb_claims *c, uint64_t base, uint64_t end)
{
    const uint64_t life = sb_load(&c->state);
    for (uint64_t o = base; o < end; o++) {
        sb_word *word = sb_claim_place(r, c, o);
        uint64_t w = sb_load(word);
        if (is_passable(w)) {
            sb_store(word, sb_claim_word(SB_CLAIM_FREE, 0, 0, sb_claim_generation(w), sb_claim_lap(r, life, o + r->limits.claim_window)));
        }
        if (o == base) {
            SB_FAILPOINT(claim_half_reset); /* some words are of the next lap, beyond the old base's window: nobody takes them */
        }
    }
    sb_store(&c->base, end); /* SYNC: base. From here on the reset words can be claimed */
    SB_FAILPOINT(claim_base); /* nothing is left to do but unlock */
}

static int move_base(const sb_region *r, sb_claims *c)
{
    uint64_t base = sb_load(&c->base), end = base;
    while (end - base < r->limits.claim_window && is_passable(sb_load(sb_claim_place(r, c, end)))) {
        end++;
    }
    if (end == base) {
        return 0;
    }
    sb_store(&c->pending_base, end);
    SB_FAILPOINT(claim_pending); /* no word changed yet: repair resets them */
    reset_words(r, c, base, end);
    return 1;
}

/* The last holder of the claim lock was killed. */
static void repair(sb_region *r, uint32_t table)
{
    sb_claims *c = sb_claims_at(r, table);
    uint64_t base = sb_load(&c->base), pending = sb_load(&c->pending_base), moving = sb_load(&c->moving_slot);
    if (moving != 0 && moving <= r->limits.overflow_claims && sb_overflow_is_reserved(r, table, (uint32_t)moving - 1)) {
        if (sb_claim_is_moved(sb_load(sb_claim_place(r, c, base)))) {
            sb_overflow_publish(r, table, (uint32_t)moving - 1); /* the entry was filled before the word was marked */
            sb_store(&c->released, 1);
        } else {
            sb_overflow_cancel(r, table, (uint32_t)moving - 1);
        }
    }
    sb_store(&c->moving_slot, 0);
    if (pending > base && pending - base <= r->limits.claim_window) {
        reset_words(r, c, base, pending);
    }
}

int sb_claims_try_lock(sb_region *r, uint32_t table)
{
    sb_claims *c = sb_claims_at(r, table);
    int code = sb_mutex_try(&c->lock);
    if (code == SB_OWNER_DEAD) {
        repair(r, table);
        code = sb_mutex_consistent(&c->lock);
    }
    return code;
}

void sb_claim_base(sb_region *r, uint32_t table)
{
    sb_claims *c = sb_claims_at(r, table);
    for (uint32_t pass = 0; pass < PASSES_MAX; pass++) {
        /* An acker stores its word and then looks at the base; a mover stores the base, unlocks, and then looks at the
         * word behind it. With a full fence on both sides at least one of them sees the other. */
        sb_fence();
        uint64_t base = sb_load(&c->base);
        int work = is_passable(sb_load(sb_claim_place(r, c, base))) || sb_load(&c->pending_base) > base || sb_load(&c->moving_slot);
        if (!work || sb_claims_try_lock(r, table) != SB_OK) {
            return;
        }
        int moved = move_base(r, c);
        sb_mutex_unlock(&c->lock);
        if (!moved) {
            return;
        }
    }
}

static void put_up_hint(sb_claims *c, uint64_t w)
{
    if (sb_claim_state(w) == SB_CLAIM_FREE) {
        sb_store(&c->released, 1);
    } else if (sb_claim_is_prefetched(w)) {
        sb_store(&c->prefetched, 1);
    } else {
        sb_claim_note_deadline(c, sb_claim_deadline(w));
    }
}

/* Move the claim at the base to an overflow entry. The lock is held. SB_OK: it is passable now. */
static int move_oldest(sb_region *r, uint32_t table)
{
    sb_claims *c = sb_claims_at(r, table);
    uint64_t base = sb_load(&c->base);
    sb_word *word = sb_claim_place(r, c, base);
    uint32_t i, lap = sb_claim_lap(r, sb_load(&c->state), base);
    if (sb_overflow_reserve(r, table, base, &i) != SB_OK) {
        return SB_TABLE_FULL;
    }
    sb_overflow *e = sb_overflow_at(r, i);
    sb_store(&e->offset, base);
    SB_FAILPOINT(claim_reserved); /* the word is as it was: repair frees the entry */
    for (;;) {
        uint64_t w = sb_load(word);
        if (is_passable(w)) { /* acked meanwhile */
            sb_overflow_cancel(r, table, i);
            break;
        }
        if (sb_claim_state(w) == SB_CLAIM_MOVING) { /* an append decides about it */
            sb_overflow_cancel(r, table, i);
            sb_store(&c->moving_slot, 0);
            return SB_LOCKED;
        }
        sb_store(&e->claim, w ^ sb_claim_binding(table, base));
        uint64_t marked = sb_claim_word(SB_CLAIM_MOVING, SB_CLAIM_MOVED, sb_claim_attempts(w), sb_claim_generation(w), lap);
        if (sb_cas(word, &w, marked)) {
            SB_FAILPOINT(claim_moving); /* the entry is whole, who looks for this offset finds it: repair publishes it */
            sb_overflow_publish(r, table, i);
            sb_fence();
            put_up_hint(c, w); /* a scan that had passed the entries already missed it */
            SB_FAILPOINT(claim_moved); /* the entry is live, the marked word passable: the base goes on */
            break;
        }
    }
    sb_store(&c->moving_slot, 0);
    return SB_OK;
}

int sb_claim_overflow(sb_region *r, uint32_t table, uint64_t life, uint64_t wanted)
{
    sb_claims *c = sb_claims_at(r, table);
    int code = sb_claims_try_lock(r, table);
    if (code != SB_OK) {
        return code;
    }
    if (sb_load(&c->state) != life) { /* and none begins while the lock is held */
        sb_mutex_unlock(&c->lock);
        return SB_GONE;
    }
    (void)move_base(r, c);
    for (uint32_t n = 0; n < MOVES_MAX; n++) {
        uint64_t base = sb_load(&c->base);
        int needed = wanted >= base + r->limits.claim_window;
        /* Who fills a window holds most of it: while at it, move the run of held claims behind the oldest as well. */
        if (!needed && (n == 0 || sb_claim_state(sb_load(sb_claim_place(r, c, base))) != SB_CLAIM_HELD)) {
            break;
        }
        code = move_oldest(r, table);
        if (code != SB_OK) {
            break;
        }
        (void)move_base(r, c);
    }
    int room = wanted < sb_load(&c->base) + r->limits.claim_window;
    sb_mutex_unlock(&c->lock);
    return room ? SB_OK : code == SB_OK ? SB_LOCKED : code;
}

/* ---- janitor ------------------------------------------------------------------------------------------------- */

static uint64_t freed(const sb_region *r, uint64_t life, uint64_t held, uint64_t offset)
{
    return sb_claim_word(SB_CLAIM_FREE, 0, sb_claim_attempts(held), sb_claim_generation(held), sb_claim_lap(r, life, offset));
}

/* What a walk over all words of a table looks for, and what it saw. */
typedef struct {
    uint32_t slot;   /* give back what this slot holds; SB_NIL: nobody's */
    uint32_t now_ms; /* give back what has expired by now, if `expire` */
    int expire;
    uint32_t given_back, claimable, prefetched, undecided;
    uint32_t earliest; /* deadline, 0 none */
} walk;

static void visit(const sb_region *r, uint32_t table, uint64_t offset, const sb_place *place, walk *v)
{
    const sb_claims *c = sb_claims_at(r, table);
    uint64_t stored = sb_load(place->word), w = stored ^ place->binding;
    const uint64_t life = sb_load(&c->state); /* behind the word: of the life that the word is of, or of one that overwrites it */
    if (!place->entry && offset - sb_load(&c->base) >= r->limits.claim_window) {
        return; /* the word is of the next lap already, or of another life of the table */
    }
    switch (sb_claim_state(w)) {
    case SB_CLAIM_HELD:
        if ((v->slot != SB_NIL && sb_claim_holder(w) == v->slot + 1) || (v->expire && sb_claim_expired(w, v->now_ms))) {
            v->given_back += (uint32_t)sb_cas(place->word, &stored, freed(r, life, w, offset) ^ place->binding);
        } else if (sb_claim_is_prefetched(w)) {
            v->prefetched++;
        } else if (!v->earliest || (int32_t)(sb_claim_deadline(w) - v->earliest) < 0) {
            v->earliest = sb_claim_deadline(w);
        }
        break;
    case SB_CLAIM_FREE:
        v->claimable += sb_claim_deadline(w) == sb_claim_lap(r, life, offset) && (place->entry || offset < sb_claims_next_offset(c));
        break;
    case SB_CLAIM_ACKED:
        if (place->entry) {
            sb_overflow_free(r, table, place);
        }
        break;
    default:
        v->undecided += v->slot != SB_NIL && sb_claim_holder(w) == v->slot + 1;
        break;
    }
}

/* The window as far as the queue has messages, then the overflow entries: claims only ever move that way, so none is
 * missed. One that is on its way is met at its entry. */
static void walk_table(const sb_region *r, uint32_t table, walk *v)
{
    sb_claims *c = sb_claims_at(r, table);
    uint64_t base = sb_load(&c->base), end = base + r->limits.claim_window, offset;
    if (c->queue_slot < r->limits.queues) {
        uint64_t next = sb_load(&sb_queue_at(r, c->queue_slot)->next_offset);
        end = next < end ? next : end;
    }
    for (offset = base; offset < end; offset++) {
        sb_place place = {.word = sb_claim_place(r, c, offset)};
        if (!sb_claim_is_moved(sb_load(place.word)) || sb_overflow_find(r, table, offset, &place) == SB_OK) {
            visit(r, table, offset, &place, v);
        }
    }
    sb_place place;
    for (uint32_t i = 0; sb_load(&c->overflowed) && i < r->limits.overflow_claims; i++) {
        if (sb_overflow_live(r, table, i, &offset, &place)) {
            visit(r, table, offset, &place, v);
        }
    }
}

/* The hints that the walk has found to be missing: of a release, or of a scan, that somebody did not finish. */
static void put_up_hints(sb_claims *c, const walk *v)
{
    if (v->given_back || v->claimable) {
        sb_store(&c->released, 1);
    }
    if (v->prefetched) {
        sb_store(&c->prefetched, 1);
    }
    sb_claim_note_deadline(c, v->earliest);
}

uint32_t sb_claims_reap(sb_region *r, uint32_t table, uint32_t slot, uint32_t *undecided)
{
    sb_claims *c = sb_claims_at(r, table);
    *undecided = 0;
    if (!sb_claims_is_live(sb_load(&c->state))) {
        return 0;
    }
    sb_claim_base(r, table);
    walk v = {.slot = slot};
    walk_table(r, table, &v);
    put_up_hints(c, &v);
    *undecided = v.undecided;
    return v.given_back;
}

uint32_t sb_claims_expire(sb_region *r, uint32_t table, uint32_t now_ms, int thorough, uint32_t *next_ms)
{
    sb_claims *c = sb_claims_at(r, table);
    *next_ms = SB_NIL;
    if (!sb_claims_is_live(sb_load(&c->state))) {
        return 0;
    }
    walk v = {.slot = SB_NIL, .now_ms = now_ms, .expire = 1};
    if (sb_claim_take_deadline(c, now_ms) || thorough) {
        sb_claim_base(r, table);
        walk_table(r, table, &v);
        put_up_hints(c, &v);
    }
    uint32_t hint = (uint32_t)sb_load(&c->deadline_ms);
    if (hint) {
        *next_ms = (int32_t)(hint - now_ms) > 0 ? hint - now_ms : 0;
    }
    return v.given_back;
}

int sb_claims_claimable(sb_region *r, uint32_t table, uint32_t now_ms)
{
    const sb_claims *c = sb_claims_at(r, table);
    if (!sb_claims_is_live(sb_load(&c->state)) || c->queue_slot >= r->limits.queues) {
        return 0;
    }
    uint64_t hint = sb_load(&c->deadline_ms);
    return sb_load(&c->released) || (hint && (int32_t)(now_ms - (uint32_t)hint) >= 0) || sb_claims_has_fresh(r, table);
}

int sb_claims_has_fresh(const sb_region *r, uint32_t table)
{
    const sb_claims *c = sb_claims_at(r, table);
    uint64_t next = sb_claim_next(r, table), base = sb_load(&c->base);
    return next < sb_load(&sb_queue_at(r, c->queue_slot)->next_offset) && next - base < r->limits.claim_window;
}
