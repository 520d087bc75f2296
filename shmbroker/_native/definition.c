/* definition.c: see definition.h; what is about groups alone: group.c. Fields of a FREE slot are written first; the append's
 * effects make it LIVE together with its record. A definer killed before that leaves a FREE slot with old letters in it, which
 * nobody looks at. */
#include "definition.h"

#include <stdio.h>
#include <string.h>

#include "change.h"
#include "claim.h"
#include "record.h"

void sb_change_word(sb_change *c, sb_word *word, uint64_t desired)
{
    if (c->count < SB_CHANGE_EFFECTS_MAX) {
        c->effect[c->count++] = (sb_effect){.word = word, .expected = sb_load(word), .desired = desired, .claim = 0};
    }
}

void sb_change_move(sb_region *r, sb_change *c)
{
    if (!c->moved) {
        c->moved = 1;
        sb_change_word(c, &sb_marks(r)->topic_generation, sb_load(&sb_marks(r)->topic_generation) + 1);
    }
}

sb_item sb_change_record(uint8_t kind, const void *body, size_t bytes)
{
    sb_item item = {.body = (const uint8_t *)body, .body_bytes = (uint32_t)bytes, .born_ns = sb_realtime_ns(),
                    .queue_slot = SB_NIL, .queue_id = SB_NO_QUEUE, .kind = kind};
    item.payload_crc = sb_crc32c(0, item.body, item.body_bytes);
    return item;
}

int sb_change_append(sb_region *r, sb_change *c, sb_item *records, uint32_t count, int64_t deadline_ns, uint64_t *needed)
{
    uint64_t end;
    sb_change_move(r, c);
    int code = sb_append(r, SB_NIL, records, count, c->effect, c->count, SB_APPEND_SYSTEM, deadline_ns, &end, needed);
    if (code == SB_OK) {
        sb_append_wake(r, records, count);
    }
    return code;
}

int sb_change_apply(sb_region *r, sb_change *c, uint8_t kind, const char *body, int record, int64_t deadline_ns, uint64_t *needed)
{
    if (!record) {
        sb_change_move(r, c);
        for (uint32_t i = 0; i < c->count; i++) {
            sb_store(c->effect[i].word, c->effect[i].desired);
        }
        return SB_OK;
    }
    sb_item item = sb_change_record(kind, body, strlen(body));
    return sb_change_append(r, c, &item, 1, deadline_ns, needed);
}

void sb_change_free_claims(sb_region *r, uint32_t topic_id, uint32_t group_id)
{
    for (uint32_t i = 0; i < r->limits.claim_tables; i++) {
        sb_claims *claims = sb_claims_at(r, i);
        if (claims->topic_id == topic_id || claims->group_id == group_id) {
            sb_claims_give_up(claims, sb_load(&claims->state));
        }
    }
}

int sb_definition_lock(sb_region *r, int64_t deadline_ns)
{
    int code = sb_mutex_lock(&r->control->locks.definition, deadline_ns);
    if (code != SB_OWNER_DEAD) {
        return code;
    }
    /* The dead definer may have died inside its append: that is brought to an end before anybody looks at the tables. */
    code = sb_append_settle(r, deadline_ns);
    if (code == SB_OK) {
        return sb_mutex_consistent(&r->control->locks.definition);
    }
    (void)sb_mutex_consistent(&r->control->locks.definition);
    sb_mutex_unlock(&r->control->locks.definition);
    return code;
}

void sb_definition_unlock(sb_region *r) { sb_mutex_unlock(&r->control->locks.definition); }

/* -- look-up ------------------------------------------------------------------------------------------------------ */

int sb_topic_find(const sb_region *r, const char *name, uint32_t *slot)
{
    for (uint32_t i = 0; i < r->limits.topics; i++) {
        const sb_topic *t = sb_topic_at(r, i);
        if (sb_load(&t->state) == SB_SLOT_LIVE && strncmp(t->name, name, SB_NAME_BYTES) == 0) {
            *slot = i;
            return SB_OK;
        }
    }
    return SB_NOT_FOUND;
}

