/* definition.h: topics, queues and groups in shared memory. Each change is one atomic append: its log record and the
 * words that make it true (R3). The definition lock keeps two definers apart; it is never needed to send or receive. */
#ifndef SHMBROKER_DEFINITION_H
#define SHMBROKER_DEFINITION_H

#include "ring.h"

#define SB_QUEUES_PER_TOPIC_MAX 1024u

/* SB_OK, *slot set | SB_NOT_FOUND */
int sb_topic_find(const sb_region *r, const char *name, uint32_t *slot);
int sb_topic_by_id(const sb_region *r, uint32_t topic_id, uint32_t *slot);
int sb_group_find(const sb_region *r, const char *name, uint32_t *slot);
int sb_group_by_id(const sb_region *r, uint32_t group_id, uint32_t *slot);
/* Slots of a topic's queues in order of their numbers, at most `room`; returns how many. */
uint32_t sb_topic_queues(const sb_region *r, uint32_t topic, uint32_t *slots, uint32_t room);

/* Create, or alter: queues only grow, permission as given (0: keep, or 6 for a new one). id 0: the next free one.
 * record 0: recovery, the log says so already. SB_OK | SB_TABLE_FULL | SB_INVALID | SB_EXISTS (other id) | codes of sb_append */
int sb_topic_define(sb_region *r, const char *name, uint32_t queues, uint32_t permission, uint32_t topic_id, int record,
                    int64_t deadline_ns, uint32_t *slot, uint64_t *needed);
/* SB_OK | SB_NOT_FOUND | codes of sb_append */
int sb_topic_delete(sb_region *r, const char *name, int64_t deadline_ns, uint64_t *needed);
int sb_group_define(sb_region *r, const char *name, uint32_t group_id, int record, int64_t deadline_ns, uint32_t *slot, uint64_t *needed);
/* From now on `text` (JSON) is what the group subscribes to, whatever its members say: its generation is the next one, or
 * with record 0 `generation`. SB_OK | SB_NOT_FOUND | SB_INVALID: too long | codes of sb_append */
int sb_group_set_subscription(sb_region *r, const char *name, const char *text, uint64_t generation, int record, int64_t deadline_ns,
                              uint64_t *needed);
/* The same for its retry policy. */
int sb_group_set_retry(sb_region *r, const char *name, const char *text, uint64_t generation, int record, int64_t deadline_ns,
                       uint64_t *needed);
/* Its members get nothing until it is resumed; record 0: the generation says which. SB_OK, also if nothing changes |
 * SB_NOT_FOUND | codes of sb_append */
int sb_group_set_paused(sb_region *r, const char *name, int paused, uint64_t generation, int record, int64_t deadline_ns,
                        uint64_t *needed);
/* With the topic of its retries, if it has one. As sb_topic_delete | SB_IN_USE: a live client consumes in it */
int sb_group_delete(sb_region *r, const char *name, const char *retry_topic, int64_t deadline_ns, uint64_t *needed);

int sb_definition_lock(sb_region *r, int64_t deadline_ns);
void sb_definition_unlock(sb_region *r);

#endif
