# arguments.pxi: what callers pass. The right types cost one look each; the words for the others stand in message.py.

cdef int64_t NO_DEADLINE = 0x7fffffffffffffff

cdef extern from "Python.h":
    Py_ssize_t PyNumber_AsSsize_t(object number, void *error) except? -1  # error NULL: a huge one is the largest


cdef inline double seconds_of(value, str name) except? -1.0:
    return <double>value if type(value) is float else other_seconds(value, name)


cdef double other_seconds(value, str name) except? -1.0:
    cdef double seconds
    try:
        seconds = value
    except TypeError:
        raise _rules.wrong_type(name, "seconds, as a float or an int", value) from None
    return seconds


cdef inline Py_ssize_t count_of(value, str name) except? -1:
    return PyNumber_AsSsize_t(value, NULL) if type(value) is int else other_count(value, name)


cdef Py_ssize_t other_count(value, str name) except? -1:
    try:
        return PyNumber_AsSsize_t(value, NULL)
    except TypeError:
        raise _rules.wrong_type(name, "an int", value) from None


cdef inline int require_message(value, str name) except -1:
    if not isinstance(value, Message):
        raise _rules.no_message(name, value)
    return 0


cdef list listed(values, str wanted):
    """A list of our own of the messages that a caller passes."""
    try:
        iterator = iter(values)
    except TypeError:
        raise _rules.wrong_type("messages", wanted, values) from None
    return list(iterator)


cdef int64_t deadline_of(timeout) except -1:
    """Absolute ns of CLOCK_MONOTONIC for float seconds; None waits for ever."""
    if timeout is None:
        return NO_DEADLINE
    cdef double seconds = seconds_of(timeout, "timeout")
    if not seconds >= 0:
        raise _errors.BadRequest(f"timeout = {timeout!r}: must be seconds, 0 or more, or None for no limit")
    return sb_now_ns() + <int64_t>(min(seconds, 1e9) * 1e9)
