/* queue_lock.c: see queue_lock.h. The order of taking and giving up a queue, and what a kill leaves, stands in own and disown. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "queue_lock.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/ipc.h>
#include <sys/sem.h>
#include <sys/wait.h>
#include <time.h>

#include "claim.h"
#include "failpoint.h"

#define PRIVATE 0600
#define TEST_SECONDS 5
#define TEST_STACK 16384u

union argument { /* of semctl; glibc leaves its definition to us */
    int value;
    struct semid_ds *status;
};

int sb_queue_locks_make(int key, uint32_t tables, int *id)
{
    *id = semget(key, (int)tables + 1, IPC_CREAT | IPC_EXCL | PRIVATE);
    return *id < 0 ? -errno : SB_OK;
}

int sb_queue_locks_find(int key, uint32_t tables, int *id, uint32_t *uid)
{
    struct semid_ds status;
    union argument argument = {.status = &status};
    *id = semget(key, 0, 0);
    if (*id < 0 || semctl(*id, 0, IPC_STAT, argument) < 0) {
        return -errno;
    }
    *uid = status.sem_perm.uid;
    return tables && status.sem_nsems != (unsigned long)tables + 1 ? -EEXIST : SB_OK; /* another program's, by chance */
}

int sb_queue_locks_share(int id, uint32_t uid, uint32_t gid, int mode)
{
    struct semid_ds status;
    union argument argument = {.status = &status};
    if (semctl(id, 0, IPC_STAT, argument) < 0) {
        return -errno;
    }
    status.sem_perm.uid = uid;
    status.sem_perm.gid = gid;
    status.sem_perm.mode = (unsigned short)mode;
    return semctl(id, 0, IPC_SET, argument) < 0 ? -errno : SB_OK;
}

int sb_queue_locks_remove(int id) { return semctl(id, 0, IPC_RMID) < 0 ? -errno : SB_OK; }

typedef struct {
    int id;
    unsigned short number;
    int error;
} taker;

static int take_and_leave(void *argument)
{
    taker *t = argument;
    struct sembuf take = {.sem_num = t->number, .sem_op = 1, .sem_flg = IPC_NOWAIT | SEM_UNDO};
    t->error = semop(t->id, &take, 1) < 0 ? errno : 0;
    return 0;
}

/* A process of its own, since threads share what is undone; CLONE_VM, since there is nothing to copy for it. It has no
 * signal for its end, so that whoever waits for the children of this program does not meet it. */
int sb_queue_locks_test(int id, uint32_t tables)
{
    _Alignas(16) char stack[TEST_STACK];
    taker t = {.id = id, .number = (unsigned short)tables};
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before); /* it would run this program's handlers, in this program's memory */
    int error = 0, pid = clone(take_and_leave, stack + sizeof stack, CLONE_VM | CLONE_VFORK, &t);
    if (pid < 0 || waitpid(pid, NULL, (int)__WCLONE) < 0) {
        error = errno;
    }
    error = error ? error : t.error;
    struct sembuf until_free = {.sem_num = t.number, .sem_op = 0};
    struct timespec most = {.tv_sec = TEST_SECONDS}; /* others may test at this moment, too */
    if (!error && semtimedop(id, &until_free, 1, &most) < 0) {
        error = errno;
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -error;
}

/* Free -> taken -> named. Killed behind the first: the kernel frees it again, and the janitor's next tick wakes a member;
 * behind the second: likewise, and the janitor takes the name down before it wakes.
 *
 * Who names itself looks at the life of the table behind that; who begins another life takes names down behind that. With a
 * full fence on both sides no name gets into a life that it does not belong to, or its owner sees so and takes it down. */
int sb_queue_own(sb_region *r, int id, uint32_t table, uint64_t life, uint32_t slot)
{
    struct sembuf take[] = {{.sem_num = (unsigned short)table, .sem_op = 0, .sem_flg = IPC_NOWAIT},
                            {.sem_num = (unsigned short)table, .sem_op = 1, .sem_flg = IPC_NOWAIT | SEM_UNDO}};
    if (semop(id, take, 2) < 0) {
        return errno == EAGAIN || errno == EINTR ? SB_LOCKED : SB_GONE;
    }
    SB_FAILPOINT(queue_taken);
    sb_claims *c = sb_claims_at(r, table);
    sb_store(&c->wanted, 0);
    sb_store(&c->owner, slot + 1); /* SYNC: queue-owner */
    SB_FAILPOINT(queue_owned);
    sb_fence();
    if (sb_load(&c->state) != life) {
        sb_queue_disown(r, id, table, slot, 1);
        return SB_LOCKED;
    }
    return SB_OK;
}

/* Named -> nameless -> free; then the caller wakes who asked for it. Killed in between: as above. */
void sb_queue_disown(sb_region *r, int id, uint32_t table, uint32_t slot, int named)
{
    struct sembuf free = {.sem_num = (unsigned short)table, .sem_op = -1, .sem_flg = IPC_NOWAIT | SEM_UNDO};
    if (named) {
        (void)sb_queue_bereave(r, table, slot);
        SB_FAILPOINT(queue_nameless);
    }
    (void)semop(id, &free, 1);
    SB_FAILPOINT(queue_freed);
}

int sb_queue_bereave(sb_region *r, uint32_t table, uint32_t slot)
{
    uint64_t named = (uint64_t)slot + 1;
    return sb_cas(&sb_claims_at(r, table)->owner, &named, 0);
}
