/* wait_test.c: sleeping and waking. No wake-up is lost in any order of store, flag and post (R6); whoever is killed
 * between two steps is made good by the janitor's backstop. A sleeper looks again by itself after a while, so a lost
 * wake-up shows as a wait that ended although nobody had posted it; how long anything took is never judged. */
#include <pthread.h>
#include <sched.h>

#include "broker.h"
#include "failpoint.h"
#include "janitor.h"
#include "wait.h"

#define FAR (sb_now_ns() + 60 * BROKER_SECOND_NS)
#define LATER_NS 10000000ll /* how far ahead the backstop is told it is, beyond its 5 ms */

static broker b;

static void setup(void)
{
    broker_open(&b, (broker_shape){.ring_bytes = 65536, .segment_bytes = 65536, .queues = 2, .blocks = 16});
}

static sb_waiter *waiter(uint32_t slot) { return sb_waiter_at(&b.r, slot); }
static uint32_t state_of(uint32_t slot) { return atomic_load(&waiter(slot)->state) & 0xffu; }

static uint32_t take(uint32_t client)
{
    uint32_t slot;
    CHECK_EQ(sb_waiter_take(&b.r, client, &slot), SB_OK);
    return slot;
}

static void wait_until_stopped(pid_t pid)
{
    int status;
    CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
}

/* -- slots -------------------------------------------------------------------------------------------------------- */

static void slots_run_out_and_come_back(void)
{
    setup();
    uint32_t slot, n = b.r.limits.waiters;
    for (uint32_t i = 0; i < n; i++) {
        CHECK_EQ(take(i % 3), i);
    }
    CHECK_EQ(sb_waiter_take(&b.r, 0, &slot), SB_TABLE_FULL);
    sb_waiter_give(&b.r, 5);
    CHECK_EQ(take(0), 5);
    CHECK_EQ(sb_waiter_reap(&b.r, 1), (n + 1) / 3);
    CHECK_EQ(take(2), 1);
    broker_close(&b);
}

static void what_is_reached_already_needs_no_sleep(void)
{
    setup();
    uint32_t slot = take(0);
    sb_store(&sb_marks(&b.r)->flushed, 100);
    CHECK_EQ(sb_wait_position(&b.r, slot, SB_WAIT_FLUSH, 100, 0), SB_OK);
    CHECK_EQ(sb_wait_position(&b.r, slot, SB_WAIT_FLUSH, 101, 1), SB_TIMEOUT);
    int64_t deadline = sb_now_ns() + 20000000;
    CHECK_EQ(sb_wait_position(&b.r, slot, SB_WAIT_FLUSH, 101, deadline), SB_TIMEOUT);
    CHECK(sb_now_ns() >= deadline);
    CHECK_EQ(sb_wait_position(&b.r, slot, SB_WAIT_MESSAGE, 101, deadline), SB_INVALID);
    CHECK_EQ(state_of(slot), SB_WAIT_IDLE);
    broker_close(&b);
}

static void a_failed_or_stopped_broker_ends_the_wait_at_once(void)
{
    setup();
    uint32_t slot = take(0);
    sb_watermarks *m = sb_marks(&b.r);
    sb_store(&m->store_state, SB_STORE_READ_ONLY);
    CHECK_EQ(sb_wait_position(&b.r, slot, SB_WAIT_FLUSH, 8, FAR), SB_READ_ONLY);
    sb_store(&m->flushed, 8); /* what was synced before the failure stays synced */
    CHECK_EQ(sb_wait_position(&b.r, slot, SB_WAIT_FLUSH, 8, FAR), SB_OK);
    sb_store(&m->store_state, SB_STORE_OK);
    sb_store(&m->state, SB_STATE_STOPPED);
    CHECK_EQ(sb_wait_position(&b.r, slot, SB_WAIT_FLUSH, 16, FAR), SB_NOT_RUNNING);
    sb_store(&m->fenced, 1);
    CHECK_EQ(sb_wait_position(&b.r, slot, SB_WAIT_FLUSH, 8, FAR), SB_FENCED);
    broker_close(&b);
}

/* -- lost wake-ups ------------------------------------------------------------------------------------------------ */

#define WAITERS 4u
#define ROUNDS 1500u

typedef struct {
    _Atomic uint64_t arrived, lost;
} rendezvous;
static rendezvous *meeting;

