/* membership.h: who consumes in a group, and what all of them have subscribed to (R25). */
#ifndef SHMBROKER_MEMBERSHIP_H
#define SHMBROKER_MEMBERSHIP_H

#include "ipc.h"
#include "region.h"

/* Client `slot` becomes a member of the group called `name`, which was found in slot `group`. The subscription that was
 * set, else that of the first live member, is the group's; another one is refused. `text`: JSON, shorter than
 * SB_SUBSCRIPTION_BYTES. in_order: it owns queues, as either all live members do or none. self_counts: the slot has other
 * consumers in this group. SB_OK, *generation: of the subscription | SB_EXISTS: it differs | SB_IN_USE: by members that
 * differ in `in_order` | SB_TIMEOUT | SB_GONE: no such group any more | SB_BROKEN. */
int sb_group_join(sb_region *r, uint32_t group, const char *name, uint32_t slot, const char *text, int in_order,
                  int self_counts, int64_t deadline_ns, uint64_t *generation);
void sb_group_leave(sb_region *r, uint32_t group, uint32_t slot);
/* A copy of the subscription, or retry policy, in force, SB_SUBSCRIPTION_BYTES with its NUL; returns its generation. No lock. */
uint64_t sb_group_subscription(const sb_region *r, uint32_t group, char *text);
uint64_t sb_group_retry(const sb_region *r, uint32_t group, char *text);
static inline int sb_group_is_paused(const sb_region *r, uint32_t group)
{
    return (int)(sb_load(&sb_group_at(r, group)->pause_generation) & 1u); /* SYNC: pause */
}
/* `place`: where the text of a generation stands; to be written before the generation is stored, under the definition lock. */
void sb_group_prepare_text(char *place, const char *text);
/* Does a live client consume in it? Under the definition lock the answer stands until the lock is given back. */
int sb_group_in_use(const sb_region *r, uint32_t group);

#endif
