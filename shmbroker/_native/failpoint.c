/* failpoint.c: see failpoint.h. Armed from Python at start; not thread-safe to arm while others run. */
#include "failpoint.h"

#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <unistd.h>

int sb_failpoints_armed;

static struct {
    int action;
    _Atomic long left; /* passes until it bites */
} points[SB_FP_COUNT];

static const char *const names[SB_FP_COUNT] = {
#define SB_FAILPOINT_NAME(id, name) name,
    SB_FAILPOINTS(SB_FAILPOINT_NAME)
#undef SB_FAILPOINT_NAME
};

const char *sb_failpoint_name(int id) { return id >= 0 && id < SB_FP_COUNT ? names[id] : NULL; }

void sb_failpoint_arm(int id, int action, long at)
{
    if (id < 0 || id >= SB_FP_COUNT) {
        return;
    }
    points[id].action = action;
    atomic_store(&points[id].left, at);
    if (action != SB_FP_OFF) {
        sb_failpoints_armed = 1;
    }
}

void sb_failpoint_hit(int id)
{
    if (points[id].action == SB_FP_OFF || atomic_fetch_sub(&points[id].left, 1) != 1) {
        return;
    }
    switch (points[id].action) {
    case SB_FP_KILL:
        (void)kill(getpid(), SIGKILL);
        break;
    case SB_FP_STOP:
        (void)kill(getpid(), SIGSTOP);
        break;
    case SB_FP_EXIT:
        _exit(77);
    default:
        break;
    }
}
