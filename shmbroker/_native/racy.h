/* racy.h: copies of ring bytes. A reader may copy what a writer is overwriting; write_limit decides afterwards whether
 * the copy is believed (R8). The race is intended, so ThreadSanitizer, and only it, is given byte-wise atomics. */
#ifndef SHMBROKER_RACY_H
#define SHMBROKER_RACY_H

#include <stdint.h>
#include <string.h>

#if defined(__SANITIZE_THREAD__)

static inline void sb_racy_copy(void *to, const void *from, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++) {
        uint8_t byte = __atomic_load_n((const uint8_t *)from + i, __ATOMIC_RELAXED);
        __atomic_store_n((uint8_t *)to + i, byte, __ATOMIC_RELAXED);
    }
}

static inline void sb_racy_zero(void *to, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++) {
        __atomic_store_n((uint8_t *)to + i, 0, __ATOMIC_RELAXED);
    }
}

#else

static inline void sb_racy_copy(void *to, const void *from, uint64_t bytes) { memcpy(to, from, bytes); }
static inline void sb_racy_zero(void *to, uint64_t bytes) { memset(to, 0, bytes); }

#endif
#endif
