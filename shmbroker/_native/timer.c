/* timer.c: see timer.h. */
#include "timer.h"

#include <string.h>

/* One event for each entry of a FIRED record. SB_OK | SB_INVALID | SB_AGAIN: no room */
static int fired(const sb_record *record, const uint8_t *body, uint32_t bytes, sb_timer_event *events, uint32_t room, uint32_t *count)
{
    uint32_t entries = bytes / (uint32_t)sizeof(sb_fired);
    if (bytes % sizeof(sb_fired) != 0 || entries > SB_GROUP_RECORDS_MAX) {
        return SB_INVALID;
    }
    if (entries > room - *count) {
        return SB_AGAIN;
    }
    for (uint32_t i = 0; i < entries; i++) {
        sb_fired entry;
        memcpy(&entry, body + i * sizeof entry, sizeof entry);
        if (entry.position >= record->position || entry.origin > entry.position || entry.back > record->position) {
            return SB_INVALID;
        }
        events[*count + i] = (sb_timer_event){
            .at = record->position,
            .position = entry.position,
            .origin = entry.origin,
            .successor = entry.back ? record->position - entry.back : 0,
            .end = record->position + sb_padded(record->size),
            .kind = SB_KIND_FIRED,
        };
    }
    *count += entries;
    return SB_OK;
}

static int take(const sb_walk *walk, const sb_record *record, sb_timer_event *events, uint32_t room, uint32_t *count)
{
    const uint8_t *data = walk->data + (record->position - walk->start);
    uint32_t payload = record->size - SB_RECORD_HEADER;
    uint64_t named;
    if (sb_record_check(data, walk->length - (record->position - walk->start), record->position, walk->segment_bytes,
                        record->epoch, record->epoch, 1) != SB_OK) {
        return SB_INVALID;
    }
    if (record->kind == SB_KIND_FIRED) {
        return fired(record, data + SB_RECORD_HEADER, payload, events, room, count);
    }
    if (*count == room) {
        return SB_AGAIN;
    }
    sb_timer_event event = {.at = record->position, .position = record->position, .due = record->queue_offset, .kind = record->kind,
                            .end = record->position + sb_padded(record->size)};
    if (record->kind == SB_KIND_RECALL) {
        if (payload != sizeof named) {
            return SB_INVALID;
        }
        memcpy(&named, data + SB_RECORD_HEADER, sizeof named);
        if (named >= record->position) {
            return SB_INVALID;
        }
        event.position = named;
        event.due = 0;
    }
    events[(*count)++] = event;
    return SB_OK;
}

int sb_timer_collect(sb_walk *walk, sb_timer_event *events, uint32_t room, uint32_t *count)
{
    sb_record record;
    *count = 0;
    for (;;) {
        uint64_t before = walk->position;
        int code = sb_walk_next(walk, &record);
        if (code != SB_OK) {
            return code;
        }
        if (record.kind == SB_KIND_TIMER || record.kind == SB_KIND_FIRED || record.kind == SB_KIND_RECALL) {
            code = take(walk, &record, events, room, count);
            if (code != SB_OK) {
                walk->position = before;
                return code;
            }
        }
    }
}
