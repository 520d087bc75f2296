/* failpoint.h: named places where a test makes the process die, stop or leave. One predictable branch when unarmed. */
#ifndef SHMBROKER_FAILPOINT_H
#define SHMBROKER_FAILPOINT_H

#define SB_FAILPOINTS(X)                                                                                               \
    X(append_locked, "append.locked")             /* lock held, nothing written */                                    \
    X(append_undo_written, "append.undo_written") /* undo filled, not armed */                                        \
    X(append_armed, "append.armed")               /* undo armed, no effect yet */                                     \
    X(append_write_limit, "append.write_limit")   /* old bytes may be overwritten */                                  \
    X(append_half_copied, "append.half_copied")   /* records half in the ring */                                      \
    X(append_copied, "append.copied")             /* records whole, counters old */                                   \
    X(append_effects, "append.effects")           /* counters new, tail old */                                        \
    X(append_published, "append.published")       /* tail new, undo armed, claims MOVING */                           \
    X(effect_stored, "effect.stored")             /* one more effect final, of several */                             \
    X(append_final, "append.final")               /* claims final, undo armed */                                      \
    X(append_disarmed, "append.disarmed")         /* undo empty, lock held */                                         \
    X(append_unlocked, "append.unlocked")         /* published, nobody posted */                                      \
    X(wait_flagged, "wait.flagged")               /* wait slot says WAITING, not asleep */                            \
    X(wait_woken, "wait.woken")                   /* semaphore taken, nothing claimed */                              \
    X(wake_claimed, "wake.claimed")               /* POSTED by CAS, sem_post not made */                              \
    X(claim_chosen, "claim.chosen")               /* word looked at, not changed */                                   \
    X(claim_taken, "claim.taken")                 /* word HELD, caller not told */                                    \
    X(claim_started, "claim.started")             /* prefetched word HELD with a deadline, listener not called */        \
    X(claim_freed, "claim.freed")                 /* word FREE, hint not up */                                        \
    X(claim_acked, "claim.acked")                 /* word ACKED, base not moved */                                    \
    X(claim_pending, "claim.pending")             /* pending_base stored */                                           \
    X(claim_half_reset, "claim.half_reset")       /* some words reset, base old */                                    \
    X(claim_base, "claim.base")                   /* base new, claim lock held */                                     \
    X(claim_reserved, "claim.reserved")           /* overflow: entry reserved, word as it was */                      \
    X(claim_moving, "claim.moving")               /* overflow: entry filled, word marked, entry not live */           \
    X(claim_moved, "claim.moved")                 /* overflow: entry live, base not moved */                          \
    X(claim_remade, "claim.remade")               /* reset: a new table stands ready, the old one is in force */         \
    X(claim_begun_anew, "claim.begun_anew")       /* reset: done, sleeping members not told */                           \
    X(move_appended, "move.appended")             /* copy and ack are there, base old, nobody posted */               \
    X(queue_taken, "queue.taken")                 /* semaphore ours, owner not named */                               \
    X(queue_owned, "queue.owned")                 /* named, nothing claimed */                                        \
    X(queue_nameless, "queue.nameless")           /* semaphore ours, owner not named any more */                      \
    X(queue_freed, "queue.freed")                 /* nobody owns it, who asked for it is not woken */                 \
    X(flushed_stored, "flushed.stored")           /* flushed new, nobody posted */

enum sb_failpoint_id {
#define SB_FAILPOINT_ENUM(id, name) SB_FP_##id,
    SB_FAILPOINTS(SB_FAILPOINT_ENUM)
#undef SB_FAILPOINT_ENUM
    SB_FP_COUNT
};

enum sb_failpoint_action { SB_FP_OFF = 0, SB_FP_KILL = 1, SB_FP_STOP = 2, SB_FP_EXIT = 3 };

extern int sb_failpoints_armed;
const char *sb_failpoint_name(int id);
void sb_failpoint_arm(int id, int action, long at);
void sb_failpoint_hit(int id);

#define SB_FAILPOINT(id)                                                                                               \
    do {                                                                                                               \
        if (__builtin_expect(sb_failpoints_armed, 0)) {                                                                \
            sb_failpoint_hit(SB_FP_##id);                                                                              \
        }                                                                                                              \
    } while (0)

#endif
