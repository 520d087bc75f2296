/* record.c: what makes bytes a record. Nothing here trusts a field before it has bounded it. */
#include "record.h"

/* Record bytes at any address: a caller's buffer need not be aligned. */
typedef sb_record unaligned_record __attribute__((aligned(1)));

uint32_t sb_tag_hash(const uint8_t *tags, uint32_t bytes) {
    if (bytes == 0) {
        return 0;
    }
    uint32_t hash = sb_crc32c(0, tags, bytes);
    return hash != 0 ? hash : 1;
}

uint32_t sb_record_crc(const sb_record *header, uint32_t payload_crc) {
    return sb_crc32c(payload_crc, (const uint8_t *)header + SB_RECORD_COVERED, SB_RECORD_HEADER - SB_RECORD_COVERED);
}

uint64_t sb_record_next(uint64_t position, uint64_t size, uint64_t segment_bytes) {
    uint64_t next = position + sb_padded(size);
    uint64_t left = segment_bytes - next % segment_bytes;
    return left < SB_RECORD_HEADER ? next + left : next;
}

/* The header's fields agree with each other, with their place, and with what may follow there. */
static int header_fits(const unaligned_record *r, uint64_t position, uint64_t segment_bytes, uint32_t min_epoch,
                       uint32_t max_epoch) {
    uint64_t left = segment_bytes - position % segment_bytes;
    if (r->position != position || r->epoch < min_epoch || r->epoch > max_epoch) {
        return 0;
    }
    if (r->size < SB_RECORD_HEADER || sb_padded(r->size) > left || r->kind == 0 || r->kind > SB_KIND_LAST ||
        r->reserved != 0 || r->unflushed > position) {
        return 0;
    }
    if ((uint32_t)r->tags_bytes + r->keys_bytes + r->properties_bytes > r->size - SB_RECORD_HEADER) {
        return 0;
    }
    if (r->kind == SB_KIND_FILLER) {
        return r->size == left; /* it ends its segment, or it is none */
    }
    return r->group_bytes == 0 || ((r->flags & SB_FLAG_GROUP) != 0 && r->group_bytes % SB_RECORD_ALIGN == 0 &&
                                   r->group_bytes >= sb_padded(r->size) && r->group_bytes <= left);
}

static int content_fits(const uint8_t *data, const unaligned_record *r) {
    uint32_t payload = r->kind == SB_KIND_FILLER ? 0 : r->size - SB_RECORD_HEADER;
    uint32_t crc = sb_crc32c(0, data + SB_RECORD_HEADER, payload);
    if (sb_crc32c(crc, data + SB_RECORD_COVERED, SB_RECORD_HEADER - SB_RECORD_COVERED) != r->crc) {
        return 0;
    }
    uint8_t padding = 0; /* not covered by the CRC, but known to be zeros */
    for (uint64_t at = r->size; at < sb_padded(r->size); at++) {
        padding |= data[at];
    }
    return padding == 0;
}

int sb_record_check(const uint8_t *data, uint64_t room, uint64_t position, uint64_t segment_bytes, uint32_t min_epoch,
                    uint32_t max_epoch, int check_crc) {
    const unaligned_record *r = (const unaligned_record *)data;
    if (position % SB_RECORD_ALIGN != 0 || segment_bytes - position % segment_bytes < SB_RECORD_HEADER) {
        return SB_INVALID;
    }
    if (room < SB_RECORD_HEADER) {
        return SB_END;
    }
    if (!header_fits(r, position, segment_bytes, min_epoch, max_epoch)) {
        return SB_INVALID;
    }
    if (sb_padded(r->size) > room) {
        return SB_END;
    }
    return check_crc && !content_fits(data, r) ? SB_INVALID : SB_OK;
}
