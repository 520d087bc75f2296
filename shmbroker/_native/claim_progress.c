/* claim_progress.c: a claim table as runs of offsets, and back (R14). Drawn in layout.h at sb_progress. */
#include <stdlib.h>
#include <string.h>

#include "claim.h"
#include "overflow.h"

/* ---- table -> runs ------------------------------------------------------------------------------------------- */

typedef struct {
    sb_progress_run *run;
    uint32_t count, room;
} run_list;

static void add(run_list *list, uint64_t offset, uint16_t attempts, uint16_t kind)
{
    sb_progress_run *last = list->count && list->count <= list->room ? &list->run[list->count - 1] : NULL;
    if (last && last->first + last->count == offset && last->attempts == attempts && last->kind == kind) {
        last->count++;
        return;
    }
    if (list->count < list->room) {
        list->run[list->count] = (sb_progress_run){.first = offset, .count = 1, .attempts = attempts, .kind = kind};
    }
    list->count++;
}

static int by_offset(const void *a, const void *b)
{
    uint64_t x = ((const sb_progress_run *)a)->first, y = ((const sb_progress_run *)b)->first;
    return (x > y) - (x < y);
}

/* An overflow entry's claim; ACKED if the entry was freed since it was found, whatever it has been used for since. */
static uint64_t overflow_claim(const sb_place *place)
{
    uint64_t w = sb_load(place->word) ^ place->binding;
    uint64_t taken = sb_load(&place->entry->owner) >> 32; /* counts the reservations */
    return taken == place->owner >> 32 ? w : SB_CLAIM_ACKED;
}

/* The claim of an offset whose word in the window is no longer about it, because the base is passing or has passed it:
 * it lies in the overflow table, or it is acked. */
static uint64_t claim_behind(const sb_region *r, uint32_t table, uint64_t life, uint64_t offset)
{
    sb_place place;
    uint64_t w = SB_CLAIM_ACKED;
    if (sb_load(&sb_claims_at(r, table)->overflowed) && sb_overflow_find(r, table, offset, &place) == SB_OK) {
        w = overflow_claim(&place);
    }
    return sb_claim_state(w) == SB_CLAIM_ACKED ? sb_claim_word(SB_CLAIM_ACKED, 0, 0, 0, sb_claim_lap(r, life, offset)) : w;
}

/* Others claim, ack and move the base meanwhile. What was acked before this was called is called acked, whatever they
 * do: a durable ack waits for this record and no other. The base is loaded before the overflow table is walked: a claim
 * that moves there meanwhile is then above this base, and looked up where the window says so. */
uint32_t sb_claims_runs(sb_region *r, uint32_t table, uint64_t *base_out, sb_progress_run *runs, uint32_t room)
{
    sb_claims *c = sb_claims_at(r, table);
    run_list list = {.run = runs, .room = room};
    const uint64_t life = sb_load(&c->state), base = sb_load(&c->base);
    uint64_t offset;
    sb_place place;
    *base_out = base;
    for (uint32_t i = 0; sb_load(&c->overflowed) && i < r->limits.overflow_claims; i++) {
        if (sb_overflow_live(r, table, i, &offset, &place) && offset < base) {
            uint64_t w = overflow_claim(&place);
            if (sb_claim_state(w) != SB_CLAIM_ACKED) {
                add(&list, offset, (uint16_t)sb_claim_attempts(w), SB_RUN_UNACKED);
            }
        }
    }
    if (list.count > room) {
        return list.count + r->limits.claim_window; /* enough, whatever the window says */
    }
    qsort(runs, list.count, sizeof *runs, by_offset);
    run_list sorted = {.run = runs, .room = room};
    for (uint32_t i = 0; i < list.count; i++) { /* join neighbours; never writes behind what it reads */
        sb_progress_run one = runs[i];
        for (uint32_t n = 0; n < one.count; n++) {
            add(&sorted, one.first + n, one.attempts, one.kind);
        }
    }
    for (offset = base; offset < base + r->limits.claim_window; offset++) {
        uint64_t w = sb_load(sb_claim_place(r, c, offset));
        if (sb_claim_left_window(r, life, w, offset) || sb_load(&c->base) > offset) {
            w = claim_behind(r, table, life, offset);
        }
        if (sb_claim_state(w) == SB_CLAIM_ACKED) {
            if (sb_claim_deadline(w) == sb_claim_lap(r, life, offset)) { /* not of the next lap */
                add(&sorted, offset, 0, SB_RUN_ACKED);
            }
        } else if (sb_claim_attempts(w)) {
            add(&sorted, offset, (uint16_t)sb_claim_attempts(w), SB_RUN_UNACKED);
        }
    }
    return sorted.count;
}

/* Insert into what is sorted by offset; of more than `room` the oldest stay. */
static void keep_oldest(sb_progress_run *runs, uint32_t *count, uint32_t room, sb_progress_run run)
{
    if (*count == room && runs[room - 1].first <= run.first) {
        return;
    }
    uint32_t i = *count < room ? (*count)++ : room - 1;
    for (; i > 0 && runs[i - 1].first > run.first; i--) {
        runs[i] = runs[i - 1];
    }
    runs[i] = run;
}

