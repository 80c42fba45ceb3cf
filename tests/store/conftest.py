"""A worker without Celery: it claims and completes, and hands round what a broker would."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from celery import Celery
from psycopg.rows import tuple_row

from pipeline.definition import WorkflowDefinition
from pipeline.dispatch import Dispatcher
from pipeline.result_store.connection import Database
from pipeline.result_store.rows import Ended, Fence, ReadyTask
from pipeline.result_store.store import ResultStore
from pipeline.states import TaskStatus

#: tables with rows that belong to an execution
OF_AN_EXECUTION = ("task_executions", "task_attempts", "join_counters", "workflow_states", "workflow_events")
EPOCH = datetime.fromisoformat("2026-01-01T00:00:00+00:00")


class Driver:
    """Does to the store what workers do, one step at a time."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = ResultStore.open(url, loss_budget=2, keep_plans=True)
        self.dispatcher = Dispatcher(self.store, Celery("tests"), hard_limit=1.0)
        self.worker = self.new_worker()

    def sql(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement on the store's own connection."""
        assert isinstance(self.store.link, Database)
        with self.store.link.connection.cursor(row_factory=tuple_row) as cursor:
            cursor.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def set_clock(self, seconds: float | None) -> None:
        """Stop the clock of the store's connection so many seconds after an epoch; None lets it run."""
        now = "" if seconds is None else (EPOCH + timedelta(seconds=seconds)).isoformat()
        self.sql("SELECT set_config('pipeline.fake_now', %s, false)", now)

    def new_worker(self, lease: float = 3600) -> int:
        """An incarnation whose lease runs."""
        return self.store.start_worker(name="driver", pid=1, lease=lease)

    def start(
        self,
        graph: Mapping[str, str],
        *,
        key: str | None = None,
        input_data: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> str:
        """An execution of a workflow with an id of its own: each task's id and, between spaces, its dependencies."""
        created = self.dispatcher.create(self.define(graph, **more), input_data or {}, idempotency_key=key)
        return created.execution_id

    def define(self, graph: Mapping[str, str], **more: Any) -> WorkflowDefinition:
        """A definition of tasks that do nothing."""
        tasks = [{"id": t, "handler": "debug.noop", "dependencies": needed.split()} for t, needed in graph.items()]
        return WorkflowDefinition.model_validate({"id": f"w-{secrets.token_hex(4)}", "tasks": tasks, **more})

    def fence(self, execution: str, task: str) -> Fence:
        """What an attempt of this worker would hold at the task's epoch."""
        ((epoch,),) = self.sql(
            "SELECT epoch FROM pipeline.task_executions WHERE execution_id = %s AND task_id = %s", execution, task
        )
        return Fence(execution_id=execution, task_id=task, epoch=epoch, worker_id=self.worker)

    def claim(self, execution: str, task: str, *, worker: int | None = None) -> Fence | None:
        """Claim a task with a fresh message."""
        fence = self.fence(execution, task)
        worker = worker or self.worker
        claim = self.store.claim(
            execution_id=execution, task_id=task, epoch=fence.epoch, worker_id=worker, handler="debug.noop"
        )
        return claim and Fence(execution_id=execution, task_id=task, epoch=claim.epoch, worker_id=worker)

    def must_claim(self, execution: str, task: str) -> Fence:
        """Claim a task that can be claimed."""
        fence = self.claim(execution, task)
        assert fence is not None, f"{task} cannot be claimed: {self.tasks(execution)}"
        return fence

    def complete(self, execution: str, task: str, result: Any = None) -> list[str]:
        """Claim and complete; the tasks that this released."""
        return released(self.store.complete(self.must_claim(execution, task), result or {"by": task}))

    def end(self, execution: str, task: str, outcome: str, message: str = "") -> list[str]:
        """Claim and end in any way; the tasks that this released."""
        fence = self.must_claim(execution, task)
        return released(self.store.end(fence, outcome, error_message=message or outcome))

    def drain(self, execution: str, choose: Callable[[list[str]], str] = min) -> list[str]:
        """Complete whatever can be claimed until nothing can; the tasks in the order of their runs."""
        ran = []
        while ready := self.due(execution):
            ran.append(choose(ready))
            self.complete(execution, ran[-1])
        return ran

    def ready_tasks(self, execution: str) -> tuple[ReadyTask, ...]:
        """What is ready, in topological order and as a publisher needs it."""
        found = self.sql(
            """
            SELECT t.task_id, t.epoch, t.handler, w.timeout, t.led_by,
                   CASE WHEN t.led_by IS NOT NULL THEN t.led_in END FROM pipeline.task_executions t
              JOIN pipeline.workflow_executions e USING (execution_id)
              JOIN pipeline.workflow_tasks w ON w.definition_id = e.definition_id AND w.task_id = t.task_id
             WHERE t.execution_id = %s AND t.status = 'pending' AND t.due_at IS NOT NULL ORDER BY w.number
            """,
            execution,
        )
        return tuple(
            ReadyTask(
                execution_id=execution, task_id=task, epoch=epoch, handler=handler, timeout=timeout, led_by=led_by,
                led_in=led_in,
            )
            for task, epoch, handler, timeout, led_by, led_in in found
        )

    def due(self, execution: str) -> list[str]:
        """Tasks that may be claimed."""
        found = self.sql(
            "SELECT task_id FROM pipeline.task_executions WHERE execution_id = %s AND due_at IS NOT NULL ORDER BY 1",
            execution,
        )
        return [task for (task,) in found]

    def tasks(self, execution: str) -> dict[str, str]:
        """Status of each task."""
        return {t.task_id: t.status.value for t in self.store.get_tasks(execution)}

    def status(self, execution: str) -> str:
        """Status of the execution."""
        return self.store.execution_status(execution).value

    def message(self, execution: str, task: str | None = None) -> str | None:
        """Error message of the execution or of one of its tasks."""
        if task is None:
            return self.store.get_execution(execution).error_message
        return {t.task_id: t.error_message for t in self.store.get_tasks(execution)}[task]

    def counters(self, execution: str) -> dict[tuple[int, int], int]:
        """What each header and each of its slots still waits for."""
        found = self.sql("SELECT number, slot, remaining FROM pipeline.join_counters WHERE execution_id = %s", execution)
        return {(number, slot): remaining for number, slot, remaining in found}

    def mark(self, execution: str, task: str, status: str) -> bool:
        """Decide a task by hand; whether that was possible."""
        ended = self.store.mark_task(execution, task, TaskStatus(status), result=None, user_id="ana", reason="why")
        return ended.changed

    def picture(self, execution: str) -> list[tuple[Any, ...]]:
        """Every row of an execution, whole."""
        return [
            row
            for table in ("workflow_executions", *OF_AN_EXECUTION)
            for row in self.sql(f"SELECT x::text FROM pipeline.{table} x WHERE execution_id = %s ORDER BY 1", execution)
        ]

    def clear(self) -> None:
        """Forget all executions and workers but the driver's own."""
        for table in (*OF_AN_EXECUTION, "closings", "workflow_executions"):
            self.sql(f"DELETE FROM pipeline.{table}")
        self.sql("DELETE FROM pipeline.workers WHERE worker_id <> %s", self.worker)

    def close(self) -> None:
        """Let go of the connections."""
        self.store.close()


def released(ended: Ended) -> list[str]:
    """Ids of the tasks that an end released, which is no stale one."""
    assert ended.outcome == "done", ended
    return [task.task_id for task in ended.ready]


@pytest.fixture(scope="module")
def shared(databases: Callable[[], str]) -> Iterator[Driver]:
    """A driver on a database for this module, with partitions: its tests look at executions of their own."""
    driver = Driver(databases())
    driver.sql("SELECT set_config('pipeline.fake_now', (now() - interval '1 day')::text, false)")
    assert driver.store.make_partitions(3) == 1, "made ahead, from tomorrow on"
    driver.set_clock(None)
    yield driver
    driver.close()


@pytest.fixture
def drive(shared: Driver) -> Iterator[Driver]:
    """The module's driver, its clock running; afterwards every invariant holds."""
    shared.set_clock(None)
    yield shared
    shared.set_clock(None)
    assert shared.store.audit() == []


@pytest.fixture
def lone(drive: Driver) -> Driver:
    """The module's driver, with no executions but those of this test."""
    drive.clear()
    return drive


@pytest.fixture
def connect(lone: Driver) -> Iterator[Callable[[], psycopg.Connection[Any]]]:
    """Makes further connections to the database of `lone`."""
    opened: list[psycopg.Connection[Any]] = []

    def make() -> psycopg.Connection[Any]:
        opened.append(psycopg.connect(lone.url, autocommit=True))
        return opened[-1]

    yield make
    for connection in opened:
        connection.close()
