"""Stock Celery, hand-written: prefork with two processes and Celery's defaults.

The limit is a bare drain: no-ops in one queue, early acks, no results. Time is from the first publish to when the last
message, a marker behind the no-ops, is run; `Drained` has all messages in the queue before the worker is let at them, so
that no publisher takes CPU from it. Canvas is chains, groups and chords of immutable signatures with late acks; time is
from `apply_async` to when the last task's result is there, looked for every 5 ms.
"""

from __future__ import annotations

import importlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import redis
from celery import chain, group

from benchmarks.contenders.processes import end, spawn
from benchmarks.driver import CannotRun, Contender, Place, poll
from benchmarks.shapes import Graph


class Stock(Contender):
    """A worker and its app."""

    acks_late = False
    app_module = "benchmarks.contenders.celery_app"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.worker: subprocess.Popen[bytes] | None = None
        self.redis = redis.Redis.from_url(place.redis_url)
        os.environ |= {
            "BENCH_BROKER": place.redis_url,
            "BENCH_RESULTS": self.results(),
            "BENCH_ACKS_LATE": "1" if self.acks_late else "",
        }
        module: Any = importlib.import_module(self.app_module)
        self.celery, self.noop, self.mark = module.app, module.noop, module.mark

    def results(self) -> str:
        """URL of the result backend."""
        return ""

    def start(self) -> None:
        self.worker = self._worker("worker")
        self._await_mark()

    def _worker(self, name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "celery", "-A", self.app_module, "worker", "--pool", "prefork", "--concurrency", "2",
                   "--hostname", f"{name}@bench", "--loglevel", "WARNING"]  # fmt: skip
        return spawn(command, os.environ, self.folder / f"{name}.log")

    def _await_mark(self) -> float:
        key = f"mark-{secrets.token_hex(4)}"
        self.mark.apply_async((key,), ignore_result=True)
        return self._marked(key)

    def _marked(self, key: str) -> float:
        return float(self._await(partial(self.redis.get, key)))

    def _await(self, look: Callable[[], Any]) -> Any:
        def found() -> Any:
            if self.worker is not None and self.worker.poll() is not None:
                raise RuntimeError("the worker has ended")
            return look()

        return poll(found)

    def stop(self) -> None:
        end(self.worker)
        self.redis.close()


class Bare(Stock):
    """The limit: no-ops without results."""

    def prepare(self, graph: Graph) -> int:
        if len(graph.levels) != 2 or len(graph.levels[1]) != 1:
            raise CannotRun("has no order")
        return len(graph)

    def run(self, prepared: int) -> dict[str, float]:
        key = f"mark-{secrets.token_hex(4)}"
        began = self.begin()
        for _ in range(prepared - 1):
            self.noop.apply_async()
        self.mark.apply_async((key,))
        submitted = time.time()
        return {"seconds": self._marked(key) - began, "submit": submitted - began}


class Drained(Bare):
    """The same with all messages in the queue before the worker begins."""

    def run(self, prepared: int) -> dict[str, float]:
        key = f"mark-{secrets.token_hex(4)}"
        self.celery.control.cancel_consumer("celery", reply=True, timeout=5)
        for _ in range(prepared - 1):
            self.noop.apply_async()
        self.mark.apply_async((key,))
        began = self.begin()
        self.celery.control.add_consumer("celery")
        return {"seconds": self._marked(key) - began}


class RedisResults(Stock):
    """Canvas with results in Redis."""

    acks_late = True

    def results(self) -> str:
        return self.place.redis_url

    def prepare(self, graph: Graph) -> Any:
        steps = [group([self.noop.si() for _ in level]) if len(level) > 1 else self.noop.si() for level in graph.levels]
        return chain(*steps) if len(steps) > 1 else steps[0]

    def run(self, prepared: Any) -> dict[str, float]:
        began = self.begin()
        result = prepared.apply_async()
        submitted = time.time()
        waiting = [one.id for one in result.results] if hasattr(result, "results") else [result.id]
        for task in waiting:
            self._await(partial(self._is_done, task))
        seconds = time.time() - began
        if any(not self.celery.AsyncResult(task).successful() for task in waiting):
            raise RuntimeError("the last task has failed")
        return {"seconds": seconds, "submit": submitted - began}

    def _is_done(self, task: str) -> bool:
        return bool(self.redis.exists(self.celery.backend.get_key_for_task(task)))

    def run_many(self, graph: Graph, executions: int, clients: int) -> dict[str, float]:
        prepared = [self.prepare(graph) for _ in range(executions)]
        with ThreadPoolExecutor(clients) as pool:
            began = self.begin()
            found = list(pool.map(self._submit, prepared))
        for task in found:
            self._await(partial(self._is_done, task))
        return {"seconds": time.time() - began}

    def _submit(self, prepared: Any) -> str:
        """Submit one; the id of its last task."""
        return str(prepared.apply_async().id)


class PostgresResults(RedisResults):
    """Canvas with results in Postgres, by SQLAlchemy."""

    def results(self) -> str:
        return self.place.database_url.replace("postgresql://", "db+postgresql+psycopg://")

    def _is_done(self, task: str) -> bool:
        return bool(self.celery.AsyncResult(task).ready())
