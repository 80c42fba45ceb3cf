"""OBSERVE: read-only views of executions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import Any

from pipeline.result_store.rows import ExecutionRow, ExecutionSummary, TaskExecution
from pipeline.result_store.store import ResultStore
from pipeline.states import TERMINAL_EXECUTIONS, TERMINAL_TASKS, TaskStatus


@dataclass(frozen=True, kw_only=True)
class Execution(ExecutionRow):
    """One execution with its tasks, as it was when it was read."""

    #: by id, in topological order
    tasks: Mapping[str, TaskExecution]

    @cached_property
    def results(self) -> Mapping[str, Any]:
        """Results of the tasks that succeeded, by task id."""
        return {name: task.result for name, task in self.tasks.items() if task.status is TaskStatus.SUCCESS}

    @property
    def ended(self) -> bool:
        """Whether nothing will happen any more by itself."""
        return self.status in TERMINAL_EXECUTIONS

    @property
    def counts(self) -> Counter[TaskStatus]:
        """Tasks by status."""
        return Counter(task.status for task in self.tasks.values())

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "execution_id": self.execution_id,
            "workflow_id": self.workflow_id,
            "version": self.version,
            "status": self.status.value,
            "paused": self.paused,
            "run": self.run,
            "created_by": self.created_by,
            "error_message": self.error_message,
            "created_at": _time(self.created_at),
            "started_at": _time(self.started_at),
            "finished_at": _time(self.finished_at),
            "input": self.input_data,
            "results": dict(self.results),
            "tasks": {name: task_dict(task) for name, task in self.tasks.items()},
        }


def read_execution(store: ResultStore, execution_id: str) -> Execution:
    """Read one execution.

    Raises:
        ExecutionNotFound: there is none.
    """
    row = store.get_execution(execution_id)
    tasks = {task.task_id: task for task in store.get_tasks(execution_id)}
    return Execution(**vars(row), tasks=MappingProxyType(tasks))


def duration(task: TaskExecution) -> float | None:
    """Seconds that the last attempt took; None where it has not ended, or never ran."""
    if task.started_at is None or task.finished_at is None or task.status not in TERMINAL_TASKS:
        return None
    if task.status is TaskStatus.SUCCESS and task.error_message:  # somebody marked it so, later
        return None
    return (task.finished_at - task.started_at).total_seconds()


def task_dict(task: TaskExecution) -> dict[str, Any]:
    """A task as `--json` prints it."""
    return {
        "status": task.status.value,
        "handler": task.handler,
        "attempt": task.attempt,
        "result": task.result,
        "error_type": task.error_type,
        "error_message": task.error_message,
        "started_at": _time(task.started_at),
        "finished_at": _time(task.finished_at),
        "progress": task.progress,
        "progress_message": task.progress_message,
        "worker": task.worker,
    }


def summary_dict(row: ExecutionSummary) -> dict[str, Any]:
    """A line of a list as `--json` prints it."""
    return {name: _time(value) if isinstance(value, datetime) else value for name, value in vars(row).items()}


def to_json(value: Any) -> str:
    """One JSON document."""
    return json.dumps(value, ensure_ascii=False, indent=2)


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
