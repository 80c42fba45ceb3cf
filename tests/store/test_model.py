"""Anything in any order: the store answers and records what the oracle says, and in the end everything ends."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import inf
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pipeline import compiler
from pipeline.result_store.rows import NOTHING, Claim, Ended, Fence, Follow, NewExecution, ReadyTask
from pipeline.states import TaskStatus
from tests.store.conftest import EPOCH, Driver
from tests.store.oracle import AGAIN, HANDLER, OPEN, TIMEOUT, Answer, Execution, Hint, Oracle

LEASE = 30.0
LIMIT = 10_000
OUTCOMES = ("skipped", "retry", "lost", "failed", "cancelled", "released")
STEERING = ("cancel", "cancel", "pause", "pause", "resume", "resume", *("reopen", "rerun", "mark") * 3)
#: by weight
EVENTS = ("work",) * 8 + ("haunt", "enqueue") * 3 + ("forge", "pass_time", "recover", "steer", "steer") * 2
#: dice that fall evenly, which hypothesis's own do not; what it shrinks is the number of events
DICE = st.integers(0, 2**32 - 1).map(Random)

#: what has to happen often
DONE = (
    "claimed", "claimed again", "refused", "done", "done again", "stale", "gone on", "gone on elsewhere", "led from elsewhere",
    "left open", "closed later", "joined", "told who joined",
)  # fmt: skip

EXECUTIONS = "SELECT execution_id, status, verdict, paused FROM pipeline.workflow_executions ORDER BY 1"
TASKS = """
    SELECT t.execution_id, t.task_id, t.status, t.epoch, t.attempt, t.retries, t.losses,
           extract(epoch FROM t.due_at)::float8 - %s, t.result, CASE WHEN t.status = 'running' THEN t.worker_id END
      FROM pipeline.task_executions t JOIN pipeline.workflow_executions e USING (execution_id)
      JOIN pipeline.workflow_tasks w ON w.definition_id = e.definition_id AND w.task_id = t.task_id
     ORDER BY t.execution_id, w.number"""
ATTEMPTS = "SELECT execution_id, task_id, epoch, outcome FROM pipeline.task_attempts"
COUNTERS = """
    SELECT execution_id, h.tasks, sum(c.remaining)::int FROM pipeline.join_counters c
      JOIN pipeline.workflow_executions e USING (execution_id)
      JOIN pipeline.workflow_headers h ON h.definition_id = e.definition_id AND h.number = c.number
     WHERE e.verdict IS NULL AND e.finished_at IS NULL AND (c.slot > 0 OR h.slots = '{}') GROUP BY 1, 2"""


def agree(what: str, found: Any, expected: Any) -> None:
    """Fail with the first difference."""
    if found != expected:
        if isinstance(found, list) and isinstance(expected, list):
            found, expected = next((f, e) for f, e in zip_longest(found, expected) if f != e)
        raise AssertionError(f"{what}: {found} instead of {expected}")


def hints(ready: Sequence[ReadyTask]) -> list[Hint]:
    return [(task.execution_id, task.task_id, task.epoch) for task in ready]


@dataclass(kw_only=True)
class Known:
    """A workflow that was enqueued, and its last execution that had a message of its own."""

    key: int
    graph: dict[str, str]
    parallel: bool
    timeout: float | None
    queue_timeout: float | None
    leader: str | None = None


class Model(RuleBasedStateMachine):
    """A broker that loses, doubles and reorders, workers that die and come back as zombies, and people."""

    def __init__(self, drive: Driver, steps: Counter[str]) -> None:
        super().__init__()
        self.drive, self.store = drive, drive.store
        self.bag: list[Hint] = []
        self.held: list[Fence] = []
        self.past: list[Fence] = []
        self.payloads: dict[Fence, int] = {}
        self.known: list[Known] = []
        #: by the execution and the task whose message it is
        self.joined: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self.steps = steps
        #: whether the last look at all rows found what was expected
        self.agreed = False

    @initialize(dice=DICE, favourite=st.sampled_from(["complete", "skipped", "retry", "lost"]))
    def begin(self, dice: Random, favourite: str) -> None:
        self.drive.clear()
        self.oracle = Oracle(grace=self.store.grace.total_seconds(), loss_budget=self.store.loss_budget)
        self.drive.set_clock(self.oracle.now)
        #: workers that know the handler: others run what a message brings, and go on with nothing else
        self.able: set[int] = set()
        self.workers = [self.new_worker() for _ in range(2)]
        #: what attempts of this run often end in
        self.favourite = favourite
        self.submit([0, 1, 1, 6, 0, 24], parallel=True)
        self.submit([0, 0, 1, 2], parallel=False)
        self.submit([0, 1, 3], parallel=True, together=4)
        self.submit([0], parallel=True, together=24)
        self.submit([0, 1], parallel=True, joining=9)
        self.submit_any(dice)

    def submit_any(self, dice: Random) -> None:
        masks = [dice.randrange(128) & dice.randrange(128) for _ in range(dice.randint(1, 8))]
        together, joining = dice.choice([(1, 0), (1, 0), (3, 0), (1, 3)])
        self.submit(
            [mask | 1 for mask in masks] if together + joining > 1 else masks, parallel=dice.random() < 0.6,
            timeout=dice.choice([None, None, 500.0]), queue_timeout=dice.choice([None, None, 500.0]), together=together,
            joining=joining,
        )  # fmt: skip

    @rule(event=st.sampled_from(EVENTS), dice=DICE)
    def happen(self, event: str, dice: Random) -> None:
        self.agreed = False
        if sum(x.undecided and not x.paused for x in self.oracle.executions.values()) < 2:
            self.submit_any(dice)
        getattr(self, event)(dice)

    def new_worker(self) -> int:
        able = len(self.oracle.leases) % 3 < 2
        worker = self.store.start_worker(name="driver", pid=1, lease=LEASE, handlers=[HANDLER] if able else [])
        if able:
            self.able.add(worker)
            self.store.renew_worker(worker, LEASE, quick=[HANDLER])
        self.oracle.leases[worker] = self.oracle.now + LEASE
        return worker

    # what the engine does

    def submit(
        self, masks: list[int], *, parallel: bool, timeout: float | None = None, queue_timeout: float | None = None,
        together: int = 1, joining: int = 0,
    ) -> None:  # fmt: skip
        """Each task needs those before it whose bits are set in its mask.

        So many executions by one statement, and so many more one by one, as by a program that has just enqueued others.
        """
        graph = {f"t{n}": " ".join(f"t{m}" for m in range(n) if mask >> m & 1) for n, mask in enumerate(masks)}
        definition = self.drive.define(graph, enable_parallel=parallel, timeout=timeout, queue_timeout=queue_timeout)
        with patch.multiple(compiler, WIDE=2 + len(self.oracle.executions) % 2, SLOTS=2):  # small headers in slots too
            key = self.drive.dispatcher.register(definition)
        known = Known(key=key, graph=graph, parallel=parallel, timeout=timeout, queue_timeout=queue_timeout)
        self.known.append(known)
        self.record(known, together, None)
        for _ in range(joining):
            self.record(known, 1, known.leader)

    def enqueue(self, dice: Random) -> None:
        """Another execution of a known workflow, by who takes one of the earlier ones for still waiting."""
        known = dice.choice(self.known)
        self.record(known, 1, dice.choice([known.leader, known.leader, dice.choice(list(self.oracle.executions))]))

    def record(self, known: Known, count: int, leader: str | None) -> None:
        number = len(self.oracle.executions)
        work = [NewExecution(execution_id=f"exec-{number + n}", input_data={}, input_digest="") for n in range(count)]
        created = self.store.create_executions(
            work, definition_id=known.key, user_id=None, variables={}, timeout=known.timeout,
            queue_timeout=known.queue_timeout, leader=leader,
        )  # fmt: skip
        for one in created:
            expected = self.oracle.submit(
                one.execution_id, known.graph, parallel=known.parallel, timeout=known.timeout, queue=known.queue_timeout
            )
            ready = self.drive.ready_tasks(one.execution_id)
            agree("submit", hints(ready), expected)
            self.publish(ready, sent=one.ready != ())
            self.steps["led from elsewhere"] += sum(task.led_in is not None for task in ready)
            known.leader = one.execution_id if one.ready else known.leader

    def publish(self, ready: Sequence[ReadyTask], *, sent: bool = True) -> None:
        """One message for each, whoever shares one: a message that names another task too does no more than two.

        One that was not sent has joined another, which does not name it.
        """
        if sent:
            self.bag += hints(ready)
        for task in ready:
            if not sent:
                agree("joins", (task.led_by, self.oracle.may_be_joined(task.led_in or "", task.task_id)), (task.task_id, True))
                self.joined[task.led_in or "", task.task_id].append(task.execution_id)
                self.steps["joined"] += 1
            recorded = self.oracle.executions[task.execution_id].tasks[task.task_id]
            recorded.led_by, recorded.led_in = task.led_by, task.led_in

    def claim(self, hint: Hint, worker: int, handler: str = HANDLER) -> None:
        self.agreed = False
        execution, task, epoch = hint
        expected = self.oracle.claim(*hint, worker, handler)
        claim = self.store.claim(execution_id=execution, task_id=task, epoch=epoch, worker_id=worker, handler=handler)
        agree(f"claim of {hint}", claim and (claim.epoch, claim.attempt, claim.retries), expected)
        self.steps["claimed" if claim else "refused"] += 1
        self.hear_of(execution, task, claim)
        if claim is not None:
            self.hold(Fence(execution_id=execution, task_id=task, epoch=claim.epoch, worker_id=worker))

    def hear_of(self, execution: str, task_id: str, claim: Claim | None) -> None:
        """The reader of a message hears who joined it: with the first attempt, or where there is none."""
        leads = self.store.leads_of(execution, task_id) if claim is None else claim.leads or []
        first = self.oracle.executions[execution].tasks[task_id].attempt == (claim is not None)
        agree("who joined", leads, self.joined[execution, task_id] if first else [])
        self.bag += [(joined, task_id, 0) for joined in leads]
        self.steps["told who joined"] += len(leads)

    def hold(self, fence: Fence) -> None:
        if fence in self.past:
            self.steps["claimed again"] += 1
        else:
            self.held.append(fence)
            self.past.append(fence)

    def finish(self, fence: Fence, outcome: str, delay: float = 0.0, follow: Follow = NOTHING) -> None:
        self.agreed = False
        if outcome == "complete":
            payload = self.payloads.setdefault(fence, len(self.payloads))
            x = self.oracle.executions[fence.execution_id]
            before = x.status, x.paused
            expected = self.oracle.end(fence, "success", result=payload)
            ended = self.store.complete(fence, payload, follow)
            self.close(ended, follow, x, *before)
        else:
            delay = delay if outcome == "retry" else 0.0
            expected = self.oracle.end(fence, outcome, delay=delay)
            ended = self.store.end(fence, outcome, error_message="why", delay=delay)
        found = hints(ended.ready)
        agree(f"{outcome} of {fence}", ended.outcome, expected.outcome)
        if expected.repeat:
            needless = set(found) - set(self.oracle.ready(fence.execution_id))
            agree(f"repeat of {outcome}", (set(expected.ready) - set(found), needless), (set(), set()))
        else:
            claimed = ended.next and (ended.next.execution_id, ended.next.task_id)
            agree(
                f"what {outcome} releases", *([h for h in some if h[:2] != claimed] for some in (found, expected.ready))
            )
        if ended.next is not None:
            self.go_on(fence, follow, ended.next, expected)
        self.steps[f"{ended.outcome} again" if expected.repeat else ended.outcome] += 1
        self.publish(ended.ready)

    def close(self, ended: Ended, follow: Follow, own: Execution, status: str, paused: bool) -> None:
        """An execution ends with its last task, unless the worker goes on elsewhere: then with a later call that is durable."""
        left = set(ended.closing or ())
        if own.id in left:
            agree("left open", (status in OPEN and own.status, ended.next is not None, ended.durable), ("success", True, False))
            self.oracle.leave(own, paused=paused)
            self.steps["left open"] += 1
        if ended.closing is not None:
            agree("still to be closed", left - {own.id}, set() if ended.durable else set(follow.closing) - {own.id})
            for x in map(self.oracle.executions.get, {*follow.closing, own.id} - left):
                if x is not None and x.closing < inf:
                    x.close("success")
                    self.steps["closed later"] += 1

    def go_on(self, fence: Fence, follow: Follow, found: Claim, expected: Answer) -> None:
        """The worker has claimed what was released first or, where nothing was, what it asked for."""
        asked = (follow.execution_id or "", follow.task_id or "", follow.epoch or 0)
        elsewhere = found.execution_id != fence.execution_id
        hint = expected.ready[0] if expected.ready and not elsewhere else asked
        if expected.repeat:
            hint = (found.execution_id, found.task_id, found.epoch - 1)
        agree("goes on with", (found.execution_id, found.task_id, follow.room >= TIMEOUT), (*hint[:2], True))
        agree("goes on", (found.execution_id, found.task_id) == asked[:2] or fence.worker_id in self.able, True)
        self.steps["gone on elsewhere"] += elsewhere
        claim = self.oracle.claim(*hint, fence.worker_id, HANDLER)
        agree(f"claim of {hint} after {fence}", (found.epoch, found.attempt, found.retries), claim)
        self.steps["gone on"] += 1
        self.hear_of(found.execution_id, found.task_id, found)
        self.hold(replace(fence, execution_id=found.execution_id, task_id=found.task_id, epoch=found.epoch))

    def some_follow(self, fence: Fence, dice: Random) -> Follow:
        own = self.oracle.ready(fence.execution_id)
        others = [h for h in self.bag if h[0] != fence.execution_id and h in self.oracle.ready(h[0])]
        some = dice.choice(dice.choice([others] * 4 + [own, own, self.bag]) or [(None, None, None)])
        room = dice.choice([0.0, TIMEOUT - 1, *[TIMEOUT] * 4])
        left = [x.id for x in self.oracle.executions.values() if x.closing < inf]
        closing = dice.sample(left, dice.randint(0, len(left))) + dice.choice([[], [], [fence.execution_id]])
        return Follow(
            room=room, execution_id=some[0], task_id=some[1], epoch=some[2], handler=HANDLER, closing=tuple(closing),
            durable=dice.random() < 0.2,
        )  # fmt: skip

    def work(self, dice: Random) -> None:
        """Messages arrive, some again later or of another handler; attempts end, some twice or by a worker that lies."""
        for _ in range(dice.randrange(9)):
            if self.bag:
                hint = dice.choice(self.bag)
                if dice.random() < 0.7:
                    self.bag.remove(hint)
                self.claim(hint, dice.choice(self.workers), dice.choice([HANDLER] * 9 + ["debug.echo"]))
        for _ in range(dice.randrange(4)):
            if self.held:
                fence = self.held.pop(dice.randrange(len(self.held)))
                outcome, delay = self.some_outcome(dice), dice.choice([0.0, 60.0])
                follow = self.some_follow(fence, dice)
                lie = replace(fence, worker_id=self.workers[fence.worker_id == self.workers[0]])
                for one in dice.choice([[fence], [fence], [fence, fence], [lie, fence], [fence, lie]]):
                    self.finish(one, outcome, delay, follow)

    def forge(self, dice: Random) -> None:
        """A message that nobody sent, or that nobody sends any more; or one more try of a claim that had no answer."""
        if self.held and dice.random() < 0.5:
            held = dice.choice(self.held)
            self.claim((held.execution_id, held.task_id, held.epoch - 1), held.worker_id)
            return
        x = dice.choice(list(self.oracle.executions.values()))
        task = dice.choice(list(x.tasks.values()))
        hint = (x.id, task.id, task.epoch + dice.choice([-1, 0, 1]))
        self.claim(hint, dice.choice(self.workers))

    def haunt(self, dice: Random) -> None:
        """An attempt of long ago, or one that its process still works on, ends once more; or somebody claims to be it."""
        current = {(fence.execution_id, fence.task_id) for fence in self.held}
        fences = [fence for fence in self.past if (fence.execution_id, fence.task_id) in current] or self.past
        if fences:
            fence = dice.choice(fences)
            if dice.random() < 0.4:
                fence = replace(fence, worker_id=dice.choice(self.workers), epoch=fence.epoch + dice.choice([-1, 0, 1]))
            self.finish(fence, self.some_outcome(dice))

    def pass_time(self, dice: Random) -> None:
        """A worker's process dies and another starts, or seconds go by; the workers send heartbeats, or some do not."""
        if dice.random() < 0.2:
            self.die(dice.randrange(2))
        else:
            self.wait(dice.choice([1, 1, 20, 20, 40, 400, 4000]))
        for worker in self.workers:
            if dice.random() < 0.8:
                self.beat(worker)

    def wait(self, seconds: float) -> None:
        self.oracle.now += seconds
        self.drive.set_clock(self.oracle.now)

    def beat(self, worker: int) -> None:
        assert self.store.renew_worker(worker, LEASE)
        self.oracle.leases[worker] = self.oracle.now + LEASE

    def die(self, worker: int) -> None:
        self.store.end_worker(self.workers[worker])
        self.oracle.leases[self.workers[worker]] = self.oracle.now
        self.workers[worker] = self.new_worker()

    def recover(self, dice: Random) -> None:
        """Recovery looks, perhaps after the broker lost what it held."""
        if dice.random() < 0.3:
            self.bag.clear()
        self.look(first_only=dice.random() < 0.5)

    def look(self, *, first_only: bool) -> None:
        lost, overdue = self.store.lost_attempts(LIMIT), self.store.overdue_attempts(LIMIT)
        for what, attempts, expected in (
            ("lost", lost, self.oracle.lost()),
            ("overdue", overdue, self.oracle.overdue()),
        ):
            agree(what, [(a.execution_id, a.task_id) for a in attempts], [(x.id, task.id) for x, task in expected])
        for a in lost + overdue:
            self.finish(
                Fence(execution_id=a.execution_id, task_id=a.task_id, epoch=a.epoch, worker_id=a.worker_id), "lost"
            )
        agree("closed", self.store.close_overdue(LIMIT), self.oracle.close_overdue())
        self.expire()
        expected_hints = self.oracle.take_due(first_only=first_only)
        agree("what is due", hints(self.store.take_due(LIMIT, first_only=first_only)), expected_hints)
        self.bag += expected_hints
        work = self.store.recovery_work()
        agree("work that is left", (work.lost, work.overdue, work.expired, work.closing), (False,) * 4)

    def expire(self) -> None:
        before = {x.id for x in self.oracle.executions.values() if x.undecided}
        self.store.expire_executions(LIMIT)
        found = {e for e, _, verdict, _ in self.drive.sql(EXECUTIONS) if verdict and e in before}
        agree("expired", found, self.oracle.expired())
        for execution in found:
            self.oracle.expire(execution)

    # what people do

    def steer(self, dice: Random) -> None:
        operation = dice.choice(STEERING)
        x = dice.choice(self.fitting(operation) if dice.random() < 0.8 else list(self.oracle.executions.values()))
        task_id, status = dice.choice(list(x.tasks)), dice.choice(["success", "skipped"])
        found: Any = "success" if operation != "resume" and x.closing < inf else x.status
        match operation:
            case "mark":
                marked = self.store.mark_task(
                    x.id, task_id, TaskStatus(status), result="by hand", user_id=None, reason="why"
                )
                found = self.oracle.mark(x, task_id, status, "by hand")
                agree("mark", (marked.outcome, marked.changed, hints(marked.ready)), found)
                self.publish(marked.ready)
            case "rerun":
                agree("rerun", self.store.reopen_execution(x.id, None, task_id=task_id), found)
                self.oracle.reopen(x, task_id)
            case _:
                agree(operation, getattr(self.store, f"{operation}_execution")(x.id, None), found)
                getattr(self.oracle, operation)(x)

    def fitting(self, operation: str) -> list[Execution]:
        """Executions for which an operation may matter; those first that it finds in the midst of something."""
        executions = list(self.oracle.executions.values())
        opened = [x for x in executions if x.status in OPEN]
        if operation in ("reopen", "rerun"):
            return [x for x in executions if x.status not in OPEN] or executions
        busy = {fence.execution_id for fence in self.held}
        matters = {"cancel": lambda x: x.verdict == "failed" or x.closing < inf, "pause": lambda x: x.id in busy or x.closing < inf}.get(operation, bool)
        return [x for x in opened if matters(x)] or opened or executions

    def some_outcome(self, dice: Random) -> str:
        return dice.choice(("complete",) * 10 + OUTCOMES + (self.favourite,) * 14)

    # what always holds

    @invariant()
    def everything_is_recorded_as_expected(self) -> None:
        self.agreed = False
        executions = sorted(self.oracle.executions.items())
        agree("execution", self.drive.sql(EXECUTIONS), [(e, x.status, x.verdict, x.paused) for e, x in executions])
        agree("task", self.drive.sql(TASKS, EPOCH.timestamp()), [
            (x.id, t.id, t.status, t.epoch, t.attempt, t.retries, t.losses, t.due, t.result,
             t.worker if t.status == "running" else None)
            for x, t in self.oracle.all()
        ])  # fmt: skip
        counters = {(e, frozenset(tasks)): remaining for e, tasks, remaining in self.drive.sql(COUNTERS)}
        joins = {(e, tasks): n for e, x in executions if x.undecided for tasks, n in x.joins().items()}
        agree("counters", sorted_list(counters), sorted_list(joins))
        attempts = {(f.execution_id, f.task_id, f.epoch) for f in self.past}
        found = sorted(row for row in self.drive.sql(ATTEMPTS) if row[:3] in attempts)
        agree("attempts", found, sorted(
            (x.id, t.id, epoch, outcome) for x, t in self.oracle.all() for epoch, outcome in t.ends.items()
            if outcome in AGAIN or epoch < t.epoch
        ))  # fmt: skip
        published = sum(
            task.due is not None and task.hints > 0 and task.led_by is None for _, task in self.oracle.all()
        )
        agree("messages", self.store.count_published(), published)
        agree("audit", [v.violation for v in self.store.audit()], [])
        self.agreed = True

    def teardown(self) -> None:
        """Faults off: within a few looks of recovery everything has ended."""
        if not self.agreed:
            return  # a step failed, and that is the failure to show
        self.held.clear()
        for x in self.oracle.executions.values():
            self.store.resume_execution(x.id, None)
            self.oracle.resume(x)
        for _ in range(60):
            if not self.open():
                break
            for worker in (0, 1):
                self.die(worker)
            self.wait(4000)
            self.beat(self.workers[0])
            self.bag.clear()
            self.look(first_only=False)
            while self.bag:
                self.claim(self.bag.pop(), self.workers[0])
                while self.held:
                    self.finish(self.held.pop(), "complete")
        agree("never ends", self.open(), [])
        self.everything_is_recorded_as_expected()

    def open(self) -> list[str]:
        return [e for e, status, *_ in self.drive.sql(EXECUTIONS) if status in OPEN]


def sorted_list(table: dict[tuple[str, frozenset[str]], int]) -> list[tuple[str, list[str], int]]:
    return sorted((execution, sorted(tasks), remaining) for (execution, tasks), remaining in table.items())


def explore(drive: Driver, examples: int) -> Counter[str]:
    """Run the model until it fails, or so many times; how often it did what.

    Raises:
        AssertionError: the store answered or recorded something else than the oracle, or an execution never ends.
        psycopg.Error: a statement failed.
    """
    seen: Counter[str] = Counter()
    run_state_machine_as_test(
        lambda: Model(drive, seen),
        settings=settings(
            max_examples=examples, stateful_step_count=40, derandomize=True, database=None, deadline=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        ),
    )  # fmt: skip
    return seen


@pytest.mark.timeout(600)
def test_no_order_of_events_breaks_an_invariant_or_leaves_an_execution_open(drive: Driver) -> None:
    seen = explore(drive, 40)
    assert min(seen[what] for what in DONE) >= 30, f"the model hardly did anything: {seen}"
