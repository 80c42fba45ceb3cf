"""RECORD: what the engine asks of Postgres, one method per statement."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import psycopg
from psycopg.types.json import Json, Jsonb

from pipeline.errors import DefinitionConflict, ExecutionNotFound, WorkflowNotFound
from pipeline.result_store import rows
from pipeline.result_store.connection import Borrowed, Database, Link, Listener
from pipeline.result_store.statements import statements
from pipeline.states import ExecutionStatus


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _One:
    value: Any


@dataclass(frozen=True, kw_only=True)
class _Definition:
    definition_id: int
    digest: str = ""
    definition: str = ""


@dataclass(frozen=True, kw_only=True)
class _EndedRow:
    outcome: str
    execution_id: str | None
    task_id: str | None
    epoch: int | None
    handler: str | None
    timeout: float | None


class ResultStore:
    """The store, over a link to Postgres."""

    def __init__(self, link: Link, *, url: str = "", grace: float = 10.0, hard_limit: float = 10.0, loss_budget: int = 5):
        self.link, self.url = link, url
        self.grace = timedelta(seconds=grace)
        self.hard_limit = timedelta(seconds=hard_limit)
        self.loss_budget = loss_budget

    @classmethod
    def open(cls, url: str, *, patience: float = 0.0, name: str = "chordal", **options: Any) -> Self:
        """A store with connections of its own; see `Database` for `patience`."""
        return cls(Database(url, patience=patience, name=name), url=url, **options)

    def within(self, connection: psycopg.Connection[Any]) -> ResultStore:
        """The same store inside a caller's transaction."""
        return ResultStore(
            Borrowed(connection), url=self.url, grace=self.grace.total_seconds(),
            hard_limit=self.hard_limit.total_seconds(), loss_budget=self.loss_budget,
        )  # fmt: skip

    def close(self) -> None:
        """Close the store's own connections."""
        if isinstance(self.link, Database):
            self.link.close()

    def listen(self, channel: str) -> Listener:
        """Hear `pipeline_finished` or `pipeline_stop`: payloads are execution ids."""
        return Listener(self.url, channel)

    def _all(self, name: str, row: type[T], /, **parameters: Any) -> list[T]:
        return self.link.fetch(statements()[name], row, parameters)

    def _one(self, name: str, row: type[T], /, **parameters: Any) -> T | None:
        found = self._all(name, row, **parameters)
        return found[0] if found else None

    # definitions

    def register(
        self, *, workflow_id: str, version: str, digest: str, definition: str,
        tasks: Sequence[Mapping[str, Any]], headers: Sequence[Mapping[str, Any]],
    ) -> int:  # fmt: skip
        """Record a definition with its plan, once; returns its key.

        Raises:
            DefinitionConflict: id and version are registered with another digest.
        """
        known = self._one("definition_digest", _Definition, workflow_id=workflow_id, version=version)
        if known is None:
            with self.link.transaction():
                fresh = self._one(
                    "insert_definition", _Definition, workflow_id=workflow_id, version=version, digest=digest,
                    definition=definition,
                )  # fmt: skip
                if fresh is not None:
                    self._all(
                        "insert_plan", _One, definition_id=fresh.definition_id, tasks=Json(tasks), headers=Json(headers)
                    )
                    return fresh.definition_id
            known = self._one("definition_digest", _Definition, workflow_id=workflow_id, version=version)
        if known is None or known.digest != digest:
            raise DefinitionConflict(workflow_id, version)
        return known.definition_id

    def find_definition(self, workflow_id: str, version: str | None = None) -> tuple[int, str]:
        """Key and JSON of a registered definition, the newest one where `version` is None.

        Raises:
            WorkflowNotFound: there is none.
        """
        found = self._one("find_definition", _Definition, workflow_id=workflow_id, version=version)
        if found is None:
            raise WorkflowNotFound(workflow_id, version)
        return found.definition_id, found.definition

    def definition(self, definition_id: int) -> str:
        """JSON of a definition by its key."""
        found = self._one("definition_by_id", _Definition, definition_id=definition_id)
        if found is None:
            raise WorkflowNotFound(str(definition_id))
        return found.definition

    def definition_of(self, execution_id: str) -> str:
        """JSON of the definition that an execution started with.

        Raises:
            ExecutionNotFound: there is none.
        """
        found = self._one("definition_of", _Definition, execution_id=execution_id)
        if found is None:
            raise ExecutionNotFound(execution_id)
        return found.definition

    # executions

    def create_execution(
        self, *, execution_id: str, definition_id: int, user_id: str | None, idempotency_key: str | None,
        input_data: Mapping[str, Any], input_digest: str, variables: Mapping[str, Any], timeout: float | None,
    ) -> rows.Created:  # fmt: skip
        """Record an execution and all its tasks, or find the one that its idempotency key belongs to."""
        created = self._one(
            "create_execution", rows.Created, execution_id=execution_id, definition_id=definition_id, user_id=user_id,
            idempotency_key=idempotency_key, input_data=_jsonb(input_data), input_digest=input_digest,
            variables=_jsonb(variables), timeout=None if timeout is None else timedelta(seconds=timeout),
            grace=self.grace,
        )  # fmt: skip
        assert created is not None  # noqa: S101 - the function always returns a row
        return created

    def ready_tasks(self, execution_id: str) -> tuple[rows.ReadyTask, ...]:
        """Tasks that wait for a worker."""
        return tuple(self._all("ready_tasks", rows.ReadyTask, execution_id=execution_id))

    def execution_status(self, execution_id: str) -> ExecutionStatus:
        """Only the status.

        Raises:
            ExecutionNotFound: there is none.
        """
        return ExecutionStatus(_known(self._one("execution_status", _Status, execution_id=execution_id), execution_id))

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

    def retry_execution(self, execution_id: str, user_id: str | None) -> ExecutionStatus:
        """Open a failed or cancelled execution again; returns the status found."""
        return self._steer("retry_execution", execution_id, user_id)

    def _steer(self, name: str, execution_id: str, user_id: str | None) -> ExecutionStatus:
        return ExecutionStatus(
            _known(self._one(name, _Status, execution_id=execution_id, user_id=user_id), execution_id)
        )

    # attempts

    def claim(self, *, execution_id: str, task_id: str, epoch: int, worker_id: int) -> rows.Claim | None:
        """Take a task for an incarnation; None: the message was stale, nothing is to be run."""
        return self._one(
            "claim_task", rows.Claim, execution_id=execution_id, task_id=task_id, epoch=epoch, worker_id=worker_id,
            hard_limit=self.hard_limit * 3,
        )  # fmt: skip

    def state(self, execution_id: str) -> rows.State:
        """What every task of an execution may read; it never changes."""
        found = self._one("execution_state", rows.State, execution_id=execution_id)
        if found is None:
            raise ExecutionNotFound(execution_id)
        return found

    def results(self, execution_id: str, task_ids: Iterable[str]) -> dict[str, Any]:
        """Results of tasks by id."""
        found = self._all("results_of", _Result, execution_id=execution_id, task_ids=list(task_ids))
        return {row.task_id: row.result for row in found}

    def complete(self, fence: rows.Fence, result: Any) -> rows.Ended:
        """Record a success."""
        ended = _ended(
            self._all("complete_task", _EndedRow, **_fence(fence), result=_jsonb(result), grace=self.grace)
        )
        return self.end(fence, "success", result=result) if ended.outcome == "again" else ended

    def end(
        self, fence: rows.Fence, outcome: str, *, result: Any = None, error_type: str | None = None,
        error_message: str | None = None, error_traceback: str | None = None, delay: float = 0.0,
    ) -> rows.Ended:  # fmt: skip
        """Record any end of an attempt: success, failed, skipped, cancelled, retry (due after `delay` s) or lost."""
        return _ended(
            self._all(
                "end_task", _EndedRow, **_fence(fence), outcome=outcome, error_type=error_type,
                result=_jsonb(result) if outcome == "success" else None, error_message=error_message,
                error_traceback=error_traceback, delay=timedelta(seconds=delay), loss_budget=self.loss_budget,
                grace=self.grace,
            )
        )  # fmt: skip

    def running_attempt(self, execution_id: str, task_id: str, epoch: int) -> rows.Attempt | None:
        """The fence of a running task, where it is still at this epoch."""
        return self._one("running_attempt", rows.Attempt, execution_id=execution_id, task_id=task_id, epoch=epoch)

    def set_progress(self, fence: rows.Fence, percent: float, message: str) -> None:
        """Show how far an attempt is."""
        self._all("set_progress", _One, **_fence(fence), percent=percent, message=message)

    # workers

    def start_worker(self, *, name: str, pid: int, lease: float) -> int:
        """A new incarnation; returns its id."""
        found = self._one("start_worker", _Worker, name=name, pid=pid, lease=timedelta(seconds=lease))
        assert found is not None  # noqa: S101 - an INSERT returns its row
        return found.worker_id

    def renew_worker(self, worker_id: int, lease: float) -> bool:
        """Renew the lease; False: the incarnation is not known any more."""
        return self._one("renew_worker", _Worker, worker_id=worker_id, lease=timedelta(seconds=lease)) is not None

    def end_worker(self, worker_id: int) -> None:
        """Give the lease back."""
        self._one("end_worker", _Worker, worker_id=worker_id)

    def live_workers(self, *, after: int) -> int:
        """How many incarnations made after `after` have a lease that runs."""
        return self._all("live_workers", _Count, after=after)[0].count

    def newest_worker(self) -> int:
        """The last incarnation that was made; 0 where there was none."""
        return self._all("newest_worker", _Count)[0].count

    def running_on(self, worker_id: int, age: float) -> list[rows.Running]:
        """What an incarnation is said to run."""
        return self._all("running_on", rows.Running, worker_id=worker_id, age=timedelta(seconds=age))

    # recovery

    def recovery_work(self) -> rows.Work:
        """Which kinds of recovery have something to do."""
        found = self._one("recovery_work", rows.Work)
        assert found is not None  # noqa: S101 - a SELECT of EXISTS returns one row
        return found

    def lost_attempts(self, limit: int) -> list[rows.Attempt]:
        """Running tasks whose worker's lease ran out."""
        return self._all("lost_attempts", rows.Attempt, limit=limit)

    def overdue_attempts(self, limit: int) -> list[rows.Attempt]:
        """Running tasks that even the hard limit did not end."""
        return self._all("overdue_attempts", rows.Attempt, limit=limit)

    def expire_executions(self, limit: int) -> int:
        """End open executions whose time is up; returns how many."""
        overdue = self._all("expired_executions", _Id, limit=limit)
        expired = (self._one("expire_execution", _Flag, execution_id=row.execution_id) for row in overdue)
        return sum(1 for row in expired if row is not None and row.expired)

    def count_published(self) -> int:
        """How many messages the broker should hold."""
        return self._all("count_published", _Count)[0].count

    def take_due(self, limit: int, *, first_only: bool) -> tuple[rows.ReadyTask, ...]:
        """Tasks whose message is to be published (again)."""
        return tuple(self._all("take_due", rows.ReadyTask, limit=limit, first_only=first_only, grace=self.grace))

    def audit(self) -> list[rows.Violation]:
        """Every violated invariant; empty where all is well."""
        return self._all("audit", rows.Violation)


