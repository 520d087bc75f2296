/* region.c: see region.h. Sizes, mapping, formatting; and the checks before anything in the memory is believed. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "region.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ipc.h"

static uint64_t round_up(uint64_t n, uint64_t unit) { return (n + unit - 1) / unit * unit; }

/* Any change of a structure, of the C library's types, or of a version changes it. */
uint64_t sb_fingerprint(void)
{
    const uint64_t parts[] = {
        SB_LAYOUT_VERSION, SB_RECORD_VERSION, sizeof(sb_header), sizeof(sb_limits), sizeof(sb_control), sizeof(sb_record),
        sizeof(sb_worker), sizeof(sb_client), sizeof(sb_waiter), sizeof(sb_topic), sizeof(sb_queue), sizeof(sb_block),
        sizeof(sb_group), sizeof(sb_claims), sizeof(sb_overflow), sizeof(sb_id), sizeof(sem_t), sizeof(pthread_mutex_t),
        offsetof(sb_control, marks), offsetof(sb_control, locks), offsetof(sb_control, undo), SB_BLOCK_ENTRIES, SB_UNDO_MAX,
        offsetof(sb_watermarks, state), offsetof(sb_watermarks, lock_takeovers), offsetof(sb_claims, recorded),
        offsetof(sb_topic, last_position), offsetof(sb_queue, bytes),
    };
    uint64_t hash = 0xcbf29ce484222325ull; /* FNV-1a */
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        hash = (hash ^ parts[i]) * 0x100000001b3ull;
    }
    return hash;
}

static int in_range(uint32_t value, uint32_t least, uint32_t most) { return value >= least && value <= most; }

uint64_t sb_control_size(sb_limits *l)
{
    if (!in_range(l->clients, 1, 4094) || !in_range(l->waiters, 2, 64 * SB_WAITER_WORDS) || !in_range(l->topics, 1, 65535) ||
        !in_range(l->queues, 1, 1u << 20) || !in_range(l->groups, 1, 65535) || !in_range(l->claim_tables, 1, 1u << 20) ||
        !in_range(l->claim_window, 64, 1u << 20) || (l->claim_window & (l->claim_window - 1)) ||
        !in_range(l->overflow_claims, 1, 1u << 20) || !in_range(l->ids, 64, 1u << 24) || (l->ids & (l->ids - 1)) ||
        !in_range(l->blocks, l->queues + 1, 1u << 26)) {
        return 0;
    }
    uint64_t at = round_up(sizeof(sb_control), SB_LINE);
    l->workers_at = at;
    at += SB_ROLES_MAX * sizeof(sb_worker);
    l->clients_at = at;
    at += (uint64_t)l->clients * sizeof(sb_client);
    l->waiters_at = at;
    at += (uint64_t)l->waiters * sizeof(sb_waiter);
    l->topics_at = at;
    at += (uint64_t)l->topics * sizeof(sb_topic);
    l->queues_at = at;
    at += (uint64_t)l->queues * sizeof(sb_queue);
    l->groups_at = at;
    at += (uint64_t)l->groups * sizeof(sb_group);
    l->claims_at = at;
    l->claim_stride = round_up(sizeof(sb_claims) + (uint64_t)l->claim_window * sizeof(sb_word), SB_LINE);
    at += (uint64_t)l->claim_tables * l->claim_stride;
    l->overflow_at = at;
    at += (uint64_t)l->overflow_claims * sizeof(sb_overflow);
    l->ids_at = at;
    at += (uint64_t)l->ids * sizeof(sb_id);
    l->blocks_at = round_up(at, SB_LINE);
    l->end_at = l->blocks_at + (uint64_t)l->blocks * sizeof(sb_block); /* kept, since a page may hide a wrong number of blocks */
    return round_up(l->end_at, 4096);
}

