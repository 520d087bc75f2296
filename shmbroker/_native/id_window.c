/* id_window.c: see id_window.h. */
#include "id_window.h"

#include "undo.h"

#define ID_PROBES 8u

static uint32_t id_bucket(const sb_region *r, uint64_t incarnation, uint64_t sequence)
{
    uint64_t h = (incarnation ^ (sequence * 0x9e3779b97f4a7c15ull)) * 0xff51afd7ed558ccdull;
    return (uint32_t)(h >> 32) & (r->limits.ids - 1);
}

static sb_id *find_id(const sb_region *r, uint64_t incarnation, uint64_t sequence, sb_id **oldest)
{
    uint32_t at = id_bucket(r, incarnation, sequence);
    *oldest = NULL;
    for (uint32_t i = 0; i < ID_PROBES; i++) {
        sb_id *id = sb_id_at(r, (at + i) & (r->limits.ids - 1));
        if (sb_peek(&id->incarnation) == incarnation && sb_peek(&id->sequence) == sequence) {
            return id;
        }
        if (!*oldest || sb_peek(&id->position) < sb_peek(&(*oldest)->position)) {
            *oldest = id;
        }
    }
    return NULL;
}

/* Has this id been appended before? The hash window is exact (undo scope); a client's own window is compared with the
 * record itself while the ring still has it (R17). */
int sb_id_find(const sb_region *r, uint32_t client, sb_item *item, uint64_t tail)
{
    sb_id *oldest;
    const sb_id *known = find_id(r, item->incarnation, item->sequence, &oldest);
    if (known && sb_peek(&known->position) >= sb_load(&sb_marks(r)->kept)) { /* the window reaches as far as the log */
        item->position = sb_peek(&known->position);
        return SB_DUPLICATE;
    }
    if (client >= r->limits.clients) {
        return SB_OK;
    }
    sb_client *c = sb_client_at(r, client);
    uint32_t at = (uint32_t)(item->sequence % SB_ID_WINDOW);
    uint64_t position = sb_load(&c->window[at]);
    if (sb_load(&c->window_sequence[at]) != item->sequence || sb_load(&c->incarnation) != item->incarnation || position >= tail) {
        return SB_OK;
    }
    const sb_record *record = (const sb_record *)(r->ring + (position & r->ring_mask));
    if (sb_peek(&sb_marks(r)->write_limit) - position <= r->ring_bytes && /* else a refused append may have overwritten it */
        (record->position != position || record->incarnation != item->incarnation || record->sequence != item->sequence)) {
        return SB_OK;
    }
    item->position = position;
    return SB_DUPLICATE;
}

int sb_remember_id(sb_region *r, uint64_t incarnation, uint64_t sequence, uint64_t position)
{
    sb_id *oldest;
    sb_id *id = find_id(r, incarnation, sequence, &oldest);
    id = id ? id : oldest;
    sb_store(&id->position, position);
    sb_store(&id->incarnation, incarnation);
    sb_store(&id->sequence, sequence);
    return SB_OK;
}

int sb_id_remember(sb_region *r, const sb_item *item)
{
    sb_id *oldest;
    sb_id *id = find_id(r, item->incarnation, item->sequence, &oldest);
    id = id ? id : oldest;
    int code = sb_undo_store(r, &id->position, item->position);
    code = code == SB_OK ? sb_undo_store(r, &id->incarnation, item->incarnation) : code;
    return code == SB_OK ? sb_undo_store(r, &id->sequence, item->sequence) : code;
}

/* No undo: behind `tail` it is compared with the record, beyond it is not believed, and the dead send nothing again. */
void sb_id_note_client(sb_region *r, uint32_t client, const sb_item *items, uint32_t count)
{
    if (client >= r->limits.clients) {
        return;
    }
    sb_client *c = sb_client_at(r, client);
    for (uint32_t i = 0; i < count && items[i].incarnation == sb_peek(&c->incarnation); i++) {
        sb_store(&c->window[items[i].sequence % SB_ID_WINDOW], items[i].position);
        sb_store(&c->window_sequence[items[i].sequence % SB_ID_WINDOW], items[i].sequence);
    }
}
