"""Every operation from every state: what happens, and what must not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from typing import Any

import psycopg
import pytest

from pipeline.errors import ExecutionNotFound, TaskNotFound
from pipeline.result_store.rows import Fence
from pipeline.states import (
    EXECUTION_TRANSITIONS,
    TASK_TRANSITIONS,
    TERMINAL_EXECUTIONS,
    TERMINAL_TASKS,
    ExecutionStatus,
    TaskStatus,
)
from tests.store.conftest import Driver

# A cell is the status afterwards. `.`: refused, and nothing whatever changed. `=`: the answer of the first time is given
# again, and nothing changed. `-`: the task is not concerned.
#
# `waiting` is a pending task whose dependencies are open. Beside the task runs another one, `o`, so that the execution is
# open; `retry`, `rerun` and `reopen and mark` end that one first.
TASK_TABLE = """
                waiting    pending    running    retry      success    failed     skipped    cancelled
claim           .          running    .          running    .          .          .          .
claim again     .          .          =          .          .          .          .          .
complete        .          .          success    .          =          .          .          .
end success     .          .          success    .          =          .          .          .
end failed      .          .          failed     .          .          =          .          .
end skipped     .          .          skipped    .          .          .          =          .
end cancelled   .          .          cancelled  .          .          .          .          =
end retry       .          .          retry      =          .          .          .          .
end lost        .          .          pending    .          .          .          .          .
end released    .          .          pending    .          .          .          .          .
other fails     skipped    skipped    -          skipped    -          -          -          -
cancel          cancelled  cancelled  -          cancelled  -          -          -          -
expire          skipped    skipped    -          skipped    -          -          -          -
pause           -          -          -          -          -          -          -          -
resume          -          -          -          -          -          -          -          -
retry           -          -          -          -          -          pending    -          pending
rerun           -          -          -          -          pending    pending    pending    pending
mark success    .          success    success    success    .          .          .          .
mark skipped    .          skipped    skipped    skipped    .          .          .          .
reopen and mark .          success    success    success    .          success    .          success
"""

# `paused` is a pending execution that is paused, `decided` a running one that has failed but for a task that still runs.
EXECUTION_TABLE = """
                pending    running    paused     decided    retry      success    failed     cancelled
