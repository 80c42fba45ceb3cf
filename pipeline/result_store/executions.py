"""RECORD: executions as a whole: created, looked at, steered, forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg

from pipeline.errors import ExecutionNotFound, TaskNotFound
from pipeline.result_store import rows
from pipeline.result_store.door import Count, Door, jsonb
from pipeline.states import ExecutionStatus, TaskStatus


class Executions(Door):
    """Executions and what is known of them."""

    def create_executions(
        self, work: Sequence[rows.NewExecution], *, definition_id: int, user_id: str | None, variables: Mapping[str, Any],
        timeout: float | None, queue_timeout: float | None = None, leader: str | None = None,
    ) -> list[rows.Created]:  # fmt: skip
        """Record executions of a definition with all their tasks, or find those that their idempotency keys belong to.

        Left out, and not recorded: those whose id is another execution's. With `leader`, the execution that this program
        enqueued last, or "", a single one joins its message where that waits, and nothing is `ready` then.
        """
        return self._all(
            "create_executions", rows.Created, work=jsonb([vars(new) for new in work]), definition_id=definition_id,
            user_id=user_id, variables=jsonb(variables), timeout=_seconds(timeout), queue_timeout=_seconds(queue_timeout),
            grace=self.grace, leader=leader,
        )  # fmt: skip

    def execution_status(self, execution_id: str) -> ExecutionStatus:
        """Only the status.

        Raises:
            ExecutionNotFound: there is none.
        """
        return ExecutionStatus(_known(self._one("execution_status", _Status, execution_id=execution_id), execution_id))

    def await_execution(self, execution_id: str) -> None:
        """From now on, who listens to `pipeline_finished` hears of its end; nobody does who may only read."""
        with suppress(psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction):
            self._all("await_execution", _Status, execution_id=execution_id)

    def get_execution(self, execution_id: str) -> rows.ExecutionRow:
        """One execution without its tasks.

        Raises:
            ExecutionNotFound: there is none.
        """
        found = self._one("get_execution", rows.ExecutionRow, execution_id=execution_id)
        if found is None:
            raise ExecutionNotFound(execution_id)
        return found

    def get_tasks(self, execution_id: str) -> list[rows.TaskExecution]:
        """Its tasks in topological order."""
        return self._all("get_tasks", rows.TaskExecution, execution_id=execution_id)

    def get_attempts(self, execution_id: str, task_id: str) -> list[rows.AttemptRow]:
        """The attempts of a task that were followed by another."""
        return self._all("get_attempts", rows.AttemptRow, execution_id=execution_id, task_id=task_id)

    def get_task(self, execution_id: str, task_id: str) -> rows.TaskState | None:
        """One task, for Celery's AsyncResult."""
        return self._one("get_task", rows.TaskState, execution_id=execution_id, task_id=task_id)

    def settle_task(self, execution_id: str, task_id: str) -> None:
        """Wait until what was seen of a task is on disk; nobody does who may only read."""
        with suppress(psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction):
            self._all("settle_task", _Status, execution_id=execution_id, task_id=task_id)

    def list_executions(self, status: str | None = None, limit: int = 50) -> list[rows.ExecutionSummary]:
        """The newest executions first."""
        return self._all("list_executions", rows.ExecutionSummary, status=status, limit=limit)

    def cancel_execution(self, execution_id: str, user_id: str | None) -> ExecutionStatus:
        """Cancel; returns the status that the execution was found in."""
        return self._steer("cancel_execution", execution_id, user_id)

    def pause_execution(self, execution_id: str, user_id: str | None) -> ExecutionStatus:
        """Let nothing new start; returns the status found."""
        return self._steer("pause_execution", execution_id, user_id)

    def resume_execution(self, execution_id: str, user_id: str | None) -> ExecutionStatus:
        """Undo a pause; returns the status found."""
        return self._steer("resume_execution", execution_id, user_id)

    def reopen_execution(
        self, execution_id: str, user_id: str | None, *, task_id: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> ExecutionStatus:  # fmt: skip
        """Open an ended execution again; returns the status found.

        Args:
            execution_id: of the execution.
            user_id: recorded as the one who did it.
            task_id: rerun from here with everything downstream; None: from what did not succeed.
            params: replace those of the task.

        Raises:
            TaskNotFound: the execution has no such task.
        """
        found = self._one(
            "reopen_execution", _Status, execution_id=execution_id, user_id=user_id, task_id=task_id,
            params=None if params is None else jsonb(params),
        )  # fmt: skip
        if found is not None and found.status == "no such task":
            raise TaskNotFound(execution_id, task_id or "")
        return ExecutionStatus(_known(found, execution_id))

    def mark_task(
        self, execution_id: str, task_id: str, status: TaskStatus, *, result: Any, user_id: str | None, reason: str
    ) -> rows.Ended:
        """Decide a task by hand; `outcome` is the status that it was found in.

        Raises:
            TaskNotFound: the execution has no such task.
        """
        (ended,) = self._all(
            "mark_task", rows.Ended, execution_id=execution_id, task_id=task_id, status=status.value,
            result=jsonb(result), user_id=user_id, reason=reason, grace=self.grace,
        )  # fmt: skip
        if ended.outcome is None:
            raise TaskNotFound(execution_id, task_id)
        return ended

    def _steer(self, name: str, execution_id: str, user_id: str | None) -> ExecutionStatus:
        return ExecutionStatus(
            _known(self._one(name, _Status, execution_id=execution_id, user_id=user_id), execution_id)
        )

    def get_events(self, execution_id: str) -> list[rows.Event]:
        """What people did to an execution, in order."""
        return self._all("get_events", rows.Event, execution_id=execution_id)

    def finished_before(self, age: float, limit: int) -> list[str]:
        """Ids of executions that ended more than `age` seconds ago, oldest first."""
        found = self._all("finished_before", _Id, age=timedelta(seconds=age), limit=limit)
        return [row.execution_id for row in found]

    def forget_executions(self, execution_ids: Sequence[str]) -> int:
        """Delete ended executions with all their rows; returns how many."""
        return self._all("forget_executions", Count, execution_ids=list(execution_ids))[0].count

    def close_for_good(self, execution_id: str) -> bool:
        """Let nobody open an execution again; False where it has not ended."""
        return self._all("close_for_good", _Closed, execution_id=execution_id)[0].closed

    def make_partitions(self, days: int, most_bytes: int = 2**30) -> int:
        """See to it that the executions of the next days have partitions, of so many days each; returns how many were made.

        None is made where the default partition of tasks is larger than `most_bytes`.
        """
        return self._all("make_partitions", Count, days=days, most_bytes=most_bytes)[0].count

    def drop_partitions(self) -> int:
        """Drop the partitions of which every execution is forgotten; returns how many."""
        return self._all("drop_partitions", Count)[0].count


@dataclass(frozen=True, kw_only=True)
class _Status:
    status: str | None


@dataclass(frozen=True, kw_only=True)
class _Closed:
    closed: bool


@dataclass(frozen=True, kw_only=True)
class _Id:
    execution_id: str


def _known(row: _Status | None, execution_id: str) -> str:
    if row is None or row.status is None:
        raise ExecutionNotFound(execution_id)
    return row.status


def _seconds(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)
