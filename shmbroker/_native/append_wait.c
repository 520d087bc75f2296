/* append_wait.c: an append that may wait, see ring.h. All waiting is done without the append lock. */
#include "ring.h"
#include "wait.h"

#define SLICE_NS 100000000ll /* Ctrl-C is looked at so often */
#define DISK_SLICE_NS 2000000ll

static int64_t earlier(int64_t a, int64_t b) { return a < b ? a : b; }

/* Disk space is being prepared: look again shortly. Not woken, since this is rare and the flusher has better to do. */
static int wait_capacity(sb_region *r, uint32_t waiter, int64_t deadline_ns)
{
    (void)sb_worker_post(r, SB_ROLE_FLUSHER, 1);
    return sb_semaphore_wait(&sb_waiter_at(r, waiter)->wake, earlier(deadline_ns, sb_now_ns() + DISK_SLICE_NS));
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
        int64_t now = sb_now_ns();
        if (now >= deadline_ns) {
            return code;
        }
        if (code != SB_TIMEOUT && *waiter == SB_NIL && sb_waiter_take(r, client, waiter) != SB_OK) {
            return SB_TABLE_FULL;
        }
        int waited = SB_TIMEOUT;
        if (code == SB_NO_CAPACITY) {
            waited = wait_capacity(r, *waiter, slice);
        } else if (code != SB_TIMEOUT) {
            waited = sb_wait_position(r, *waiter, code == SB_NO_SPACE ? SB_WAIT_SPACE : SB_WAIT_DISPATCH, needed, slice);
        }
        if (waited == SB_INTERRUPTED || (waited == SB_TIMEOUT && sb_now_ns() >= slice && slice < deadline_ns)) {
            return SB_INTERRUPTED;
        }
    }
}
