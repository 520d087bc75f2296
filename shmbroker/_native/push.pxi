# push.pxi: PushCore, messages on their way from a prefetched claim to the listener and back.
#
# One listener thread has one lane. Per message there is one call of the listener; the start before it and the ack behind it
# are one CAS each, everything else is done once for many. The GIL is held but for what the listener does, so that it guards
# what threads share here.

from shmbroker.status import ConsumeOrderlyStatus as _ConsumeOrderlyStatus
from shmbroker.status import ConsumeStatus as _ConsumeStatus

cdef enum:
    SETTLED_MAX = 64  # acks between two moves of the base

cdef int64_t SETTLED_NS = 1_000_000   # the base follows a slow listener message by message
cdef uint32_t OWNERS_MS = 12 * 3600 * 1000  # the longest claim there is
cdef uint32_t HOLD_MS = 5_000  # until a failed message comes again whose retry could not be stored (RocketMQ's figure)
cdef double SUSPEND_MIN = 0.01, SUSPEND_MAX = 30.0  # seconds that a queue is held (RocketMQ's limits)
cdef bint held_back = False  # no thread of this process begins a message, but for one that runs alone


cdef class PushCore:
    """Takes the messages of a consumer to a listener. Subclass: shmbroker.push_consumer.PushConsumer."""
    cdef ConsumerCore consumer
    cdef object listener
    cdef Py_ssize_t batch_room     # messages of one call of the listener
    cdef Py_ssize_t ahead_room     # messages prefetched by a lane at a time
    cdef uint32_t timeout_ms
    cdef bint single
    cdef double suspend            # orderly: seconds that a queue is held whose message was refused
    cdef object success, refusal   # what a listener may answer

    def __init__(self, ConsumerCore consumer not None, listener, *, Py_ssize_t batch, Py_ssize_t ahead, int64_t ahead_bytes,
                 uint32_t queue_room, int64_t queue_bytes, double consume_timeout, double suspend):
        self.consumer = consumer
        self.listener = listener
        self.batch_room = batch
        self.single = batch == 1
        self.ahead_room = max(ahead, batch)
        self.timeout_ms = <uint32_t>(consume_timeout * 1000.0)
        self.suspend = suspend
        self.success, self.refusal = _ConsumeStatus if consumer.ownership is None else _ConsumeOrderlyStatus  # its two members
        consumer.idle_room = batch
        consumer.bytes_ahead = ahead_bytes
        consumer.queue_room = queue_room
        consumer.queue_bytes = queue_bytes

    # -- for the subclass

    def _send_back(self, message, int level, error):
        """Move a failed message to the retry topic, or to the dead letters (level -1). ReceiptExpired: another has it."""
        raise NotImplementedError

    def _report_failure(self, messages, error, result):
        """The listener raised, or answered with something that is no ConsumeStatus."""
        raise NotImplementedError

    def _report_late(self, message):
        """The listener answered after the claim was lost."""
        raise NotImplementedError

    def _report_held(self, message, error):
        """A failed message could not be moved: it is held, and comes again in a moment."""
        raise NotImplementedError

    def _report_unwritten(self, error):
        """Durable acknowledgements are not known to be on the disk."""
        raise NotImplementedError

    # -- prefetching; one thread at a time

    def _fill(self, Lane lane not None, double wait):
        """Prefetch for a lane that is empty; waits at most so long for something. Whether there is something."""
        cdef ConsumerCore consumer = self.consumer
        cdef sb_region *r = consumer.ready()
        cdef list out
        cdef ReceivedMessage message
        if consumer.called_off:
            return False
        out = consumer.collect(r, self.ahead_room, 0)
        if not out and wait > 0.0:
            out = consumer.wait_for(sb_now_ns() + <int64_t>(wait * 1e9), self.ahead_room, 0)
        for message in out:
            message.source.ahead += 1
            message.source.ahead_bytes += message.header().size
        lane.ahead = out
        lane.begun = 0
        if consumer.ownership is not None:
            lane.queue = message.source if out else None
        elif len(out) > self.batch_room:  # more than is begun at once: an idle member may take it over
            message = <ReceivedMessage>out[0]
            sb_wake_group(r, message.source.topic_slot, message.source.group_slot)
        return bool(out)

    def _give_back(self, Lane lane not None):
        """What was not begun goes back to the group, uncounted."""
        cdef list left = lane.ahead[lane.begun:]
        cdef ReceivedMessage message
        lane.ahead = []
        lane.begun = 0
        for message in left:
            let_go(message)
        give_back(left)

    @property
    def _group_paused(self):
        cdef Client client = self.consumer.client
        return not client.closed and self.consumer.is_paused(&client.region.r)

    def _lay_down(self, Lane lane not None):
        """Orderly: the lane is empty, so that another thread, or another process, may go on with its queue."""
        cdef _Source source = lane.queue
        cdef ConsumerCore consumer = self.consumer
        cdef sb_region *r
        if source is None or not lane.empty:
            return
        lane.queue = None
        source.busy = False
        if not source.owned or source.client.fork_generation != sb_fork_generation:
            return
        r = &source.client.region.r
        if source.client.closed or source not in consumer.sources or consumer.ownership.is_asked_for(r, source):
            consumer.ownership.give_up(source)
        elif consumer.waiter != SB_NIL and consumer.is_ready(r, source, visible_limit(r), <uint32_t>(sb_now_ns() // 1_000_000)):
            sb_waiter_wake(r, consumer.waiter)

    def _call_off(self):
        self.consumer.call_off()
        if self.consumer.ownership is not None:
            self.consumer.ownership.off = True
            if self.consumer.client.fork_generation == sb_fork_generation:
                self.consumer.ownership.give_up_idle([])

    def _call_on(self):
        self.consumer.called_off = False
        if self.consumer.ownership is not None:
            self.consumer.ownership.off = False

    # -- running

    def _run(self, Lane lane not None, bint alone):
        """Hand the lane's messages to the listener. Returns early when the consumer is called off or its group paused, or
        when another lane wants to be alone; and before a message with a crash on its record, which is begun only if
        ``alone``: True then."""
        cdef ConsumerCore consumer = self.consumer
        cdef sb_region *r = consumer.client.check()
        cdef ReceivedMessage message
        cdef int64_t now = sb_now_ns()
        cdef bint done
        lane.settled_ns = now
        try:
            while (lane.begun < len(lane.ahead) and not consumer.called_off and not consumer.is_paused(r)
                    and (alone or not held_back)):
                message = <ReceivedMessage>lane.ahead[lane.begun]
                if not alone and is_suspect(message):
                    return True
                done = self.begin(lane, message, <uint32_t>(now // 1_000_000))
                if done:
                    done = self.hand_over(lane, lane.message if self.single else lane.batch)
                now = sb_now_ns()
                if lane.acked >= SETTLED_MAX or now - lane.settled_ns > SETTLED_NS:
                    self.settle(lane)
                    lane.settled_ns = now
                    if lane.queue is not None and not consumer.client.closed:
                        consumer.ownership.serve(&consumer.client.region.r, consumer.sources)
                        done = done and not consumer.ownership.is_asked_for(&consumer.client.region.r, lane.queue)
                if lane.queue is not None and not done:
                    self._give_back(lane)  # what stands behind it waits for it, or is for the next owner
                if alone:
                    break
        finally:
            lane.deadline_ms = 0
            self.settle(lane)
        return False

    cdef bint begin(self, Lane lane, ReceivedMessage first, uint32_t now_ms) except -1:
        """Start the next message, or the next few of one queue: their attempts count from here on. False: others have them.

        An owner's time never is over: nobody else would go on with the queue. Its time without ``overran`` is."""
        cdef uint32_t deadline_ms = sb_claim_deadline_after(now_ms, self.timeout_ms + self.consumer.attempts_ms)
        cdef uint32_t claimed_ms = deadline_ms if lane.queue is None else sb_claim_deadline_after(now_ms, OWNERS_MS)
        cdef ReceivedMessage message
        cdef _Source source = first.source
        cdef bint suspect = is_suspect(first), lost = False
        cdef sb_region *r = self.consumer.client.check()
        lane.renewals = 0
        if self.single:
            lane.begun += 1
            lane.message = first
            if not self.start(r, first, claimed_ms):
                lane.message = None
                return False
        else:
            lane.batch = []
            while lane.begun < len(lane.ahead) and len(lane.batch) < self.batch_room and not (lost and lane.queue is not None):
                message = <ReceivedMessage>lane.ahead[lane.begun]
                if message.source is not source or (message is not first and (suspect or is_suspect(message))):
                    break
                lane.begun += 1
                lost = not self.start(r, message, claimed_ms)
                if not lost:
                    lane.batch.append(message)
            if lost and lane.queue is not None:
                self._give_back(lane)
            if not lane.batch:
                return False
        lane.deadline_ms = deadline_ms
        if source is not lane.acked_in:
            self.settle(lane)
            lane.acked_in = source
            lane.context.topic = source.topic
            lane.context.queue_id = source.queue_id
        lane.started += 1 if self.single else <uint32_t>len(lane.batch)
        if self.consumer.durable_attempts:
            self.write_attempts(r, lane)
        return True

    cdef bint start(self, sb_region *r, ReceivedMessage message, uint32_t deadline_ms) except -1:
        cdef _Source source = message.source
        cdef sb_claim started
        cdef int code = SB_GONE
        if source.client is self.consumer.client and source.is_current(r):
            code = sb_claim_start(r, source.table, message.header().queue_offset, message.receipt, source.client.slot, deadline_ms,
                                  &started)
        if code == SB_OK:
            message.receipt = started.word
            return True
        let_go(message)  # SB_AGAIN, too: somebody decides about it, and it stays claimed for others to take over
        return False

    cdef int write_attempts(self, sb_region *r, Lane lane) except -1:
        """As ``ConsumerCore.hand_over``: what could not be written was not delivered."""
        cdef list begun = [lane.message] if self.single else lane.batch
        cdef ReceivedMessage message
        try:
            self.consumer._write_attempts(self.consumer.progress_of(r, begun))
        except BaseException:
            lane.deadline_ms = 0
            lane.started = 0
            for message in begun:
                let_go(message)
            give_back(begun)
            raise
        return 0

    cdef bint hand_over(self, Lane lane, messages) except -1:
        """Call the listener, and do with each message what it answers. Whether the queue may go on: all were done with."""
        cdef ConsumeContext context = lane.context
        cdef Client client = self.consumer.client
        cdef ReceivedMessage message
        cdef int64_t i = 0, succeeded
        cdef object text = None
        cdef bint done = True
        context.suspend_current_queue_time = self.suspend
        context.delay_level_when_next_consume = 0
        context.ack_index = ALL_SUCCEEDED
        try:
            result = self.listener(messages, context)
        except BaseException as error:  # SystemExit and the like, too: a thread of ours does not end with a listener
            result = None
            text = f"{type(error).__name__}: {error}"
            self._report_failure([messages] if self.single else messages, error, None)
        else:
            if result is not self.success and result is not self.refusal:
                text = f"the listener returned {result!r}"
                self._report_failure([messages] if self.single else messages, None, result)
        lane.deadline_ms = 0  # from here on nobody renews
        lane.message = None
        succeeded = context.ack_index + 1 if result is self.success else 0
        if client.closed or client is not self.consumer.client:  # while the listener ran: whatever it held has gone back
            succeeded = -1
        if self.single:
            done = self.finish(lane, <ReceivedMessage>messages, succeeded, 0, text)
        else:
            for message in messages:
                done = self.finish(lane, message, succeeded, i, text) and done
                i += 1
        return done

    cdef bint finish(self, Lane lane, ReceivedMessage message, int64_t succeeded, int64_t i, text) except -1:
        """Message ``i`` of those that the listener had, of which the first ``succeeded`` did; -1: the claims are lost.
        Whether it is done with: acknowledged, or moved."""
        let_go(message)
        if succeeded < 0:
            self._report_late(message)
            return False
        if i >= succeeded:
            return self.fail(message, lane.context, text)
        try:
            if self.consumer.decide(self.consumer.client.check(), message, False, 0) != SB_OK:
                self._report_late(message)
                return False
        except _errors.BrokerBusy as error:
            self._report_held(message, error)
            return False
        if message.source.answered is not None:
            message.source.answered.pop(message.header().queue_offset, None)
        lane.acked += 1
        if self.consumer.durable_acks:
            lane.unwritten.append(message)
        return True

    cdef bint fail(self, ReceivedMessage message, ConsumeContext context, text) except -1:
        cdef int level = context.delay_level_when_next_consume
        cdef uint32_t again_ms
        try:
            if self.consumer.ownership is not None:
                if level >= 0 and message.attempts() < <uint32_t>self.consumer._max_deliveries(message):
                    return self.hold(message, context.suspend_current_queue_time)
                level = -1
            self._send_back(message, level, text)
            return True
        except _errors.ReceiptExpired:
            self._report_late(message)
        except Exception as error:
            again_ms = sb_claim_deadline_after(<uint32_t>(sb_now_ns() // 1_000_000), HOLD_MS)
            if self.consumer.decide(self.consumer.client.check(), message, True, again_ms) == SB_OK:
                self._report_held(message, error)
            else:
                self._report_late(message)
        return False

    cdef bint hold(self, ReceivedMessage message, double seconds) except -1:
        """Orderly: it stays at the head of its queue, claimed, so that nothing goes on there; when its time is over it comes
        again. The claim keeps the count of its deliveries, whoever owns the queue by then."""
        cdef double held = SUSPEND_MIN if not seconds >= SUSPEND_MIN else min(seconds, SUSPEND_MAX)
        cdef uint32_t again_ms = sb_claim_deadline_after(<uint32_t>(sb_now_ns() // 1_000_000), <uint32_t>(held * 1000.0))
        cdef _Source source = message.source
        if self.consumer.decide(self.consumer.client.check(), message, True, again_ms) != SB_OK:
            self._report_late(message)
            return False
        if source.answered is None:
            source.answered = {}
        source.answered[message.header().queue_offset] = sb_claim_attempts(message.receipt)
        return False

    cdef int settle(self, Lane lane) except -1:
        """Once for many: the base moves on, and what was counted is noted."""
        cdef uint32_t acked = lane.acked, started = lane.started
        cdef list unwritten = lane.unwritten
        cdef _Source source = lane.acked_in
        cdef sb_region *r
        lane.acked = lane.started = 0
        if not started and not acked or source.client is not self.consumer.client or source.client.closed:
            return 0
        r = self.consumer.client.check()
        if started and source.is_current(r):
            self.consumer.delivered(r, source, started)
        if not acked or not source.is_current(r):
            return 0
        self.consumer.acked(r, source, acked)
        self.consumer.still_recorded(r, "acknowledging")
        if unwritten:
            lane.unwritten = []
            try:
                self.consumer._write_acks(self.consumer.progress_of(r, unwritten))
            except Exception as error:
                self._report_unwritten(error)
        return 0

    # -- renewal; another thread

    def _renew(self, Lane lane not None, int64_t most):
        """Give what the listener has its full time again if a third of it is left, but at most ``most`` times (-1: always)."""
        cdef uint32_t now_ms = <uint32_t>(sb_now_ns() // 1_000_000), deadline_ms
        cdef int32_t left = <int32_t>(lane.deadline_ms - now_ms)
        cdef sb_region *r = self.consumer.client.check()
        cdef ReceivedMessage message
        if lane.deadline_ms == 0 or not 0 < left <= <int32_t>(self.timeout_ms // 3) or 0 <= most <= lane.renewals:
            return
        lane.deadline_ms = deadline_ms = sb_claim_deadline_after(now_ms, self.timeout_ms)
        lane.renewals += 1
        for message in [lane.message] if self.single else lane.batch:
            self.consumer.decide(r, message, True, deadline_ms)  # if it is lost already, the listener's answer says so

    def _abandon(self, Lane lane not None):
        """What the listener still has goes back to the group, as a delivery that failed; its answer will be refused."""
        cdef sb_region *r = self.consumer.client.check()
        cdef ReceivedMessage message
        if lane.deadline_ms == 0:
            return
        for message in [lane.message] if self.single else lane.batch:
            if self.consumer.decide(r, message, True, 0) == SB_OK:
                sb_wake_group(r, message.source.topic_slot, message.source.group_slot)


def hold_back(bint held):
    """Whether threads of this process return from ``_run`` before their next message, but for one that runs alone."""
    global held_back
    held_back = held