claim           running    running    .          .          running    .          .          .
complete all    success    success    .          failed     success    .          .          .
fail            failed     failed     .          failed     failed     .          .          .
cancel one      cancelled  cancelled  .          failed     cancelled  .          .          .
mark all        success    success    success    .          success    .          success    success
cancel          cancelled  decided    cancelled  decided    cancelled  .          .          .
pause           paused     paused     .          .          paused     .          .          .
resume          .          .          pending    .          .          .          .          .
retry           .          .          .          .          .          .          retry      retry
rerun           .          .          .          .          .          retry      retry      retry
expire          failed     decided    failed     .          failed     .          .          .
"""


def cells(table: str) -> list[tuple[str, str, str]]:
    """Operation, state and what is expected."""
    header, *lines = table.strip().splitlines()
    rows = [(line[:16].strip(), line[16:].split()) for line in lines]
    return [(operation, state, cell) for operation, row in rows for state, cell in zip(header.split(), row, strict=True)]


def named(table: str) -> list[Any]:
    return [pytest.param(*cell, id=f"{cell[0]}-{cell[1]}-{cell[2]}".replace(" ", "_")) for cell in cells(table)]


# A task


class Subject:
    """A task `a` in one state, with what its last attempt holds; forged where there was none."""

    def __init__(self, drive: Driver, state: str) -> None:
        drive.set_clock(0)
        self.drive = drive
        self.execution = drive.start({"o": "", "z": "", "a": "z" if state == "waiting" else "", "next": "a"}, timeout=100)
        self.other = drive.must_claim(self.execution, "o")
        if state != "waiting":
            drive.complete(self.execution, "z")
        self.fence = Fence(execution_id=self.execution, task_id="a", epoch=1, worker_id=drive.worker)
        if state not in ("waiting", "pending"):
            self.fence = drive.must_claim(self.execution, "a")
            if state != "running":
                drive.store.end(self.fence, state, result={"n": 1}, error_message="why")

    @property
    def status(self) -> str:
        return self.drive.tasks(self.execution)["a"]

    def claim(self, epoch: int) -> Any:
        return self.drive.store.claim(
            execution_id=self.execution, task_id="a", epoch=epoch, worker_id=self.drive.worker
        )


def operate_on_task(operation: str, subject: Subject) -> str:
    """Run an operation of the table; the answer: done, stale, or nothing to say."""
    drive, store, execution, fence = subject.drive, subject.drive.store, subject.execution, subject.fence
    match operation.split():
        case ["claim"]:
            return "done" if subject.claim(drive.fence(execution, "a").epoch) else "stale"
        case ["claim", "again"]:
            return "done" if subject.claim(drive.fence(execution, "a").epoch - 1) else "stale"
        case ["complete"]:
            return store.complete(fence, {"n": 1}).outcome
        case ["end", outcome]:
            return store.end(fence, outcome, result={"n": 1}, error_message="why").outcome
        case ["mark", status]:
            return "done" if mark(drive, execution, "a", status) else "stale"
        case ["other", "fails"]:
            store.end(subject.other, "failed")
        case ["expire"]:
            drive.set_clock(100)
            store.expire_executions(1000)
        case _:
            if operation in ("retry", "rerun", "reopen and mark"):
                store.complete(subject.other, 1)
                if subject.status == "success":
                    drive.complete(execution, "next")
            operate(operation, drive, execution)
    return ""


def operate(operation: str, drive: Driver, execution: str) -> None:
    """What people do to an execution."""
    match operation:
        case "retry":
            drive.store.reopen_execution(execution, "ana")
        case "rerun":
            drive.store.reopen_execution(execution, "ana", task_id="a")
        case "reopen and mark":
            mark(drive, execution, "a", "success")
        case "cancel" | "pause" | "resume":
            getattr(drive.store, f"{operation}_execution")(execution, "ana")
        case _:
            raise AssertionError(operation)


def mark(drive: Driver, execution: str, task: str, status: str) -> bool:
    return drive.store.mark_task(execution, task, TaskStatus(status), result=None, user_id="ana", reason="why").changed


def picture(drive: Driver, execution: str) -> list[tuple[Any, ...]]:
    """Every row of an execution, whole."""
    return [
        row
        for table in ("workflow_executions", "task_executions", "join_counters", "task_attempts", "workflow_events")
        for row in drive.sql(f"SELECT x::text FROM pipeline.{table} x WHERE execution_id = %s ORDER BY 1", execution)
    ]


@pytest.mark.parametrize(("operation", "state", "expected"), named(TASK_TABLE))
def test_task(drive: Driver, operation: str, state: str, expected: str) -> None:
    subject = Subject(drive, state)
    before, status = picture(drive, subject.execution), subject.status
    assert status == state.replace("waiting", "pending")
    answer = operate_on_task(operation, subject)
    if expected in (".", "="):
        assert picture(drive, subject.execution) == before
        assert answer in ("done" if expected == "=" else "stale", "")
    else:
        assert subject.status == (status if expected == "-" else expected)
        assert answer in ("done", "")


LOOKS = """
                waiting    pending    running    retry      success    failed     skipped    cancelled
