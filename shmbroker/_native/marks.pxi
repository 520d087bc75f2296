# marks.pxi: the words of sb_watermarks by name, for workers and tools.

cdef void note_damage(sb_region *r, uint64_t position) noexcept:
    """The log is damaged at ``position``: `status` says so. Who met damage first is believed."""
    cdef uint64_t nothing = 0
    sb_cas(&sb_marks(r).damaged, &nothing, position + 1)


cdef sb_word *mark(sb_region *r, str name) except NULL:
    cdef sb_watermarks *m = sb_marks(r)
    if name == "tail":
        return &m.tail
    if name == "flushed":
        return &m.flushed
    if name == "dispatched":
        return &m.dispatched
    if name == "write_limit":
        return &m.write_limit
    if name == "replicated":
        return &m.replicated
    if name == "user_capacity":
        return &m.user_capacity
    if name == "system_capacity":
        return &m.system_capacity
    if name == "indexed":
        return &m.indexed
    if name == "kept":
        return &m.kept
    if name == "snapshot":
        return &m.snapshot
    if name == "state":
        return &m.state
    if name == "store_state":
        return &m.store_state
    if name == "store_errno":
        return &m.store_errno
    if name == "fenced":
        return &m.fenced
    if name == "epoch":
        return &m.epoch
    if name == "sync_flush":
        return &m.sync_flush
    if name == "visible_after":
        return &m.visible_after
    if name == "topic_generation":
        return &m.topic_generation
    if name == "supervisor_pid":
        return &m.supervisor_pid
    if name == "supervisor_start_ticks":
        return &m.supervisor_start_ticks
    if name == "embedded":
        return &m.embedded
    if name == "next_topic_id":
        return &m.next_topic_id
    if name == "next_group_id":
        return &m.next_group_id
    if name == "damaged":
        return &m.damaged
    if name == "lock_takeovers":
        return &m.lock_takeovers
    if name == "timer_turn":
        return &m.timer_turn
    if name == "timers_kept":
        return &m.timers_kept
    if name == "timers_wanted":
        return &m.timers_wanted
    if name == "timed":
        return &m.timed
    if name == "timer_look":
        return &m.timer_look
    raise KeyError(name)
