/* change.h: one change of the definitions, for definition.c and group.c: effects are collected, then appended with a record
 * or (recovery) stored. The definition lock is held. */
#ifndef SHMBROKER_CHANGE_H
#define SHMBROKER_CHANGE_H

#include "definition.h"

#define SB_CHANGE_EFFECTS_MAX (2 * SB_QUEUES_PER_TOPIC_MAX + 8u) /* link and state of each queue, and the topic's own */
#define SB_CHANGE_BODY_BYTES (SB_SUBSCRIPTION_BYTES + 1024u)

typedef struct {
    sb_effect effect[SB_CHANGE_EFFECTS_MAX];
    uint32_t count;
} sb_change;

void sb_change_word(sb_change *c, sb_word *word, uint64_t desired);
/* The definitions have moved: with a record, all in one append. item: all but CRC and time. As sb_append. */
int sb_change_append(sb_region *r, sb_change *c, sb_item *item, int64_t deadline_ns, uint64_t *needed);
/* The same; `body`: JSON, of the record that says it. record 0: recovery, which only stores. */
int sb_change_apply(sb_region *r, sb_change *c, uint8_t kind, const char *body, int record, int64_t deadline_ns, uint64_t *needed);
/* The claims of a topic or group that is deleted go with it (SB_NIL: of any); receipts that are still out are refused. Killed
 * before: the janitor does it. */
void sb_change_free_claims(sb_region *r, uint32_t topic_id, uint32_t group_id);

#endif
