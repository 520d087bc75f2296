/* move.c: see move.h. The order of stores, and what a kill at each edge leaves:
 *
 *     claim HELD -> MOVING    nothing: the next owner of the append lock puts HELD back, and the dead one's claim returns to the
 *     copy, PROGRESS written  group with its attempts (append.c)
 *     tail                    all of it: the next owner of the lock makes the claim ACKED, before anybody reaps the dead
 *     claim -> ACKED          the same
 *     lock given back         append.disarmed, move.appended: the base, or the acked overflow entry, is left to the next acker,
 *                             search for room or janitor; sleepers to the janitor's backstop
 *
 * Without the memory: the log has both records or, cut with its torn tail, neither. */
#include "move.h"

#include "claim.h"
#include "failpoint.h"
#include "overflow.h"
#include "record.h"

#define PLACES_MAX 8 /* where a claim can be: its word, its overflow entry; a few more than that was given up while we looked */

int sb_move(sb_region *r, const sb_received *received, sb_item *copy, int64_t deadline_ns, uint64_t *end, uint32_t *waiter)
{
    const uint32_t table = received->table;
    sb_claims *c = sb_claims_at(r, table);
    sb_one_ack ack;
    sb_place place = {.word = NULL};
    int code = SB_LOST;
    sb_claims_one_ack(r, table, received->offset, &ack);
    const uint32_t bytes = (uint32_t)(sizeof ack.progress + ack.progress.run_count * sizeof ack.run[0]);
    sb_item items[] = {*copy,
                       {.body = (const uint8_t *)&ack, .body_bytes = bytes, .payload_crc = sb_crc32c(0, &ack, bytes), .born_ns = sb_realtime_ns(),
                        .queue_slot = SB_NIL, .queue_id = SB_NO_QUEUE, .kind = SB_KIND_PROGRESS}};
    for (int places = 0; code == SB_LOST && places < PLACES_MAX; places++) { /* lost: it went to the overflow table, or is over */
        code = sb_claim_locate(r, table, received->offset, received->receipt, received->slot, &place);
        if (code != SB_OK) {
            return code;
        }
        const uint64_t acked = sb_claim_acked(r, sb_load(&c->state), received->receipt, received->offset);
        const sb_effect effect = {.word = place.word, .expected = received->receipt ^ place.binding, .desired = acked ^ place.binding, .claim = 1};
        code = sb_append_wait(r, received->slot, items, 2, &effect, 1, SB_APPEND_SYSTEM, deadline_ns, end, waiter);
    }
    if (code != SB_OK) { /* who took a hint down while the claim was MOVING did not see it */
        if (sb_claim_is_prefetched(received->receipt)) {
            sb_claim_note_prefetched(c);
        } else {
            sb_claim_note_deadline(c, sb_claim_deadline(received->receipt));
        }
        return code == SB_GONE ? SB_NOT_FOUND : code == SB_LOST ? SB_AGAIN : code;
    }
    SB_FAILPOINT(move_appended);
    if (place.entry) {
        sb_overflow_free(r, table, &place);
    }
    sb_claim_base(r, table);
    copy->position = items[0].position;
    copy->queue_offset = items[0].queue_offset;
    sb_append_wake(r, items, 2);
    return SB_OK;
}