/* The ring twice back to back: one reservation of address space, two mappings of the same object over it. */
static uint8_t *map_twice(int fd, uint64_t bytes)
{
    uint8_t *base = mmap(NULL, 2 * bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        return NULL;
    }
    for (uint64_t half = 0; half < 2; half++) {
        if (mmap(base + half * bytes, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
            (void)munmap(base, 2 * bytes);
            return NULL;
        }
    }
    return base;
}

int sb_region_map(sb_region *r, int control_fd, int ring_fd, int create)
{
    struct stat control_stat, ring_stat;
    memset(r, 0, sizeof *r);
    if (fstat(control_fd, &control_stat) || fstat(ring_fd, &ring_stat)) {
        return SB_BROKEN;
    }
    r->control_bytes = (uint64_t)control_stat.st_size;
    r->ring_bytes = (uint64_t)ring_stat.st_size;
    r->ring_mask = r->ring_bytes - 1;
    if (r->control_bytes < sizeof(sb_control) || r->ring_bytes < 65536 || r->ring_bytes > 1ull << 31 /* record.unflushed has 32 bits */ || (r->ring_bytes & r->ring_mask)) {
        return SB_INVALID;
    }
    r->base = mmap(NULL, r->control_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, control_fd, 0);
    if (r->base == MAP_FAILED) {
        r->base = NULL;
        return SB_BROKEN;
    }
    r->control = (sb_control *)r->base;
    r->ring = map_twice(ring_fd, r->ring_bytes);
    if (!r->ring) {
        sb_region_unmap(r);
        return SB_BROKEN;
    }
    if (!create) {
        int code = sb_region_check(r);
        if (code != SB_OK) {
            sb_region_unmap(r);
            return code;
        }
    }
    return SB_OK;
}

void sb_region_unmap(sb_region *r)
{
    if (r->ring) {
        (void)munmap(r->ring, 2 * r->ring_bytes);
    }
    if (r->base) {
        (void)munmap(r->base, r->control_bytes);
    }
    memset(r, 0, sizeof *r);
}

/* The largest group, a filler before it and a gap behind it fit beside the reserve: else its wait for room never ends. */
static int sizes_fit(const sb_limits *l, uint64_t ring_bytes, uint64_t segment_bytes)
{
    return segment_bytes >= 65536 && segment_bytes % 4096 == 0 && l->reserve_bytes <= ring_bytes / 4 &&
           (uint64_t)l->max_message_bytes * 4 <= ring_bytes;
}

/* May a record begin at `tail`? Else a filler would be written over what lies behind it. */
static int tail_fits(uint64_t tail, uint64_t segment_bytes)
{
    return tail % SB_RECORD_ALIGN == 0 && segment_bytes - tail % segment_bytes >= SB_RECORD_HEADER;
}

int sb_region_check(sb_region *r)
{
    const sb_header *h = &r->control->header;
    sb_limits given = r->control->limits;
    sb_limits computed = given;
    if (h->magic != SB_MAGIC || h->layout_version != SB_LAYOUT_VERSION || h->fingerprint != sb_fingerprint() ||
        h->ring_bytes != r->ring_bytes || h->control_bytes != r->control_bytes) {
        return SB_INVALID;
    }
    if (sb_control_size(&computed) != r->control_bytes || memcmp(&given, &computed, sizeof given) != 0 ||
        !sizes_fit(&given, r->ring_bytes, h->segment_bytes)) {
        return SB_INVALID;
    }
    uint64_t flushed = sb_load(&r->control->marks.flushed), tail = sb_load(&r->control->marks.tail); /* both may be moving */
    if (flushed > tail || tail - flushed > 2 * r->ring_bytes || !tail_fits(tail, h->segment_bytes)) {
        return SB_INVALID;
    }
    r->limits = given;
    r->segment_bytes = h->segment_bytes;
    r->epoch = (uint32_t)sb_load(&r->control->marks.epoch);
    return SB_OK;
}

int sb_region_format(sb_region *r, const sb_header *header, const sb_limits *limits, uint64_t tail, uint32_t epoch)
{
    sb_limits l = *limits;
    if (sb_control_size(&l) != r->control_bytes || !sizes_fit(&l, r->ring_bytes, header->segment_bytes) ||
        !tail_fits(tail, header->segment_bytes)) {
        return SB_INVALID;
    }
    sb_control *c = r->control;
    memset(r->base, 0, r->control_bytes);
    c->limits = l;
    r->limits = l;
    r->segment_bytes = header->segment_bytes;
    r->epoch = epoch;
    sb_watermarks *m = &c->marks;
    sb_word *at_tail[] = {&m->tail, &m->write_limit, &m->flushed, &m->dispatched, &m->replicated, &m->indexed, &m->kept, &m->snapshot,
                          &m->user_capacity, &m->system_capacity};
    for (size_t i = 0; i < sizeof at_tail / sizeof at_tail[0]; i++) {
        sb_store(at_tail[i], tail);
    }
    sb_store(&m->epoch, epoch);
    sb_store(&m->next_topic_id, 1);
    sb_store(&m->next_group_id, 1);
    int bad = sb_mutex_init(&c->locks.append) | sb_mutex_init(&c->locks.definition);
    for (uint32_t i = 0; i < SB_ROLES_MAX; i++) {
        bad |= sem_init(&sb_worker_at(r, i)->wake, 1, 0);
    }
    for (uint32_t i = 0; i < l.waiters; i++) {
        bad |= sem_init(&sb_waiter_at(r, i)->wake, 1, 0);
    }
    for (uint32_t i = 0; i < l.claim_tables; i++) {
        bad |= sb_mutex_init(&sb_claims_at(r, i)->lock);
    }
    for (uint32_t i = 0; i < l.queues; i++) {
        sb_queue *q = sb_queue_at(r, i);
        sb_store(&q->oldest_block, SB_NIL);
        sb_store(&q->newest_block, SB_NIL);
        sb_store(&q->next_in_topic, SB_NIL);
    }
    for (uint32_t i = 0; i < l.topics; i++) {
        sb_store(&sb_topic_at(r, i)->first_queue, SB_NIL);
    }
    /* All index blocks are reusable at once: the list of full blocks starts with the fresh ones. */
    for (uint32_t i = 0; i < l.blocks; i++) {
        sb_block *b = sb_block_at(r, i);
        sb_store(&b->next, SB_NIL);
        sb_store(&b->next_full, i + 1 < l.blocks ? i + 1 : SB_NIL);
    }
    sb_store(&c->block_list.oldest_full, 0);
    sb_store(&c->block_list.newest_full, l.blocks - 1);
    sb_store(&c->block_list.listed, l.blocks);
    if (bad) {
        return SB_BROKEN;
    }
    sb_header h = *header;
    h.magic = 0;
    h.layout_version = SB_LAYOUT_VERSION;
    h.record_version = SB_RECORD_VERSION;
    h.fingerprint = sb_fingerprint();
    h.control_bytes = r->control_bytes;
    h.ring_bytes = r->ring_bytes;
    h.tail_at = sb_word_offset(r, &m->tail);
    h.flushed_at = sb_word_offset(r, &m->flushed);
    h.undo_at = offsetof(sb_control, undo);
    h.lock_at = offsetof(sb_control, locks.append);
    c->header = h;
    sb_store(&m->state, SB_STATE_STARTING);
    atomic_thread_fence(memory_order_release);
    *(volatile uint64_t *)&c->header.magic = SB_MAGIC; /* last: a half-formatted object is never attached */
    return SB_OK;
}
