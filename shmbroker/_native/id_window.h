/* id_window.h: never a second copy of a message (R17). Caller holds the append lock.
 *
 * Two memories: each client's own last 64 sequences with their positions, compared with the record itself while the ring
 * has it; and a window of dedup keys' ids and of the last ids before a restart. The window holds exactly the last
 * `limits.ids` of them, and is true to the log because its words are undone with their append.
 */
#ifndef SHMBROKER_ID_WINDOW_H
#define SHMBROKER_ID_WINDOW_H

#include "ring.h"

/* SB_DUPLICATE: item->position is that of the earlier append | SB_OK */
int sb_id_find(const sb_region *r, uint32_t client, sb_item *item, uint64_t tail);
int sb_id_remember(sb_region *r, const sb_item *item);
/* The id remembered as the n-th ever, if it is one of a dedup key and the log still has its message: 1. */
int sb_id_derived(const sb_region *r, uint64_t n, sb_known_id *id);
void sb_id_note_client(sb_region *r, uint32_t client, const sb_item *items, uint32_t count);

#endif
