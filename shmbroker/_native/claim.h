/* claim.h: which consumer has which message (R9). One word per message in flight; no lock on the way.
 *
 * A claim table is a window of words over the offsets [base, base + window) of one queue, for one group. The word of an
 * offset is made from nothing but a CAS of its exact old value. Two things keep a slow process from hitting the word of
 * another offset (the same place, one lap later): a FREE or ACKED word carries its lap, and a receipt is the whole HELD
 * word, whose generation moves with every claim of that place.
 *
 * When its topic or group is deleted, a table is free for another group and queue. Its life, from being made to being given
 * up, is named by the state word in it. A slow process says which life it means, and hits no word of a later one: the lap
 * differs, and generations go on.
 *
 * A claim older than the window lies in the overflow table. There the word is bound to its table and offset (see
 * sb_claim_binding), so that it cannot be mistaken for another's when the entry is used again.
 */
#ifndef SHMBROKER_CLAIM_H
#define SHMBROKER_CLAIM_H

#include "ipc.h"
#include "region.h"

#define SB_CLAIM_ATTEMPTS_MAX 255u
#define SB_CLAIM_GENERATION_MASK 0x3ffu
#define SB_CLAIM_SLOT_MAX 4093u
#define SB_CLAIM_MOVED 0xfffu /* in the slot field of a MOVING word: the claim went to the overflow table */

/* The word, from its lowest bit: state 2 | slot + 1: 12 (0: none) | attempts 8 | generation 10 | deadline or lap 32. */
static inline uint32_t sb_claim_state(uint64_t w) { return (uint32_t)(w & SB_CLAIM_STATE_MASK); }
static inline uint32_t sb_claim_holder(uint64_t w) { return (uint32_t)(w >> 2) & 0xfffu; } /* slot + 1 */
static inline uint32_t sb_claim_attempts(uint64_t w) { return (uint32_t)(w >> 14) & 0xffu; }
static inline uint32_t sb_claim_generation(uint64_t w) { return (uint32_t)(w >> 22) & SB_CLAIM_GENERATION_MASK; }
static inline uint32_t sb_claim_deadline(uint64_t w) { return (uint32_t)(w >> 32); } /* HELD: ms, 0 none. Else the lap */
static inline uint64_t sb_claim_word(uint32_t state, uint32_t holder, uint32_t attempts, uint32_t generation, uint32_t deadline)
{
    return (uint64_t)state | (uint64_t)holder << 2 | (uint64_t)attempts << 14 |
           (uint64_t)(generation & SB_CLAIM_GENERATION_MASK) << 22 | (uint64_t)deadline << 32;
}
static inline int sb_claim_expired(uint64_t held, uint32_t now_ms)
{
    uint32_t deadline = sb_claim_deadline(held);
    return deadline != 0 && (int32_t)(now_ms - deadline) >= 0;
}
static inline int sb_claim_is_prefetched(uint64_t w) { return sb_claim_state(w) == SB_CLAIM_HELD && sb_claim_deadline(w) == 0; }
/* When a claim made now for `invisible_ms` ends: never early (the clock was cut to whole ms), never 0. */
static inline uint32_t sb_claim_deadline_after(uint32_t now_ms, uint32_t invisible_ms)
{
    uint32_t deadline = now_ms + invisible_ms + 1u;
    return deadline ? deadline : 1u;
}
#define SB_CLAIM_INVISIBLE_MAX_MS (12u * 3600u * 1000u)

