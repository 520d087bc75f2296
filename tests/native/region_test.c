/* region_test.c: mapped memory is checked before anything in it is believed. */
#include "broker.h"

#define RING 65536u
#define SEGMENT 98304u

/* Two objects of a formatted region; what attaching to them answers. */
typedef struct {
    int control, ring;
    sb_control *written;
    sb_limits limits;
} objects;

static int format(objects *o, uint64_t segment_bytes, uint64_t tail, uint32_t reserve_bytes)
{
    sb_region r;
    o->limits = check_limits();
    o->limits.reserve_bytes = reserve_bytes;
    o->limits.max_message_bytes = RING / 4;
    o->limits.blocks = o->limits.queues + 1;
    uint64_t bytes = sb_control_size(&o->limits);
    o->control = memfd_create("control", MFD_CLOEXEC);
    o->ring = memfd_create("ring", MFD_CLOEXEC);
    CHECK(ftruncate(o->control, (off_t)bytes) == 0 && ftruncate(o->ring, RING) == 0);
    o->written = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, o->control, 0);
    CHECK(o->written != MAP_FAILED);
    CHECK_EQ(sb_region_map(&r, o->control, o->ring, 1), SB_OK);
    sb_header header = {.segment_bytes = segment_bytes};
    int code = sb_region_format(&r, &header, &o->limits, tail, 1);
    sb_region_unmap(&r);
    return code;
}

static int attach(const objects *o)
{
    sb_region r;
    int code = sb_region_map(&r, o->control, o->ring, 0);
    if (code == SB_OK) {
        sb_region_unmap(&r);
    }
    return code;
}

static void release(objects *o)
{
    CHECK(munmap(o->written, sb_control_size(&o->limits)) == 0 && close(o->control) == 0 && close(o->ring) == 0);
}

static void what_was_formatted_can_be_attached(void)
{
    objects o;
    CHECK_EQ(format(&o, SEGMENT, 5 * (uint64_t)SEGMENT, 8192), SB_OK);
    CHECK_EQ(attach(&o), SB_OK);
    release(&o);
}

static void the_ring_is_mapped_twice(void)
{
    broker b;
    broker_open(&b, (broker_shape){.ring_bytes = RING, .segment_bytes = SEGMENT, .queues = 1, .blocks = 2});
    memcpy(b.r.ring + RING - 4, "end begin", 9);
    atomic_signal_fence(memory_order_seq_cst); /* the compiler does not know that both are the same bytes */
    CHECK(memcmp(b.r.ring, "begin", 5) == 0);
    CHECK(memcmp(b.r.ring + RING, "begin", 5) == 0);
    broker_close(&b);
}

/* Every bit of the parts that say where everything lies: either it is checked, or it moves nothing. */
static void no_garbled_header_or_limit_moves_a_table(void)
{
    objects o;
    CHECK_EQ(format(&o, SEGMENT, 0, 8192), SB_OK);
    const struct {
        size_t at, bytes;
    } checked[] = {{offsetof(sb_header, magic), 12}, {offsetof(sb_header, fingerprint), 24}, {offsetof(sb_control, limits), sizeof(sb_limits)}};
    for (size_t part = 0; part < sizeof checked / sizeof checked[0]; part++) {
        for (size_t bit = 0; bit < 8 * checked[part].bytes; bit++) {
            uint8_t *byte = (uint8_t *)o.written + checked[part].at + bit / 8;
            *byte ^= (uint8_t)(1u << bit % 8);
            sb_region r;
            if (sb_region_map(&r, o.control, o.ring, 0) == SB_OK) { /* only the two policies may differ within their bounds */
                sb_limits same = o.limits;
                same.reserve_bytes = r.limits.reserve_bytes;
                same.max_message_bytes = r.limits.max_message_bytes;
                CHECK(memcmp(&r.limits, &same, sizeof same) == 0);
                sb_region_unmap(&r);
            }
            *byte ^= (uint8_t)(1u << bit % 8);
        }
    }
    CHECK_EQ(attach(&o), SB_OK);
    release(&o);
}

static void watermarks_that_make_no_sense_are_refused(void)
{
    static const struct {
        uint64_t flushed, tail;
        int code;
    } cases[] = {
        {0, 0, SB_OK}, {800, 800, SB_OK}, {0, RING, SB_OK}, {808, 800, SB_INVALID}, {0, 3 * (uint64_t)RING, SB_INVALID}, {0, 4, SB_INVALID},
        {SEGMENT - 80, SEGMENT - 80, SB_OK}, {SEGMENT - 72, SEGMENT - 72, SB_INVALID}, {SEGMENT, SEGMENT, SB_OK},
    };
    objects o;
    CHECK_EQ(format(&o, SEGMENT, 0, 8192), SB_OK);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        sb_store(&o.written->marks.flushed, cases[i].flushed);
        sb_store(&o.written->marks.tail, cases[i].tail);
        CHECK_EQ(attach(&o), cases[i].code);
    }
    release(&o);
}

static void sizes_that_could_never_work_are_not_formatted(void)
{
    static const struct {
        uint64_t segment_bytes, tail;
        uint32_t reserve_bytes;
    } bad[] = {
        {SEGMENT, SEGMENT - 72, 8192}, /* no header fits there */
        {SEGMENT, 4, 8192},            /* not aligned */
        {SEGMENT, 0, RING / 4 + 1},    /* the largest group would wait for ever */
        {SEGMENT + 8, 0, 8192}, {4096, 0, 8192}, {0, 0, 8192},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        objects o;
        CHECK_EQ(format(&o, bad[i].segment_bytes, bad[i].tail, bad[i].reserve_bytes), SB_INVALID);
        CHECK_EQ(attach(&o), SB_INVALID);
        release(&o);
    }
}

static void objects_of_the_wrong_size_are_refused(void)
{
    objects o;
    CHECK_EQ(format(&o, SEGMENT, 0, 8192), SB_OK);
    const off_t bytes = (off_t)o.written->header.control_bytes;
    CHECK(ftruncate(o.ring, 2 * RING) == 0);
    CHECK_EQ(attach(&o), SB_INVALID);
    CHECK(ftruncate(o.ring, RING / 2) == 0);
    CHECK_EQ(attach(&o), SB_INVALID);
    CHECK(ftruncate(o.ring, RING) == 0 && ftruncate(o.control, bytes + 4096) == 0);
    CHECK_EQ(attach(&o), SB_INVALID);
    CHECK(ftruncate(o.control, 100) == 0);
    CHECK_EQ(attach(&o), SB_INVALID);
    CHECK(ftruncate(o.control, bytes) == 0);
    release(&o);
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(what_was_formatted_can_be_attached),
        TEST(the_ring_is_mapped_twice),
        TEST(no_garbled_header_or_limit_moves_a_table),
        TEST(watermarks_that_make_no_sense_are_refused),
        TEST(sizes_that_could_never_work_are_not_formatted),
        TEST(objects_of_the_wrong_size_are_refused),
    };
    return CHECK_MAIN(tests);
}
