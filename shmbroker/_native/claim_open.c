/* claim_open.c: finding and making claim tables, under the definition lock. Everything else about a table: claim_table.c. */
#include "claim.h"

#include "change.h"
#include "failpoint.h"
#include "overflow.h"

static void drop_overflow(sb_region *r, uint32_t table)
{
    uint64_t offset;
    sb_place place;
    for (uint32_t i = 0; i < r->limits.overflow_claims; i++) {
        if (sb_overflow_live(r, table, i, &offset, &place)) {
            sb_overflow_free(r, table, &place);
        }
    }
}

void sb_claims_format(sb_region *r, uint32_t table, uint64_t base)
{
    sb_claims *c = sb_claims_at(r, table);
    const uint64_t life = sb_load(&c->state);
    drop_overflow(r, table);
    for (uint64_t o = base; o < base + r->limits.claim_window; o++) {
        sb_word *word = sb_claim_place(r, c, o);
        sb_store(word, sb_claim_word(SB_CLAIM_FREE, 0, 0, sb_claim_generation(sb_load(word)), sb_claim_lap(r, life, o)));
    }
    sb_store(&c->base, base);
    sb_store(&c->pending_base, base);
    sb_store(&c->next, sb_claims_next_word(life, base));
}

int sb_claims_find(const sb_region *r, uint32_t group, uint32_t queue, uint32_t *table)
{
    if (group >= r->limits.groups || queue >= r->limits.queues) {
        return SB_NOT_FOUND;
    }
    const sb_group *g = sb_group_at(r, group);
    const sb_queue *q = sb_queue_at(r, queue);
    for (uint32_t i = 0; i < r->limits.claim_tables; i++) {
        const sb_claims *c = sb_claims_at(r, i);
        if (sb_claims_is_live(sb_load(&c->state)) && c->group_id == g->group_id && c->topic_id == q->topic_id && c->queue_id == q->queue_id) {
            *table = i;
            return SB_OK;
        }
    }
    return SB_NOT_FOUND;
}

void sb_claims_give_up(sb_claims *c, uint64_t life)
{
    if (sb_claims_is_live(life)) {
        (void)sb_cas(&c->state, &life, sb_claims_life(SB_SLOT_FREE, sb_claims_incarnation(life)));
    }
}

/* Under the definition lock. The claim lock keeps those out who are moving a base of the last life: where one of them was
 * stopped, another table is taken. The new life, *life, begins before the first word changes; the caller makes it LIVE and
 * gives the lock back. A kill in between leaves a free table, formatted anew by the next.
 *
 * A table whose last life still has an owner, whose listener runs, is taken only if there is no other: who consumes the new
 * life in order gets nothing until that one gives up the semaphore, which goes with the table. */
static int prepare(sb_region *r, uint32_t group, uint32_t queue, uint64_t base, uint32_t *table, uint64_t *life)
{
    const uint32_t tables = r->limits.claim_tables;
    for (uint32_t n = 0; n < 2 * tables; n++) {
        const uint32_t i = n % tables;
        sb_claims *c = sb_claims_at(r, i);
        const int passed_over = n < tables && sb_load(&c->owner);
        if (passed_over || sb_claims_is_live(sb_load(&c->state)) || sb_claims_try_lock(r, i) != SB_OK) {
            continue;
        }
        const uint64_t incarnation = sb_claims_incarnation(sb_load(&c->state)) + 1;
        sb_store(&c->state, sb_claims_life(SB_SLOT_FREE, incarnation));
        sb_fence(); /* SYNC: queue-owner */
        c->group_slot = group;
        c->queue_slot = queue;
        c->group_id = sb_group_at(r, group)->group_id;
        c->topic_id = sb_queue_at(r, queue)->topic_id;
        c->queue_id = sb_queue_at(r, queue)->queue_id;
        sb_word *zero[] = {&c->released,    &c->deadline_ms, &c->prefetched,  &c->reset_generation,
                           &c->moving_slot, &c->delivered,   &c->acked,       &c->redelivered, &c->refused,
                           &c->owner,       &c->wanted};
        for (size_t z = 0; z < sizeof zero / sizeof zero[0]; z++) {
            sb_store(zero[z], 0);
        }
        sb_store(&c->recorded, ~0ull); /* never written to the log */
        sb_claims_format(r, i, base);
        *table = i;
        *life = sb_claims_life(SB_SLOT_LIVE, incarnation);
        return SB_OK;
    }
    return SB_TABLE_FULL;
}

