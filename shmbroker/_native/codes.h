/* codes.h: what a function of the native core answers. C knows words and codes; the binding maps them to errors.py. */
#ifndef SHMBROKER_CODES_H
#define SHMBROKER_CODES_H

enum sb_code {
    SB_OK = 0,
    SB_DUPLICATE = 1,    /* an earlier append with this id exists: its place is in the item */
    SB_END = 2,          /* nothing (visible) there yet */
    SB_BEHIND = 3,       /* no longer in memory: look in the files */
    SB_AGAIN = 4,        /* lost a race: load anew and repeat */
    SB_TIMEOUT = -1,     /* deadline over */
    SB_INTERRUPTED = -2, /* a signal came: let Python look at it, then go on waiting */
    SB_LOCKED = -3,      /* the lock is taken */
    SB_NO_SPACE = -4,    /* the ring has no room before `flushed` moves */
    SB_NO_CAPACITY = -5, /* the disk has no room prepared */
    SB_READ_ONLY = -6,   /* the store failed */
    SB_NOT_RUNNING = -7, /* draining or stopped */
    SB_FENCED = -8,
    SB_TOO_LARGE = -9,   /* a group over its limits */
    SB_LOST = -10,       /* an effect's expected value was not there; nothing changed */
    SB_TABLE_FULL = -11,
    SB_BROKEN = -12,     /* a lock that nobody can repair, or shared memory that makes no sense */
    SB_INVALID = -13,    /* bytes that are no record; an argument out of range */
    SB_GONE = -14,       /* the slot or claim is no longer the caller's */
    SB_EXISTS = -15,
    SB_NOT_FOUND = -16,
    SB_NO_INDEX = -17,   /* the index pool waits for the dispatcher */
    SB_IN_USE = -18      /* somebody alive uses it */
};

#endif
