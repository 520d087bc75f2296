/* wait.c: see wait.h. Every poster does: change what is waited for, full fence, look at the flag, CAS it, post.
 * Every sleeper does: set the flag, full fence, look at what is waited for, sleep. One of the two sees the other. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "wait.h"

#include <time.h>

#include "failpoint.h"

#define SLICE_NS 100000000ll         /* no sleep is longer: the predicate is the truth, the semaphore a hint */
#define MESSAGE_SLICE_NS 500000000ll /* the same of a consumer without messages: whatever concerns it posts it, so it may sleep */
#define UNTAKEN_NS 5000000ll         /* a post not taken for so long is made again (R6) */
#define GROUPS_PER_WAKE 64u

static uint32_t wait_of(uint32_t state) { return state & 0xffu; }
static uint32_t with_wait(uint32_t state, uint32_t wait) { return (state & ~0xffu) | wait; }

int sb_waiter_take(sb_region *r, uint32_t client, uint32_t *slot)
{
    for (uint32_t i = 0; i < r->limits.waiters; i++) {
        sb_waiter *w = sb_waiter_at(r, i);
        uint32_t state = atomic_load_explicit(&w->state, memory_order_relaxed);
        if (state == SB_WAIT_FREE &&
            atomic_compare_exchange_strong(&w->state, &state, ((client + 1) << 8) | SB_WAIT_IDLE)) {
            sb_raise(&sb_marks(r)->waiters_high, i + 1);
            atomic_store(&w->hub, 0);
            *slot = i;
            return SB_OK;
        }
    }
    return SB_TABLE_FULL;
}

void sb_waiter_give(sb_region *r, uint32_t slot)
{
    if (slot < r->limits.waiters) {
        atomic_store(&sb_waiter_at(r, slot)->state, SB_WAIT_FREE);
    }
}

static void begin_wait(sb_waiter *w, uint32_t kind, uint64_t target)
{
    while (sb_semaphore_wait(&w->wake, 0) == SB_OK) { /* a credit left over from a post that came too late */
    }
    atomic_store_explicit(&w->kind, kind, memory_order_relaxed);
    sb_store(&w->target, target);
    uint32_t state = atomic_load(&w->state);
    atomic_store(&w->state, with_wait(state, SB_WAIT_WAITING)); /* SYNC: waiter */
    SB_FAILPOINT(wait_flagged);
    sb_fence();
}

/* Leaves alone a slot that was reaped meanwhile. */
static void end_wait(sb_waiter *w)
{
    uint32_t state = atomic_load(&w->state);
    while ((wait_of(state) == SB_WAIT_WAITING || wait_of(state) == SB_WAIT_POSTED) &&
           !atomic_compare_exchange_weak(&w->state, &state, with_wait(state, SB_WAIT_IDLE))) {
    }
}

/* WAITING -> POSTED belongs to exactly one poster. A poster killed before sem_post leaves POSTED: the backstop posts. */
static int claim_post(sb_waiter *w)
{
    uint32_t state = atomic_load(&w->state); /* SYNC: waiter */
    if (wait_of(state) != SB_WAIT_WAITING) {
        return 0;
    }
    sb_store(&w->posted_ns, (uint64_t)sb_now_ns());
    return atomic_compare_exchange_strong(&w->state, &state, with_wait(state, SB_WAIT_POSTED));
}

/* Where the slot's thread sleeps. A slot that changes hands meanwhile makes this another thread's, which looks in vain. */
static sem_t *semaphore_of(sb_region *r, sb_waiter *w)
{
    uint32_t hub = atomic_load_explicit(&w->hub, memory_order_relaxed);
    return hub && hub <= r->limits.waiters ? &sb_waiter_at(r, hub - 1)->wake : &w->wake;
}

static uint32_t post(sb_region *r, sb_waiter *w)
{
    if (!claim_post(w)) {
        return 0;
    }
    SB_FAILPOINT(wake_claimed);
    (void)sem_post(semaphore_of(r, w));
    return 1;
}

uint32_t sb_waiter_wake(sb_region *r, uint32_t slot) { return slot < r->limits.waiters ? post(r, sb_waiter_at(r, slot)) : 0; }

