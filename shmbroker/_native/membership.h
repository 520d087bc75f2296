/* membership.h: who consumes in a group, and what all of them have subscribed to (R25). */
#ifndef SHMBROKER_MEMBERSHIP_H
#define SHMBROKER_MEMBERSHIP_H

#include "ipc.h"
#include "region.h"

/* Client `slot` becomes a member. The first live member's subscription is the group's; another one is refused.
 * `text` (JSON, shorter than SB_SUBSCRIPTION_BYTES) and its `hash` (not 0). self_counts: the slot has other consumers in
 * this group. SB_OK | SB_EXISTS: a live member subscribes differently | SB_TIMEOUT | SB_GONE: no such group | SB_BROKEN. */
int sb_group_join(sb_region *r, uint32_t group, uint32_t slot, uint64_t hash, const char *text, int self_counts, int64_t deadline_ns);
void sb_group_leave(sb_region *r, uint32_t group, uint32_t slot);

#endif