static inline sb_word *sb_claim_place(const sb_region *r, sb_claims *c, uint64_t offset)
{
    return &c->word[offset & (r->limits.claim_window - 1u)];
}
static inline uint64_t sb_claims_life(uint32_t slot_state, uint64_t incarnation) { return incarnation << 8 | slot_state; }
static inline int sb_claims_is_live(uint64_t life) { return (life & 0xffu) == SB_SLOT_LIVE; }
static inline uint64_t sb_claims_incarnation(uint64_t life) { return life >> 8; }
static inline uint32_t sb_claim_lap(const sb_region *r, uint64_t life, uint64_t offset)
{
    return (uint32_t)(offset >> __builtin_ctz(r->limits.claim_window)) ^ (uint32_t)sb_claims_incarnation(life) * 0x9e3779b1u;
}
/* Nobody has it: its word is of this lap and FREE, or held by a claim that is over. */
static inline int sb_claim_available(const sb_region *r, uint64_t life, uint64_t w, uint64_t offset, uint32_t now_ms)
{
    switch (sb_claim_state(w)) {
    case SB_CLAIM_FREE:
        return sb_claim_deadline(w) == sb_claim_lap(r, life, offset);
    case SB_CLAIM_HELD:
        return sb_claim_expired(w, now_ms);
    default:
        return 0;
    }
}
/* What the acknowledgement of a claim leaves in its word. */
static inline uint64_t sb_claim_acked(const sb_region *r, uint64_t life, uint64_t receipt, uint64_t offset)
{
    return sb_claim_word(SB_CLAIM_ACKED, 0, sb_claim_attempts(receipt), sb_claim_generation(receipt), sb_claim_lap(r, life, offset));
}
/* sb_claims.next, so that a slow process does not move the hint of a later life. 52 bits are enough for any offset. */
#define SB_CLAIMS_NEXT_LIFE 0xfffull
static inline uint64_t sb_claims_next_word(uint64_t life, uint64_t offset)
{
    return offset << 12 | (sb_claims_incarnation(life) & SB_CLAIMS_NEXT_LIFE);
}
static inline uint64_t sb_claims_next_offset(const sb_claims *c) { return sb_load(&c->next) >> 12; }
/* The window's word says that the claim of `offset` lies in the overflow table, or that the base is passing it. */
static inline int sb_claim_is_moved(uint64_t w) { return sb_claim_state(w) == SB_CLAIM_MOVING && sb_claim_holder(w) == SB_CLAIM_MOVED; }
static inline int sb_claim_left_window(const sb_region *r, uint64_t life, uint64_t w, uint64_t offset)
{
    return sb_claim_is_moved(w) ||
           (sb_claim_state(w) == SB_CLAIM_FREE && sb_claim_deadline(w) == sb_claim_lap(r, life, offset + r->limits.claim_window));
}
/* Xor of this over an overflow entry's claim word: no two offsets of a table, nor two tables at one offset, share it. */
static inline uint64_t sb_claim_binding(uint32_t table, uint64_t offset)
{
    return (uint64_t)((uint32_t)offset ^ table * 0x9e3779b1u) << 32;
}

typedef struct {
    uint64_t offset;
    uint64_t word; /* the claim as taken: it is the receipt */
} sb_claim;

/* Find or create the claim table of (group, queue), given by slot; a new one starts at `base`. SB_OK (*created) |
 * SB_TABLE_FULL | SB_TIMEOUT | SB_INVALID | SB_BROKEN. Deadline: for the definition lock. */
int sb_claims_open(sb_region *r, uint32_t group, uint32_t queue, uint64_t base, int64_t deadline_ns, uint32_t *table, int *created);
/* The tables of a group in all queues of one topic, at one moment under the definition lock. Those that are new begin at
 * the first message that the log has; with `starts`, and if the group has never consumed the topic before (queues added later
 * are consumed from their first message), at these offsets, as far as the queues reach: SB_NO_OFFSET is behind the last
 * message. lives: theirs; 0: there was no table left for that queue. SB_OK | SB_TABLE_FULL: not enough for a group that has
 * never consumed the topic, which gets none | as sb_claims_open. */
int sb_claims_open_topic(sb_region *r, uint32_t group, const uint32_t *queues, uint32_t count, const uint64_t *starts,
                         int64_t deadline_ns, uint32_t *tables, uint64_t *lives);
#define SB_NO_OFFSET (~0ull)
/* Has the group consumed the topic of this queue before? Only looks. */
int sb_claims_knows_topic(const sb_region *r, uint32_t group, uint32_t queue);
/* The group begins this queue anew, in a new table: at `base`, or at the next offset that the queue has. All that was claimed
 * or acked in the old one is void. SB_OK | SB_TABLE_FULL: there is no free table, which the old one then is | SB_NOT_FOUND: no
 * such group | SB_GONE: no such queue | SB_TIMEOUT | SB_BROKEN | codes of sb_append */