/* Wait for 8, 16, 24, ... as the publisher makes them true, each at an unknown moment. */
static void wait_for_rounds(void *unused)
{
    (void)unused;
    uint32_t slot = take(1);
    for (uint64_t round = 1; round <= ROUNDS; round++) {
        atomic_fetch_add(&meeting->arrived, 1);
        int64_t start = sb_now_ns();
        CHECK_EQ(sb_wait_position(&b.r, slot, SB_WAIT_FLUSH, round * 8, FAR), SB_OK);
        if (sb_now_ns() - start > 95000000 && (int64_t)sb_load(&waiter(slot)->posted_ns) < start) {
            atomic_fetch_add(&meeting->lost, 1); /* it slept until it looked by itself */
        }
    }
    sb_waiter_give(&b.r, slot);
}

static void *wait_thread(void *unused)
{
    wait_for_rounds(unused);
    return NULL;
}

static void publish_rounds(void)
{
    for (uint64_t round = 1; round <= ROUNDS; round++) {
        while (atomic_load(&meeting->arrived) < WAITERS * round) {
            (void)sched_yield();
        }
        for (uint64_t i = 0; i < round * 37 % 700; i++) {
            atomic_signal_fence(memory_order_seq_cst); /* hit another instruction of theirs each time */
        }
        (void)sb_publish_flushed(&b.r, round * 8);
    }
}