/* Replay merges it with whatever else there is about this table, or makes the table of it if there is nothing: so it must
 * not call anything acked that is not. Below its base that is what lies in the overflow table: named here, or, when it is
 * too much, kept out by a base that is lower than the table's. To say less than is acked is never wrong. */
void sb_claims_one_ack(const sb_region *r, uint32_t table, uint64_t offset, sb_one_ack *body)
{
    sb_claims *c = sb_claims_at(r, table);
    sb_progress_run oldest[SB_ONE_ACK_RUNS] = {{.first = 0}};
    uint32_t count = 0;
    uint64_t base = sb_load(&c->base), other; /* before the entries, as in sb_claims_runs */
    sb_place place;
    for (uint32_t i = 0; sb_load(&c->overflowed) && i < r->limits.overflow_claims; i++) {
        if (sb_overflow_live(r, table, i, &other, &place) && other < base && other != offset) {
            uint64_t w = overflow_claim(&place);
            if (sb_claim_state(w) != SB_CLAIM_ACKED) {
                keep_oldest(oldest, &count, SB_ONE_ACK_RUNS,
                            (sb_progress_run){.first = other, .count = 1, .attempts = (uint16_t)sb_claim_attempts(w), .kind = SB_RUN_UNACKED});
            }
        }
    }
    if (count == SB_ONE_ACK_RUNS) {
        base = oldest[--count].first;
    }
    memcpy(body->run, oldest, sizeof oldest);
    if (offset >= base) {
        body->run[count++] = (sb_progress_run){.first = offset, .count = 1, .kind = SB_RUN_ACKED};
    }
    body->progress = (sb_progress){.group_id = c->group_id, .topic_id = c->topic_id, .queue_id = (uint16_t)c->queue_id,
                                   .version = SB_PROGRESS_VERSION, .base = base, .run_count = count,
                                   .reset_generation = (uint32_t)sb_load(&c->reset_generation)};
}

uint32_t sb_claims_held(const sb_region *r, uint32_t table, uint64_t *oldest, uint32_t *holder)
{
    sb_claims *c = sb_claims_at(r, table);
    const uint64_t base = sb_load(&c->base);
    uint32_t held = 0;
    uint64_t offset;
    sb_place place;
    for (uint32_t i = 0; sb_load(&c->overflowed) && i < r->limits.overflow_claims; i++) {
        if (sb_overflow_live(r, table, i, &offset, &place)) {
            uint64_t w = sb_load(place.word) ^ place.binding;
            if (sb_claim_state(w) == SB_CLAIM_HELD && (held++ == 0 || offset < *oldest)) {
                *oldest = offset;
                *holder = sb_claim_holder(w) - 1;
            }
        }
    }
    for (offset = base; offset < base + r->limits.claim_window; offset++) {
        uint64_t w = sb_load(sb_claim_place(r, c, offset));
        if (sb_claim_state(w) == SB_CLAIM_HELD && held++ == 0) {
            *oldest = offset;
            *holder = sb_claim_holder(w) - 1;
        }
    }
    return held;
}

/* ---- runs -> table (recovery: nobody else is attached) ------------------------------------------------------- */

static const sb_progress_run *find_run(const sb_progress *p, const sb_progress_run *runs, uint64_t offset)
{
    uint32_t low = 0, high = p->run_count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (runs[middle].first + runs[middle].count <= offset) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < p->run_count && runs[low].first <= offset ? &runs[low] : NULL;
}

static int says_acked(const sb_progress *p, const sb_progress_run *runs, uint64_t offset)
{
    const sb_progress_run *run = find_run(p, runs, offset);
    return run ? run->kind == SB_RUN_ACKED : offset < p->base;
}

static uint32_t says_attempts(const sb_progress *p, const sb_progress_run *runs, uint64_t offset)
{
    const sb_progress_run *run = find_run(p, runs, offset);
    return run && run->kind == SB_RUN_UNACKED ? run->attempts : 0;
}

static uint64_t free_word(const sb_region *r, const sb_claims *c, uint64_t offset, uint32_t attempts, uint64_t before)
{
    attempts = attempts > sb_claim_attempts(before) ? attempts : sb_claim_attempts(before);
    return sb_claim_word(SB_CLAIM_FREE, 0, attempts < SB_CLAIM_ATTEMPTS_MAX ? attempts : SB_CLAIM_ATTEMPTS_MAX,
                         sb_claim_generation(before), sb_claim_lap(r, sb_load(&c->state), offset));
}