typedef struct {
    uint64_t before, after; /* bases; before SB_NO_OFFSET: the group has never consumed this queue */
} sb_reset;
int sb_claims_reset(sb_region *r, uint32_t group_id, uint32_t topic_id, uint32_t queue_id, uint64_t base, int64_t deadline_ns,
                    sb_reset *done, uint64_t *needed);
/* Its topic or group is deleted: the table is free for others, unless this life of it is over already. */
void sb_claims_give_up(sb_claims *c, uint64_t life);
/* All words FREE, no overflow entries, base and next at `base`. Nobody may use the table meanwhile. */
void sb_claims_format(sb_region *r, uint32_t table, uint64_t base);
/* Only look. SB_OK | SB_NOT_FOUND. */
int sb_claims_find(const sb_region *r, uint32_t group, uint32_t queue, uint32_t *table);

/* Claim `offset` (known to hold a visible message) for client slot `slot` until `deadline_ms`; the attempts of the result
 * count this delivery. deadline_ms 0: prefetched, not delivered yet: neither deadline nor attempt (R10). SB_OK | SB_LOST: somebody else has it or had it | SB_NO_SPACE: beyond the
 * window | SB_GONE: this life of the table is over. `now_ms`: an expired claim is taken over. */
int sb_claim_take(sb_region *r, uint32_t table, uint64_t life, uint64_t offset, uint32_t slot, uint32_t now_ms, uint32_t deadline_ms,
                  sb_claim *claim);
/* The same for a claim that somebody, this process included, has prefetched and not begun: it is `slot`'s from now on. */
int sb_claim_take_over(sb_region *r, uint32_t table, uint64_t life, uint64_t offset, uint32_t slot, uint32_t deadline_ms, sb_claim *claim);
/* Offsets that are prefetched, oldest first, at most `count`. Costs one load when there are none. Overflow included. */
uint32_t sb_claim_prefetched(sb_region *r, uint32_t table, uint64_t *offsets, uint32_t count);
/* Just before the listener is called: the prefetched claim becomes a delivery, with its attempt counted and a deadline; the
 * result's word is the new receipt. As sb_claim_ack; SB_GONE: another member has taken it over. */
int sb_claim_start(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot, uint32_t deadline_ms, sb_claim *started);
/* Straight to ACKED, without a delivery: a filtered-out message. SB_OK | SB_LOST | SB_NO_SPACE | SB_GONE. */
int sb_claim_skip(sb_region *r, uint32_t table, uint64_t life, uint64_t offset);
/* Offsets that were claimed before and can be had again (released or expired), oldest first, at most `count`. Costs two
 * loads when there are none. Overflow included. */
uint32_t sb_claim_released(sb_region *r, uint32_t table, uint32_t now_ms, uint64_t *offsets, uint32_t count);
/* Hint: the table's earliest deadline; may be too early, never too late, but for a claimer that was stopped before it came
 * here. The claim was stored by a CAS before. 0: none. */
void sb_claim_note_deadline(sb_claims *c, uint32_t deadline_ms);
/* Hint: some claims are prefetched. */
void sb_claim_note_prefetched(sb_claims *c);
/* Take the hint down if its time has come: it is returned, and the caller looks at all claims that are held. 0: not yet. */
uint32_t sb_claim_take_deadline(sb_claims *c, uint32_t now_ms);
/* Hint: next >= offset from now on. deadline_ms: of the claims that the caller took on the way (0: it has prefetched). */
void sb_claim_advance(sb_region *r, uint32_t table, uint64_t life, uint64_t offset, uint32_t deadline_ms);
/* Of those from `from` on that are not acknowledged the oldest, in the overflow table or not. SB_OK: it can be had, now |
 * SB_LOST: somebody has it | SB_END: nobody ever had it, nor what is behind it. */
