"""RECORD: attempts of tasks, from claim to end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pipeline.errors import ExecutionNotFound
from pipeline.result_store import rows
from pipeline.result_store.door import Count, Door, fence_of, jsonb


@dataclass(frozen=True, kw_only=True)
class _Result:
    task_id: str
    result: Any


@dataclass(frozen=True, kw_only=True)
class _Led:
    execution_id: str


class Attempts(Door):
    """What workers do with tasks."""

    def claim(
        self, *, execution_id: str, task_id: str, epoch: int, worker_id: int, handler: str, with_state: bool = False
    ) -> rows.Claim | None:
        """Take a task for an incarnation; None: the message was stale, nothing is to be run."""
        return self._one(
            "claim_task", rows.Claim, execution_id=execution_id, task_id=task_id, epoch=epoch, worker_id=worker_id,
            handler=handler, hard_limit=self.hard_limit * 3, with_state=with_state,
        )  # fmt: skip

    def leads_of(self, execution_id: str, task_id: str) -> list[str]:
        """Executions whose first tasks share the message of a task that no worker was given, as its execution takes no claims."""
        return [row.execution_id for row in self._all("leads_of", _Led, execution_id=execution_id, task_id=task_id)]

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

    def complete(self, fence: rows.Fence, result: Any, follow: rows.Follow = rows.NOTHING) -> rows.Ended:
        """Record a success and claim what its worker goes on with, as far as `follow` allows."""
        (ended,) = self._all(
            "complete_task", rows.Ended, **fence_of(fence), result=jsonb(result), grace=self.grace, room=follow.room,
            next_execution=follow.execution_id, next_task=follow.task_id, next_epoch=follow.epoch, handler=follow.handler,
            hard_limit=self.hard_limit * 3, durable=follow.durable, with_state=follow.with_state,
            closing=list(follow.closing),
        )  # fmt: skip
        return self.end(fence, "success", result=result) if ended.outcome == "again" else ended

    def close_executions(self, execution_ids: Iterable[str]) -> None:
        """End executions of which every task has succeeded; others are left as they are."""
        self._all("close_executions", Count, execution_ids=list(execution_ids))

    def scatter(self, execution_id: str, tasks: Mapping[str, int]) -> tuple[rows.ReadyTask, ...]:
        """Give each of these tasks (id to epoch) a message of its own; what is claimed or over by now is left out."""
        return tuple(
            self._all(
                "scatter", rows.ReadyTask, execution_id=execution_id, task_ids=list(tasks),
                epochs=list(tasks.values()), grace=self.grace,
            )
        )  # fmt: skip

    def end(
        self, fence: rows.Fence, outcome: str, *, result: Any = None, error_type: str | None = None,
        error_message: str | None = None, error_traceback: str | None = None, delay: float = 0.0,
    ) -> rows.Ended:  # fmt: skip
        """Record any end of an attempt: success, failed, skipped, cancelled, retry (due after `delay` s) or lost."""
        (ended,) = self._all(
            "end_task", rows.Ended, **fence_of(fence), outcome=outcome, error_type=error_type,
            result=jsonb(result) if outcome == "success" else None, error_message=error_message,
            error_traceback=error_traceback, delay=timedelta(seconds=delay), loss_budget=self.loss_budget,
            grace=self.grace,
        )  # fmt: skip
        return ended

    def running_in(self, worker: str, pid: int) -> list[rows.Killed]:
        """The fences of what a process of the worker of this name is said to run."""
        return self._all("running_in", rows.Killed, worker=worker, pid=pid)

    def set_progress(self, fence: rows.Fence, percent: float, message: str) -> None:
        """Show how far an attempt is."""
        self._all("set_progress", Count, **fence_of(fence), percent=percent, message=message)
