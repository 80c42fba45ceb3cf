"""EXECUTE: the Celery task around every handler.

    claim -> render -> merge -> check -> run -> record -> publish

Nothing of the user's runs before the claim is recorded, nothing is published before the end is recorded, and all of it
happens in the task's body: Celery acknowledges messages whose result backend raises, and calls links before it stores.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import random
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from billiard.common import terminate_handler_fired
from celery import Task
from celery.exceptions import Ignore, TaskPredicate
from celery.exceptions import Retry as CeleryRetry
from pydantic import ValidationError

from pipeline.artifacts import ArtifactStore
from pipeline.attendance import Attendance, Cancelled, HandedBack
from pipeline.attendant import Attendant
from pipeline.definition import RetryPolicy
from pipeline.dispatch import Dispatcher
from pipeline.errors import (
    DatabaseUnavailable,
    Fail,
    ParamsError,
    Refused,
    ResultError,
    Retry,
    Skip,
    TaskError,
    TaskTimeout,
    TemplateError,
)
from pipeline.events import Reporter
from pipeline.handler import AttemptLost, Context, Handler
from pipeline.payload import bound_name, recordable, text_of
from pipeline.redaction import Redactor
from pipeline.result_store.rows import Claim, Ended, Fence, State
from pipeline.result_store.store import ResultStore
from pipeline.templates import render, task_names
from pipeline.turn import Turns

log = logging.getLogger(__name__)

#: what is wrong with the task and not with the moment: no retry mends it
NEVER_RETRIED = (Fail, Skip, ParamsError, TemplateError, ResultError, Refused, AttemptLost, Cancelled, HandedBack)
#: how an attempt ended that was stopped for a reason outside the task
_STOPPED: dict[type[Exception], str] = {Cancelled: "cancelled", HandedBack: "released"}
#: how much of a traceback is kept, from its end
_TRACEBACK_LENGTH = 16_384
_MESSAGE_LENGTH = 8_192
#: executions whose state a process remembers
_STATES = 64


@dataclass(frozen=True, kw_only=True)
class ExecutionPolicy:
    """What the installation decides for all tasks."""

    artifacts_root: str
    handler_settings: Mapping[str, Any]
    secrets: Mapping[str, str]
    max_result_bytes: int


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A claimed task, with all that its run needs."""

    fence: Fence
    claim: Claim
    state: State
    attendance: Attendance

    def retry_delay(self, exc: BaseException) -> float | None:
        """Seconds until the next try, or None where there is none left."""
        return _delay_after(exc, self.claim.retry_policy, self.claim.retries)


def retry_delay(exc: BaseException, policy: RetryPolicy, retries: int, uniform: float) -> float | None:
    """Seconds until the next try, or None where there is none left: the definition's policy decides, or `Retry(after)`.

    Args:
        exc: what the attempt failed with.
        retries: how many of the policy's retries are used.
        uniform: the jitter's die, in [0, 1).
    """
    if retries >= policy.max_retries:
        return None
    if isinstance(exc, Retry) and exc.after is not None:
        return max(0.0, exc.after)
    return policy.delay(retries, uniform)


def _delay_after(exc: BaseException, declared: Mapping[str, Any] | None, retries: int) -> float | None:
    """The same with a die, for a policy as the store has it."""
    return retry_delay(exc, RetryPolicy(**declared or {}), retries, random.random())  # noqa: S311


