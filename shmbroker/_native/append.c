/* append.c: the writing half of ring.h. One function, sb_append, shows the order of all stores of an append.
 *
 * Under the append lock every change of a shared word is noted first (undo.h). A writer killed before `tail` moved leaves
 * nothing: the next owner of the lock puts every word back. One killed after it leaves everything. Words that only
 * readers' checks protect (ring bytes, index entries behind next_offset, last_position, the client's id window) need no
 * undo: they lie beyond what is published, or are compared with the record before they are believed.
 */
#include "failpoint.h"
#include "id_window.h"
#include "queue_index.h"
#include "racy.h"
#include "record.h"
#include "ring.h"
#include "undo.h"
#include "wait.h"

#define SPINS 200

/* What one append has found out before it changes anything. */
typedef struct {
    uint64_t tail, start, end, total, filler, gap;
} plan;

/* -- the lock ----------------------------------------------------------------------------------------------------- */

static int lock_append(sb_region *r, int64_t deadline_ns)
{
    pthread_mutex_t *mutex = &r->control->locks.append;
    int code = sb_mutex_try(mutex);
    for (int spin = 0; code == SB_LOCKED && spin < SPINS; spin++) {
        sb_pause();
        code = sb_mutex_try(mutex);
    }
    if (code == SB_LOCKED && deadline_ns > 0) {
        code = sb_mutex_lock(mutex, deadline_ns);
    }
    if (code == SB_OWNER_DEAD) {
        sb_undo_repair(r); /* killed in here again: still EOWNERDEAD for the next, and the repair is idempotent */
        sb_add(&sb_marks(r)->lock_takeovers, 1);
        code = sb_mutex_consistent(mutex);
        if (code != SB_OK) {
            sb_mutex_unlock(mutex);
        }
    }
    return code;
}

int sb_append_settle(sb_region *r, int64_t deadline_ns)
{
    int code = lock_append(r, deadline_ns);
    if (code == SB_OK) {
        sb_mutex_unlock(&r->control->locks.append);
    }
    return code;
}

int sb_append_read_offsets(sb_region *r, const uint32_t *queues, uint32_t count, int64_t deadline_ns, uint64_t *next)
{
    int code = lock_append(r, deadline_ns);
    if (code == SB_OK) {
        for (uint32_t i = 0; i < count; i++) {
            next[i] = sb_peek(&sb_queue_at(r, queues ? queues[i] : i)->next_offset);
        }
        sb_mutex_unlock(&r->control->locks.append);
    }
    return code;
}

int sb_append_read_ids(sb_region *r, uint64_t newest, uint64_t *next, sb_known_id *ids, uint32_t room, uint32_t *count,
                       int64_t deadline_ns)
{
    *count = 0;
    int code = lock_append(r, deadline_ns);
    if (code != SB_OK) {
        return code;
    }
    uint64_t all = sb_peek(&sb_marks(r)->ids_remembered), most = newest < r->limits.ids ? newest : r->limits.ids;
    uint64_t at = all > most && *next < all - most ? all - most : *next;
    for (uint32_t looks = 0; at < all && looks < room; looks++, at++) {
        *count += (uint32_t)sb_id_derived(r, at, &ids[*count]);
    }
    sb_mutex_unlock(&r->control->locks.append);
    *next = at;
    return at < all ? SB_OK : SB_END;
}

int sb_append_lock_check(sb_region *r)
{
    uint64_t before = sb_load(&sb_marks(r)->lock_takeovers);
    if (sb_mutex_holder(&r->control->locks.append) == 0 && sb_load(&r->control->undo.count) == 0) {
        return 0;
    }
    int code = sb_mutex_try(&r->control->locks.append);
    if (code == SB_OWNER_DEAD) {
        sb_undo_repair(r);
        sb_add(&sb_marks(r)->lock_takeovers, 1);
        code = sb_mutex_consistent(&r->control->locks.append);
    }
    if (code == SB_OK) {
        sb_mutex_unlock(&r->control->locks.append);
    }
    return sb_load(&sb_marks(r)->lock_takeovers) != before;
}

/* -- checks before any change ------------------------------------------------------------------------------------- */

