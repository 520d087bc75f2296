/* clock_step.c: for LD_PRELOAD. CLOCK_REALTIME is off by the nanoseconds that the file CLOCK_STEP_FILE holds (8 bytes). */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *step;

__attribute__((constructor)) static void find_step(void)
{
    const char *name = getenv("CLOCK_STEP_FILE");
    int fd = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        void *mapped = mmap(NULL, sizeof *step, PROT_READ, MAP_SHARED, fd, 0);
        step = mapped == MAP_FAILED ? NULL : (const volatile int64_t *)mapped;
        (void)close(fd);
    }
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int code = (int)syscall(SYS_clock_gettime, clock, now);
    if (code == 0 && clock == CLOCK_REALTIME && step) {
        int64_t ns = now->tv_sec * 1000000000ll + now->tv_nsec + *step;
        now->tv_sec = ns / 1000000000ll;
        now->tv_nsec = ns % 1000000000ll;
    }
    return code;
}