int sb_topic_by_id(const sb_region *r, uint32_t topic_id, uint32_t *slot)
{
    for (uint32_t i = 0; i < r->limits.topics; i++) {
        const sb_topic *t = sb_topic_at(r, i);
        if (sb_load(&t->state) == SB_SLOT_LIVE && t->topic_id == topic_id) {
            *slot = i;
            return SB_OK;
        }
    }
    return SB_NOT_FOUND;
}

int sb_group_find(const sb_region *r, const char *name, uint32_t *slot)
{
    for (uint32_t i = 0; i < r->limits.groups; i++) {
        const sb_group *g = sb_group_at(r, i);
        if (sb_load(&g->state) == SB_SLOT_LIVE && strncmp(g->name, name, SB_NAME_BYTES) == 0) {
            *slot = i;
            return SB_OK;
        }
    }
    return SB_NOT_FOUND;
}

int sb_group_by_id(const sb_region *r, uint32_t group_id, uint32_t *slot)
{
    for (uint32_t i = 0; i < r->limits.groups; i++) {
        const sb_group *g = sb_group_at(r, i);
        if (sb_load(&g->state) == SB_SLOT_LIVE && g->group_id == group_id) {
            *slot = i;
            return SB_OK;
        }
    }
    return SB_NOT_FOUND;
}

uint32_t sb_topic_queues(const sb_region *r, uint32_t topic, uint32_t *slots, uint32_t room)
{
    const sb_topic *t = sb_topic_at(r, topic);
    uint64_t count = sb_load(&t->queue_count), at = sb_load(&t->first_queue);
    uint32_t n = 0;
    while (n < count && n < room && at < r->limits.queues) {
        slots[n++] = (uint32_t)at;
        at = sb_load(&sb_queue_at(r, (uint32_t)at)->next_in_topic);
    }
    return n;
}

/* -- topics ------------------------------------------------------------------------------------------------------- */

static int free_topic(const sb_region *r, uint32_t *slot)
{
    for (uint32_t i = 0; i < r->limits.topics; i++) {
        if (sb_load(&sb_topic_at(r, i)->state) == SB_SLOT_FREE) {
            *slot = i;
            return SB_OK;
        }
    }
    return SB_TABLE_FULL;
}

/* Prepare queue numbers [have, wanted) behind slot `last` (SB_NIL: none yet). The queue's index keeps the block of its
 * former user until the first append replaces it. */
static int add_queues(sb_region *r, uint32_t topic, uint32_t topic_id, uint32_t have, uint32_t wanted, sb_word *link, sb_change *c)
{
    uint32_t slot = 0;
    for (uint32_t queue_id = have; queue_id < wanted; queue_id++, slot++) {
        while (slot < r->limits.queues && sb_load(&sb_queue_at(r, slot)->state) != SB_SLOT_FREE) {
            slot++;
        }
        if (slot >= r->limits.queues) {
            return SB_TABLE_FULL;
        }
        sb_queue *q = sb_queue_at(r, slot);
        q->topic_slot = topic;
        q->topic_id = topic_id;
        q->queue_id = queue_id;
        sb_store(&q->next_offset, 0);
        sb_store(&q->index_first, 0);
        sb_store(&q->oldest_block, SB_NIL);
        sb_store(&q->first_offset, 0);
        sb_store(&q->bytes, 0);
        sb_store(&q->next_in_topic, SB_NIL);
        sb_change_word(c, link, slot);
        sb_change_word(c, &q->state, SB_SLOT_LIVE);
        link = &q->next_in_topic;
    }
    return SB_OK;
}

