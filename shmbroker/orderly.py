"""A member of a group that consumes in order: it owns whole queues, and takes each from its oldest message on.

Who owns what: ``_native/orderly.pxi``. What becomes of a message that its listener refuses: ``_native/push.pxi``.
"""

from __future__ import annotations

import logging

from shmbroker import memory
from shmbroker._native._core import Region
from shmbroker.consumer import SimpleConsumer
from shmbroker.errors import BrokerClosed
from shmbroker.queue_locks import open_locks, remove_locks

logger = logging.getLogger("shmbroker.orderly")


class OrderlyMember(SimpleConsumer):
    """What an orderly PushConsumer receives through. Raises what ``SimpleConsumer`` raises, and AttachRefused."""

    def _subscribe(self) -> None:
        """Ownership first: who has joined the group may find messages."""
        self._leave()
        self._open_locks(self._home.attach().region)
        super()._subscribe()

    def _locks_removed(self) -> None:
        """Queues that we work on stay ours as long as we have claims there: nobody goes past those."""
        logger.warning("group %s: somebody has removed the semaphores that say who owns a queue: made anew", self.group)
        self._open_locks(self.client.region)

    def _open_locks(self, region: Region) -> None:
        found = open_locks(region, self._home.config.layout.claim_tables, self._home.directory)
        if region.get("state") == memory.STATE_STOPPED:  # who removes them has perhaps looked before these were made
            remove_locks(region.header["instance"])
            raise BrokerClosed("consuming in order: the broker has stopped")
        self._own_by(found)


__all__ = ["OrderlyMember"]
