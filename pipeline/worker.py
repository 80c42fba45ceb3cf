"""EXECUTE, around the pool: what a worker does beside running tasks, as bootsteps of Celery's worker.

It refuses to start on a database of another schema, runs recovery beside itself, and gives its incarnation back.
"""

from __future__ import annotations

import gc
import heapq
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from billiard import pool as billiard_pool
from billiard.process import current_process
from celery import Celery, bootsteps
from celery.concurrency import prefork
from celery.signals import (
    after_setup_logger,
    after_setup_task_logger,
    celeryd_init,
    worker_process_init,
    worker_process_shutdown,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)
from celery.worker import consumer, request

from pipeline.errors import DatabaseUnavailable, PipelineError
from pipeline.execution import Executor
from pipeline.result_store.migrations import require_current

log = logging.getLogger(__name__)

#: seconds between two looks at whether recovery is still there, and at timers that are of no use any more
_WATCH_EVERY = 5.0
#: seconds: longer than any task may take
_LONGEST_LIMIT = 10_000_000


class Request(request.Request):  # type: ignore[misc]
    """A message that a process of the pool runs: says which one when that is lost."""

    _process_is_gone = False

    def on_failure(self, exc_info: Any, *args: Any, **options: Any) -> None:
        """The process is lost, or the task has failed."""
        self._context.worker_pid = self.worker_pid
        self._process_is_gone = not options.get("return_ok", False)
        super().on_failure(exc_info, *args, **options)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """The process is killed at the hard time limit."""
        self._context.worker_pid = self.worker_pid
        self._process_is_gone = not soft
        super().on_timeout(soft, timeout)

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002 - Celery's name
        """Not a success, which the process of the pool has told; nor for the message what its process took with it."""
        if type != "task-succeeded" and not (type == "task-failed" and self._process_is_gone):
            super().send_event(type, **fields)


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Drops a message that cannot be one of Celery's: taken for a broken connection, it would come again for ever."""

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        """What is called with each message."""
        handle = super().create_task_handler(*args, **options)

        def guarded(message: Any) -> Any:
            try:
                self.app.reporter.heed(self.event_dispatcher)
                _check_time_limits(message.headers)  # Celery reads them later, where an error ends the worker
                return handle(message)
            except Exception as exc:
                log.warning("a message of the wrong form was dropped: %s: %s", type(exc).__name__, exc)
                if not message.acknowledged:
                    message.reject_log_error(log, self.connection_errors)

        return guarded


def _check_time_limits(headers: Any) -> None:
    match headers.get("timelimit"):
        case None:
            return
        case [hard, soft] if all(limit is None or _is_time_limit(limit) for limit in (hard, soft)):
            return
        case other:
            raise ValueError(f"time limits {other!r:.100}")


def _is_time_limit(limit: Any) -> bool:
    return isinstance(limit, int | float) and not isinstance(limit, bool) and 0.5 <= limit <= _LONGEST_LIMIT


