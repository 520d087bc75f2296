/* check.h: a harness for tests of the native core without Python: checks that say where, one deadline per test, child
 * processes that may be killed, and a region on two memfds.
 *
 *     static void an_acked_message_is_never_claimed_again(void) { ... CHECK_EQ(a, b); }
 *     int main(int argc, char **argv) { static const check_test tests[] = {TEST(an_acked_...)}; return CHECK_MAIN(tests); }
 *
 * Arguments select tests by a part of their name. */
#ifndef SHMBROKER_CHECK_H
#define SHMBROKER_CHECK_H

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "region.h"

#define CHECK_SECONDS_MAX 120u /* per test; sanitizers are slow */

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);                                  \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#define CHECK_EQ(left, right)                                                                                          \
    do {                                                                                                               \
        long long check_left = (long long)(left), check_right = (long long)(right);                                    \
        if (check_left != check_right) {                                                                               \
            fprintf(stderr, "%s:%d: %s is %lld, but %s is %lld\n", __FILE__, __LINE__, #left, check_left, #right,      \
                    check_right);                                                                                      \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

typedef struct {
    const char *name;
    void (*run)(void);
} check_test;
#define TEST(function) {#function, function}
#define CHECK_MAIN(tests) check_main(tests, sizeof(tests) / sizeof((tests)[0]), argc, argv)

static inline int check_main(const check_test *tests, size_t count, int argc, char **argv)
{
    for (size_t i = 0; i < count; i++) {
        int wanted = argc < 2;
        for (int a = 1; a < argc; a++) {
            wanted |= strstr(tests[i].name, argv[a]) != NULL;
        }
        if (wanted) {
            printf("   %s\n", tests[i].name);
            (void)fflush(stdout);
            (void)alarm(CHECK_SECONDS_MAX);
            tests[i].run();
            (void)alarm(0);
        }
    }
    return 0;
}

/* Memory that children share. */
static inline void *check_shared(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    return memory;
}

/* Run `body` in a child process; returns its id. It leaves with status 0 when body returns, and does not outlive the test
 * that has failed, not even stopped. */
static inline pid_t check_fork(void (*body)(void *), void *argument)
{
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
        body(argument);
        _exit(0);
    }
    return pid;
}

/* Wait for a child's end: its exit status, or minus the signal that killed it. */
static inline int check_wait(pid_t pid)
{
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

static inline sb_limits check_limits(void)
{
    return (sb_limits){.clients = 8, .waiters = 16, .topics = 4, .queues = 8, .groups = 4, .claim_tables = 4, .claim_window = 64,
                       .overflow_claims = 32, .ids = 64, .blocks = 512, .reserve_bytes = 65536, .max_message_bytes = 65536};
}

/* A formatted region: a 1 MiB ring, state RUNNING, shared with children. */
static inline void check_region(sb_region *r, sb_limits limits)
{
    const uint64_t ring_bytes = 1u << 20;
    uint64_t control_bytes = sb_control_size(&limits);
    int control = memfd_create("control", MFD_CLOEXEC), ring = memfd_create("ring", MFD_CLOEXEC);
    CHECK(control_bytes != 0 && control >= 0 && ring >= 0);
    CHECK(ftruncate(control, (off_t)control_bytes) == 0 && ftruncate(ring, (off_t)ring_bytes) == 0);
    CHECK_EQ(sb_region_map(r, control, ring, 1), SB_OK);
    sb_header header = {.ring_bytes = ring_bytes, .segment_bytes = 1u << 20};
    CHECK_EQ(sb_region_format(r, &header, &limits, 0, 1), SB_OK);
    sb_store(&sb_marks(r)->state, SB_STATE_RUNNING);
    CHECK(close(control) == 0 && close(ring) == 0);
}

#endif
