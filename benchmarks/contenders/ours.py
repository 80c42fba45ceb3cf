"""This engine: `pipeline up --workers 1 --concurrency 2`, with recovery beside the worker as it is by default.

Time is from the call of `execute_workflow`, with a definition that is registered, to the execution's `finished_at`.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import subprocess
import sys
import time
from typing import Any

from benchmarks.contenders.processes import PeakMemory, cpu_share, end, spawn
from benchmarks.driver import Contender, Place, poll
from benchmarks.shapes import Graph
from config.settings import Settings
from pipeline import WorkflowDefinition, WorkflowEngine
from pipeline.result_store.migrations import upgrade

#: what the largest shape needs
_MOST_TASKS = 200_000
#: seconds that a stack may settle before its idle time is taken
_SETTLE = 3.0


class Ours(Contender):
    """The engine as its README starts it."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.settings = _settings(place)
        self.up: subprocess.Popen[bytes] | None = None
        self._workers = 0
        self._engine: WorkflowEngine | None = None

    @property
    def engine(self) -> WorkflowEngine:
        assert self._engine is not None
        return self._engine

    def start(self) -> None:
        upgrade(self.place.database_url)
        self._engine = WorkflowEngine(settings=self.settings)
        self._have(1)

    def _have(self, workers: int, *, fresh: bool = False) -> int:
        """Have so many workers; the stack's process id."""
        if fresh or workers != self._workers or self.up is None:
            end(self.up)
            self._workers, self.up = workers, self._up(workers)
        return self.up.pid

    def _up(self, workers: int) -> subprocess.Popen[bytes]:
        log = self.folder / "up.log"
        log.write_bytes(b"")
        command = [
            sys.executable,
            "-m",
            "pipeline",
            "up",
            "--workers",
            str(workers),
            "--concurrency",
            "2",
            "--no-flower",
        ]
        up = spawn(command, {**os.environ, **_environment(self.place)}, log)
        poll(
            lambda: up.poll() is not None or any(line.startswith(b"ready") for line in log.read_bytes().splitlines()),
            0.05,
        )
        if up.poll() is not None:
            raise RuntimeError(log.read_text("utf-8", "replace")[-800:])
        return up

    def prepare(self, graph: Graph) -> WorkflowDefinition:
        return self.engine.register(_definition(graph, graph.name))

    def run(self, prepared: WorkflowDefinition) -> dict[str, float]:
        self._have(1)
        began = self.begin()
        execution_id = self.engine.execute_workflow(prepared)
        submitted = time.time()
        execution = self.engine.wait(execution_id)
        done = sum(task.status.value == "success" for task in execution.tasks.values())
        if execution.status.value != "success" or done < len(prepared.tasks) or execution.finished_at is None:
            raise RuntimeError(
                f"{execution.status.value}, {done} of {len(prepared.tasks)} done: {execution.error_message}"
            )
        seconds = execution.finished_at.timestamp() - began
        return {"seconds": seconds, "submit": submitted - began}

    def memory(self, graph: Graph) -> dict[str, float]:
        with PeakMemory(self._have(1, fresh=True)) as memory:
            answer = self.run(self.prepare(graph))
        return {"seconds": answer["seconds"], "megabytes": memory.peak}

    def run_many(self, graph: Graph, executions: int, clients: int) -> dict[str, float]:
        return self._run_small(graph, executions, clients, together=False)

    def run_together(self, graph: Graph, executions: int, clients: int) -> dict[str, float]:
        return self._run_small(graph, executions, clients, together=True)

    def _run_small(self, graph: Graph, executions: int, clients: int, *, together: bool) -> dict[str, float]:
        self._have(1)
        prepared = self.prepare(graph)
        context = multiprocessing.get_context("spawn")
        start, over, submitted = context.Barrier(clients + 1), context.Event(), context.SimpleQueue()
        each = [executions // clients + (number < executions % clients) for number in range(clients)]
        started = [
            context.Process(target=_client, args=(self.settings, graph, count, together, start, over, submitted))
            for count in each
        ]
        for client in started:
            client.start()
        start.wait()
        began = self.begin()
        handed_over = max(submitted.get() for _ in started)

        def ended() -> float:
            if any(self.engine.list_executions(status=status, limit=1) for status in ("pending", "running")):
                return 0.0
            rows = [row for row in self.engine.list_executions(limit=executions) if row.workflow_id == prepared.id]
            ends = [row.finished_at.timestamp() for row in rows if row.finished_at and row.status.value == "success"]
            return max(ends) if len(ends) == executions else 0.0

        # the time is in the rows, so looking seldom costs nothing; and as long as one runs, a look is a short one
        seconds = poll(ended, 0.25) - began
        over.set()
        for client in started:
            client.join()
        return {"seconds": seconds, "submit": handed_over - began}

    def submit(self, graph: Graph, *, known: bool) -> dict[str, float]:
        definition: Any = _definition(graph, f"{graph.name}-{secrets.token_hex(4)}")
        if known:
            definition = self.engine.register(definition)
        self._have(1)
        began = self.begin()
        execution_id = self.engine.execute_workflow(definition)
        seconds = time.time() - began
        self.engine.wait(execution_id)
        return {"seconds": seconds}

    def start_worker(self, processes: int) -> dict[str, float]:
        store = self.engine.installation.store
        newest, began = store.newest_worker(), self.begin()
        worker = spawn(
            [sys.executable, "-m", "pipeline", "worker", "--name", "late", "--concurrency", str(processes)],
            {**os.environ, **_environment(self.place)},
            self.folder / "late.log",
        )
        poll(lambda: worker.poll() is not None or store.live_workers(after=newest) >= processes)
        seconds = time.time() - began
        if worker.poll() is not None:
            raise RuntimeError((self.folder / "late.log").read_text("utf-8", "replace")[-800:])
        end(worker)
        return {"seconds": seconds}

    def idle(self, seconds: int) -> dict[str, float]:
        stack = self._have(2)
        time.sleep(_SETTLE)
        return {"cpu": cpu_share(stack, seconds)}

    def stop(self) -> None:
        end(self.up)
        if self._engine is not None:
            self._engine.close()


def _settings(place: Place) -> Settings:
    values = {name.removeprefix("PIPELINE_").lower(): text for name, text in _environment(place).items()}
    return Settings.model_validate(values)


def _environment(place: Place) -> dict[str, str]:
    return {
        "PIPELINE_DATABASE_URL": place.database_url,
        "PIPELINE_BROKER_URL": place.redis_url,
        "PIPELINE_HOME": place.folder,
        "PIPELINE_MAX_TASKS": str(_MOST_TASKS),
    }


def _definition(graph: Graph, name: str) -> dict[str, Any]:
    tasks = [
        {"id": f"t{task}", "handler": "debug.noop", "dependencies": [f"t{need}" for need in needs]}
        for task, needs in enumerate(graph.needs)
    ]
    return {"id": name, "version": "1", "tasks": tasks}


def _client(
    settings: Settings, graph: Graph, executions: int, together: bool, start: Any, over: Any, submitted: Any
) -> None:  # fmt: skip
    with WorkflowEngine(settings=settings) as engine:
        # a client that has lived for a while
        engine.wait(engine.execute_workflow(_definition(graph, f"{graph.name}-before")))
        definition = engine.register(_definition(graph, graph.name))
        start.wait()
        if together:
            engine.execute_many(definition, [{}] * executions)
        else:
            for _ in range(executions):
                engine.execute_workflow(definition)
        submitted.put(time.time())
        over.wait()  # its end would take CPU from what is measured