static int may_append(sb_region *r, uint32_t options)
{
    sb_watermarks *m = sb_marks(r);
    uint64_t state = sb_load(&m->state);
    int system = (options & SB_APPEND_SYSTEM) != 0;
    if (sb_load(&m->fenced)) {
        return SB_FENCED;
    }
    if (sb_load(&m->store_state) == SB_STORE_READ_ONLY) {
        return SB_READ_ONLY;
    }
    return state == SB_STATE_RUNNING || (system && state != SB_STATE_STOPPED) ? SB_OK : SB_NOT_RUNNING;
}

static uint64_t item_bytes(const sb_item *item)
{
    return sb_padded((uint64_t)SB_RECORD_HEADER + item->tags_bytes + item->keys_bytes + item->properties_bytes + item->body_bytes);
}

/* A route may be older than the deletion of its topic; the slot may have another owner by now. */
static int queues_stand(const sb_region *r, const sb_item *items, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint32_t slot = items[i].queue_slot;
        if (slot == SB_NIL || (i && slot == items[i - 1].queue_slot)) {
            continue;
        }
        if (slot >= r->limits.queues || sb_load(&sb_queue_at(r, slot)->state) != SB_SLOT_LIVE ||
            sb_queue_at(r, slot)->topic_id != items[i].topic_id || sb_queue_at(r, slot)->topic_slot >= r->limits.topics) {
            return 0;
        }
    }
    return 1;
}

static int make_plan(sb_region *r, uint32_t options, plan *p, uint64_t *needed)
{
    sb_watermarks *m = sb_marks(r);
    const uint64_t segment = r->segment_bytes;
    p->tail = sb_load(&m->tail);
    uint64_t room = segment - p->tail % segment;
    p->filler = p->total > room ? room : 0; /* a group never crosses a segment's end (R18) */
    p->start = p->tail + p->filler;
    p->end = sb_record_next(p->start, p->total, segment);
    p->gap = p->end - p->start - p->total; /* too short for a header: zeros */
    int system = (options & SB_APPEND_SYSTEM) != 0;
    uint64_t usable = r->ring_bytes - (system ? 0 : r->limits.reserve_bytes);
    if (p->end - sb_load(&m->flushed) > usable) { /* SYNC: flushed. Only what is on the disk may be overwritten (R8) */
        *needed = p->end - usable;
        return SB_NO_SPACE;
    }
    if (p->end > sb_load(system ? &m->system_capacity : &m->user_capacity)) {
        return SB_NO_CAPACITY;
    }
    return SB_OK;
}

/* -- records ------------------------------------------------------------------------------------------------------ */

static uint8_t *put(uint8_t *to, const uint8_t *from, uint32_t bytes)
{
    if (bytes) {
        sb_racy_copy(to, from, bytes);
    }
    return to + bytes;
}

/* The two halves of a word in memory, in order. */
static uint64_t pair(uint32_t first, uint32_t second) { return first | (uint64_t)second << 32; }

static void write_record(const sb_region *r, const sb_item *item, uint64_t flushed, uint64_t group_bytes, uint8_t group_flags)
{
    uint32_t size = SB_RECORD_HEADER + item->tags_bytes + item->keys_bytes + item->properties_bytes + item->body_bytes;
    uint32_t kind = item->kind | (uint32_t)(item->flags | group_flags) << 8;
    /* Whole words: the CRC loads them at once, and a load of several smaller stores waits until all are in the cache. */
    uint64_t words[SB_RECORD_HEADER / 8] = {
        size,
        item->position,
        pair(r->epoch, (uint32_t)(item->position - flushed)),
        item->queue_offset,
        item->incarnation,
        item->sequence,
        (uint64_t)item->born_ns,
        pair(item->topic_id, item->queue_id | kind << 16),
        pair((uint32_t)group_bytes, item->tag_hash),
        pair(item->tags_bytes | item->keys_bytes << 16, item->properties_bytes | (uint32_t)item->attempts << 16),
    };
    sb_record h;
    memcpy(&h, words, sizeof h);
    h.crc = sb_record_crc(&h, item->payload_crc);
    uint8_t *at = r->ring + (item->position & r->ring_mask);
    sb_racy_copy(at, &h, sizeof h);
    at = put(at + sizeof h, item->tags, item->tags_bytes);
    at = put(at, item->keys, item->keys_bytes);
    at = put(at, item->properties, item->properties_bytes);
    at = put(at, item->body, item->body_bytes);
    sb_racy_zero(at, sb_padded(size) - size);
}

