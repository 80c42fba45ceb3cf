"""The door for programs: enqueue, wait, look and steer."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

from config.settings import Settings
from pipeline.app import Installation
from pipeline.definition import WorkflowDefinition
from pipeline.document import Document
from pipeline.errors import DatabaseUnavailable, IllegalTransition, SchemaMismatch, WaitTimeout
from pipeline.observe import Execution, read_execution
from pipeline.result_store.connection import Connection, Listener
from pipeline.result_store.rows import AttemptRow, Event, ExecutionSummary
from pipeline.result_store.store import ResultStore
from pipeline.states import OPEN_EXECUTIONS, TERMINAL_EXECUTIONS, ExecutionStatus, TaskStatus
from pipeline.submission import as_input, as_inputs, as_keys, require_text
from pipeline.validation import validate, validate_input, validate_inputs

#: seconds between two looks of a waiter that heard nothing: notifications are the fast way, this is the sure one
_POLL = 5.0
#: held by the thread that has paused garbage collection
_pausing = threading.Lock()

#: what a workflow can be given as: a model, a dict, a parsed file, or the id (`id` or `id@version`) of a registered one
Workflow = WorkflowDefinition | Mapping[str, Any] | Document | str


class WorkflowEngine:
    """Enqueues workflows and looks after their executions; a context manager.

    Args:
        installation: what to work on; by default what the environment (or `settings`) names.

    Raises:
        SettingsError: a variable of the environment cannot be used.
        ServiceUnavailable: an embedded server does not start.
    """

    def __init__(self, installation: Installation | None = None, *, settings: Settings | None = None) -> None:
        self.installation = installation or Installation.open(settings)
        self._keys: dict[str, int] = {}

    def validate(self, workflow: WorkflowDefinition | Mapping[str, Any] | Document) -> WorkflowDefinition:
        """Check a definition against the format and the handlers of this installation.

        Raises:
            DefinitionError: with every problem.
            HandlerImportError: a module of handlers cannot be imported.
        """
        return validate(workflow, self.installation.catalogue, self.installation.limits)

    def register(self, workflow: WorkflowDefinition | Mapping[str, Any] | Document) -> WorkflowDefinition:
        """Record a definition, so that it can be run by its id.

        Raises:
            DefinitionError: it is invalid.
            DefinitionConflict: its id and version are registered with other content.
        """
        return self._known(workflow)[0]

    def find_workflow(self, name: str) -> WorkflowDefinition:
        """A registered definition by `id` (its newest version) or `id@version`.

        Raises:
            WorkflowNotFound: there is none.
        """
        return self._registered(name)[0]

    def execute_workflow(
        self, workflow_def: Workflow, input_data: Mapping[str, Any] | None = None, user_id: str | None = None, *,
        idempotency_key: str | None = None, connection: Connection | None = None,
    ) -> str:  # fmt: skip
        """Enqueue an execution and return its id, `exec-` and twelve hexadecimal digits.

        With `idempotency_key`, a repeat with the same workflow and input gives the first execution's id back. With
        `connection`, the execution is part of the caller's transaction: it exists, and starts, only once that commits.
        A broker that is down delays the start and loses nothing.

        Raises:
            DefinitionError, InputError: with every problem; nothing is recorded.
            WorkflowNotFound: no definition is registered by that id.
            DefinitionConflict, IdempotencyConflict: see there.
            DatabaseUnavailable: the execution may not be recorded.
        """
        require_text(user_id=user_id, idempotency_key=idempotency_key)
        data = as_input(input_data)
        definition, key = self._to_run(workflow_def, connection)
        validate_input(definition, data, self.installation.catalogue, self.installation.limits)
        dispatcher = self.installation.dispatcher
        created = dispatcher.create(
            definition, data, definition_id=key, user_id=user_id, idempotency_key=idempotency_key,
            store=self._store(connection),
        )  # fmt: skip
        if created.created and connection is None:
            dispatcher.try_publish(created.ready)
        return created.execution_id

    def execute_many(
        self, workflow_def: Workflow, inputs: Iterable[Mapping[str, Any] | None], user_id: str | None = None, *,
        idempotency_keys: Iterable[str | None] | None = None, connection: Connection | None = None,
    ) -> list[str]:  # fmt: skip
        """Enqueue an execution for each input, all or none, and return their ids in the same order.

        For a backfill, or wherever many small executions come at once: it costs a sixth of what as many calls do, and where
        the workflow begins with one task, executions share messages. All else is as `execute_workflow` has it; where
        `idempotency_keys` are given, one belongs to each input, and those that are known give their executions' ids again.

        Raises:
            InputError: with the problems of all inputs, of the first ones where those are many; nothing is recorded.
            IdempotencyConflict: for the first key that is used already; nothing is recorded.
            Further ones: see `execute_workflow`.
        """
        data = as_inputs(inputs)
        keys: list[str | None] = [None] * len(data) if idempotency_keys is None else as_keys(idempotency_keys, data)
        require_text(user_id=user_id, **{f"idempotency_keys[{n}]": key for n, key in enumerate(keys)})
        definition, key = self._to_run(workflow_def, connection)
        validate_inputs(definition, data, self.installation.catalogue, self.installation.limits)
        dispatcher = self.installation.dispatcher
        created = dispatcher.create_many(
            definition, data, definition_id=key, user_id=user_id, idempotency_keys=keys, store=self._store(connection)
        )
        if connection is None:
            dispatcher.try_publish([task for one in created if one.created for task in one.ready])
        return [one.execution_id for one in created]

    def wait(self, execution_id: str, timeout: float | None = None) -> Execution:
        """Wait until an execution ended; an outage of the database is waited out, once the execution was seen.

        Args:
            execution_id: of the execution.
            timeout: seconds; None waits as long as it takes.

        Raises:
            WaitTimeout: it had not ended in time (also a TimeoutError).
            ExecutionNotFound: there is none.
            DatabaseUnavailable: from the first look on, or still when the time was up.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        listener: Listener | None = None
        seen = False
        try:
            while True:
                pause = min(_POLL, end - time.monotonic())
                try:
                    if listener is None:
                        listener = self.installation.store.listen("pipeline_finished")
                        self.installation.store.await_execution(execution_id)
                    status = self.installation.store.execution_status(execution_id)
                    seen = True
                    if status in TERMINAL_EXECUTIONS:
                        return self.get_execution(execution_id)
                    if pause <= 0:
                        raise WaitTimeout(execution_id, timeout or 0.0)
                    listener.wait(pause)
                except DatabaseUnavailable as exc:
                    if not seen or pause <= 0 or isinstance(exc, SchemaMismatch):
                        raise
                    if listener is not None:
                        listener.close()
                    listener = None
                    time.sleep(min(0.5, max(pause, 0.0)))
        finally:
            if listener is not None:
                listener.close()

    def get_execution(self, execution_id: str) -> Execution:
        """One execution with its tasks, as it is now.

        Raises:
            ExecutionNotFound: there is none.
        """
        return read_execution(self.installation.store, execution_id)

    def get_attempts(self, execution_id: str, task_id: str) -> list[AttemptRow]:
        """The attempts of a task that were followed by another, oldest first."""
        return self.installation.store.get_attempts(execution_id, task_id)

    def list_executions(self, status: str | None = None, limit: int = 50) -> list[ExecutionSummary]:
        """The newest executions first."""
        return self.installation.store.list_executions(status, limit)

    def cancel(self, execution_id: str, user_id: str | None = None) -> None:
        """Start nothing more and stop what runs; the execution ends once that has stopped.

        Raises:
            IllegalTransition: it has ended.
            ExecutionNotFound: there is none.
        """
        found = self.installation.store.cancel_execution(execution_id, user_id)
        _require(execution_id, "cancel", found, OPEN_EXECUTIONS)

    def pause(self, execution_id: str, user_id: str | None = None) -> None:
        """Start nothing more until `resume`; what runs goes on.

        Raises:
            IllegalTransition: it has ended.
            ExecutionNotFound: there is none.
        """
        found = self.installation.store.pause_execution(execution_id, user_id)
        _require(execution_id, "pause", found, OPEN_EXECUTIONS)

    def resume(self, execution_id: str, user_id: str | None = None) -> None:
        """Undo `pause`.

        Raises:
            IllegalTransition: it has ended.
            ExecutionNotFound: there is none.
        """
        found = self.installation.store.resume_execution(execution_id, user_id)
        _require(execution_id, "resume", found, OPEN_EXECUTIONS)

    def retry(self, execution_id: str, user_id: str | None = None) -> None:
        """Run a failed or cancelled execution again from what did not succeed; what did is kept.

        Raises:
            IllegalTransition: it has not failed and was not cancelled.
            ExecutionNotFound: there is none.
        """
        found = self.installation.store.reopen_execution(execution_id, user_id)
        _require(execution_id, "retry", found, TERMINAL_EXECUTIONS - {ExecutionStatus.SUCCESS})

    def rerun(
        self, execution_id: str, task_id: str, *, params: Mapping[str, Any] | None = None, user_id: str | None = None
    ) -> None:
        """Run an ended execution again from a task, with everything downstream of it and what did not succeed.

        Args:
            execution_id: of the execution.
            task_id: where to begin.
            params: used instead of all of the definition's for this task, from now on; the execution's input goes before them.
            user_id: recorded as the one who did it.

        Raises:
            DefinitionError: the params do not fit the task.
            IllegalTransition: the execution has not ended.
            ExecutionNotFound, TaskNotFound: see there.
        """
        if params is not None:
            definition = WorkflowDefinition.from_json(self.installation.store.definition_of(execution_id))
            changed = (t.model_copy(update={"params": params}) if t.id == task_id else t for t in definition.tasks)
            self.validate(definition.model_copy(update={"tasks": tuple(changed)}))
        found = self.installation.store.reopen_execution(execution_id, user_id, task_id=task_id, params=params)
        _require(execution_id, "rerun", found, TERMINAL_EXECUTIONS)

    def mark(
        self, execution_id: str, task_id: str, status: Literal["success", "skipped"], *, reason: str,
        result: Any = None, user_id: str | None = None,
    ) -> None:  # fmt: skip
        """Decide a task by hand, whatever it is doing; a failed or cancelled execution goes on from there.

        Args:
            execution_id: of the execution.
            task_id: of the task.
            status: what it is from now on; the tasks that need it run, or are skipped too.
            reason: recorded, for those who wonder later.
            result: recorded as the task's result.
            user_id: recorded as the one who did it.

        Raises:
            IllegalTransition: the task, or the whole execution, has succeeded already.
            ExecutionNotFound, TaskNotFound: see there.
        """
        store = self.installation.store
        store.execution_status(execution_id)
        ended = store.mark_task(
            execution_id, task_id, TaskStatus(status), result=result, user_id=user_id, reason=reason
        )
        if not ended.changed:
            raise IllegalTransition(execution_id, f"marking task {task_id}", f"where that task is {ended.outcome}")
        self.installation.dispatcher.try_publish(ended.ready)

    def get_events(self, execution_id: str) -> list[Event]:
        """What people did to an execution, oldest first."""
        return self.installation.store.get_events(execution_id)

    def _store(self, connection: Connection | None) -> ResultStore:
        store = self.installation.store
        return store if connection is None else store.within(connection)

    def _to_run(self, workflow: Workflow, connection: Connection | None) -> tuple[WorkflowDefinition, int | None]:
        """A valid definition, with its key where it is recorded outside of the caller's transaction."""
        if isinstance(workflow, str):
            return self._registered(workflow)
        return self._known(workflow) if connection is None else (self.validate(workflow), None)

    def _known(self, workflow: WorkflowDefinition | Mapping[str, Any] | Document) -> tuple[WorkflowDefinition, int]:
        """A definition that is valid and recorded, with its key; checked once for each content."""
        if isinstance(workflow, WorkflowDefinition) and workflow.digest in self._keys:
            return workflow, self._keys[workflow.digest]
        with _garbage_left():
            definition = self.validate(workflow)
            if definition.digest not in self._keys:
                self._keys[definition.digest] = self.installation.dispatcher.register(definition)
            return definition, self._keys[definition.digest]

    def _registered(self, name: str) -> tuple[WorkflowDefinition, int]:
        workflow_id, at, version = name.partition("@")
        key, text = self.installation.store.find_definition(workflow_id, version if at else None)
        return WorkflowDefinition.from_json(text), key

    def close(self) -> None:
        """Let go of connections and of embedded servers."""
        self.installation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _garbage_left() -> Iterator[None]:
    """No garbage collection while a definition is checked and recorded: of a large one all values are needed, and to look
    through them again and again takes a third of the time. One thread at a time: of two, the later would put back what the
    earlier had set."""
    if not _pausing.acquire(blocking=False):
        yield
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        _pausing.release()


def _require(execution_id: str, operation: str, found: ExecutionStatus, allowed: frozenset[ExecutionStatus]) -> None:
    if found not in allowed:
        raise IllegalTransition(execution_id, operation, found.value)
