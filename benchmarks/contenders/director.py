"""celery-director with its defaults: lists of tasks and flat groups, its state in Postgres, broker and results in Redis.

Time is from the call of `WorkflowBuilder.run`, with the workflow's own row before it, to when the last task's row was
updated; the half second that its end task sleeps is not counted.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.contenders.processes import end, spawn
from benchmarks.driver import CannotRun, Contender, Place, poll
from benchmarks.shapes import Graph

_TASKS = """from director import task


@task(name="NOOP")
def noop(*args, **kwargs):
    return None
"""


class Director(Contender):
    """A worker, and this process as the one that submits."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        home = self.folder / "home"
        (home / "tasks").mkdir(parents=True)
        (home / "tasks" / "noop.py").write_text(_TASKS)
        (home / "workflows.yml").write_text("bench.NOOP:\n  tasks:\n    - NOOP\n")
        os.environ |= {
            "DIRECTOR_HOME": str(home),
            "DIRECTOR_DATABASE_URI": place.database_url,
            "DIRECTOR_BROKER_URI": place.redis_url,
            "DIRECTOR_RESULT_BACKEND_URI": place.redis_url,
        }
        self.worker: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        scripts = Path(sys.executable).parent
        with (self.folder / "upgrade.log").open("wb") as log:
            subprocess.run([scripts / "director", "db", "upgrade"], stdout=log, stderr=log, check=True)
        command = [str(scripts / "director"), "celery", "worker", "--concurrency", "2", "--hostname", "worker@bench"]
        self.worker = spawn(command, None, self.folder / "worker.log")
        package: Any = importlib.import_module("director")
        self.app = package.create_app()
        extensions: Any = importlib.import_module("director.extensions")
        self.workflows, self.celery = extensions.cel_workflows.workflows, extensions.cel
        self.row: Any = importlib.import_module("director.models.workflows").Workflow
        self.builder: Any = importlib.import_module("director.builder").WorkflowBuilder
        self.database: Any = importlib.import_module("psycopg2").connect(self.place.database_url)
        self.database.autocommit = True
        poll(lambda: self.celery.control.ping(timeout=0.5), 0.1)

    def prepare(self, graph: Graph) -> tuple[str, int]:
        if not graph.is_layered:
            raise CannotRun("has lists and groups only")
        steps: list[Any] = [
            {f"level{number}": {"type": "group", "tasks": ["NOOP"] * len(level)}} if len(level) > 1 else "NOOP"
            for number, level in enumerate(graph.levels)
        ]
        self.workflows[f"bench.{graph.name}"] = {"tasks": steps}
        return graph.name, len(graph)

    def run(self, prepared: tuple[str, int]) -> dict[str, float]:
        name, tasks = prepared
        began = self.begin()
        submitted = self._submit(name)
        handed_over = time.time()
        return {"seconds": self._end([submitted], tasks) - began, "submit": handed_over - began}

    def run_many(self, graph: Graph, executions: int, clients: int) -> dict[str, float]:
        name, tasks = self.prepare(graph)
        with ThreadPoolExecutor(clients) as pool:
            began = self.begin()
            submitted = list(pool.map(self._submit, [name] * executions))
        return {"seconds": self._end(submitted, tasks * executions) - began}

    def _submit(self, name: str) -> str:
        with self.app.app_context():
            row = self.row(project="bench", name=name, payload={})
            row.save()
            self.builder(row.id).run()
            return str(row.id)

    def _end(self, workflows: list[str], tasks: int) -> float:
        """When the last of their tasks was updated, once all have succeeded."""
        query = """SELECT count(*) FILTER (WHERE status = 'success'), count(*) FILTER (WHERE status = 'error'),
                          extract(epoch FROM max(updated_at)) FROM tasks WHERE workflow_id = ANY (%s::uuid[])"""

        def ended() -> float:
            with self.database.cursor() as cursor:
                cursor.execute(query, (workflows,))
                done, failed, last = cursor.fetchone()
            if failed or self.worker is None or self.worker.poll() is not None:
                raise RuntimeError(f"{failed} tasks failed, or the worker has ended")
            return float(last) if done == tasks else 0.0

        return float(poll(ended, 0.02))

    def stop(self) -> None:
        end(self.worker)
