/* crc32c.c: CRC-32C (Castagnoli). The processor's instruction where it has one, eight tables where it has not. */
#include "record.h"

#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#include <wmmintrin.h>
#define HARDWARE_NAME "sse4.2"
#define HARDWARE_TARGET __attribute__((target("sse4.2,pclmul")))
#define HARDWARE_WORD(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define HARDWARE_HALF(crc, half) (_mm_crc32_u32((crc), (half)))
#define HARDWARE_BYTE(crc, byte) (_mm_crc32_u8((crc), (byte)))
#define HARDWARE_PRODUCT(a, b) \
    ((uint64_t)_mm_cvtsi128_si64(_mm_clmulepi64_si128(_mm_cvtsi32_si128((int)(a)), _mm_cvtsi32_si128((int)(b)), 0)))
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <arm_neon.h>
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1u << 7)
#endif
#ifndef HWCAP_PMULL
#define HWCAP_PMULL (1u << 4)
#endif
#define HARDWARE_NAME "armv8"
#define HARDWARE_TARGET __attribute__((target("+crc+crypto")))
#define HARDWARE_WORD(crc, word) (__crc32cd((crc), (word)))
#define HARDWARE_HALF(crc, half) (__crc32cw((crc), (half)))
#define HARDWARE_BYTE(crc, byte) (__crc32cb((crc), (byte)))
#define HARDWARE_PRODUCT(a, b) ((uint64_t)vmull_p64((poly64_t)(a), (poly64_t)(b)))
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
/* One instruction takes 8 bytes but answers after 3 cycles, so one stream uses a third of the machine. All but a few
 * bytes are cut into three neighbouring blocks whose CRCs are made side by side and then joined: crc(A B) = crc(A) *
 * x^(8|B|) + crc(B). A product of two bit-reversed words comes out multiplied by x, and the CRC instruction, which
 * reduces it, multiplies by x^32: hence the 33. (V. Gopal et al., Fast CRC Computation for iSCSI Polynomial Using CRC32
 * Instruction, Intel 2011.) */
#define BLOCK_WORDS_MAX 128u

static uint32_t shift[2 * BLOCK_WORDS_MAX + 1]; /* shift[n]: x^(64 n - 33) */

/* a * b modulo the polynomial */
static uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
        product ^= (a & bit) ? b : 0u;
        b = (b >> 1) ^ ((b & 1u) ? POLYNOMIAL : 0u);
    }
    return product;
}

static void build_shifts(void) {
    uint32_t power = 1u; /* x^31 */
    uint32_t word = multiply(multiply(power, power), 1u << 29); /* x^62 * x^2 */
    for (uint32_t n = 1; n <= 2 * BLOCK_WORDS_MAX; n++, power = multiply(power, word)) {
        shift[n] = power;
    }
}

HARDWARE_TARGET static uint32_t hardware(uint32_t start, const uint8_t *at, size_t size) {
    uint32_t crc = ~start;
    while (size >= 48) {
        const size_t words = size / 24 < BLOCK_WORDS_MAX ? size / 24 : BLOCK_WORDS_MAX, block = 8 * words;
        uint32_t second = 0, third = 0;
        for (const uint8_t *end = at + block; at < end; at += 8) {
            crc = HARDWARE_WORD(crc, load_word(at));
            second = HARDWARE_WORD(second, load_word(at + block));
            third = HARDWARE_WORD(third, load_word(at + 2 * block));
        }
        crc = HARDWARE_WORD(0, HARDWARE_PRODUCT(crc, shift[2 * words]) ^ HARDWARE_PRODUCT(second, shift[words])) ^ third;
        at += 2 * block;
        size -= 3 * block;
    }
    for (; size >= 8; at += 8, size -= 8) {
        crc = HARDWARE_WORD(crc, load_word(at));
    }
    if (size >= 4) {
        uint32_t half;
        memcpy(&half, at, sizeof half);
        crc = HARDWARE_HALF(crc, half);
        at += 4;
        size -= 4;
    }
    for (; size != 0; at++, size--) {
        crc = HARDWARE_BYTE(crc, *at);
    }
    return ~crc;
}

static int hardware_present(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
#else
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) && (getauxval(AT_HWCAP) & HWCAP_PMULL);
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
        build_shifts();
        chosen = hardware;
        chosen_name = HARDWARE_NAME;
    }
#endif
}

uint32_t sb_crc32c(uint32_t start, const void *data, size_t size) { return chosen(start, data, size); }

uint32_t sb_crc32c_portable(uint32_t start, const void *data, size_t size) { return portable(start, data, size); }

const char *sb_crc32c_name(void) { return chosen_name; }