static void no_wake_up_is_lost_between_threads(void)
{
    setup();
    meeting = check_shared(sizeof *meeting);
    pthread_t threads[WAITERS];
    for (uint32_t i = 0; i < WAITERS; i++) {
        CHECK(pthread_create(&threads[i], NULL, wait_thread, NULL) == 0);
    }
    publish_rounds();
    for (uint32_t i = 0; i < WAITERS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    CHECK_EQ(atomic_load(&meeting->lost), 0);
    broker_close(&b);
}

static void no_wake_up_is_lost_between_processes(void)
{
    setup();
    meeting = check_shared(sizeof *meeting);
    pid_t pids[WAITERS];
    for (uint32_t i = 0; i < WAITERS; i++) {
        pids[i] = check_fork(wait_for_rounds, NULL);
    }
    publish_rounds();
    for (uint32_t i = 0; i < WAITERS; i++) {
        CHECK_EQ(check_wait(pids[i]), 0);
    }
    CHECK_EQ(atomic_load(&meeting->lost), 0);
    broker_close(&b);
}

static void wait_once(void *target)
{
    uint32_t slot = take(1);
    _exit(sb_wait_position(&b.r, slot, SB_WAIT_FLUSH, *(uint64_t *)target, FAR) == SB_OK ? 0 : 1);
}

/* The waiter has set its flag and is stopped before it looks: what is published now must be seen. */
static void what_is_published_behind_the_flag_is_seen(void)
{
    setup();
    uint64_t target = 8;
    sb_failpoint_arm(SB_FP_wait_flagged, SB_FP_STOP, 1);
    pid_t pid = check_fork(wait_once, &target);
    sb_failpoint_arm(SB_FP_wait_flagged, SB_FP_OFF, 0);
    wait_until_stopped(pid);
    CHECK_EQ(state_of(0), SB_WAIT_WAITING);
    CHECK_EQ(sb_publish_flushed(&b.r, 8), 1);
    CHECK_EQ(sb_publish_flushed(&b.r, 16), 0); /* posted once */
    CHECK(kill(pid, SIGCONT) == 0);
    CHECK_EQ(check_wait(pid), 0);
    broker_close(&b);
}

/* Killed with its flag set: nobody waits for it, and its slot is free again after the reaping. */
static void a_waiter_killed_behind_its_flag_is_reaped(void)
{
    setup();
    uint64_t target = 8;
    sb_failpoint_arm(SB_FP_wait_flagged, SB_FP_KILL, 1);
    CHECK_EQ(check_wait(check_fork(wait_once, &target)), -SIGKILL);
    sb_failpoint_arm(SB_FP_wait_flagged, SB_FP_OFF, 0);
    CHECK_EQ(state_of(0), SB_WAIT_WAITING);
    CHECK_EQ(sb_publish_flushed(&b.r, 8), 1); /* a post into the void */
    CHECK_EQ(sb_waiter_reap(&b.r, 1), 1);
    CHECK_EQ(take(2), 0);
    CHECK_EQ(sb_wait_position(&b.r, 0, SB_WAIT_FLUSH, 16, sb_now_ns() + 20000000), SB_TIMEOUT); /* no credit left over */
    broker_close(&b);
}

static void publish_in_child(void *position)
{
    (void)sb_publish_flushed(&b.r, *(uint64_t *)position);
    _exit(0);
}

/* The flusher dies after the store of flushed, or after it took the waiter and before the post. */
static void a_publisher_killed_before_its_post_is_made_good(void)
{
    static const int ids[] = {SB_FP_flushed_stored, SB_FP_wake_claimed};
    for (int k = 0; k < 2; k++) {
        setup();
        uint64_t target = 8;
        pid_t sleeper = check_fork(wait_once, &target);
        while (state_of(0) != SB_WAIT_WAITING) {
            (void)sched_yield();
        }
        CHECK(kill(sleeper, SIGSTOP) == 0); /* it must not look by itself while we count posts */
        wait_until_stopped(sleeper);
        CHECK_EQ(state_of(0), SB_WAIT_WAITING);
        sb_failpoint_arm(ids[k], SB_FP_KILL, 1);
        CHECK_EQ(check_wait(check_fork(publish_in_child, &target)), -SIGKILL);
        sb_failpoint_arm(ids[k], SB_FP_OFF, 0);
        CHECK_EQ(sb_load(&sb_marks(&b.r)->flushed), 8);
        CHECK_EQ(state_of(0), k == 0 ? SB_WAIT_WAITING : SB_WAIT_POSTED);
        CHECK_EQ(sb_wait_backstop(&b.r, sb_now_ns() + LATER_NS), 1);
        CHECK_EQ(sb_wait_backstop(&b.r, sb_now_ns()), 0); /* not again at once */
        CHECK(kill(sleeper, SIGCONT) == 0);
        CHECK_EQ(check_wait(sleeper), 0);
        broker_close(&b);
    }
}

/* -- messages ----------------------------------------------------------------------------------------------------- */

static void sleep_for_topic(uint32_t slot, uint32_t group) { sb_wait_message_begin(&b.r, slot, group, &b.topic, 1); }

static void a_message_wakes_one_sleeper_of_every_group(void)
{
    setup();
    for (uint32_t i = 0; i < 6; i++) {
        sleep_for_topic(take(1), i / 2);
    }
    CHECK_EQ(sb_wake_topic(&b.r, b.topic), 3);
    for (uint32_t i = 0; i < 6; i++) {
        CHECK_EQ(state_of(i), i % 2 ? SB_WAIT_WAITING : SB_WAIT_POSTED);
    }
    CHECK_EQ(sb_wake_group(&b.r, b.topic, 1), 1);
    CHECK_EQ(state_of(3), SB_WAIT_POSTED);
    CHECK_EQ(sb_wake_group(&b.r, b.topic, 1), 0);
    CHECK_EQ(sb_wait_message_sleep(&b.r, 3, FAR), SB_OK);
    sb_wait_message_end(&b.r, 3, &b.topic, 1);
    sleep_for_topic(3, 1);
    CHECK_EQ(sb_wake_topic(&b.r, b.topic), 3);
    CHECK_EQ(state_of(3), SB_WAIT_POSTED);
    for (uint32_t i = 0; i < 6; i++) {
        CHECK_EQ(state_of(i), SB_WAIT_POSTED);
        CHECK_EQ(sb_wait_message_sleep(&b.r, i, FAR), SB_OK);
        sb_wait_message_end(&b.r, i, &b.topic, 1);
    }
    CHECK_EQ(sb_wake_topic(&b.r, b.topic), 0);
    broker_close(&b);
}

/* More sleeping groups than the waker remembers at a time: none is left out. */
static void every_group_is_woken_however_many_there_are(void)
{
    setup();
    for (uint32_t i = 0; i < b.r.limits.waiters; i++) {
        sleep_for_topic(take(1), i);
    }
    CHECK_EQ(sb_wake_topic(&b.r, b.topic), b.r.limits.waiters);
    broker_close(&b);
}

static void send_in_child(void *unused)
{
    (void)unused;
    sb_item item;
    CHECK_EQ(broker_send(&b, 0, 1, 7, 1, 0, &item), SB_OK);
    sb_append_wake(&b.r, &item, 1);
    _exit(0);
}

/* The message is published and flushed before its sender has told anybody: sender or flusher must wake the consumer. */
static void a_message_flushed_before_its_sender_woke_anybody_is_told(void)
{
    setup();
    uint32_t slot = take(1);
    sb_store(&sb_marks(&b.r)->visible_after, SB_VISIBLE_FLUSH);
    sleep_for_topic(slot, 0);
    sb_failpoint_arm(SB_FP_append_unlocked, SB_FP_STOP, 1);
    pid_t pid = check_fork(send_in_child, NULL);
    sb_failpoint_arm(SB_FP_append_unlocked, SB_FP_OFF, 0);
    wait_until_stopped(pid);
    (void)sb_publish_flushed(&b.r, broker_tail(&b));
    CHECK(kill(pid, SIGCONT) == 0);
    CHECK_EQ(check_wait(pid), 0);
    CHECK_EQ(state_of(slot), SB_WAIT_POSTED);
    CHECK_EQ(sb_wait_message_sleep(&b.r, slot, FAR), SB_OK);
    broker_close(&b);
}

static void visibility_decides_whose_post_it_is(void)
{
    setup();
    uint32_t slot = take(1);
    sb_item item;
    sleep_for_topic(slot, 0);
    CHECK_EQ(broker_send(&b, 0, 1, 7, 1, 0, &item), SB_OK);
    sb_append_wake(&b.r, &item, 1);
    CHECK_EQ(state_of(slot), SB_WAIT_POSTED);
    sb_wait_message_end(&b.r, slot, &b.topic, 1);
    sb_store(&sb_marks(&b.r)->visible_after, SB_VISIBLE_FLUSH);
    sleep_for_topic(slot, 0);
    (void)sb_publish_flushed(&b.r, broker_tail(&b));
    sb_wait_message_end(&b.r, slot, &b.topic, 1);
    sleep_for_topic(slot, 0);
    CHECK_EQ(broker_send(&b, 0, 1, 7, 2, 0, &item), SB_OK);
    sb_append_wake(&b.r, &item, 1);
    CHECK_EQ(state_of(slot), SB_WAIT_WAITING); /* not visible yet */
    CHECK_EQ(sb_publish_flushed(&b.r, broker_tail(&b)), 1);
    CHECK_EQ(state_of(slot), SB_WAIT_POSTED);
    broker_close(&b);
}

/* -- workers ------------------------------------------------------------------------------------------------------ */

static void flush_in_child(void *unused)
{
    (void)unused;
    uint64_t flushed = sb_load(&sb_marks(&b.r)->flushed);
    while (flushed < 400 * 88) {
        int code = sb_worker_sleep(&b.r, SB_ROLE_FLUSHER, flushed % 3 ? SB_SLEEP_IDLE : SB_SLEEP_TICK, flushed, sb_now_ns() + 20 * BROKER_SECOND_NS);
        CHECK(code == SB_OK || code == SB_INTERRUPTED);
        flushed = broker_tail(&b);
        (void)sb_publish_flushed(&b.r, flushed);
    }
    _exit(0);
}

/* Ping-pong through both kinds of wait: sender sleeps for the flush, flusher for work. A lost post of either stops it. */
static void sender_and_flusher_wake_each_other_every_time(void)
{
    setup();
    sb_store(&sb_marks(&b.r)->sync_flush, 1);
    pid_t pid = check_fork(flush_in_child, NULL);
    uint32_t slot = take(1);
    for (uint64_t i = 0; i < 400; i++) {
        sb_item item;
        CHECK_EQ(broker_send(&b, 0, 1, 7, i, 0, &item), SB_OK);
        sb_append_wake(&b.r, &item, 1);
        sb_store(&sb_marks(&b.r)->dispatched, broker_tail(&b));
        CHECK_EQ(sb_wait_position(&b.r, slot, SB_WAIT_FLUSH, broker_tail(&b), FAR), SB_OK);
    }
    CHECK_EQ(check_wait(pid), 0);
    broker_close(&b);
}

static void a_worker_that_sleeps_over_work_is_posted_by_the_backstop(void)
{
    setup();
    sb_item item;
    sb_worker *w = sb_worker_at(&b.r, SB_ROLE_FLUSHER);
    CHECK_EQ(sb_wait_backstop(&b.r, sb_now_ns()), 0);
    CHECK_EQ(broker_send(&b, 0, 1, 7, 1, 0, &item), SB_OK); /* killed here: it posts nobody */
    CHECK_EQ(sb_wait_backstop(&b.r, sb_now_ns()), 0);      /* and nobody sleeps */
    atomic_store(&w->waiting, 1);
    atomic_store(&w->sleep, SB_SLEEP_IDLE);
    CHECK_EQ(sb_wait_backstop(&b.r, sb_now_ns()), 1);
    CHECK_EQ(sb_semaphore_wait(&w->wake, 0), SB_OK);
    sb_store(&sb_marks(&b.r)->flushed, broker_tail(&b));
    CHECK_EQ(sb_wait_backstop(&b.r, sb_now_ns()), 0);
    broker_close(&b);
}

/* -- sb_append_wait ------------------------------------------------------------------------------------------------ */

static void append_when_there_is_room(void *unused)
{
    (void)unused;
    static uint8_t body[20000];
    uint64_t end;
    uint32_t slot = SB_NIL;
    int code;
    sb_item item = message_make(&b, 1, body, 16000, 8, 1);
    do {
        code = sb_append_wait(&b.r, 1, &item, 1, NULL, 0, 0, FAR, &end, &slot);
    } while (code == SB_INTERRUPTED);
    CHECK(slot != SB_NIL);
    _exit(code == SB_OK ? 0 : 1);
}

static void a_sender_waits_for_room_and_goes_on_when_it_comes(void)
{
    setup();
    sb_item item;
    uint64_t n = 0;
    while (broker_send(&b, 0, 8000, 7, ++n, 0, &item) == SB_OK) {
    }
    pid_t pid = check_fork(append_when_there_is_room, NULL);
    while (state_of(0) != SB_WAIT_WAITING) {
        (void)sched_yield();
    }
    CHECK_EQ(waiter(0)->kind, SB_WAIT_SPACE);
    uint64_t tail = broker_tail(&b);
    CHECK_EQ(broker_tail(&b), tail);
    (void)sb_publish_flushed(&b.r, sb_load(&waiter(0)->target));
    CHECK_EQ(check_wait(pid), 0);
    CHECK(broker_tail(&b) > tail);
    check_invariants(&b);
    broker_close(&b);
}

static void a_sender_gives_up_at_its_deadline_with_the_reason_and_nothing_stored(void)
{
    static uint8_t body[16000];
    setup();
    uint64_t end;
    uint32_t slot = SB_NIL;
    sb_item item = message_make(&b, 0, body, 16000, 8, 1);
    sb_store(&sb_marks(&b.r)->user_capacity, 1000);
    CHECK_EQ(sb_append_wait(&b.r, 1, &item, 1, NULL, 0, 0, sb_now_ns() + 20000000, &end, &slot), SB_NO_CAPACITY);
    sb_store(&sb_marks(&b.r)->store_state, SB_STORE_FULL);
    CHECK_EQ(sb_append_wait(&b.r, 1, &item, 1, NULL, 0, 0, FAR, &end, &slot), SB_NO_CAPACITY); /* at once */
    sb_store(&sb_marks(&b.r)->store_state, SB_STORE_OK);
    sb_store(&sb_marks(&b.r)->user_capacity, UINT64_MAX);
    for (uint64_t i = 0; i < 4; i++) {
        CHECK_EQ(broker_send(&b, 0, 15000, 7, i, 0, &item), SB_OK);
    }
    uint64_t tail = broker_tail(&b);
    item = message_make(&b, 0, body, 16000, 8, 1);
    CHECK_EQ(sb_append_wait(&b.r, 1, &item, 1, NULL, 0, 0, sb_now_ns() + 20000000, &end, &slot), SB_NO_SPACE);
    int64_t start = sb_now_ns();
    CHECK_EQ(sb_append_wait(&b.r, 1, &item, 1, NULL, 0, 0, FAR, &end, &slot), SB_INTERRUPTED); /* signals are looked at */
    CHECK(sb_now_ns() - start >= 90000000);
    CHECK_EQ(broker_tail(&b), tail);
    CHECK_EQ(state_of(slot), SB_WAIT_IDLE);
    broker_close(&b);
}

/* -- hubs --------------------------------------------------------------------------------------------------------- */

static void one_thread_is_woken_for_all_waits_that_are_joined_to_its_hub(void)
{
    setup();
    uint32_t hub = take(0), message = take(0), flush = take(0);
    sb_hub_join(&b.r, hub, message);
    sb_hub_join(&b.r, hub, flush);
    CHECK_EQ(sb_hub_sleep(&b.r, hub, 1), SB_TIMEOUT);
    sleep_for_topic(message, 0);
    CHECK_EQ(sb_wait_position_begin(&b.r, flush, SB_WAIT_FLUSH, 8), SB_AGAIN);
    CHECK_EQ(sb_wake_topic(&b.r, b.topic), 1);
    CHECK_EQ(sb_hub_sleep(&b.r, hub, FAR), SB_OK);
    CHECK(sb_waiter_is_posted(&b.r, message) && !sb_waiter_is_posted(&b.r, flush));
    CHECK_EQ(sb_publish_flushed(&b.r, 8), 1);
    CHECK_EQ(sb_hub_sleep(&b.r, hub, FAR), SB_OK);
    CHECK(sb_waiter_is_posted(&b.r, flush));
    CHECK_EQ(sb_wait_backstop(&b.r, sb_now_ns() + LATER_NS), 2); /* the loop is busy with something else */
    CHECK_EQ(sb_hub_sleep(&b.r, hub, FAR), SB_OK);
    CHECK_EQ(sb_hub_sleep(&b.r, hub, FAR), SB_OK);
    sb_wait_message_end(&b.r, message, &b.topic, 1);
    sb_wait_position_end(&b.r, flush);
    CHECK_EQ(sb_wait_position_begin(&b.r, flush, SB_WAIT_FLUSH, 8), SB_OK);
    CHECK_EQ(state_of(flush), SB_WAIT_IDLE);
    sb_hub_post(&b.r, hub);
    CHECK_EQ(sb_hub_sleep(&b.r, hub, FAR), SB_OK);
    CHECK_EQ(sb_hub_sleep(&b.r, hub, 1), SB_TIMEOUT);
    broker_close(&b);
}

static void a_slot_that_leaves_its_hub_is_woken_itself_again(void)
{
    setup();
    uint32_t hub = take(0), slot = take(0);
    sb_hub_join(&b.r, hub, slot);
    sb_waiter_give(&b.r, slot);
    CHECK_EQ(take(1), slot);
    sleep_for_topic(slot, 0);
    CHECK_EQ(sb_wake_topic(&b.r, b.topic), 1);
    CHECK_EQ(sb_wait_message_sleep(&b.r, slot, FAR), SB_OK);
    CHECK_EQ(sb_hub_sleep(&b.r, hub, 1), SB_TIMEOUT);
    broker_close(&b);
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(slots_run_out_and_come_back),
        TEST(what_is_reached_already_needs_no_sleep),
        TEST(a_failed_or_stopped_broker_ends_the_wait_at_once),
        TEST(no_wake_up_is_lost_between_threads),
        TEST(no_wake_up_is_lost_between_processes),
        TEST(what_is_published_behind_the_flag_is_seen),
        TEST(a_waiter_killed_behind_its_flag_is_reaped),
        TEST(a_publisher_killed_before_its_post_is_made_good),
        TEST(a_message_wakes_one_sleeper_of_every_group),
        TEST(every_group_is_woken_however_many_there_are),
        TEST(a_message_flushed_before_its_sender_woke_anybody_is_told),
        TEST(visibility_decides_whose_post_it_is),
        TEST(sender_and_flusher_wake_each_other_every_time),
        TEST(a_worker_that_sleeps_over_work_is_posted_by_the_backstop),
        TEST(a_sender_waits_for_room_and_goes_on_when_it_comes),
        TEST(a_sender_gives_up_at_its_deadline_with_the_reason_and_nothing_stored),
        TEST(one_thread_is_woken_for_all_waits_that_are_joined_to_its_hub),
        TEST(a_slot_that_leaves_its_hub_is_woken_itself_again),
    };
    return CHECK_MAIN(tests);
}
