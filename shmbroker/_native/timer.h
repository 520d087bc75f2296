/* timer.h: what the records of a log say about delayed messages. No shared memory, no locks. */
#ifndef SHMBROKER_TIMER_H
#define SHMBROKER_TIMER_H

#include "scan.h"

/* One record can say several things; `at` is its position. */
typedef struct {
    uint64_t at;
    uint64_t position; /* of the TIMER record that it is about */
    uint64_t due;      /* TIMER: CLOCK_REALTIME ns */
    uint64_t origin;   /* FIRED: 0, or of a timer that was carried on: the position of the first in its place, */
    uint64_t successor; /*       and that of the TIMER record that takes it now */
    uint64_t end;      /* behind the record */
    uint32_t kind;
} sb_timer_event;

/* The events of a walk, in order; `room` is at least SB_GROUP_RECORDS_MAX. Everything else is stepped over unchecked: only
 * records that say something about timers have their CRC looked at.
 * Answers why it stopped: SB_END | SB_INVALID | SB_AGAIN (no room for more: go on from walk->position). */
int sb_timer_collect(sb_walk *walk, sb_timer_event *events, uint32_t room, uint32_t *count);

#endif
