/* queue_lock.h: which process owns a queue for a group that consumes in order (R23).
 *
 * One SysV semaphore for each claim table, all of a broker in one set, whose number is the table's. It is 0 while nobody
 * owns the queue, and 1 with SEM_UNDO of the owner: the kernel takes that back when the owner dies, and only then or when
 * the owner says so. A set is born with zeros, so nobody ever sets a value, and no two can race for that.
 *
 * The semaphore decides. The words `owner` and `wanted` of the table, which it guards, notify: whom to wake, and who asks
 * for the queue. The last semaphore of the set is for the self-test.
 */
#ifndef SHMBROKER_QUEUE_LOCK_H
#define SHMBROKER_QUEUE_LOCK_H

#include "region.h"

/* All answer SB_OK or -errno but for the last three. */
int sb_queue_locks_make(int key, uint32_t tables, int *id); /* for its maker alone; -EEXIST: somebody else has made it */
int sb_queue_locks_find(int key, uint32_t tables, int *id, uint32_t *uid);
int sb_queue_locks_share(int id, uint32_t uid, uint32_t gid, int mode);
int sb_queue_locks_remove(int id);
/* That this kernel undoes what a dead process held, and that waits end: a process takes the last semaphore and leaves. */
int sb_queue_locks_test(int id, uint32_t tables);

/* Own the queue of this life of `table`, as client `slot`. SB_OK | SB_LOCKED: somebody does, or that life is over |
 * SB_GONE: the set was removed. */
int sb_queue_own(sb_region *r, int id, uint32_t table, uint64_t life, uint32_t slot);
/* Give it up, whatever life the table is in by now. `named`: the memory is still mapped. */
void sb_queue_disown(sb_region *r, int id, uint32_t table, uint32_t slot, int named);
/* Janitor: a dead client owns nothing any more. 1: it did. */
int sb_queue_bereave(sb_region *r, uint32_t table, uint32_t slot);

#endif