int sb_claim_oldest(sb_region *r, uint32_t table, uint64_t life, uint64_t from, uint32_t now_ms, uint64_t *offset);
/* Where a search for fresh messages begins. */
uint64_t sb_claim_next(const sb_region *r, uint32_t table);

/* A receipt is the word of the claim. SB_OK | SB_GONE: the claim is no longer `slot`'s, or was renewed since | SB_AGAIN:
 * another process decides about this claim at this moment and did not finish within a short spin. */
int sb_claim_ack(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot);
/* New deadline; the result's word is the new receipt, the old one is void. deadline_ms 0: give it back now, as if it had
 * expired (the attempt counts); then there is no new receipt. */
int sb_claim_renew(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot, uint32_t deadline_ms, sb_claim *renewed);
/* Give back without counting the attempt (never shown to the application); a prefetched one has none. */
int sb_claim_release(sb_region *r, uint32_t table, uint64_t offset, uint64_t receipt, uint32_t slot);

/* Move the base over all that is acked, by try-lock; finishes what a dead holder of the claim lock left. To be called
 * after each run of acks. */
void sb_claim_base(sb_region *r, uint32_t table);
/* The window ends before `wanted`: move its oldest unacked claims to the overflow table. SB_OK: there is room now |
 * SB_TABLE_FULL | SB_LOCKED: another process is at it (or was stopped at it), call again | SB_GONE: this life is over. */
int sb_claim_overflow(sb_region *r, uint32_t table, uint64_t life, uint64_t wanted);
/* Try the claim lock, and finish what a dead holder left: SB_OK | SB_LOCKED | SB_BROKEN */
int sb_claims_try_lock(sb_region *r, uint32_t table);

/* Janitor. Both set the hints that make receivers look; the caller wakes the group where the answer is not 0. */
/* Give back all claims of a dead slot. *undecided: claims that an append of the dead was deciding about; once the append lock
 * has been repaired they are decided, or the dead slot's again: reap it once more. */
uint32_t sb_claims_reap(sb_region *r, uint32_t table, uint32_t slot, uint32_t *undecided);
/* If a deadline is over, or `thorough`, look at every claim: give back what has expired, mend hints and the base. *next_ms:
 * until the next deadline, SB_NIL none. */
uint32_t sb_claims_expire(sb_region *r, uint32_t table, uint32_t now_ms, int thorough, uint32_t *next_ms);
/* Something claimable that was claimed before: FREE words below next, or overflow entries. For the wake-up backstop. */
int sb_claims_claimable(sb_region *r, uint32_t table, uint32_t now_ms);
/* A message that was never claimed, and the window has room for it. Of a live table with a queue. */
int sb_claims_has_fresh(const sb_region *r, uint32_t table);

/* Progress (R14): the state of a table as runs of consecutive offsets, sorted; layout.h draws them. Unacked offsets are
 * named below the base (overflow) and, if they were ever delivered, above it. Returns how many runs there are; writes at
 * most `room`. A loose snapshot: exact once nobody claims or acks. */
uint32_t sb_claims_runs(sb_region *r, uint32_t table, uint64_t *base, sb_progress_run *runs, uint32_t room);
/* The same for one offset that is to be ACKED: short, true whatever other records say or are lost, enough to make the table anew. */
#define SB_ONE_ACK_RUNS 32u
typedef struct {
    sb_progress progress;
    sb_progress_run run[SB_ONE_ACK_RUNS]; /* the first run_count of them */
} sb_one_ack;
void sb_claims_one_ack(const sb_region *r, uint32_t table, uint64_t offset, sb_one_ack *body);
/* How many claims are held now; the oldest of them and its slot: who keeps the base back. */
uint32_t sb_claims_held(const sb_region *r, uint32_t table, uint64_t *oldest, uint32_t *holder);
/* Recovery, nobody else attached: merge one progress body into the table. `created`: the table says nothing yet. SB_OK |
 * SB_TABLE_FULL: the overflow table is too small | SB_INVALID: runs out of order. */
int sb_claims_merge(sb_region *r, uint32_t table, int created, const sb_progress *progress, const sb_progress_run *runs);

#endif
