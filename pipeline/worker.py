"""EXECUTE, around the pool: what a worker does beside running tasks, as bootsteps of Celery's worker.

It refuses to start on a database of another schema, runs recovery beside itself, and gives its incarnation back.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

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
)

from pipeline.errors import DatabaseUnavailable, PipelineError
from pipeline.execution import Executor
from pipeline.result_store.migrations import require_current

log = logging.getLogger(__name__)

#: seconds between two looks at whether recovery is still there
_WATCH_EVERY = 5.0


def equip(celery: Celery, executor: Executor, *, database_url: str, recovery_beside: bool) -> None:
    """Give workers of this app their bootsteps and signals."""

    class SchemaGate(bootsteps.StartStopStep):  # type: ignore[misc]
        """Refuses a database that is on another schema version."""

        def __init__(self, worker: Any, **options: Any) -> None:
            super().__init__(worker, **options)
            try:
                require_current(database_url)
            except PipelineError as exc:
                sys.exit(f"worker not started: {exc}")

    celery.steps["worker"].add(SchemaGate)
    if recovery_beside:
        celery.steps["worker"].add(RecoveryBeside)

    def take_name(sender: str, **_: Any) -> None:
        executor.attendant.name = sender

    def redact(logger: logging.Logger, **_: Any) -> None:
        for handler in logger.handlers:
            handler.addFilter(executor.redactor)

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
    worker_process_init.connect(enter, weak=False)
    worker_ready.connect(enter_without_children, weak=False)
    worker_process_shutdown.connect(close, weak=False)
    worker_shutdown.connect(close, weak=False)


class RecoveryBeside(bootsteps.StartStopStep):  # type: ignore[misc]
    """Runs recovery as a process of its own: it asks the database, which a worker's event loop must not wait for."""

    #: after the pool, so that its processes do not hold the pipe open that tells recovery of our end
    requires = ("celery.worker.components:Pool", "celery.worker.components:Timer")

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
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
            command = [sys.executable, "-m", "pipeline", "scheduler", "--until-eof"]
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