take due        .          taken      .          taken      .          .          .          .
running attempt .          .          found      .          .          .          .          .
progress        .          .          shown      .          .          .          .          .
lost attempts   .          .          found      .          .          .          .          .
overdue         .          .          found      .          .          .          .          .
"""


@pytest.mark.parametrize(("operation", "state", "expected"), named(LOOKS))
def test_look(drive: Driver, operation: str, state: str, expected: str) -> None:
    subject = Subject(drive, state)
    store, execution, fence = drive.store, subject.execution, subject.fence
    match operation:
        case "take due":
            drive.set_clock(60)
            found: Any = [t for t in store.take_due(1000, first_only=False) if (t.execution_id, t.task_id) == (execution, "a")]
        case "running attempt":
            found = store.running_attempt(execution, "a", fence.epoch, "driver")
        case "progress":
            store.set_progress(fence, 42, "half way")
            found = [t for t in store.get_tasks(execution) if t.task_id == "a" and t.progress == 42]
        case "lost attempts":
            drive.sql("UPDATE pipeline.task_executions SET worker_id = %s WHERE execution_id = %s", drive.new_worker(10), execution)
            drive.set_clock(10)
            found = [a for a in store.lost_attempts(1000) if (a.execution_id, a.task_id) == (execution, "a")]
        case _:
            drive.set_clock(86_400)
            found = [a for a in store.overdue_attempts(1000) if (a.execution_id, a.task_id) == (execution, "a")]
    assert bool(found) == (expected != ".")


# An execution


def make_execution(drive: Driver, state: str) -> str:
    """An execution of `a` and `b`, in one state."""
    drive.set_clock(0)
    execution = drive.start({"a": "", "b": ""}, timeout=100)
    match state:
        case "running":
            drive.claim(execution, "b")
        case "paused":
            drive.store.pause_execution(execution, None)
        case "decided":
            drive.claim(execution, "b")
            drive.end(execution, "a", "failed")
        case "failed" | "retry":
            drive.end(execution, "a", "failed")
        case "cancelled":
            drive.store.cancel_execution(execution, None)
        case "success":
            drive.drain(execution)
    if state == "retry":
        drive.store.reopen_execution(execution, None)
    assert label(drive, execution) == state
    return execution


def label(drive: Driver, execution: str) -> str:
    row = drive.store.get_execution(execution)
    ended = row.status in TERMINAL_EXECUTIONS
    return "paused" if row.paused else "decided" if row.verdict and not ended else row.status.value


def operate_on_execution(operation: str, drive: Driver, execution: str) -> None:
    match operation:
        case "claim":
            drive.claim(execution, "a")
        case "complete all":
            for fence in claim_all(drive, execution):
                drive.store.complete(fence, 1)
        case "fail" | "cancel one":
            first, *others = claim_all(drive, execution) or [None]
            if first is not None:
                drive.store.end(first, "failed" if operation == "fail" else "cancelled")
            for fence in others:
                drive.store.complete(fence, 1)
        case "mark all":
            mark(drive, execution, "a", "skipped")
            mark(drive, execution, "b", "success")
        case "expire":
            drive.set_clock(100)
            drive.store.expire_executions(1000)
        case _:
            operate(operation, drive, execution)


def claim_all(drive: Driver, execution: str) -> list[Fence]:
    """Fences of everything that runs already or can be made to."""
    tasks = drive.store.get_tasks(execution)
    fences = [(drive.fence if t.status == "running" else drive.claim)(execution, t.task_id) for t in tasks]
    return [fence for fence in fences if fence is not None]


@pytest.mark.parametrize(("operation", "state", "expected"), named(EXECUTION_TABLE))
def test_execution(drive: Driver, operation: str, state: str, expected: str) -> None:
    execution = make_execution(drive, state)
    before = picture(drive, execution)
    operate_on_execution(operation, drive, execution)
    assert label(drive, execution) == (state if expected == "." else expected)
    if expected == ".":
        assert picture(drive, execution) == before


@pytest.mark.parametrize("state", ["pending", "running", "paused", "decided", "retry", "success", "failed", "cancelled"])
@pytest.mark.parametrize("operation", ["cancel", "pause", "resume", "reopen"])
def test_steering_returns_the_status_that_it_found(drive: Driver, operation: str, state: str) -> None:
    execution = make_execution(drive, state)
    found = drive.status(execution)
    assert getattr(drive.store, f"{operation}_execution")(execution, "ana") == found


@pytest.mark.parametrize("operation", ["cancel", "pause", "resume", "reopen"])
def test_steering_an_unknown_execution_says_so(drive: Driver, operation: str) -> None:
    with pytest.raises(ExecutionNotFound, match="exec-none"):
        getattr(drive.store, f"{operation}_execution")("exec-none", None)


def test_steering_is_recorded_once_for_each_that_did_something(drive: Driver) -> None:
    execution = drive.start({"a": ""})
    for operation in ("pause", "pause", "resume", "resume", "cancel", "cancel", "reopen", "reopen", "cancel"):
        getattr(drive.store, f"{operation}_execution")(execution, "ana")
    kinds = [(event.kind, event.user_id) for event in drive.store.get_events(execution)]
    assert kinds == [(kind, "ana") for kind in ("pause", "resume", "cancel", "retry", "cancel")]


# Fences and forgeries


@pytest.fixture
def ready(drive: Driver) -> Iterator[str]:
    yield drive.start({"a": "", "b": "a"})


@pytest.mark.parametrize("epoch", [-1, 1, 2, 2**31 - 2])
def test_claim_at_a_wrong_epoch_is_refused(drive: Driver, ready: str, epoch: int) -> None:
    before = picture(drive, ready)
    assert drive.store.claim(execution_id=ready, task_id="a", epoch=epoch, worker_id=drive.worker) is None
    assert picture(drive, ready) == before


@pytest.mark.parametrize("where", [("exec-none", "a"), (None, "none"), ("", "")])
def test_claim_of_what_does_not_exist_is_refused(drive: Driver, ready: str, where: tuple[str | None, str]) -> None:
    execution, task = where
    assert drive.store.claim(execution_id=execution or ready, task_id=task, epoch=0, worker_id=drive.worker) is None


def test_claim_by_an_unknown_worker_is_refused(drive: Driver, ready: str) -> None:
    assert drive.claim(ready, "a", worker=2**40) is None


def test_claim_by_a_worker_whose_lease_ran_out_is_refused_until_it_is_renewed(drive: Driver, ready: str) -> None:
    late = drive.new_worker(lease=0)
    assert drive.claim(ready, "a", worker=late) is None
    assert drive.store.renew_worker(late, 3600)
    assert drive.claim(ready, "a", worker=late) is not None


def test_claim_by_a_worker_that_gave_its_lease_back_is_refused(drive: Driver, ready: str) -> None:
    gone = drive.new_worker()
    drive.store.end_worker(gone)
    assert drive.claim(ready, "a", worker=gone) is None


def test_claim_of_a_running_task_by_another_worker_is_refused(drive: Driver, ready: str) -> None:
    fence = drive.must_claim(ready, "a")
    rival = drive.new_worker()
    for epoch in (fence.epoch - 1, fence.epoch):
        assert drive.store.claim(execution_id=ready, task_id="a", epoch=epoch, worker_id=rival) is None


def test_claim_hard_limit_and_timeout_make_the_deadline(drive: Driver) -> None:
    drive.set_clock(0)
    execution = drive.start({"a": ""})
    drive.must_claim(execution, "a")
    drive.set_clock(300 + drive.store.hard_limit.total_seconds() * 3 - 1)
    assert execution not in {a.execution_id for a in drive.store.overdue_attempts(1000)}
    drive.set_clock(300 + drive.store.hard_limit.total_seconds() * 3)
    assert execution in {a.execution_id for a in drive.store.overdue_attempts(1000)}


WRONG: dict[str, Callable[[Fence, Driver], Fence]] = {
    "older epoch": lambda fence, drive: replace(fence, epoch=fence.epoch - 1),
    "newer epoch": lambda fence, drive: replace(fence, epoch=fence.epoch + 1),
    "another worker": lambda fence, drive: replace(fence, worker_id=drive.new_worker()),
    "unknown worker": lambda fence, drive: replace(fence, worker_id=2**40),
    "unknown task": lambda fence, drive: replace(fence, task_id="none"),
    "another task": lambda fence, drive: replace(fence, task_id="b"),
    "unknown execution": lambda fence, drive: replace(fence, execution_id="exec-none"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("outcome", ["complete", "success", "failed", "skipped", "cancelled", "retry", "lost", "released"])
def test_end_with_a_wrong_fence_is_stale_and_changes_nothing(drive: Driver, ready: str, outcome: str, wrong: str) -> None:
    fence = WRONG[wrong](drive.must_claim(ready, "a"), drive)
    before = picture(drive, ready)
    ended = drive.store.complete(fence, 1) if outcome == "complete" else drive.store.end(fence, outcome)
    assert (ended.outcome, ended.ready) == ("stale", ())
    drive.store.set_progress(fence, 99, "forged")
    assert picture(drive, ready) == before


def test_complete_by_a_worker_whose_lease_ran_out_counts_while_nobody_took_the_task(drive: Driver, ready: str) -> None:
    drive.set_clock(0)
    worker = drive.new_worker(lease=10)
    fence = drive.claim(ready, "a", worker=worker)
    assert fence is not None
    drive.set_clock(1000)
    assert drive.store.complete(fence, 1).outcome == "done"


def test_complete_by_a_worker_that_was_declared_lost_is_stale(drive: Driver, ready: str) -> None:
    zombie = drive.must_claim(ready, "a")
    drive.store.end(zombie, "lost", error_message="no heartbeat")
    assert drive.store.complete(zombie, 1).outcome == "stale"
    second = drive.must_claim(ready, "a")
    assert drive.store.complete(zombie, 1).outcome == "stale"
    assert drive.store.complete(second, 2).outcome == "done"
    assert drive.store.results(ready, ["a"]) == {"a": 2}


def test_end_released_costs_no_budget(drive: Driver, ready: str) -> None:
    for _ in range(5):
        drive.end(ready, "a", "released")
    task = drive.store.get_tasks(ready)[0]
    assert (task.status, task.attempt, task.losses, task.retries) == ("pending", 5, 0, 0)


def test_running_attempt_is_found_by_its_epoch_and_its_workers_name_only(drive: Driver, ready: str) -> None:
    fence = drive.must_claim(ready, "a")
    found = drive.store.running_attempt(ready, "a", fence.epoch, "driver")
    assert found is not None
    assert (found.epoch, found.worker_id) == (fence.epoch, fence.worker_id)
    assert drive.store.running_attempt(ready, "a", fence.epoch - 1, "driver") is None
    assert drive.store.running_attempt(ready, "a", fence.epoch, "another") is None
    assert drive.store.running_attempt(ready, "b", fence.epoch, "driver") is None


def test_end_with_an_outcome_that_is_none_is_refused_by_the_database(drive: Driver, ready: str) -> None:
    fence = drive.must_claim(ready, "a")
    for outcome in ("pending", "running", "done"):
        with pytest.raises(psycopg.errors.CheckViolation):
            drive.store.end(fence, outcome)
    assert drive.tasks(ready)["a"] == "running"


@pytest.mark.parametrize("task", ["none", ""])
def test_rerun_and_mark_of_an_unknown_task_say_so_and_change_nothing(drive: Driver, task: str) -> None:
    execution = make_execution(drive, "failed")
    before = picture(drive, execution)
    with pytest.raises(TaskNotFound, match=execution):
        drive.store.reopen_execution(execution, None, task_id=task)
    with pytest.raises(TaskNotFound, match=execution):
        mark(drive, execution, task, "success")
    assert picture(drive, execution) == before


# Pause and due times


def test_paused_tasks_are_parked_when_due_and_back_at_once_on_resume(drive: Driver) -> None:
    drive.set_clock(0)
    execution = drive.start({"a": "", "b": ""})
    drive.end(execution, "b", "retry")
    drive.store.pause_execution(execution, None)
    for moment in (60, 7200):
        drive.set_clock(moment)
        assert execution not in {t.execution_id for t in drive.store.take_due(1000, first_only=False)}
    assert drive.store.get_tasks(execution)[1].retry_at is None
    drive.store.resume_execution(execution, None)
    assert {t.task_id for t in drive.store.take_due(1000, first_only=True) if t.execution_id == execution} == {"a", "b"}


def test_resume_leaves_a_retry_that_is_not_due_to_its_delay(drive: Driver) -> None:
    drive.set_clock(0)
    execution = drive.start({"a": ""})
    fence = drive.must_claim(execution, "a")
    drive.store.end(fence, "retry", delay=500)
    drive.store.pause_execution(execution, None)
    drive.set_clock(100)
    drive.store.resume_execution(execution, None)
    assert drive.store.take_due(1000, first_only=False) == ()
    drive.set_clock(500)
    assert [t.execution_id for t in drive.store.take_due(1000, first_only=False)] == [execution]


def test_paused_execution_lets_what_runs_finish_and_start_nothing(drive: Driver, ready: str) -> None:
    fence = drive.must_claim(ready, "a")
    drive.store.pause_execution(ready, None)
    assert [t.task_id for t in drive.store.complete(fence, 1).ready] == ["b"]
    assert drive.claim(ready, "b") is None
    drive.store.resume_execution(ready, None)
    assert drive.claim(ready, "b") is not None


def test_take_due_looks_later_each_time_and_first_only_leaves_what_was_published(lone: Driver) -> None:
    lone.set_clock(0)
    lone.start({"a": ""})
    grace, moment = lone.store.grace.total_seconds(), 0.0
    for doubling in range(1, 4):
        moment += grace * 2 ** (doubling - 1)
        lone.set_clock(moment - 1)
        assert lone.store.take_due(10, first_only=False) == ()
        lone.set_clock(moment)
        assert lone.store.take_due(10, first_only=True) == ()
        assert lone.store.recovery_work().due
        assert len(lone.store.take_due(10, first_only=False)) == 1
        assert not lone.store.recovery_work().due
    assert lone.store.count_published() == 1


def test_take_due_takes_no_more_than_its_limit(lone: Driver) -> None:
    lone.start({f"a{n}": "" for n in range(10)})
    lone.sql("UPDATE pipeline.task_executions SET due_at = pipeline.clock()")
    assert [len(lone.store.take_due(4, first_only=False)) for _ in range(4)] == [4, 4, 2, 0]


def test_queue_timeout_ends_an_execution_whose_task_waits_too_long_unless_it_is_paused(drive: Driver) -> None:
    drive.set_clock(0)
    execution = drive.start({"a": ""}, queue_timeout=50)
    drive.store.pause_execution(execution, None)
    drive.set_clock(51)
    drive.store.expire_executions(1000)
    assert drive.status(execution) == "pending"
    drive.store.resume_execution(execution, None)
    drive.store.expire_executions(1000)
    assert drive.status(execution) == "failed"
    assert "queue_timeout" in (drive.message(execution) or "")


def test_forget_deletes_ended_executions_and_no_others(drive: Driver) -> None:
    ended, open_ = make_execution(drive, "success"), make_execution(drive, "running")
    assert drive.store.forget_executions([ended, open_, "exec-none"]) == 1
    assert picture(drive, ended) == []
    assert drive.status(open_) == "running"


# The law


def test_every_legal_transition_is_made_by_some_operation_and_no_other(lone: Driver) -> None:
    lone.sql("CREATE TABLE seen (kind text, before text, after text)")
    lone.sql("""
        CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO seen VALUES (TG_TABLE_NAME, OLD.status, NEW.status); RETURN NULL;
        END $$""")
    for table in ("task_executions", "workflow_executions"):
        lone.sql(f"""
            CREATE TRIGGER see AFTER UPDATE ON pipeline.{table} FOR EACH ROW
            WHEN (OLD.status <> NEW.status) EXECUTE FUNCTION see()""")
    for operation, state, _ in cells(TASK_TABLE):
        operate_on_task(operation, Subject(lone, state))
    for operation, state, _ in cells(EXECUTION_TABLE):
        operate_on_execution(operation, lone, make_execution(lone, state))
    seen = {(kind, before, after) for kind, before, after in lone.sql("SELECT DISTINCT * FROM seen")}
    assert seen == {
        (kind, before.value, after.value)
        for kind, table in (("task_executions", TASK_TRANSITIONS), ("workflow_executions", EXECUTION_TRANSITIONS))
        for before, targets in table.items()
        for after in targets
    }


@pytest.mark.parametrize("before", TaskStatus)
def test_every_illegal_transition_of_a_task_is_refused(drive: Driver, before: TaskStatus) -> None:
    subject = Subject(drive, before.value)
    for after in set(TaskStatus) - TASK_TRANSITIONS[before] - {before}:
        with pytest.raises(psycopg.errors.RaiseException, match=f"illegal transition of task: {before} -> {after}"):
            drive.sql(
                "UPDATE pipeline.task_executions SET status = %s WHERE execution_id = %s AND task_id = 'a'",
                after.value, subject.execution,
            )  # fmt: skip


@pytest.mark.parametrize("before", ExecutionStatus)
def test_every_illegal_transition_of_an_execution_is_refused(drive: Driver, before: ExecutionStatus) -> None:
    execution = make_execution(drive, before.value)
    for after in set(ExecutionStatus) - EXECUTION_TRANSITIONS[before] - {before}:
        with pytest.raises(psycopg.errors.RaiseException, match=f"illegal transition of execution: {before} -> {after}"):
            drive.sql("UPDATE pipeline.workflow_executions SET status = %s WHERE execution_id = %s", after.value, execution)


def test_an_epoch_that_goes_back_is_refused(drive: Driver, ready: str) -> None:
    drive.must_claim(ready, "a")
    with pytest.raises(psycopg.errors.RaiseException, match="epoch went back"):
        drive.sql("UPDATE pipeline.task_executions SET epoch = 0 WHERE execution_id = %s", ready)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("task_executions_status", TaskStatus), ("task_executions_finished", TERMINAL_TASKS),
        ("workflow_executions_status", ExecutionStatus), ("workflow_executions_finished", TERMINAL_EXECUTIONS),
        ("workflow_executions_verdict", TERMINAL_EXECUTIONS - {ExecutionStatus.SUCCESS}),
    ],
)  # fmt: skip
def test_check_constraints_list_exactly_the_enums(drive: Driver, name: str, values: type[Enum]) -> None:
    ((text,),) = drive.sql("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = %s", name)
    assert set(re.findall(r"'(\w+)'", text)) == {str(value) for value in values}
