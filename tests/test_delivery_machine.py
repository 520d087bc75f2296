"""The whole life of messages against a model: hypothesis chooses what happens, ``support/fate.py`` says what follows.

Everything is done by real processes on a real broker, which are killed, and restarted with and without their memory.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Final

import pytest
from conftest import objects_of
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support.actor import GROUP, TOPIC, Nursery, Told, answer_to
from support.fate import POLICY, Fate
from support.processes import kill_all, wait_for_workers, wait_gone, workers_of
from support.running import QUICK, lose_memory
from support.waiting import wait_until

import shmbroker

pytestmark = pytest.mark.crash

QUEUES: Final = 2
ENDS: Final = ("workers killed", "everything killed", "stopped", "power cut")
LONG, BRIEF, TICK = 600.0, 0.05, 0.02

WHO: Final = st.integers(0, 1)  # of two actors
PICK: Final = st.integers(0, 99)  # of however many there are: what hypothesis draws must not hang on what happens


def picked(pick: int, choices: list[str]) -> str | None:
    return choices[pick % len(choices)] if choices else None


class Delivery(RuleBasedStateMachine):
    """``durable``: acknowledgements, attempts and sends wait for the disk, so that a power cut takes nothing back."""

    durable = False
    places: Path
    nursery: Nursery
    number = count()

    def __init__(self) -> None:
        super().__init__()
        self.directory = self.places / f"{next(self.number)}"
        self.settings = QUICK | ({"flush_disk_type": "SYNC_FLUSH"} if self.durable else {})
        self.modes = {"ack": "durable", "attempts": "durable"} if self.durable else {}
        self.fates: dict[str, Fate] = {}
        self.sent: list[tuple[str, int]] = []  # to a queue of the test's choice
        self.dead: list[tuple[str, int]] = []  # every letter that ever was, with its deliveries
        self.stale: list[set[str]] = [set(), set()]  # what an actor has kept without holding it any more
        self.actors: list[Told] = []

    @initialize()
    def begin(self) -> None:
        with shmbroker.open(self.directory, **self.settings) as broker:
            broker.create_topic(TOPIC, queues=QUEUES)
            broker.create_group(GROUP, POLICY)
            self.engage()

    def engage(self) -> None:
        self.actors = [self.actor() for _ in self.stale]

    def actor(self) -> Told:
        return Told(self.nursery, self.directory, self.settings, self.modes)

    # ---- what senders do

    @rule(amount=st.integers(1, 12), queue_id=st.integers(0, QUEUES - 1), who=WHO)
    def send(self, amount: int, queue_id: int, who: int) -> None:
        bodies = [f"m{len(self.fates) + i}" for i in range(amount)]
        assert self.actors[who].ask("send", bodies, queue_id) == "SEND_OK"
        self.fates |= {body: Fate() for body in bodies}
        self.sent += [(body, queue_id) for body in bodies]

    @rule(delay=st.sampled_from([0.05, 0.3, 1.0]), who=WHO)
    def send_delayed(self, delay: float, who: int) -> None:
        body = f"m{len(self.fates)}"
        due = time.time() + delay
        handle = self.actors[who].ask("send_delayed", body, delay)
        self.fates[body] = Fate("pending", due=due, handle=handle)

    @rule(pick=PICK, who=WHO)
    def recall(self, pick: int, who: int) -> None:
        body = picked(pick, [body for body, fate in self.fates.items() if fate.handle])
        if body is None:
            return
        fate = self.fates[body]
        if self.actors[who].ask("recall", fate.handle):
            assert fate.where in ("pending", "gone"), f"{body} was recalled, and delivered"
            assert not fate.attempts
            fate.where = "gone"
        else:
            assert fate.where != "gone", f"{body} was recalled, and fires all the same"
            if fate.where == "pending" and not fate.attempts:
                assert time.time() >= fate.due, f"{body} is said to have fired before its time"
                fate.where = "ready"

    # ---- what consumers do

    @rule(amount=st.integers(1, 6), who=WHO)
    def receive(self, amount: int, who: int) -> None:
        self.feed(who)
        self.take(amount, who, LONG)

    @rule(amount=st.integers(1, 4), who=WHO)
    def receive_and_let_expire(self, amount: int, who: int) -> None:
        self.feed(who)
        taken = self.take(amount, who, BRIEF)
        over = time.monotonic() + BRIEF + TICK
        wait_until(lambda: time.monotonic() > over, "the end of the invisible time")
        for body in taken:
            self.fates[body].give_back()
            self.stale[who].add(body)

    def take(self, amount: int, who: int, invisible: float) -> list[str]:
        sure = any(fate.receivable for fate in self.fates.values())
        received = self.actors[who].ask("receive", amount, 10.0 if sure else 0.0, invisible)
        assert len(received) <= amount
        assert received or not sure, "nothing came, although there was something"
        newest: dict[int, int] = {}
        for body, attempt, queue_id, offset in received:
            fate = self.fates[body]
            if fate.where == "pending":
                assert time.time() >= fate.due, f"{body} came before its time"
                fate.where = "ready"
            assert fate.receivable, f"{body} came, though it is {fate}"
            fate.attempts += 1
            assert attempt == fate.attempts, f"{body} came as attempt {attempt}: {fate}"
            if attempt == 1 and not fate.resent:
                assert newest.get(queue_id, -1) < offset, f"{body} came behind a younger message of its queue"
                newest[queue_id] = offset
            fate.where, fate.holder = "held", who
            for stale in self.stale:
                stale.discard(body)
        return [body for body, *_ in received]

    def holding(self, who: int) -> list[str]:
        return [body for body, fate in self.fates.items() if fate.where == "held" and fate.holder == who]

    def some_held(self, who: int) -> list[str]:
        """The same, but something: a step that does nothing proves nothing."""
        if not self.holding(who):
            self.feed(who)
            self.take(3, who, LONG)
        return self.holding(who)

    def feed(self, who: int) -> None:
        """Let there be something to receive."""
        if not any(fate.receivable for fate in self.fates.values()):
            self.send(4, len(self.fates) % QUEUES, who)

    @rule(which=st.integers(1, 63), who=WHO)
    def ack(self, which: int, who: int) -> None:
        bodies = [body for i, body in enumerate(self.some_held(who)) if which >> i % 6 & 1]
        assert self.actors[who].ask("ack", bodies) == []
        for body in bodies:
            self.fates[body].where = "done"

    @rule(pick=PICK, who=WHO)
    def ack_too_late(self, pick: int, who: int) -> None:
        """It counts if nobody has noticed yet that its time was over, and only then."""
        body = picked(pick, sorted(self.stale[who]))
        if body is None:
            return
        refused = self.actors[who].ask("ack", [body])
        self.stale[who].discard(body)
        if not refused:
            assert self.fates[body].where == "ready", f"{body} was acknowledged by who had lost it: {self.fates[body]}"
            self.fates[body].where = "done"

    @rule(pick=PICK, who=WHO, seconds=st.sampled_from([0.0, 0.0, LONG]))
    def change_invisible_duration(self, pick: int, who: int, seconds: float) -> None:
        if body := picked(pick, self.some_held(who)):
            assert self.actors[who].ask("renew", body, seconds)
            if not seconds:
                self.fates[body].give_back()

    @rule(pick=PICK, who=WHO, level=st.sampled_from([0, 0, 0, -1]))
    def send_back(self, pick: int, who: int, level: int) -> None:
        if body := picked(pick, self.some_held(who)):
            now = time.time()
            assert self.actors[who].ask("send_back", body, level)
            self.fates[body].fail(level, now=now, dead=self.dead, body=body)

    @rule(threads=st.integers(1, 4), salt=st.integers(1, 99), who=WHO)
    def push(self, threads: int, salt: int, who: int) -> None:
        """A push consumer deals with all that nobody holds, as its listener's answers will have it."""
        self.feed(who)
        expected: Counter[tuple[str, int]] = Counter()
        for body, fate in self.fates.items():
            while fate.receivable or fate.where == "pending":
                fate.attempts += 1
                expected[body, fate.attempts] += 1
                answer = answer_to(body, fate.attempts, salt)
                if answer == "ok":
                    fate.where = "done"
                else:
                    fate.fail(-1 if answer == "dead" else 0, now=time.time(), dead=self.dead, body=body)
        for stale in self.stale:
            stale -= {body for body, _ in expected}
        heard = self.actors[who].ask("push", threads, salt, expected.total())
        assert Counter(map(tuple, heard)) == expected

    @rule(who=WHO)
    def bury(self, who: int) -> None:
        """What is spent becomes a dead letter when somebody looks for messages, and nobody is shown it."""
        self.note_buried()
        spent = [body for body, fate in self.fates.items() if fate.spent]
        if spent and not any(fate.receivable for fate in self.fates.values()):
            received = self.take(1, who, LONG)
            assert not set(received) & set(spent)
            wait_until(lambda: {body for body, _ in self.letters()} >= set(spent), "what was spent among the dead")
            self.note_buried()

    def letters(self) -> list[tuple[str, int]]:
        return [(body, attempts) for body, attempts in self.actors[0].ask("letters")]

    def note_buried(self) -> None:
        """Compare the dead letters with the model, and take over which of those that were spent are buried by now."""
        for body, attempts in (Counter(self.letters()) - Counter(self.dead)).elements():
            assert self.fates[body].spent, f"{body} is a dead letter: {self.fates[body]}"
            assert attempts == POLICY.max_deliveries
            self.fates[body].where = "dead"
            self.dead.append((body, attempts))
        assert Counter(self.dead) == Counter(self.letters())

    @rule(pick=PICK, who=WHO)
    def resend(self, pick: int, who: int) -> None:
        if body := picked(pick, [body for body, fate in self.fates.items() if fate.where == "dead"]):
            assert self.actors[who].ask("resend", body), f"{body} is no dead letter"
            self.fates[body] = Fate(handle=self.fates[body].handle, resent=True)

    # ---- what happens to all of them

    def all_gone(self, who: int) -> None:
        """What this actor held goes back."""
        for body in self.holding(who):
            self.fates[body].give_back()
        self.stale[who].clear()

    @rule(who=WHO)
    def crash_a_consumer(self, who: int) -> None:
        self.actors[who].kill()
        self.all_gone(who)
        self.actors[who] = self.actor()

    @rule(who=WHO)
    def crash_in_a_listener(self, who: int) -> None:
        """What its listener had is charged; what was prefetched behind it is not."""
        self.feed(who)
        body, attempt = self.actors[who].ask("push_and_hang")
        fate = self.fates[body]
        if fate.where == "pending":
            assert time.time() >= fate.due, f"{body} came before its time"
            fate.where = "ready"
        assert fate.receivable
        fate.attempts += 1
        assert attempt == fate.attempts
        self.crash_a_consumer(who)

    @rule(how=st.sampled_from(["", *ENDS]), who=WHO)
    def pause_the_group(self, how: str, who: int) -> None:
        """Nobody gets anything, whatever dies meanwhile, until it is resumed."""
        self.actors[who].ask("pause_group", True)
        if how:
            self.restart(how)
        for actor in self.actors:
            assert actor.ask("receive", 10, 0.02, LONG) == []
        self.actors[who].ask("pause_group", False)

    @rule(who=WHO)
    def skip_what_there_is(self, who: int) -> None:
        """Whoever has some of it in hand has it no more."""
        if any(fate.where == "pending" for fate in self.fates.values()):
            return  # nobody knows which of them have fired by now
        self.note_buried()
        self.actors[who].ask("skip_all")
        for body, fate in self.fates.items():
            if fate.where == "held":
                self.stale[fate.holder].add(body)
            if fate.where in ("ready", "held"):
                fate.where, fate.holder = "done", -1

    @rule(how=st.sampled_from(ENDS))
    def restart(self, how: str) -> None:
        if how == "workers killed":
            for pid in workers_of(self.directory).values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return  # nobody has lost anything
        wait_for_workers(self.directory)  # no actor is about to start a supervisor
        for actor in self.actors:
            actor.ask("leave") if how == "stopped" else actor.stop()
        if how == "power cut" and self.durable:
            lose_memory(self.directory)
        elif how != "stopped":
            kill_all(self.directory)
        for who, actor in enumerate(self.actors):
            actor.kill()
            self.all_gone(who)
        wait_gone(self.directory)
        self.engage()

    # ---- what is always true

    @invariant()
    def held_is_what_somebody_holds(self) -> None:
        holding = sum(fate.where == "held" for fate in self.fates.values())
        if self.actors:
            wait_until(lambda: self.actors[0].ask("held") == holding, f"{holding} messages held")

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None and self.actors:
                self.end_well()
        finally:
            for actor in self.actors:
                actor.kill()
            kill_all(self.directory)
            if objects_of(self.directory):  # after a failure
                lose_memory(self.directory)

    def end_well(self) -> None:
        """Everything is brought to its end, and compared."""
        for who in range(2):
            self.crash_a_consumer(who)
        self.held_is_what_somebody_holds()
        self.push(2, 0, 0)
        self.bury(1)
        self.note_buried()
        assert {fate.where for fate in self.fates.values()} <= {"done", "dead", "gone"}
        delayed = [body for body, fate in self.fates.items() if fate.handle and fate.where != "gone"]
        expected = [body for body, _ in self.sent] + delayed
        elsewhere = self.actors[1].ask("receive_elsewhere", "another", len(expected))
        assert sorted(body for body, _ in elsewhere) == sorted(expected)
        plain = {body for body, _ in self.sent}
        for queue_id in range(QUEUES):
            in_order = [body for body, queue in self.sent if queue == queue_id]
            assert [body for body, queue in elsewhere if queue == queue_id and body in plain] == in_order
        for actor in self.actors:
            actor.ask("leave")
        wait_gone(self.directory)
        assert objects_of(self.directory) == []


class InMemory(Delivery):
    pass


class Durable(Delivery):
    durable = True


def run(machine: type[Delivery], places: Path, *, always_alike: bool, examples: int, steps: int) -> None:
    machine.places = places
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=always_alike,
        print_blob=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    with Nursery() as machine.nursery:
        run_state_machine_as_test(machine, settings=chosen)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [InMemory, Durable])
def test_whatever_happens_each_message_is_delivered_as_the_model_says(machine: type[Delivery], tmp_path: Path) -> None:
    run(machine, tmp_path, always_alike=True, examples=6, steps=40)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", [InMemory, Durable])
def test_whatever_happens_for_long_each_message_is_delivered_as_the_model_says(
    machine: type[Delivery], tmp_path: Path
) -> None:
    run(machine, tmp_path, always_alike=False, examples=200, steps=80)
