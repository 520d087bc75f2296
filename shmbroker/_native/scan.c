/* scan.c: the loops behind skim, scan, dispatch_scan and find_record. */
#include "scan.h"

#include <string.h>

int sb_walk_next(sb_walk *walk, sb_record *record) {
    uint64_t end = walk->start + walk->length;
    uint64_t left = walk->segment_bytes - walk->position % walk->segment_bytes;
    if (left < SB_RECORD_HEADER) {
        /* A short segment end. Never past the data: a watermark made of this position must not pass the tail. */
        walk->position += left < end - walk->position ? left : end - walk->position;
    }
    uint64_t room = end - walk->position;
    if (room < SB_RECORD_HEADER) {
        return SB_END;
    }
    const uint8_t *at = walk->data + (walk->position - walk->start);
    memcpy(record, at, sizeof *record);
    uint32_t max_epoch = record->kind == SB_KIND_EPOCH ? UINT32_MAX : walk->epoch;
    int code = sb_record_check(at, room, walk->position, walk->segment_bytes, walk->epoch, max_epoch, walk->check_crc);
    if (code == SB_OK) {
        walk->epoch = record->epoch;
        walk->position += sb_padded(record->size);
    }
    return code;
}

uint64_t sb_skim(sb_walk *walk, int *why) {
    uint64_t records = 0;
    sb_record record;
    while ((*why = sb_walk_next(walk, &record)) == SB_OK) {
        records++;
    }
    return records;
}

int sb_find_record(const uint8_t *data, uint64_t length, uint64_t start, uint64_t segment_bytes, uint32_t min_epoch,
                   uint32_t max_epoch, int64_t flushed_above, sb_record *record) {
    uint64_t skip = (SB_RECORD_ALIGN - start % SB_RECORD_ALIGN) % SB_RECORD_ALIGN;
    for (uint64_t at = skip; at + SB_RECORD_HEADER <= length; at += SB_RECORD_ALIGN) {
        uint64_t position;
        memcpy(&position, data + at + offsetof(sb_record, position), sizeof position);
        if (position != start + at || sb_record_check(data + at, length - at, position, segment_bytes, min_epoch,
                                                      max_epoch, 1) != SB_OK) {
            continue;
        }
        memcpy(record, data + at, sizeof *record);
        if (flushed_above < 0 || record->position - record->unflushed > (uint64_t)flushed_above) {
            return SB_OK;
        }
        at += sb_padded(record->size) - SB_RECORD_ALIGN; /* a valid record is stepped over whole */
    }
    return SB_NOT_FOUND;
}

uint64_t sb_group_floor(const uint8_t *data, uint64_t length, uint64_t start, uint64_t segment_bytes, uint64_t end) {
    sb_walk walk = {.data = data, .length = length, .start = start, .segment_bytes = segment_bytes, .position = start};
    sb_record record;
    uint64_t group_end = start;
    end = end < start + length ? end : start + length;
    while (walk.position < end) {
        uint64_t short_end = segment_bytes - walk.position % segment_bytes;
        if (short_end < SB_RECORD_HEADER) {
            walk.position += short_end;
            continue;
        }
        if (start + length - walk.position < SB_RECORD_HEADER) {
            break;
        }
        /* The records were checked: the header's own epoch will do. */
        memcpy(&record, data + (walk.position - start), sizeof record);
        walk.epoch = record.epoch;
        if (sb_walk_next(&walk, &record) != SB_OK) {
            break;
        }
        if (record.position >= group_end && record.group_bytes != 0) {
            group_end = record.position + record.group_bytes;
        }
        if (walk.position > end || group_end > end) {
            return record.position;
        }
    }
    return walk.position < end ? walk.position : end;
}

/* ------------------------------------------------------------------------------------------------- dispatch -- */

static uint32_t queue_hash(uint32_t topic_id, uint32_t queue_id) {
    uint64_t key = ((uint64_t)topic_id << 32 | queue_id) * 0x9e3779b97f4a7c15ull;
    return (uint32_t)(key >> 32);
}

/* The run that the next message of this queue belongs to, made if needed; SB_RUNS_MAX if there is no room for one. */
static uint32_t find_run(sb_dispatch *d, const sb_record *r) {
    uint32_t at = queue_hash(r->topic_id, r->queue_id) & (d->slots - 1);
    while (d->slot[at] != 0) {
        uint32_t index = d->slot[at] - 1;
        const sb_run *run = &d->run[index];
        if (run->topic_id == r->topic_id && run->queue_id == r->queue_id) {
            if (run->next_offset == r->queue_offset) {
                return index;
            }
            break; /* offsets jump where an epoch begins: a second run of this queue takes the slot over */
        }
        at = (at + 1) & (d->slots - 1);
    }
    if (d->runs == SB_RUNS_MAX) {
        return SB_RUNS_MAX;
    }
    uint32_t index = d->runs++;
    d->slot[at] = index + 1;
    d->run[index] = (sb_run){.topic_id = r->topic_id, .queue_id = r->queue_id, .first_offset = r->queue_offset,
                             .next_offset = r->queue_offset};
    return index;
}

int sb_dispatch_collect(sb_dispatch *d, sb_walk *walk) {
    sb_record record;
    for (;;) {
        uint64_t before = walk->position;
        if (d->entries == d->max_records || d->marks == d->max_records) {
            return SB_AGAIN;
        }
        int code = sb_walk_next(walk, &record);
        if (code != SB_OK) {
            return code;
        }
        if (record.kind == SB_KIND_FILLER || record.kind == SB_KIND_FIRED || record.kind == SB_KIND_RECALL) {
            continue;
        }
        int landmark = record.sequence == 1 || (record.sequence != 0 && record.sequence % SB_ID_STRIDE == 0);
        if (record.kind == SB_KIND_TIMER && (record.flags & SB_FLAG_DEDUP) == 0 && !(landmark && d->mark_keys)) {
            continue;
        }
        if (record.kind == SB_KIND_MESSAGE) {
            uint32_t run = find_run(d, &record);
            if (run == SB_RUNS_MAX) {
                walk->position = before;
                return SB_AGAIN;
            }
            d->run[run].next_offset++;
            d->run_of[d->entries] = run;
            d->entry[d->entries++] = (sb_entry){record.position, record.size, record.tag_hash};
            int indexed = record.keys_bytes != 0 || landmark || (record.flags & SB_FLAG_LATE) != 0;
            if ((record.flags & SB_FLAG_DEDUP) == 0 && !(indexed && d->mark_keys)) {
                continue;
            }
        }
        d->marked[d->marks++] = record.position;
    }
}

void sb_dispatch_deal(sb_dispatch *d) {
    for (uint32_t i = 0; i < d->entries; i++) {
        *d->run[d->run_of[i]].out++ = d->entry[i];
    }
}