static int put_overflow(sb_region *r, uint32_t table, uint64_t offset, uint32_t attempts, uint64_t before)
{
    uint32_t i;
    if (sb_overflow_reserve(r, table, offset, &i) != SB_OK) {
        return SB_TABLE_FULL;
    }
    sb_overflow *e = sb_overflow_at(r, i);
    sb_store(&e->offset, offset);
    sb_store(&e->claim, free_word(r, sb_claims_at(r, table), offset, attempts, before) ^ sb_claim_binding(table, offset));
    sb_overflow_publish(r, table, i);
    sb_store(&sb_claims_at(r, table)->moving_slot, 0);
    return SB_OK;
}

static int runs_in_order(const sb_progress *p, const sb_progress_run *runs)
{
    uint64_t behind = 0;
    for (uint32_t i = 0; i < p->run_count; i++) {
        int known = runs[i].kind == SB_RUN_ACKED || runs[i].kind == SB_RUN_UNACKED;
        if (!known || runs[i].first < behind || runs[i].count == 0 || runs[i].first + runs[i].count < runs[i].first ||
            (runs[i].kind == SB_RUN_ACKED && runs[i].first < p->base)) {
            return 0;
        }
        behind = runs[i].first + runs[i].count;
    }
    return 1;
}

/* Raise the base: what is unacked on both sides below the new one goes to the overflow table. `old_end`: end of the old
 * window; `fresh`: the table said nothing before, so below its base only the record counts. */
static int raise_base(sb_region *r, uint32_t table, const sb_progress *p, const sb_progress_run *runs, int fresh)
{
    sb_claims *c = sb_claims_at(r, table);
    const uint64_t life = sb_load(&c->state), old = sb_load(&c->base), old_end = old + r->limits.claim_window;
    int code = SB_OK;
    for (uint32_t i = 0; i < p->run_count && code == SB_OK; i++) {
        uint64_t end = runs[i].first + runs[i].count;
        for (uint64_t o = runs[i].first; o < end && o < p->base && code == SB_OK; o++) {
            uint64_t w = o >= old && o < old_end ? sb_load(sb_claim_place(r, c, o)) : 0;
            if ((o >= old || fresh) && sb_claim_state(w) != SB_CLAIM_ACKED) {
                code = put_overflow(r, table, o, runs[i].attempts, w);
            }
        }
    }
    for (uint64_t o = p->base; o < p->base + r->limits.claim_window; o++) {
        if (o >= old_end) {
            sb_word *word = sb_claim_place(r, c, o);
            sb_store(word, sb_claim_word(SB_CLAIM_FREE, 0, 0, sb_claim_generation(sb_load(word)), sb_claim_lap(r, life, o)));
        }
    }
    sb_store(&c->pending_base, p->base);
    sb_store(&c->base, p->base);
    return code;
}

static void merge_overflow(sb_region *r, uint32_t table, const sb_progress *p, const sb_progress_run *runs)
{
    uint64_t offset;
    sb_place place;
    for (uint32_t i = 0; i < r->limits.overflow_claims; i++) {
        if (!sb_overflow_live(r, table, i, &offset, &place)) {
            continue;
        }
        if (says_acked(p, runs, offset)) {
            sb_overflow_free(r, table, &place);
        } else {
            uint64_t w = sb_load(place.word) ^ place.binding;
            sb_store(place.word, free_word(r, sb_claims_at(r, table), offset, says_attempts(p, runs, offset), w) ^ place.binding);
        }
    }
}

int sb_claims_merge(sb_region *r, uint32_t table, int created, const sb_progress *p, const sb_progress_run *runs)
{
    sb_claims *c = sb_claims_at(r, table);
    uint64_t generation = sb_load(&c->reset_generation);
    if (!runs_in_order(p, runs)) {
        return SB_INVALID;
    }
    if (!created && p->reset_generation < generation) {
        return SB_OK; /* of before a reset */
    }
    int fresh = created || p->reset_generation > generation;
    if (fresh) {
        sb_claims_format(r, table, p->base);
        sb_store(&c->reset_generation, p->reset_generation);
    } else {
        merge_overflow(r, table, p, runs);
    }
    int code = fresh || p->base > sb_load(&c->base) ? raise_base(r, table, p, runs, fresh) : SB_OK;
    const uint64_t base = sb_load(&c->base), end = base + r->limits.claim_window;
    for (uint32_t i = 0; i < p->run_count; i++) { /* acks beyond a window made smaller are lost: delivered again */
        for (uint64_t o = runs[i].first > base ? runs[i].first : base; o < runs[i].first + runs[i].count && o < end; o++) {
            sb_word *word = sb_claim_place(r, c, o);
            uint64_t w = sb_load(word);
            if (sb_claim_state(w) != SB_CLAIM_ACKED) {
                uint64_t unacked = free_word(r, c, o, runs[i].attempts, w);
                sb_store(word, runs[i].kind == SB_RUN_ACKED ? unacked | SB_CLAIM_ACKED : unacked);
            }
        }
    }
    sb_store(&c->next, sb_claims_next_word(sb_load(&c->state), base));
    sb_store(&c->released, 1);
    sb_claim_base(r, table);
    return code;
}
