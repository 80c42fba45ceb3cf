"""What the store answers: frozen values, one class per kind of row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.states import ExecutionStatus, TaskStatus


@dataclass(frozen=True, kw_only=True)
class ReadyTask:
    """A task that a worker may claim: what its message needs."""

    execution_id: str
    task_id: str
    epoch: int
    handler: str
    timeout: float
    #: whose message it shares
    led_by: str | None = None
    #: of which execution, where that is another
    led_in: str | None = None


def _read_ready(answer: Created | Ended) -> None:
    """The driver gives JSON: a list, or nothing."""
    if not isinstance(answer.ready, tuple):
        object.__setattr__(answer, "ready", tuple(ReadyTask(**task) for task in answer.ready or ()))


@dataclass(frozen=True, kw_only=True)
class NewExecution:
    """What distinguishes an execution from others of its workflow that are recorded with it."""

    execution_id: str
    input_data: Mapping[str, Any]
    #: of the input's canonical JSON
    input_digest: str
    idempotency_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Created:
    """The answer to a submission."""

    #: false where the idempotency key was used before
    created: bool
    execution_id: str
    #: whether definition and input are those of the execution that the key belongs to
    same_work: bool
    ready: tuple[ReadyTask, ...] = ()
    #: place among those that were recorded together, from 1 on
    number: int = 1

    def __post_init__(self) -> None:
        _read_ready(self)


@dataclass(frozen=True, kw_only=True)
class State:
    """What every task of an execution may read."""

    workflow_id: str
    created_by: str | None
    variables: dict[str, Any]
    input_data: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A task that is now this worker's."""

    execution_id: str
    task_id: str
    handler: str
    epoch: int
    attempt: int
    #: retries used so far in this run
    retries: int
    #: the definition's, or those that somebody gave instead; None: there are none
    params: dict[str, Any] | None
    #: seconds
    timeout: float
    #: as declared
    dependencies: list[str]
    #: fields of a RetryPolicy; None: the default
    retry_policy: dict[str, Any] | None
    #: of the declared dependencies, where they are few and small
    results: dict[str, Any] | None = None
    #: executions whose first tasks share its message and are not named there
    leads: list[str] | None = None
    #: where it was asked for
    state: State | None = None

    def __post_init__(self) -> None:
        if isinstance(self.state, dict):  # the driver gives JSON
            object.__setattr__(self, "state", State(**self.state))


@dataclass(frozen=True, kw_only=True)
class Fence:
    """What an attempt must hold to change its task."""

    execution_id: str
    task_id: str
    epoch: int
    worker_id: int


@dataclass(frozen=True, kw_only=True)
class Attempt(Fence):
    """A running attempt as others see it."""

    retries: int


@dataclass(frozen=True, kw_only=True)
class Killed(Attempt):
    """A running attempt as the main process sees it whose process is gone."""

    #: fields of a RetryPolicy; None: the default
    retry_policy: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Running(Attempt):
    """A running attempt as its own worker sees it."""

    #: whether it has been running for longer than a claim's answer takes
    settled: bool
    #: whether its execution was cancelled or is out of time
    stop: bool


@dataclass(frozen=True, kw_only=True)
class Follow:
    """What a worker may go on with once its task has succeeded."""

    #: seconds; no task with a longer timeout may follow, none at all where it is 0
    room: float
    #: another task of the same message, for where nothing was released
    execution_id: str | None = None
    task_id: str | None = None
    epoch: int | None = None
    handler: str | None = None
    #: whether all that was recorded so far has to be on disk before the worker goes on
    durable: bool = False
    #: whether the state of its execution is wanted too, where that is another
    with_state: bool = False
    #: executions that the worker has brought to their end and that are not closed yet
    closing: tuple[str, ...] = ()


NOTHING = Follow(room=0.0)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The answer to a completion."""

    #: done, or stale: the fence did not hold and nothing was changed; of a mark: the status found
    outcome: str
    #: false where a mark came too late
    changed: bool = True
    ready: tuple[ReadyTask, ...]
    #: what the worker goes on with, claimed already
    next: Claim | None = None
    #: of the execution of `next`, where it was asked for
    state: dict[str, Any] | None = None
    #: whether `ready` is for the worker to keep: one message's tasks, of which nobody else hears
    kept: bool = False
    #: whether all that was recorded up to now is on disk
    durable: bool = True
    #: executions that are still to be closed; None: as before
    closing: list[str] | None = None

    def __post_init__(self) -> None:
        _read_ready(self)
        if isinstance(self.next, dict):
            object.__setattr__(self, "next", Claim(**self.next, state=self.state))


@dataclass(frozen=True, kw_only=True)
class Work:
    """Which kinds of recovery have something to do."""

    due: bool
    lost: bool
    overdue: bool
    expired: bool
    closing: bool


@dataclass(frozen=True, kw_only=True)
class ExecutionRow:
    """One execution, without its tasks."""

    execution_id: str
    workflow_id: str
    version: str
    digest: str
    status: ExecutionStatus
    verdict: str | None
    paused: bool
    run: int
    created_by: str | None
    idempotency_key: str | None
    error_message: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    input_data: dict[str, Any]
    variables: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", ExecutionStatus(self.status))  # the driver gives text


@dataclass(frozen=True, kw_only=True)
class TaskExecution:
    """One task of an execution, as its last attempt left it."""

    task_id: str
    handler: str
    status: TaskStatus
    epoch: int
    attempt: int
    retries: int
    losses: int
    ready_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    progress: float | None
    progress_message: str | None
    result: Any
    error_type: str | None
    error_message: str | None
    error_traceback: str | None
    #: when a task in state retry is due again
    retry_at: datetime | None
    worker: str | None
    #: ready, and no worker that runs has its handler
    unserved: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", TaskStatus(self.status))  # the driver gives text


@dataclass(frozen=True, kw_only=True)
class AttemptRow:
    """An attempt that was followed by another."""

    attempt: int
    epoch: int
    outcome: str
    started_at: datetime | None
    ended_at: datetime
    error_type: str | None
    error_message: str | None
    error_traceback: str | None
    worker: str | None


@dataclass(frozen=True, kw_only=True)
class TaskState:
    """A task as Celery's AsyncResult sees it."""

    status: TaskStatus
    result: Any
    error_type: str | None
    error_message: str | None
    error_traceback: str | None
    finished_at: datetime | None
    #: all that came before is on disk then
    execution_ended: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", TaskStatus(self.status))  # the driver gives text


@dataclass(frozen=True, kw_only=True)
class ExecutionSummary:
    """One line of a list of executions."""

    execution_id: str
    workflow_id: str
    version: str
    status: ExecutionStatus
    paused: bool
    created_by: str | None
    error_message: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    tasks: int
    ended: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", ExecutionStatus(self.status))  # the driver gives text


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a person did to an execution."""

    #: cancel, pause, resume, retry, rerun or mark
    kind: str
    task_id: str | None
    user_id: str | None
    at: datetime
    detail: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Violation:
    """An invariant that does not hold."""

    violation: str
    execution_id: str
    subject: str
