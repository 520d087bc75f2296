# consumer.pxi: ConsumerCore, receive and ack. Whoever waits here drops the GIL.

from libc.stdint cimport int32_t
from posix.unistd cimport usleep

cdef enum:
    POLLED_MAX = 256  # queues looked at while spinning; the others when something else happens

cdef int64_t SPIN_NS = 50_000  # without the GIL, between two looks at signals and the clock
cdef int64_t STALLED_NS = 2_000_000  # until a message that only the files have is asked for again
cdef double INVISIBLE_MAX = 12 * 3600.0


cdef class ConsumerCore(_Member):
    """Receives and acknowledges. Subclass: shmbroker.consumer.SimpleConsumer."""
    cdef public bint spin
    cdef readonly bint durable_acks
    cdef readonly bint durable_attempts
    cdef uint32_t attempts_ms  # for so long at most a message is held until its attempt is on the disk
    cdef bint called_off       # whoever waits gives up waiting
    cdef uint32_t waiter       # the wait slot of the thread that waits, of a consumer that has only one such

    def __init__(self, Client client not None, str group, *, bint spin=False, bint from_first=True, bint durable_acks=False,
                 double attempts_within=0.0):
        super().__init__(client, group, from_first=from_first)
        self.spin = spin
        self.waiter = SB_NIL
        self.durable_acks = durable_acks
        self.durable_attempts = attempts_within > 0.0
        self.attempts_ms = <uint32_t>(attempts_within * 1000.0)

    # -- for the subclass

    def _reattach(self):
        """The broker has stopped: bind to its successor, or raise BrokerClosed."""
        raise NotImplementedError

    def _write_acks(self, list bodies):
        """Write these PROGRESS bodies to the log and wait until they are flushed, or raise AckNotDurable."""
        raise NotImplementedError

    def _write_attempts(self, list bodies):
        """Write these PROGRESS bodies to the log and return once they are flushed; else raise why not."""
        raise NotImplementedError

    # -- receive

    def receive(self, max_messages=1, wait=0.0, invisible=60.0):
        cdef Py_ssize_t room = count_of(max_messages, "max_messages")
        cdef double wait_seconds = seconds_of(wait, "wait"), invisible_seconds = seconds_of(invisible, "invisible")
        cdef uint32_t invisible_ms
        if room < 1 or not wait_seconds >= 0.0 or not 0.001 <= invisible_seconds <= INVISIBLE_MAX:
            raise _errors.BadRequest(
                f"receive(max_messages={max_messages}, wait={wait}, invisible={invisible}): at least one message, "
                "no negative wait, and an invisible time from 0.001 to 43200 seconds")
        invisible_ms = <uint32_t>(invisible_seconds * 1000.0)
        try:
            return self.deliver_within(wait_seconds, room, invisible_ms)
        except _errors.BrokerClosed:
            if self.shut:
                raise
        self._reattach()
        return self.deliver_within(0.0, room, invisible_ms)

    cdef list deliver_within(self, double wait, Py_ssize_t room, uint32_t invisible_ms):
        cdef uint32_t claimed_ms = invisible_ms + self.attempts_ms
        cdef int64_t deadline_ns
        cdef list out = self.collect(self.ready(), room, claimed_ms)
        if not out and wait > 0.0:
            deadline_ns = sb_now_ns() + <int64_t>(min(wait, 1e9) * 1e9)
            out = self.wait_for(deadline_ns, room, claimed_ms)
        return self.hand_over(out, invisible_ms) if self.durable_attempts and out else out

    cdef list hand_over(self, list out, uint32_t invisible_ms):
        """What was claimed, once the log has on the disk that it was delivered. From now on it is invisible for as long as
        the caller wants; what could not be written is given back, as if it had never been claimed."""
        cdef Client client = self.client
        cdef uint32_t deadline_ms
        cdef ReceivedMessage message
        cdef list kept = []
        try:
            self._write_attempts(self.progress_of(client.check(), out))
        except BaseException:
            give_back(out)
            raise
        deadline_ms = sb_claim_deadline_after(<uint32_t>(sb_now_ns() // 1_000_000), invisible_ms)
        # Left out is what is not this consumer's any more: its claim is over, since this process was stopped meanwhile, or
        # an append decides about it. That one is not waited for: the time of all the others has begun.
        for message in out:
            if self.change(&client.region.r, message, True, deadline_ms) == SB_OK:
                kept.append(message)
        return kept

    cdef list wait_for(self, int64_t deadline_ns, Py_ssize_t room, uint32_t invisible_ms):
        cdef Client client = self.client
        cdef uint32_t waiter
        self.ready()
        waiter = self.waiter = client.take_waiter()
        client.enter()
        try:
            return self.wait_in(client, waiter, deadline_ns, room, invisible_ms)
        finally:
            self.waiter = SB_NIL
            if self.ownership is not None:
                self.ownership.waiter = SB_NIL
            client.give_waiter(waiter)
            client.exit()

    cdef int call_off(self) except -1:
        """End the wait of the one thread that waits, now; and every later one, until ``called_off`` is false again."""
        self.called_off = True
        if self.waiter != SB_NIL and not self.client.closed:
            sb_waiter_wake(&self.client.region.r, self.waiter)
        return 0

    cdef list wait_in(self, Client client, uint32_t waiter, int64_t deadline_ns, Py_ssize_t room, uint32_t invisible_ms):
        """Until there are messages, or the deadline. Without a wait slot (all are taken) it looks every millisecond."""
        cdef sb_region *r
        cdef uint32_t topics[TOPICS_MAX + 1]
        cdef uint32_t count
        cdef int64_t until
        cdef int code = SB_OK
        cdef bint slept = False
        cdef list out
        while True:
            r = self.ready()
            if self.client is not client:
                return []  # bound to another broker by another thread
            if self.spin or waiter == SB_NIL:
                out = self.collect(r, room, invisible_ms)
                if out or self.called_off or sb_now_ns() >= deadline_ns:
                    return out
                if self.spin:
                    self.poll(r, min(deadline_ns, sb_now_ns() + SPIN_NS))
                else:
                    with nogil:
                        usleep(1000)
                check_signals()
                continue
            count = self.begin_wait(r, waiter, topics)
            try:  # once more, now that whoever appends sees us
                out = self.collect(r, room, invisible_ms)
                until = min(deadline_ns, self.next_deadline(r))
                if not out and not self.called_off and sb_now_ns() < deadline_ns:
                    with nogil:
                        code = sb_wait_message_sleep(r, waiter, until)
                    slept = True
            finally:
                sb_wait_message_end(r, waiter, topics, count)
            if slept and not out:
                out = self.collect(self.ready(), room, invisible_ms)  # what we were woken for, before anything else
            if out and slept:
                self.wake_next(r)
            if out or self.called_off or sb_now_ns() >= deadline_ns:
                return out
            if code != SB_OK:  # nobody has posted: a signal interrupts the sleep, or has come just before it
                check_signals()

    cdef uint32_t begin_wait(self, sb_region *r, uint32_t waiter, uint32_t *topics) noexcept:
        """From now on whoever sends wakes us; the caller looks once more. In a paused group only its resume does, which wakes
        everybody: it sees us, or we see it. Returns how many topics there are, for the end of the wait."""
        cdef uint32_t count
        cdef bint paused
        if self.ownership is not None:
            self.ownership.waiter = self.waiter
        while True:
            paused = self.is_paused(r)
            count = 0 if paused else self.topic_slots(topics)
            sb_wait_message_begin(r, waiter, self.wait_group(waiter), topics, count)
            if paused == self.is_paused(r):
                return count
            sb_wait_message_end(r, waiter, topics, count)

    cdef uint32_t wait_group(self, uint32_t waiter) noexcept:
        """Of all who wait with the same number here one is woken for a message."""
        return self.group_slot

    cdef uint32_t topic_slots(self, uint32_t *slots) noexcept:
        cdef uint32_t count = 0
        cdef _Source source
        for source in self.sources:
            if (count == 0 or slots[count - 1] != source.topic_slot) and count <= TOPICS_MAX:  # and the retry topic
                slots[count] = source.topic_slot
                count += 1
        return count

    cdef int64_t next_deadline(self, sb_region *r) noexcept:
        """When the next claim of another member expires: exact without the janitor's help."""
        cdef int64_t now = sb_now_ns(), best = NO_DEADLINE, left
        cdef uint64_t hint
        cdef _Source source
        if self.is_paused(r):
            return best
        if self.stalled:
            best = now + STALLED_NS
        for source in self.sources:
            hint = sb_load(&sb_claims_at(r, source.table).deadline_ms)
            if hint:
                left = <int32_t>(<uint32_t>hint - <uint32_t>(now // 1_000_000))
                best = min(best, now + 1_000_000 * max(1, left))
        return best

    cdef int wake_next(self, sb_region *r) except -1:
        """We were woken, and there is more than we took: pass the wake-up on (R6)."""
        cdef uint32_t now_ms = <uint32_t>(sb_now_ns() // 1_000_000)
        cdef _Source source
        if self.ownership is not None:
            return self.tell_owners(r, visible_limit(r))
        for source in self.sources:
            if sb_claims_claimable(r, source.table, now_ms):
                sb_wake_group(r, source.topic_slot, self.group_slot)
                return 0
        return 0

    cdef int poll(self, sb_region *r, int64_t until) except -1:
        """Burn a core until something looks claimable."""
        cdef uint32_t tables[POLLED_MAX]
        cdef uint32_t count = 0, i
        cdef bint found = False
        cdef _Source source
        for source in self.sources:
            if count < POLLED_MAX:
                tables[count] = source.table
                count += 1
        with nogil:
            while not found and sb_now_ns() < until:
                for i in range(count):
                    if sb_claims_claimable(r, tables[i], <uint32_t>(sb_now_ns() // 1_000_000)):
                        found = True
                        break
        return 0

    # -- ack

    cdef inline int change(self, sb_region *r, ReceivedMessage message, bint renew, uint32_t deadline_ms) except -100:
        """Ack or renew by receipt. SB_OK, SB_GONE, or SB_AGAIN: an append that decides about this claim is in the middle."""
        cdef const sb_record *h = message.header()
        cdef _Source source = message.source
        cdef sb_claim renewed
        cdef int code
        if source.client is not self.client or not source.is_current(r):
            return SB_GONE
        if not renew:
            return sb_claim_ack(r, source.table, h.queue_offset, message.receipt, self.client.slot)
        renewed.word = 0
        code = sb_claim_renew(r, source.table, h.queue_offset, message.receipt, self.client.slot, deadline_ms, &renewed)
        if code == SB_OK:
            message.receipt = renewed.word
        return code

    cdef int decide(self, sb_region *r, ReceivedMessage message, bint renew, uint32_t deadline_ms) except -100:
        """The same, to its end. SB_AGAIN: whoever is in the middle was stopped there, and has not gone on for a second."""
        cdef int code = self.change(r, message, renew, deadline_ms), tries = 0
        while code == SB_AGAIN and tries < 1000:
            tries += 1
            with nogil:
                usleep(1000)
            code = self.change(r, message, renew, deadline_ms)
        return code

    cdef int still_recorded(self, sb_region *r, str doing) except -1:
        """Behind the change of a claim: was the broker still one that records it? A stopping broker reads all progress
        after it has said so: either it sees our change, or we see its word."""
        sb_fence()
        if sb_load(&sb_marks(r).fenced):  # SYNC: fenced (R13)
            raise code_error(r, SB_FENCED, doing)
        if sb_load(&sb_marks(r).state) != SB_STATE_RUNNING:
            raise _errors.BrokerClosed(
                f"{doing}: the broker is stopping; it may not have recorded this, and then delivers the message again")
        return 0

    def ack(self, messages, *, durable=None):
        cdef bint written = self.durable_acks if durable is None else durable
        cdef sb_region *r = self.client.check()
        cdef ReceivedMessage message
        cdef _Source source = None
        cdef uint32_t count = 0
        cdef int code
        cdef list every, expired = None, busy = None
        if self.shut:
            raise _errors.BrokerClosed("this consumer was closed")
        if type(messages) is ReceivedMessage:
            message = <ReceivedMessage>messages
            if not written and self.change(r, message, False, 0) == SB_OK:  # as most are
                self.acked(r, message.source, 1)
                self.still_recorded(r, "acknowledging")
                return
            every = [message]
        elif type(messages) is list:
            every = (<list>messages)[:]
        else:
            every = listed(messages, "one message that receive() returned, or an iterable of them")
        for entry in every:  # all of them, before the first is acknowledged
            if type(entry) is not ReceivedMessage:
                raise _rules.not_received(entry)
            (<ReceivedMessage>entry).header()
        for entry in every:
            message = <ReceivedMessage>entry
            if message.source is not source:
                self.acked(r, source, count)
                source = message.source
                count = 0
            code = self.decide(r, message, False, 0)
            if code == SB_OK:
                count += 1
            elif code == SB_AGAIN:
                busy = with_one_more(busy, message)
            else:
                expired = with_one_more(expired, message)
        self.acked(r, source, count)
        self.still_recorded(r, "acknowledging")
        if written:
            self._write_acks(self.progress_of(r, every))
        if busy is not None:
            raise busy_error("ack", busy) from (None if expired is None else expired_error("ack", expired))
        if expired is not None:
            raise expired_error("ack", expired)

    cdef list progress_of(self, sb_region *r, list messages):
        """The state of each queue that these messages are of, acks and all, as bodies of PROGRESS records (R14)."""
        cdef dict bodies = {}
        cdef ReceivedMessage message
        cdef _Source source
        for message in messages:
            source = message.source
            if source.table not in bodies and source.client is self.client and source.is_current(r):
                bodies[source.table] = progress_body(r, source.table)
        return [body for body in bodies.values() if body is not None]

    cdef int acked(self, sb_region *r, _Source source, uint32_t count) except -1:
        if count:
            sb_claim_base(r, source.table)
            sb_add(&sb_claims_at(r, source.table).acked, count)
            sb_add(&sb_client_at(r, self.client.slot).acks, count)
        return 0

    def change_invisible_duration(self, message, seconds):
        cdef sb_region *r = self.client.check()
        cdef uint32_t deadline_ms = 0
        cdef int code
        cdef double left = seconds_of(seconds, "seconds")
        if type(message) is not ReceivedMessage:
            raise _rules.not_received(message)
        if self.shut:
            raise _errors.BrokerClosed("this consumer was closed")
        if not 0.0 <= left <= INVISIBLE_MAX:
            raise _errors.BadRequest(f"an invisible time of {seconds} seconds: from 0 (available at once) to 43200")
        if left > 0.0:
            deadline_ms = sb_claim_deadline_after(<uint32_t>(sb_now_ns() // 1_000_000), <uint32_t>(left * 1000.0))
        code = self.decide(r, <ReceivedMessage>message, True, deadline_ms)
        if code != SB_OK:
            doing = "change of the invisible duration"
            raise busy_error(doing, [message]) if code == SB_AGAIN else expired_error(doing, [message])
        self.still_recorded(r, "changing the invisible duration")
        if deadline_ms == 0:
            sb_wake_group(r, (<ReceivedMessage>message).source.topic_slot, (<ReceivedMessage>message).source.group_slot)


cdef list with_one_more(list messages, ReceivedMessage message):
    if messages is None:
        return [message]
    messages.append(message)
    return messages


cdef str names_of(list messages):
    names = ", ".join(f"{m.topic}[{m.queue_id}] offset {m.queue_offset}" for m in messages[:5])
    return f"{names} and {len(messages) - 5} more" if len(messages) > 5 else names


cdef object busy_error(str doing, list messages):
    return _errors.BrokerBusy(
        f"{doing}: being moved by a process that was stopped on the way, and not done; what else the call was about is done. "
        f"Let it go on or kill it, and call again with these alone: {names_of(messages)}", messages=messages)


cdef object expired_error(str doing, list messages):
    return _errors.ReceiptExpired(
        f"{doing}: no longer this consumer's (acknowledged already, or the invisible time is over and it was or will be "
        f"delivered again): {names_of(messages)}", messages)
