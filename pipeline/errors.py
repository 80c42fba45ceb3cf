"""Everything that the engine raises, in one tree.

PipelineError
├── DefinitionError            a definition is wrong: every problem, each with its place
│   └── InputError             the input of an execution is wrong
├── NotSeriesParallel          the workflow has no native canvas of the same order; it runs all the same
├── DefinitionConflict         the same id and version with other content
├── IdempotencyConflict        the same idempotency key with other input
├── HandlerImportError         a module of handlers cannot be imported
├── SettingsError              a setting has a value that cannot be used
├── NotFound
│   ├── WorkflowNotFound
│   ├── ExecutionNotFound
│   └── TaskNotFound
├── IllegalTransition          the execution is in a state that forbids the operation
├── WaitTimeout                the wait ended before the execution did (also a TimeoutError)
├── ServiceUnavailable
│   ├── DatabaseUnavailable
│   │   └── SchemaMismatch     the database is on another schema than this code
│   └── BrokerUnavailable
├── TaskError                  what a task's attempt can fail with
│   ├── TemplateError          a template cannot be rendered
│   ├── ParamsError            the merged input does not fit the handler
│   ├── ResultError            the handler returned what cannot be recorded
│   ├── ArtifactError          an artifact cannot be written or read
│   ├── TaskTimeout            the handler ran longer than its timeout
│   └── Refused                the site's settings forbid what the task asks for
└── Verdict                    control flow: what a handler raises to say how it ended
    ├── Retry                  try again, later
    ├── Skip                   there is nothing to do
    └── Fail                   fail now and never retry

Exceptions cross processes (Celery pickles them), so every constructor takes exactly what `args` holds.
"""

from __future__ import annotations

from dataclasses import dataclass

_YEAR = 31_536_000


class PipelineError(Exception):
    """Base of all errors of this package: catch it to catch them all."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong in a definition or its input."""

    #: where in the document, as `tasks[3].params.path`; empty for the document itself
    path: str
    #: what is wrong, one clause
    what: str
    #: how to mend it, one clause; empty where `what` says it
    how: str = ""
    #: the file (or `<dict>`, `<stdin>`) that it stands in
    source: str = ""
    #: 1-based line in `source`; None where the definition did not come from text
    line: int | None = None

    def __str__(self) -> str:
        place = self.source + (f":{self.line}" if self.line is not None else "")
        return ": ".join(part for part in (place, self.path, self.what) if part) + (f"; {self.how}" if self.how else "")


class DefinitionError(PipelineError):
    """A definition is invalid: `problems` holds every one, each with its place and how to mend it."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class InputError(DefinitionError):
    """The input of an execution does not fit the workflow: mend the input, nothing was recorded."""


class NotSeriesParallel(PipelineError):
    """One canvas of chains, groups and chords cannot say the workflow's order; the engine runs it all the same."""


class DefinitionConflict(PipelineError):
    """The id and version are registered with other content: give the changed definition a new version."""

    def __init__(self, workflow_id: str, version: str) -> None:
        super().__init__(workflow_id, version)
        self.workflow_id, self.version = workflow_id, version

    def __str__(self) -> str:
        return (
            f"workflow {self.workflow_id!r} version {self.version!r} is registered with other content;"
            " give the changed definition a new version"
        )


class IdempotencyConflict(PipelineError):
    """The idempotency key was used for another input or workflow: use a new key for new work."""

    def __init__(self, key: str, execution_id: str) -> None:
        super().__init__(key, execution_id)
        self.key, self.execution_id = key, execution_id

    def __str__(self) -> str:
        return (
            f"idempotency key {self.key!r} belongs to execution {self.execution_id} with another workflow or input;"
            " use a new key for new work"
        )


