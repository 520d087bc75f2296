"""What a send has reached, and what a listener answers, in RocketMQ's words (their 4.x meaning)."""

from __future__ import annotations

from enum import IntEnum


class SendStatus(IntEnum):
    """Whichever it is: the message is stored in memory and will be delivered. They differ in what is proven beyond."""

    SEND_OK = 0  # as durable as the broker's flush_disk_type and broker_role promise
    FLUSH_DISK_TIMEOUT = 1  # SYNC_FLUSH: not known to be on the disk in time, or the disk failed
    FLUSH_SLAVE_TIMEOUT = 2  # SYNC_MASTER: the slave did not answer in time
    SLAVE_NOT_AVAILABLE = 3  # SYNC_MASTER: there is no slave in step

    def __str__(self) -> str:
        return self.name


class ConsumeOrderlyStatus(IntEnum):
    """What the listener of an orderly consumer answers. Anything else counts as SUSPEND_CURRENT_QUEUE_A_MOMENT."""

    SUCCESS = 0  # done with: acknowledged, and the queue goes on
    SUSPEND_CURRENT_QUEUE_A_MOMENT = 1  # failed: nothing of this queue is delivered until it comes again

    def __str__(self) -> str:
        return self.name


class ConsumeStatus(IntEnum):
    """What a listener answers. Anything else, an exception included, counts as RECONSUME_LATER."""

    CONSUME_SUCCESS = 0  # done with: acknowledged
    RECONSUME_LATER = 1  # failed: comes again after a delay, and goes to the dead letters after the last try

    def __str__(self) -> str:
        return self.name
