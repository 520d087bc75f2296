/* janitor.h: what is done for the dead, the late and the stopped. Run by one process, the janitor. */
#ifndef SHMBROKER_JANITOR_H
#define SHMBROKER_JANITOR_H

#include "ring.h"

/* Take a client slot: SB_OK, *slot and *generation set | SB_TABLE_FULL. */
int sb_client_join(sb_region *r, uint32_t pid, uint64_t start_ticks, uint64_t incarnation, const char *name, uint32_t *slot,
                   uint32_t *generation);
/* Give back all that the slot's owner held (its own leave, or the janitor after its death). SB_GONE: not this generation.
 * *released: claims that are free again. A kill in here leaves the slot DEAD: the next call finishes. */
int sb_client_reap(sb_region *r, uint32_t slot, uint32_t generation, uint32_t *released);

/* Give back what a living client holds in one group, each with its attempt counted. Returns how many claims. */
uint32_t sb_group_give_back(sb_region *r, uint32_t group, uint32_t slot);

/* One pass: expired claims, lost wake-ups, locks of the dead. Claim tables are walked when their hints say that there is
 * something to do, and in turn, so that a broker with many groups costs nothing while it is idle; `turn` counts the passes.
 * *expired claims; *next_ms until the next deadline, SB_NIL: none. */
void sb_janitor_pass(sb_region *r, int64_t now_ns, uint32_t turn, uint32_t *expired, uint32_t *next_ms);

static inline uint32_t sb_client_state_of(uint64_t word) { return (uint32_t)(word & 0xff); }
static inline uint32_t sb_client_generation_of(uint64_t word) { return (uint32_t)(word >> 8) & 0xffffffu; }
static inline uint32_t sb_client_pid_of(uint64_t word) { return (uint32_t)(word >> 32); }

#endif
