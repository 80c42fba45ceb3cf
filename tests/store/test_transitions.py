"""Every operation from every state: what happens, and what must not."""

from __future__ import annotations

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
reopen and mark -          success    success    success    -          success    -          success
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
    return [
        (operation, state, cell) for operation, row in rows for state, cell in zip(header.split(), row, strict=True)
    ]


def named(table: str) -> list[Any]:
    return [pytest.param(*cell, id=f"{cell[0]}-{cell[1]}-{cell[2]}".replace(" ", "_")) for cell in cells(table)]


# A task


class Subject:
    """A task `a` in one state, with what its last attempt holds; forged where there was none."""

    def __init__(self, drive: Driver, state: str) -> None:
        drive.set_clock(0)
        self.drive = drive
        self.execution = drive.start(
            {"o": "", "z": "", "a": "z" if state == "waiting" else "", "next": "a"}, timeout=100
        )
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
            execution_id=self.execution, task_id="a", epoch=epoch, worker_id=self.drive.worker, handler="debug.noop"
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
            return "done" if drive.mark(execution, "a", status) else "stale"
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
            drive.mark(execution, "a", "success")
        case "cancel" | "pause" | "resume":
            getattr(drive.store, f"{operation}_execution")(execution, "ana")
        case _:
            raise AssertionError(operation)


@pytest.mark.parametrize(("operation", "state", "expected"), named(TASK_TABLE))
def test_task(drive: Driver, operation: str, state: str, expected: str) -> None:
    subject = Subject(drive, state)
    before, status = drive.picture(subject.execution), subject.status
    assert status == state.replace("waiting", "pending")
    answer = operate_on_task(operation, subject)
    if expected in (".", "="):
        assert drive.picture(subject.execution) == before
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
            found: Any = [
                t for t in store.take_due(1000, first_only=False) if (t.execution_id, t.task_id) == (execution, "a")
            ]
        case "running in":
            found = [a for a in store.running_in("driver", 1) if (a.execution_id, a.task_id) == (execution, "a")]
        case "progress":
            store.set_progress(fence, 42, "half way")
            found = [t for t in store.get_tasks(execution) if t.task_id == "a" and t.progress == 42]
        case "lost attempts":
            drive.sql(
                "UPDATE pipeline.task_executions SET worker_id = %s WHERE execution_id = %s",
                drive.new_worker(10),
                execution,
            )
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
            drive.mark(execution, "a", "skipped")
            drive.mark(execution, "b", "success")
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
    before = drive.picture(execution)
    operate_on_execution(operation, drive, execution)
    assert label(drive, execution) == (state if expected == "." else expected)
    if expected == ".":
        assert drive.picture(execution) == before


@pytest.mark.parametrize(
    "state", ["pending", "running", "paused", "decided", "retry", "success", "failed", "cancelled"]
)
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


@pytest.mark.parametrize("task", ["none", ""])
def test_rerun_and_mark_of_an_unknown_task_say_so_and_change_nothing(drive: Driver, task: str) -> None:
    execution = make_execution(drive, "failed")
    before = drive.picture(execution)
    with pytest.raises(TaskNotFound, match=execution):
        drive.store.reopen_execution(execution, None, task_id=task)
    with pytest.raises(TaskNotFound, match=execution):
        drive.mark(execution, task, "success")
    assert drive.picture(execution) == before


@pytest.mark.parametrize("state", ["failed", "cancelled", "success"])
def test_execution_that_is_closed_for_good_cannot_be_opened_or_marked_and_does_not_change(drive: Driver, state: str) -> None:
    execution = make_execution(drive, state)
    assert drive.store.close_for_good(execution)
    before = drive.picture(execution)
    with pytest.raises(ExecutionNotFound):
        drive.store.reopen_execution(execution, None, task_id="a")
    with pytest.raises(TaskNotFound):
        drive.mark(execution, "a", "skipped")
    assert drive.picture(execution) == before


@pytest.mark.parametrize("state", ["pending", "running", "retry"])
def test_execution_that_has_not_ended_is_not_closed_for_good(drive: Driver, state: str) -> None:
    execution = make_execution(drive, state)
    assert not drive.store.close_for_good(execution)
    assert drive.status(execution) == state