/* -- positions ---------------------------------------------------------------------------------------------------- */

static sb_word *word_of(sb_region *r, uint32_t kind)
{
    switch (kind) {
    case SB_WAIT_FLUSH:
    case SB_WAIT_SPACE:
        return &sb_marks(r)->flushed;
    case SB_WAIT_REPLICATE:
        return &sb_marks(r)->replicated;
    case SB_WAIT_DISPATCH:
        return &sb_marks(r)->dispatched;
    default:
        return NULL;
    }
}

static int position_state(sb_region *r, const sb_word *word, uint64_t target)
{
    sb_watermarks *m = sb_marks(r);
    if (sb_load(word) >= target) {
        return sb_load(&m->fenced) ? SB_FENCED : SB_OK;
    }
    if (sb_load(&m->store_state) == SB_STORE_READ_ONLY) {
        return SB_READ_ONLY;
    }
    return sb_load(&m->state) == SB_STATE_STOPPED ? SB_NOT_RUNNING : SB_AGAIN;
}

static uint32_t helper_of(uint32_t kind)
{
    return kind == SB_WAIT_DISPATCH ? SB_ROLE_DISPATCHER : kind == SB_WAIT_REPLICATE ? SB_ROLE_REPLICATOR : SB_ROLE_FLUSHER;
}

int sb_poll_position(sb_region *r, uint32_t kind, uint64_t target, int64_t deadline_ns, int64_t pause_ns)
{
    sb_word *word = word_of(r, kind);
    int64_t slice = sb_now_ns() + SLICE_NS;
    if (!word) {
        return SB_INVALID;
    }
    for (;;) {
        int code = position_state(r, word, target);
        int64_t now = sb_now_ns();
        if (code != SB_AGAIN || now >= deadline_ns || now >= slice) {
            return code != SB_AGAIN ? code : now >= deadline_ns ? SB_TIMEOUT : SB_INTERRUPTED;
        }
        sb_fence();
        (void)sb_worker_post(r, helper_of(kind), 1);
        struct timespec pause = {.tv_sec = 0, .tv_nsec = pause_ns};
        (void)clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
    }
}

int sb_wait_position(sb_region *r, uint32_t slot, uint32_t kind, uint64_t target, int64_t deadline_ns)
{
    sb_word *word = word_of(r, kind);
    if (!word || slot >= r->limits.waiters) {
        return SB_INVALID;
    }
    sb_waiter *w = sb_waiter_at(r, slot);
    int code = position_state(r, word, target);
    while (code == SB_AGAIN) {
        begin_wait(w, kind, target);
        code = position_state(r, word, target);
        if (code == SB_AGAIN) {
            (void)sb_worker_post(r, helper_of(kind), 1);
            int64_t now = sb_now_ns();
            int64_t until = now + SLICE_NS < deadline_ns ? now + SLICE_NS : deadline_ns;
            int slept = sb_semaphore_wait(&w->wake, until);
            code = position_state(r, word, target);
            if (code == SB_AGAIN && slept == SB_INTERRUPTED) {
                code = SB_INTERRUPTED;
            } else if (code == SB_AGAIN && slept == SB_TIMEOUT && until >= deadline_ns) {
                code = SB_TIMEOUT;
            }
        }
        end_wait(w);
    }
    return code;
}

int sb_position_look(sb_region *r, uint32_t kind, uint64_t target)
{
    const sb_word *word = word_of(r, kind);
    return word ? position_state(r, word, target) : SB_INVALID;
}

int sb_wait_position_begin(sb_region *r, uint32_t slot, uint32_t kind, uint64_t target)
{
    sb_waiter *w = sb_waiter_at(r, slot);
    begin_wait(w, kind, target);
    int code = sb_position_look(r, kind, target);
    if (code == SB_AGAIN) {
        (void)sb_worker_post(r, helper_of(kind), 1);
    } else {
        end_wait(w);
    }
    return code;
}

void sb_wait_position_end(sb_region *r, uint32_t slot) { end_wait(sb_waiter_at(r, slot)); }

