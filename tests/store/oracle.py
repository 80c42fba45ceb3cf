"""What the store has to answer: the rules of docs/reliability.md once more, in plain Python that knows no SQL.

A dependency graph and a few rules are all there is: no counters, no headers, no locks. Whatever happens, the waiting
tasks are looked at in topological order (`Oracle._settle`), and what nothing holds back any more goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from pipeline.result_store.rows import Fence

HANDLER = "debug.noop"
#: seconds: the timeout of a task, and what a claim adds until even the hard limit has passed
TIMEOUT, LIMIT = 300.0, 30.0
#: seconds after the first task of a shared message was claimed, until the others are looked after
TURN = 2.0
OPEN = ("pending", "running", "retry")
WELL = ("success", "skipped")
#: ends of an attempt after which the task goes on
AGAIN = ("retry", "lost", "released")

#: execution, task and epoch: a message
Hint = tuple[str, str, int]


@dataclass(kw_only=True)
class Task:
    """One task as it should be recorded."""

    id: str
    needs: frozenset[str]  # whose results it takes: where one was skipped, this one is too
    waits: tuple[str, ...]  # what has to end before its turn comes
    behind: frozenset[str]  # those of them that release it
    status: str = "pending"
    epoch: int = 0
    attempt: int = 0
    retries: int = 0
    losses: int = 0
    due: float | None = None
    hints: int = 0
    result: Any = None
    worker: int | None = None
    kill_at: float = inf
    first_ready: float = inf
    ready: float = inf
    started: float = -inf
    released_by: Fence | None = None
    led_by: str | None = None  # whose message it shares
    led_in: str | None = None  # of which execution, where that is another
    ends: dict[int, str] = field(default_factory=dict)  # of its attempts, by epoch

    @property
    def waiting(self) -> bool:
        return self.status in ("pending", "retry")


@dataclass(kw_only=True)
class Execution:
    """One execution as it should be recorded; its tasks in topological order."""

    id: str
    timeout: float | None
    queue_timeout: float | None
    tasks: dict[str, Task]
    deadline: float = inf
    status: str = "pending"
    verdict: str | None = None
    paused: bool = False
    #: when recovery closes it, where whoever ran its last task went on and left that for later
    closing: float = inf

    @property
    def undecided(self) -> bool:
        return self.status in OPEN and self.verdict is None

    def close(self, status: str) -> None:
        self.status, self.paused, self.closing = status, False, inf

    def decide(self, verdict: str, others: str) -> None:
        """Nothing new starts; it is closed once nothing runs."""
        self.verdict = self.verdict or verdict
        for task in self.tasks.values():
            if task.waiting:
                task.status, task.due, task.led_by = others, None, None
        self.close_if_idle()

    def close_if_idle(self) -> None:
        if self.verdict and all(task.status != "running" for task in self.tasks.values()):
            self.close(self.verdict)

    def joins(self) -> dict[frozenset[str], int]:
        """What several tasks, or the end, wait for together, and how many of it are open."""
        waited = {task for other in self.tasks.values() for task in other.behind}
        headers = {task.behind for task in self.tasks.values() if len(task.behind) > 1}
        headers.add(frozenset(self.tasks.keys() - waited))
        return {header: sum(self.tasks[t].status not in WELL for t in header) for header in headers}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to an end."""

    outcome: str
    ready: Sequence[Hint] = ()
    #: a repeat may also name whatever else is ready: a message more does no harm
    repeat: bool = False


STALE = Answer(outcome="stale")


