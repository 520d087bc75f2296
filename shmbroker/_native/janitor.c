/* janitor.c: see janitor.h. */
#include "janitor.h"

#include <string.h>

#include "claim.h"
#include "membership.h"
#include "queue_lock.h"
#include "wait.h"

#define TURNS 50u /* passes until every table was looked at, whatever it looks like: a second's worth of ticks */

static uint64_t client_word(uint32_t pid, uint32_t generation, uint32_t state)
{
    return ((uint64_t)pid << 32) | ((uint64_t)(generation & 0xffffffu) << 8) | state;
}

int sb_client_join(sb_region *r, uint32_t pid, uint64_t start_ticks, uint64_t incarnation, const char *name, uint32_t *slot,
                   uint32_t *generation)
{
    for (uint32_t i = 0; i < r->limits.clients; i++) {
        sb_client *c = sb_client_at(r, i);
        uint64_t word = sb_load(&c->state);
        uint32_t next = (sb_client_generation_of(word) + 1) & 0xffffffu;
        if (sb_client_state_of(word) != SB_CLIENT_FREE || !sb_cas(&c->state, &word, client_word(pid, next, SB_CLIENT_JOINING))) {
            continue;
        }
        sb_store(&c->pid, pid);
        sb_store(&c->start_ticks, start_ticks);
        sb_store(&c->incarnation, incarnation);
        sb_store(&c->attached_ns, (uint64_t)sb_now_ns());
        sb_word *zero[] = {&c->sends, &c->receives, &c->acks};
        for (size_t z = 0; z < sizeof zero / sizeof zero[0]; z++) {
            sb_store(zero[z], 0);
        }
        for (uint32_t w = 0; w < SB_ID_WINDOW; w++) {
            sb_store(&c->window[w], UINT64_MAX);
            sb_store(&c->window_sequence[w], 0);
        }
        memset(c->name, 0, sizeof c->name);
        strncpy(c->name, name, sizeof c->name - 1);
        word = client_word(pid, next, SB_CLIENT_JOINING);
        if (!sb_cas(&c->state, &word, client_word(pid, next, SB_CLIENT_LIVE))) { /* killed before: JOINING with its pid, reaped */
            continue;
        }
        *slot = i;
        *generation = next;
        return SB_OK;
    }
    return SB_TABLE_FULL;
}

/* Whose queue is it, and does anybody of the group sleep for it? One that is owned nobody else can do anything for, and its
 * owner only if its oldest message is to be had. */
static void wake_for(sb_region *r, uint32_t table, uint64_t life, uint32_t now_ms)
{
    const sb_claims *claims = sb_claims_at(r, table);
    const uint64_t owner = sb_load(&claims->owner);
    uint64_t oldest;
    if (owner) {
        if (sb_claim_oldest(r, table, life, 0, now_ms, &oldest) != SB_LOST) {
            (void)sb_wake_member(r, claims->group_slot, (uint32_t)owner - 1);
        }
    } else if (claims->queue_slot < r->limits.queues) {
        (void)sb_wake_group(r, sb_queue_at(r, claims->queue_slot)->topic_slot, claims->group_slot);
    }
}

/* Give back what `slot` holds, in one group or (SB_NIL) in all. *undecided: see sb_claims_reap. */
static uint32_t give_back(sb_region *r, uint32_t slot, uint32_t group, uint32_t *undecided)
{
    uint32_t released = 0;
    *undecided = 0;
    for (uint32_t i = 0; i < r->limits.claim_tables; i++) {
        sb_claims *claims = sb_claims_at(r, i);
        const uint64_t life = sb_load(&claims->state);
        const int live = sb_claims_is_live(life);
        if (group != SB_NIL && (!live || claims->group_slot != group)) {
            continue;
        }
        uint32_t moving;
        const int owned = sb_queue_bereave(r, i, slot); /* of a table that was given up as well: no life begins with it */
        if (!live) {
            continue;
        }
        released += sb_claims_reap(r, i, slot, &moving);
        *undecided += moving;
        sb_claim_base(r, i);
        if (owned || sb_load(&claims->released)) {
            wake_for(r, i, life, (uint32_t)(sb_now_ns() / 1000000));
        }
    }
    return released;
}