class HandlerImportError(PipelineError):
    """A module of handlers cannot be imported: mend the module, or take it out of PIPELINE_HANDLERS."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(module, reason)
        self.module, self.reason = module, reason

    def __str__(self) -> str:
        return (
            f"handlers of module {self.module!r} cannot be loaded: {self.reason};"
            " mend the module, say where it is (PYTHONPATH, or start in its folder), or take it out of PIPELINE_HANDLERS"
        )


class SettingsError(PipelineError):
    """A setting has a value that cannot be used: the message names the variable and what it takes."""


class NotFound(PipelineError):
    """What was asked for is not in the store."""


class WorkflowNotFound(NotFound):
    """No such workflow (or version): `pipeline register FILE` records one."""

    def __init__(self, workflow_id: str, version: str | None = None) -> None:
        super().__init__(workflow_id, version)
        self.workflow_id, self.version = workflow_id, version

    def __str__(self) -> str:
        name = self.workflow_id + (f"@{self.version}" if self.version else "")
        return f"workflow {name!r} is not registered; `pipeline register FILE` records a definition"


class ExecutionNotFound(NotFound):
    """No such execution: `pipeline list` shows those that are recorded."""

    def __init__(self, execution_id: str) -> None:
        super().__init__(execution_id)
        self.execution_id = execution_id

    def __str__(self) -> str:
        return f"execution {self.execution_id!r} is not recorded; `pipeline list` shows those that are"


class TaskNotFound(NotFound):
    """The execution has no such task: `pipeline status EXECUTION` shows those that it has."""

    def __init__(self, execution_id: str, task_id: str) -> None:
        super().__init__(execution_id, task_id)
        self.execution_id, self.task_id = execution_id, task_id

    def __str__(self) -> str:
        return f"execution {self.execution_id} has no task {self.task_id!r}; `pipeline status {self.execution_id}` shows them"


class IllegalTransition(PipelineError):
    """The operation is not possible from the state that the execution is in; nothing was changed."""

    def __init__(self, execution_id: str, operation: str, status: str) -> None:
        super().__init__(execution_id, operation, status)
        self.execution_id, self.operation, self.status = execution_id, operation, status

    def __str__(self) -> str:
        return f"execution {self.execution_id} is {self.status}: {self.operation} is not possible from there"


class WaitTimeout(PipelineError, TimeoutError):
    """The execution had not ended when the wait did, which changed nothing about it; wait again or look at its status."""

    def __init__(self, execution_id: str, seconds: float) -> None:
        super().__init__(execution_id, seconds)
        self.execution_id, self.seconds = execution_id, seconds

    def __str__(self) -> str:
        return f"execution {self.execution_id} had not ended after {self.seconds:g} s; look at its status, or wait again"


class ServiceUnavailable(PipelineError):
    """A service that the engine stands on cannot be reached."""


class DatabaseUnavailable(ServiceUnavailable):
    """Postgres cannot be reached: look at PIPELINE_DATABASE_URL and at the server."""


class SchemaMismatch(DatabaseUnavailable):
    """The database is on another schema version than this code: `pipeline db upgrade` mends it."""


class BrokerUnavailable(ServiceUnavailable):
    """The broker cannot be reached: look at PIPELINE_BROKER_URL and at the server."""


class TaskError(PipelineError):
    """An attempt of a task failed for a reason that the engine found."""


class TemplateError(TaskError):
    """A template cannot be rendered with the values of this execution."""


class ParamsError(TaskError):
    """The merged input does not fit the handler's parameters; a retry cannot mend it."""


class ResultError(TaskError):
    """The handler returned what is not JSON, or more than the limit: return a reference to an artifact."""


class ArtifactError(TaskError):
    """An artifact cannot be written or read; nothing half-written stays behind."""


class TaskTimeout(TaskError):
    """The handler ran longer than the task's timeout and was stopped."""


class Refused(TaskError):
    """The site's settings forbid what the task asks for: the message names the setting."""


class Verdict(PipelineError):
    """How a handler says that it ended, other than by a result."""


class Retry(Verdict):
    """Raised by a handler to be run again: after `after` seconds, or by the task's retry policy where None.

    Counts against the policy's `max_retries`.
    """

    def __init__(self, message: str = "", after: float | None = None) -> None:
        if after is not None and not 0 <= after <= _YEAR:
            raise ValueError(f"Retry(after={after!r}): seconds from 0 to {_YEAR:,} (a year)")
        super().__init__(message, after)
        self.message, self.after = message, after

    def __str__(self) -> str:
        return self.message or "the handler asked to be run again"


class Skip(Verdict):
    """Raised by a handler that has nothing to do: the task is skipped, and so are the tasks that need it."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason or "the handler skipped"


class Fail(Verdict):
    """Raised by a handler to fail now, whatever the retry policy says."""
