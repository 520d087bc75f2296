# errors.pxi: what the codes of the native core are to Python: an exception whose message names cause and remedy.

from cpython.exc cimport PyErr_CheckSignals

import os as _os

from shmbroker import errors as _errors


cdef object code_error(sb_region *r, int code, str doing):
    """The exception for a native code. The message names cause and remedy."""
    if code == SB_NO_SPACE:
        return _errors.BrokerBusy(
            f"{doing}: the ring stayed full: the disk does not keep up with what is sent, or the flusher is stopped "
            "(`shmbroker status` shows which). Nothing was stored; send again later, or raise ring_bytes")
    if code == SB_NO_INDEX:
        return _errors.BrokerBusy(
            f"{doing}: the queue index stayed full: the dispatcher does not keep up or is stopped. Nothing was stored")
    if code == SB_TIMEOUT or code == SB_LOCKED:
        holder = sb_mutex_holder(&r.control.locks.append)
        return _errors.BrokerBusy(
            f"{doing}: the append lock stayed taken, by process {holder} (if it is stopped: kill -CONT or kill -9 it). "
            "Nothing was stored", holder_pid=holder)
    if code == SB_NO_CAPACITY:
        if sb_load(&sb_marks(r).store_state) != SB_STORE_FULL:
            return _errors.BrokerBusy(f"{doing}: no segment stood ready in time. Nothing was stored; send again later")
        return _errors.StoreFull(
            f"{doing}: the disk is full. Nothing was stored; free space or let consumers work, sending resumes by itself")
    if code == SB_READ_ONLY:
        number = <int>sb_load(&sb_marks(r).store_errno)
        return _errors.StoreReadOnly(
            f"{doing}: the store is read-only since a write failed with {_os.strerror(number)} (errno {number}). "
            "Mend the disk, then restart the broker: what was not synced is written again from memory")
    if code == SB_NOT_RUNNING:
        return _errors.BrokerClosed(f"{doing}: the broker is stopping or has stopped")
    if code == SB_FENCED:
        return _errors.BrokerFenced(f"{doing}: another directory was promoted; whether this was stored is unknown")
    if code == SB_TOO_LARGE:
        limit = min(r.ring_bytes, r.segment_bytes) // 4
        return _errors.MessageTooLarge(
            f"{doing}: what is appended at once may hold {SB_GROUP_RECORDS_MAX} records and {limit} bytes (a quarter of ring "
            f"or segment), with tags, keys, properties and {SB_RECORD_HEADER} bytes of header each. Nothing was stored")
    if code == SB_TABLE_FULL:
        return _errors.LimitReached(f"{doing}: a table of the broker's memory is full; see max_* and claim_tables in broker.toml")
    if code == SB_EXISTS:
        return _errors.ConfigConflict(f"{doing}: the name is taken by another id")
    if code == SB_GONE:
        return _errors.TopicNotExist(f"{doing}: the topic was deleted meanwhile. Nothing was stored")
    if code == SB_INVALID:
        return _errors.BadRequest(f"{doing}: value out of range")
    return _errors.LayoutMismatch(f"{doing}: the broker's memory makes no sense (code {code}); restart the broker")


cdef int check_signals() except -1:
    return PyErr_CheckSignals()
