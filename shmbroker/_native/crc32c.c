/* crc32c.c: CRC-32C (Castagnoli). The processor's instruction where it has one, eight tables where it has not. */
#include "record.h"

#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define HARDWARE_NAME "sse4.2"
#define HARDWARE_TARGET __attribute__((target("sse4.2")))
#define HARDWARE_WORD(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define HARDWARE_BYTE(crc, byte) (_mm_crc32_u8((crc), (byte)))
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1u << 7)
#endif
#define HARDWARE_NAME "armv8"
#define HARDWARE_TARGET __attribute__((target("+crc")))
#define HARDWARE_WORD(crc, word) (__crc32cd((crc), (word)))
#define HARDWARE_BYTE(crc, byte) (__crc32cb((crc), (byte)))
#endif

#define POLYNOMIAL 0x82f63b78u /* bit-reversed: bit 31 is x^0 */

static uint32_t slice[8][256]; /* slice[k][b]: byte b followed by k zero bytes */

static void build_slices(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ ((crc & 1u) ? POLYNOMIAL : 0u);
        }
        slice[0][byte] = crc;
    }
    for (uint32_t byte = 0; byte < 256; byte++) {
        for (int k = 1; k < 8; k++) {
            slice[k][byte] = (slice[k - 1][byte] >> 8) ^ slice[0][slice[k - 1][byte] & 0xffu];
        }
    }
}

static uint64_t load_word(const uint8_t *at) {
    uint64_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

static uint32_t portable(uint32_t start, const uint8_t *at, size_t size) {
    uint32_t crc = ~start;
    for (; size >= 8; at += 8, size -= 8) {
        uint64_t word = load_word(at) ^ crc;
        crc = 0;
        for (int k = 7; k >= 0; k--, word >>= 8) {
            crc ^= slice[k][word & 0xffu];
        }
    }
    for (; size != 0; at++, size--) {
        crc = (crc >> 8) ^ slice[0][(crc ^ *at) & 0xffu];
    }
    return ~crc;
}

#ifdef HARDWARE_NAME
/* One instruction takes 8 bytes but answers after 3 cycles, so one stream uses a third of the machine. Longer data is
 * cut into three neighbouring blocks whose CRCs are made side by side and then joined: crc(A B) = crc(A) * x^(8|B|)
 * + crc(B), and multiplying by that constant is four table look-ups. */
#define LONG_BLOCK 1024u
#define SHORT_BLOCK 168u

typedef struct {
    uint32_t table[4][256];
} shift;

static shift long_shift, short_shift;

/* a * b modulo the polynomial */
static uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
        product ^= (a & bit) ? b : 0u;
        b = (b >> 1) ^ ((b & 1u) ? POLYNOMIAL : 0u);
    }
    return product;
}

static void build_shift(shift *s, uint32_t bytes) {
    uint32_t power = 1u << 31; /* x^0 */
    for (uint32_t i = 0; i < bytes; i++) {
        power = multiply(power, 1u << 23); /* x^8 */
    }
    for (uint32_t k = 0; k < 4; k++) {
        for (uint32_t byte = 0; byte < 256; byte++) {
            s->table[k][byte] = multiply(power, byte << (8 * k));
        }
    }
}

static uint32_t shifted(const shift *s, uint32_t crc) {
    return s->table[0][crc & 0xffu] ^ s->table[1][(crc >> 8) & 0xffu] ^ s->table[2][(crc >> 16) & 0xffu] ^
           s->table[3][crc >> 24];
}

HARDWARE_TARGET static inline __attribute__((always_inline)) uint32_t three_blocks(uint32_t crc, const uint8_t *at,
                                                                                   size_t block, const shift *s) {
    uint32_t second = 0, third = 0;
    for (const uint8_t *end = at + block; at < end; at += 8) {
        crc = HARDWARE_WORD(crc, load_word(at));
        second = HARDWARE_WORD(second, load_word(at + block));
        third = HARDWARE_WORD(third, load_word(at + 2 * block));
    }
    return shifted(s, shifted(s, crc) ^ second) ^ third;
}

HARDWARE_TARGET static uint32_t hardware(uint32_t start, const uint8_t *at, size_t size) {
    uint32_t crc = ~start;
    for (; size >= 3 * LONG_BLOCK; at += 3 * LONG_BLOCK, size -= 3 * LONG_BLOCK) {
        crc = three_blocks(crc, at, LONG_BLOCK, &long_shift);
    }
    for (; size >= 3 * SHORT_BLOCK; at += 3 * SHORT_BLOCK, size -= 3 * SHORT_BLOCK) {
        crc = three_blocks(crc, at, SHORT_BLOCK, &short_shift);
    }
    for (; size >= 8; at += 8, size -= 8) {
        crc = HARDWARE_WORD(crc, load_word(at));
    }
    for (; size != 0; at++, size--) {
        crc = HARDWARE_BYTE(crc, *at);
    }
    return ~crc;
}

static int hardware_present(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("sse4.2") != 0;
#else
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#endif
}
#endif

static uint32_t (*chosen)(uint32_t, const uint8_t *, size_t) = portable;
static const char *chosen_name = "portable";

/* Before main, before any thread: nobody sees half a table. */
__attribute__((constructor)) static void choose(void) {
    build_slices();
#ifdef HARDWARE_NAME
    if (hardware_present()) {
        build_shift(&long_shift, LONG_BLOCK);
        build_shift(&short_shift, SHORT_BLOCK);
        chosen = hardware;
        chosen_name = HARDWARE_NAME;
    }
#endif
}

uint32_t sb_crc32c(uint32_t start, const void *data, size_t size) { return chosen(start, data, size); }

uint32_t sb_crc32c_portable(uint32_t start, const void *data, size_t size) { return portable(start, data, size); }

const char *sb_crc32c_name(void) { return chosen_name; }
