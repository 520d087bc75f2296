"""The model of one message's life, as a group sees it.

    ready ──receive──▶ held ──ack──▶ done
      ▲                 │ expiry, change to 0, close, crash, restart: ready again, the delivery counts
      │                 │ sent back
      └── at once or ◀──┴──▶ dead ──resend──▶ ready, as new
          pending

A message with all its deliveries behind it is *spent*: whoever would receive it makes it a dead letter instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from shmbroker import RetryPolicy

POLICY: Final = RetryPolicy("table", max_retries=2, delays=(0.0, 0.1))

Where = Literal["ready", "held", "pending", "done", "dead", "gone"]


@dataclass
class Fate:
    """What the model knows of one message."""

    where: Where = "ready"
    attempts: int = 0
    holder: int = -1  # actor
    due: float = 0.0  # of one that is pending, by time.time()
    handle: str | None = None  # of one that was sent with a delay
    resent: bool = False  # it comes from the queue of the retries

    @property
    def spent(self) -> bool:
        return self.where == "ready" and self.attempts >= POLICY.max_deliveries

    @property
    def receivable(self) -> bool:
        return self.where == "ready" and not self.spent

    def give_back(self) -> None:
        self.where, self.holder = "ready", -1

    def fail(self, level: int, *, now: float, dead: list[tuple[str, int]], body: str) -> None:
        """Sent back behind its delivery ``attempts``, at ``now`` or later."""
        self.holder = -1
        if level == -1 or self.attempts >= POLICY.max_deliveries:
            self.where = "dead"
            dead.append((body, self.attempts))
        elif delay := POLICY.delay(self.attempts, ()):
            self.where, self.due = "pending", now + delay
        else:
            self.where = "ready"
