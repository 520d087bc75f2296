/* append_wait.c: an append that may wait, see ring.h. All waiting is done without the append lock. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <time.h>

#include "ring.h"
#include "wait.h"

#define SLICE_NS 100000000ll /* Ctrl-C is looked at so often */
#define DISK_SLICE_NS 2000000ll
#define POLL_NS 500000ll /* for a thread that got no wait slot */

static int64_t earlier(int64_t a, int64_t b) { return a < b ? a : b; }

/* Disk space is being prepared: look again shortly. Not woken, since this is rare and the flusher has better to do. */
static int wait_capacity(sb_region *r)
{
    struct timespec pause = {.tv_sec = 0, .tv_nsec = DISK_SLICE_NS};
    (void)sb_worker_post(r, SB_ROLE_FLUSHER, 1);
    return clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL) ? SB_INTERRUPTED : SB_TIMEOUT;
}

static int wait_for(sb_region *r, uint32_t client, uint32_t *waiter, uint32_t kind, uint64_t needed, int64_t slice)
{
    if (*waiter == SB_NIL && sb_waiter_take(r, client, waiter) != SB_OK) {
        return sb_poll_position(r, kind, needed, slice, POLL_NS);
    }
    return sb_wait_position(r, *waiter, kind, needed, slice);
}

int sb_append_wait(sb_region *r, uint32_t client, sb_item *items, uint32_t count, const sb_effect *effects, uint32_t effect_count,
                   uint32_t options, int64_t deadline_ns, uint64_t *end, uint32_t *waiter)
{
    int64_t slice = earlier(deadline_ns, sb_now_ns() + SLICE_NS);
    for (;;) {
        uint64_t needed = 0;
        int code = sb_append(r, client, items, count, effects, effect_count, options, slice, end, &needed);
        if (code != SB_TIMEOUT && code != SB_NO_SPACE && code != SB_NO_INDEX &&
            (code != SB_NO_CAPACITY || sb_load(&sb_marks(r)->store_state) == SB_STORE_FULL)) {
            return code;
        }
        if (sb_now_ns() >= deadline_ns) {
            return code;
        }
        int waited = SB_TIMEOUT;
        if (code == SB_NO_CAPACITY) {
            waited = wait_capacity(r);
        } else if (code != SB_TIMEOUT) {
            waited = wait_for(r, client, waiter, code == SB_NO_SPACE ? SB_WAIT_SPACE : SB_WAIT_DISPATCH, needed, slice);
        }
        if (waited == SB_INTERRUPTED || (waited == SB_TIMEOUT && sb_now_ns() >= slice && slice < deadline_ns)) {
            return SB_INTERRUPTED;
        }
    }
}