def equip(celery: Celery, executor: Executor, *, database_url: str, recovery_beside: bool, drain: float) -> None:
    """Give workers of this app their bootsteps and signals."""

    class SchemaGate(bootsteps.StartStopStep):  # type: ignore[misc]
        """Refuses a database that is on another schema version."""

        def __init__(self, worker: Any, **options: Any) -> None:
            super().__init__(worker, **options)
            try:
                require_current(database_url)
            except PipelineError as exc:
                sys.exit(f"worker not started: {exc}")

    class Drain(bootsteps.StartStopStep):  # type: ignore[misc]
        """After SIGTERM, running tasks go on for a while; then, or at a second one, they go back for another worker."""

        requires = ("celery.worker.components:Pool",)

        def __init__(self, worker: Any, **options: Any) -> None:
            super().__init__(worker, **options)
            self._worker = worker
            worker_shutting_down.connect(self._begin, weak=False)

        def _begin(self, how: str, **_: Any) -> None:
            if how == "Warm":
                executor.attendant.leave()
                signal.signal(signal.SIGTERM, lambda number, frame: self._hand_back())
                timer = threading.Timer(drain, self._hand_back)
                timer.daemon = True
                timer.start()

        def _hand_back(self) -> None:
            executor.attendant.hand_back()  # what this process runs; a prefork pool's processes run the rest
            for pid in (self._worker.pool.info.get("processes") or []) if self._worker.pool else []:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    celery.reporter = executor.reporter
    celery.conf.worker_consumer = Consumer
    celery.steps["worker"].add(SchemaGate)
    celery.steps["worker"].add(Drain)
    celery.steps["worker"].add(TimerSweep)
    if recovery_beside:
        celery.steps["worker"].add(RecoveryBeside)

    def take_name(sender: str, **_: Any) -> None:
        executor.attendant.name = executor.reporter.node = sender

    def redact(logger: logging.Logger, **_: Any) -> None:
        for handler in logger.handlers:
            handler.addFilter(executor.redactor)

    # A child that ends waits until its parent has read its last answer, and a parent that ends may never read it. What
    # an answer says is in the store; the default is half a minute.
    billiard_pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = 20  # tenths of a second

    def settle(**_: Any) -> None:
        gc.freeze()  # what came with the fork stays: to look at it would unshare its pages and put real garbage off

    def enter(**_: Any) -> None:
        try:
            executor.attendant.worker_id()
        except DatabaseUnavailable as exc:  # the first claim tries again
            log.warning("%s", exc)

    def enter_without_children(sender: Any, **_: Any) -> None:
        if not isinstance(sender.pool, prefork.TaskPool):
            enter()

    def close(**_: Any) -> None:
        executor.attendant.close()

    celeryd_init.connect(take_name, weak=False)
    after_setup_logger.connect(redact, weak=False)
    after_setup_task_logger.connect(redact, weak=False)
    worker_process_init.connect(settle, weak=False)
    worker_process_init.connect(enter, weak=False)
    worker_ready.connect(enter_without_children, weak=False)
    worker_process_shutdown.connect(close, weak=False)
    worker_shutdown.connect(close, weak=False)


class TimerSweep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Drops the timers of tasks that have ended: each would keep its place until its task's time limit would have passed."""

    requires = ("celery.worker.components:Timer",)

    def start(self, worker: Any) -> None:
        """Begin."""
        queue: list[Any] | None = getattr(worker.timer, "_queue", None)  # only an event loop's timer has one
        if queue is not None:
            worker.timer.call_repeatedly(_WATCH_EVERY, self._sweep, (queue,))

    @staticmethod
    def _sweep(queue: list[Any]) -> None:
        queue[:] = [scheduled for scheduled in queue if not scheduled.entry.canceled]
        heapq.heapify(queue)


class RecoveryBeside(bootsteps.StartStopStep):  # type: ignore[misc]
    """Runs recovery as a process of its own: it asks the database, which a worker's event loop must not wait for."""

    #: after the pool, so that its processes do not hold the pipe open that tells recovery of our end
    requires = ("celery.worker.components:Pool", "celery.worker.components:Timer")

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._name = worker.hostname
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: Any = None

    def start(self, worker: Any) -> None:
        """Start it, and see to it that it stays; it ends when its standard input does."""
        self._ensure()
        self._watch = worker.timer.call_repeatedly(_WATCH_EVERY, self._ensure)

    def _ensure(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            log.warning("recovery ended with code %s; starting it again", self._process.returncode)
            self._release(self._process)
            self._process = None
        if self._process is None:
            beside = f"{self._name}:{os.getpid()}"
            command = [sys.executable, "-m", "pipeline", "scheduler", "--beside", beside]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def stop(self, worker: Any) -> None:
        """End it."""
        process, self._process = self._process, None
        if self._watch is not None:
            self._watch.cancel()
        if process is not None:
            self._release(process)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @staticmethod
    def _release(process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        process.stdin.close()

    terminate = stop


def in_pool_child() -> bool:
    """Whether this process is one of a prefork pool's, which its parent replaces when it dies."""
    return bool(current_process().name != "MainProcess")