def test_forget_deletes_ended_executions_and_no_others(drive: Driver) -> None:
    ended, open_ = make_execution(drive, "success"), make_execution(drive, "running")
    assert drive.store.forget_executions([ended, open_, "exec-none"]) == 1
    with pytest.raises(ExecutionNotFound):
        drive.status(ended)
    assert (drive.store.get_tasks(ended), drive.store.get_task(ended, "a"), drive.store.get_events(ended)) == ([], None, [])
    assert drive.status(open_) == "running"


# The law


def test_every_legal_transition_is_made_by_some_operation_and_no_other(database_url: str) -> None:
    lone = Driver(database_url)
    lone.sql("CREATE TABLE seen (kind text, before text, after text)")
    lone.sql("""
        CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO seen VALUES (TG_ARGV[0], OLD.status, NEW.status); RETURN NULL;
        END $$""")
    for table in ("task_executions", "workflow_executions"):
        lone.sql(f"""
            CREATE TRIGGER see AFTER UPDATE ON pipeline.{table} FOR EACH ROW
            WHEN (OLD.status <> NEW.status) EXECUTE FUNCTION see({table})""")
    for operation, state, _ in cells(TASK_TABLE):
        operate_on_task(operation, Subject(lone, state))
    for operation, state, _ in cells(EXECUTION_TABLE):
        operate_on_execution(operation, lone, make_execution(lone, state))
    seen = set(lone.sql("SELECT DISTINCT * FROM seen"))
    lone.close()
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
        with pytest.raises(
            psycopg.errors.RaiseException, match=f"illegal transition of execution: {before} -> {after}"
        ):
            drive.sql(
                "UPDATE pipeline.workflow_executions SET status = %s WHERE execution_id = %s", after.value, execution
            )


def test_an_epoch_that_goes_back_is_refused(drive: Driver) -> None:
    execution = Subject(drive, "running").execution
    with pytest.raises(psycopg.errors.RaiseException, match="epoch went back"):
        drive.sql("UPDATE pipeline.task_executions SET epoch = 0 WHERE execution_id = %s", execution)


#: what no row of a table may be, whatever its status
NEVER = {
    "workflow_executions": ("verdict = 'success'", "verdict = 'running'"),
    "task_executions": ("led_by = 'b', due_at = NULL",),
}


@pytest.mark.parametrize(
    ("table", "status", "terminal"),
    [
        ("workflow_executions", ExecutionStatus, TERMINAL_EXECUTIONS), ("task_executions", TaskStatus, TERMINAL_TASKS),
    ],
)  # fmt: skip
def test_database_takes_the_states_of_the_enum_and_an_end_for_the_terminal_ones_only(
    drive: Driver, table: str, status: type[Enum], terminal: frozenset[Enum]
) -> None:
    execution = drive.start({"a": "", "b": ""})

    def takes(assignments: str) -> bool:
        with psycopg.connect(drive.url) as connection:
            connection.execute("SET session_replication_role = replica")  # without the tests' own triggers
            try:
                connection.execute(f"UPDATE pipeline.{table} SET {assignments} WHERE execution_id = %s".encode(), [execution])
            except psycopg.errors.CheckViolation:
                return False
            finally:
                connection.rollback()
        return True

    claimed = ", worker_id = 1, deadline_at = now(), due_at = NULL, led_by = NULL" if table == "task_executions" else ""
    for value in [*(str(s) for s in status), "done", ""]:
        known = value in set(status)
        assert takes(f"status = '{value}', finished_at = NULL{claimed}") is (known and value not in terminal), value
        assert takes(f"status = '{value}', finished_at = now(){claimed}") is (known and value in terminal), value
    assert [wrong for wrong in NEVER[table] if takes(wrong)] == []


@pytest.mark.parametrize("held", [
    "worker_id = NULL, deadline_at = now(), due_at = NULL", "worker_id = 1, deadline_at = NULL, due_at = NULL",
    "worker_id = 1, deadline_at = now(), due_at = now()",
])  # fmt: skip
def test_database_takes_no_running_task_that_is_due_or_lacks_a_worker_or_a_deadline(drive: Driver, held: str) -> None:
    drive.start({"a": ""})
    with pytest.raises(psycopg.errors.CheckViolation):
        drive.sql(f"UPDATE pipeline.task_executions SET status = 'running', {held}")
