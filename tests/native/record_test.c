/* record_test.c: CRC and scans over damaged bytes, in buffers with nothing behind them: the sanitizers see every step too far. */
#include "check.h"
#include "record.h"
#include "scan.h"

#define SEGMENT 4096u
#define LOG_MAX (3 * SEGMENT)

static uint64_t random_state = 0x9e3779b97f4a7c15ull;

static uint32_t random_below(uint32_t limit)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 33) % limit;
}

/* A valid record with a payload of `payload` bytes at data; its padded size. */
static uint64_t put_record(uint8_t *data, uint64_t position, uint32_t epoch, uint8_t kind, uint32_t payload, uint32_t group_bytes)
{
    sb_record h = {.size = SB_RECORD_HEADER + payload, .position = position, .epoch = epoch, .kind = kind,
                   .topic_id = 1, .queue_id = (uint16_t)random_below(3), .group_bytes = group_bytes,
                   .flags = group_bytes ? SB_FLAG_GROUP : 0, .keys_bytes = payload > 9 ? 5 : 0};
    for (uint32_t i = 0; i < payload; i++) {
        data[SB_RECORD_HEADER + i] = (uint8_t)(position + i * 7);
    }
    h.crc = sb_record_crc(&h, kind == SB_KIND_FILLER ? 0 : sb_crc32c(0, data + SB_RECORD_HEADER, payload));
    memcpy(data, &h, sizeof h);
    memset(data + h.size, 0, sb_padded(h.size) - h.size);
    return sb_padded(h.size);
}

/* A log of random records from position 0 on, with fillers at the ends of segments; its size. */
static uint64_t put_log(uint8_t *data)
{
    uint64_t position = 0;
    uint32_t epoch = 1;
    for (;;) {
        uint32_t payload = random_below(300), left = SEGMENT - (uint32_t)(position % SEGMENT);
        if (left < SB_RECORD_HEADER) {
            memset(data + position, 0xaa, left);
            position += left;
            continue;
        }
        if (sb_padded(SB_RECORD_HEADER + payload) > left) {
            position += put_record(data + position, position, epoch, SB_KIND_FILLER, left - SB_RECORD_HEADER, 0);
            continue;
        }
        if (position + sb_padded(SB_RECORD_HEADER + payload) > LOG_MAX) {
            return position;
        }
        uint8_t kind = random_below(20) == 0 ? SB_KIND_EPOCH : SB_KIND_MESSAGE;
        epoch += kind == SB_KIND_EPOCH ? 1 : 0;
        uint32_t group = kind == SB_KIND_MESSAGE && random_below(8) == 0 ? (uint32_t)sb_padded(SB_RECORD_HEADER + payload) : 0;
        position += put_record(data + position, position, epoch, kind, payload, group);
    }
}

static sb_walk walk_of(const uint8_t *data, uint64_t length)
{
    return (sb_walk){.data = data, .length = length, .segment_bytes = SEGMENT, .epoch = 1, .check_crc = 1};
}

static void dispatch(const uint8_t *data, uint64_t length)
{
    enum { RECORDS = 64, SLOTS = 128 };
    sb_entry entry[RECORDS], out[RECORDS];
    uint32_t run_of[RECORDS], slot[SLOTS] = {0};
    uint64_t marked[RECORDS];
    sb_run run[RECORDS];
    sb_dispatch d = {.entry = entry, .run_of = run_of, .marked = marked, .run = run, .slot = slot, .slots = SLOTS,
                     .max_records = RECORDS, .mark_keys = 1};
    sb_walk walk = walk_of(data, length);
    (void)sb_dispatch_collect(&d, &walk);
    CHECK(walk.position <= length && d.entries <= RECORDS && d.marks <= RECORDS && d.runs <= d.entries);
    sb_entry *next = out;
    for (uint32_t i = 0; i < d.runs; i++) {
        run[i].out = next;
        next += run[i].next_offset - run[i].first_offset;
    }
    CHECK_EQ(next - out, d.entries);
    sb_dispatch_deal(&d);
}

static void both_crcs_agree_at_every_size_and_alignment(void)
{
    for (size_t size = 0; size < 4000; size += size < 700 ? 1 : 37) {
        size_t shift = size % 8;
        uint8_t *data = malloc(size + shift + 1); /* + 1: malloc(0) is nothing to test */
        CHECK(data != NULL);
        for (size_t i = 0; i < size + shift; i++) {
            data[i] = (uint8_t)random_below(256);
        }
        CHECK_EQ(sb_crc32c(1, data + shift, size), sb_crc32c_portable(1, data + shift, size));
        free(data);
    }
}

static void a_whole_log_is_walked_to_its_end(void)
{
    uint8_t data[LOG_MAX];
    for (int round = 0; round < 200; round++) {
        uint64_t length = put_log(data);
        sb_walk walk = walk_of(data, length);
        int why = 0;
        CHECK(sb_skim(&walk, &why) > 10);
        CHECK_EQ(walk.position, length);
        CHECK_EQ(why, SB_END);
    }
}

static void no_damage_leads_a_scan_out_of_its_data(void)
{
    static uint8_t whole[LOG_MAX];
    for (int round = 0; round < 3000; round++) {
        uint64_t length = put_log(whole);
        length = random_below(4) ? 1 + random_below((uint32_t)length) : length;
        uint8_t *data = malloc(length);
        CHECK(data != NULL);
        memcpy(data, whole, length);
        for (uint32_t i = random_below(4); i > 0; i--) {
            data[random_below((uint32_t)length)] ^= (uint8_t)(1u << random_below(8));
        }
        int why = 0;
        sb_walk walk = walk_of(data, length);
        (void)sb_skim(&walk, &why);
        CHECK(walk.position <= length);
        sb_record found;
        (void)sb_find_record(data, length, 0, SEGMENT, 0, UINT32_MAX, (int64_t)random_below(2) - 1, &found);
        (void)sb_group_floor(data, length, 0, SEGMENT, random_below((uint32_t)length + 100));
        sb_walk unchecked = walk_of(data, length);
        unchecked.check_crc = 0;
        (void)sb_skim(&unchecked, &why);
        CHECK(unchecked.position <= length);
        dispatch(data, length);
        free(data);
    }
}

static void random_bytes_are_no_records(void)
{
    for (int round = 0; round < 3000; round++) {
        uint32_t length = 1 + random_below(600);
        uint8_t *data = malloc(length);
        CHECK(data != NULL);
        for (uint32_t i = 0; i < length; i++) {
            data[i] = (uint8_t)random_below(256);
        }
        int why = 0;
        sb_walk walk = walk_of(data, length);
        CHECK_EQ(sb_skim(&walk, &why), 0);
        dispatch(data, length);
        free(data);
    }
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(both_crcs_agree_at_every_size_and_alignment),
        TEST(a_whole_log_is_walked_to_its_end),
        TEST(no_damage_leads_a_scan_out_of_its_data),
        TEST(random_bytes_are_no_records),
    };
    return CHECK_MAIN(tests);
}