static int create(sb_region *r, uint32_t group, uint32_t queue, uint64_t base, uint32_t *table)
{
    uint64_t life;
    int code = prepare(r, group, queue, base, table, &life);
    if (code == SB_OK) {
        sb_store(&sb_claims_at(r, *table)->state, life);
        sb_mutex_unlock(&sb_claims_at(r, *table)->lock);
    }
    return code;
}

static int find_or_create(sb_region *r, uint32_t group, uint32_t queue, uint64_t base, uint32_t *table, int *created)
{
    int code = sb_claims_find(r, group, queue, table);
    if (code == SB_NOT_FOUND) {
        code = create(r, group, queue, base, table);
        *created = code == SB_OK;
    }
    return code;
}

int sb_claims_open(sb_region *r, uint32_t group, uint32_t queue, uint64_t base, int64_t deadline_ns, uint32_t *table, int *created)
{
    *created = 0;
    if (group >= r->limits.groups || queue >= r->limits.queues) {
        return SB_INVALID;
    }
    if (sb_claims_find(r, group, queue, table) == SB_OK) {
        return SB_OK;
    }
    int code = sb_definition_lock(r, deadline_ns);
    if (code != SB_OK) {
        return code;
    }
    code = find_or_create(r, group, queue, base, table, created);
    sb_definition_unlock(r);
    return code;
}

static int knows_topic(const sb_region *r, uint32_t group_id, uint32_t topic_id)
{
    for (uint32_t i = 0; i < r->limits.claim_tables; i++) {
        const sb_claims *c = sb_claims_at(r, i);
        if (sb_claims_is_live(sb_load(&c->state)) && c->group_id == group_id && c->topic_id == topic_id) {
            return 1;
        }
    }
    return 0;
}

static uint32_t free_tables(const sb_region *r)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < r->limits.claim_tables; i++) {
        count += !sb_claims_is_live(sb_load(&sb_claims_at(r, i)->state));
    }
    return count;
}

int sb_claims_knows_topic(const sb_region *r, uint32_t group, uint32_t queue)
{
    return group < r->limits.groups && queue < r->limits.queues && knows_topic(r, sb_group_at(r, group)->group_id, sb_queue_at(r, queue)->topic_id);
}

/* One of the offsets that the queue has messages for, or the next one. */
static uint64_t clamp(uint64_t offset, uint64_t first, uint64_t next)
{
    offset = offset < next ? offset : next;
    return offset > first ? offset : first;
}

int sb_claims_open_topic(sb_region *r, uint32_t group, const uint32_t *queues, uint32_t count, const uint64_t *starts,
                         int64_t deadline_ns, uint32_t *tables, uint64_t *lives)
{
    if (group >= r->limits.groups || count == 0 || count > SB_QUEUES_PER_TOPIC_MAX) {
        return SB_INVALID;
    }
    int code = sb_definition_lock(r, deadline_ns);
    if (code != SB_OK) {
        return code;
    }
    uint64_t base[SB_QUEUES_PER_TOPIC_MAX];
    const int known = knows_topic(r, sb_group_at(r, group)->group_id, sb_queue_at(r, queues[0])->topic_id);
    if (!known && count > free_tables(r)) {
        code = SB_TABLE_FULL; /* all or none: a group that cannot begin keeps no table from others */
    } else if (starts && !known) {
        code = sb_append_read_offsets(r, queues, count, deadline_ns, base); /* definition lock, then append lock: as definers do */
    }
    for (uint32_t i = 0; i < count; i++) {
        const uint64_t first = sb_load(&sb_queue_at(r, queues[i])->first_offset);
        base[i] = starts && !known ? clamp(starts[i], first, base[i]) : first;
    }
    for (uint32_t i = 0; i < count && code == SB_OK; i++) {
        int created;
        code = find_or_create(r, group, queues[i], base[i], &tables[i], &created);
        lives[i] = code == SB_OK ? sb_load(&sb_claims_at(r, tables[i])->state) : 0;
        code = code == SB_TABLE_FULL ? SB_OK : code; /* the topic has got more queues: the group goes on with those it has */
    }
    sb_definition_unlock(r);
    return code;
}