static uint32_t waiters_in_use(const sb_region *r)
{
    uint64_t high = sb_load(&sb_marks(r)->waiters_high);
    return high < r->limits.waiters ? (uint32_t)high : r->limits.waiters;
}

uint32_t sb_wake_position(sb_region *r, uint32_t kind, uint64_t reached)
{
    uint32_t posts = 0, used = waiters_in_use(r);
    sb_fence();
    for (uint32_t i = 0; i < used; i++) {
        sb_waiter *w = sb_waiter_at(r, i);
        if (wait_of(atomic_load_explicit(&w->state, memory_order_acquire)) == SB_WAIT_WAITING &&
            word_of(r, w->kind) == word_of(r, kind) && sb_load(&w->target) <= reached) {
            posts += post(r, w);
        }
    }
    return posts;
}

/* A flusher killed behind the store has published and posted nobody: the backstop and its successor do. */
uint32_t sb_publish_flushed(sb_region *r, uint64_t position)
{
    uint64_t before = sb_load(&sb_marks(r)->flushed);
    sb_raise(&sb_marks(r)->flushed, position); /* SYNC: flushed */
    SB_FAILPOINT(flushed_stored);
    uint32_t posts = sb_wake_position(r, SB_WAIT_FLUSH, position);
    if (sb_load(&sb_marks(r)->visible_after) == SB_VISIBLE_FLUSH) {
        posts += sb_wake_topics_since(r, before, position);
    }
    return posts;
}

uint32_t sb_publish_replicated(sb_region *r, uint64_t position)
{
    uint64_t before = sb_load(&sb_marks(r)->replicated);
    sb_raise(&sb_marks(r)->replicated, position);
    uint32_t posts = sb_wake_position(r, SB_WAIT_REPLICATE, position);
    if (sb_load(&sb_marks(r)->visible_after) == SB_VISIBLE_REPLICATE) {
        posts += sb_wake_topics_since(r, before, position);
    }
    return posts;
}

uint32_t sb_wake_everybody(sb_region *r)
{
    uint32_t posts = 0, used = waiters_in_use(r);
    sb_fence();
    for (uint32_t i = 0; i < used; i++) {
        posts += post(r, sb_waiter_at(r, i));
    }
    return posts;
}

/* -- messages ----------------------------------------------------------------------------------------------------- */

void sb_wait_message_begin(sb_region *r, uint32_t slot, uint32_t group, const uint32_t *topics, uint32_t count)
{
    sb_waiter *w = sb_waiter_at(r, slot);
    atomic_store_explicit(&w->group, group, memory_order_relaxed);
    begin_wait(w, SB_WAIT_MESSAGE, 0);
    for (uint32_t i = 0; i < count; i++) {
        if (topics[i] < r->limits.topics) {
            atomic_fetch_or(&sb_topic_at(r, topics[i])->sleepers[slot / 64], 1ull << (slot % 64)); /* SYNC: sleepers */
        }
    }
    sb_fence();
}

int sb_wait_message_sleep(sb_region *r, uint32_t slot, int64_t deadline_ns)
{
    int64_t slice = sb_now_ns() + MESSAGE_SLICE_NS;
    int code = sb_semaphore_wait(&sb_waiter_at(r, slot)->wake, slice < deadline_ns ? slice : deadline_ns);
    if (code == SB_OK) {
        SB_FAILPOINT(wait_woken); /* the one wake-up of the group is taken: the janitor wakes another member */
    }
    return code;
}

static void clear_sleeper(sb_region *r, uint32_t topic, uint32_t slot)
{
    atomic_fetch_and(&sb_topic_at(r, topic)->sleepers[slot / 64], ~(1ull << (slot % 64)));
}

void sb_wait_message_end(sb_region *r, uint32_t slot, const uint32_t *topics, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        if (topics[i] < r->limits.topics) {
            clear_sleeper(r, topics[i], slot);
        }
    }
    end_wait(sb_waiter_at(r, slot));
}

/* Post sleepers of a topic: of group `only`, or (SB_NIL) one of every group. The bit goes before the post is made: a
 * sleeper that meanwhile set it anew is woken by that post and looks again; after the post the bit would be lost. */