static int define_topic_locked(sb_region *r, const char *name, uint32_t queues, uint32_t permission, uint32_t topic_id,
                               int record, int64_t deadline_ns, uint32_t *slot, uint64_t *needed)
{
    static const uint32_t default_permission = 6;
    sb_change c = {.count = 0};
    char body[SB_CHANGE_BODY_BYTES];
    uint32_t have = 0;
    sb_word *link;
    int exists = sb_topic_find(r, name, slot) == SB_OK;
    if (!exists && free_topic(r, slot) != SB_OK) {
        return SB_TABLE_FULL;
    }
    sb_topic *t = sb_topic_at(r, *slot);
    if (exists) {
        uint32_t slots[SB_QUEUES_PER_TOPIC_MAX];
        have = sb_topic_queues(r, *slot, slots, SB_QUEUES_PER_TOPIC_MAX);
        link = have ? &sb_queue_at(r, slots[have - 1])->next_in_topic : &t->first_queue;
        if (topic_id && topic_id != t->topic_id) {
            return SB_EXISTS;
        }
        topic_id = t->topic_id;
        permission = permission ? permission : (uint32_t)sb_load(&t->permission);
        if (queues <= have && permission == sb_load(&t->permission)) {
            return SB_OK;
        }
        queues = queues < have ? have : queues;
    } else {
        link = &t->first_queue;
        uint64_t next = sb_load(&sb_marks(r)->next_topic_id);
        topic_id = topic_id ? topic_id : (uint32_t)next;
        permission = permission ? permission : default_permission;
        t->topic_id = topic_id;
        memset(t->name, 0, sizeof t->name);
        memcpy(t->name, name, strlen(name));
        sb_store(&t->first_queue, SB_NIL);
        sb_store(&t->queue_count, 0);
        sb_store(&t->permission, 0);
        sb_store(&t->last_position, 0);
        if (topic_id >= next) {
            sb_change_word(&c, &sb_marks(r)->next_topic_id, (uint64_t)topic_id + 1);
        }
    }
    int code = add_queues(r, *slot, topic_id, have, queues, link, &c);
    if (code != SB_OK) {
        return code;
    }
    sb_change_word(&c, &t->queue_count, queues);
    sb_change_word(&c, &t->permission, permission);
    sb_change_word(&c, &t->state, SB_SLOT_LIVE); /* behind all that a sender reads once it is LIVE */
    (void)snprintf(body, sizeof body, "{\"op\":\"define\",\"name\":\"%s\",\"topic_id\":%u,\"queues\":%u,\"permission\":%u}", name,
                   topic_id, queues, permission);
    return sb_change_apply(r, &c, SB_KIND_TOPIC, body, record, deadline_ns, needed);
}

int sb_topic_define(sb_region *r, const char *name, uint32_t queues, uint32_t permission, uint32_t topic_id, int record,
                    int64_t deadline_ns, uint32_t *slot, uint64_t *needed)
{
    if (strlen(name) >= SB_NAME_BYTES || queues == 0 || queues > SB_QUEUES_PER_TOPIC_MAX || permission > 7) {
        return SB_INVALID;
    }
    int code = sb_definition_lock(r, deadline_ns);
    if (code == SB_OK) {
        code = define_topic_locked(r, name, queues, permission, topic_id, record, deadline_ns, slot, needed);
        sb_definition_unlock(r);
    }
    return code;
}

void sb_change_delete_topic(sb_region *r, sb_change *c, uint32_t slot, char *body)
{
    uint32_t slots[SB_QUEUES_PER_TOPIC_MAX];
    sb_topic *t = sb_topic_at(r, slot);
    const uint32_t n = sb_topic_queues(r, slot, slots, SB_QUEUES_PER_TOPIC_MAX);
    for (uint32_t i = 0; i < n; i++) {
        sb_change_word(c, &sb_queue_at(r, slots[i])->state, SB_SLOT_FREE);
    }
    sb_change_word(c, &t->state, SB_SLOT_FREE);
    (void)snprintf(body, SB_CHANGE_BODY_BYTES, "{\"op\":\"delete\",\"name\":\"%s\",\"topic_id\":%u}", t->name, t->topic_id);
}

int sb_topic_delete(sb_region *r, const char *name, int64_t deadline_ns, uint64_t *needed)
{
    uint32_t slot;
    int code = sb_definition_lock(r, deadline_ns);
    if (code != SB_OK) {
        return code;
    }
    code = sb_topic_find(r, name, &slot);
    if (code == SB_OK) {
        sb_change c = {.count = 0};
        char body[SB_CHANGE_BODY_BYTES];
        uint32_t topic_id = sb_topic_at(r, slot)->topic_id;
        sb_change_delete_topic(r, &c, slot, body);
        code = sb_change_apply(r, &c, SB_KIND_TOPIC, body, 1, deadline_ns, needed);
        if (code == SB_OK) {
            sb_change_free_claims(r, topic_id, SB_NIL);
        }
    }
    sb_definition_unlock(r);
    return code;
}