static void write_filler(const sb_region *r, const plan *p, uint64_t flushed)
{
    sb_record h = {.size = (uint32_t)p->filler, .position = p->tail, .epoch = r->epoch, .kind = SB_KIND_FILLER,
                   .unflushed = (uint32_t)(p->tail - flushed), .queue_id = SB_NO_QUEUE};
    h.crc = sb_record_crc(&h, 0);
    uint8_t *at = r->ring + (p->tail & r->ring_mask);
    sb_racy_copy(at, &h, sizeof h);
    sb_racy_zero(at + sizeof h, p->filler - sizeof h);
}

/* Records, index entries and queue counters; all beyond `tail`, so nobody sees any of it yet. */
static int write_all(sb_region *r, sb_item *items, uint32_t count, uint32_t options, const plan *p, uint64_t *needed)
{
    uint64_t flushed = sb_load(&sb_marks(r)->flushed), position = p->start;
    if (p->filler) {
        write_filler(r, p, flushed);
    }
    sb_queue *q = NULL;
    sb_word *last = NULL;
    uint64_t next = 0, bytes = 0;
    int code = SB_OK;
    for (uint32_t i = 0; i < count && code == SB_OK; i++) {
        sb_item *item = &items[i];
        item->position = position;
        if (item->queue_slot != SB_NIL) {
            sb_queue *own = sb_queue_at(r, item->queue_slot);
            if (own != q) { /* a run of records for one queue logs its counters once */
                if (q) {
                    code = sb_undo_store(r, &q->next_offset, next);
                    code = code == SB_OK ? sb_undo_store(r, &q->bytes, bytes) : code;
                }
                q = own;
                last = &sb_topic_at(r, q->topic_slot)->last_position;
                next = sb_peek(&q->next_offset);
                bytes = sb_peek(&q->bytes);
            }
            item->queue_offset = next;
            if (code == SB_OK) {
                code = sb_index_add(r, q, ((uint64_t)(item->queue_slot + 1) << 32) | q->topic_id, next, position, needed);
            }
            sb_store(last, position); /* a hint for the flusher's wake-ups: before tail, or it might miss them */
            next++;
            bytes += item->body_bytes;
        } else if (item->kind >= SB_KIND_TIMER && item->kind <= SB_KIND_RECALL) {
            sb_store(&sb_marks(r)->timed, position + 1); /* SYNC: timed. A hint, as above */
        }
        if (code == SB_OK && (options & SB_APPEND_DEDUP)) {
            code = sb_id_remember(r, item);
        }
        uint8_t group = count == 1 ? 0 : (uint8_t)(SB_FLAG_GROUP | (i + 1 == count ? SB_FLAG_GROUP_LAST : 0));
        write_record(r, item, flushed, count > 1 && i == 0 ? p->total : 0, group);
        position += item_bytes(item);
        if (i == count / 2) {
            SB_FAILPOINT(append_half_copied);
        }
    }
    sb_racy_zero(r->ring + (position & r->ring_mask), p->gap);
    SB_FAILPOINT(append_copied);
    if (code == SB_OK && q) {
        code = sb_undo_store(r, &q->next_offset, next); /* SYNC: queue-next */
        code = code == SB_OK ? sb_undo_store(r, &q->bytes, bytes) : code;
    }
    return code;
}

/* Claims are marked MOVING; plain words are only compared here and stored behind `tail`: nobody sees them before. */
static int begin_effects(sb_region *r, const sb_effect *effects, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        const sb_effect *e = &effects[i];
        uint64_t seen = e->expected;
        if (!e->claim && sb_load(e->word) != seen) {
            return SB_LOST;
        }
        int code = sb_undo_note(r, e->word, e->expected, e->desired, e->claim);
        if (code != SB_OK) {
            return code;
        }
        if (e->claim && !sb_cas(e->word, &seen, sb_claim_moving_form(e->expected))) {
            sb_store(&r->control->undo.count, i); /* not ours to put back */
            return SB_LOST;
        }
    }
    return SB_OK;
}

