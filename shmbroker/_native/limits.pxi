# limits.pxi: what a region's head says, as dictionaries: the sizes of its tables, and its header.


cdef sb_limits make_limits(object limits) except *:
    cdef sb_limits sized
    memset(&sized, 0, sizeof(sized))
    if set(limits) != set(LIMIT_NAMES):
        raise ValueError(f"limits must name exactly {LIMIT_NAMES}")
    sized.clients = limits["clients"]
    sized.waiters = limits["waiters"]
    sized.topics = limits["topics"]
    sized.queues = limits["queues"]
    sized.groups = limits["groups"]
    sized.claim_tables = limits["claim_tables"]
    sized.claim_window = limits["claim_window"]
    sized.overflow_claims = limits["overflow_claims"]
    sized.ids = limits["ids"]
    sized.blocks = limits["blocks"]
    sized.reserve_bytes = limits["reserve_bytes"]
    sized.max_message_bytes = limits["max_message_bytes"]
    if sb_control_size(&sized) == 0:
        raise _errors.ConfigError(f"a limit is out of range: {dict(limits)}")
    return sized


cdef dict header_dict(const sb_header *h):
    return {
        "magic": h.magic, "layout_version": h.layout_version, "record_version": h.record_version,
        "fingerprint": h.fingerprint, "control_bytes": h.control_bytes, "ring_bytes": h.ring_bytes,
        "segment_bytes": h.segment_bytes, "tail_at": h.tail_at, "flushed_at": h.flushed_at, "undo_at": h.undo_at,
        "lock_at": h.lock_at, "directory": (h.directory_device, h.directory_inode),
        "namespaces": (h.pid_namespace, h.ipc_namespace), "instance": PyBytes_FromStringAndSize(<const char *>h.instance, 16),
        "boot_id": PyBytes_FromStringAndSize(<const char *>h.boot_id, 16), "ring_name": h.ring_name.decode("ascii", "replace"),
        "owner_uid": h.owner_uid,
    }
