/* move_test.c: a copy and the acknowledgement of what was received are one, whoever is killed where. */
#include "broker.h"
#include "claim.h"
#include "failpoint.h"
#include "move.h"
#include "overflow.h"

#define GROUP 1u
#define HOLDER 5u
#define OTHER 6u
#define FROM 0u /* queue that messages are received from */
#define TO 1u   /* queue that copies go to */
#define MESSAGES 300u
#define WINDOW 64u
#define NOW 1000u
#define FAR 0x7fffffffu
#define BODY 100u

static broker b;
static uint32_t table;
static uint8_t body[BODY];

static sb_claims *claims(void) { return sb_claims_at(&b.r, table); }
static uint64_t life(void) { return sb_load(&claims()->state); }
static uint64_t base(void) { return sb_load(&claims()->base); }
static uint64_t copies(void) { return sb_load(&sb_queue_at(&b.r, b.slot[TO])->next_offset); }

static void setup(void)
{
    int created;
    sb_item item;
    broker_open(&b, (broker_shape){.ring_bytes = 1u << 18, .segment_bytes = 1u << 20, .queues = 2, .blocks = 64});
    for (uint32_t i = 0; i < MESSAGES; i++) {
        CHECK_EQ(broker_send(&b, FROM, BODY, 7, i + 1, 0, &item), SB_OK);
    }
    broker_settle(&b);
    sb_group_at(&b.r, GROUP)->group_id = 11;
    CHECK_EQ(sb_claims_open(&b.r, GROUP, b.slot[FROM], 0, sb_now_ns() + BROKER_SECOND_NS, &table, &created), SB_OK);
}

static sb_received take(uint64_t offset, uint32_t slot)
{
    sb_claim claim;
    CHECK_EQ(sb_claim_take(&b.r, table, life(), offset, slot, NOW, FAR, &claim), SB_OK);
    sb_claim_advance(&b.r, table, life(), offset + 1, FAR);
    return (sb_received){.slot = slot, .table = table, .offset = offset, .receipt = claim.word};
}

static void ack(uint64_t offset)
{
    sb_received r = take(offset, OTHER);
    CHECK_EQ(sb_claim_ack(&b.r, table, offset, r.receipt, OTHER), SB_OK);
    sb_claim_base(&b.r, table);
}

static int move(const sb_received *received)
{
    uint64_t end;
    uint32_t waiter = SB_NIL;
    sb_item copy = message_make(&b, TO, body, BODY, 7, received->offset + 1);
    return sb_move(&b.r, received, &copy, sb_now_ns() + BROKER_SECOND_NS, &end, &waiter);
}

/* Offset 0 is received and not acknowledged until the window is full, so that its claim lies in the overflow table. */
static sb_received take_into_overflow(void)
{
    sb_received received = take(0, HOLDER);
    for (uint64_t o = 1; o < WINDOW; o++) {
        ack(o);
    }
    CHECK_EQ(sb_claim_overflow(&b.r, table, life(), WINDOW), SB_OK);
    CHECK(base() > 0);
    return received;
}

static void a_move_acknowledges_in_the_window_and_in_the_overflow_table(void)
{
    for (int overflowed = 0; overflowed < 2; overflowed++) {
        setup();
        sb_received received = overflowed ? take_into_overflow() : take(0, HOLDER);
        CHECK_EQ(move(&received), SB_OK);
        CHECK_EQ(copies(), 1);
        CHECK_EQ(base(), overflowed ? WINDOW : 1);
        CHECK_EQ(sb_load(&claims()->overflowed), 0);
        CHECK_EQ(move(&received), SB_GONE);
        CHECK_EQ(sb_claim_ack(&b.r, table, 0, received.receipt, HOLDER), SB_GONE);
        CHECK_EQ(copies(), 1);
        broker_close(&b);
    }
}