@dataclass(frozen=True, kw_only=True)
class _Status:
    status: str | None


@dataclass(frozen=True, kw_only=True)
class _Result:
    task_id: str
    result: Any


@dataclass(frozen=True, kw_only=True)
class _Worker:
    worker_id: int


@dataclass(frozen=True, kw_only=True)
class _Id:
    execution_id: str


@dataclass(frozen=True, kw_only=True)
class _Count:
    count: int


@dataclass(frozen=True, kw_only=True)
class _Flag:
    expired: bool


def _jsonb(value: Any) -> Jsonb:
    return Jsonb(value, dumps=lambda data: json.dumps(data, ensure_ascii=False, allow_nan=False))


def _known(row: _Status | None, execution_id: str) -> str:
    if row is None or row.status is None:
        raise ExecutionNotFound(execution_id)
    return row.status


def _fence(fence: rows.Fence) -> dict[str, Any]:
    return {
        "execution_id": fence.execution_id,
        "task_id": fence.task_id,
        "epoch": fence.epoch,
        "worker_id": fence.worker_id,
    }


def _ended(found: list[_EndedRow]) -> rows.Ended:
    ready = tuple(
        rows.ReadyTask(
            execution_id=r.execution_id, task_id=r.task_id, epoch=r.epoch, handler=r.handler, timeout=r.timeout
        )  # fmt: skip
        for r in found
        if r.execution_id is not None and r.task_id is not None and r.epoch is not None
        and r.handler is not None and r.timeout is not None
    )  # fmt: skip
    return rows.Ended(outcome=found[0].outcome, ready=ready)
