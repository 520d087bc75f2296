/* region.h: the mapped memory of one broker, and checked access to its tables. */
#ifndef SHMBROKER_REGION_H
#define SHMBROKER_REGION_H

#include "codes.h"
#include "layout.h"

typedef struct {
    uint8_t *base;       /* control segment */
    sb_control *control; /* = base */
    uint8_t *ring;       /* mapped twice: [0, 2 * ring_bytes) */
    uint64_t ring_bytes, ring_mask, control_bytes, segment_bytes;
    sb_limits limits;    /* private copy, checked at attach: shared memory cannot move our tables afterwards */
    uint32_t epoch;
} sb_region;

uint64_t sb_fingerprint(void);
uint64_t sb_control_size(sb_limits *limits); /* fills the offsets; 0: limits out of range */
/* SB_OK | SB_INVALID (sizes) | SB_BROKEN (mmap failed, errno) */
int sb_region_map(sb_region *region, int control_fd, int ring_fd, int create);
int sb_region_format(sb_region *region, const sb_header *header, const sb_limits *limits, uint64_t tail, uint32_t epoch);
int sb_region_check(sb_region *region); /* SB_OK | SB_INVALID: header or limits make no sense */
void sb_region_unmap(sb_region *region);

static inline sb_watermarks *sb_marks(const sb_region *r) { return &r->control->marks; }
static inline sb_worker *sb_worker_at(const sb_region *r, uint32_t i) { return (sb_worker *)(r->base + r->limits.workers_at) + i; }
static inline sb_client *sb_client_at(const sb_region *r, uint32_t i) { return (sb_client *)(r->base + r->limits.clients_at) + i; }
static inline sb_waiter *sb_waiter_at(const sb_region *r, uint32_t i) { return (sb_waiter *)(r->base + r->limits.waiters_at) + i; }
static inline sb_topic *sb_topic_at(const sb_region *r, uint32_t i) { return (sb_topic *)(r->base + r->limits.topics_at) + i; }
static inline sb_queue *sb_queue_at(const sb_region *r, uint32_t i) { return (sb_queue *)(r->base + r->limits.queues_at) + i; }
static inline sb_group *sb_group_at(const sb_region *r, uint32_t i) { return (sb_group *)(r->base + r->limits.groups_at) + i; }
static inline sb_claims *sb_claims_at(const sb_region *r, uint32_t i)
{
    return (sb_claims *)(r->base + r->limits.claims_at + (uint64_t)i * r->limits.claim_stride);
}
static inline sb_overflow *sb_overflow_at(const sb_region *r, uint32_t i) { return (sb_overflow *)(r->base + r->limits.overflow_at) + i; }
static inline sb_id *sb_id_at(const sb_region *r, uint32_t i) { return (sb_id *)(r->base + r->limits.ids_at) + i; }
static inline sb_block *sb_block_at(const sb_region *r, uint32_t i) { return (sb_block *)(r->base + r->limits.blocks_at) + i; }
static inline uint64_t sb_word_offset(const sb_region *r, const sb_word *w) { return (uint64_t)((const uint8_t *)w - r->base); }

/* Loads and stores, named so that the code reads as its reasoning. */
static inline uint64_t sb_load(const sb_word *w) { return atomic_load_explicit(w, memory_order_acquire); }
/* Behind all that the caller has read: for a copy that this word says afterwards whether to believe (R8). */
static inline uint64_t sb_load_last(const sb_word *w)
{
    atomic_thread_fence(memory_order_acquire);
    return sb_load(w);
}
static inline uint64_t sb_peek(const sb_word *w) { return atomic_load_explicit(w, memory_order_relaxed); }
static inline void sb_store(sb_word *w, uint64_t v) { atomic_store_explicit(w, v, memory_order_release); }
static inline int sb_cas(sb_word *w, uint64_t *expected, uint64_t v)
{
    return atomic_compare_exchange_strong_explicit(w, expected, v, memory_order_acq_rel, memory_order_acquire);
}
static inline void sb_add(sb_word *w, uint64_t n) { atomic_fetch_add_explicit(w, n, memory_order_relaxed); }
static inline void sb_fence(void) { atomic_thread_fence(memory_order_seq_cst); }
static inline void sb_fence_behind_cas(void) /* sb_fence() behind a CAS or an exchange, which is one by itself on x86 */
{
#if defined(__x86_64__)
    atomic_signal_fence(memory_order_seq_cst);
#else
    sb_fence();
#endif
}
static inline void sb_pause(void) /* in a loop that waits for another processor */
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
static inline void sb_raise(sb_word *w, uint64_t v) /* grow-only */
{
    uint64_t now = sb_load(w);
    while (now < v && !sb_cas(w, &now, v)) {
    }
}

#endif
