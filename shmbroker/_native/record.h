/* record.h: record bytes: CRC, checks, scanning. No shared memory, no locks: works on any copy or file range. */
#ifndef SHMBROKER_RECORD_H
#define SHMBROKER_RECORD_H

#include "codes.h"
#include "layout.h"

uint32_t sb_crc32c(uint32_t start, const void *data, size_t size); /* best implementation, chosen at first use */
uint32_t sb_crc32c_portable(uint32_t start, const void *data, size_t size);
const char *sb_crc32c_name(void);

static inline uint64_t sb_padded(uint64_t size) { return (size + (SB_RECORD_ALIGN - 1u)) & ~(uint64_t)(SB_RECORD_ALIGN - 1u); }
uint32_t sb_tag_hash(const uint8_t *tags, uint32_t bytes); /* 0 for no tag, never 0 for one */
uint32_t sb_record_crc(const sb_record *header, uint32_t payload_crc);

/* Is there a whole, valid record at data[0..room)? `position` is the place it must name. min_epoch..max_epoch bound its
 * epoch. SB_OK | SB_END (cannot tell: room too small) | SB_INVALID. check_crc 0 leaves the CRC out. */
int sb_record_check(const uint8_t *data, uint64_t room, uint64_t position, uint64_t segment_bytes, uint32_t min_epoch,
                    uint32_t max_epoch, int check_crc);

/* Where the next record begins after `position`: fewer than a header's bytes before a segment's end are stepped over. */
uint64_t sb_record_next(uint64_t position, uint64_t size, uint64_t segment_bytes);

#endif
