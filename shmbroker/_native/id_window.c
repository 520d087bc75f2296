/* id_window.c: see id_window.h. */
#include "id_window.h"

#include "undo.h"

typedef int (*store)(sb_region *r, sb_word *word, uint64_t value);

static int plain_store(sb_region *r, sb_word *word, uint64_t value)
{
    (void)r;
    sb_store(word, value);
    return SB_OK;
}

/* -- chains: see sb_id in layout.h. Entries are named by their index + 1; a name out of range ends a chain. ---------- */

static uint32_t head(const sb_id *id) { return (uint32_t)(sb_peek(&id->links) >> 32); }
static uint32_t next(const sb_id *id) { return (uint32_t)sb_peek(&id->links); }

static int set_head(sb_region *r, sb_id *id, uint32_t name, store put)
{
    return put(r, &id->links, (uint64_t)name << 32 | next(id));
}

static int set_next(sb_region *r, sb_id *id, uint32_t name, store put)
{
    return put(r, &id->links, (uint64_t)head(id) << 32 | name);
}

static sb_id *chain_of(const sb_region *r, uint64_t incarnation, uint64_t sequence)
{
    uint64_t h = (incarnation ^ (sequence * 0x9e3779b97f4a7c15ull)) * 0xff51afd7ed558ccdull;
    return sb_id_at(r, (uint32_t)(h >> 32) & (r->limits.ids - 1));
}

static sb_id *named(const sb_region *r, uint32_t name)
{
    return name && name <= r->limits.ids ? sb_id_at(r, name - 1) : NULL;
}

static uint64_t position_of(const sb_id *id) { return sb_peek(&id->position) & ~SB_ID_GIVEN; }

/* The newest entry with this id. */
static sb_id *find_id(const sb_region *r, uint64_t incarnation, uint64_t sequence)
{
    sb_id *id = named(r, head(chain_of(r, incarnation, sequence)));
    for (uint32_t steps = 0; id && steps < r->limits.ids; steps++, id = named(r, next(id))) {
        if (sb_peek(&id->incarnation) == incarnation && sb_peek(&id->sequence) == sequence) {
            return id;
        }
    }
    return NULL;
}

/* Take an entry out of its chain; one that was never used is in none. */
static int forget(sb_region *r, uint32_t name, store put)
{
    sb_id *gone = sb_id_at(r, name - 1), *chain = chain_of(r, sb_peek(&gone->incarnation), sb_peek(&gone->sequence));
    if (head(chain) == name) {
        return set_head(r, chain, next(gone), put);
    }
    sb_id *before = named(r, head(chain));
    for (uint32_t steps = 0; before && steps < r->limits.ids; steps++, before = named(r, next(before))) {
        if (next(before) == name) {
            return set_next(r, before, next(gone), put);
        }
    }
    return SB_OK;
}

/* The oldest entry becomes the newest. */
static int remember(sb_region *r, uint64_t incarnation, uint64_t sequence, uint64_t position, store put)
{
    sb_word *count = &sb_marks(r)->ids_remembered;
    uint32_t name = (uint32_t)(sb_peek(count) & (r->limits.ids - 1)) + 1;
    sb_id *id = sb_id_at(r, name - 1), *chain = chain_of(r, incarnation, sequence);
    int code = forget(r, name, put);
    code = code == SB_OK ? put(r, &id->incarnation, incarnation) : code;
    code = code == SB_OK ? put(r, &id->sequence, sequence) : code;
    code = code == SB_OK ? put(r, &id->position, position) : code;
    code = code == SB_OK ? set_next(r, id, head(chain), put) : code;
    code = code == SB_OK ? set_head(r, chain, name, put) : code;
    return code == SB_OK ? put(r, count, sb_peek(count) + 1) : code;
}

/* -- ids ---------------------------------------------------------------------------------------------------------- */

/* Has this id been appended before? The window is exact (undo scope); a client's own window is compared with the
 * record itself while the ring still has it (R17). */
int sb_id_find(const sb_region *r, uint32_t client, sb_item *item, uint64_t tail)
{
    const sb_id *known = find_id(r, item->incarnation, item->sequence);
    if (known && position_of(known) >= sb_load(&sb_marks(r)->kept)) { /* the window reaches as far as the log */
        item->position = position_of(known);
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

int sb_remember_id(sb_region *r, uint64_t incarnation, uint64_t sequence, uint64_t position, int given)
{
    const sb_id *known = find_id(r, incarnation, sequence);
    if (known && position_of(known) == position) {
        return SB_OK;
    }
    return remember(r, incarnation, sequence, position | (given ? SB_ID_GIVEN : 0), plain_store);
}

int sb_id_derived(const sb_region *r, uint64_t n, sb_known_id *id)
{
    const sb_id *known = sb_id_at(r, (uint32_t)(n & (r->limits.ids - 1)));
    *id = (sb_known_id){sb_peek(&known->incarnation), sb_peek(&known->sequence), sb_peek(&known->position)};
    return !(id->position & SB_ID_GIVEN) && id->position >= sb_load(&sb_marks(r)->kept);
}

int sb_id_remember(sb_region *r, const sb_item *item)
{
    return remember(r, item->incarnation, item->sequence, item->position, sb_undo_store);
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
