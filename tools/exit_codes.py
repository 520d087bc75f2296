"""How the commands leave. One enum, so that scripts and documents can rely on it; docs/operations.md has the table."""

from __future__ import annotations

from shmbroker import errors
from shmbroker.leaving import MeantCode


class ExitCode(MeantCode):
    """Exit codes of ``shmbroker``, each with its meaning; ``serve`` and ``worker`` have those of workers/common.py."""

    OK = 0, "done"
    FINDING = 1, "done, and something was found: damage, a lost message, a difference, an unhealthy broker"
    USAGE = 2, "the command line is wrong, or the request can never succeed"
    RETRY_LATER = 3, "retry later: busy, not ready, timed out"
    OPERATOR = 4, "a person has to act: disk full, read-only store, corrupt log, not enough memory, unusable directory"
    REFUSED = 5, "refused: another user, another namespace, another setting or subscription"
    NOT_SERVED = 6, "not served: no broker runs for this directory, or it has gone away"
    INTERNAL = 70, "a fault of shmbroker; please report it"
    INTERRUPTED = 130, "left because of Ctrl-C"
    TERMINATED = 143, "left because of SIGTERM"


# The first class that matches decides; the order is that of the tree in errors.py, leaves before branches.
_BY_CLASS: tuple[tuple[type[Exception], ExitCode], ...] = (
    (errors.Retryable, ExitCode.RETRY_LATER),
    (errors.BadRequest, ExitCode.USAGE),
    (errors.Refused, ExitCode.REFUSED),
    (errors.NeedsOperator, ExitCode.OPERATOR),
    (errors.NeedsRestart, ExitCode.NOT_SERVED),
    (errors.PositionGone, ExitCode.FINDING),
    (errors.AckNotDurable, ExitCode.RETRY_LATER),
    (PermissionError, ExitCode.REFUSED),
    (OSError, ExitCode.OPERATOR),
)

# What a person should do, where the error's own sentence does not say it. Leaves before branches.
_REMEDIES: tuple[tuple[type[Exception], str], ...] = (
    (errors.BrokerBusy, "try again; `shmbroker status` shows what holds it up"),
    (errors.TopicNotExist, "`shmbroker topic list` shows those that exist"),
    (errors.GroupNotExist, "`shmbroker group list` shows those that exist"),
    (errors.ReceiptExpired, "the message will be delivered again; a longer --invisible gives more time"),
    (errors.StoreFull, "free space on that disk; sending resumes by itself"),
    (errors.StoreReadOnly, "look at the kernel log, back up to another disk, replace the disk, start the broker again"),
    (errors.CorruptLog, "`shmbroker log verify` names every damaged place; restore a backup or repair a copy"),
    (errors.LayoutMismatch, "stop the broker of the other version, then start this one"),
    (errors.BrokerClosed, "run the command again"),
)


def exit_code(error: Exception) -> ExitCode:
    """The code with which an error ends a command."""
    return next((code for kind, code in _BY_CLASS if isinstance(error, kind)), ExitCode.INTERNAL)


def remedy(error: Exception) -> str:
    """What to do about an error; empty if its own text names one of the commands, and so says it."""
    text = next((text for kind, text in _REMEDIES if isinstance(error, kind)), "")
    return "" if any(command in str(error) for command in text.split("`")[1::2]) else text