static void what_was_taken_over_or_acknowledged_is_not_moved(void)
{
    setup();
    sb_claim claim;
    CHECK_EQ(sb_claim_take(&b.r, table, life(), 0, HOLDER, NOW, NOW + 10, &claim), SB_OK);
    sb_received late = {.slot = HOLDER, .table = table, .offset = 0, .receipt = claim.word};
    CHECK_EQ(sb_claim_take(&b.r, table, life(), 0, OTHER, NOW + 20, FAR, &claim), SB_OK);
    uint64_t tail = broker_tail(&b);
    CHECK_EQ(move(&late), SB_GONE);
    sb_received acked = take(1, HOLDER);
    CHECK_EQ(sb_claim_ack(&b.r, table, 1, acked.receipt, HOLDER), SB_OK);
    CHECK_EQ(move(&acked), SB_GONE);
    CHECK_EQ(broker_tail(&b), tail);
    broker_close(&b);
}

static void a_move_to_a_deleted_topic_changes_nothing(void)
{
    setup();
    sb_received received = take(0, HOLDER);
    sb_store(&sb_queue_at(&b.r, b.slot[TO])->state, SB_SLOT_FREE);
    CHECK_EQ(move(&received), SB_NOT_FOUND);
    CHECK_EQ(sb_claim_ack(&b.r, table, 0, received.receipt, HOLDER), SB_OK);
    broker_close(&b);
}

static void move_in_child(void *received) { _exit(move(received) == SB_OK ? 0 : 1); }

static void reap_the_dead(void)
{
    uint32_t undecided;
    (void)sb_claims_reap(&b.r, table, HOLDER, &undecided); /* too early: an append may hold one of its claims */
    (void)sb_append_lock_check(&b.r);
    (void)sb_claims_reap(&b.r, table, HOLDER, &undecided);
    CHECK_EQ(undecided, 0);
}

/* The records at `from`: one whole group of copy and PROGRESS, or nothing. */
static void check_move(uint64_t from, int moved)
{
    uint8_t record[1024];
    sb_record h;
    uint32_t size;
    if (!moved) {
        CHECK_EQ(broker_tail(&b), from);
        return;
    }
    CHECK_EQ(sb_ring_read(&b.r, from, record, sizeof record, &size), SB_OK);
    memcpy(&h, record, sizeof h);
    CHECK(h.kind == SB_KIND_MESSAGE && h.queue_id == TO && message_is_whole(record, size));
    uint64_t second = from + sb_padded(h.size);
    CHECK_EQ(h.group_bytes, broker_tail(&b) - from);
    CHECK_EQ(sb_ring_read(&b.r, second, record, sizeof record, &size), SB_OK);
    memcpy(&h, record, sizeof h);
    CHECK_EQ(h.kind, SB_KIND_PROGRESS);
    CHECK_EQ(second + sb_padded(h.size), broker_tail(&b));
}

static void a_kill_at_any_edge_leaves_copy_and_acknowledgement_or_neither(void)
{
    for (int id = 0; id < SB_FP_COUNT; id++) {
        const char *name = sb_failpoint_name(id);
        if (strncmp(name, "append.", 7) != 0 && strncmp(name, "move.", 5) != 0) {
            continue;
        }
        for (int overflowed = 0; overflowed < 2; overflowed++) {
            for (long pass = 1;; pass++) {
                setup();
                sb_received received = overflowed ? take_into_overflow() : take(0, HOLDER);
                uint64_t tail = broker_tail(&b);
                sb_failpoint_arm(id, SB_FP_KILL, pass);
                int left = check_wait(check_fork(move_in_child, &received));
                sb_failpoint_arm(id, SB_FP_OFF, 0);
                CHECK(left == 0 || left == -SIGKILL);
                reap_the_dead();
                int moved = broker_tail(&b) != tail;
                check_move(tail, moved);
                CHECK_EQ(copies(), moved);
                CHECK(left != 0 || moved);
                sb_claim claim;
                int code = sb_claim_take(&b.r, table, life(), 0, OTHER, NOW, FAR, &claim);
                CHECK_EQ(code, moved ? SB_LOST : SB_OK);
                if (!moved) { /* its delivery counts, and whoever has it now moves it */
                    CHECK_EQ(sb_claim_attempts(claim.word), 2);
                    sb_received again = {.slot = OTHER, .table = table, .offset = 0, .receipt = claim.word};
                    CHECK_EQ(move(&again), SB_OK);
                    CHECK_EQ(copies(), 1);
                }
                sb_claim_base(&b.r, table);
                CHECK_EQ(base(), overflowed ? WINDOW : 1);
                check_invariants(&b);
                broker_close(&b);
                if (left == 0) {
                    CHECK(pass > 1 || (id != SB_FP_append_published && id != SB_FP_move_appended)); /* it was passed at all */
                    break;
                }
            }
        }
    }
}

