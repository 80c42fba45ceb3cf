"""RECORD, for Celery: a thin view of the store as a result backend, so that AsyncResult shows state and result.

What a task's body records is not recorded again here; only what the worker's main process alone learns (a killed
process, the hard time limit) is. Nothing here raises: a backend that raises makes Celery lose the message.
"""

from __future__ import annotations

import logging
from typing import Any

from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery import states
from celery.backends.base import BaseBackend
from celery.exceptions import TaskRevokedError

from pipeline.execution import Executor
from pipeline.result_store.store import ResultStore
from pipeline.states import TaskStatus

log = logging.getLogger(__name__)

_CELERY_STATES = {
    TaskStatus.PENDING: states.PENDING,
    TaskStatus.RUNNING: states.STARTED,
    TaskStatus.RETRY: states.RETRY,
    TaskStatus.SUCCESS: states.SUCCESS,
    TaskStatus.FAILED: states.FAILURE,
    # Celery has no word for it; whoever waits for its result must hear that there is none.
    TaskStatus.SKIPPED: states.REVOKED,
    TaskStatus.CANCELLED: states.REVOKED,
}
#: `exec-` and twelve hexadecimal digits
_EXECUTION_ID_LENGTH = 17


class StoreBackend(BaseBackend):  # type: ignore[misc]
    """Celery's result backend on the store; the composition root sets `store` and `executor` on the class it makes."""

    supports_autoexpire = True
    store: ResultStore
    executor: Executor

    def as_uri(self, include_password: bool = False) -> str:
        """How the worker's banner shows it."""
        return "the pipeline's own Postgres"

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        execution_id, task = task_id[:_EXECUTION_ID_LENGTH], task_id[_EXECUTION_ID_LENGTH + 1 :]
        found = self.store.get_task(execution_id, task) if task_id.isprintable() else None
        if found is None:
            return {"status": states.PENDING, "result": None}
        if found.status is TaskStatus.SUCCESS and not found.execution_ended:  # its commit may not have waited for the disk
            self.store.settle_task(execution_id, task)
        state = _CELERY_STATES[found.status]
        result: Any = found.result
        if state == states.REVOKED:
            result = TaskRevokedError(found.error_message)
        elif state in states.EXCEPTION_STATES:
            result = self.exception_to_python(
                {"exc_type": found.error_type or found.status, "exc_message": [found.error_message], "exc_module": "pipeline"}
            )
        return {
            "task_id": task_id, "status": state, "result": result, "traceback": found.error_traceback, "children": [],
            "date_done": found.finished_at,
        }  # fmt: skip

    def mark_as_failure(self, task_id: str, exc: BaseException, *args: Any, request: Any = None, **kwargs: Any) -> None:
        """Record what happened to an attempt whose process cannot say so itself; a recorded end is left alone."""
        if not isinstance(exc, (TimeLimitExceeded, WorkerLostError, Terminated)):
            return  # the body recorded it, or has nothing to record
        pid = getattr(request, "worker_pid", None)
        if pid is not None:
            end = self.executor.timed_out if isinstance(exc, TimeLimitExceeded) else self.executor.lost
            try:
                end(pid, exc)
            except Exception as failure:
                log.warning("loss of %s not recorded (%s); recovery will find it", task_id, failure)

    def mark_as_done(self, *args: Any, **kwargs: Any) -> None:
        """Recorded by the task's body."""

    def mark_as_retry(self, *args: Any, **kwargs: Any) -> None:
        """Recorded by the task's body."""

    def mark_as_started(self, *args: Any, **kwargs: Any) -> None:
        """Recorded by the claim."""

    def mark_as_revoked(self, *args: Any, **kwargs: Any) -> None:
        """A revoked message is only a lost hint."""

    def store_result(self, *args: Any, **kwargs: Any) -> None:
        """Only the engine writes the store."""

    def process_cleanup(self) -> None:
        """Connections are kept."""
