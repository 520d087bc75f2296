/* scan.h: walking over runs of records in a copy of log or ring bytes. No shared memory, no locks. */
#ifndef SHMBROKER_SCAN_H
#define SHMBROKER_SCAN_H

#include "record.h"

/* A walk over data[0..length), whose first byte lies at `start`. Epochs never decrease on the way, and only an EPOCH
 * record may introduce a higher one (R2). */
typedef struct {
    const uint8_t *data;
    uint64_t length;
    uint64_t start;
    uint64_t segment_bytes;
    uint64_t position; /* where the next record should begin */
    uint32_t epoch;
    int check_crc;
} sb_walk;

/* SB_OK: *record is valid and `position` is behind it | SB_END: no further whole record in data | SB_INVALID. */
int sb_walk_next(sb_walk *walk, sb_record *record);

/* Walks to the end; the number of records. *why is SB_END or SB_INVALID. */
uint64_t sb_skim(sb_walk *walk, int *why);

/* Is there a valid record at an aligned place in data, of these epochs, whose writer knew more than `flushed_above`
 * bytes (or anything, if negative) to be on the disk? SB_OK and the record, or SB_NOT_FOUND. */
int sb_find_record(const uint8_t *data, uint64_t length, uint64_t start, uint64_t segment_bytes, uint32_t min_epoch,
                   uint32_t max_epoch, int64_t flushed_above, sb_record *record);

/* The last place at or before `end` that lies inside no record and no group: what `end` cuts in two does not count.
 * data holds checked records from `start` on. */
uint64_t sb_group_floor(const uint8_t *data, uint64_t length, uint64_t start, uint64_t segment_bytes, uint64_t end);

/* One consume queue entry: the file format as well. */
typedef struct {
    uint64_t position;
    uint32_t size;
    uint32_t tag_hash;
} sb_entry;
_Static_assert(sizeof(sb_entry) == 16, "consume queue entry");

/* Entries of one queue with consecutive offsets. */
typedef struct {
    uint32_t topic_id;
    uint32_t queue_id;
    uint64_t first_offset;
    uint64_t next_offset;
    sb_entry *out;      /* set by the caller between the passes: room for next_offset - first_offset entries */
} sb_run;

#define SB_RUNS_MAX 4096u
#define SB_ID_STRIDE 1024u /* of a producer's messages one in so many is marked: the key index finds the others from it */

/* Groups the messages of a walk by queue in two passes: collect, then (once the caller has made room) deal out. */
typedef struct {
    sb_entry *entry; /* max_records of them */
    uint32_t *run_of; /* the run of each */
    uint64_t *marked; /* positions; max_records of them */
    sb_run *run;      /* SB_RUNS_MAX */
    uint32_t *slot;   /* hash table of runs + 1; `slots` of them, a power of two >= 2 * SB_RUNS_MAX or max_records */
    uint32_t slots;
    uint32_t max_records;
    int mark_keys; /* mark what only the key index wants, too */
    uint32_t entries, marks, runs;
} sb_dispatch;

/* Marked are the records that somebody has to look at one by one: those with keys or a dedup id, the first of a producer
 * and then each SB_ID_STRIDE'th, and the system's.
 * Answers why it stopped: SB_END | SB_INVALID | SB_AGAIN (a limit was reached: go on from walk->position). */
int sb_dispatch_collect(sb_dispatch *d, sb_walk *walk);
void sb_dispatch_deal(sb_dispatch *d);

#endif
