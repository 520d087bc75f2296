/* membership.c: see membership.h. Under the definition lock; a member that is killed is taken out by its reaping. */
#include "membership.h"

#include <string.h>

#include "definition.h"
#include "janitor.h"
#include "racy.h"

/* The janitor needs a moment to see a death; a subscription must not be refused for the sake of a dead member. */
static int is_live(const sb_client *c)
{
    return sb_client_state_of(sb_load(&c->state)) == SB_CLIENT_LIVE && sb_start_ticks((uint32_t)sb_load(&c->pid)) == sb_load(&c->start_ticks);
}

static int has_live_member(const sb_region *r, const sb_group *g, uint32_t slot, int self_counts)
{
    for (uint32_t i = 0; i < r->limits.clients && i / 64 < SB_CLIENT_WORDS; i++) {
        if ((sb_load(&g->members[i / 64]) >> (i % 64) & 1) == 0) {
            continue;
        }
        if (i == slot ? self_counts : is_live(sb_client_at(r, i))) {
            return 1;
        }
    }
    return 0;
}

int sb_group_in_use(const sb_region *r, uint32_t group)
{
    return group < r->limits.groups && has_live_member(r, sb_group_at(r, group), SB_NIL, 0);
}

static uint64_t read_text(const sb_word *generation_word, const char texts[2][SB_SUBSCRIPTION_BYTES], char *text)
{
    for (;;) {
        uint64_t generation = sb_load(generation_word); /* SYNC: subscription */
        sb_racy_copy(text, texts[generation & 1], SB_SUBSCRIPTION_BYTES);
        text[SB_SUBSCRIPTION_BYTES - 1] = '\0';
        sb_fence();
        if (sb_load(generation_word) == generation) { /* else its place may be the next but one's by now */
            return generation;
        }
    }
}

uint64_t sb_group_subscription(const sb_region *r, uint32_t group, char *text)
{
    const sb_group *g = sb_group_at(r, group);
    return read_text(&g->subscription_generation, g->subscription, text);
}

uint64_t sb_group_retry(const sb_region *r, uint32_t group, char *text)
{
    const sb_group *g = sb_group_at(r, group);
    return read_text(&g->retry_generation, g->retry, text);
}

void sb_group_prepare_text(char *place, const char *text)
{
    char padded[SB_SUBSCRIPTION_BYTES] = {0};
    memcpy(padded, text, strlen(text));
    sb_fence();
    sb_racy_copy(place, padded, sizeof padded);
}

int sb_group_join(sb_region *r, uint32_t group, const char *name, uint32_t slot, const char *text, int in_order,
                  int self_counts, int64_t deadline_ns, uint64_t *generation)
{
    if (group >= r->limits.groups || slot >= r->limits.clients || strlen(text) >= SB_SUBSCRIPTION_BYTES) {
        return SB_INVALID;
    }
    int code = sb_definition_lock(r, deadline_ns);
    if (code != SB_OK) {
        return code;
    }
    sb_group *g = sb_group_at(r, group);
    char agreed[SB_SUBSCRIPTION_BYTES];
    *generation = sb_group_subscription(r, group, agreed);
    int differs = strcmp(agreed, text) != 0;
    if (sb_load(&g->state) != SB_SLOT_LIVE || strncmp(g->name, name, SB_NAME_BYTES) != 0) {
        code = SB_GONE; /* deleted since it was found, its slot perhaps another's; with a member it never is */
    } else if (differs && (sb_load(&g->subscription_set) || (agreed[0] && has_live_member(r, g, slot, self_counts)))) {
        code = SB_EXISTS;
    } else if (g->in_order != (uint32_t)in_order && has_live_member(r, g, slot, self_counts)) {
        code = SB_IN_USE;
    } else if (differs) {
        for (uint32_t i = 0; i < SB_CLIENT_WORDS; i++) {
            sb_store(&g->members[i], 0); /* the dead, and those of a deleted group in this slot */
        }
        ++*generation;
        sb_group_prepare_text(g->subscription[*generation & 1], text); /* a kill behind it leaves the old one in force */
        sb_store(&g->subscription_generation, *generation); /* SYNC: subscription */
    }
    if (code == SB_OK) {
        g->in_order = (uint32_t)in_order;
        (void)atomic_fetch_or(&g->members[slot / 64], 1ull << (slot % 64));
    }
    sb_definition_unlock(r);
    return code;
}

void sb_group_leave(sb_region *r, uint32_t group, uint32_t slot)
{
    if (group < r->limits.groups && slot / 64 < SB_CLIENT_WORDS) {
        (void)atomic_fetch_and(&sb_group_at(r, group)->members[slot / 64], ~(1ull << (slot % 64)));
    }
}