class HandlerTask(Task):  # type: ignore[misc]
    """A handler as a Celery task; Celery's autoretry wraps `run` and asks `retry`, which asks the definition."""

    abstract = True
    typing = False
    ignore_result = True
    acks_late = False
    max_retries = None
    retry_backoff = True
    handler: Handler
    executor: Executor
    #: knows the process that it was given to
    Request = "pipeline.worker:Request"
    #: Celery's own tracer of this task, for one run
    tracer: Callable[..., Any] | None = None

    @property
    def __trace__(self) -> Callable[..., Any] | None:
        """What Celery calls with a message; what it sets here is kept as `tracer`."""
        return None if self.tracer is None else self.executor.turns.tracer(self.name, self.tracer)

    @__trace__.setter
    def __trace__(self, tracer: Callable[..., Any] | None) -> None:
        self.tracer = tracer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What Celery calls with a message's arguments."""
        return self.executor.execute(self, args)

    def run(self, attempt: Attempt) -> Any:
        """One call of the handler."""
        return self.executor.call(self.handler, attempt)

    def retry(self, *args: Any, exc: Exception | None = None, **options: Any) -> Any:
        """Record when the task is due again and raise Celery's Retry, without a message: recovery publishes it."""
        attempt: Attempt = self.request.attempt
        failure = exc or Retry()
        delay = attempt.retry_delay(failure)
        if delay is None:
            raise failure
        try:
            self.executor.record(attempt, "retry", failure, delay=delay)
        except DatabaseUnavailable as outage:  # raised on, it would be recorded as what the task failed with
            raise Ignore from outage
        when = datetime.now(UTC) + timedelta(seconds=delay)
        raise CeleryRetry(exc=self.executor.shown(failure), when=when) from None


def celery_task(handler: Handler, executor: Executor) -> HandlerTask:
    """The Celery task of a handler, named as it."""
    retried = (Exception,) if handler.retry_on is None else (*handler.retry_on, Retry, TaskTimeout)
    attributes = {
        "name": handler.name,
        "handler": handler,
        "executor": executor,
        "autoretry_for": retried,
        "dont_autoretry_for": (*NEVER_RETRIED, *handler.never_retry_on),
        "__module__": handler.function.__module__,
        "__doc__": handler.function.__doc__,
    }
    task: HandlerTask = type(handler.name, (HandlerTask,), attributes)()
    return task


