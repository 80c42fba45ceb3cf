"""Anything in any order: whatever happens, every invariant holds after each step, and in the end everything ends."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pipeline.result_store.rows import Fence, ReadyTask
from pipeline.states import OPEN_EXECUTIONS, TaskStatus
from tests.store.conftest import Driver

LEASE = 30.0
FENCE = ("execution_id", "task_id", "epoch", "worker_id")
OUTCOMES = ("complete",) * 4 + ("failed", "skipped", "cancelled", "retry", "lost", "released")
STEERING = ("cancel", "pause", "resume", "resume", "reopen", "reopen", "rerun", "mark")


class Model(RuleBasedStateMachine):
    """A broker that loses, doubles and reorders, workers that die and come back as zombies, and people."""

    def __init__(self, drive: Driver) -> None:
        super().__init__()
        self.drive, self.store = drive, drive.store
        self.now = 0.0
        self.executions: list[str] = []
        self.bag: list[tuple[str, str, int]] = []
        self.held: list[Fence] = []
        self.past: list[Fence] = []
        self.runs: dict[tuple[str, str, int], int] = {}
        self.payloads: dict[Fence, int] = {}
        self.steps: Counter[str] = Counter()

    @initialize()
    def begin(self) -> None:
        self.drive.clear()
        self.drive.set_clock(self.now)
        self.workers = [self.drive.new_worker(LEASE) for _ in range(2)]
        self.submit([0, 1, 1, 6, 0, 24], parallel=True, timeout=None)
        self.submit([0, 0, 1, 2], parallel=False, timeout=None)

    def publish(self, ready: tuple[ReadyTask, ...]) -> None:
        self.bag += sorted((task.execution_id, task.task_id, task.epoch) for task in ready)

    def claim(self, execution: str, task: str, epoch: int, worker: int) -> None:
        row = self.store.get_execution(execution)
        claim = self.store.claim(
            execution_id=execution, task_id=task, epoch=epoch, worker_id=worker, handler="debug.noop"
        )
        if claim is None:
            return
        fence = Fence(execution_id=execution, task_id=task, epoch=claim.epoch, worker_id=worker)
        assert self.runs.setdefault((execution, task, claim.epoch), worker) == worker, "one epoch, two workers"
        if fence not in self.past:
            assert not row.paused and row.verdict is None
            self.held.append(fence)
            self.past.append(fence)

    # what the engine does

    @rule(
        masks=st.lists(st.integers(0, 31), min_size=1, max_size=6), parallel=st.booleans(),
        timeout=st.sampled_from([None, 500.0]),
    )  # fmt: skip
    def submit(self, masks: list[int], parallel: bool, timeout: float | None) -> None:
        graph = {f"t{n}": " ".join(f"t{m}" for m in range(n) if mask >> m & 1) for n, mask in enumerate(masks)}
        definition = self.drive.define(graph, enable_parallel=parallel, timeout=timeout)
        self.executions.append(f"exec-{len(self.executions)}")  # nothing random but what hypothesis draws
        self.store.create_execution(
            execution_id=self.executions[-1], definition_id=self.drive.dispatcher.register(definition), user_id=None,
            idempotency_key=None, input_data={}, input_digest="", variables={}, timeout=timeout,
        )  # fmt: skip
        self.publish(self.store.ready_tasks(self.executions[-1]))

    @rule(data=st.data(), worker=st.integers(0, 1), keep=st.booleans(), many=st.integers(1, 4))
    def deliver(self, data: st.DataObject, worker: int, keep: bool, many: int) -> None:
        for _ in range(many):
            if self.bag:
                place = data.draw(st.integers(0, len(self.bag) - 1))
                self.claim(*(self.bag[place] if keep else self.bag.pop(place)), self.workers[worker])

    @rule(data=st.data(), worker=st.integers(0, 1), shift=st.integers(-1, 1))
    def forge(self, data: st.DataObject, worker: int, shift: int) -> None:
        if self.executions:
            execution = data.draw(st.sampled_from(self.executions))
            task = data.draw(st.sampled_from(self.store.get_tasks(execution)))
            self.claim(execution, task.task_id, task.epoch + shift, self.workers[worker])

    @rule(
        data=st.data(), outcome=st.sampled_from(OUTCOMES), times=st.integers(1, 2), many=st.integers(1, 3),
        delay=st.sampled_from([0.0, 60.0]),
    )  # fmt: skip
    def end(self, data: st.DataObject, outcome: str, times: int, many: int, delay: float) -> None:
        for _ in range(min(many, len(self.held))):
            fence = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            for _ in range(times):
                self.publish(self.finish(fence, outcome, delay))

    @rule(data=st.data(), outcome=st.sampled_from(OUTCOMES), forged=st.booleans())
    def haunt(self, data: st.DataObject, outcome: str, forged: bool) -> None:
        """An attempt of long ago, or one that its process still works on, ends once more; or somebody claims to be it."""
        current = {(fence.execution_id, fence.task_id) for fence in self.held}
        fences = [fence for fence in self.past if (fence.execution_id, fence.task_id) in current] or self.past
        if fences:
            fence = fences[data.draw(st.integers(0, len(fences) - 1))]
            if forged:
                fence = replace(fence, worker_id=self.workers[fence.worker_id == self.workers[0]])
            self.publish(self.finish(fence, outcome))

    def finish(self, fence: Fence, outcome: str, delay: float = 0.0) -> tuple[ReadyTask, ...]:
        if outcome == "complete":
            ended = self.store.complete(fence, self.payloads.setdefault(fence, len(self.payloads)))
        else:
            ended = self.store.end(fence, outcome, error_message="why", delay=delay)
        self.steps[ended.outcome] += 1
        newest = max(f.epoch for f in self.past if (f.execution_id, f.task_id) == (fence.execution_id, fence.task_id))
        if fence.epoch < newest or fence not in self.past:
            assert (ended.outcome, ended.ready) == ("stale", ())
        return ended.ready

    @rule(event=st.sampled_from(["die", "beat", 1, 20, 40, 400, 4000]), worker=st.integers(0, 1))
    def pass_time(self, event: str | int, worker: int) -> None:
        """A worker's process dies and another starts, or it sends its heartbeat, or seconds go by."""
        if event == "die":
            self.store.end_worker(self.workers[worker])
            self.workers[worker] = self.drive.new_worker(LEASE)
        elif event == "beat":
            assert self.store.renew_worker(self.workers[worker], LEASE)
        else:
            self.now += int(event)
            self.drive.set_clock(self.now)

    @rule(first_only=st.booleans(), lose=st.booleans())
    def recover(self, first_only: bool, lose: bool) -> None:
        if lose:
            self.bag.clear()
        work = self.store.recovery_work()
        attempts = self.store.lost_attempts(100) + self.store.overdue_attempts(100)
        assert bool(attempts) == (work.lost or work.overdue)
        for attempt in attempts:
            self.publish(self.finish(Fence(**{name: getattr(attempt, name) for name in FENCE}), "lost"))
        assert bool(self.store.expire_executions(100)) <= work.expired
        self.publish(self.store.take_due(100, first_only=first_only))
        work = self.store.recovery_work()
        assert not (work.lost or work.overdue or work.expired)

    # what people do

    @rule(data=st.data(), operation=st.sampled_from(STEERING), status=st.sampled_from(["success", "skipped"]))
    def steer(self, data: st.DataObject, operation: str, status: str) -> None:
        if not self.executions:
            return
        execution = data.draw(st.sampled_from(self.executions))
        task = data.draw(st.sampled_from(self.store.get_tasks(execution))).task_id
        match operation:
            case "rerun":
                self.store.reopen_execution(execution, None, task_id=task)
            case "mark":
                marked = self.store.mark_task(
                    execution, task, TaskStatus(status), result="by hand", user_id=None, reason="why"
                )
                self.publish(marked.ready)
            case _:
                getattr(self.store, f"{operation}_execution")(execution, None)

    # what always holds

    @invariant()
    def nothing_is_violated(self) -> None:
        assert self.store.audit() == []

    @invariant()
    def results_are_those_of_the_attempt_that_holds_the_task(self) -> None:
        payloads = {(f.execution_id, f.task_id, f.epoch): self.payloads.get(f) for f in self.past}
        for execution, task, epoch, result in self.drive.sql(
            "SELECT execution_id, task_id, epoch, result FROM pipeline.task_executions WHERE status = 'success'"
        ):
            assert result == "by hand" or result == payloads[execution, task, epoch]

    def teardown(self) -> None:
        """Faults off: within a few looks of recovery everything has ended."""
        self.held.clear()
        for execution in self.executions:
            self.store.resume_execution(execution, None)
        for _ in range(60):
            if not self.open():
                break
            for event, worker in (("die", 0), ("die", 1), (4000, 0), ("beat", 0)):
                self.pass_time(event, worker)
            self.recover(first_only=False, lose=True)
            while self.bag:
                self.claim(*self.bag.pop(), self.workers[0])
                while self.held:
                    self.publish(self.finish(self.held.pop(), "complete"))
        assert self.open() == []
        self.nothing_is_violated()

    def open(self) -> list[str]:
        return [e for e in self.executions if self.store.execution_status(e) in OPEN_EXECUTIONS]


@pytest.mark.timeout(600)
def test_no_order_of_events_breaks_an_invariant_or_leaves_an_execution_open(drive: Driver) -> None:
    seen: Counter[str] = Counter()

    def make() -> Any:
        model = Model(drive)
        model.steps = seen
        return model

    run_state_machine_as_test(
        make,
        settings=settings(
            max_examples=50, stateful_step_count=40, derandomize=True, database=None, deadline=None,
            phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    assert min(seen["done"], seen["stale"]) > 40, f"the model hardly did anything: {seen}"
