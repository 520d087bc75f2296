/* undo.h: changes of shared words that can be taken back (R3). Caller holds the append lock.
 *
 *     undo.entry[n] = {word, before, after}; undo.count = n + 1; word = after        -- sb_undo_store
 *     ... tail = end                                                                   -- the append exists
 *     undo.count = 0
 *
 * Repair after a kill: tail as it was -> every `before`, newest first; tail moved -> every `after`. Idempotent.
 */
#ifndef SHMBROKER_UNDO_H
#define SHMBROKER_UNDO_H

#include "region.h"

static inline uint64_t sb_claim_moving_form(uint64_t claim) { return (claim & ~SB_CLAIM_STATE_MASK) | SB_CLAIM_MOVING; }

/* Note a change that the caller makes later; claim: others may change the word by CAS. SB_OK | SB_TOO_LARGE */
int sb_undo_note(sb_region *r, sb_word *word, uint64_t before, uint64_t after, int claim);
/* Note it and make it now. */
int sb_undo_store(sb_region *r, sb_word *word, uint64_t value);
void sb_undo_repair(sb_region *r);

#endif
