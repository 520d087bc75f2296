/* ring.c: the reading half of ring.h. Readers take no lock: they copy first and believe afterwards (R8). */
#include "ring.h"

#include <string.h>

#include "racy.h"
#include "record.h"

/* Valid iff, after the copy, nobody had begun to overwrite it. SYNC: write_limit */
static int still_there(const sb_region *r, uint64_t position)
{
    return sb_load_last(&sb_marks(r)->write_limit) - position <= r->ring_bytes;
}

int sb_ring_peek(const sb_region *r, uint64_t position, sb_record *header)
{
    if (position % SB_RECORD_ALIGN) {
        return SB_INVALID;
    }
    if (position >= sb_load(&sb_marks(r)->tail)) { /* SYNC: tail */
        return SB_END;
    }
    if (!still_there(r, position)) {
        return SB_BEHIND;
    }
    sb_racy_copy(header, r->ring + (position & r->ring_mask), sizeof *header);
    if (!still_there(r, position)) {
        return SB_BEHIND;
    }
    uint64_t payload = (uint64_t)header->tags_bytes + header->keys_bytes + header->properties_bytes;
    return header->position == position && header->epoch <= r->epoch && header->size >= SB_RECORD_HEADER + payload &&
                   header->size <= r->ring_bytes / 2
               ? SB_OK
               : SB_INVALID;
}

int sb_ring_peek_properties(const sb_region *r, const sb_record *header, uint8_t *buffer)
{
    uint64_t bytes = (uint64_t)header->tags_bytes + header->keys_bytes + header->properties_bytes;
    if (bytes > r->ring_bytes) {
        return SB_BEHIND;
    }
    sb_racy_copy(buffer, r->ring + ((header->position + SB_RECORD_HEADER) & r->ring_mask), bytes);
    return still_there(r, header->position) ? SB_OK : SB_BEHIND;
}

int sb_ring_read(const sb_region *r, uint64_t position, uint8_t *buffer, uint64_t room, uint32_t *size)
{
    sb_record header;
    int code = sb_ring_peek(r, position, &header);
    if (code != SB_OK) {
        return code;
    }
    *size = header.size;
    if (room < header.size) {
        return SB_NO_SPACE;
    }
    sb_racy_copy(buffer, r->ring + (position & r->ring_mask), header.size);
    if (!still_there(r, position)) {
        return SB_BEHIND;
    }
    memcpy(&header, buffer, sizeof header);
    uint32_t payload_crc = header.kind == SB_KIND_FILLER ? 0 : sb_crc32c(0, buffer + sizeof header, header.size - sizeof header);
    return header.size == *size && sb_record_crc(&header, payload_crc) == header.crc ? SB_OK : SB_INVALID;
}