/* The order, and what a kill at each edge leaves:
 *
 *     a table is made, FREE         a free table: the next who makes one takes it
 *     PROGRESS, new LIVE, old FREE  one append: nothing, or all of it (append.c)
 *     overflow entries given up     those of a table that is free, until it is made anew
 *     (the caller wakes sleepers)   the janitor does, where there is something for them
 *
 * Its effects are stored one by one. A moment with both tables LIVE does no harm; one with neither would make retention
 * think that nobody needs the queue. The definitions' generation moves in between: whoever misses the old one, having
 * looked for the new one too early, finds that it has moved, and looks again (progress.pxi).
 *
 * Claims of the old life are void from the append on: who holds one names a life that is over. */
static int reset_locked(sb_region *r, uint32_t group, uint32_t queue, uint64_t base, int64_t deadline_ns, sb_reset *done, uint64_t *needed)
{
    uint32_t old = SB_NIL, table;
    uint64_t next, life;
    sb_change c = {.count = 0};
    int code = sb_append_read_offsets(r, &queue, 1, deadline_ns, &next);
    if (code != SB_OK) {
        return code;
    }
    *done = (sb_reset){.before = SB_NO_OFFSET, .after = clamp(base, sb_load(&sb_queue_at(r, queue)->first_offset), next)};
    code = prepare(r, group, queue, done->after, &table, &life);
    if (code != SB_OK) {
        return code;
    }
    sb_claims *made = sb_claims_at(r, table);
    sb_change_word(&c, &made->state, life);
    sb_change_move(r, &c);
    if (sb_claims_find(r, group, queue, &old) == SB_OK) {
        sb_claims *was = sb_claims_at(r, old);
        done->before = sb_load(&was->base);
        sb_store(&made->reset_generation, sb_load(&was->reset_generation) + 1);
        sb_word *const from[] = {&was->delivered, &was->acked, &was->redelivered, &was->refused};
        sb_word *const to[] = {&made->delivered, &made->acked, &made->redelivered, &made->refused};
        for (size_t i = 0; i < sizeof to / sizeof to[0]; i++) {
            sb_store(to[i], sb_load(from[i]));
        }
        sb_change_word(&c, &was->state, sb_claims_life(SB_SLOT_FREE, sb_claims_incarnation(sb_load(&was->state))));
    }
    SB_FAILPOINT(claim_remade);
    const sb_progress body = {.group_id = made->group_id, .topic_id = made->topic_id, .queue_id = (uint16_t)made->queue_id,
                              .version = SB_PROGRESS_VERSION, .base = done->after,
                              .reset_generation = (uint32_t)sb_load(&made->reset_generation)};
    sb_item item = sb_change_record(SB_KIND_PROGRESS, &body, sizeof body);
    code = sb_change_append(r, &c, &item, 1, deadline_ns, needed);
    sb_mutex_unlock(&made->lock);
    if (code == SB_OK && old != SB_NIL) {
        SB_FAILPOINT(claim_begun_anew);
        drop_overflow(r, old);
    }
    return code;
}

int sb_claims_reset(sb_region *r, uint32_t group_id, uint32_t topic_id, uint32_t queue_id, uint64_t base, int64_t deadline_ns,
                    sb_reset *done, uint64_t *needed)
{
    uint32_t group, topic, slots[SB_QUEUES_PER_TOPIC_MAX];
    int code = sb_definition_lock(r, deadline_ns);
    if (code != SB_OK) {
        return code;
    }
    if (sb_group_by_id(r, group_id, &group) != SB_OK) {
        code = SB_NOT_FOUND;
    } else if (sb_topic_by_id(r, topic_id, &topic) != SB_OK || sb_topic_queues(r, topic, slots, SB_QUEUES_PER_TOPIC_MAX) <= queue_id) {
        code = SB_GONE;
    } else {
        code = reset_locked(r, group, slots[queue_id], base, deadline_ns, done, needed);
    }
    sb_definition_unlock(r);
    return code;
}