static uint32_t wake_sleepers(sb_region *r, uint32_t topic, uint32_t only)
{
    sb_topic *t = sb_topic_at(r, topic);
    uint32_t groups[GROUPS_PER_WAKE], posts = 0;
    for (uint32_t word = 0; word < SB_WAITER_WORDS; word++) {
        uint64_t bits = sb_load(&t->sleepers[word]); /* SYNC: sleepers */
        while (bits) {
            uint32_t slot = word * 64 + (uint32_t)__builtin_ctzll(bits);
            bits &= bits - 1;
            if (slot >= r->limits.waiters) {
                break;
            }
            sb_waiter *w = sb_waiter_at(r, slot);
            uint32_t group = w->group, known = 0; /* a slot that changes hands here is missed: the janitor's 20 ms */
            while (known < posts && known < GROUPS_PER_WAKE && groups[known] != group) {
                known++;
            }
            int served = known < posts && known < GROUPS_PER_WAKE;
            if (served || (only != SB_NIL && group != only) || !claim_post(w)) {
                continue;
            }
            SB_FAILPOINT(wake_claimed);
            clear_sleeper(r, topic, slot);
            (void)sem_post(semaphore_of(r, w));
            if (posts < GROUPS_PER_WAKE) {
                groups[posts] = group;
            }
            posts++;
        }
    }
    return posts;
}

uint32_t sb_wake_topic(sb_region *r, uint32_t topic) { return topic < r->limits.topics ? wake_sleepers(r, topic, SB_NIL) : 0; }

uint32_t sb_wake_group(sb_region *r, uint32_t topic, uint32_t group)
{
    return topic < r->limits.topics ? wake_sleepers(r, topic, group) : 0;
}

uint32_t sb_wake_member(sb_region *r, uint32_t group, uint32_t client)
{
    uint32_t used = waiters_in_use(r);
    sb_fence();
    for (uint32_t i = 0; i < used; i++) {
        sb_waiter *w = sb_waiter_at(r, i);
        if (atomic_load(&w->state) >> 8 == client + 1 && w->kind == SB_WAIT_MESSAGE && w->group == group && post(r, w)) {
            return 1;
        }
    }
    return 0;
}

uint32_t sb_wake_topics_since(sb_region *r, uint64_t from, uint64_t to)
{
    uint32_t posts = 0;
    uint64_t ever = sb_load(&sb_marks(r)->next_topic_id); /* slots are taken from the lowest: no more than these were used */
    sb_fence();
    for (uint32_t i = 0; i < r->limits.topics && i < ever && from < to; i++) {
        sb_topic *t = sb_topic_at(r, i);
        if (sb_load(&t->state) == SB_SLOT_LIVE && sb_load(&t->last_position) >= from) {
            posts += wake_sleepers(r, i, SB_NIL);
        }
    }
    return posts;
}

/* -- hubs --------------------------------------------------------------------------------------------------------- */

void sb_hub_join(sb_region *r, uint32_t hub, uint32_t slot) { atomic_store(&sb_waiter_at(r, slot)->hub, hub + 1); }

int sb_hub_sleep(sb_region *r, uint32_t hub, int64_t deadline_ns)
{
    return sb_semaphore_wait(&sb_waiter_at(r, hub)->wake, deadline_ns);
}

void sb_hub_post(sb_region *r, uint32_t hub) { (void)sem_post(&sb_waiter_at(r, hub)->wake); }

int sb_waiter_is_posted(const sb_region *r, uint32_t slot)
{
    return wait_of(atomic_load(&sb_waiter_at(r, slot)->state)) == SB_WAIT_POSTED; /* SYNC: waiter */
}

/* -- workers ------------------------------------------------------------------------------------------------------ */

/* Does anybody wait for the flusher or the dispatcher right now? Ends a tick before it begins. */
static int urgent_work(sb_region *r, uint32_t role)
{
    uint32_t used = waiters_in_use(r);
    for (uint32_t i = 0; i < used; i++) {
        const sb_waiter *w = sb_waiter_at(r, i);
        if (wait_of(atomic_load(&w->state)) != SB_WAIT_WAITING) {
            continue;
        }
        if (word_of(r, w->kind) && helper_of(w->kind) == role) {
            return 1;
        }
    }
    return 0;
}

