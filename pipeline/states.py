"""The states of executions and tasks, and every transition between them.

The tables below are the law: the database repeats them as CHECK constraints and (in tests) as a trigger,
and a test holds both sides together.
"""

from __future__ import annotations

from enum import StrEnum


class ExecutionStatus(StrEnum):
    """What an execution is doing; each value's comment says who moves the row out of it."""

    PENDING = "pending"  # recorded; the first claim of a task moves it to running
    RUNNING = "running"  # the completion that leaves no open task ends it
    SUCCESS = "success"  # terminal, until `rerun`
    FAILED = "failed"  # terminal, until `retry`
    CANCELLED = "cancelled"  # terminal, until `retry`
    RETRY = "retry"  # open again after `retry`; the next claim moves it to running


class TaskStatus(StrEnum):
    """What a task is doing; each value's comment says who moves the row out of it."""

    PENDING = "pending"  # waits for dependencies, or (ready_at is set) for a worker: a claim moves it
    RUNNING = "running"  # claimed by one attempt: its completion moves it, or recovery when the worker is lost
    RETRY = "retry"  # failed and due again at due_at: a claim moves it
    SUCCESS = "success"  # terminal, until the execution's `rerun`
    FAILED = "failed"  # terminal, until the execution's `retry`
    SKIPPED = "skipped"  # terminal, until the execution's `retry`
    CANCELLED = "cancelled"  # terminal, until the execution's `retry`


_E, _T = ExecutionStatus, TaskStatus

EXECUTION_TRANSITIONS: dict[ExecutionStatus, frozenset[ExecutionStatus]] = {
    _E.PENDING: frozenset({_E.RUNNING, _E.SUCCESS, _E.FAILED, _E.CANCELLED}),
    _E.RUNNING: frozenset({_E.SUCCESS, _E.FAILED, _E.CANCELLED}),
    _E.RETRY: frozenset({_E.RUNNING, _E.SUCCESS, _E.FAILED, _E.CANCELLED}),
    _E.FAILED: frozenset({_E.RETRY}),
    _E.CANCELLED: frozenset({_E.RETRY}),
    _E.SUCCESS: frozenset({_E.RETRY}),
}

#: `pending -> failed` does not exist: what failed has run. A task reaches success without running only where somebody
#: marks it so. A terminal task returns to pending only by the execution's `retry` or `rerun`, which raises its epoch.
TASK_TRANSITIONS: dict[TaskStatus, frozenset[TaskStatus]] = {
    _T.PENDING: frozenset({_T.RUNNING, _T.SUCCESS, _T.SKIPPED, _T.CANCELLED}),
    _T.RUNNING: frozenset({_T.SUCCESS, _T.FAILED, _T.SKIPPED, _T.CANCELLED, _T.RETRY, _T.PENDING}),
    _T.RETRY: frozenset({_T.RUNNING, _T.SUCCESS, _T.SKIPPED, _T.CANCELLED}),
    _T.SUCCESS: frozenset({_T.PENDING}),
    _T.FAILED: frozenset({_T.PENDING}),
    _T.SKIPPED: frozenset({_T.PENDING}),
    _T.CANCELLED: frozenset({_T.PENDING}),
}

OPEN_TASKS = frozenset({_T.PENDING, _T.RUNNING, _T.RETRY})
TERMINAL_TASKS = frozenset(_T) - OPEN_TASKS
OPEN_EXECUTIONS = frozenset(status for status, targets in EXECUTION_TRANSITIONS.items() if _E.SUCCESS in targets)
TERMINAL_EXECUTIONS = frozenset(_E) - OPEN_EXECUTIONS
