/* wait.h: sleeping and waking (R6). A wait slot belongs to a waiting thread; the semaphore in it is only a hint, the
 * caller's predicate is the truth. store flag, full fence, look again on both sides, so that no wake-up is lost. */
#ifndef SHMBROKER_WAIT_H
#define SHMBROKER_WAIT_H

#include "ipc.h"
#include "region.h"

/* Take a free wait slot for client slot `client`; SB_TABLE_FULL if there is none. */
int sb_waiter_take(sb_region *r, uint32_t client, uint32_t *slot);
void sb_waiter_give(sb_region *r, uint32_t slot);
uint32_t sb_waiter_wake(sb_region *r, uint32_t slot); /* its own process wants it to look; the number of posts */

/* Wait until the word for `kind` (flushed, ...) has reached `target`. SB_OK | SB_TIMEOUT | SB_INTERRUPTED |
 * SB_READ_ONLY (store failed, target not reached) | SB_FENCED | SB_NOT_RUNNING. Posts the worker that can help. */
int sb_wait_position(sb_region *r, uint32_t slot, uint32_t kind, uint64_t target, int64_t deadline_ns);

/* The same for a thread that got no wait slot: looks every pause_ns. */
int sb_poll_position(sb_region *r, uint32_t kind, uint64_t target, int64_t deadline_ns, int64_t pause_ns);

/* Consumers: begin (flag set, bits set in the topics), the caller looks once more for messages, then sleep, then end. */
void sb_wait_message_begin(sb_region *r, uint32_t slot, uint32_t group, const uint32_t *topics, uint32_t count);
int sb_wait_message_sleep(sb_region *r, uint32_t slot, int64_t deadline_ns);
void sb_wait_message_end(sb_region *r, uint32_t slot, const uint32_t *topics, uint32_t count);

/* An event loop sleeps in one thread for all of its waits: `hub` is the slot of that thread, and posts of the slots that are
 * joined to it, each a wait, go to its semaphore. Which of them was posted stands in their states. */
void sb_hub_join(sb_region *r, uint32_t hub, uint32_t slot);
int sb_hub_sleep(sb_region *r, uint32_t hub, int64_t deadline_ns); /* SB_OK | SB_TIMEOUT | SB_INTERRUPTED */
void sb_hub_post(sb_region *r, uint32_t hub);                      /* its own process wants it to look */
int sb_waiter_is_posted(const sb_region *r, uint32_t slot);

/* sb_wait_position in halves, for such a slot. begin: SB_AGAIN: it waits, until it is posted or ended; else the outcome. */
int sb_wait_position_begin(sb_region *r, uint32_t slot, uint32_t kind, uint64_t target);
void sb_wait_position_end(sb_region *r, uint32_t slot);
int sb_position_look(sb_region *r, uint32_t kind, uint64_t target); /* the outcome now; SB_AGAIN: not yet */

/* Post sleepers. All return the number of posts made; none makes a system call when nobody sleeps. */
uint32_t sb_wake_position(sb_region *r, uint32_t kind, uint64_t reached); /* everybody who waits for this kind's word */
uint32_t sb_publish_flushed(sb_region *r, uint64_t position);             /* flushed := position, and wake for it */
uint32_t sb_publish_replicated(sb_region *r, uint64_t position);          /* the same for replicated */
uint32_t sb_wake_everybody(sb_region *r);                                  /* state changed: all must look */
uint32_t sb_wake_topic(sb_region *r, uint32_t topic);                      /* one sleeper of every group */
uint32_t sb_wake_group(sb_region *r, uint32_t topic, uint32_t group);      /* one sleeper of this group */
uint32_t sb_wake_member(sb_region *r, uint32_t group, uint32_t client);     /* one sleeper of this process in this group */
uint32_t sb_wake_topics_since(sb_region *r, uint64_t from, uint64_t to);   /* topics whose newest message lies in [from, ...) */

/* Workers. */
int sb_worker_sleep(sb_region *r, uint32_t role, uint32_t mode, uint64_t seen, int64_t deadline_ns); /* SB_OK | SB_TIMEOUT | SB_INTERRUPTED */
uint32_t sb_worker_post(sb_region *r, uint32_t role, int urgent); /* urgent: also ends a tick's sleep */

/* Janitor: re-post waits whose post is missing or untaken for 5 ms, workers that sleep over work. Returns posts. */
uint32_t sb_wait_backstop(sb_region *r, int64_t now_ns);
/* Free the wait slots of a dead client. */
uint32_t sb_waiter_reap(sb_region *r, uint32_t client);

#endif
