/* group.c: definitions of consumer groups, and the texts in them; see definition.h, and definition.c for the order. */
#include <stdio.h>
#include <string.h>

#include "change.h"
#include "membership.h"

static int define_group_locked(sb_region *r, const char *name, uint32_t group_id, int record, int64_t deadline_ns, uint32_t *slot,
                               uint64_t *needed)
{
    if (sb_group_find(r, name, slot) == SB_OK) {
        return group_id && group_id != sb_group_at(r, *slot)->group_id ? SB_EXISTS : SB_OK;
    }
    for (uint32_t i = 0; i < r->limits.groups; i++) {
        sb_group *g = sb_group_at(r, i);
        if (sb_load(&g->state) != SB_SLOT_FREE) {
            continue;
        }
        sb_change c = {.count = 0};
        char body[SB_CHANGE_BODY_BYTES];
        uint64_t next = sb_load(&sb_marks(r)->next_group_id);
        group_id = group_id ? group_id : (uint32_t)next;
        g->group_id = group_id;
        g->in_order = 0;
        memset(g->name, 0, sizeof g->name);
        memcpy(g->name, name, strlen(name));
        memset(g->subscription, 0, sizeof g->subscription);
        memset(g->retry, 0, sizeof g->retry);
        sb_store(&g->subscription_set, 0);
        sb_store(&g->pause_generation, 0);
        sb_change_word(&c, &g->state, SB_SLOT_LIVE);
        if (group_id >= next) {
            sb_change_word(&c, &sb_marks(r)->next_group_id, (uint64_t)group_id + 1);
        }
        *slot = i;
        (void)snprintf(body, sizeof body, "{\"op\":\"define\",\"name\":\"%s\",\"group_id\":%u}", name, group_id);
        return sb_change_apply(r, &c, SB_KIND_GROUP, body, record, deadline_ns, needed);
    }
    return SB_TABLE_FULL;
}

int sb_group_define(sb_region *r, const char *name, uint32_t group_id, int record, int64_t deadline_ns, uint32_t *slot, uint64_t *needed)
{
    if (strlen(name) >= SB_NAME_BYTES) {
        return SB_INVALID;
    }
    int code = sb_definition_lock(r, deadline_ns);
    if (code == SB_OK) {
        code = define_group_locked(r, name, group_id, record, deadline_ns, slot, needed);
        sb_definition_unlock(r);
    }
    return code;
}

/* One of the texts that a group's definition holds: which, and what its generation is called in the record. */
typedef struct {
    sb_word *generation, *set; /* set: 1 from now on, or NULL */
    char (*text)[SB_SUBSCRIPTION_BYTES];
    const char *name, *number;
} group_text;

/* `of` says which text of a group it is. */
static int set_text(sb_region *r, const char *name, group_text (*of)(sb_group *), const char *text, uint64_t generation, int record,
                    int64_t deadline_ns, uint64_t *needed)
{
    uint32_t slot;
    if (strlen(text) >= SB_SUBSCRIPTION_BYTES) {
        return SB_INVALID;
    }
    int code = sb_definition_lock(r, deadline_ns);
    if (code != SB_OK) {
        return code;
    }
    code = sb_group_find(r, name, &slot);
    if (code == SB_OK) {
        sb_change c = {.count = 0};
        char body[SB_CHANGE_BODY_BYTES];
        sb_group *g = sb_group_at(r, slot);
        const group_text t = of(g);
        generation = record ? sb_load(t.generation) + 1 : generation;
        sb_group_prepare_text(t.text[generation & 1], text); /* nobody looks at it before the record is there */
        sb_change_word(&c, t.generation, generation); /* SYNC: subscription */
        if (t.set) {
            sb_change_word(&c, t.set, 1);
        }
        (void)snprintf(body, sizeof body, "{\"op\":\"define\",\"name\":\"%s\",\"group_id\":%u,\"%s\":%llu,\"%s\":%s}", name, g->group_id,
                       t.number, (unsigned long long)generation, t.name, text);
        code = sb_change_apply(r, &c, SB_KIND_GROUP, body, record, deadline_ns, needed);
    }
    sb_definition_unlock(r);
    return code;
}

