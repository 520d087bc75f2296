/* move.h: a message that failed goes on as a copy, in `%RETRY%group`, in `%DLQ%group` or as a TIMER: the copy and the
 * acknowledgement of what was received are one append (R3). Nothing else acknowledges a moved message. */
#ifndef SHMBROKER_MOVE_H
#define SHMBROKER_MOVE_H

#include "ring.h"

/* Whose claim it is, and which. */
typedef struct {
    uint32_t slot, table;
    uint64_t offset, receipt;
} sb_received;

/* One group of two records: `copy`, and a PROGRESS record that says "acknowledged" in case the memory is lost; with the claim
 * from HELD to ACKED as its effect. Waits and answers as sb_append_wait, but for
 * SB_GONE: the claim is not the slot's any more | SB_NOT_FOUND: the copy's topic was deleted | SB_AGAIN: another append
 * decides about this claim, and does not finish. */
int sb_move(sb_region *r, const sb_received *received, sb_item *copy, int64_t deadline_ns, uint64_t *end, uint32_t *waiter);

#endif