int sb_worker_sleep(sb_region *r, uint32_t role, uint32_t mode, uint64_t seen, int64_t deadline_ns)
{
    if (role >= SB_ROLES_MAX) {
        return SB_INVALID;
    }
    sb_worker *w = sb_worker_at(r, role);
    while (sb_semaphore_wait(&w->wake, 0) == SB_OK) {
    }
    atomic_store(&w->waiting, 1);
    atomic_store(&w->sleep, mode); /* SYNC: worker-sleep */
    sb_fence();
    int code = SB_OK;
    int work = mode == SB_SLEEP_IDLE    ? sb_load(&sb_marks(r)->tail) > seen
               : mode == SB_SLEEP_TIMER ? sb_load(&sb_marks(r)->timed) > seen /* SYNC: timed */
                                        : urgent_work(r, role);
    if (!work) {
        code = sb_semaphore_wait(&w->wake, deadline_ns);
    }
    atomic_store(&w->sleep, SB_AWAKE);
    atomic_store(&w->waiting, 0);
    return code;
}

uint32_t sb_worker_post(sb_region *r, uint32_t role, int urgent)
{
    sb_worker *w = sb_worker_at(r, role);
    uint32_t mode = atomic_load_explicit(&w->sleep, memory_order_relaxed); /* SYNC: worker-sleep; the caller fenced */
    if (mode == SB_AWAKE || (mode == SB_SLEEP_TICK && !urgent) || !atomic_compare_exchange_strong(&w->sleep, &mode, SB_AWAKE)) {
        return 0;
    }
    (void)sem_post(&w->wake);
    return 1;
}

/* -- janitor ------------------------------------------------------------------------------------------------------ */

uint32_t sb_wait_backstop(sb_region *r, int64_t now_ns)
{
    uint32_t posts = 0, used = waiters_in_use(r);
    for (uint32_t i = 0; i < used; i++) {
        sb_waiter *w = sb_waiter_at(r, i);
        uint32_t state = wait_of(atomic_load(&w->state));
        if (state == SB_WAIT_POSTED && now_ns - (int64_t)sb_load(&w->posted_ns) > UNTAKEN_NS) {
            sb_store(&w->posted_ns, (uint64_t)now_ns); /* its poster died between CAS and post, or its owner is stopped */
            (void)sem_post(semaphore_of(r, w));
            posts++;
        } else if (state == SB_WAIT_WAITING) {
            const sb_word *word = word_of(r, w->kind);
            if (word && sb_load(word) >= sb_load(&w->target)) {
                posts += post(r, w); /* the flusher died between publishing and posting */
            }
        }
    }
    const uint64_t tail = sb_load(&sb_marks(r)->tail);
    const struct {
        uint32_t role;
        const sb_word *done;
    } workers[] = {{SB_ROLE_FLUSHER, &sb_marks(r)->flushed},
                   {SB_ROLE_DISPATCHER, &sb_marks(r)->dispatched},
                   {SB_ROLE_REPLICATOR, &sb_marks(r)->replicated}};
    for (uint32_t i = 0; i < sizeof workers / sizeof workers[0]; i++) { /* a producer died between publishing and posting */
        sb_worker *w = sb_worker_at(r, workers[i].role);
        if (atomic_load(&w->waiting) && atomic_load(&w->sleep) != SB_SLEEP_TICK && sb_load(workers[i].done) < tail) {
            (void)sem_post(&w->wake);
            posts++;
        }
    }
    return posts;
}

uint32_t sb_waiter_reap(sb_region *r, uint32_t client)
{
    uint32_t freed = 0;
    for (uint32_t i = 0; i < r->limits.waiters; i++) {
        sb_waiter *w = sb_waiter_at(r, i);
        if (atomic_load(&w->state) >> 8 != client + 1) {
            continue;
        }
        for (uint32_t t = 0; t < r->limits.topics; t++) {
            clear_sleeper(r, t, i);
        }
        while (sb_semaphore_wait(&w->wake, 0) == SB_OK) {
        }
        atomic_store(&w->state, SB_WAIT_FREE);
        freed++;
    }
    return freed;
}
