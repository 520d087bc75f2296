/* change.h: one change of the definitions, for definition.c, group.c and claim_open.c: effects are collected, then appended
 * with a record or (recovery) stored. The definition lock is held. */
#ifndef SHMBROKER_CHANGE_H
#define SHMBROKER_CHANGE_H

#include "definition.h"

#define SB_CHANGE_EFFECTS_MAX (2 * SB_QUEUES_PER_TOPIC_MAX + 8u) /* link and state of each queue, and the topic's own */
#define SB_CHANGE_BODY_BYTES (SB_SUBSCRIPTION_BYTES + 1024u)

typedef struct {
    sb_effect effect[SB_CHANGE_EFFECTS_MAX];
    uint32_t count;
    int moved; /* the definitions' generation is among them */
} sb_change;

void sb_change_word(sb_change *c, sb_word *word, uint64_t desired);
/* The definitions' generation moves here, behind what was collected; otherwise with the append, behind everything. */
void sb_change_move(sb_region *r, sb_change *c);
/* A record that says it; `body` is read when it is appended. */
sb_item sb_change_record(uint8_t kind, const void *body, size_t bytes);
/* The definitions have moved: with these records, all in one append. As sb_append. */
int sb_change_append(sb_region *r, sb_change *c, sb_item *records, uint32_t count, int64_t deadline_ns, uint64_t *needed);
/* The same with one record, of this JSON. record 0: recovery, which only stores. */
int sb_change_apply(sb_region *r, sb_change *c, uint8_t kind, const char *body, int record, int64_t deadline_ns, uint64_t *needed);
/* Collects the end of a topic; `body`, of SB_CHANGE_BODY_BYTES, becomes its record's. */
void sb_change_delete_topic(sb_region *r, sb_change *c, uint32_t slot, char *body);
/* The claims of a topic or group that is deleted go with it (SB_NIL: of any); receipts that are still out are refused. Killed
 * before: the janitor does it. */
void sb_change_free_claims(sb_region *r, uint32_t topic_id, uint32_t group_id);

#endif
