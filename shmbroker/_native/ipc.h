/* ipc.h: robust locks, deadlines, identity. Every wait has a deadline on CLOCK_MONOTONIC. */
#ifndef SHMBROKER_IPC_H
#define SHMBROKER_IPC_H

#include "codes.h"
#include "layout.h"

int64_t sb_now_ns(void);      /* CLOCK_MONOTONIC */
int64_t sb_realtime_ns(void); /* CLOCK_REALTIME */
uint32_t sb_now_ms32(void);   /* CLOCK_MONOTONIC in ms, wrapping */

/* Robust, process-shared. lock: SB_OK | SB_OWNER_DEAD (held; the caller repairs, then calls _consistent) | SB_LOCKED
 * (try) | SB_TIMEOUT | SB_BROKEN. A holder that was killed is reported to exactly one next owner. */
#define SB_OWNER_DEAD 100
int sb_mutex_init(pthread_mutex_t *mutex);
int sb_mutex_try(pthread_mutex_t *mutex);
int sb_mutex_lock(pthread_mutex_t *mutex, int64_t deadline_ns);
int sb_mutex_consistent(pthread_mutex_t *mutex);
void sb_mutex_unlock(pthread_mutex_t *mutex);
int sb_mutex_seal(pthread_mutex_t *mutex, int64_t deadline_ns); /* nobody gets it again: SB_OK | SB_TIMEOUT | SB_BROKEN */
uint32_t sb_mutex_holder(const pthread_mutex_t *mutex); /* thread id, 0 if free; glibc's word, for reports only */

/* Wait on a semaphore in shared memory: SB_OK | SB_TIMEOUT | SB_INTERRUPTED. deadline 0: only try. */
int sb_semaphore_wait(sem_t *semaphore, int64_t deadline_ns);

/* Counts the forks that this process is the child of: handles compare it, since getpid() is a system call (R25). */
extern int sb_fork_generation;
void sb_fork_watch(void); /* once per process */

uint64_t sb_start_ticks(uint32_t pid); /* /proc/PID/stat field 22; 0 none */

#endif
