/* undo.c: see undo.h. */
#include "undo.h"

#include "failpoint.h"

int sb_undo_note(sb_region *r, sb_word *word, uint64_t before, uint64_t after, int claim)
{
    sb_undo *u = &r->control->undo;
    uint64_t n = sb_peek(&u->count);
    if (n >= SB_UNDO_MAX) {
        return SB_TOO_LARGE;
    }
    u->entry[n] = (sb_undo_entry){.at = sb_word_offset(r, word) | (claim ? 1u : 0u), .before = before, .after = after};
    SB_FAILPOINT(append_undo_written);
    sb_store(&u->count, n + 1);
    return SB_OK;
}

int sb_undo_store(sb_region *r, sb_word *word, uint64_t value)
{
    int code = sb_undo_note(r, word, sb_peek(word), value, 0);
    if (code == SB_OK) {
        SB_FAILPOINT(append_armed);
        sb_store(word, value);
    }
    return code;
}

void sb_undo_repair(sb_region *r)
{
    sb_undo *u = &r->control->undo;
    uint64_t n = sb_load(&u->count);
    if (n > SB_UNDO_MAX) {
        n = SB_UNDO_MAX;
    }
    int published = sb_load(&sb_marks(r)->tail) != sb_load(&u->tail);
    for (uint64_t i = 0; i < n; i++) {
        const sb_undo_entry *e = &u->entry[published ? i : n - 1 - i];
        uint64_t at = e->at & ~7ull, wanted = published ? e->after : e->before;
        if (at < sizeof(sb_header) || at > r->control_bytes - sizeof(sb_word)) {
            continue;
        }
        sb_word *word = (sb_word *)(r->base + at);
        uint64_t moving = sb_claim_moving_form(e->before);
        if (e->at & 1u) { /* only as long as it is ours: its holder may have acked it before we marked it */
            (void)sb_cas(word, &moving, wanted);
        } else {
            sb_store(word, wanted);
        }
    }
    sb_store(&u->count, 0);
}