/* ---- the PROGRESS record of one acknowledgement ---- */

static int acked_in(const sb_progress *p, const sb_progress_run *run, uint64_t offset)
{
    for (uint32_t i = 0; i < p->run_count; i++) {
        if (offset >= run[i].first && offset < run[i].first + run[i].count) {
            return run[i].kind == SB_RUN_ACKED;
        }
    }
    return offset < p->base;
}

/* Some are held, some acked, many in the overflow table or few: replayed alone, or over an older record, the record calls
 * acked what was acked, the moved one included, and nothing else. */
static void the_record_of_a_move_calls_nothing_acknowledged_that_is_not(void)
{
    unsigned seed = 20261121;
    static uint8_t done[MESSAGES];
    for (uint32_t round = 0; round < 200; round++) {
        setup();
        memset(done, 0, sizeof done);
        sb_progress_run older[MESSAGES];
        sb_progress old = {.group_id = 11, .version = SB_PROGRESS_VERSION};
        uint32_t every = 2 + (uint32_t)rand_r(&seed) % 40, count = 70 + (uint32_t)rand_r(&seed) % 60, moved = MESSAGES;
        sb_received held[MESSAGES];
        uint32_t kept = 0;
        for (uint64_t o = 0; o < count; o++) {
            if (o >= base() + WINDOW && sb_claim_overflow(&b.r, table, life(), o) != SB_OK) {
                break;
            }
            if (o == count / 2) {
                old.run_count = sb_claims_runs(&b.r, table, &old.base, older, MESSAGES);
            }
            if ((uint32_t)rand_r(&seed) % every == 0) {
                held[kept++] = take(o, HOLDER);
            } else {
                ack(o);
                done[o] = 1;
            }
        }
        if (kept) {
            sb_received *one = &held[(uint32_t)rand_r(&seed) % kept];
            sb_one_ack ack_body;
            sb_claims_one_ack(&b.r, table, one->offset, &ack_body);
            CHECK(ack_body.progress.run_count <= SB_ONE_ACK_RUNS);
            moved = (uint32_t)one->offset;
            for (int over_older = 0; over_older < 2; over_older++) {
                sb_claims_format(&b.r, table, 0); /* as if the memory were lost */
                if (over_older) {
                    CHECK_EQ(sb_claims_merge(&b.r, table, 1, &old, older), SB_OK);
                }
                CHECK_EQ(sb_claims_merge(&b.r, table, !over_older, &ack_body.progress, ack_body.run), SB_OK);
                sb_progress now = {.version = SB_PROGRESS_VERSION};
                sb_progress_run runs[MESSAGES];
                now.run_count = sb_claims_runs(&b.r, table, &now.base, runs, MESSAGES);
                CHECK(acked_in(&now, runs, moved));
                for (uint64_t o = 0; o < MESSAGES; o++) {
                    CHECK(!acked_in(&now, runs, o) || done[o] || o == moved);
                    CHECK(o >= now.base || !over_older || !acked_in(&old, older, o) || acked_in(&now, runs, o));
                }
            }
        }
        broker_close(&b);
    }
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(a_move_acknowledges_in_the_window_and_in_the_overflow_table),
        TEST(what_was_taken_over_or_acknowledged_is_not_moved),
        TEST(a_move_to_a_deleted_topic_changes_nothing),
        TEST(a_kill_at_any_edge_leaves_copy_and_acknowledgement_or_neither),
        TEST(the_record_of_a_move_calls_nothing_acknowledged_that_is_not),
    };
    return CHECK_MAIN(tests);
}