static group_text subscription_of(sb_group *g)
{
    return (group_text){&g->subscription_generation, &g->subscription_set, g->subscription, "subscription", "generation"};
}

static group_text retry_of(sb_group *g) { return (group_text){&g->retry_generation, NULL, g->retry, "retry", "retry_generation"}; }

int sb_group_set_subscription(sb_region *r, const char *name, const char *text, uint64_t generation, int record, int64_t deadline_ns,
                              uint64_t *needed)
{
    return set_text(r, name, subscription_of, text, generation, record, deadline_ns, needed);
}

int sb_group_set_retry(sb_region *r, const char *name, const char *text, uint64_t generation, int record, int64_t deadline_ns,
                       uint64_t *needed)
{
    return set_text(r, name, retry_of, text, generation, record, deadline_ns, needed);
}

int sb_group_set_paused(sb_region *r, const char *name, int paused, uint64_t generation, int record, int64_t deadline_ns, uint64_t *needed)
{
    uint32_t slot;
    int code = sb_definition_lock(r, deadline_ns);
    if (code != SB_OK) {
        return code;
    }
    code = sb_group_find(r, name, &slot);
    if (code == SB_OK && (!record || sb_group_is_paused(r, slot) != paused)) {
        sb_change c = {.count = 0};
        char body[SB_CHANGE_BODY_BYTES];
        sb_group *g = sb_group_at(r, slot);
        generation = record ? sb_load(&g->pause_generation) + 1 : generation;
        sb_change_word(&c, &g->pause_generation, generation); /* SYNC: pause */
        (void)snprintf(body, sizeof body, "{\"op\":\"define\",\"name\":\"%s\",\"group_id\":%u,\"pause_generation\":%llu}", name,
                       g->group_id, (unsigned long long)generation);
        code = sb_change_apply(r, &c, SB_KIND_GROUP, body, record, deadline_ns, needed);
    }
    sb_definition_unlock(r);
    return code;
}

int sb_group_delete(sb_region *r, const char *name, const char *retry_topic, int64_t deadline_ns, uint64_t *needed)
{
    uint32_t slot, topic;
    int code = sb_definition_lock(r, deadline_ns);
    if (code != SB_OK) {
        return code;
    }
    code = sb_group_find(r, name, &slot);
    if (code == SB_OK && sb_group_in_use(r, slot)) { /* its claims would be freed under their holders */
        code = SB_IN_USE;
    }
    if (code == SB_OK) {
        sb_change c = {.count = 0};
        char body[2][SB_CHANGE_BODY_BYTES];
        sb_item records[2];
        sb_group *g = sb_group_at(r, slot);
        uint32_t group_id = g->group_id, topic_id = SB_NIL, count = 0;
        sb_change_word(&c, &g->state, SB_SLOT_FREE);
        (void)snprintf(body[0], sizeof body[0], "{\"op\":\"delete\",\"name\":\"%s\",\"group_id\":%u}", name, group_id);
        records[count++] = sb_change_record(SB_KIND_GROUP, body[0], strlen(body[0]));
        if (sb_topic_find(r, retry_topic, &topic) == SB_OK) { /* a group of this name that is made later has not failed yet */
            topic_id = sb_topic_at(r, topic)->topic_id;
            sb_change_delete_topic(r, &c, topic, body[1]);
            records[count++] = sb_change_record(SB_KIND_TOPIC, body[1], strlen(body[1]));
        }
        code = sb_change_append(r, &c, records, count, deadline_ns, needed);
        if (code == SB_OK) {
            sb_change_free_claims(r, topic_id, group_id);
        }
    }
    sb_definition_unlock(r);
    return code;
}