uint32_t sb_group_give_back(sb_region *r, uint32_t group, uint32_t slot)
{
    uint32_t undecided; /* of another thread of the caller's, which knows what becomes of them */
    return group < r->limits.groups && slot < r->limits.clients ? give_back(r, slot, group, &undecided) : 0;
}

int sb_client_reap(sb_region *r, uint32_t slot, uint32_t generation, uint32_t *released)
{
    *released = 0;
    if (slot >= r->limits.clients) {
        return SB_INVALID;
    }
    sb_client *c = sb_client_at(r, slot);
    /* No two reap a slot at once: its owner does while it lives, the janitor once it is dead, and there is one janitor, by
     * the lock of its role. One that was killed in here left DEAD: the next passes the CAS and does it all again. */
    uint64_t word = sb_load(&c->state);
    uint32_t pid = sb_client_pid_of(word);
    if (sb_client_generation_of(word) != generation || sb_client_state_of(word) == SB_CLIENT_FREE) {
        return SB_GONE;
    }
    if (!sb_cas(&c->state, &word, client_word(pid, generation, SB_CLIENT_DEAD))) {
        return SB_GONE; /* it came to life, or went, since we looked */
    }
    (void)sb_append_lock_check(r);
    uint32_t undecided;
    *released = give_back(r, slot, SB_NIL, &undecided);
    if (undecided) {
        return SB_AGAIN; /* whoever has the append lock now repairs it first; the slot stays DEAD and is met again */
    }
    for (uint32_t i = 0; i < r->limits.groups; i++) {
        sb_group_leave(r, i, slot);
    }
    (void)sb_waiter_reap(r, slot);
    word = client_word(pid, generation, SB_CLIENT_DEAD);
    (void)sb_cas(&c->state, &word, client_word(0, generation, SB_CLIENT_FREE));
    return SB_OK;
}

static int is_orphan(const sb_region *r, const sb_claims *claims)
{
    const sb_queue *q = sb_queue_at(r, claims->queue_slot);
    return sb_load(&q->state) != SB_SLOT_LIVE || q->topic_id != claims->topic_id || claims->group_slot >= r->limits.groups ||
           sb_load(&sb_group_at(r, claims->group_slot)->state) != SB_SLOT_LIVE ||
           sb_group_at(r, claims->group_slot)->group_id != claims->group_id;
}

void sb_janitor_pass(sb_region *r, int64_t now_ns, uint32_t turn, uint32_t *expired, uint32_t *next_ms)
{
    *expired = 0;
    *next_ms = SB_NIL;
    (void)sb_append_lock_check(r);
    for (uint32_t i = 0; i < r->limits.claim_tables; i++) {
        sb_claims *claims = sb_claims_at(r, i);
        const uint64_t life = sb_load(&claims->state);
        if (!sb_claims_is_live(life) || claims->queue_slot >= r->limits.queues) {
            continue;
        }
        const int its_turn = i % TURNS == turn % TURNS;
        if (its_turn && is_orphan(r, claims)) {
            sb_claims_give_up(claims, life); /* who deleted its topic or group died before it came to this */
            continue;
        }
        /* Who released or took a claim may have been stopped before it put up the hint. Where members find nothing fresh they
         * wait for just that, and little is in flight: looked at in every pass (R6). The others' windows are full of messages
         * that need no look, and their members have work. */
        const int thorough = its_turn || !sb_claims_has_fresh(r, i);
        uint32_t next = SB_NIL;
        *expired += sb_claims_expire(r, i, (uint32_t)(now_ns / 1000000), thorough, &next);
        *next_ms = next < *next_ms ? next : *next_ms;
        if (sb_load(&claims->released) || sb_load(&claims->prefetched) || sb_claim_next(r, i) < sb_load(&sb_queue_at(r, claims->queue_slot)->next_offset)) {
            wake_for(r, i, life, (uint32_t)(now_ns / 1000000)); /* no system call unless somebody sleeps over it (R6) */
        }
    }
    (void)sb_wait_backstop(r, now_ns);
}