int sb_append(sb_region *r, uint32_t client, sb_item *items, uint32_t count, const sb_effect *effects, uint32_t effect_count,
              uint32_t options, int64_t deadline_ns, uint64_t *end, uint64_t *needed)
{
    sb_watermarks *m = sb_marks(r);
    sb_undo *u = &r->control->undo;
    plan p = {.total = 0};
    for (uint32_t i = 0; i < count; i++) {
        p.total += item_bytes(&items[i]);
    }
    const uint64_t quarter = (r->segment_bytes < r->ring_bytes ? r->segment_bytes : r->ring_bytes) / 4;
    const int is_send = count > 0 && items[count - 1].kind == SB_KIND_MESSAGE && !(options & SB_APPEND_SYSTEM);
    if (count == 0 || count > SB_GROUP_RECORDS_MAX || p.total > quarter + (is_send ? 0 : SB_COPY_BYTES)) {
        return SB_TOO_LARGE;
    }
    int code = lock_append(r, deadline_ns);
    if (code != SB_OK) {
        return code;
    }
    SB_FAILPOINT(append_locked);
    code = may_append(r, options);
    if (code == SB_OK && !queues_stand(r, items, count)) {
        code = SB_GONE;
    }
    if (code == SB_OK && (options & (SB_APPEND_RESEND | SB_APPEND_DEDUP))) {
        code = sb_id_find(r, client, &items[0], sb_load(&m->tail));
    }
    if (code == SB_OK) {
        code = make_plan(r, options, &p, needed);
    }
    if (code != SB_OK) {
        sb_mutex_unlock(&r->control->locks.append);
        return code;
    }
    sb_store(&u->tail, p.tail); /* count is 0: a kill up to here leaves nothing to repair */
    code = begin_effects(r, effects, effect_count);
    if (code == SB_OK) {
        if (sb_peek(&m->write_limit) < p.end) {
            sb_store(&m->write_limit, p.end); /* SYNC: write_limit. Before the first old byte is overwritten (R8) */
        }
        atomic_thread_fence(memory_order_release);
        SB_FAILPOINT(append_write_limit);
        code = write_all(r, items, count, options, &p, needed);
    }
    if (code != SB_OK) {
        sb_undo_repair(r); /* tail has not moved: everything goes back */
        sb_mutex_unlock(&r->control->locks.append);
        return code;
    }
    if (!(options & SB_APPEND_SYSTEM)) { /* ids in there are of older sends, whose results must not change */
        sb_id_note_client(r, client, items, count);
    }
    SB_FAILPOINT(append_effects);
    sb_store(&m->tail, p.end); /* SYNC: tail. From here on the append exists: a kill below is repaired forwards */
    SB_FAILPOINT(append_published);
    for (uint32_t i = 0; i < effect_count; i++) {
        sb_store(effects[i].word, effects[i].desired);
        SB_FAILPOINT(effect_stored);
    }
    SB_FAILPOINT(append_final);
    sb_store(&u->count, 0);
    SB_FAILPOINT(append_disarmed);
    sb_mutex_unlock(&r->control->locks.append);
    *end = p.end;
    return SB_OK;
}

/* A producer killed before or in here has published but woken nobody: the janitor's backstop does (R6). */
void sb_append_wake(sb_region *r, const sb_item *items, uint32_t count)
{
    SB_FAILPOINT(append_unlocked);
    sb_watermarks *m = sb_marks(r);
    sb_fence();
    uint32_t last = SB_NIL;
    uint64_t due = UINT64_MAX;
    for (uint32_t i = 0; i < count; i++) {
        if (items[i].kind == SB_KIND_TIMER && items[i].queue_offset < due) {
            due = items[i].queue_offset;
        }
        if (items[i].queue_slot == SB_NIL || sb_queue_at(r, items[i].queue_slot)->topic_slot == last) {
            continue;
        }
        last = sb_queue_at(r, items[i].queue_slot)->topic_slot;
        if (sb_peek(&m->visible_after) == SB_VISIBLE_APPEND) {
            (void)sb_wake_topic(r, last); /* first: somebody may be waiting for just this message, the workers may lag */
        }
    }
    (void)sb_worker_post(r, SB_ROLE_FLUSHER, sb_peek(&m->sync_flush) != 0);
    (void)sb_worker_post(r, SB_ROLE_DISPATCHER, 0);
    (void)sb_worker_post(r, SB_ROLE_REPLICATOR, 0);
    if (due != UINT64_MAX && due < sb_load(&m->timer_look)) {
        (void)sb_worker_post(r, SB_ROLE_SCHEDULER, 1);
    }
}
