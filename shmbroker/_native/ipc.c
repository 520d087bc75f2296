/* ipc.c: see ipc.h. glibc only: pthread_mutex_clocklock and sem_clockwait (2.30) keep deadlines off the wall clock. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "ipc.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__SANITIZE_THREAD__) /* GCC 12's does not know pthread_mutex_clocklock */
#include <sanitizer/tsan_interface.h>
#define TSAN_LOCKED(mutex) __tsan_acquire(mutex)
#define TSAN_UNLOCKING(mutex) __tsan_release(mutex)
#else
#define TSAN_LOCKED(mutex) (void)(mutex)
#define TSAN_UNLOCKING(mutex) (void)(mutex)
#endif

#define NS_PER_S 1000000000ll
#define FUTEX_TID_BITS 0x3fffffffu /* linux/futex.h: FUTEX_TID_MASK */

static int64_t clock_ns(clockid_t clock)
{
    struct timespec t;
    (void)clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * NS_PER_S + t.tv_nsec;
}

static struct timespec to_timespec(int64_t ns)
{
    struct timespec t = {.tv_sec = ns / NS_PER_S, .tv_nsec = ns % NS_PER_S};
    return t;
}

int64_t sb_now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }
int64_t sb_realtime_ns(void) { return clock_ns(CLOCK_REALTIME); }
uint32_t sb_now_ms32(void) { return (uint32_t)(sb_now_ns() / 1000000); }

int sb_mutex_init(pthread_mutex_t *mutex)
{
    pthread_mutexattr_t attributes;
    int bad = pthread_mutexattr_init(&attributes);
    bad |= pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    bad |= pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    bad |= pthread_mutex_init(mutex, &attributes);
    (void)pthread_mutexattr_destroy(&attributes);
    return bad ? SB_BROKEN : SB_OK;
}

static int mutex_code(int error)
{
    switch (error) {
    case 0:
        return SB_OK;
    case EOWNERDEAD:
        return SB_OWNER_DEAD;
    case EBUSY:
        return SB_LOCKED;
    case ETIMEDOUT:
        return SB_TIMEOUT;
    default: /* ENOTRECOVERABLE, EINVAL: nobody can repair it */
        return SB_BROKEN;
    }
}

int sb_mutex_try(pthread_mutex_t *mutex) { return mutex_code(pthread_mutex_trylock(mutex)); }

int sb_mutex_lock(pthread_mutex_t *mutex, int64_t deadline_ns)
{
    struct timespec deadline = to_timespec(deadline_ns);
    int code = mutex_code(pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &deadline));
    TSAN_LOCKED(mutex);
    return code;
}

int sb_mutex_consistent(pthread_mutex_t *mutex) { return pthread_mutex_consistent(mutex) ? SB_BROKEN : SB_OK; }
void sb_mutex_unlock(pthread_mutex_t *mutex)
{
    TSAN_UNLOCKING(mutex);
    (void)pthread_mutex_unlock(mutex);
}

struct seal {
    pthread_mutex_t *mutex;
    int64_t deadline_ns;
    int code;
};

static void *die_with_lock(void *argument)
{
    struct seal *seal = argument;
    seal->code = sb_mutex_lock(seal->mutex, seal->deadline_ns);
    return NULL;
}

/* A robust lock that is given back unrepaired by who got it from a dead owner is ENOTRECOVERABLE for ever, in every
 * process and every version. So a thread of ours dies with it. Another may get it between the two and repair it: again. */
int sb_mutex_seal(pthread_mutex_t *mutex, int64_t deadline_ns)
{
    for (;;) {
        struct seal seal = {mutex, deadline_ns, SB_BROKEN};
        pthread_t thread;
        if (pthread_create(&thread, NULL, die_with_lock, &seal) || pthread_join(thread, NULL)) {
            return SB_BROKEN;
        }
        if (seal.code == SB_TIMEOUT || seal.code == SB_BROKEN) {
            return seal.code == SB_BROKEN ? SB_OK : SB_TIMEOUT; /* sealed already */
        }
        int code = sb_mutex_lock(mutex, deadline_ns);
        if (code == SB_TIMEOUT || code == SB_BROKEN) {
            return code == SB_BROKEN ? SB_OK : SB_TIMEOUT;
        }
        sb_mutex_unlock(mutex);
        if (code == SB_OWNER_DEAD) {
            return SB_OK;
        }
    }
}

uint32_t sb_mutex_holder(const pthread_mutex_t *mutex)
{
    return (uint32_t)__atomic_load_n(&mutex->__data.__lock, __ATOMIC_RELAXED) & FUTEX_TID_BITS;
}

int sb_semaphore_wait(sem_t *semaphore, int64_t deadline_ns)
{
    int failed;
    if (deadline_ns == 0) {
        failed = sem_trywait(semaphore);
    } else {
        struct timespec deadline = to_timespec(deadline_ns);
        failed = sem_clockwait(semaphore, CLOCK_MONOTONIC, &deadline);
    }
    if (!failed) {
        return SB_OK;
    }
    return errno == EINTR ? SB_INTERRUPTED : SB_TIMEOUT;
}

int sb_fork_generation;
static void forked(void) { sb_fork_generation++; }

void sb_fork_watch(void)
{
    static int watching;
    if (!watching) {
        watching = pthread_atfork(NULL, NULL, forked) == 0;
    }
}

uint64_t sb_start_ticks(uint32_t pid)
{
    char path[32];
    char line[1024];
    (void)snprintf(path, sizeof path, "/proc/%u/stat", pid);
    FILE *file = fopen(path, "re");
    if (!file) {
        return 0;
    }
    size_t n = fread(line, 1, sizeof line - 1, file);
    (void)fclose(file);
    line[n] = '\0';
    const char *at = strrchr(line, ')'); /* the name before it may hold blanks and parentheses */
    for (int field = 2; at && field < 22; field++) {
        at = strchr(at + 1, ' ');
    }
    return at ? strtoull(at + 1, NULL, 10) : 0;
}