class Executor:
    """Runs attempts of tasks in this process."""

    def __init__(
        self, store: ResultStore, dispatcher: Dispatcher, policy: ExecutionPolicy, *,
        lease: float, hard_limit: float, worker_name: str, killable: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.store, self.dispatcher, self.policy = store, dispatcher, policy
        self.redactor = Redactor.of(policy.secrets.values())
        self.reporter = Reporter(dispatcher.celery, dispatcher.broker_errors)
        self.attendant = Attendant(store, lease=lease, hard_limit=hard_limit, name=worker_name, killable=killable)
        self.turns = Turns(dispatcher, self.attendant, self.reporter)
        self._states: dict[str, State] = {}

    def execute(self, task: HandlerTask, message: tuple[Any, ...]) -> Any:
        """Everything that happens between a message and its successors' messages.

        Raises:
            Ignore: the message was stale, doubled or forged, or the attempt was lost: there is nothing to record.
            CeleryRetry: the attempt failed and is due again.
            Exception: what the attempt failed with, after that was recorded.
        """
        named, turn = self.turns.read(message), self.turns.current
        execution_id, task_id, epoch = named.execution_id, named.task_id, named.epoch
        worker_id = self.attendant.worker_id()
        claim = turn.claim_of(named) if turn is not None else None
        if self.attendant.leaving:  # nothing starts here any more
            if turn is not None:
                turn.over = True
            if claim is not None:
                fence = Fence(execution_id=execution_id, task_id=task_id, epoch=claim.epoch, worker_id=worker_id)
                self.store.end(fence, "released", error_type="HandedBack", error_message="its worker is shutting down")
            else:
                self.dispatcher.give_back(execution_id, task_id, epoch, task)
            raise Ignore
        if claim is None:
            claim = self.store.claim(
                execution_id=execution_id, task_id=task_id, epoch=epoch, worker_id=worker_id, handler=task.name,
                with_state=execution_id not in self._states,
            )  # fmt: skip
            if turn is not None and (leads := claim.leads if claim else self.store.leads_of(execution_id, task_id)):
                turn.lead(leads)
                self.turns.watch(turn)
        if claim is None:
            log.debug("message for task %s of %s (epoch %s) is stale", task_id, execution_id, epoch)
            raise Ignore
        fence = Fence(execution_id=execution_id, task_id=task_id, epoch=claim.epoch, worker_id=worker_id)
        timeout = min(claim.timeout, task.handler.timeout or claim.timeout)
        with self.attendant.attending(fence, timeout) as attendance:
            if attendance is None:  # a doubled message repeats the claim of another thread
                raise Ignore
            attempt = Attempt(
                fence=fence, claim=claim, state=self._state(execution_id, claim.state), attendance=attendance
            )
            attendance.give_up = partial(self._give_up, attempt)
            task.request.attempt = attempt
            return self._run(task, attempt)

    def _state(self, execution_id: str, brought: State | None) -> State:
        state = brought or self._states.get(execution_id) or self.store.state(execution_id)
        if self._states.setdefault(execution_id, state) is state and len(self._states) > _STATES:
            with suppress(KeyError, RuntimeError, StopIteration):  # other threads do the same
                del self._states[next(iter(self._states))]
        return state

    def _run(self, task: HandlerTask, attempt: Attempt) -> Any:
        try:
            result = task.run(attempt)
        except (CeleryRetry, Ignore):
            raise
        except AttemptLost as exc:
            log.warning("task %s of %s: %s", attempt.fence.task_id, attempt.fence.execution_id, exc)
            raise Ignore from exc
        except Skip as exc:
            self.record(attempt, "skipped", exc)
            return {"skipped": self.redactor.text(str(exc))}
        except (Cancelled, HandedBack) as exc:
            self.record(attempt, _STOPPED[type(exc)], exc)
            if isinstance(exc, Cancelled):
                self.reporter.stopped(task.request.id)
            raise Ignore from exc
        except SystemExit:
            self.record(attempt, "released", HandedBack("its worker was told to end at once"))
            raise
        except Exception as exc:
            self.record(attempt, "failed", exc)
            shown = self.shown(exc)
            if shown is exc:
                raise
            raise shown from None
        turn = self.turns.current
        if turn is None:
            self._after(attempt.fence, self.store.complete(attempt.fence, result))
            return result
        turn.over = turn.over or self.attendant.leaving
        ended = self.store.complete(attempt.fence, result, turn.follow(self._states))
        self._after(attempt.fence, replace(ended, ready=turn.go_on(ended)))
        self.turns.watch(turn)
        return result

    def call(self, handler: Handler, attempt: Attempt) -> Any:
        """Render, merge, check and run; returns what is recorded.

        Raises:
            TemplateError, ParamsError, ResultError: see there.
            Exception: what the handler raised.
        """
        try:
            merged = self._merged(handler, attempt)
        except DatabaseUnavailable as outage:  # no failure of the task's: the attempt is found lost and runs again
            raise Ignore from outage
        began = time.monotonic()
        try:
            return attempt.attendance.run(lambda: self._call(handler, attempt, merged))
        except BaseException as exc:
            of_the_task = isinstance(exc, Exception) and not isinstance(exc, TaskPredicate)
            if of_the_task or terminate_handler_fired():  # then the worker goes down, and the task is given back
                raise
            raise RuntimeError(f"the handler raised {exc!r}, which says nothing about its task") from exc
        finally:
            self.attendant.note_run(handler.name, time.monotonic() - began)

    def _merged(self, handler: Handler, attempt: Attempt) -> dict[str, Any]:
        """Params, then the execution's input, then the results of dependencies."""
        fence, claim, state = attempt.fence, attempt.claim, attempt.state
        params = claim.params or {}
        names = {p.name for p in handler.spec.parameters}
        taken = {d: bound_name(d, names) for d in claim.dependencies if handler.open_ended or bound_name(d, names)}
        mentioned = task_names(params)
        needed, results = {*taken, *mentioned}, claim.results or {}
        if not needed <= results.keys():
            results = self.store.results(fence.execution_id, needed)
        execution = {
            "id": fence.execution_id, "workflow_id": state.workflow_id, "user_id": state.created_by,
            "task_id": fence.task_id, "attempt": claim.attempt,
        }  # fmt: skip
        scope = {
            "input": state.input_data, "variables": state.variables, "execution": execution,
            "tasks": results, "secrets": self.policy.secrets,
        }  # fmt: skip
        # Copied, for the handler may change what it is given, and the execution's state serves its other tasks too.
        merged = copy.deepcopy({**render(params, scope), **state.input_data})
        return merged | {name or d: results.get(d) for d, name in taken.items()}

    def _call(self, handler: Handler, attempt: Attempt, merged: dict[str, Any]) -> Any:
        """All that may run code of the handler's author."""
        try:
            arguments = handler.input_adapter.validate_python(merged)
        except ValidationError as exc:
            wrong = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors(include_url=False, include_input=False)
            )
            raise ParamsError(f"input of handler {handler.name!r} does not fit: {wrong}") from None
        if handler.context_parameter is not None:
            arguments[handler.context_parameter] = self._context(attempt)
        returned = handler.function(**arguments)
        if inspect.iscoroutine(returned):
            with asyncio.Runner() as runner:
                attempt.attendance.take_loop(runner.get_loop())
                returned = runner.run(returned)
        return recordable(returned, self.redactor, self.policy.max_result_bytes)

    def _context(self, attempt: Attempt) -> Context:
        fence, attendance = attempt.fence, attempt.attendance
        folder = f"{fence.execution_id}/{fence.task_id}/{fence.epoch}"
        return Context(
            execution_id=fence.execution_id, task_id=fence.task_id, workflow_id=attempt.state.workflow_id,
            attempt=attempt.claim.attempt, epoch=fence.epoch, user_id=attempt.state.created_by,
            artifacts=ArtifactStore(root=self.policy.artifacts_root, folder=folder),
            settings=self.policy.handler_settings, renew=attendance.renew, is_cancelled=attendance.is_cancelled,
            report=lambda percent, message: attendance.report(percent, self.redactor.text(message)),
        )  # fmt: skip

    def record(self, attempt: Attempt, outcome: str, exc: BaseException, *, delay: float = 0.0) -> None:
        """Record an end other than success, and publish what it released."""
        lines = traceback.format_exception(exc) if outcome in ("failed", "retry") else []
        ended = self.store.end(
            attempt.fence, outcome, delay=delay, error_type=type(exc).__name__,
            error_message=self._storable(text_of(exc))[:_MESSAGE_LENGTH],
            error_traceback=self._storable("".join(lines))[-_TRACEBACK_LENGTH:] or None,
        )  # fmt: skip
        self._after(attempt.fence, ended)

    def shown(self, exc: Exception) -> Exception:
        """What Celery may log, send as an event and pickle: the exception, or its name and text without secrets."""
        if isinstance(exc, MemoryError) or self.redactor.holds(exc):  # Celery takes a MemoryError for its own
            return TaskError(f"{type(exc).__name__}: {self._storable(text_of(exc))}")
        return exc

    def _storable(self, text: str) -> str:
        """Without secrets, and without what Postgres cannot hold as text."""
        return self.redactor.text(text).replace("\0", "").encode(errors="backslashreplace").decode()

    def lost(self, pid: int, exc: BaseException) -> None:
        """What only the worker's main process learns: a process was killed."""
        store = self.attendant.store
        for attempt in store.running_in(self.attendant.name, pid):
            self.reporter.lost(f"{attempt.execution_id}_{attempt.task_id}", exc)
            store.end(attempt, "lost", error_type="WorkerLost", error_message=text_of(exc))

    def timed_out(self, pid: int, exc: BaseException) -> None:
        """What only the worker's main process learns: the hard time limit killed a process."""
        store = self.attendant.store
        for running in store.running_in(self.attendant.name, pid):
            self.reporter.lost(f"{running.execution_id}_{running.task_id}", exc)
            delay = _delay_after(exc, running.retry_policy, running.retries)
            store.end(
                running, "failed" if delay is None else "retry", delay=delay or 0.0,
                error_type="TaskTimeout", error_message=f"did not stop at its timeout and was killed: {text_of(exc)}",
            )  # fmt: skip

    def _give_up(self, attempt: Attempt, reason: Exception) -> None:
        """End an attempt whose handler does not stop, from the attendant's thread."""
        delay = None
        if isinstance(reason, TaskTimeout):
            delay = attempt.retry_delay(reason)
        outcome = _STOPPED.get(type(reason)) or ("failed" if delay is None else "retry")
        self.record(attempt, outcome, reason, delay=delay or 0.0)

    def _after(self, fence: Fence, ended: Ended) -> None:
        if ended.outcome == "stale":
            log.warning("task %s of %s moved on without this attempt", fence.task_id, fence.execution_id)
        self.dispatcher.try_publish(ended.ready)