class Oracle:
    """All executions and leases, at a time."""

    def __init__(self, *, grace: float, loss_budget: int) -> None:
        self.grace, self.loss_budget = grace, loss_budget
        self.now = 0.0
        self.executions: dict[str, Execution] = {}
        self.leases: dict[int, float] = {}

    def all(self) -> Iterator[tuple[Execution, Task]]:
        return ((x, task) for _, x in sorted(self.executions.items()) for task in x.tasks.values())

    def ready(self, execution: str) -> list[Hint]:
        """What a worker may be told of."""
        tasks = self.executions[execution].tasks.values()
        return [(execution, t.id, t.epoch) for t in tasks if t.status == "pending" and t.due is not None]

    def may_be_joined(self, execution: str, task_id: str) -> bool:
        """Whether the message of a task waits for a worker, so that another one's may be left out."""
        x = self.executions[execution]
        task = x.tasks[task_id]
        waits = task.status == "pending" and task.attempt == 0 and task.due is not None and task.due < inf
        return waits and task.led_by is None and task.hints == 1 and x.undecided and not x.paused

    def submit(
        self, execution: str, graph: dict[str, str], *, parallel: bool, timeout: float | None, queue: float | None
    ) -> list[Hint]:
        order = list(graph)
        waits = {
            t: tuple(needed.split()) if parallel else tuple(order[: order.index(t)]) for t, needed in graph.items()
        }
        x = Execution(
            id=execution, timeout=timeout, queue_timeout=queue, deadline=self.now + (timeout or inf),
            tasks={
                t: Task(
                    id=t, needs=frozenset(graph[t].split()), waits=waits[t],
                    behind=frozenset(waits[t] if parallel else waits[t][-1:]),
                )
                for t in order
            },
        )  # fmt: skip
        self.executions[execution] = x
        return self._settle(x)

    def _settle(self, x: Execution, *, published: bool = True, by: Fence | None = None) -> list[Hint]:
        """Skip and release what nothing holds back any more; close where all ended. What was released, in order."""
        released = []
        for task in x.tasks.values():
            ended = all(x.tasks[t].status in WELL for t in task.waits)
            if task.status != "pending" or task.due is not None or not ended:
                continue
            if any(x.tasks[t].status == "skipped" for t in task.needs):
                task.status = "skipped"
                continue
            task.due, task.hints = (self.now + self.grace, 1) if published else (self.now, 0)
            task.ready = task.first_ready = self.now
            task.released_by = by if by and by.task_id in task.behind else None
            released.append((x.id, task.id, task.epoch))
        if all(task.status in WELL for task in x.tasks.values()):
            x.close("success")
        return released

    def claim(self, execution: str, task_id: str, epoch: int, worker: int, handler: str) -> tuple[int, int, int] | None:
        """Epoch, attempt and retries of the attempt that the message starts."""
        x = self.executions[execution]
        task = x.tasks[task_id]
        if x.paused or not x.undecided or handler != HANDLER:
            return None
        claimed = (task.epoch + 1, task.attempt + 1, task.retries)
        if (task.status, task.epoch, task.worker) == ("running", epoch + 1, worker):
            return task.epoch, task.attempt, task.retries
        if not task.waiting or task.due is None or task.epoch != epoch or self.leases[worker] <= self.now:
            return None
        task.status, task.due, task.hints, task.worker = "running", None, 0, worker
        task.epoch, task.attempt, _ = claimed
        task.started, task.led_by = self.now, None
        task.kill_at = self.now + TIMEOUT + LIMIT
        x.status = "running"
        return claimed

    def end(self, fence: Fence, outcome: str, *, result: Any = None, delay: float = 0.0) -> Answer:
        x = self.executions[fence.execution_id]
        task = x.tasks[fence.task_id]
        if (task.epoch, task.worker) != (fence.epoch, fence.worker_id):
            return STALE
        if task.status != "running":
            if task.status != outcome:
                return STALE
            ready = [hint for hint in self.ready(x.id) if x.tasks[hint[1]].released_by == fence]
            return Answer(outcome="done", ready=ready, repeat=True)
        if outcome in AGAIN and x.verdict:
            outcome = x.verdict
        if outcome == "lost" and task.losses == self.loss_budget:
            outcome = "failed"
        task.ends[task.epoch] = outcome
        if outcome in AGAIN:
            task.status = "retry" if outcome == "retry" else "pending"
            task.retries += outcome == "retry"
            task.losses += outcome == "lost"
            task.due, task.hints, task.ready = self.now + delay, 0, self.now + delay
            return Answer(outcome="done")
        task.status, task.result = outcome, result
        if x.verdict:
            x.close_if_idle()
        elif outcome in ("failed", "cancelled"):
            x.decide(outcome, "skipped" if outcome == "failed" else "cancelled")
        else:
            return Answer(outcome="done", ready=self._settle(x, by=fence))
        return Answer(outcome="done")

    def leave(self, x: Execution, *, paused: bool) -> None:
        """It has succeeded, and whoever ran its last task closes it later."""
        x.status, x.paused, x.closing = "running", paused, self.now + self.grace / 4

    # recovery

    def close_overdue(self) -> int:
        """How many were closed that somebody should have closed."""
        left = [x for x in self.executions.values() if x.closing <= self.now]
        for x in left:
            x.close("success")
        return len(left)

    def lost(self) -> list[tuple[Execution, Task]]:
        """What runs on workers whose lease ran out."""
        return [(x, t) for x, t in self.all() if t.status == "running" and self.leases[t.worker or 0] <= self.now]

    def overdue(self) -> list[tuple[Execution, Task]]:
        """What ran past the hard limit."""
        return [(x, t) for x, t in self.all() if t.status == "running" and t.kill_at <= self.now]

    def expired(self) -> set[str]:
        """Executions whose time is up, or of which a task has waited too long since it last became ready.

        One that has only to be closed is closed instead.
        """
        for x in self.executions.values():
            if x.deadline <= self.now:
                self._close_if_over(x)
        return {
            x.id for x, t in self.all()
            if x.undecided and (
                x.deadline <= self.now
                or (not x.paused and t.status == "pending" and t.due is not None and x.queue_timeout is not None
                    and t.ready + x.queue_timeout <= self.now)
            )
        }  # fmt: skip

    def expire(self, execution: str) -> None:
        self.executions[execution].decide("failed", "skipped")

    def take_due(self, *, first_only: bool) -> list[Hint]:
        """What is published (again), each time later than the last; what is paused waits for its resume."""
        hints = []
        due = [(x, t) for x, t in self.all() if t.waiting and t.due is not None and t.due <= self.now]
        left = [task for x, task in due if task.led_by and not x.paused and self._led(x, task)]
        for x, task in due:
            if any(task is one for one in left):
                task.due = self.now + self.grace / 4
                continue
            if task.led_by is None and task.hints and first_only:
                continue
            task.led_by = None
            if x.paused:
                task.due, task.hints = inf, 0
                continue
            task.due, task.hints = self.now + self.grace * 2 ** min(task.hints, 6), task.hints + 1
            hints.append((x.id, task.id, task.epoch))
        return hints

    def _led(self, x: Execution, task: Task) -> bool:
        """Whether the message that a task shares is still to come, or came so lately that its turn may come yet."""
        leader = self.executions[task.led_in or x.id].tasks[task.led_by or ""]
        due = leader.due is not None and leader.due < inf
        sent = leader.status == "pending" and due and leader.started < task.first_ready
        return sent or leader.started > self.now - TURN

    # people

    def _close_if_over(self, x: Execution) -> None:
        if x.closing < inf:
            x.close("success")

    def cancel(self, x: Execution) -> None:
        self._close_if_over(x)
        if x.status in OPEN:
            x.verdict = "cancelled"  # outweighs a failure
            x.decide("cancelled", "cancelled")

    def pause(self, x: Execution) -> None:
        self._close_if_over(x)
        x.paused = x.paused or x.undecided

    def resume(self, x: Execution) -> None:
        for task in x.tasks.values():
            if x.paused and ((task.status == "pending" and task.due is not None) or task.due == inf):
                task.due, task.hints, task.led_by = self.now, 0, None
        x.paused = False

    def reopen(self, x: Execution, start: str | None = None) -> None:
        self._close_if_over(x)
        if x.status not in ("failed", "cancelled") and not (x.status == "success" and start):
            return
        downstream = {start}
        for task in x.tasks.values():
            if task.needs & downstream:
                downstream.add(task.id)
            if task.id in downstream or task.status != "success":
                task.status, task.due, task.worker, task.result = "pending", None, None, None
                task.epoch, task.retries, task.losses, task.hints = task.epoch + 1, 0, 0, 0
                task.released_by = task.led_by = None
        x.status, x.verdict = "retry", None
        x.deadline = self.now + (x.timeout or inf)
        self._settle(x, published=False)

    def mark(self, x: Execution, task_id: str, status: str, result: Any) -> tuple[str, bool, list[Hint]]:
        """The status found, whether something changed, and what that released."""
        self._close_if_over(x)
        task = x.tasks[task_id]
        found = task.status
        if found == "success" or x.status == "success" or (x.verdict and found == "running"):
            return found, False, []
        done = ("success",) if x.verdict else WELL  # what was skipped comes again, once it is open
        if any(x.tasks[t].status not in done for t in task.waits):
            return "waiting", False, []
        if x.status in ("failed", "cancelled"):
            self.reopen(x)
        elif found not in OPEN:
            return found, False, []
        if found == "running":
            task.ends[task.epoch] = "released"
        task.status, task.due, task.led_by, task.epoch = status, None, None, task.epoch + 1
        task.result = result if status == "success" else None
        return found, True, self._settle(x)
